"""The loop over a stage's steps, and what it writes: metrics and samples, line by line."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rlhf_min import distributed
from rlhf_min.errors import BadInput, require
from rlhf_min.harness.run import checkpoint, faults
from rlhf_min.harness.run.atomic import NotWritten, flush, write_file
from rlhf_min.harness.run.checkpoint import Checkpoint, Snapshot, checkpoints
from rlhf_min.harness.run.layout import (
    CHECKPOINTS,
    METRICS,
    NOTES,
    SAMPLES,
    TOKENS,
    remove,
    stage_modules,
    users_paths_below,
)
from rlhf_min.harness.run.saving import Saving, StageSaver, measures
from rlhf_min.harness.run.signals import (
    Interrupted,
    Stopped,
    StopRequest,
    catching_signals,
    to_resume,
)
from rlhf_min.harness.trackers import Track, start_tracker

# Without a thread beside the run: each step looks at the clock.
tqdm.monitor_interval = 0
_Bar = partial(tqdm, dynamic_ncols=True, miniters=1)
DAMAGED = "damaged; put the file back as the run wrote it"


class MetricsLog:
    """Runs stages step by step: appends each step's metrics to ``metrics.jsonl``, has the stage
    saved on the way, and takes it up again in a resumed run.

    Args:
        open_run: makes the run's folder and returns it. Called when the first stage starts to
            train, so that an input that is refused before leaves nothing behind.
        report_to: names of trackers that get the metrics too.
        saving: when checkpoints are written.
        resumed: the folder is there already; `resuming` until the stages that it holds are back.
        on_resume: called when a resumed run goes on with other options.
        preflight: what a stage relies on is measured before it starts.
    """

    def __init__(
        self,
        open_run: Callable[[], Path],
        *,
        report_to: Sequence[str] = (),
        saving: Saving | None = None,
        resumed: bool = False,
        on_resume: Callable[[], None] | None = None,
        preflight: bool = True,
    ) -> None:
        self._open_run, self._report_to = open_run, report_to
        self._saving = saving or Saving()
        self.resuming, self.preflight = resumed, preflight
        self._on_resume, self._changed = on_resume, on_resume is not None
        self._folder: Path | None = None
        self._trackers: list[Track] | None = None  # until there is a step to send
        self._sizes: dict[str, int] = {}  # of the growing files after the last restored stage
        self._restored: set[str] = set()
        self._resumable = True  # until a stage is over of which there is no checkpoint
        self.rows: list[dict[str, Any]] = []

    @property
    def folder(self) -> Path:
        """The run's folder, made when it is first asked for."""
        if self._folder is None:
            self._folder = self._open_run()
        return self._folder

    def has_checkpoint(self, stage: str) -> bool:
        """Whether the run is resumed and this stage goes on from somewhere."""
        if not self.resuming:
            return False
        folder = self._checkpoints(stage)  # which all have open before the first looks into it
        return distributed.on_main(lambda: bool(checkpoints(folder)))

    def resume(self, snapshot: Snapshot) -> None:
        """Put a stage back to its newest checkpoint, if the run is resumed and there is one.

        What stages wrote after that is removed: it will be written again.

        Raises:
            BadInput: if the checkpoint is of other models or other data, or if starting anew would
                destroy what later steps or stages have written. Nothing on the disk has changed.
        """
        if not self.resuming:
            return
        newest = checkpoint.latest(self._checkpoints(snapshot.stage))
        at_end = newest is not None and (newest.finished or newest.step >= snapshot.total)
        if not at_end:
            self._require_nothing_later(snapshot.stage)
        if newest is None:
            self._require_unfinished(snapshot)
        else:
            newest.restore(snapshot)
            self._sizes = newest.sizes
            self._restored.add(snapshot.stage)
        self._require_lines(newest)
        self.rows = _read_rows(self.folder / METRICS, self._sizes.get(METRICS, 0))

        # Until here nothing was changed, from here on nothing is refused.
        distributed.barrier()
        if newest is None:
            print(f"{snapshot.stage}: there is no checkpoint of it, so it starts anew")
        else:
            checkpoint.keep(newest.folder.parent, newest.folder, self._saving.keep_last)
            print(f"{snapshot.stage}: continued after step {newest.step} of {snapshot.total}")
        more_steps = newest is not None and newest.total < snapshot.total
        if not at_end or more_steps:
            self.resuming = False
            self.note_changes()
            self._forget_later()

    def note_changes(self) -> None:
        """Write down with what other options a resumed run goes on, when it does."""
        if self._on_resume is not None:
            self._on_resume()
            self._on_resume = None

    def follow(
        self, snapshot: Snapshot, steps: Iterable[dict[str, float]], *, show: tuple[str, ...]
    ) -> None:
        """Run a stage to its end, or from where it was resumed.

        Args:
            snapshot: of the stage.
            steps: what a ``train`` function returns.
            show: names of the metrics in the bar.

        Raises:
            Stopped: after the step in which a signal came; it says whether that is saved.
            Diverged: if an update has broken the model; it replaces nothing that was kept.
            BadInput: if nothing can be measured that ``--keep_best`` names.
        """
        stage, total, first = snapshot.stage, snapshot.total, snapshot.state.step
        folder = self.folder  # made before the bar is drawn, or refused
        self._require_heldout(snapshot)
        # A file that the bar is redirected to would get thousands of its states.
        watched = sys.stderr.isatty() or "ipykernel" in sys.modules
        bar = _Bar(
            _timed(steps, snapshot.state.optimizer),
            f"{stage:>12}",
            total,
            initial=first,
            mininterval=0.1 if watched else 30.0,  # seconds
        )
        in_bar: dict[str, str] = {}
        step, last = first, {}
        with (
            catching_signals() as request,
            faults.explained(folder, self.rows, snapshot),
            StageSaver(
                folder, snapshot, self._saving, self._flushed_sizes, self._resumable
            ) as saver,
        ):
            for step, metrics in enumerate(bar, start=first + 1):
                last = metrics
                self._write(stage, step, metrics)
                in_bar |= {name: f"{metrics[name]:.3g}" for name in show if name in metrics}
                bar.set_postfix(in_bar, refresh=False)
                ended = step >= total or getattr(snapshot.state, "too_far", False)
                stop, late = _agreed(request, late=saver.is_late())
                saver.after_step(metrics, ended=ended, late=late, stop=stop)
                if stop and not ended:
                    raise self._stopped(snapshot, step, saver.saved, request)
            saver.at_end(last, stop=_agreed(request)[0])
            self._resumable &= saver.saved == step
            if _agreed(request)[0]:
                raise self._stopped(snapshot, step, saver.saved, request)
        if request.signal is not None:  # it came while this process waited for what others say
            raise Interrupted(request.signal)
        best = self._saving.keep_best or ""
        measured = any(best in row for row in self.rows if row["stage"] == stage)
        if last and measures(stage, best) and not measured:
            print(f"--keep_best {best}: {stage} never measured it, so none was kept")

    def add_samples(
        self, stage: str, step: int, rows: Iterable[Mapping[str, Any]], *, anew: bool = False
    ) -> None:
        """Append texts to ``samples.jsonl``, one line for each; `anew` removes the stage's others.

        A finished run that is resumed is measured again, and would hold them twice.
        """
        if not distributed.is_main():
            return
        file = self.folder / SAMPLES
        if anew and file.exists():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one
            try:
                others = [line for line in whole if json.loads(line)["stage"] != stage]
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise BadInput(f"{file}: {DAMAGED}") from error
            write_file(file, "".join(others))
        self.append(SAMPLES, [{"stage": stage, "step": step, **row} for row in rows])

    def _write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        row = {"stage": stage, "step": step, **metrics}
        self.rows.append(row)
        self.append(METRICS, [{k: _json_number(v) for k, v in row.items()}])
        if self._trackers is None:
            names = self._report_to if distributed.is_main() else ()
            self._trackers = [
                start_tracker(name, self.folder, anew=self._changed) for name in names
            ]
        for track in self._trackers:
            track(stage, step, metrics)

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a file of lines of JSON, which goes back with the run when it is resumed.

        Raises:
            NotWritten: if they cannot be written.
        """
        if not distributed.is_main():
            return
        file = self.folder / name
        try:
            with file.open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise NotWritten(f"{file}: could not be written: {error.strerror}") from error

    def _flushed_sizes(self) -> dict[str, int]:
        """Bytes of the files of lines, when all that was written to them is on the disk."""
        if not distributed.is_main():
            return {}
        files = [file for file in self._growing() if file.exists()]
        for path in (*files, self.folder):
            flush(path)
        return {file.name: file.stat().st_size for file in files}

    def _require_heldout(self, snapshot: Snapshot) -> None:
        """Nothing can be the best without held-out rows. Once other stages are trained this is
        only a warning."""
        stage, best = snapshot.stage, self._saving.keep_best or ""
        if snapshot.heldout == [] and measures(stage, best):
            missing = f"--keep_best {best}: {stage} has no held-out rows to measure it on"
            cure = "give more rows, a larger --heldout_share, or other rows as --heldout_data"
            require(bool(self.rows), f"{missing}; {cure}")
            print(missing)

    def _stopped(self, snapshot: Snapshot, step: int, saved: int, request: StopRequest) -> Stopped:
        how = f"saved; go on with: {to_resume(self.folder)}"
        if saved < step:
            before = f"; the last checkpoint is of step {saved}: {to_resume(self.folder)}"
            how = f"not saved{before if saved else ''}"
        elif not self._resumable:
            how = "not saved, since a stage before has no checkpoint of its end"
        return Stopped(
            f"stopped by a signal after step {step} of {snapshot.total} of {snapshot.stage}; {how}",
            self.folder,
            request.exit_code,
        )

    def _checkpoints(self, stage: str) -> Path:
        return self.folder / CHECKPOINTS / stage

    def _growing(self) -> list[Path]:
        return [self.folder / name for name in (METRICS, SAMPLES, TOKENS)]

    def _require_nothing_later(self, stage: str) -> None:
        """A stage that goes on before its end would delete the checkpoints of those after it."""
        others = sorted(set(stage_modules()) - {stage, *self._restored})
        later = [x for x in others if checkpoints(self._checkpoints(x))]
        require(
            not later,
            f"--resume {self.folder}: {stage} has no checkpoint of its end, but there are some of "
            f"{', '.join(later)}, which would be lost; put it back, or move these away",
        )

    def _require_unfinished(self, snapshot: Snapshot) -> None:
        """A stage without a checkpoint starts anew, unless that would destroy what is done."""
        rows = _last_rows(self.folder / METRICS)
        others = rows.keys() - {snapshot.stage, *self._restored}
        saved = not self._restored and (self.folder / snapshot.stage).is_dir()
        require(
            rows.get(snapshot.stage, 0) < snapshot.total or not (others or saved),
            f"--resume {self.folder}: {snapshot.stage} was finished and has no checkpoint, so it "
            "would be trained again; put it back, or start a new run without --save_every 0",
        )

    def _require_lines(self, newest: Checkpoint | None) -> None:
        for file in self._growing():
            size = self._sizes.get(file.name, 0)
            require(
                size == 0 or (file.exists() and file.stat().st_size >= size),
                f"{file} is shorter than when {newest.folder if newest else 'the run'} was saved; "
                "put the whole file back",
            )

    def _forget_later(self) -> None:
        """Remove what was written after the step that the run goes on from."""
        if not distributed.is_main():
            return
        for file in self._growing():
            if file.exists():
                os.truncate(file, self._sizes.get(file.name, 0))
        for stage in set(stage_modules()) - self._restored:
            for later in checkpoints(self._checkpoints(stage)):
                remove(later)
        for path in users_paths_below(self.folder / CHECKPOINTS):
            print(f"left alone, since no run wrote it: {path}")


def _agreed(request: StopRequest, *, late: bool = False) -> tuple[bool, bool]:
    """Whether a signal stops the run after this step, and whether the clock says that a checkpoint
    is due: signals and clocks are another process's own. A stop is saved in any case."""
    number, is_late = divmod(distributed.largest(2 * (request.signal or 0) + late), 2)
    request.signal = number or None
    return number > 0, is_late > 0


def note(folder: Path, stage: str, **facts: Any) -> None:
    """Keep facts of a stage in the run's folder; those of the same name are replaced.

    What cannot be written is a warning: the page will lack it, and the run goes on.

    Args:
        folder: of the run.
        stage: or ``data``, for what holds for all of them.
        facts: JSON values.
    """
    if not distributed.is_main():
        return
    file = folder / NOTES
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        now = {**before, stage: {**before.get(stage, {}), **facts}}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # none, or damaged
        before, now = None, {stage: facts}
    try:
        if now != before:
            write_file(file, json.dumps(now, indent=1) + "\n")
    except OSError as error:
        print(f"warning: {file} was not written ({error.strerror})", file=sys.stderr)


def _timed(steps: Iterable[dict[str, float]], optimizer: Any) -> Iterator[dict[str, float]]:
    """The metrics of each step with its seconds, evaluation included, unless it has said where they
    went; its tokens for each second, in the place of the tokens; and the number of steps that fp16
    has skipped so far.
    """
    started = time.perf_counter()
    for metrics in steps:
        metrics = {"skipped": optimizer.skipped, **metrics}
        seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
        if not seconds:
            metrics["time/seconds"] = seconds = time.perf_counter() - started
        if "tokens" in metrics:
            metrics["time/tokens_per_second"] = metrics.pop("tokens") / seconds
        yield metrics
        started = time.perf_counter()


def _last_rows(file: Path) -> dict[str, int]:
    """The last step of each stage in a file of metrics, of which the last line may be cut."""
    last: dict[str, int] = {}
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            row = json.loads(line)
            last[str(row["stage"])] = int(row["step"])
    return last


def _read_rows(file: Path, size: int) -> list[dict[str, Any]]:
    """The rows in the first `size` bytes of a file; null is NaN again."""
    if size == 0:
        return []
    try:
        with file.open("rb") as opened:
            lines = opened.read(size).decode("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BadInput(f"{file}: {DAMAGED}") from error


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
