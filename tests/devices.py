"""Pretended devices: several of them on a machine that has none but the CPU.

Inside `PretendedDevices` every tensor lies on a device that is only remembered. What it says of
itself (``x.device``) and what is asked for (``device=``, ``.to``) is the pretended device; the
numbers stay in the CPU's memory. An operation whose tensors lie on different devices is refused, as
CUDA would refuse it; only ``.to``, ``.cpu``, ``copy_`` and what takes ``device=`` may move.

A device of type mps has no float64, as Apple's GPUs have none.
"""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

HOST = torch.device("cpu")
MAY_DIFFER = {"to", "cpu", "copy_", "__set__", "_has_compatible_shallow_copy_type"}


class PretendedDevices(TorchFunctionMode):
    """Refuses to mix tensors of different pretended devices."""

    def __init__(self) -> None:
        super().__init__()
        self.where: dict[int, torch.device] = {}  # of each storage, so that views share it

    def __enter__(self) -> "PretendedDevices":
        self.grouping = patch.object(clip_grad, "_group_tensors_by_device_and_dtype", self.grouped)
        self.grouping.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.grouping.stop()

    def grouped(self, tensors: list[list[Tensor]]) -> dict[Any, Any]:
        """What gradient clipping, which asks the tensors themselves, must be told."""
        groups: dict[Any, list[Tensor]] = {}
        for x in tensors[0]:
            groups.setdefault((self.device(x), x.dtype), []).append(x)
        return {key: ([group], []) for key, group in groups.items()}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name, kwargs = getattr(function, "__name__", ""), dict(kwargs or {})
        if function == torch.Tensor.device.__get__:
            return self.device(args[0])
        given = args[:1] if name == "__deepcopy__" else (args, kwargs)  # its memo holds others too
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        asked = kwargs.pop("device", None)
        if name == "to":
            args, asked = self.without_device(args, asked)
        there = {self.device(x) for x in tensors[: 1 if name in MAY_DIFFER else None]}
        assert len(there) <= 1, f"{name} mixes tensors on {sorted(map(str, there))}"
        device = there.pop() if there else HOST
        assert name != "numpy" or device == HOST, f"numpy of a tensor on {device}"
        if name == "to" and device.type == "mps":
            assert torch.float64 not in (*args, *kwargs.values()), "Apple's GPUs have no float64"
        if name == "cpu" or asked is not None:
            device = torch.device(asked or HOST)
        found = function(*args, **kwargs)
        if isinstance(found, Tensor) and any(found is x or _same(found, x) for x in tensors):
            if self.device(found) == device:
                return found
            found = found.clone()  # another device has memory of its own
        for x in tree_leaves(found):
            if isinstance(x, Tensor):
                self.place(x, device)
        return found

    def without_device(self, args: Any, asked: Any) -> tuple[Any, Any]:
        """The arguments of ``.to`` without a device, and the device."""
        kept = list(args[:1])
        for x in args[1:]:
            if isinstance(x, Tensor):
                asked = self.device(x)
                kept.append(x.dtype)
            elif isinstance(x, (str, torch.device)):
                asked = x
            elif isinstance(x, torch.dtype):
                kept.append(x)
        return tuple(kept), asked

    def device(self, x: Tensor) -> torch.device:
        """Where a tensor pretends to be."""
        return self.where.get(_storage(x), HOST)

    def place(self, x: Tensor, device: torch.device) -> None:
        """Remember where a new tensor is."""
        assert device.type != "mps" or x.dtype != torch.float64, f"float64 on {device}"
        self.where[_storage(x)] = device


def _same(x: Tensor, other: Tensor) -> bool:
    return _storage(x) == _storage(other) != 0


def _storage(x: Tensor) -> int:
    try:
        with torch._C.DisableTorchFunction():
            return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # inside vmap there is none
        return 0
