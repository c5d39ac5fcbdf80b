"""What commands print, where the terminal may be gone, full, or without a letter for it.

A run outlives its terminal: what cannot be printed is dropped.
"""

import io
import os
import sys
from typing import Any


def outlive_terminal() -> None:
    """From now on nothing that is printed raises, nor what is still held back when Python ends.

    A letter that the terminal does not have is printed as its escape. Streams that somebody else
    has put in the place of Python's own, as a notebook does, stay as they are.
    """
    if sys.stdin is None:  # closed, as `<&-` does; the next file opened would take its number
        sys.stdin = _nothing()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `>&-`, or no console at all
            setattr(sys, name, _nothing())
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _outliving(stream))


def is_read() -> bool:
    """Whether all that was printed to stdout so far has found a reader."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return not (isinstance(raw, _Outliving) and raw.has_dropped)


class _Outliving(io.RawIOBase):
    """The lowest layer of a stream, which drops what its file does not take."""

    def __init__(self, raw: Any) -> None:
        self._raw, self.has_dropped = raw, False

    def write(self, data: Any) -> int:
        try:
            taken = self._raw.write(data)
        except OSError:
            taken = None
        self.has_dropped |= taken is None
        return len(data) if taken is None else int(taken)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())


def _nothing() -> io.TextIOWrapper:
    """Takes whatever is printed, and has nothing to read."""
    file = io.BufferedRandom(io.FileIO(os.devnull, "r+"))
    return io.TextIOWrapper(file, encoding="utf-8", errors="replace")


def _outliving(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    raw = _Outliving(getattr(stream.buffer, "raw", stream.buffer))  # with -u there is no buffer
    try:
        stream.flush()
    except OSError:
        raw.has_dropped = True
    fails = stream.errors in ("strict", "surrogateescape")
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors="backslashreplace" if fails else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
