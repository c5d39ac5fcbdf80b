"""Gold reward against KL to the SFT model: PPO, GRPO, RLOO with KL coefficients, DPO with betas.

Figure 2 of the DPO paper (Rafailov et al. 2023, arXiv:2305.18290) in miniature, on the embedded
world, where the true reward is known. All runs start from one SFT model; the reward model learns
from the same pairs as DPO. Both are trained first, unless --model and --reward_model give them.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_min.config import DPOConfig, GRPOConfig, PPOConfig, RLOOConfig
from rlhf_min.harness.cli import OF_LARGE_MODELS, OF_OWN_ROWS, ExperimentOptions, command, parse
from rlhf_min.harness.run.folder import check_out

SHOWN = {"kl": "KL, nats", "score": "score", "gold_reward": "gold reward"}
SHOWN |= {name: name for name in ("correct", "polite", "brief")}

INKS = {"PPO": "Reds", "GRPO": "Purples", "RLOO": "Blues", "DPO": "Greens"}
INSTEAD = {"data": "--data has no true reward; the embedded world has"}


@dataclass(frozen=True)
class FrontierOptions(ExperimentOptions):
    """Options of the frontier."""

    betas: list[float] = field(
        default_factory=lambda: [1.0, 0.3, 0.1], metadata={"help": "Of DPO, a curve for each."}
    )
    grpo_kl_coefs: list[float] = field(
        default_factory=lambda: [0.2],
        metadata={"help": "Of GRPO, with as many responses as PPO, a curve for each."},
    )
    rloo_kl_coefs: list[float] = field(
        default_factory=lambda: [0.1],
        metadata={"help": "Of RLOO, with as many responses as PPO, a curve for each."},
    )


@command
def main() -> None:
    options = parse(
        __doc__, FrontierOptions, without=(*OF_OWN_ROWS, *OF_LARGE_MODELS), instead=INSTEAD
    )
    started = time.perf_counter()
    out = check_out(options, "frontier")
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness import experiments

    runs = {
        **experiments.sampling_runs(options, "PPO", PPOConfig, options.kl_coefs),
        **experiments.sampling_runs(options, "GRPO", GRPOConfig, options.grpo_kl_coefs),
        **experiments.sampling_runs(options, "RLOO", RLOOConfig, options.rloo_kl_coefs),
    }
    for beta in options.betas:
        configs = [DPOConfig(beta=beta, seed=seed) for seed in range(options.seeds)]
        runs[f"DPO, beta {beta:g}"] = configs

    inputs = experiments.load_world(options)
    experiments.prepare(options, out, inputs)
    seconds = {"prepare": time.perf_counter() - started}
    points = experiments.points_of(experiments.run_all(options, out, runs), seed=options.seed)
    seconds["total"] = time.perf_counter() - started

    experiments.save(out, "frontier", draw(points), seconds=seconds, points=points)
    start = [point for point in next(iter(points.values())) if point["step"] == 0]
    print(experiments.table({"SFT": start} | points, SHOWN))
    print(f"at the end of each run: mean of {options.seeds} seeds (lowest-highest)")
    print(f"{seconds['total']:.0f} s; frontier.json, .png and .svg are in {out}")


def draw(points: Mapping[str, Sequence[dict[str, Any]]]) -> Any:
    """A curve for each setting, from the SFT model to the end of its runs."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    from rlhf_min.harness import experiments

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method, colours in INKS.items():
        names = [name for name in points if name.startswith(method)]
        inks = colormaps[colours](np.linspace(0.9, 0.45, len(names)))
        for name, ink in zip(names, inks, strict=True):
            experiments.draw_curve(axes, points[name], "kl", "gold_reward", color=ink, label=name)
    axes.set_title("What the KL buys; bars from the lowest to the highest seed")
    axes.set_xlabel("KL to the SFT model, nats per response")
    axes.set_ylabel("gold reward")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
