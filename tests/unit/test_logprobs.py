import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import INF, assert_close, outputs_and_gradients, softmax, tensors
from tolerances import EXACT, FP32, FP64
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_min.logprobs import (
    at_least_float32,
    entropy,
    label_logprob,
    lm_head_logits,
    lm_head_logprobs,
    token_logprobs,
)

LN2, LN3 = math.log(2), math.log(3)
DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
]


def head(**changes):
    """The arguments of a head that does nothing but W h, with these changes."""
    return {"bias": None, "softcap": None, "scale": 1.0, "temperature": 1.0} | changes


# token_logprobs


@pytest.mark.eq("token_logprobs")
def test_token_logprobs_closed():
    # exp(0), exp(ln 3) = 1, 3: probabilities 1/4 and 3/4; three equal logits: 1/3 each
    two = torch.tensor([[0.0, LN3], [0.0, LN3]], dtype=torch.float64)
    assert_close(
        token_logprobs(two, torch.tensor([0, 1])), [math.log(1 / 4), math.log(3 / 4)], FP64
    )
    three = torch.full((2, 1, 3), 7.0, dtype=torch.float64)
    assert_close(token_logprobs(three, torch.tensor([[2], [0]])), [[-LN3], [-LN3]], FP64)


@pytest.mark.eq("token_logprobs")
@given(tensors(2, 3, 5), st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_token_logprobs_definition(logits, tokens):
    expected = [
        math.log(softmax(row)[token])
        for row, token in zip(logits.reshape(6, 5).tolist(), tokens, strict=True)
    ]
    result = token_logprobs(logits, torch.tensor(tokens).reshape(2, 3))
    assert_close(result.flatten(), expected, FP64)


@given(tensors(5))
def test_token_logprobs_property_normalised(logits):
    every_token = token_logprobs(logits.expand(5, 5), torch.arange(5))
    assert_close(every_token.exp().sum(), 1.0, FP64)


def test_token_logprobs_property_extreme():
    # exp(1e4) overflows in every dtype, log p does not; a logit of minus infinity is left out
    logits = torch.tensor([[1e4, 0.0], [1e4, 0.0], [2.0, -INF]])
    assert_close(token_logprobs(logits, torch.tensor([0, 1, 0])), [0.0, -1e4, 0.0], EXACT)


def test_token_logprobs_gradient():
    # d log p_y / d z_v = [v = y] - p_v
    logits = torch.tensor([[0.0, LN3]], dtype=torch.float64)
    _, (gradient,) = outputs_and_gradients(lambda z: token_logprobs(z, torch.tensor([0])), logits)
    assert_close(gradient, [[3 / 4, -3 / 4]], FP64)
    z = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 2, 3).requires_grad_()
    tokens = torch.tensor([[0, 2], [1, 1]])
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, tokens), (z,))


@pytest.mark.parametrize(("given_dtype", "dtype"), DTYPES)
def test_token_logprobs_dtype(given_dtype, dtype):
    logits = torch.tensor([[0.0, 1.0, 0.5]], dtype=given_dtype, requires_grad=True)
    result = token_logprobs(logits, torch.tensor([1]))
    result.sum().backward()
    assert result.dtype == dtype
    assert logits.grad.dtype == given_dtype
    # 0, 1 and 1/2 are exact in every dtype, so that only the arithmetic could lose precision
    assert_close(result, [math.log(softmax([0, 1, 0.5])[1])], FP32)


# entropy


# label_logprob


@pytest.mark.eq("label_logprob")
def test_label_logprob_closed():
    # exp(0), exp(ln 3), exp(ln 4) of 8; and 1 / (1 + exp(-ln 3)) = 3/4, whatever the others are
    logits = torch.tensor([[0.0, LN3, 2 * LN2], [5.0, -LN3, 5.0]], dtype=torch.float64)
    for label, share in enumerate([1 / 8, 3 / 8, 4 / 8]):
        found = label_logprob(logits[:1], label, one_of_them=True)
        assert_close(found, [math.log(share)], FP64)
    found = label_logprob(logits, 1, one_of_them=False)
    assert_close(found, [math.log(3 / 4), math.log(1 / 4)], FP64)


@pytest.mark.parametrize("one_of_them", [True, False])
@pytest.mark.parametrize(("given_dtype", "dtype"), DTYPES)
def test_label_logprob_dtype_and_extremes(given_dtype, dtype, one_of_them):
    # log(exp(-1000) / (1 + exp(-1000))) is -1000, and its counterpart 0: nothing overflows
    logits = torch.tensor([[-1000.0, 0.0], [0.0, -1000.0]], dtype=given_dtype)
    found = label_logprob(logits, 0, one_of_them=one_of_them)
    assert found.dtype == dtype
    assert_close(found, [-1000.0, 0.0 if one_of_them else -LN2], FP32)


@pytest.mark.eq("entropy")
def test_entropy_closed():
    # p = 1/4, 3/4: ln 4 / 4 + 3 (ln 4 - ln 3) / 4 = 2 ln 2 - 3/4 ln 3; uniform over 4: ln 4
    logits = torch.tensor([[0.0, LN3]], dtype=torch.float64)
    assert_close(entropy(logits), [2 * LN2 - 0.75 * LN3], FP64)
    assert_close(entropy(torch.full((1, 1, 4), 3.0, dtype=torch.float64)), [[2 * LN2]], FP64)
    # the third token has probability 0 and changes nothing
    impossible = torch.tensor([[0.0, LN3, -INF]], dtype=torch.float64)
    assert_close(entropy(impossible), [2 * LN2 - 0.75 * LN3], FP64)


@pytest.mark.eq("entropy")
@given(tensors(3, 5))
def test_entropy_definition(logits):
    expected = [-sum(p * math.log(p) for p in softmax(row)) for row in logits.tolist()]
    assert_close(entropy(logits), expected, FP64)


@given(tensors(3, 5))
def test_entropy_property_bounds(logits):
    result = entropy(logits)
    assert bool((result > 0).all())
    assert bool((result <= math.log(5) + FP64).all())


def test_entropy_gradient():
    z = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3).square().requires_grad_()
    assert torch.autograd.gradcheck(entropy, (z,))
    # raising the likelier of two logits sharpens the distribution
    _, (gradient,) = outputs_and_gradients(entropy, torch.tensor([[0.0, 1.0]]))
    assert gradient[0, 1] < 0 < gradient[0, 0]


@pytest.mark.parametrize(("given_dtype", "dtype"), DTYPES)
def test_entropy_dtype(given_dtype, dtype):
    result = entropy(torch.tensor([[0.0, 1.0, 0.5]], dtype=given_dtype))
    assert result.dtype == dtype
    assert_close(result, [-sum(p * math.log(p) for p in softmax([0, 1, 0.5]))], FP32)


# lm_head_logits


@pytest.mark.eq("lm_head")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, LN3),
        ({"bias": [0.0, LN2]}, LN3 + LN2),
        ({"scale": 3.0}, 3 * LN3),
        ({"scale": 3.0, "bias": [0.0, LN2]}, 3 * LN3 + 3 * LN2),  # the bias is scaled too
        ({"softcap": 2.0}, 1.0),  # 2 tanh(ln 3 / 2) = 2 (3 - 1) / (3 + 1)
        ({"softcap": 4.0, "scale": 2.0}, 2.0),  # 4 tanh(2 ln 3 / 4): the cap comes after the scale
        ({"temperature": 0.5}, 2 * LN3),
        ({"softcap": 2.0, "temperature": 0.25}, 4.0),  # and the temperature after the cap
    ],
)
def test_lm_head_logits_closed(arguments, expected):
    # W h = (0, ln 3)
    hidden = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[0.0, 0.0], [LN3, 0.0]], dtype=torch.float64)
    if "bias" in arguments:
        arguments = arguments | {"bias": torch.tensor(arguments["bias"], dtype=torch.float64)}
    assert_close(lm_head_logits(hidden, weight, **head(**arguments)), [[0.0, expected]], FP64)


@pytest.mark.eq("lm_head")
@given(tensors(3, 2), tensors(4, 2), tensors(4))
def test_lm_head_logits_definition(hidden, weight, bias):
    expected = [
        [
            5 * math.tanh(0.7 * (sum(w * h for w, h in zip(ws, hs, strict=True)) + b) / 5) / 1.3
            for ws, b in zip(weight.tolist(), bias.tolist(), strict=True)
        ]
        for hs in hidden.tolist()
    ]
    result = lm_head_logits(hidden, weight, bias=bias, softcap=5.0, scale=0.7, temperature=1.3)
    assert_close(result, expected, FP64)


def test_lm_head_logits_gradient():
    hidden = torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(2, 2).requires_grad_()
    weight = torch.linspace(1, -2, 6, dtype=torch.float64).reshape(3, 2).requires_grad_()
    bias = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w, b: lm_head_logits(h, w, bias=b, softcap=2.0, scale=0.5, temperature=0.8),
        (hidden, weight, bias),
    )


# lm_head_logprobs


def random_head(n, vocabulary, width, dtype=torch.float64):
    """Hidden states, weight, bias and tokens from a seed of their own."""
    rng = torch.Generator().manual_seed(n + vocabulary)
    hidden = torch.randn(n, width, generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=rng, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocabulary, generator=rng, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, torch.randint(vocabulary, (n,), generator=rng)


def plain_head(hidden, weight, bias, tokens, softcap, scale, temperature):
    """Log-probabilities and entropy by full logits and an explicit softmax."""
    logits = scale * (torch.einsum("nh,vh->nv", hidden, weight) + (0 if bias is None else bias))
    if softcap is not None:
        growth = torch.exp(2 * logits / softcap)
        logits = softcap * (growth - 1) / (growth + 1)  # tanh
    weights = torch.exp(logits / temperature)
    probabilities = weights / weights.sum(1, keepdim=True)
    picked = (probabilities * torch.eye(len(weight), dtype=hidden.dtype)[tokens]).sum(1)
    return picked.log(), -(probabilities * probabilities.log()).sum(1).detach()


def test_lm_head_logprobs_closed():
    # logits (0, ln 3): probabilities 1/4 and 3/4, entropy 2 ln 2 - 3/4 ln 3 in both rows;
    # at temperature 1/2 (0, 2 ln 3): 1/10 and 9/10, entropy ln 10 - 9/10 ln 9
    hidden = torch.ones(2, 1, dtype=torch.float64)
    weight = torch.tensor([[0.0], [LN3]], dtype=torch.float64)
    tokens = torch.tensor([0, 1])
    logprobs, entropies = lm_head_logprobs(hidden, weight, tokens, **head(), chunk_tokens=1)
    assert_close(logprobs, [math.log(1 / 4), math.log(3 / 4)], FP64)
    assert_close(entropies, [2 * LN2 - 0.75 * LN3] * 2, FP64)
    sharp = head(temperature=0.5)
    logprobs, entropies = lm_head_logprobs(hidden, weight, tokens, **sharp, chunk_tokens=1)
    assert_close(logprobs, [math.log(1 / 10), math.log(9 / 10)], FP64)
    assert_close(entropies, [math.log(10) - 0.9 * math.log(9)] * 2, FP64)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.5, 2.0)])
def test_lm_head_logprobs_definition(chunk_tokens, with_bias, softcap, scale, temperature):
    hidden, weight, bias, tokens = random_head(7, 11, 4)
    settings = {"softcap": softcap, "scale": scale, "temperature": temperature}

    def chunked(hidden, weight, bias=None):
        return lm_head_logprobs(
            hidden, weight, tokens, bias=bias, chunk_tokens=chunk_tokens, **settings
        )

    def plain(hidden, weight, bias=None):
        return plain_head(hidden, weight, bias, tokens, **settings)

    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    outputs, gradients = outputs_and_gradients(chunked, *inputs)
    plain_outputs, plain_gradients = outputs_and_gradients(plain, *inputs)
    for ours, theirs in zip(outputs + gradients, plain_outputs + plain_gradients, strict=True):
        assert_close(ours, theirs, FP64)
    with torch.no_grad():
        for ours, theirs in zip(chunked(*inputs), plain_outputs, strict=True):
            assert_close(ours, theirs, FP64)


@given(st.permutations(range(6)), st.integers(1, 7))
def test_lm_head_logprobs_property_permutation(order, chunk_tokens):
    hidden, weight, bias, tokens = random_head(6, 5, 3)
    arguments = head(bias=bias) | {"chunk_tokens": chunk_tokens}
    plain = lm_head_logprobs(hidden, weight, tokens, **arguments)
    permuted = lm_head_logprobs(hidden[order], weight, tokens[order], **arguments)
    for ours, theirs in zip(permuted, plain, strict=True):
        assert_close(ours, theirs[order], FP64)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [x.numel() for x in made if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_lm_head_logprobs_property_memory():
    # 24 tokens, vocabulary 50, 5 at a time: 250 logits at once, of 1200; the gradient of W has 150
    hidden, weight, bias, tokens = random_head(24, 50, 3)
    for x in (hidden, weight, bias):
        x.requires_grad_()
    kept = Counter()

    def keep(x):
        kept["elements"] += x.numel()
        return x

    with LargestTensor() as largest, saved_tensors_hooks(keep, lambda x: x):
        arguments = {"bias": bias, "softcap": 3.0, "scale": 2.0, "temperature": 0.7}
        logprobs, _ = lm_head_logprobs(hidden, weight, tokens, **arguments, chunk_tokens=5)
        assert kept["elements"] < 250  # between forward and backward: less than one chunk's logits
        logprobs.sum().backward()
    assert largest.elements == 250
    assert hidden.grad is not None


def test_the_entropy_of_a_logit_of_minus_infinity():
    # p = 1/2, 1/2, 0: log 2
    hidden, weight = torch.ones(1, 1), torch.zeros(3, 1)
    arguments = head() | {"bias": torch.tensor([0.0, 0.0, -torch.inf])}
    tokens = torch.tensor([0])
    logprobs, entropies = lm_head_logprobs(hidden, weight, tokens, **arguments, chunk_tokens=1)
    assert_close(entropies, [math.log(2)], FP32)
    assert_close(logprobs, [-math.log(2)], FP32)


def test_lm_head_logprobs_gradient():
    hidden, weight, bias, tokens = random_head(3, 4, 2)
    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    for chunk_tokens in (2, 3):
        assert torch.autograd.gradcheck(
            lambda h, w, b, c=chunk_tokens: lm_head_logprobs(
                h, w, tokens, bias=b, softcap=4.0, scale=0.9, temperature=1.1, chunk_tokens=c
            )[0],
            leaves,
        )


@pytest.mark.parametrize("chunk_tokens", [2, 5])
def test_lm_head_logprobs_gradient_stops(chunk_tokens):
    hidden, weight, bias, tokens = random_head(5, 4, 2)
    for x in (hidden, weight, bias):
        x.requires_grad_()
    logprobs, entropies = lm_head_logprobs(
        hidden, weight, tokens, **head(bias=bias), chunk_tokens=chunk_tokens
    )
    assert logprobs.requires_grad
    assert not entropies.requires_grad


@pytest.mark.parametrize(("given_dtype", "dtype"), DTYPES)
def test_lm_head_logprobs_dtype(given_dtype, dtype):
    hidden, weight, bias, tokens = random_head(5, 4, 2, given_dtype)
    hidden.requires_grad_()
    arguments = {"softcap": 3.0, "scale": 2.0, "temperature": 0.7}
    logits = lm_head_logits(hidden, weight, bias=bias, **arguments)
    logprobs, entropies = lm_head_logprobs(
        hidden, weight, tokens, bias=bias, **arguments, chunk_tokens=2
    )
    logprobs.sum().backward()
    assert logits.dtype == logprobs.dtype == entropies.dtype == dtype
    assert hidden.grad.dtype == given_dtype


# at_least_float32


@pytest.mark.parametrize(("given_dtype", "dtype"), DTYPES)
def test_at_least_float32_closed(given_dtype, dtype):
    x = torch.tensor([1.5], dtype=given_dtype)
    assert_close(at_least_float32(x), torch.tensor([1.5], dtype=dtype), EXACT)
