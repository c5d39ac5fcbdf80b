"""When a stage under way is saved, and its best model kept; `checkpoint.py` deletes old ones."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_min import distributed
from rlhf_min.errors import require
from rlhf_min.harness.run import faults
from rlhf_min.harness.run.atomic import NotWritten, write_file
from rlhf_min.harness.run.checkpoint import Snapshot, Writer
from rlhf_min.harness.run.layout import BEST, CHECKPOINTS, stage_modules

SAVE_SECONDS = 300.0  # between checkpoints, unless their steps are given
BEST_FILE = "best.json"


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written, and which are kept.

    Args:
        every: steps of a stage from one to the next; None: `SAVE_SECONDS`; 0: none at all but when
            a signal stops the run.
        keep_last: so many of each stage.
        keep_best: a metric like ``eval/score``; the model with its best value is kept beside.
    """

    every: int | None = None
    keep_last: int = 1
    keep_best: str | None = None


class StageSaver:
    """Saves one stage: checkpoints when they are due, and the best model so far.

    Args:
        run: its folder.
        snapshot: what is saved.
        saving: when, and what is kept.
        sizes: flushes the lines that the run has written, and returns the bytes of their files.
        resumable: false where a stage before has no checkpoint of its end; then a signal needs
            none of this stage.
    """

    def __init__(
        self,
        run: Path,
        snapshot: Snapshot,
        saving: Saving,
        sizes: Callable[[], Mapping[str, int]],
        resumable: bool,
    ) -> None:
        self._snapshot, self._saving = snapshot, saving
        self._sizes, self._resumable = sizes, resumable
        self._writer = Writer(
            run / CHECKPOINTS / snapshot.stage, snapshot, keep_last=saving.keep_last
        )
        self._saved_at = time.monotonic()
        self.saved = snapshot.state.step  # the step of the last checkpoint
        self._best_folder = run / BEST / snapshot.stage
        self._best = distributed.on_main(self._best_before)  # the larger the better

    def __enter__(self) -> "StageSaver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._writer.__exit__(kind, error, traceback)

    def is_late(self) -> bool:
        """Whether the clock says that a checkpoint is due."""
        return self._saving.every is None and time.monotonic() - self._saved_at > SAVE_SECONDS

    def after_step(
        self, metrics: Mapping[str, float], *, ended: bool, late: bool, stop: bool
    ) -> None:
        """Save what is to be saved between two steps.

        Args:
            metrics: of the step.
            ended: it was the last one, so that `at_end` comes next.
            late: `is_late` says so, in any of the processes.
            stop: a signal ends the run here.
        """
        self._writer.check()
        self._keep_best(metrics)
        if not ended and (late or self._is_due() or (stop and self._resumable)):
            faults.require_sound(self._snapshot, {})
            self._save(finished=False)
            self.saved = self._snapshot.state.step

    def at_end(self, metrics: Mapping[str, float], *, stop: bool) -> None:
        """Write the checkpoint of the stage's end, unless it was there before.

        Args:
            metrics: of the last step; none if no step was made.
            stop: a signal has come.

        Raises:
            Diverged: if the last update has broken the model.
        """
        faults.require_sound(self._snapshot, metrics)
        if metrics and (self._saving.every != 0 or (stop and self._resumable)):
            try:
                self._save(finished=True)
                self._writer.wait()  # a signal that comes meanwhile counts too
                written = True
            except NotWritten as error:  # the model, which is smaller, may still fit
                then = "the model itself is saved next; this stage cannot be resumed"
                print(f"warning: {error}; {then}", file=sys.stderr)
                written = False
            if not distributed.agree(not written):
                self.saved = self._snapshot.state.step
        self._writer.wait()

    def _is_due(self) -> bool:
        every = self._saving.every or 0
        return every > 0 and self._snapshot.state.step % every == 0

    def _save(self, *, finished: bool) -> None:
        # All lines until here must be on the disk before the checkpoint that counts on them.
        sizes = self._sizes()
        self._saved_at = time.monotonic()
        self._writer.write(finished=finished, sizes=sizes)

    def _keep_best(self, metrics: Mapping[str, float]) -> None:
        name = self._saving.keep_best
        if name is None or not math.isfinite(metrics.get(name, math.nan)):
            return
        value = self._sign(name) * metrics[name]
        if self._best is None or value > self._best:
            faults.require_sound(self._snapshot, {})
            self._snapshot.save_model(self._best_folder)
            best = {"metric": name, "step": self._snapshot.state.step, "value": metrics[name]}
            file = self._best_folder / BEST_FILE
            write_file(file, json.dumps(best) + "\n")
            self._best = value

    def _best_before(self) -> float | None:
        """How good the kept model is, if it is of this run: of the same metric, and of a step that
        the run did not go back behind."""
        try:
            best = json.loads((self._best_folder / BEST_FILE).read_text(encoding="utf-8"))
            if best["metric"] != self._saving.keep_best or best["step"] > self.saved:
                return None
            return self._sign(best["metric"]) * float(best["value"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def _sign(self, name: str) -> int:
        better = stage_modules()[self._snapshot.stage].MEASURED
        return -1 if better.get(name.removeprefix("eval/")) == "lower" else 1


def measures(stage: str, name: str) -> bool:
    """Whether a stage would measure this; what no stage is known for may be one of its monitors."""
    bare, modules = name.removeprefix("eval/"), stage_modules()
    known = any(bare in module.MEASURED for module in modules.values())
    return bare in modules[stage].MEASURED or (bool(name) and not known and modules[stage].MONITORS)


def require_measured(name: str | None, stages: Iterable[str], monitors: Iterable[str]) -> None:
    """Raise `BadInput` for a ``--keep_best`` that none of these stages will measure.

    Args:
        name: what is given, if anything is.
        stages: that the command trains.
        monitors: the rewards that are reported beside the one that is trained on.
    """
    modules = [stage_modules()[stage] for stage in stages]
    names = {f"eval/{name}" for module in modules for name in module.MEASURED}
    if any(module.MONITORS for module in modules):
        names |= {f"eval/{name}" for name in monitors}
    require(
        name is None or name in names,
        f"--keep_best {name} is measured by no stage of this run; give one of "
        f"{', '.join(sorted(names))}",
    )
