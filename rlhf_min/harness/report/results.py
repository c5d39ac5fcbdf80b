"""What a run leaves to look at: the results table, the curves, and sample responses."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from rlhf_min.estimates import Estimate
from rlhf_min.evaluation import Evaluation
from rlhf_min.harness.run.files import write_file
from rlhf_min.rollout import RewardFunction, call_reward

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = "curves.png"


class Recorded(Protocol):
    """The metrics of a run: being written, or read back."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each step, with its stage."""

    def series(self, stage: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric of one stage, where it was measured."""


# What the results table and results.json show of each model, in this order, where it was measured.
ROWS = {
    "score": "score",
    "gold_reward": "gold reward",
    "correct": "  correct",
    "polite": "  polite",
    "brief": "  brief",
    "win_rate": "win rate by score",
    "gold_win_rate": "win rate by gold",
    "kl": "KL, nats",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "response_length": "length, tokens",
    "eos_rate": "ended by EOS",
}
SHARES = {
    "ties": "ties by score",
    "gold_ties": "ties by gold",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "repeated_4": "repeated 4-grams",
}
# JSON and table say gold_win_rate; the evaluation names it after its monitor.
_RENAMED = {"gold_reward_win_rate": "gold_win_rate", "gold_reward_ties": "gold_ties"}

_INK = {"sft": "#4c78a8", "reward_model": "#b279a2", "ppo": "#e45756", "dpo": "#54a24b"}
# Panel title, then stage, metric and legend of each line in it.
_PANELS: list[tuple[str, list[tuple[str, str, str]]]] = [
    ("SFT: loss, nats per token", [("sft", "loss", "train"), ("sft", "eval/loss", "held out")]),
    (
        "Reward model: share of pairs ranked right",
        [("reward_model", "accuracy", "train"), ("reward_model", "eval/accuracy", "held out")],
    ),
    ("PPO: score and gold reward", [("ppo", "score", "score"), ("ppo", "gold_reward", "gold")]),
    ("PPO: KL to the reference, nats", [("ppo", "k1", "k1"), ("ppo", "k3", "k3")]),
    (
        "PPO: entropy per token, explained variance",
        [("ppo", "entropy", "entropy"), ("ppo", "explained_variance", "explained variance")],
    ),
    (
        "PPO: share of clipped tokens",
        [("ppo", "clip_fraction", "policy"), ("ppo", "value_clip_fraction", "value")],
    ),
    ("PPO: response length, tokens", [("ppo", "response_length", "length")]),
    (
        "DPO: share of pairs ranked right",
        [("dpo", "accuracy", "train"), ("dpo", "eval/accuracy", "held out")],
    ),
    (
        "DPO: implicit rewards",
        [("dpo", "chosen_rewards", "chosen"), ("dpo", "rejected_rewards", "rejected")],
    ),
]


def results_table(evaluations: Mapping[str, Evaluation], *, baseline: str) -> str:
    """One column for each model, one row for each measure with its 95% interval."""
    columns = {name: _cells(evaluation) for name, evaluation in evaluations.items()}
    lines = ["".join([" " * 20, *(f"{name.upper():>26}" for name in columns)])]
    for key, title in (ROWS | SHARES).items():
        if any(key in cells for cells in columns.values()):
            cells = [columns[name].get(key, "") for name in columns]
            lines.append(f"{title:<20}" + "".join(f"{cell:>26}" for cell in cells))
    first = next(iter(evaluations.values()))
    lines.append(
        f"{len(first.responses)} test prompts, temperature 1, the same random numbers for all; "
        f"95% bootstrap intervals; wins are over {baseline.upper()}, a tie is half a win"
    )
    notes = {name: evaluation.notes for name, evaluation in evaluations.items()}
    return "\n".join([*lines, *first.signatures.values(), *note_lines(notes)])


def note_lines(notes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Why measures are missing or see too little, a line for each; the models are named before it.

    >>> note_lines({"sft": {"bleu": "BLEU: ..."}, "ppo": {"bleu": "BLEU: ..."}})
    ['SFT, PPO: BLEU: ...']
    """
    models: dict[str, list[str]] = {}
    for model, reasons in notes.items():
        for reason in reasons.values():
            models.setdefault(reason, []).append(model.upper())
    return [f"{', '.join(names)}: {reason}" for reason, names in models.items()]


def results_json(
    evaluations: Mapping[str, Evaluation],
    *,
    reward_model: Mapping[str, Estimate],
    seed: int,
    **more: Any,
) -> dict[str, Any]:
    """The results as JSON values: each estimate with mean, ci95 and n."""
    results: dict[str, Any] = {"seed": seed}
    for name, evaluation in evaluations.items():
        estimates = {_RENAMED.get(k, k): e.as_json() for k, e in evaluation.estimates.items()}
        shares = {_RENAMED.get(k, k): share for k, share in evaluation.shares.items()}
        results[name] = {key: estimates[key] for key in ROWS if key in estimates}
        results[name] |= {key: shares[key] for key in SHARES if key in shares}
        results[name]["signatures"] = evaluation.signatures
        if evaluation.notes:
            results[name]["notes"] = evaluation.notes
    if reward_model:
        results["reward_model"] = {name: e.as_json() for name, e in reward_model.items()}
    return results | more


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """JSON with two spaces of indent, ending in a new line."""
    write_file(file, json.dumps(content, indent=2) + "\n")


def write_samples(
    file: Path, evaluations: Mapping[str, Evaluation], prompts: Sequence[str], *, n: int = 20
) -> None:
    """The first n test prompts with every model's response and its score, as Markdown."""
    lines = [
        "# Sample responses",
        "",
        "Drawn at temperature 1; in brackets the reward model's score.",
        "",
    ]
    lines += ["| prompt | " + " | ".join(name.upper() for name in evaluations) + " |"]
    lines += ["|---" * (1 + len(evaluations)) + "|"]
    for i in range(min(n, len(prompts))):
        cells = [_escape(prompts[i])]
        for evaluation in evaluations.values():
            cells.append(f"{_escape(evaluation.responses[i])} ({evaluation.scores[i]:+.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    write_file(file, "\n".join(lines) + "\n")


def sample_rows(
    evaluations: Mapping[str, Evaluation],
    prompts: Sequence[str],
    *,
    gold: RewardFunction | None = None,
    n: int = 20,
) -> list[dict[str, Any]]:
    """The first n test prompts with every model's response, as rows of ``samples.jsonl``.

    Args:
        gold: the true reward, where there is one.
    """
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts[:n]):
        for model, evaluation in evaluations.items():
            row = {"model": model, "prompt": prompt, "response": evaluation.responses[i]}
            rows.append({**row, "score": evaluation.scores[i]})
            if gold is not None:
                truth = call_reward(gold, [prompt], [evaluation.responses[i]])
                rows[-1]["gold_reward"] = float(truth)
    return rows


def pairs_json(chosen: Tensor, rejected: Tensor) -> dict[str, list[float]]:
    """``reward_model.json``: the scores of held-out pairs, ``(N,)`` each, before normalising."""
    return {"chosen": chosen.tolist(), "rejected": rejected.tolist()}


def write_curves(file: Path, log: Recorded) -> None:
    """All stages' curves in one picture, and beside it the same as SVG.

    Panels of stages that did not run are left out.
    """
    # Not before: a run that has no working matplotlib lacks a picture, and no more.
    import matplotlib
    from matplotlib.figure import Figure

    stages = {row["stage"] for row in log.rows}
    panels = [(title, lines) for title, lines in _PANELS if lines[0][0] in stages]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(13, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, min(3, len(panels)), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, lines) in zip(grid.flat, panels, strict=False):
        _draw(axes, log, title, lines)
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    # Without the date and with texts as texts, so that the same run gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    write_file(file, png.getvalue())
    write_file(file.with_suffix(".svg"), svg.getvalue())


def _draw(axes: "Axes", log: Recorded, title: str, lines: list[tuple[str, str, str]]) -> None:
    ink = _INK[lines[0][0]]
    for i, (stage, metric, legend) in enumerate(lines):
        steps, values = log.series(stage, metric)
        if not steps:
            continue
        style: dict[str, Any] = {"color": ink if i == 0 else "#333333"}
        if len(steps) > 60:  # a train curve: noisy, so its running mean is the line
            axes.plot(steps, values, alpha=0.25, linewidth=0.8, **style)
            values = _running_mean(values, len(values) // 60)
        if metric.startswith("eval/"):
            style |= {"marker": "o", "markersize": 3}
        axes.plot(steps, values, label=legend, linewidth=1.6, **style)
    # A title names a second line after its "and": a gold reward that was measured, if it was.
    drawn = len(axes.get_legend_handles_labels()[0])
    axes.set_title(title if drawn == len(lines) else title.partition(" and ")[0], fontsize=10)
    axes.set_xlabel("rollout" if lines[0][0] == "ppo" else "optimizer step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if drawn > 1:
        axes.legend(fontsize=8, frameon=False)


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """At each place the mean of it and of up to `reach` neighbours on either side."""
    parts = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _cells(evaluation: Evaluation) -> dict[str, str]:
    cells = {}
    for name, estimate in evaluation.estimates.items():
        digits = 1 if name in ("bleu", "response_length") else 3
        lo, hi = f"{estimate.lo:.{digits}f}", f"{estimate.hi:.{digits}f}"
        cells[_RENAMED.get(name, name)] = f"{estimate.mean:.{digits}f} [{lo}, {hi}]"
    return cells | {_RENAMED.get(k, k): f"{share:.3f}" for k, share in evaluation.shares.items()}


def _escape(text: str) -> str:
    return "<br>".join(text.replace("|", "\\|").splitlines())
