"""What the tests of the equations share: ragged batches, poison for padding, and the comparisons
that every function has to stand."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from tolerances import EXACT, FP64
from torch import Tensor

settings.register_profile("equations", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("equations")

NAN, INF = float("nan"), float("inf")
RAGGED = torch.tensor([[True, True, True], [True, False, False]])
POISONS = (NAN, INF, -INF, 1e30, -1e30)  # what might lie in padding


def numbers(low: float = -3.0, high: float = 3.0) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False)


@st.composite
def tensors(draw: st.DrawFn, *shape: int, low: float = -3.0, high: float = 3.0) -> Tensor:
    """A float64 tensor of this shape."""
    size = torch.Size(shape).numel()
    values = draw(st.lists(numbers(low, high), min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


@st.composite
def ragged_masks(draw: st.DrawFn, *, rows: int | None = None, real_tokens: int = 1) -> Tensor:
    """Right-padded masks: a real token or more in each row, `real_tokens` or more together."""
    lengths = draw(
        st.lists(st.integers(1, 5), min_size=rows or 1, max_size=rows or 5).filter(
            lambda lengths: sum(lengths) >= real_tokens
        )
    )
    width = max(lengths) + draw(st.integers(0, 2))
    return torch.tensor([[t < length for t in range(width)] for length in lengths])


@st.composite
def ragged_batches(
    draw: st.DrawFn, count: int, *, rows: int | None = None, real_tokens: int = 1
) -> tuple[Tensor, ...]:
    """`count` float64 tensors and, last, the mask of them all; each ``(B, T)``."""
    mask = draw(ragged_masks(rows=rows, real_tokens=real_tokens))
    return (*(draw(tensors(*mask.shape)) for _ in range(count)), mask)


def assert_close(actual: Tensor, expected: Any, tolerance: float) -> None:
    """Shape, dtype (where the expectation is a tensor) and every element agree; NaN never does."""
    if not isinstance(expected, Tensor):
        expected = torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def outputs_and_gradients(
    function: Callable[..., Any], *inputs: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """All outputs of the function, and the gradient of a weighted sum of them to each input.

    The weights differ from cell to cell, so that no two cells can be exchanged unnoticed.
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = _as_list(function(*leaves))
    total = sum((_cell_weights(y.shape) * y).sum() for y in outputs if y.requires_grad)
    gradients = (
        torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        if isinstance(total, Tensor)
        else [torch.zeros_like(x) for x in leaves]
    )
    return [y.detach() for y in outputs], list(gradients)


def assert_padding_never_matters(
    function: Callable[..., Any], *inputs: Tensor, mask: Tensor
) -> None:
    """Neither what lies in the padding nor how wide it is changes any output or any gradient.

    Args:
        function: of the inputs and the mask.
        inputs: each ``(B, T)``.
        mask: ``(B, T)``.
    """

    def run(mask: Tensor, filler: float) -> tuple[list[Tensor], list[Tensor]]:
        filled = [torch.full(mask.shape, filler, dtype=x.dtype) for x in inputs]
        for new, x in zip(filled, inputs, strict=True):
            new[mask] = x[mask[:, : x.shape[1]]]
        with torch.autograd.set_detect_anomaly(True):  # nor does a NaN arise on the way back
            return outputs_and_gradients(lambda *xs: function(*xs, mask), *filled)

    clean_outputs, clean_gradients = run(mask, 0.0)
    assert all(bool((gradient[~mask] == 0).all()) for gradient in clean_gradients)
    for poison in POISONS:
        outputs, gradients = run(mask, poison)
        for now, clean in zip(outputs + gradients, clean_outputs + clean_gradients, strict=True):
            assert_close(now, clean, EXACT)

    width = mask.shape[1]
    wider = torch.nn.functional.pad(mask, (0, 2))
    outputs, gradients = run(wider, NAN)
    for now, clean in zip(outputs + gradients, clean_outputs + clean_gradients, strict=True):
        assert_close(now[:, :width] if now.shape == wider.shape else now, clean, FP64)


def assert_rows_are_a_set(function: Callable[..., Any], *inputs: Tensor, order: Tensor) -> None:
    """Permuting the rows of all inputs permutes the row-wise outputs and leaves the scalars."""
    before = _as_list(function(*inputs))
    after = _as_list(function(*(x[order] for x in inputs)))
    for permuted, plain in zip(after, before, strict=True):
        assert_close(permuted, plain[order] if plain.dim() else plain, FP64)


def assert_micro_batches_add_up(loss_of: Callable[..., Any], *inputs: Tensor) -> None:
    """Backpropagating ``loss * count / total`` over any split of 8 rows gives one gradient."""

    def gradients(size: int) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        parts = [loss_of(*(x[i : i + size] for x in leaves)) for i in range(0, 8, size)]
        assert sum(part.count for part in parts) == total
        for part in parts:
            (part.loss * part.count / total).backward()
        return [x.grad for x in leaves if x.grad is not None]

    total = loss_of(*inputs).count
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    loss_of(*leaves).loss.backward()
    whole = [x.grad for x in leaves if x.grad is not None]
    assert whole
    for size in (1, 2, 4, 8):
        for split, one in zip(gradients(size), whole, strict=True):
            assert_close(split, one, FP64)


def assert_nothing_but_the_loss_carries_gradient(result: Any) -> None:
    """Of a loss's NamedTuple, only the first member is part of the graph."""
    carrying = [name for name in result._fields if getattr(result, name).requires_grad]
    assert carrying == ["loss"]


def softmax(logits: Sequence[float]) -> list[float]:
    """One row, from the definition, in Python floats."""
    weights = [math.exp(z) for z in logits]
    return [w / sum(weights) for w in weights]


def spread(x: Tensor) -> Tensor:
    """Cells at least 1 apart, so that dividing by their deviation does not enlarge rounding."""
    return x + 7 * torch.arange(x.numel()).reshape(x.shape)


def rising(values: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _cell_weights(shape: torch.Size) -> Tensor:
    """1 in the first cell, 1 more for each column, 10 more for each row, whatever the width."""
    weights = torch.ones(shape)
    for k, n in enumerate(reversed(shape)):
        weights += 10**k * torch.arange(n).reshape(n, *[1] * k)
    return weights


def _as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def weighted(*tensors):
    """A sum in which every cell has another weight."""
    return sum(
        ((torch.arange(x.numel(), dtype=x.dtype) + k).cos().reshape(x.shape) * x).sum()
        for k, x in enumerate(tensors)
    )
