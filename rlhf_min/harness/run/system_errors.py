"""What to say where the system refuses a file, a thread or memory."""

import errno
import os
import re

CURES: dict[int | None, str] = {}  # for what the system refuses
CURES |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room: df, quota, ulimit -f")
CURES |= dict.fromkeys((errno.EMFILE, errno.ENFILE), "let more files be open: ulimit -n")
CURES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable")


def refused(error: OSError) -> str:
    """A line about what the system does not do: which file, why, and what helps."""
    given = error.filename
    file = os.fsdecode(given) if isinstance(given, (str, bytes)) else "a file of the run"
    reason = error.strerror or " ".join(str(error).split())[:200] or type(error).__name__
    return f"{file}: {reason}; {cure(error)}"


def cure(error: BaseException | None) -> str:
    """What helps against what the system refuses, be it said by Python or in Rust's words."""
    in_rust = re.search(r"os error (\d+)", str(error))
    number = int(in_rust[1]) if in_rust else getattr(error, "errno", None)
    return CURES.get(number, "look at this path and at its disk")


def out_of_threads(error: MemoryError | RuntimeError) -> str | None:
    """A line with what helps, if that is what the error is about."""
    if "can't start new thread" not in str(error):
        return None
    return (
        "the system gives no further thread; end other processes of yours, or raise the limit of "
        "ulimit -u or of the container"
    )


def out_of_memory(error: MemoryError | RuntimeError) -> str | None:
    """A line with the options that help, if that is what the error is about."""
    message = " ".join(str(error).split())
    if not (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # of torch
        or "DefaultCPUAllocator" in message
        or "can't allocate memory" in message
    ):
        return None
    return (
        f"out of memory ({message[:100] or 'no more is told'}); lower --max_tokens, give "
        "--gradient_checkpointing, or make --batch_size or --minibatch_size smaller"
    )
