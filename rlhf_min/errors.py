"""The few errors of rlhf_min. Each message is one line: what, where, and what to do."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Fault = tuple[str, list[int]]  # the name of what is not finite, and in which rows of the batch


class BadInput(ValueError):
    """Something the user gave cannot be used: a file, a row, a config value, a model folder.

    The command line prints the message and exits with code 2. Names and texts in it may hold line
    ends and control characters; they are shown escaped.

    >>> print(BadInput("a\\nb: no such file"))
    a\\nb: no such file
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class BadNumbers(BadInput):
    """A reward or a policy gave numbers that are not finite.

    Args:
        message: the line.
        fault: what they are, and the rows.
    """

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault


class NonFinite(ArithmeticError):
    """A loss, gradient, score or ratio became infinite or NaN; raised before the optimizer step.

    Args:
        step: the optimizer step that was about to happen, counted from 0.
        tensor: the name of the first tensor that is not finite.
        rows: the rows of the batch in which it is not finite, or none if unknown.
        batch: what the step was computed from, for inspection by the caller.
    """

    def __init__(self, step: int, tensor: str, rows: list[int], batch: Any = None) -> None:
        rows = sorted(rows)
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        where = f" in batch row(s) {shown}" if rows else ""
        super().__init__(
            f"optimizer step {step}: {tensor} is not finite{where}; "
            "the weights are still those of the last good step. "
            "Lower the learning rate or look at the batch"
        )
        self.step, self.tensor, self.rows, self.batch = step, tensor, rows, batch


class Diverged(ArithmeticError):
    """An update has left weights, or what they give, infinite or NaN: no such model is kept."""


def first_nonfinite(rows: Iterable[tuple[int, Mapping[str, Tensor]]]) -> Fault | None:
    """The first name under which a row has a number that is not finite, and all such rows.

    Args:
        rows: the number of each row, and what belongs to it, in tensors of any shape.

    Example:
        >>> good, bad = torch.zeros(3), torch.tensor([0.0, torch.nan])
        >>> first_nonfinite([(0, {"values": good}), (1, {"values": bad}), (2, {"values": bad})])
        ('values', [1, 2])
    """
    found: dict[str, list[int]] = {}
    for row, tensors in rows:
        for name, x in tensors.items():
            if not bool(torch.isfinite(x).all()):
                found.setdefault(name, []).append(row)
    return next(iter(found.items()), None)


def require(condition: bool, message: str) -> None:
    """Raise `BadInput(message)` unless the condition holds."""
    if not condition:
        raise BadInput(message)
