"""A stage that only counts its steps, to test what runs, saves and resumes a stage."""

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from small import small_policy

from rlhf_min.harness.run.checkpoint import Snapshot
from rlhf_min.harness.run.log import MetricsLog
from rlhf_min.harness.run.saving import Saving
from rlhf_min.policy import Policy


class CountingState:
    """Its state, with values of all kinds in it."""

    optimizer = SimpleNamespace(skipped=0, autocast=nullcontext)

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.extra: Any = {1: torch.arange(3), "x": (1, [math.inf], None)}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "extra": self.extra}

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self.extra = state["step"], state["extra"]


def counting_stage(
    stage: str = "ppo",
    *,
    step: int = 0,
    total: int = 10,
    policy: Policy | None = None,
    **models: Any,
) -> Snapshot:
    """What is saved of such a stage after so many steps; `models` are those beside the policy."""
    policy = policy or small_policy(critic="shared", dtype=torch.float32)
    return Snapshot(
        stage,
        policy,
        CountingState(step),
        lambda folder: folder.mkdir(parents=True),
        models={"policy": policy, **models},
        texts=["red ball", "blue ball one", "one", "two"],
        examples=(),
        total=total,
    )


def log_in(folder: Path, *, keep_best: str | None = None, **options: Any) -> MetricsLog:
    """The log of a run in this folder, which writes no checkpoints."""
    return MetricsLog(lambda: folder, saving=Saving(every=0, keep_best=keep_best), **options)


def counted(snapshot: Snapshot, steps: Iterable[dict[str, float]]) -> Iterator[dict[str, float]]:
    """These metrics, each a step of the stage."""
    for metrics in steps:
        snapshot.state.step += 1
        yield metrics
