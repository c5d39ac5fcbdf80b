"""All of trl and transformers in float64, and trainers that know nothing of those before them.

They leave float64 in three ways: by ``x.float()``, by ``torch.float32`` in their own source, and by
new tensors of the default dtype. Each is closed where it is; what they compute stays their own.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch


class _Torch:
    """torch, but that float32 is float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


SOURCES = ("trl.", "transformers.models.")  # what the names of their modules begin with


@contextmanager
def float64() -> Iterator[None]:
    """Enter it with the model loaded, and with its trainer imported but not yet made.

    A model is to be loaded in float32 and then converted, whoever does it: its tables of positions
    are made on loading.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
            for name, module in list(sys.modules.items()):
                if name.startswith(SOURCES) and vars(module).get("torch") is torch:
                    stack.enter_context(patch.object(module, "torch", _Torch()))
            yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def isolated() -> Iterator[None]:
    """Nothing is inherited from the trainer before, and no generator is left reseeded."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    # One for a process: a second trainer would take over the accumulation of the first.
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
