"""What trl's two PPOs compute differently, done with our tensors.

Of 1.12, with its *score cell*: behind the tokens of a response, where there is room, is one more
cell, which has the score and a value. It is trained on by the value loss and not by the policy's.
Here such a row is longer by one token, whose log-probability is marked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, tensor
from torch.nn.functional import pad

from rlhf_min import ppo
from rlhf_min.advantages import gae
from rlhf_min.config import PPOConfig
from rlhf_min.data import micro_batches
from rlhf_min.logprobs import entropy, token_logprobs
from rlhf_min.masking import masked_mean, masked_var, masked_whiten, response_mask
from rlhf_min.policy import Policy, evaluating
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
    """`judge`, which only whitens the advantages without score cells."""
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


@torch.no_grad()
def watch(
    trainer: str, policy: Policy, buffer: RolloutBuffer, rows: Sequence[int], config: PPOConfig
) -> Metrics:
    """What this trainer of trl averages for a micro-batch before it learns from it."""
    over = _over_cells if trainer == "PPOTrainer" else _over_tokens
    return {name: float(x) for name, x in over(policy, buffer, rows, config).items()}


def _over_cells(
    policy: Policy, buffer: RolloutBuffer, rows: Sequence[int], config: PPOConfig
) -> dict[str, Tensor]:
    """Of 1.12, over all T cells, padding included.

    Behind a response the ratio is 1, its log is 0, and the entropy is what the model says there of
    a row whose padding trl replaces by id 0 and hides.
    """
    logprobs, entropies = _all_cells(policy, buffer.rollout, rows, config)
    real = tokens_of(buffer.rollout)[rows]
    log_ratio = torch.where(real, logprobs - buffer.rollout.logprobs[rows], 0)
    return {
        "approxkl": log_ratio.square().mean() / 2,
        "ratio": log_ratio.exp().mean(),
        "entropy": entropies.mean(),
    }


def _over_tokens(
    policy: Policy, buffer: RolloutBuffer, rows: Sequence[int], config: PPOConfig
) -> dict[str, Tensor]:
    """Of 0.11, over the tokens of the micro-batch."""
    rollout, mask = buffer.rollout, buffer.rollout.mask[rows]
    returns, values = buffer.returns[rows], rollout.values[rows]
    with evaluating(policy):
        new = policy(rollout.sequences.select(rows), temperature=config.temperature)
    logprobs, new_values = (
        pad(x, (0, mask.shape[1] - x.shape[1])) for x in (new.logprobs, new.values)
    )
    log_ratio = logprobs - rollout.logprobs[rows]
    return {
        "approxkl": masked_mean(log_ratio.square(), mask) / 2,
        "advantages": masked_mean(buffer.advantages[rows], mask),
        "return": masked_mean(returns, mask),
        "return_var": masked_var(returns, mask),
        "value": masked_mean(values, mask),
        "value_var": masked_var(values, mask),
        "new_value": masked_mean(new_values, mask),
        "error": masked_mean((new_values - returns).square(), mask),
    }


def _all_cells(
    policy: Policy, rollout: Rollout, rows: Sequence[int], config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at each of the T cells of each row, ``(b, T)`` each."""
    sequences, real = rollout.sequences, tokens_of(rollout)
    width = real.shape[1]
    prompts = sequences.prompt_lengths
    lengths = (prompts + real.sum(1)).tolist()
    logprobs, entropies = (rollout.logprobs.new_zeros(len(rows), width) for _ in range(2))
    for group in micro_batches([lengths[row] for row in rows], max_tokens=config.max_tokens):
        part = [rows[i] for i in group]
        longest = int(prompts[part].max()) + width
        attention_mask = response_mask(tensor([lengths[row] for row in part]), longest).long()
        attention_mask = attention_mask.to(sequences.ids.device)
        ids = pad(sequences.ids[part], (0, max(0, longest - sequences.ids.shape[1])))[:, :longest]
        with evaluating(policy):
            logits = policy.lm(
                input_ids=ids * attention_mask,
                attention_mask=attention_mask,
                position_ids=attention_mask.cumsum(1) - attention_mask,
                use_cache=False,
            ).logits
        at = prompts[part][:, None] - 1 + torch.arange(width, device=ids.device)  # (b, T)
        logits = logits[torch.arange(len(part))[:, None], at] / config.temperature  # (b, T, V)
        logprobs[group] = token_logprobs(logits, sequences.responses[part])
        entropies[group] = entropy(logits)
    return logprobs, entropies


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
