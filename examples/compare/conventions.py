"""A cause for which two runs can differ, and what our side does to follow trl in it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Setup = TypeVar("Setup")  # all that a run of ours depends on; each stage has its own


@dataclass(frozen=True)
class Cause(Generic[Setup]):
    """Something in which trl's run is known to be another than ours.

    Args:
        name: short, as in the table of known differences: "score cell", "beta".
        says: one sentence without its full stop: what trl does, and what is done here.
        follow: our setup -> one that does what trl does; None if nothing here can.
        row: where it is told: a heading or a first cell of the tables, or "".
        undo: fields of `Job` with which trl's side leaves it, where ours cannot follow.
    """

    name: str
    says: str
    follow: Callable[[Setup], Setup] | None = None
    row: str = ""
    undo: tuple[tuple[str, Any], ...] = ()
