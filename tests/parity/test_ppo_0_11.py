"""Whole runs of ``PPOTrainer.step`` of trl 0.11.3, as recorded, against `ppo.train` as it is.

What is supplied to ours: weights, token ids, scores, the order of the rows in each epoch, and trl's
optimizer. `ppo.train` does the rest: scores the given rows, judges, learns, reports, steers the KL.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from recordings import VERSION, Recording, load
from small import StubTokenizer
from tolerances import FP64, LEGACY_STEP
from torch import Tensor, nn
from trainer_harness import SHIMMED, Parity, largest, largest_gap, weights
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_min import ppo
from rlhf_min.data import PromptExample, Sequences
from rlhf_min.kl import kl_estimate
from rlhf_min.masking import masked_mean, masked_var
from rlhf_min.optim import Optimizer
from rlhf_min.policy import Policy, PolicyOutput
from rlhf_min.rollout import Rollout, RolloutBuffer, score_rollout

RECORDED = Recording("ppo_step")
RUNS: dict[str, dict[str, Any]] = RECORDED.facts["runs"]
KL_KINDS = {"kl": "k1", "abs": "abs", "mse": "k2", "full": "full"}
# trl's statistics that are metrics of ours.
SAME = {
    "objective/kl": "kl",
    "objective/kl_coef": "kl_coef",
    "ppo/learning_rate": "learning_rate",
    "ppo/loss/policy": "policy_loss",
    "ppo/loss/value": "value_loss",
    "ppo/policy/clipfrac": "clip_fraction",
    "ppo/policy/entropy": "entropy",
    "ppo/policy/policykl": "update_k1",
    "ppo/val/clipfrac": "value_clip_fraction",
    "tokens/responses_len_mean": "response_length",
}
RAGGED = "ragged accumulation"
CONVENTIONS = {
    "early stop": ["one minibatch in an epoch"],
    "gradient clip": ["only the first step is clipped"],
    "whitened rewards": ["rows of equal length"],
    "accumulation": ["responses of equal length"],
    RAGGED: ["mean of micro-batch means"],
}

Stats = dict[str, float]


def weights_of(name: str) -> dict[str, Tensor]:
    """Recorded weights under our names."""
    return {
        key.replace("pretrained_model.", "lm.").replace("v_head.summary.", "value_head."): tensor
        for key, tensor in RECORDED.under(name).items()
    }


def policy_of(name: str) -> Policy:
    """A recorded language model with its value head."""
    config = GPT2Config(**RECORDED.facts["model"])
    tokenizer = StubTokenizer(config.eos_token_id, config.pad_token_id)
    policy = Policy(GPT2LMHeadModel(config), tokenizer, critic="shared")
    return load(policy, weights_of(name))


def config_of(name: str) -> ppo.PPOConfig:
    """trl's options of a run as ours."""
    told = RUNS[name]["config"]
    return ppo.PPOConfig(
        steps=len(RUNS[name]["calls"]),
        batch_size=told["batch_size"],
        max_new_tokens=1,  # not used: the responses are those of trl
        minibatch_size=told["backward_batch_size"],
        epochs=told["ppo_epochs"],
        gamma=told["gamma"],
        lam=told["lam"],
        clip=told["cliprange"],
        value_clip=told["cliprange_value"],
        value_coef=told["vf_coef"],
        kl=KL_KINDS[told["kl_penalty"]],
        kl_coef=told["init_kl_coef"],
        kl_control="adaptive" if told["adap_kl_ctrl"] else "fixed",
        kl_target=told["target"],
        kl_horizon=told["horizon"],
        whiten_rewards=told["whiten_rewards"],
        score_clip=told["score_clip"],
        stop_kl=1.5 * told["target_kl"] if told["early_stopping"] else None,
        max_tokens=25,  # two micro-batches or more in each minibatch; trl's are other ones
    )


class TrlOptimizer(Optimizer):
    """Adam as trl makes it, which clips the first gradient only: it hands over an iterator of the
    parameters, which has run out by the second step."""

    def __init__(self, policy: Policy, told: dict[str, Any]) -> None:
        adam = torch.optim.Adam(policy.parameters(), lr=told["learning_rate"])
        super().__init__(adam, max_grad_norm=told["max_grad_norm"])
        self.norms: list[float] = []

    def step(self, batch: Any = None, metrics: Any = None) -> float:
        self.norms.append(super().step(batch, metrics))
        self.max_grad_norm = None
        return self.norms[-1]


class Accumulating(TrlOptimizer):
    """Takes each minibatch for a micro-batch, as trl: a step after every few, by their mean."""

    def __init__(self, policy: Policy, told: dict[str, Any]) -> None:
        super().__init__(policy, told)
        self.parts, self.seen = told["gradient_accumulation_steps"], 0

    def backward(self, loss: Tensor) -> None:
        super().backward(loss / self.parts)

    def step(self, batch: Any = None, metrics: Any = None) -> float:
        self.seen += 1
        return super().step(batch, metrics) if self.seen % self.parts == 0 else 0.0


@dataclass
class Epoch:
    """What `ppo_epoch` was given, and what the policy said of each row, ``(B, T)``, before the step
    that the row was used for."""

    buffer: RolloutBuffer
    order: Tensor
    new_logprobs: Tensor
    new_values: Tensor


@dataclass
class Replay:
    """A policy trained by `ppo.train`; of each step the statistics under trl's names, and the KL
    coefficient that it leads to."""

    policy: Policy
    optimizer: TrlOptimizer
    stats: list[Stats] = field(default_factory=list)
    kl_coefs: list[float] = field(default_factory=list)


def replay(name: str, *, make_optimizer: type[TrlOptimizer] = TrlOptimizer, **own: Any) -> Replay:
    """`ppo.train` on what a recorded run was given, in its order; `own` are other options."""
    run = RUNS[name]
    config = replace(config_of(name), **own)
    policy, ref_policy = policy_of("policy"), policy_of("ref_policy")
    state = ppo.new_state(policy, [PromptExample("", torch.tensor([0]))], config)
    replayed = Replay(policy, make_optimizer(policy, run["config"]))
    state.optimizer = replayed.optimizer
    orders: list[list[int]] = []
    epochs: list[Epoch] = []
    learn = ppo.ppo_epoch

    def given(*_: Any, **__: Any) -> Rollout:
        orders[:] = run["calls"][state.step]["orders"]
        epochs.clear()
        rows = f"{run['rows']}.{state.step}"
        return score_rollout(
            *(policy, ref_policy),
            *(RECORDED.rows(f"{rows}.prompts"), RECORDED.rows(f"{rows}.responses")),
            RECORDED.tensors[f"{rows}.scores"],
            temperature=config.temperature,
            kl=config.kl,
            max_tokens=config.max_tokens,
        )

    def in_their_order(
        policy: Policy, optimizer: Any, buffer: RolloutBuffer, _: Tensor, config: ppo.PPOConfig
    ) -> Stats:
        order = torch.tensor(orders.pop(0))
        with watched(policy, buffer.rollout) as (new_logprobs, new_values):
            stats = learn(policy, optimizer, buffer, order, config)
        epochs.append(Epoch(buffer, order, new_logprobs, new_values))
        return stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "collect", given)
        patch.setattr(ppo, "ppo_epoch", in_their_order)
        for metrics in ppo.train(policy, ref_policy, lambda *_: [], config, state):
            assert not orders  # as many epochs as trl made
            replayed.stats.append(trl_stats(metrics, epochs, run["config"]))
            replayed.kl_coefs.append(state.kl_control.coef)
    return replayed


@contextmanager
def watched(policy: Policy, rollout: Rollout) -> Iterator[tuple[Tensor, Tensor]]:
    """Fills in what the policy says of each row while it learns. ``(B, T)`` each."""
    new_logprobs, new_values = (torch.zeros_like(rollout.logprobs) for _ in range(2))
    row_of = {ids: row for row, ids in enumerate(real_ids(rollout.sequences))}
    assert len(row_of) == len(rollout.sequences)

    def look(_policy: nn.Module, inputs: tuple[Sequences], output: PolicyOutput) -> None:
        rows, width = [row_of[ids] for ids in real_ids(inputs[0])], output.logprobs.shape[1]
        new_logprobs[rows, :width] = output.logprobs.detach()
        new_values[rows, :width] = output.values.detach()

    handle = policy.register_forward_hook(look)
    try:
        yield new_logprobs, new_values
    finally:
        handle.remove()


def real_ids(sequences: Sequences) -> list[tuple[int, ...]]:
    pairs = zip(sequences.ids, sequences.attention_mask.bool(), strict=True)
    return [tuple(ids[real].tolist()) for ids, real in pairs]


def trl_stats(ours: Stats, epochs: list[Epoch], told: dict[str, Any]) -> Stats:
    """Our metrics where trl measures the same; the others from our tensors."""
    buffer = epochs[0].buffer
    rollout, mask = buffer.rollout, buffer.rollout.mask
    scores = rollout.scores
    if told["score_clip"] is not None:
        scores = scores.clamp(-told["score_clip"], told["score_clip"])  # trl tells of clipped ones
    minibatches = []
    for epoch in epochs:
        for rows in epoch.order.split(told["mini_batch_size"]):
            real, returns, values = mask[rows], buffer.returns[rows], rollout.values[rows]
            new_values = epoch.new_values[rows]
            k2 = kl_estimate(epoch.new_logprobs[rows], rollout.logprobs[rows], kind="k2")
            minibatches.append(
                {
                    "ppo/policy/advantages_mean": masked_mean(buffer.advantages[rows], real),
                    "ppo/policy/approxkl": masked_mean(k2, real),
                    "ppo/returns/mean": masked_mean(returns, real),
                    "ppo/returns/var": masked_var(returns, real),
                    "ppo/val/mean": masked_mean(values, real),
                    "ppo/val/var": masked_var(values, real),
                    "ppo/val/vpred": masked_mean(new_values, real),
                    "ppo/val/error": masked_mean((new_values - returns).square(), real),
                }
            )
    stats = {
        name: float(torch.stack([minibatch[name] for minibatch in minibatches]).mean())
        for name in minibatches[0]
    }
    prompt_lengths = rollout.sequences.prompt_lengths.double()
    return {
        **{name: ours[our_name] for name, our_name in SAME.items()},
        **stats,
        "objective/entropy": -float(rollout.logprobs.sum(1).mean()),  # of what was sampled
        "ppo/mean_non_score_reward": -ours["kl_coef"] * float(masked_mean(rollout.kl, mask)),
        "ppo/mean_scores": float(scores.mean()),
        "ppo/std_scores": float(scores.std()),
        "ppo/loss/total": ours["policy_loss"] + told["vf_coef"] * ours["value_loss"],
        "ppo/val/var_explained": 1 - stats["ppo/val/error"] / stats["ppo/returns/var"],
        "tokens/queries_len_mean": float(prompt_lengths.mean()),
        "tokens/queries_len_std": float(prompt_lengths.std()),
        "tokens/responses_len_std": float(rollout.lengths.double().std()),
    }


def stats_gap(ours: Stats, theirs: Stats) -> float:
    assert ours.keys() == theirs.keys()
    return largest(abs(ours[name] - theirs[name]) for name in ours)


def compared(name: str) -> Any:
    """A run as a parameter, with what is told of its two comparisons."""
    conventions = CONVENTIONS.get(name, [])
    told = {"cases": len(RUNS[name]["calls"]), "of": "calls", "dtype": SHIMMED}
    return pytest.param(
        name,
        marks=[
            pytest.mark.parity(
                *("ppo.train", "PPOTrainer.step", VERSION),
                **told,
                convention="; ".join(conventions),
            ),
            pytest.mark.parity(
                *("report, ppo_update", "PPOTrainer.step", VERSION),
                **told,
                convention="some statistics recomputed",
            ),
        ],
    )


def agree(name: str, ours: Replay, parity: Parity) -> None:
    """The statistics of each call, and the weights after the last."""
    for stats, kl_coef, call in zip(ours.stats, ours.kl_coefs, RUNS[name]["calls"], strict=True):
        parity(stats_gap(stats, call["stats"]), "report, ppo_update")
        parity(abs(kl_coef - call["next_kl_coef"]), "report, ppo_update")
    found, expected = weights(ours.policy), weights_of(name)
    parity(largest_gap(found, expected), "ppo.train", tolerance=LEGACY_STEP)
    assert largest_gap(without_key_biases(found), without_key_biases(expected)) <= FP64


def without_key_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their gradient is 0 but for rounding, which Adam divides by 1e-8."""
    return {
        name: torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) if name.endswith("attn.c_attn.bias") else x
        for name, x in weights.items()
    }


@pytest.mark.eq("ppo_policy")
@pytest.mark.eq("ppo_value")
@pytest.mark.eq("adaptive_kl")
@pytest.mark.parametrize("name", [compared(name) for name in RUNS if name != RAGGED])
def test_a_run_ends_at_the_weights_and_statistics_of_trl(name: str, parity: Parity) -> None:
    ours = replay(name)
    agree(name, ours, parity)

    # The run was worth comparing: it moved, both losses met their clips, its option mattered.
    calls, told = RUNS[name]["calls"], RUNS[name]["config"]
    assert largest_gap(weights_of(name), weights_of("policy")) > 0.01
    assert max(call["stats"]["ppo/policy/clipfrac"] for call in calls) > 0.01
    assert max(call["stats"]["ppo/val/clipfrac"] for call in calls) > 0.01
    if RUNS[name]["rows"] == RUNS["kl"]["rows"] and name != "kl":
        assert largest_gap(weights_of(name), weights_of("kl")) > 1e-4
    if name == "adaptive KL":
        coefs = [told["init_kl_coef"], *ours.kl_coefs]
        changes = [new / old - 1 for old, new in pairwise(coefs)]
        most = 0.2 * told["batch_size"] / told["horizon"]
        assert max(changes) == pytest.approx(most)  # the largest allowed
        assert -most < min(changes) < -0.01
    if name == "early stop":
        epochs = [len(call["orders"]) for call in calls]
        assert min(epochs) < max(epochs) == told["ppo_epochs"]
    if name == "gradient clip":
        assert ours.optimizer.norms[0] > 2 * told["max_grad_norm"]
        assert max(ours.optimizer.norms[1:]) > 2 * told["max_grad_norm"]  # which stays so long
    if name == "whitened rewards":
        plain = replay(name, whiten_rewards=False)
        assert largest_gap(weights(plain.policy), weights_of(name)) > 1e-4


@pytest.mark.eq("ppo_policy")
@pytest.mark.eq("ppo_value")
@pytest.mark.parametrize("name", [compared(RAGGED)])
def test_ragged_micro_batches_weigh_the_same_in_trl(name: str, parity: Parity) -> None:
    # trl takes the mean of the micro-batches' means over tokens, we take that over all tokens. With
    # trl's convention put into the optimizer our functions come to trl's weights.
    told = RUNS[name]["config"]
    agree(
        name,
        replay(name, make_optimizer=Accumulating, minibatch_size=told["mini_batch_size"]),
        parity,
    )
    # Without it the weights differ by more than a step of Adam, whose length is the rate.
    assert largest_gap(weights(replay(name).policy), weights_of(name)) > told["learning_rate"]
