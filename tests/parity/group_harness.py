"""Replays what trl 1.16.0 did in GRPO and RLOO, as recorded, by `grpo.train` and `rloo.train`.

What is supplied to ours: weights, token ids, scores, and the order of the rows. The rest is ours:
scoring the given rows, judging, learning, the schedule, and reporting.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from recordings import NEWEST, Recording, load
from small import weights, word_tokenizer
from tolerances import FP64
from torch import Tensor
from trainer_harness import float64, gap, largest_gap
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_min import online
from rlhf_min.config import GroupConfig
from rlhf_min.data import PromptExample
from rlhf_min.policy import Policy
from rlhf_min.rollout import Rollout, RolloutBuffer, score_rollout

Stats = dict[str, float]

MAX_TOKENS = 40
README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
# Of runs in which trl differs, the test that README.md names.
TOLD = {
    "corrected KL": "the_kl_of_trl_is_multiplied_by_the_ratio",
    "dapo, two steps": "dapo_of_trl_divides_by_the_tokens_of_the_rollout",
    "bnpo, two micro-batches": "bnpo_of_trl_depends_on_the_micro_batches",
    "normalised": "advantages_of_trl_may_be_whitened",
}

# Of a rollout, and of an optimizer step: trl's name of each metric of ours.
OF_ROLLOUT = {
    "score": "reward",
    "score_std": "reward_std",
    "response_length": "completions/mean_length",
}
OF_STEP = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate"}


def recording(name: str) -> Recording:
    """What is recorded of trl 1.16.0."""
    return Recording(name, version=NEWEST)


def policy_of(recorded: Recording, model: str, name: str) -> Policy:
    """A policy with recorded weights. GPT-2 has dropout, which both sides switch off."""
    facts = recorded.facts[model]
    lm = (
        GPT2LMHeadModel(GPT2Config(**facts))
        if model == "gpt2"
        else LlamaForCausalLM(LlamaConfig(**facts))
    )
    return load(Policy(lm, word_tokenizer()), weights_of(recorded, f"{model}/{name}"))


def weights_of(recorded: Recording, name: str) -> dict[str, Tensor]:
    """Recorded weights under our names."""
    return {f"lm.{key}": tensor for key, tensor in recorded.under(name).items()}


def shared_options(run: dict[str, Any]) -> dict[str, Any]:
    """What both algorithms are told, in our words."""
    told = run["config"]
    batch_size = told["per_device_train_batch_size"] * told["steps_per_generation"]
    return {
        "steps": run["rollouts"],
        "batch_size": batch_size,
        "minibatch_size": told["per_device_train_batch_size"] * told["gradient_accumulation_steps"],
        "epochs": told["num_iterations"],
        "group_size": told["num_generations"],
        "max_new_tokens": told["max_completion_length"],
        "temperature": told["temperature"],
        "clip": told["epsilon"],
        "clip_high": told.get("epsilon_high"),
        "kl_coef": told["beta"],
        "learning_rate": told["learning_rate"],
        "weight_decay": told["weight_decay"],
        "adam_eps": told["adam_epsilon"],
        "max_grad_norm": told["max_grad_norm"],
        "schedule": "linear",
        "warmup_share": 0.0,
        "max_tokens": MAX_TOKENS,  # several micro-batches in each minibatch; trl's are other ones
    }


@dataclass
class Replay:
    """A policy that was trained as trl's; each rollout's buffer and metrics, each optimizer step's
    numbers, each pass's padded tokens."""

    policy: Policy
    buffers: list[RolloutBuffer] = field(default_factory=list)
    metrics: list[Stats] = field(default_factory=list)
    steps: list[Stats] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)


def replay(
    algorithm: ModuleType,
    recorded: Recording,
    name: str,
    config: GroupConfig,
    *,
    around_step: Callable[..., Stats] | None = None,
) -> Replay:
    """The whole run of this name by our `train`.

    Args:
        algorithm: `grpo` or `rloo`.
        around_step: calls the step that is its first argument, with what follows; for a convention
            of trl's.
    """
    model = recorded.facts["runs"][name]["config"]["model"]
    policy, ref_policy = (policy_of(recorded, model, side) for side in ("policy", "ref_policy"))
    state = algorithm.new_state(policy, [PromptExample("", torch.tensor([2]))], config)
    replayed, step_of_ours, epoch = Replay(policy), algorithm.minibatch_step, online.epoch
    policy.register_forward_pre_hook(lambda _, x: replayed.passes.append(x[0].ids.numel()))
    orders = iter(orders_of(recorded.facts["runs"][name], config))

    def given(*_: Any, **__: Any) -> Rollout:
        rollout = f"{name}/{state.step}"
        return score_rollout(
            *(policy, ref_policy),
            *(recorded.rows(f"{rollout}.prompts"), recorded.rows(f"{rollout}.responses")),
            recorded.tensors[f"{rollout}.scores"],
            temperature=config.temperature,
            kl="k1",
            max_tokens=config.max_tokens,
        )

    def in_their_order(policy: Policy, step: Any, buffer: RolloutBuffer, _: Tensor, **more: Any):
        return epoch(policy, step, buffer, next(orders), **more)

    def noting(*arguments: Any, **options: Any) -> Stats:
        rate = state.optimizer.learning_rate
        step = partial(around_step, step_of_ours) if around_step else step_of_ours
        replayed.steps.append({**step(*arguments, **options), "learning_rate": rate})
        return replayed.steps[-1]

    with (
        float64() if model == "llama" else nullcontext(),  # its rotations are made in float32
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(online, "act", given)
        patch.setattr(online, "epoch", in_their_order)
        patch.setattr(algorithm, "minibatch_step", noting)
        replayed.metrics += algorithm.train(
            *(policy, ref_policy, None, config, state), on_rollout=replayed.buffers.append
        )
    assert next(orders, None) is None
    return replayed


def orders_of(run: dict[str, Any], config: GroupConfig) -> list[Tensor]:
    """Of each pass, the rows in trl's order: its micro-batches one after the other."""
    rows = torch.tensor([row for micro_batch in run["losses"] for row in micro_batch["rows"]])
    assert len(rows) == config.steps * config.epochs * config.batch_size
    return list(rows.view(-1, config.batch_size))


def assert_is_their_run(
    replayed: Replay, recorded: Recording, name: str, parity: Callable[..., None]
) -> None:
    """Advantages, what was logged, and the weights at the end. The run was worth comparing: it
    moved, the ratio has left 1, and the clips of both the ratio and the gradient were met."""
    run = recorded.facts["runs"][name]
    logged = run["steps"]
    assert len(logged) == len(replayed.steps) >= 6
    pairs = list(zip(replayed.metrics, of_rollouts(run), strict=True))
    assert len(pairs) == len(replayed.buffers) == 3
    for i, (ours, theirs) in enumerate(pairs):
        advantages = replayed.buffers[i].advantages[:, 0]
        parity(gap(advantages, recorded.tensors[f"{name}/{i}.advantages"]))
        parity([abs(ours[key] - theirs[known]) for key, known in OF_ROLLOUT.items()])
        parity(abs(1 - ours["eos_rate"] - theirs["completions/clipped_ratio"]))
        if run["config"].get("scale_rewards") != "batch":  # there trl looks at all groups at once
            parity(abs(ours["equal_groups"] - theirs["frac_reward_zero_std"]))
    for ours, theirs in zip(replayed.steps, logged, strict=True):
        parity([abs(ours[key] - theirs[known]) for key, known in OF_STEP.items()])
    parity(weights_gap(replayed, recorded, name))

    start = weights_of(recorded, f"{run['config']['model']}/policy")
    assert largest_gap(weights(replayed.policy), start) > 0.01
    assert any(abs(stats["ratio"] - 1) > FP64 for stats in replayed.steps)
    assert any(stats["clip_fraction"] > 0 for stats in replayed.steps)
    assert 10 < max(replayed.passes) <= MAX_TOKENS
    assert max(stats["grad_norm"] for stats in replayed.steps) > run["config"]["max_grad_norm"]


def of_rollouts(run: dict[str, Any]) -> list[Stats]:
    """Of what trl has logged, the first step of each rollout, which tells of the rollout too."""
    return [entry for entry in run["steps"] if "reward" in entry]


def clips_gap(replayed: Replay, run: dict[str, Any]) -> float:
    """Of the share of clipped ratios, where both take the same mean of it."""
    pairs = zip(replayed.steps, run["steps"], strict=True)
    return max(abs(ours["clip_fraction"] - x["clip_ratio/region_mean"]) for ours, x in pairs)


def weights_gap(replayed: Replay, recorded: Recording, name: str) -> float:
    """The largest difference of any weight at the end of a run."""
    return largest_gap(weights(replayed.policy), weights_of(recorded, f"{name}.trained"))


def assert_differ(
    replayed: Replay, recorded: Recording, name: str, steps: Sequence[int], of: str = "loss"
) -> None:
    """Steps of both sides have the numbers that README.md gives; the weights end up elsewhere."""
    assert weights_gap(replayed, recorded, name) > 1e-3
    (line,) = [line for line in README.splitlines() if f"test_{TOLD[name]}`" in line]
    logged = recorded.facts["runs"][name]["steps"]
    for cell, side in zip(line.split(" | ")[1:3], (replayed.steps, logged), strict=True):
        for step in steps:
            digits = 2 if of == "grad_norm" else 4
            assert f"{side[step][of]:.{digits}f}" in cell


def assert_is_their_loss(
    loss: Tensor, by: Tensor, case: dict[str, Tensor], parity: Callable[..., None]
) -> None:
    """The loss of one case, and its gradient by the log-probabilities, padding included."""
    loss.backward()
    assert by.grad is not None
    parity([abs(loss.item() - float(case["loss"])), gap(by.grad, case["gradient"])])
