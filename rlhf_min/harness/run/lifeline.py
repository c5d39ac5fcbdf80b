"""The end of one process of a run is the end of all: with one line, and the same exit code.

Each process keeps a connection to the first. One that fails says so there, and the first says it to
the others; one that is killed says nothing, and its connection ends. Threads listen, and they end
their process, whose main thread may stand where nothing wakes it: in a sum that waits for others.
The run's folder is whole at any moment. ``torchrun`` prints a table of its own after that, and ends
with 1 whatever the codes were.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import NoReturn

from rlhf_min.harness.run import processes
from rlhf_min.harness.run.signals import SIGNALS

PAUSE = 0.2  # seconds in which it becomes known that a failure follows from another one
CONSEQUENCE = 2.0  # the same, of an error that a lost connection may have raised
OWN_WORD = 0.7  # in which the first process, where it fails likewise, says so itself
LAUNCHER = 0.5  # from look to look whether it is there

Word = tuple[int | None, str]  # exit code and line; no code is the end of all work


class _Lifeline:
    def __init__(
        self, peers: Mapping[int, socket.socket], terminal: int, advice: Callable[[], str]
    ) -> None:
        self._peers, self._terminal, self._advice = peers, terminal, advice
        self._at_end: set[int] = set()
        self._heard = threading.Condition()
        self._last = threading.Lock()  # taken once, by the thread that ends the process
        self.has_the_word = threading.Event()
        for peer in peers:
            threading.Thread(target=self._listen, args=[peer], daemon=True).start()

    def fail(self, line: str, code: int, *, after: float = PAUSE) -> NoReturn:
        """End all processes, unless it becomes known meanwhile that another has failed before."""
        ignore_signals()
        time.sleep(after)
        if processes.is_main():
            self._exit(line, code)
        self._say(0, code, line)
        while True:  # until the first one says the code
            time.sleep(LAUNCHER)

    def end(self) -> None:
        """Wait until all are at their end, so that nobody is missed."""
        ignore_signals()
        if not processes.is_main():
            self._say(0, None, "")
        with self._heard:
            self._heard.wait_for(lambda: self._at_end == set(self._peers))
        if processes.is_main():
            for peer in self._peers:
                self._say(peer, None, "")

    def _say(self, peer: int, code: int | None, line: str) -> None:
        with contextlib.suppress(OSError):  # it is gone; whoever listens to it knows
            self._peers[peer].sendall((json.dumps([code, line]) + "\n").encode())

    def _words(self, peer: int) -> Iterator[Word]:
        with contextlib.suppress(OSError, ValueError), self._peers[peer].makefile("rb") as said:
            for word in said:
                code, line = json.loads(word)
                yield code, line

    def _listen(self, peer: int) -> None:
        for code, line in self._words(peer):
            if code is None:
                with self._heard:
                    self._at_end.add(peer)
                    self._heard.notify_all()
            elif peer == 0:  # which has printed the line
                self._exit("", code)
            else:
                time.sleep(OWN_WORD)
                # A bar may stand in the line that the terminal is at.
                if not self.has_the_word.is_set():
                    self._exit(f"\nprocess {peer}: {line}", code)
        if peer not in self._at_end:
            # Of all that miss the first process, one says so.
            speaks = processes.rank() == (1 if peer == 0 else 0)
            line = f"\nerror: process {peer} was killed, perhaps for want of memory{self._advice()}"
            self._exit(line if speaks else "", 1)

    def _exit(self, line: str, code: int) -> NoReturn:
        self._last.acquire()
        with contextlib.suppress(OSError, ValueError):  # closed, or a full disk
            sys.stdout.flush()
            sys.stderr.flush()
        if line:
            with contextlib.suppress(OSError):  # no terminal any more
                os.write(self._terminal, f"{line}\n".encode(errors="backslashreplace"))
        if processes.is_main():
            for peer in self._peers:
                self._say(peer, code, "")
        os._exit(code)


_lifeline: _Lifeline | None = None


class Joined(contextlib.AbstractContextManager[None]):
    """Inside, this process is one of those that ``torchrun`` has started, and only the first one is
    heard. Where there is one process nothing is done.

    Args:
        advice: what is to be done if a process is killed, the end of a line.
    """

    def __init__(self, advice: Callable[[], str]) -> None:
        self._advice = advice

    def __enter__(self) -> None:
        if processes.several():
            _start(self._advice)

    def __exit__(
        self, _: type | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        if isinstance(error, SystemExit):
            if error.code:
                fail(f"error: what a process has called ends it with {error.code}", 1)
        elif error is not None:
            after = CONSEQUENCE if isinstance(error, RuntimeError) else PAUSE
            fail("".join(traceback.format_exception(error)).rstrip(), 1, after=after)
        end()


def fail(line: str, code: int, *, after: float = PAUSE) -> None:
    """End all processes with this line and this code; nothing is done where there is one."""
    if _lifeline is not None:
        _lifeline.fail(line, code, after=after)


def end() -> None:
    """Leave the others when all of them do; nothing is done where there is one."""
    global _lifeline
    if _lifeline is not None:
        from rlhf_min import distributed

        _lifeline.end()
        _lifeline = None
        distributed.end()


def take_the_word() -> None:
    """All processes are failing alike, and the first writes down what went wrong before it ends."""
    if _lifeline is not None:
        _lifeline.has_the_word.set()


def ignore_signals() -> None:
    """From now on all processes end together; the launcher's signals come late."""
    if processes.several() and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _start(advice: Callable[[], str]) -> None:
    """Join the others, and lay the connections; from now on only the first process is heard."""
    global _lifeline
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=[os.getppid(), advice], daemon=True).start()
    from rlhf_min import distributed

    try:
        _require_launcher()
        distributed.start()
    except (OSError, RuntimeError, ValueError) as error:
        number, reason = processes.rank(), " ".join(str(error).split())[:200]
        print(f"error: process {number} cannot join the others: {reason}", file=sys.stderr)
        sys.exit(1)
    terminal = os.dup(2)
    with socket.create_server(("", 0)) as server:
        port, key = distributed.on_main(lambda: (server.getsockname()[1], secrets.token_hex()))
        if processes.is_main():
            _lifeline = _Lifeline(_accepted(server, key, distributed.size() - 1), terminal, advice)
            return
    first = socket.create_connection((os.environ["MASTER_ADDR"], port))
    first.sendall(f"{key} {processes.rank()}\n".encode())
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nothing, descriptor)
    _lifeline = _Lifeline({0: first}, terminal, advice)


def _accepted(server: socket.socket, key: str, n: int) -> dict[int, socket.socket]:
    """Connections to the n others by their numbers; whoever does not know the key is no one."""
    peers: dict[int, socket.socket] = {}
    while len(peers) < n:
        connection, _ = server.accept()
        with connection.makefile("rb", buffering=0) as said:
            given, _, number = said.readline(200).decode(errors="replace").partition(" ")
        if given == key:
            peers[int(number)] = connection
    return peers


def _require_launcher() -> None:
    """Raise `OSError` if ``torchrun`` was killed before this process could watch it: one would
    wait for it for as long as one waits for others."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, timeout=60).close()


def _watch(launcher: int, advice: Callable[[], str]) -> None:
    """End with the launcher: if it is killed, nobody would end the others any more."""
    while os.getppid() == launcher:
        time.sleep(LAUNCHER)
    if _lifeline is None:
        os._exit(1)
    if processes.local_rank() == 0:
        fail(f"\nerror: the launcher was killed{advice()}", 1)
