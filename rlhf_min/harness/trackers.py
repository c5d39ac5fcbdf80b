"""Other places to send metrics to, each through its own library and only if it is asked for."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlhf_min.errors import require

TRACKERS = ("tensorboard", "wandb")
Track = Callable[[str, int, Mapping[str, float]], None]  # stage, step, metrics


def check_trackers(names: Sequence[str]) -> None:
    """Raise `BadInput` for a tracker that is not known or not installed."""
    for name in names:
        known = " or ".join(TRACKERS)
        require(name in TRACKERS, f"--report_to {name} is not known; give {known}")
        require(
            importlib.util.find_spec(name) is not None,
            f"--report_to {name}: the package is not installed; pip install {name}",
        )


def start_tracker(name: str, folder: Path) -> Track:
    """What takes each step's metrics, under ``stage/name``.

    TensorBoard's files lie in ``folder/tensorboard``; wandb takes project and mode from its own
    environment variables.
    """
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def track(stage: str, step: int, metrics: Mapping[str, float]) -> None:
            for key, value in metrics.items():
                writer.add_scalar(f"{stage}/{key}", value, step)
            writer.flush()

        return track

    import wandb

    run = wandb.init(dir=str(folder), name=folder.name)

    def log(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        # Each stage counts from 1, which wandb's own counter would refuse.
        run.log({f"{stage}/{key}": value for key, value in {**metrics, "step": step}.items()})

    return log
