"""Stopping well: Ctrl-C and a scheduler's SIGTERM end a run after the step that it is at."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal has ended the run in this folder; all that it had done is saved."""

    def __init__(self, message: str, folder: Path, exit_code: int) -> None:
        super().__init__(message)
        self.folder, self.exit_code = folder, exit_code


@dataclass
class StopRequest:
    """The first signal that came in, if any."""

    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """130 for SIGINT and 143 for SIGTERM, as shells have it."""
        return 128 + (self.signal or 0)


@contextmanager
def catching_signals() -> Iterator[StopRequest]:
    """Inside, the first signal is only noted; a second SIGINT stops at once as it always did."""
    request = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        if request.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = request.signal or number

    try:
        before = {number: signal.signal(number, note) for number in SIGNALS}
    except ValueError:  # not in the main thread, where signals never arrive
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
