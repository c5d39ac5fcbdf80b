"""Conventions on which codebases differ without saying so, and a number that each of them decides.

Every number is taken from given inputs, those of the example for a pencil, so that a
convention shows in one number only. To switch a convention, its function is replaced by what others
do, written anew here. CONVENTIONS is also a table of rlhf_min/README.md.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from test_pencil import TABLES
from torch import Tensor

import rlhf_min
from rlhf_min import ppo
from rlhf_min.advantages import gae
from rlhf_min.data import Sequences, collate
from rlhf_min.kl import shape_rewards
from rlhf_min.logprobs import lm_head_logits, token_logprobs
from rlhf_min.losses import pairwise_reward_loss, ppo_policy_loss, ppo_value_loss, sft_loss
from rlhf_min.masking import masked_var, masked_whiten
from rlhf_min.ppo import judge, report
from rlhf_min.rollout import Rollout, RolloutBuffer

HERE = sys.modules[__name__]
LENGTHS = (4, 2)
MASK = torch.tensor([[True] * 4, [True, True, False, False]])
ALL = torch.ones(2, dtype=torch.bool)
SCORES = torch.tensor([1.0, -0.5], dtype=torch.float64)
BEHIND = 0.3  # the value behind the last token of a response that was cut
CONFIG = ppo.PPOConfig(batch_size=2, minibatch_size=1, lam=0.5)


def given(tag: str, name: str) -> Tensor:
    """A row of a table of the example, ``(B, T)``, with 99s in the padding."""
    figures = [float(x) for x in TABLES[tag][name]]
    return torch.tensor([figures[:4], [*figures[4:], 99.0, 99.0]], dtype=torch.float64)


LOGPROBS, NEW_LOGPROBS = given("ppo_policy", "logprobs"), given("ppo_policy", "new_logprobs")
WHITENED, KL = given("ppo_policy", "whitened"), given("shape_rewards", "kl")
REWARDS, ADVANTAGES = given("gae", "rewards"), given("gae", "advantages")
VALUES, NEW_VALUES = given("ppo_value", "values"), given("ppo_value", "new_values")
RETURNS = given("ppo_value", "returns")


def rollout() -> Rollout:
    """What the example's models said."""
    empty = torch.zeros(MASK.shape, dtype=torch.long)
    sequences = Sequences(empty, empty, torch.ones(2), empty, MASK)
    logprobs, ref_logprobs = LOGPROBS, given("kl", "ref_logprobs")
    return Rollout(
        [], [], sequences, SCORES, ALL, logprobs, ref_logprobs, KL, torch.zeros_like(KL), VALUES
    )


def numbers() -> dict[str, float]:
    """The number of each convention, by the functions that training uses."""
    judged = judge(rollout(), CONFIG, kl_coef=0.1)
    responses = [torch.tensor([5, 6, 7, 0]), torch.tensor([8, 0])]  # 0 is EOS and the pad too
    batch = collate([torch.tensor([4])] * 2, responses, pad_id=0)
    ln3 = torch.tensor([[math.log(3)], [0.0]], dtype=torch.float64)
    hidden = torch.ones(1, 1, dtype=torch.float64)
    logits = lm_head_logits(hidden, ln3, bias=None, softcap=None, scale=1.0, temperature=0.5)
    better, worse = torch.tensor([1.0, 0.0]), torch.zeros(2)
    found: dict[str, Any] = {
        "score": shape_rewards(SCORES, 0 * KL, MASK, kl_coef=0.1)[1, 1],
        "kl": shape_rewards(0 * SCORES, KL, MASK, kl_coef=0.1)[0, 0],
        "variance": masked_var(ADVANTAGES, MASK),
        "mean": masked_whiten(ADVANTAGES, MASK)[0, 0],
        "scope": judged.advantages[1, 1],
        "returns": gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.5)[1][0, 0],
        "cut": gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.5)[0][1, 1],
        "average": ppo_policy_loss(NEW_LOGPROBS, LOGPROBS, WHITENED, MASK, clip=0.2).loss,
        "half": ppo_value_loss(NEW_VALUES, VALUES, RETURNS, MASK, clip=0.2).loss,
        "eos": sft_loss(LOGPROBS, batch.mask).loss,
        "temperature": token_logprobs(logits, torch.tensor([0])).exp(),
        "metric": report(judged)["kl"],
        "ties": pairwise_reward_loss(better, worse, margin=None, center_coef=0.0).accuracy,
    }
    return {key: float(number) for key, number in found.items()}


# What others do


def last_column(scores: Tensor, kl: Tensor, _mask: Tensor, *, kl_coef: float) -> Tensor:
    rewards = -kl_coef * kl
    rewards[:, -1] += scores
    return rewards


def behind_eos(scores: Tensor, kl: Tensor, _mask: Tensor, *, kl_coef: float) -> Tensor:
    rewards = -kl_coef * kl
    for row, length in enumerate(LENGTHS):
        rewards[row, min(length, 3)] += scores[row]
    return rewards


def once_on_the_score(scores: Tensor, kl: Tensor, _mask: Tensor, *, kl_coef: float) -> Tensor:
    rewards = torch.zeros_like(kl)
    for row, length in enumerate(LENGTHS):
        rewards[row, length - 1] = scores[row] - kl_coef * kl[row, :length].mean()
    return rewards


def in_the_loss(scores: Tensor, kl: Tensor, mask: Tensor, **_: float) -> Tensor:
    return once_on_the_score(scores, 0 * kl, mask, kl_coef=0.0)


def biased(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].var(correction=0)


def added_back(x: Tensor, mask: Tensor) -> Tensor:
    mean, deviation = x[mask].mean(), x[mask].std()
    return torch.where(mask, (x - mean) / deviation + mean, 0)


def of_minibatch(rollout: Rollout, config: ppo.PPOConfig, *, kl_coef: float) -> RolloutBuffer:
    """Minibatches of one response."""
    plain = ppo.judge(rollout, replace(config, whiten_advantages=False), kl_coef=kl_coef)
    advantages = torch.zeros_like(plain.advantages)
    for row, length in enumerate(LENGTHS):
        own = plain.advantages[row, :length]
        advantages[row, :length] = (own - own.mean()) / own.std()
    return replace(plain, advantages=advantages)


def rewards_to_go(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Undiscounted, as gamma is 1."""
    returns = [
        [float(row[t:length].sum()) if t < length else 0.0 for t in range(4)]
        for row, length in zip(rewards, LENGTHS, strict=True)
    ]
    advantages, _ = rlhf_min.gae(rewards, values, mask, gamma=gamma, lam=lam)
    return advantages, torch.tensor(returns)


def value_behind(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The second response was cut: its last reward is followed by a value."""
    more = torch.zeros_like(rewards)
    more[1, 1] = gamma * BEHIND
    return rlhf_min.gae(rewards + more, values, mask, gamma=gamma, lam=lam)


def of_sequences(
    new: Tensor, old: Tensor, advantages: Tensor, _mask: Tensor, *, clip: float
) -> SimpleNamespace:
    """The mean of the responses' means, which are also those of micro-batches of one response."""
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    means = [-gain[row, :length].mean() for row, length in enumerate(LENGTHS)]
    return SimpleNamespace(loss=sum(means) / len(means))


def whole_square(
    new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, *, clip: float
) -> SimpleNamespace:
    near = old + (new - old).clamp(-clip, clip)
    squares = torch.maximum((new - returns) ** 2, (near - returns) ** 2)
    return SimpleNamespace(loss=squares[mask].mean())


def pads_by_id(prompts: list[Tensor], responses: list[Tensor], *, pad_id: int) -> SimpleNamespace:
    batch = rlhf_min.collate(prompts, responses, pad_id=pad_id)
    return SimpleNamespace(mask=batch.responses != pad_id)


def untempered(hidden: Tensor, weight: Tensor, **_: object) -> Tensor:
    return hidden @ weight.T


def of_tokens(buffer: RolloutBuffer) -> dict[str, float]:
    return {"kl": float(buffer.rollout.kl[MASK].mean())}


def ties_count(chosen: Tensor, rejected: Tensor, **_: object) -> SimpleNamespace:
    return SimpleNamespace(accuracy=(chosen >= rejected).double().mean())


class Elsewhere(NamedTuple):
    """What is done, by whom, as which function, and the number then."""

    what: str
    who: str
    function: Callable[..., Any]
    number: float


class Convention(NamedTuple):
    """What is at stake, what is done here, the number's meaning and value, and the name of the
    function that decides it."""

    title: str
    here: str
    meaning: str
    number: float
    function: str
    elsewhere: tuple[Elsewhere, ...]


# fmt: off
CONVENTIONS = {
    "score": Convention(
        "Where the score lands", "the last real token",
        "reward of the second EOS, KL apart", -0.5, "shape_rewards", (
            Elsewhere("the last column", "lm-human-preferences", last_column, 0.0),
            Elsewhere("the cell after EOS", "trl's PPO since v2, torchtune", behind_eos, 0.0))),
    "kl": Convention(
        "Where the KL is charged", "the reward of each token",
        "reward of the first token, score apart", -0.1, "shape_rewards", (
            Elsewhere("once, its mean, on the score", "rlhf-book", once_on_the_score, 0.0),
            Elsewhere("in the loss", "trl's GRPO", in_the_loss, 0.0))),
    "variance": Convention(
        "Variance in whitening", "unbiased",
        "variance of the advantages", 0.04, "masked_var", (
            Elsewhere("biased", "lm-human-preferences, Spinning Up", biased, 0.0333),)),
    "mean": Convention(
        "Mean of whitened advantages", "removed",
        "first whitened advantage", -1.0, "masked_whiten", (
            Elsewhere("added back", "torchtune", added_back, -0.9),)),
    "scope": Convention(
        "What is whitened together", "the rollout",
        "last whitened advantage", -0.5, "judge", (
            Elsewhere("each minibatch", "lm-human-preferences, CleanRL", of_minibatch, 0.7071),)),
    "returns": Convention(
        "What values learn", "A + V",
        "first return", 0.4, "gae", (
            Elsewhere("rewards to go", "Spinning Up", rewards_to_go, 0.8),)),
    "cut": Convention(
        "After a response that was cut", "nothing",
        "last advantage", 0.0, "gae", (
            Elsewhere(f"the value there, of {BEHIND}", "Spinning Up", value_behind, 0.3),)),
    "average": Convention(
        "What a loss is the mean of", "the tokens of the minibatch",
        "policy loss", 0.0576, "ppo_policy_loss", (
            Elsewhere("the means of micro-batches", "trl's PPO, torchtune", of_sequences, 0.3118),
            Elsewhere("the means of responses", "rlhf-book", of_sequences, 0.3118))),
    "half": Convention(
        "Value loss", "half the squared error",
        "value loss", 0.02, "ppo_value_loss", (
            Elsewhere("the squared error", "Spinning Up", whole_square, 0.04),)),
    "eos": Convention(
        "EOS where it is the pad too", "learned like any token",
        "SFT loss of the responses", 1.25, "collate", (
            Elsewhere("taken for padding", "trl 0.11's SFT", pads_by_id, 1.5),)),
    "temperature": Convention(
        "Temperature of the log-probabilities", "that of sampling",
        "probability of a token of odds 3, sampled at 1/2", 0.9, "lm_head_logits", (
            Elsewhere("always 1", "trl 0.11's PPO", untempered, 0.75),)),
    "metric": Convention(
        "The KL that is reported", "the mean of the responses' sums",
        "the metric `kl`", 1.5, "report", (
            Elsewhere("the mean of all tokens", "trl's GRPO and RLOO", of_tokens, 0.5),)),
    "ties": Convention(
        "Accuracy of a tie", "wrong",
        "accuracy of one pair that is right and one tie", 0.5, "pairwise_reward_loss", (
            Elsewhere("right", "trl 0.11's reward trainer", ties_count, 1.0),)),
}
# fmt: on


def case(key: str, other: Elsewhere) -> str:
    """The id of the test that switches a convention."""
    return f"{key}-{other.function.__name__}"


def rounded(number: float) -> float:
    """As the table has it."""
    return round(number, 4)


def test_the_numbers_here():
    found = {key: rounded(number) for key, number in numbers().items()}
    assert found == {key: convention.number for key, convention in CONVENTIONS.items()}


@pytest.mark.parametrize(
    ("key", "other"),
    [
        pytest.param(key, other, id=case(key, other))
        for key, convention in CONVENTIONS.items()
        for other in convention.elsewhere
    ],
)
def test_switching_one_changes_one_number(key, other, monkeypatch):
    before = numbers()
    monkeypatch.setattr(HERE, CONVENTIONS[key].function, other.function)
    after = numbers()
    assert [k for k in before if after[k] != before[k]] == [key]
    assert rounded(after[key]) == other.number
