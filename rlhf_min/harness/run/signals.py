"""Stopping well: Ctrl-C, a scheduler's SIGTERM and a terminal that is closed end a run after the
step that it is at."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_min.harness.run import processes

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Stopped(Exception):
    """A signal has ended the run in this folder; all that it had done is saved."""

    def __init__(self, message: str, folder: Path, exit_code: int) -> None:
        super().__init__(message)
        self.folder, self.exit_code = folder, exit_code


def to_resume(folder: Path) -> str:
    """The command line that takes up a run, as it can be typed."""
    return f"{' '.join(started_by())} {_typed(sys.argv[0])} --resume {_typed(str(folder))}"


def started_by() -> list[str]:
    """What stands before the command, so that as many processes are started as this is one of."""
    if not processes.several():
        return ["python"]
    return ["torchrun", "--nproc_per_node", str(processes.local_size())]


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

    with _handled_by(stop, lambda handler: handler == signal.SIG_DFL):
        yield


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

    # A handler that is not of Python (None) could not be put back.
    with _handled_by(note, lambda handler: handler not in (signal.SIG_IGN, None)):
        yield request


@contextmanager
def _handled_by(handler: Callable[..., None], instead_of: Callable[[Any], bool]) -> Iterator[None]:
    """Inside, signals are handled by this in the place of some handlers. They only arrive in the
    main thread; nothing is changed in any other."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: old for number, old in before.items() if instead_of(old)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
