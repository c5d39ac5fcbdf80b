"""PPO as the commands run it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from rlhf_min import ppo
from rlhf_min.harness.report.curves import Curve, Range
from rlhf_min.harness.stages import rollouts

STAGE = "ppo"
TITLE, ROWS = "PPO", "prompts"
CONFIG = ppo.PPOConfig
MEASURED = rollouts.MEASURED
MONITORS = True
WRITES = rollouts.WRITES

trained_before = rollouts.trained_before
checks = rollouts.checks
run = partial(rollouts.run, ppo, STAGE, TITLE)


# What a report shows


def kl_range(config: Mapping[str, Any]) -> Range:
    """Of the KL to the reference: an adaptive coefficient lets it swing around its target."""
    adaptive = config.get("kl_control") == "adaptive"
    return Range(-1, 2 * config["kl_target"]) if adaptive else rollouts.KL


CURVES = rollouts.curves(
    STAGE,
    Curve(
        STAGE,
        "Clipped tokens",
        "share of the update",
        (("clip_fraction", "policy"), ("value_clip_fraction", "value")),
        "A few in a hundred tokens; many mean that an update goes far from the rollout it learns "
        "from.",
        Range(high=0.3),
        "lower --learning_rate or take fewer --epochs",
    ),
    Curve(
        STAGE,
        "Value loss",
        "",
        (("value_loss", "value loss"),),
        "It falls and stays low; rising, it says that the rewards move faster than the values "
        "learn.",
        Range(high=3, of="starts"),
        "lower --learning_rate, or give --normalise_scores",
    ),
    Curve(
        STAGE,
        "Explained variance of the returns",
        "",
        (("explained_variance", "values"),),
        "It climbs from 0 towards 1; clearly below 0 the values are worse than none.",
        Range(low=-0.2),
        "take more --steps or a larger --batch_size",
    ),
    kl=kl_range,
)
headline = partial(rollouts.headline, STAGE, TITLE)
findings = partial(rollouts.findings, STAGE)
