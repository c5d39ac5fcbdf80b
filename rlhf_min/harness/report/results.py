"""The results of the test: their table, ``results.json``, and sample responses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_min.estimates import Estimate
from rlhf_min.evaluation import Evaluation
from rlhf_min.harness.run.atomic import write_file
from rlhf_min.loading.reward_function import RewardFunction, call_reward

# What the results table and results.json show of each model, in this order, where it was measured.
MEASURES = {
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


def results_table(evaluations: Mapping[str, Evaluation], *, baseline: str) -> str:
    """One column for each model, one row for each measure with its 95% interval."""
    columns = {name: _cells(evaluation) for name, evaluation in evaluations.items()}
    width = max(26, *(len(name) + 2 for name in columns))
    lines = ["".join([" " * 20, *(f"{name:>{width}}" for name in columns)])]
    for key, title in (MEASURES | SHARES).items():
        if any(key in cells for cells in columns.values()):
            cells = [columns[name].get(key, "") for name in columns]
            lines.append(f"{title:<20}" + "".join(f"{cell:>{width}}" for cell in cells))
    first = next(iter(evaluations.values()))
    lines.append(
        f"{len(first.responses)} test prompts, temperature 1, the same random numbers for all; "
        f"95% bootstrap intervals; wins are over {baseline}, a tie is half a win"
    )
    notes = {name: evaluation.notes for name, evaluation in evaluations.items()}
    return "\n".join([*lines, *first.signatures.values(), *note_lines(notes)])


def note_lines(notes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Why measures are missing or see too little, a line for each; the models are named before it.

    >>> note_lines({"sft": {"bleu": "BLEU: ..."}, "ppo": {"bleu": "BLEU: ..."}})
    ['sft, ppo: BLEU: ...']
    """
    models: dict[str, list[str]] = {}
    for model, reasons in notes.items():
        for reason in reasons.values():
            models.setdefault(reason, []).append(model)
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
        results[name] = {key: estimates[key] for key in MEASURES if key in estimates}
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
    lines += ["| prompt | " + " | ".join(evaluations) + " |"]
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


def _cells(evaluation: Evaluation) -> dict[str, str]:
    cells = {}
    for name, estimate in evaluation.estimates.items():
        digits = 1 if name in ("bleu", "response_length") else 3
        lo, hi = f"{estimate.lo:.{digits}f}", f"{estimate.hi:.{digits}f}"
        cells[_RENAMED.get(name, name)] = f"{estimate.mean:.{digits}f} [{lo}, {hi}]"
    return cells | {_RENAMED.get(k, k): f"{share:.3f}" for k, share in evaluation.shares.items()}


def _escape(text: str) -> str:
    return "<br>".join(text.replace("|", "\\|").splitlines())
