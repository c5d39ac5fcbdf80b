"""The metrics of a run: one JSON line for each step, and a progress bar to look at meanwhile."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rlhf_min.harness.trackers import Track, start_tracker


class MetricsLog:
    """Appends each step's metrics to ``metrics.jsonl`` and keeps them for the curves.

    Args:
        open_run: makes the run's folder and returns it. Called when the first stage starts to
            train, so that an input that is refused before leaves nothing behind.
        report_to: names of trackers that get the metrics too.
    """

    def __init__(self, open_run: Callable[[], Path], *, report_to: Sequence[str] = ()) -> None:
        self._open_run, self._report_to = open_run, report_to
        self._folder: Path | None = None
        self._trackers: list[Track] = []
        self.rows: list[dict[str, Any]] = []

    @property
    def folder(self) -> Path:
        """The run's folder, made when it is first asked for."""
        if self._folder is None:
            self._folder = self._open_run()
            self._trackers = [start_tracker(name, self._folder) for name in self._report_to]
        return self._folder

    def follow(
        self, stage: str, steps: Iterable[dict[str, float]], *, total: int, show: tuple[str, ...]
    ) -> None:
        """Run a stage to its end.

        Args:
            stage: written beside each step.
            steps: what a ``train`` function returns.
            total: number of steps, for the bar.
            show: names of the metrics in the bar.
        """
        file = self.folder / "metrics.jsonl"
        # A file that the bar is redirected to would get thousands of its states.
        watched = sys.stderr.isatty() or "ipykernel" in sys.modules
        every = 0.1 if watched else 30.0  # seconds
        bar = tqdm(steps, f"{stage:>12}", total, dynamic_ncols=True, mininterval=every)
        shown: dict[str, str] = {}
        with file.open("a", encoding="utf-8") as out:
            for step, metrics in enumerate(bar, start=1):
                row = {"stage": stage, "step": step, **metrics}
                self.rows.append(row)
                out.write(json.dumps({k: _json_number(v) for k, v in row.items()}) + "\n")
                out.flush()
                for track in self._trackers:
                    track(stage, step, metrics)
                shown |= {name: f"{metrics[name]:.3g}" for name in show if name in metrics}
                bar.set_postfix(shown, refresh=False)

    def add_samples(self, stage: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append texts to ``samples.jsonl``, one line for each."""
        with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps({"stage": stage, "step": step, **row}) + "\n")

    def series(self, stage: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric of one stage, where it was measured."""
        rows = [row for row in self.rows if row["stage"] == stage and name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
