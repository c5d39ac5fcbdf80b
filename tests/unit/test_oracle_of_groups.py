"""RLOO and GRPO in the world of `test_oracle`: what they do on average, summed over all groups.

`PYTHONPATH=tests python tests/unit/test_oracle_of_groups.py` prints the table of tests/README.md.

A group of G is one of 15^G, with the product of its members' probabilities. At ratio 1 the loss is
linear in the advantages, so that a probability may be a factor of them.
"""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from small import row_logprobs, stacked, weights
from strategies import assert_close
from test_oracle import (
    BETA,
    LENGTHS,
    LONGEST,
    PROMPT,
    RESPONSES,
    REWARDS,
    divergence,
    exact_logprobs,
    exact_objective,
    gradient_of,
    small_gpt2,
    taken,
)
from tolerances import FP64

from rlhf_min import grpo, rloo
from rlhf_min.advantages import grpo_advantages, rloo_advantages
from rlhf_min.config import GRPOConfig, RLOOConfig
from rlhf_min.kl import kl_estimate
from rlhf_min.losses import grpo_loss, rloo_loss
from rlhf_min.optim import Optimizer
from rlhf_min.rollout import score_rollout

README = Path(__file__).parents[1] / "README.md"
SIZE = 4
MASK = torch.arange(LONGEST) < LENGTHS[:, None]
NO_CLIP = {"clip": 0.2, "clip_high": 0.2}  # at ratio 1 none is met


@cache
def world():
    """Policy and reference, with the log-probabilities of all tokens, ``(15, T)``."""
    policy, ref_policy = small_gpt2(0), small_gpt2(1)
    of_policy, of_ref = (
        stacked([taken(row_logprobs(model, PROMPT, y), y) for y in RESPONSES])
        for model in (policy, ref_policy)
    )
    return policy, ref_policy, of_policy, of_ref.detach()


def gradient(loss):
    """By the language model, as one vector; the graph below the log-probabilities is kept."""
    policy = world()[0]
    found = torch.autograd.grad(loss, list(policy.lm.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def all_groups(size):
    """The numbers of the responses of each group, ``(15^G, G)``, and its probability."""
    groups = torch.cartesian_prod(*[torch.arange(len(RESPONSES))] * size)
    logp = world()[2].detach().sum(1)
    return groups, logp[groups].sum(1).exp()


def mean_update(advantages_of, loss_of, rewards, *, size=SIZE):
    """What one group moves the language model by on average, down its loss at rate 1.

    Groups with the same number of tokens go into one loss, since a mean over tokens divides by it.
    """
    groups, p = all_groups(size)
    tokens = LENGTHS[groups].sum(1)
    loss = 0.0
    for n in tokens.unique():
        rows, p_of_groups = groups[tokens == n], p[tokens == n]
        advantages = advantages_of(rewards[rows].flatten(), group_size=size)
        factor = (p_of_groups * len(rows)).repeat_interleave(size)  # the mean divides by the number
        loss = loss + loss_of(rows.flatten(), advantages * factor)
    return -gradient(loss)


def loss_of_rloo(rows, advantages):
    new = world()[2][rows]
    return rloo_loss(new, new.detach(), advantages, MASK[rows], **NO_CLIP).loss


def loss_of_grpo(rows, advantages, *, loss_mean, ratio_level="token", kl_coef=0.0):
    new, ref = (world()[i][rows] for i in (2, 3))
    return grpo_loss(
        *(new, new.detach(), ref, advantages, MASK[rows]),
        **NO_CLIP,
        kl_coef=kl_coef,
        ratio_level=ratio_level,
        loss_mean=loss_mean,
        max_new_tokens=LONGEST,
    ).loss


def update_of_grpo(scale, loss_mean, *, ratio_level="token", size=SIZE):
    return mean_update(
        lambda rewards, group_size: grpo_advantages(rewards, group_size=group_size, scale=scale),
        lambda rows, advantages: loss_of_grpo(
            rows, advantages, loss_mean=loss_mean, ratio_level=ratio_level
        ),
        REWARDS,
        size=size,
    )


# The table


class Estimator(NamedTuple):
    """One line: what is estimated, how, the mean update, and the true gradient."""

    of: str
    name: str
    update: torch.Tensor
    true: torch.Tensor

    def cosine(self):
        return torch.cosine_similarity(self.update, self.true, dim=0).item()

    def length(self):
        """Of the update along the gradient, in gradients."""
        return (self.update @ self.true / (self.true @ self.true)).item()

    def bias(self):
        """What is left beside the gradient if the update is as long along it as it is."""
        rest = self.update / self.length() - self.true
        return (rest.norm() / self.true.norm()).item()

    def cells(self):
        numbers = f"{self.cosine():.4f}", f"{self.bias():.2f}", f"{self.length():.3f}"
        return (self.of, self.name, *numbers)


@cache
def score_estimators():
    """Every way to take the score."""
    made = {
        "RLOO": mean_update(rloo_advantages, loss_of_rloo, REWARDS),
        "Dr. GRPO: `none`, `constant`": update_of_grpo("none", "constant"),
        "`none`, `token`": update_of_grpo("none", "token"),
        "`none`, `sequence`": update_of_grpo("none", "sequence"),
        "`group`, `constant`": update_of_grpo("group", "constant"),
        "DAPO: `group`, `token`": update_of_grpo("group", "token"),
        "GRPO: `group`, `sequence`": update_of_grpo("group", "sequence"),
        "GSPO: the same, ratio of `sequence`": update_of_grpo(
            "group", "sequence", ratio_level="sequence"
        ),
    }
    true = gradient_of_the_score()
    return [Estimator("the score", name, update, true) for name, update in made.items()]


def gradient_of_the_score():
    return gradient((world()[2].sum(1).exp() * REWARDS).sum())


@cache
def kl_estimators():
    """Every way to take the KL; all are descended."""
    _, _, new, ref = world()
    logp, ref_logp = new.sum(1), ref.sum(1)
    p, none = logp.detach().exp(), torch.zeros(1, dtype=torch.float64)
    true = -gradient(divergence(logp, ref_logp))
    k3 = sum(
        p[i] * loss_of_grpo([i], none, loss_mean="constant", kl_coef=1.0)
        for i in range(len(RESPONSES))
    )
    per_token = kl_estimate(new, ref, kind="k3") * (new - new.detach()).exp()
    weighed = (p * torch.where(MASK, per_token, 0).sum(1)).sum()
    made = {
        "k1 in the reward": mean_update(rloo_advantages, loss_of_rloo, -(logp - ref_logp).detach()),
        "k3 in the loss": -gradient(k3),
        "k3 times the ratio, trl's default": -gradient(weighed) / LONGEST,
    }
    return [Estimator("the KL", name, update, true) for name, update in made.items()]


HEAD = ("gradient of", "estimated by", "cosine", "bias", "length")


def table():
    """As Markdown."""
    rows = [e.cells() for e in (*score_estimators(), *kl_estimators())]
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def test_the_readme_has_the_table():
    (told,) = re.findall(r"^\| gradient of .*?(?=^$)", README.read_text("utf-8"), re.M | re.S)
    assert told.rstrip() == table()


# What it says


@pytest.mark.eq("rloo_advantages")
@pytest.mark.eq("rloo")
@pytest.mark.parametrize("size", [2, 3, 4])
def test_rloo_is_the_gradient_of_the_objective(size):
    policy, _, new, ref = world()
    logp, ref_logp = new.sum(1), ref.sum(1)
    true = gradient(exact_objective(logp, ref_logp))
    rewards = REWARDS - BETA * (logp - ref_logp).detach()
    assert_close(mean_update(rloo_advantages, loss_of_rloo, rewards, size=size), true, FP64)
    assert_close(gradient_of(exact_objective(exact_logprobs(policy), ref_logp), policy), true, FP64)


@pytest.mark.eq("grpo_advantages")
@pytest.mark.eq("grpo")
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_mean_that_holds_the_response_itself_shortens_the_gradient(size):
    true = gradient_of_the_score()
    shortened = true * (size - 1) / size / LONGEST
    assert_close(update_of_grpo("none", "constant", size=size), shortened, FP64)


def test_only_the_constant_mean_without_deviation_has_the_gradient_of_the_score():
    found = {e.name: e for e in score_estimators()}
    unbiased = ["RLOO", "Dr. GRPO: `none`, `constant`"]
    for name, e in found.items():
        assert (e.bias() < FP64) == (name in unbiased)
        assert e.cosine() > 0.8
    # Worse than the deviation is a mean over each response: it hides the long ones.
    bias = {name: e.bias() for name, e in found.items()}
    assert 5 * bias["`none`, `token`"] < bias["`none`, `sequence`"]
    assert 5 * bias["`group`, `constant`"] < bias["GRPO: `group`, `sequence`"]
    # The ratio of a sequence differs from that of its tokens only where it has left 1.
    assert_close(
        found["GSPO: the same, ratio of `sequence`"].update,
        found["GRPO: `group`, `sequence`"].update,
        FP64,
    )


def test_only_k1_in_the_reward_has_the_gradient_of_the_kl():
    in_reward, in_loss, weighed = kl_estimators()
    assert in_reward.bias() < FP64
    assert abs(in_reward.length() - 1) < FP64
    assert min(in_loss.bias(), weighed.bias()) > 0.01
    # What k3 in the loss descends is the KL the other way round, at the prefixes of the policy:
    # sum_v pi_v grad (ref_v / pi_v - 1 + log pi_v - log ref_v) = -sum_v ref_v grad log pi_v
    policy, ref_policy, new, _ = world()
    other_way = 0.0
    for response, p in zip(RESPONSES, new.detach().sum(1).exp(), strict=True):
        ours, theirs = (row_logprobs(m, PROMPT, response) for m in (policy, ref_policy))
        other_way = other_way + p * (theirs.detach().exp() * ours).sum()
    assert_close(in_loss.update, gradient_of(other_way, policy) / LONGEST, FP64)


# The same through everything that is between a score and a step


@pytest.mark.parametrize("algorithm", [rloo, grpo], ids=["rloo", "grpo"])
def test_one_step_on_every_pair_is_the_gradient_of_the_objective(algorithm):
    _, ref_policy, new, ref = world()
    options = {
        **{"group_size": 2, "max_new_tokens": LONGEST, "max_tokens": 4000, "kl_coef": BETA},
        **{"batch_size": 450, "minibatch_size": 450},
    }
    config = (
        RLOOConfig(**options)
        if algorithm is rloo
        else GRPOConfig(**options, advantage_scale="none", loss_mean="constant", kl_in="reward")
    )
    groups, p = all_groups(2)
    rows = groups.flatten().tolist()
    policy = small_gpt2(0)
    rollout = score_rollout(
        policy,
        ref_policy,
        [PROMPT] * len(rows),
        [RESPONSES[i] for i in rows],
        REWARDS[rows],
        temperature=1.0,
        kl="k1",
        max_tokens=config.max_tokens,
    )
    buffer = algorithm.judge(rollout, config)
    weighed = buffer.advantages * p.repeat_interleave(2)[:, None] * len(groups)
    before = weights(policy.lm)
    descent = Optimizer(torch.optim.SGD(policy.parameters(), lr=1.0))
    buffer = replace(buffer, advantages=weighed)
    algorithm.minibatch_step(policy, descent, buffer, list(range(len(rows))), config)
    update = torch.cat([(now - before[n]).flatten() for n, now in weights(policy.lm).items()])
    true = gradient(exact_objective(new.sum(1), ref.sum(1)))
    assert_close(update, true if algorithm is rloo else true / 2 / LONGEST, FP64)


if __name__ == "__main__":
    print(table())
