"""Reads what the recorders have written: what trl was given, and what came out."""

import json
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

torch.set_num_threads(1)  # models so small only wait for a second thread

Module = TypeVar("Module", bound=nn.Module)

VERSION = "0.11.3"
NEWEST = "1.16.0"
FOLDER = Path(__file__).parent / "recorded"


class Recording:
    """One file: `tensors` by name, and `facts`, which are everything else."""

    def __init__(self, name: str, *, version: str = VERSION) -> None:
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.facts = json.loads(file.metadata()["facts"])
        assert self.facts["versions"]["trl"] == version

    def rows(self, name: str) -> list[Tensor]:
        """Tensors of unequal shapes, which are recorded as one."""
        shapes = self.tensors[f"{name}.shapes"].tolist()
        parts = self.tensors[name].split([int(torch.tensor(shape).prod()) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def cases(self, name: str) -> list[dict[str, Tensor]]:
        """Of each case of one function, arguments and results by their names."""
        keys = [key for key in self.under(name) if not key.endswith(".shapes")]
        columns = [self.rows(f"{name}.{key}") for key in keys]
        assert columns
        return [dict(zip(keys, case, strict=True)) for case in zip(*columns, strict=True)]

    def under(self, name: str) -> dict[str, Tensor]:
        """All whose names begin with ``name.``, such as the parameters of a model."""
        prefix = f"{name}."
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }


@torch.no_grad()
def load(module: Module, weights: dict[str, Tensor]) -> Module:
    """The module in float64 with recorded parameters, which must be the ones that it has."""
    parameters = dict(module.double().named_parameters())
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    return module
