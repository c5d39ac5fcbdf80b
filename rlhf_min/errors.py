"""The few errors of rlhf_min. Each message is one line: what, where, and what to do."""

from typing import Any


class BadInput(ValueError):
    """Something the user gave cannot be used: a file, a row, a config value, a model folder.

    The command line prints the message and exits with code 2.
    """


class NonFinite(ArithmeticError):
    """A loss, gradient, score or ratio became infinite or NaN; raised before the optimizer step.

    Args:
        step: the optimizer step that was about to happen, counted from 0.
        tensor: the name of the first tensor that is not finite.
        rows: the rows of the batch in which it is not finite, or none if unknown.
        batch: what the step was computed from, for inspection by the caller.
    """

    def __init__(self, step: int, tensor: str, rows: list[int], batch: Any = None) -> None:
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        where = f" in batch row(s) {shown}" if rows else ""
        super().__init__(
            f"step {step}: {tensor} is not finite{where}; "
            "the weights are still those of the last good step. "
            "Lower the learning rate or look at the batch"
        )
        self.step, self.tensor, self.rows, self.batch = step, tensor, rows, batch


def require(condition: bool, message: str) -> None:
    """Raise `BadInput(message)` unless the condition holds."""
    if not condition:
        raise BadInput(message)
