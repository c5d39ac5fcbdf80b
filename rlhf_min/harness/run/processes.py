"""Which of several processes this is, for what does without torch until it must."""

import os
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def several() -> bool:
    """Whether ``torchrun``, or what sets the same variables, has started more than one process."""
    return size() > 1


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if several() else 0


def is_main() -> bool:
    """Whether this is the process that speaks and writes: the first."""
    return rank() == 0


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if several() else 0


def local_size() -> int:
    """How many processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if several() else 1


def on_main(work: Callable[[], Result]) -> Result:
    """What `work` returns, or raises, on the first process, which alone does it."""
    if not several():
        return work()
    from rlhf_min import distributed

    return distributed.on_main(work)


def barrier() -> None:
    """Until all are here."""
    on_main(lambda: None)
