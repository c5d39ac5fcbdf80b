"""A worker's end of the line to the parent, and what is measured about its process."""

import importlib.metadata
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class Commands:
    """The worker's end of the line to the parent, and what is measured about its process."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._imported, self._started = 0, 0.0
        self._found: dict[str, Any] = {}
        self._steps: Counter[str] = Counter()
        register_optimizer_step_post_hook(self._count_step)

    def imported(self) -> None:
        """All modules are imported, and no model is loaded yet."""
        self._imported = memory("VmRSS")

    def ready(self, *, trained: Sequence[nn.Module] = (), frozen: Sequence[nn.Module] = ()) -> None:
        """All is loaded: say so, with the bytes that no implementation can do without."""
        fixed = self._imported + fixed_bytes(trained=trained, frozen=frozen)
        forget_peak()
        self._found = {"fixed": fixed, "versions": versions()}

    def wait(self) -> None:
        """Answer what came of the last round and sleep until the next one is to begin.

        Raises:
            SystemExit: if there is none.
        """
        print(json.dumps(self._found), file=self._answers, flush=True)
        if sys.stdin.readline().strip() != "run":
            raise SystemExit
        self._steps.clear()
        self._started = time.perf_counter()

    def done(
        self,
        *,
        tokens: int,
        seconds: dict[str, float] | None = None,
        figures: dict[str, float] | None = None,
    ) -> None:
        """The round is over, and its time.

        Args:
            tokens: real tokens that were worked on.
            seconds: of single parts.
            figures: losses and the like, to be compared with those of the other side.
        """
        self._found = {
            "seconds": {"all": time.perf_counter() - self._started, **(seconds or {})},
            "tokens": tokens,
            "figures": figures or {},
            "steps": sum(self._steps.values()),
            "optimizer": ", ".join(self._steps),
            "peak": memory("VmHWM"),
        }

    def found(self, answer: dict[str, Any]) -> None:
        """The round is over; the answer is of another kind."""
        self._found = answer

    def _count_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        fused = " (fused)" if optimizer.defaults.get("fused") else ""
        self._steps[type(optimizer).__name__ + fused] += 1


def memory(field: str) -> int:
    """Bytes resident in this process: now (``VmRSS``) or at most so far (``VmHWM``)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """``VmHWM`` starts again at what is resident now, so that loading does not count."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def fixed_bytes(*, trained: Sequence[nn.Module], frozen: Sequence[nn.Module]) -> int:
    """Weights of all models and, of what is trained, the gradient and Adam's two moments."""
    trained_bytes, frozen_bytes = (
        sum(
            p.numel() * p.element_size()
            for p in {id(p): p for model in models for p in model.parameters()}.values()
        )
        for models in (trained, frozen)
    )
    return 4 * trained_bytes + frozen_bytes


def versions() -> dict[str, str]:
    """Of the libraries that this process may use."""
    found = {}
    for name in ("torch", "transformers", "trl"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
