"""The few errors of rlhf_min. Each message is one line: what, where, and what to do."""

from collections.abc import Sequence
from typing import Any


class BadInput(ValueError):
    """Something the user gave cannot be used: a file, a row, a config value, a model folder.

    The command line prints the message and exits with code 2. Names and texts in it may hold line
    ends and control characters; they are shown escaped.

    >>> print(BadInput("a\\nb: no such file"))
    a\\nb: no such file
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class NonFinite(ArithmeticError):
    """A loss, a gradient or a metric is infinite or NaN.

    The weights are still those of the last good step.

    Args:
        step: the optimizer step that was about to happen, counted from 0.
        tensor: the name of what is not finite.
        batch: what the step was computed from.
        rows: the rows of the batch that are at fault; none while nobody has looked for them.
    """

    def __init__(self, step: int, tensor: str, batch: Any = None, rows: Sequence[int] = ()) -> None:
        some = ", ".join(map(str, rows[:8])) + ", ..." * (len(rows) > 8)
        where = f" in batch row(s) {some}" if rows else ""
        super().__init__(
            f"optimizer step {step}: {tensor} is not finite{where}; "
            "the weights are still those of the last good step. "
            "Lower the learning rate or look at the batch"
        )
        self.step, self.tensor, self.batch, self.rows = step, tensor, batch, list(rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.step, self.tensor, self.batch, self.rows)


class Diverged(ArithmeticError):
    """Weights, or what they give, are infinite or NaN: no such model is kept."""


def require(condition: bool, message: str) -> None:
    """Raise `BadInput(message)` unless the condition holds."""
    if not condition:
        raise BadInput(message)
