"""Other places to send metrics to, each through its own library and only if it is asked for."""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_min.errors import require

TRACKERS = ("tensorboard", "wandb")
WANDB = "wandb.json"  # the id there, and the last step of each stage that was sent
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


def start_tracker(name: str, folder: Path, *, anew: bool) -> Track:
    """What takes each step's metrics, under ``stage/name``.

    A run that was killed has sent steps after its last checkpoint, and makes them again when it is
    resumed. They stand once all the same.

    Args:
        name: of `TRACKERS`.
        folder: of the run.
        anew: it is resumed with other options, so its steps are not those that were sent.
    """
    return _tensorboard(folder) if name == "tensorboard" else _wandb(folder, anew=anew)


def _tensorboard(folder: Path) -> Track:
    """Files in ``tensorboard/<stage>``: stages have folders of their own, since each counts from 1
    and TensorBoard drops what a folder holds from the first step of a later file on."""
    from torch.utils.tensorboard import SummaryWriter

    writers: dict[str, SummaryWriter] = {}

    def track(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in writers:
            writers[stage] = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=step)
        for key, value in metrics.items():
            writers[stage].add_scalar(f"{stage}/{key}", value, step)
        writers[stage].flush()

    return track


def _wandb(folder: Path, *, anew: bool) -> Track:
    """Project and mode are those of wandb's own environment variables. Nothing can be taken back
    there: a resumed run goes on under the same id with the first step that was not sent; with other
    options it gets an id of its own."""
    import wandb

    file = folder / WANDB
    known = {} if anew else _known(file)
    goes_on = {"id": known["id"], "resume": "allow"} if known else {}
    run = wandb.init(dir=str(folder), name=folder.name, **goes_on)
    sent = dict(known.get("sent", {}))

    def log(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if step <= sent.get(stage, 0):
            return
        # Each stage counts from 1, which wandb's own counter would refuse.
        run.log({f"{stage}/{key}": value for key, value in {**metrics, "step": step}.items()})
        sent[stage] = step
        new = file.with_name(f".{file.name}")
        new.write_text(json.dumps({"id": run.id, "sent": sent}), encoding="utf-8")
        new.replace(file)

    return log


def _known(file: Path) -> dict[str, Any]:
    """What was sent under which id; nothing, if that is not known."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {"id": str(known["id"]), "sent": {k: int(v) for k, v in known["sent"].items()}}
    except (OSError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return {}
