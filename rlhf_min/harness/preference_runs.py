"""What `examples/preference_losses.py` runs: one loss after the other, measured on the way."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from rlhf_min import dpo, kto
from rlhf_min.config import DPOConfig, KTOConfig, PPOConfig
from rlhf_min.data import UnpairedExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.harness import experiments
from rlhf_min.harness.inputs import HELDOUT_ROWS, Inputs
from rlhf_min.harness.stages.run_stage import copy_policy
from rlhf_min.loading.reward_function import call_reward
from rlhf_min.policy import Policy
from rlhf_min.rollout import collect

Point = dict[str, float]  # step, and means over held-out pairs; of the last one, of responses too


def run(
    start: Policy, codec: Codec, inputs: Inputs, config: DPOConfig | KTOConfig, options: Any
) -> list[Point]:
    """Train a copy of the policy by one loss, and look at held-out pairs before, now and then.

    A look measures the log-probabilities of both responses, whatever the loss sees of them. After
    the last step the copy answers the test prompts, and they are judged by the true reward.

    Args:
        options: `pairs`, `looks` and `test_prompts` are read.
    """
    policy, ref_policy = copy_policy(start, critic="none"), start.reference()
    pairs = codec.encode_preferences(inputs.pairs[: options.pairs])[0]
    if isinstance(config, KTOConfig):
        rows = [
            UnpairedExample(pair.prompt_ids, ids, label)
            for pair in pairs
            for ids, label in ((pair.chosen_ids, True), (pair.rejected_ids, False))
        ]
        state = kto.new_state(policy, ref_policy, rows, config)
        steps, total = kto.train(policy, ref_policy, config, state), kto.total(state.cursor, config)
    else:
        state = dpo.new_state(policy, ref_policy, pairs, config)
        steps, total = dpo.train(policy, ref_policy, config, state), dpo.total(state.cursor, config)
    heldout = codec.encode_preferences(inputs.heldout_pairs[:HELDOUT_ROWS])[0]

    def look() -> np.ndarray:  # (N, 2), chosen and rejected
        found = dpo.cache_reference(policy, heldout, max_tokens=experiments.LOOK_TOKENS)
        return np.array([pair.ref_logprobs for pair in found])

    before = look()
    points: list[Point] = [_point(0, before, before)]
    at = {round(total * i / options.looks) for i in range(1, options.looks + 1)}
    for step, _ in enumerate(steps, start=1):
        if step in at:
            points.append(_point(step, look(), before))
    points[-1] |= _answers(policy, ref_policy, codec, inputs, options.test_prompts)
    return points


def _point(step: int, now: np.ndarray, before: np.ndarray) -> Point:
    change = now - before
    return {
        "step": step,
        "chosen": float(change[:, 0].mean()),
        "rejected": float(change[:, 1].mean()),
        "ranked": float((change[:, 0] > change[:, 1]).mean()),
    }


def _answers(policy: Policy, ref_policy: Policy, codec: Codec, inputs: Inputs, n: int) -> Point:
    """The mean KL of the responses to test prompts, their true reward and their length."""
    prompts = codec.encode_prompts(inputs.test[:n])[0]
    gold = inputs.monitors["gold_reward"]
    exact = PPOConfig(
        max_new_tokens=codec.max_response_tokens, kl="full", max_tokens=experiments.LOOK_TOKENS
    )
    rng = torch.Generator().manual_seed(0)
    rollout = collect(
        policy, ref_policy, lambda *texts: call_reward(gold, *texts), prompts, exact, rng=rng
    )
    return {
        "kl": float(rollout.kl.sum(1).mean()),
        "gold_reward": float(rollout.scores.double().mean()),
        "tokens": float(rollout.mask.sum(1).double().mean()),
    }


def in_words(name: str, points: Sequence[Point]) -> str:
    """Where a run has come, on one line."""
    last = points[-1]
    return (
        f"{name}: chosen {last['chosen']:+.2f}, rejected {last['rejected']:+.2f} nats, "
        f"{last['ranked']:.1%} ranked right, KL {last['kl']:.2f}, gold {last['gold_reward']:.2f}"
    )


def save(out: Path, points: Mapping[str, Sequence[Point]], seconds: float) -> None:
    """The points of each loss as JSON, after the run's options, and the picture of them."""
    experiments.save(out, "preference_losses", draw(points), seconds=seconds, points=points)


def draw(points: Mapping[str, Sequence[Point]]) -> Figure:
    """A panel for each loss: how both responses have moved, on held-out pairs."""
    columns = min(5, len(points))
    rows = -(-len(points) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (name, course) in zip(panels, points.items(), strict=False):
        steps = [point["step"] for point in course]
        for side, colour in (("chosen", "#0a7558"), ("rejected", "#b6520a")):
            panel.plot(steps, [point[side] for point in course], color=colour, label=side)
        panel.axhline(0, color="#a3a8ae", linewidth=0.8, zorder=0)
        panel.set_title(name, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(points) :]:
        panel.set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    figure.supxlabel("steps", fontsize=10)
    figure.supylabel("change of the log-probability, nats per response", fontsize=10)
    return figure
