"""Does the gold reward turn down while the score climbs? PPO against a reward model of few pairs.

After Gao, Schulman and Hilton 2022, arXiv:2210.10760, on the embedded world, where the true reward
is known: PPO without and with a KL penalty, and best-of-n, against a reward model that has seen few
preference pairs. A --model or --reward_model that is not given is trained first.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_min.config import PPOConfig, option
from rlhf_min.harness.cli import OF_LARGE_MODELS, OF_OWN_ROWS, ExperimentOptions, command, parse
from rlhf_min.harness.run.folder import check_out

SHOWN = {"kl": "KL, nats", "score": "score", "gold_reward": "gold reward"}
TICKS = (0, 0.5, 2, 5, 10, 20, 40, 70, 100, 150, 200, 300)  # nats
UNUSED = (*OF_OWN_ROWS, *OF_LARGE_MODELS)
INSTEAD = {"data": "--data has no true reward; the embedded world has"}


@dataclass(frozen=True)
class OveroptimizationOptions(ExperimentOptions):
    """Options of the experiment."""

    pairs: int | None = option(300, "Preference pairs that the reward model learns from.", above=0)
    label_noise: float = option(
        0.0, "Share of their labels that is turned round.", at_least=0, at_most=1
    )
    kl_coefs: list[float] = field(
        default_factory=lambda: [0.0, 0.1], metadata={"help": "Of PPO, a curve for each."}
    )
    learning_rate: float = option(1e-4, "PPO's; low, to see what happens on the way.", above=0)
    looks: int = option(12, "How often each run is measured, the last time at its end.", above=0)
    samples: int = option(
        64, "Responses to each prompt, for the best of up to half as many.", at_least=2
    )


@command
def main() -> None:
    options = parse(__doc__, OveroptimizationOptions, without=UNUSED, instead=INSTEAD)
    started = time.perf_counter()
    out, rng = check_out(options, "overoptimization"), random.Random(options.seed)
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness import experiments

    runs = experiments.sampling_runs(
        options, "PPO", PPOConfig, options.kl_coefs, learning_rate=options.learning_rate
    )
    inputs = experiments.load_world(options)
    for pair in inputs.pairs:
        if rng.random() < options.label_noise:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    models = experiments.prepare(options, out, inputs)
    best = experiments.best_of_n(*models, inputs, options, samples=options.samples)
    seconds = {"prepare": time.perf_counter() - started}
    found = experiments.run_all(options, out, runs) | {"best of n": [best]}
    points = experiments.points_of(found, seed=options.seed)
    verdicts = {name: experiments.verdict(x, seed=options.seed) for name, x in found.items()}
    told = "\n".join(f"{name}: {verdict}" for name, verdict in verdicts.items())
    seconds["total"] = time.perf_counter() - started

    figure = draw(points, told)
    experiments.save(
        out, "overoptimization", figure, seconds=seconds, verdicts=verdicts, points=points
    )
    print(experiments.table(points, SHOWN))
    by_n = {f"best of {point['step']}": [point] for point in points["best of n"]}
    print(experiments.table(by_n, {"kl_bound": "KL at most"} | SHOWN))
    print(told)
    print(f"{seconds['total']:.0f} s; overoptimization.json, .png and .svg are in {out}")


def draw(points: Mapping[str, Sequence[dict[str, Any]]], title: str) -> Any:
    """Score and gold reward against the square root of the KL."""
    import numpy as np
    from matplotlib.figure import Figure

    from rlhf_min.harness import experiments

    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, y in zip(figure.subplots(1, 2), ("score", "gold_reward"), strict=True):
        for name, group in points.items():
            experiments.draw_curve(axes, group, "kl", y, label=name)
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes.set_xlim(left=0)
        axes.set_xticks([x for x in TICKS if x <= axes.get_xlim()[1]])
        axes.set_ylabel(SHOWN[y])
        axes.set_xlabel("KL to the SFT model, nats per response")
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


if __name__ == "__main__":
    main()
