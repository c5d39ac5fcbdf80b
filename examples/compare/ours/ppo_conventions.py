"""What trl's two PPOs compute differently, done with our tensors.

Of 1.12, with its *score cell*: behind the tokens of a response, where there is room, is one more
cell, which has the score and a value. It is trained on by the value loss and not by the policy's.
Here such a row is longer by one token, whose log-probability is marked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, tensor
from torch.nn.functional import pad

from rlhf_min import ppo
from rlhf_min.advantages import gae
from rlhf_min.config import PPOConfig
from rlhf_min.data import micro_batches
from rlhf_min.logprobs import entropy, lm_head_logits
from rlhf_min.masking import masked_mean, masked_var, masked_whiten, response_mask
from rlhf_min.policy import Policy, PolicyOutput, evaluating
from rlhf_min.rollout import Rollout, RolloutBuffer

MARK = 1.0  # in the place of a log-probability, which is never above 0
Metrics = dict[str, float]


# The score cell


def before(ids: Tensor, pad_id: int) -> Tensor:
    """The tokens before the first padding, as trl of 1.12 finds it: by its id. ``(T,)``."""
    found = (ids == pad_id).nonzero()
    return ids[: int(found[0])] if len(found) else ids


def with_score_cell(tokens: Sequence[Tensor], *, filler: int) -> list[Tensor]:
    """One id more for each row that is shorter than the longest cell of the batch."""
    width = max(len(ids) for ids in tokens)
    return [torch.cat([ids, tensor([filler])]) if len(ids) < width else ids for ids in tokens]


def marked(rollout: Rollout, tokens: Sequence[Tensor]) -> Rollout:
    """A rollout of rows with score cells, in which these have no log-probability, KL or entropy."""
    width = rollout.mask.shape[1]
    lengths = tensor([len(ids) for ids in tokens]).to(rollout.mask.device)
    cell = rollout.mask & ~response_mask(lengths, width)
    return replace(
        rollout,
        logprobs=rollout.logprobs.masked_fill(cell, MARK),
        ref_logprobs=rollout.ref_logprobs.masked_fill(cell, MARK),
        kl=rollout.kl.masked_fill(cell, 0.0),
        entropy=rollout.entropy.masked_fill(cell, 0.0),
    )


def tokens_of(rollout: Rollout) -> Tensor:
    """The mask without score cells. Shape ``(B, T)``."""
    return rollout.mask & (rollout.logprobs != MARK)


def judge_marked(rollout: Rollout, config: PPOConfig, *, kl_coef: float) -> RolloutBuffer:
    """`judge`, but that score cells, if there are any, take no part in whitening advantages."""
    if bool((tokens_of(rollout) == rollout.mask).all()):
        return ppo.judge(rollout, config, kl_coef=kl_coef)
    judged = ppo.judge(rollout, replace(config, whiten_advantages=False), kl_coef=kl_coef)
    if not config.whiten_advantages:
        return judged
    return replace(judged, advantages=masked_whiten(judged.advantages, tokens_of(rollout)))


@contextmanager
def policy_loss_over_tokens(buffer: RolloutBuffer, rows: Sequence[int]) -> Iterator[None]:
    """Inside, a step on these rows leaves score cells out of the policy's loss and of the entropy.

    It weighs means over cells by the share of the cells; those over tokens are scaled for that.
    """
    cells = int(buffer.rollout.mask[rows].sum())
    tokens = int(tokens_of(buffer.rollout)[rows].sum())
    policy_loss, mean = ppo.ppo_policy_loss, ppo.masked_mean
    kept: list[Tensor] = []

    def over_tokens(
        new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, clip: float
    ) -> Any:
        kept[:] = [mask & (old != MARK)]
        found = policy_loss(new, old, advantages, kept[0], clip=clip)
        means = ("loss", "clip_fraction", "k1", "k3", "ratio")
        scaled = {name: getattr(found, name) * scale(mask) for name in means}
        return found._replace(**scaled, count=mask.sum())

    def entropy_of_tokens(x: Tensor, mask: Tensor) -> Tensor:
        return mean(x, kept[0]) * scale(mask)

    def scale(mask: Tensor) -> float:
        return (int(kept[0].sum()) / tokens) / (int(mask.sum()) / cells)

    with (
        patch.object(ppo, "ppo_policy_loss", over_tokens),
        patch.object(ppo, "masked_mean", entropy_of_tokens),
    ):
        yield


# The padding of 0.11, which whitened rewards leak from


def judge_leaking(rollout: Rollout, config: PPOConfig, *, kl_coef: float) -> RolloutBuffer:
    """`judge` with rewards that are whitened in the padding too, where they are 0 before and not
    after, and with advantages that begin there."""
    plain = replace(config, whiten_rewards=False, whiten_advantages=False)
    judged, mask = ppo.judge(rollout, plain, kl_coef=kl_coef), rollout.mask
    totals = rollout.sequences.attention_mask.sum(1)
    reach = rollout.lengths + totals.max() - totals  # to the end of the longest row
    wider = int(reach.max()) - mask.shape[1]
    rewards, values = (pad(x, (0, wider)) for x in (judged.rewards, rollout.values))
    mean, variance = masked_mean(judged.rewards, mask), masked_var(judged.rewards, mask)
    rewards = (rewards - mean) * torch.rsqrt(variance + 1e-8) + mean
    real = response_mask(reach, rewards.shape[1])
    advantages, returns = gae(rewards, values, real, gamma=config.gamma, lam=config.lam)
    rewards, advantages, returns = (
        torch.where(mask, x[:, : mask.shape[1]], 0) for x in (rewards, advantages, returns)
    )
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    return RolloutBuffer(rollout, rewards, advantages, returns)


# Metrics


def report(buffer: RolloutBuffer) -> Metrics:
    """`ppo.report`, in which score cells are no tokens."""
    real = tokens_of(buffer.rollout)
    counts = {
        "response_length": int(real.sum()) / len(real),
        "rollout_entropy": float(masked_mean(buffer.rollout.entropy, real)),
    }
    return ppo.report(buffer) | counts


@dataclass
class Learned:
    """What the policy said of some rows in the step that learned from them, ``(b, T)`` each."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


@contextmanager
def watched(
    policy: Policy, rollout: Rollout, rows: Sequence[int], config: PPOConfig
) -> Iterator[Learned]:
    """Inside, one step on these rows is made, and fills in what is learned from."""
    lengths = rollout.sequences.attention_mask[rows].sum(1).tolist()
    parts = iter(micro_batches(lengths, max_tokens=config.max_tokens))  # as `minibatch_step` does
    learned = Learned(*(torch.zeros_like(rollout.logprobs[rows]) for _ in range(3)))

    def look(_policy: Any, _inputs: Any, output: PolicyOutput) -> None:
        part = next(parts)
        for name, into in vars(learned).items():
            given = getattr(output, name).detach()
            into[part, : given.shape[1]] = given

    handle = policy.register_forward_hook(look)
    try:
        yield learned
    finally:
        handle.remove()


def over_cells(
    rollout: Rollout, rows: Sequence[int], learned: Learned, entropy_behind: Tensor
) -> Metrics:
    """What trl of 1.12 averages for a micro-batch: over all T cells, padding included. Behind the
    tokens the ratio is 1, and its log is 0.

    Args:
        entropy_behind: of `entropy_of_padding`.
    """
    real = tokens_of(rollout)[rows]
    log_ratio = torch.where(real, learned.logprobs - rollout.logprobs[rows], 0)
    return {
        "approxkl": float(log_ratio.square().mean() / 2),
        "ratio": float(log_ratio.exp().mean()),
        "entropy": float(torch.where(real, learned.entropy, entropy_behind).mean()),
    }


def over_tokens(buffer: RolloutBuffer, rows: Sequence[int], learned: Learned) -> Metrics:
    """What trl of 0.11 averages for a minibatch: over its tokens."""
    rollout, mask = buffer.rollout, buffer.rollout.mask[rows]
    returns, values = buffer.returns[rows], rollout.values[rows]
    squared = (learned.logprobs - rollout.logprobs[rows]).square()
    found = {
        "approxkl": masked_mean(squared, mask) / 2,
        "advantages": masked_mean(buffer.advantages[rows], mask),
        "return": masked_mean(returns, mask),
        "return_var": masked_var(returns, mask),
        "value": masked_mean(values, mask),
        "value_var": masked_var(values, mask),
        "new_value": masked_mean(learned.values, mask),
        "error": masked_mean((learned.values - returns).square(), mask),
    }
    return {name: float(value) for name, value in found.items()}


def entropy_of_padding(
    policy: Policy, rollout: Rollout, rows: Sequence[int], config: PPOConfig
) -> Tensor:
    """What the policy says behind the tokens, where trl replaces the padding by id 0 and hides it.
    Shape ``(b, T)``; 0 at tokens.

    The first of these cells is predicted by the last token, all others alike by hidden padding.
    """
    sequences, real = rollout.sequences, tokens_of(rollout)[rows]
    behind = ~real
    entropies = torch.zeros_like(rollout.logprobs[rows])
    if not bool(behind.any()):
        return entropies
    lengths = sequences.prompt_lengths[rows] + real.sum(1)  # (b,)
    attention_mask = response_mask(lengths, int(lengths.max()) + 1).long()  # (b, L)
    ids = pad(sequences.ids[rows], (0, 1))[:, : attention_mask.shape[1]]
    with evaluating(policy):
        hidden = policy.lm.base_model(
            input_ids=ids * attention_mask,
            attention_mask=attention_mask,
            position_ids=attention_mask.cumsum(1) - attention_mask,
            use_cache=False,
        ).last_hidden_state
        at = torch.stack([lengths - 1, lengths], 1)  # (b, 2)
        hidden = hidden[torch.arange(len(at), device=at.device)[:, None], at]
        logits = lm_head_logits(hidden, temperature=config.temperature, **policy.head)
        first, later = entropy(logits).T[:, :, None]
    is_first = response_mask(real.sum(1) + 1, real.shape[1]) & behind
    return torch.where(behind, torch.where(is_first, first, later), entropies)


def trl_metrics(
    trainer: str, setup: Any, buffer: RolloutBuffer, ours: Metrics, watched: Sequence[Metrics]
) -> Metrics:
    """What this trainer of trl logs of a rollout, under its names, all from our numbers.

    Args:
        trainer: as `names.METRICS` calls it.
        setup: of the run.
        ours: our metrics of the rollout.
        watched: of `watch`, one for each micro-batch.
    """
    means = {name: sum(x[name] for x in watched) / len(watched) for name in watched[0]}
    if trainer != "PPOTrainer":
        return _of_step(setup.config, buffer, ours, means)
    empty = round(len(watched) / setup.filled) - len(watched)
    ratios = tensor([x["ratio"] for x in watched] + [0.0] * empty, dtype=torch.float64)
    found = _of_train(setup.config, buffer, ours, means)
    averaged = {name: setup.filled * found[name] for name in AVERAGED}
    return found | averaged | {"val/ratio_var": float(ratios.var())}  # between micro-batches


# Of 1.12, over all micro-batches.
AVERAGED = (
    *("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg"),
    *("policy/approxkl_avg", "policy/entropy_avg", "val/ratio"),
)


def _of_train(config: PPOConfig, buffer: RolloutBuffer, ours: Metrics, means: Metrics) -> Metrics:
    rollout, tokens = buffer.rollout, tokens_of(buffer.rollout)
    score = ours["score"] - config.eos_penalty * (1 - ours["eos_rate"])
    return {
        "objective/kl": ours["kl"],
        "objective/entropy": -_per_response(rollout.logprobs, tokens),  # of what was sampled
        "objective/non_score_reward": -config.kl_coef * ours["kl"],
        "objective/scores": score,
        "objective/rlhf_reward": score - config.kl_coef * ours["kl"],
        "loss/policy_avg": ours["policy_loss"],
        "loss/value_avg": ours["value_loss"],
        "policy/clipfrac_avg": ours["clip_fraction"],
        "val/clipfrac_avg": ours["value_clip_fraction"],
        "policy/approxkl_avg": means["approxkl"],
        "policy/entropy_avg": means["entropy"],
        "val/ratio": means["ratio"],
        "val/num_eos_tokens": ours["eos_rate"] * len(tokens),
        "lr": ours["learning_rate"],
    }


def _of_step(config: PPOConfig, buffer: RolloutBuffer, ours: Metrics, means: Metrics) -> Metrics:
    rollout, tokens = buffer.rollout, tokens_of(buffer.rollout)
    scores = rollout.scores
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    prompts = rollout.sequences.prompt_lengths.double()
    return {
        "objective/kl": ours["kl"],
        "objective/kl_coef": ours["kl_coef"],
        "objective/entropy": -_per_response(rollout.logprobs, tokens),
        "ppo/mean_non_score_reward": -ours["kl_coef"] * float(masked_mean(rollout.kl, tokens)),
        "ppo/mean_scores": float(scores.mean()),
        "ppo/std_scores": float(scores.std()),
        "ppo/learning_rate": ours["learning_rate"],
        "ppo/loss/policy": ours["policy_loss"],
        "ppo/loss/value": ours["value_loss"],
        "ppo/loss/total": ours["policy_loss"] + config.value_coef * ours["value_loss"],
        "ppo/policy/entropy": ours["entropy"],
        "ppo/policy/policykl": ours["update_k1"],
        "ppo/policy/clipfrac": ours["clip_fraction"],
        "ppo/policy/approxkl": means["approxkl"],
        "ppo/policy/advantages_mean": means["advantages"],
        "ppo/returns/mean": means["return"],
        "ppo/returns/var": means["return_var"],
        "ppo/val/mean": means["value"],
        "ppo/val/var": means["value_var"],
        "ppo/val/vpred": means["new_value"],
        "ppo/val/error": means["error"],
        "ppo/val/clipfrac": ours["value_clip_fraction"],
        "ppo/val/var_explained": 1 - means["error"] / means["return_var"],
        "tokens/responses_len_mean": ours["response_length"],
        "tokens/responses_len_std": float(rollout.lengths.double().std()),
        "tokens/queries_len_mean": float(prompts.mean()),
        "tokens/queries_len_std": float(prompts.std()),
    }


def _per_response(x: Tensor, mask: Tensor) -> float:
    return float(torch.where(mask, x, 0).sum(1).mean())
