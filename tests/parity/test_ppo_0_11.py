"""Whole runs of ``PPOTrainer.step`` of trl 0.11.3, as recorded, against `ppo.train` as it is.

What is supplied to ours: weights, token ids, scores, the order of the rows in each epoch, and that
only the first gradient is clipped. `ppo.train` does the rest: it scores the given rows, judges,
learns, reports and steers the KL.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from compare import options
from compare.ours import ppo_conventions as conventions
from compare.ours.ppo import FollowingOptimizer, Setup
from recordings import VERSION, Recording, load
from small import StubTokenizer
from tolerances import FP64, LEGACY_STEP
from torch import Tensor
from trainer_harness import SHIMMED, Parity, largest, largest_gap, weights
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_min import online, ppo
from rlhf_min.data import PromptExample
from rlhf_min.optim import Optimizer
from rlhf_min.policy import Policy
from rlhf_min.rollout import Rollout, RolloutBuffer, score_rollout

RECORDED = Recording("ppo_step")
RUNS: dict[str, dict[str, Any]] = RECORDED.facts["runs"]
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
    run = RUNS[name]
    return ppo.PPOConfig(
        **options.in_our_words("ppo", run["config"], total_steps=len(run["calls"])),
        adam_eps=1e-8,
        max_new_tokens=1,  # not used: the responses are those of trl
        max_tokens=25,  # two micro-batches or more in each minibatch; trl's are other ones
    )


class TrlOptimizer(FollowingOptimizer):
    """Clips as trl, and remembers the norms."""

    def __init__(self, plain: Optimizer, setup: Setup) -> None:
        super().__init__(plain, setup)
        self.norms: list[float] = []

    def step(self, batch: Any = None, metrics: Any = None) -> float:
        self.norms.append(super().step(batch, metrics))
        return self.norms[-1]


@dataclass
class Replay:
    """A policy trained by `ppo.train`; of each step the statistics under trl's names, and the KL
    coefficient that it leads to."""

    policy: Policy
    optimizer: TrlOptimizer
    stats: list[Stats] = field(default_factory=list)
    kl_coefs: list[float] = field(default_factory=list)


def replay(name: str, *, by_micro_batch: bool = False, **own: Any) -> Replay:
    """`ppo.train` on what a recorded run was given, in its order.

    Args:
        by_micro_batch: each of trl's micro-batches has the same weight.
        own: other options.
    """
    run = RUNS[name]
    config = replace(config_of(name), **own)
    if by_micro_batch:
        config = replace(config, minibatch_size=run["config"]["mini_batch_size"])
    setup = Setup(
        config,
        [],
        accumulated=run["config"]["gradient_accumulation_steps"],
        micro_batch_means=by_micro_batch,
        only_first_clipped=True,
    )
    policy, ref_policy = policy_of("policy"), policy_of("ref_policy")
    state = ppo.new_state(policy, [PromptExample("", torch.tensor([0]))], config)
    replayed = Replay(policy, TrlOptimizer(state.optimizer, setup))
    state.optimizer = replayed.optimizer
    orders: list[list[int]] = []
    buffers: list[RolloutBuffer] = []
    watched: list[dict[str, float]] = []
    learn = ppo.ppo_epoch

    def given(*_: Any, **__: Any) -> Rollout:
        orders[:] = run["calls"][state.step]["orders"]
        watched.clear()
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
        buffers[:] = [buffer]
        size = run["config"]["mini_batch_size"]
        with watching(watched, size):
            return learn(policy, optimizer, buffer, torch.tensor(orders.pop(0)), config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "collect", given)
        patch.setattr(ppo, "ppo_epoch", in_their_order)
        for metrics in ppo.train(policy, ref_policy, lambda *_: [], config, state):
            assert not orders  # as many epochs as trl made
            of = ("PPOTrainer.step", setup, buffers[0], metrics, watched)
            replayed.stats.append(conventions.trl_metrics(*of))
            replayed.kl_coefs.append(state.kl_control.coef)
    return replayed


@contextmanager
def watching(into: list[dict[str, float]], size: int) -> Iterator[None]:
    """Inside, what trl averages is gathered from each step: parts of so many rows."""
    step = ppo.minibatch_step

    def minibatch_step(
        policy: Policy, optimizer: Any, buffer: RolloutBuffer, rows: Sequence[int], config: Any
    ) -> Stats:
        with conventions.watched(policy, buffer.rollout, rows, config) as learned:
            stats = step(policy, optimizer, buffer, rows, config)
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            of_part = conventions.Learned(*(x[part] for x in vars(learned).values()))
            into.append(conventions.over_tokens(buffer, rows[part], of_part))
        return stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "minibatch_step", minibatch_step)
        yield


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
    agree(name, replay(name, by_micro_batch=True), parity)
    # Without it the weights differ by more than a step of Adam, whose length is the rate.
    assert largest_gap(weights(replay(name).policy), weights_of(name)) > told["learning_rate"]
