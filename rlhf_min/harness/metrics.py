"""The metrics of a run: one JSON line for each step, and a progress bar to look at meanwhile."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm


class MetricsLog:
    """Appends each step's metrics to ``metrics.jsonl`` and keeps them for the curves.

    Args:
        file: written line by line, so that a run that is stopped keeps what it had.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
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
        bar = tqdm(steps, total=total, desc=f"{stage:>12}", dynamic_ncols=True)
        shown: dict[str, str] = {}
        with self.file.open("a", encoding="utf-8") as out:
            for step, metrics in enumerate(bar, start=1):
                row = {"stage": stage, "step": step, **metrics}
                self.rows.append(row)
                out.write(json.dumps(row) + "\n")
                out.flush()
                shown |= {name: f"{metrics[name]:.3g}" for name in show if name in metrics}
                bar.set_postfix(shown)

    def series(self, stage: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric of one stage, where it was measured."""
        rows = [row for row in self.rows if row["stage"] == stage and name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]
