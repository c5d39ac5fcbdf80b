"""The metrics of a run: one JSON line for each step, and a progress bar to look at meanwhile."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm


class MetricsLog:
    """Appends each step's metrics to ``metrics.jsonl`` and keeps them for the curves.

    Args:
        open_run: makes the run's folder and returns it. Called when the first stage starts to
            train, so that an input that is refused before leaves nothing behind.
    """

    def __init__(self, open_run: Callable[[], Path]) -> None:
        self._open_run = open_run
        self._file: Path | None = None
        self.rows: list[dict[str, Any]] = []

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
        if self._file is None:
            self._file = self._open_run() / "metrics.jsonl"
        bar = tqdm(steps, total=total, desc=f"{stage:>12}", dynamic_ncols=True)
        shown: dict[str, str] = {}
        with self._file.open("a", encoding="utf-8") as out:
            for step, metrics in enumerate(bar, start=1):
                row = {"stage": stage, "step": step, **metrics}
                self.rows.append(row)
                out.write(json.dumps({k: _json_number(v) for k, v in row.items()}) + "\n")
                out.flush()
                shown |= {name: f"{metrics[name]:.3g}" for name in show if name in metrics}
                bar.set_postfix(shown)

    def series(self, stage: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric of one stage, where it was measured."""
        rows = [row for row in self.rows if row["stage"] == stage and name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
