"""Stopping well: Ctrl-C, a scheduler's SIGTERM and a terminal that is closed end a run after the
step that it is at."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

# Windows has no SIGHUP.
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Stopped(Exception):
    """A signal has ended the run in this folder; all that it had done is saved."""

    def __init__(self, message: str, folder: Path, exit_code: int) -> None:
        super().__init__(message)
        self.folder, self.exit_code = folder, exit_code


def to_resume(folder: Path) -> str:
    """The command line that takes up a run, as it can be typed."""
    return f"python {_typed(sys.argv[0])} --resume {_typed(str(folder))}"


def _typed(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(f'{chr(92)}x{byte:02x}' for byte in os.fsencode(word))}'"


@dataclass
class StopRequest:
    """The first signal that came in, if any."""

    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM and 129 for SIGHUP, as shells have it."""
        return 128 + (self.signal or 0)


class Interrupted(KeyboardInterrupt):
    """A signal that stops at once, as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


@contextmanager
def raising_signals() -> Iterator[None]:
    """Inside, SIGTERM and a closed terminal raise as Ctrl-C does; the second time they kill."""

    def stop(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    mine = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in mine if in_main_thread else ():
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine if in_main_thread else ():
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def catching_signals() -> Iterator[StopRequest]:
    """Inside, the first signal is only noted; a second SIGINT stops at once as it always did.

    A signal that is ignored stays so: ``nohup`` starts a program without SIGHUP, and a shell a job
    in the background without SIGINT.
    """
    request = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        if request.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = request.signal or number

    try:
        # A handler that is not of Python (None) could not be put back.
        left = (signal.SIG_IGN, None)
        heeded = [number for number in SIGNALS if signal.getsignal(number) not in left]
        before = {number: signal.signal(number, note) for number in heeded}
    except ValueError:  # not in the main thread, where signals never arrive
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
