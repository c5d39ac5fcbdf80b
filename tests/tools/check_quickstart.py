"""Do the results of quickstart runs hold what examples/README.md promises?

    python tests/tools/check_quickstart.py runs/*/results.json    # one of each seed

Prints each promise with the figures of every run; exits with 1 if one is broken.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Results = dict[str, Any]


def mean(results: Results, model: str, name: str) -> float:
    return results[model][name]["mean"]


def lo(results: Results, model: str, name: str) -> float:
    return results[model][name]["ci95"][0]


def hi(results: Results, model: str, name: str) -> float:
    return results[model][name]["ci95"][1]


def length_rule(results: Results) -> float:
    return max(mean(results, "reward_model", rule) for rule in ("longer_wins", "shorter_wins"))


# What is promised, the figure, and the range it must lie in.
PROMISES: list[tuple[str, Callable[[Results], float], float, float]] = [
    ("test questions", lambda r: r["sft"]["correct"]["n"], 500, float("inf")),
    ("SFT: share correct", lambda r: mean(r, "sft", "correct"), 0.30, 0.70),
    ("reward model: accuracy", lambda r: mean(r, "reward_model", "accuracy"), 0.75, 1),
    (
        "reward model: points above the better length rule",
        lambda r: 100 * (mean(r, "reward_model", "accuracy") - length_rule(r)),
        10,
        100,
    ),
    (
        "reward model: share of the gold reward's accuracy",
        lambda r: mean(r, "reward_model", "accuracy") / mean(r, "reward_model", "gold_accuracy"),
        0.90,
        1.1,
    ),
    (
        "PPO: gold reward, its lower end above SFT's upper end",
        lambda r: lo(r, "ppo", "gold_reward") - hi(r, "sft", "gold_reward"),
        0,
        100,
    ),
    ("PPO: win rate by gold", lambda r: mean(r, "ppo", "gold_win_rate"), 0.65, 1),
    (
        "PPO: points of share correct above SFT",
        lambda r: 100 * (mean(r, "ppo", "correct") - mean(r, "sft", "correct")),
        3,
        100,
    ),
    ("PPO: KL, nats per response", lambda r: mean(r, "ppo", "kl"), -1, 15),
    ("DPO: win rate by gold", lambda r: mean(r, "dpo", "gold_win_rate"), 0.60, 1),
    (
        "DPO: points of share correct above SFT",
        lambda r: 100 * (mean(r, "dpo", "correct") - mean(r, "sft", "correct")),
        0,
        100,
    ),
    ("DPO: KL, nats per response", lambda r: mean(r, "dpo", "kl"), -1, 25),
    (
        "RLOO: gold reward, its lower end above SFT's upper end",
        lambda r: lo(r, "rloo", "gold_reward") - hi(r, "sft", "gold_reward"),
        0,
        100,
    ),
    ("RLOO: win rate by gold", lambda r: mean(r, "rloo", "gold_win_rate"), 0.65, 1),
    ("RLOO: KL, nats per response", lambda r: mean(r, "rloo", "kl"), -1, 15),
]


def main(files: list[str]) -> int:
    runs = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    print(f"{'promise':<56}{'range':>14}" + "".join(f"  seed {run['seed']:<5}" for run in runs))
    broken = 0
    for promise, figure, low, high in PROMISES:
        found = [figure(run) for run in runs]
        kept = [low <= value <= high for value in found]
        broken += len(kept) - sum(kept)
        cells = "".join(
            f"{value:>10.3f}{' ' if ok else '!'} " for value, ok in zip(found, kept, strict=True)
        )
        print(f"{promise:<56}{f'{low:g}..{high:g}':>14}{cells}")
    print(f"{broken} of {len(PROMISES) * len(runs)} promises broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
