"""A rollout token by token: what everyone believed of each, and what the update made of it."""

import math
from collections.abc import Sequence
from typing import Any

from rlhf_min.loading.reward_function import RewardFunction, call_reward
from rlhf_min.policy import Policy, evaluating
from rlhf_min.ppo import PPOConfig
from rlhf_min.rollout import RolloutBuffer

MOST_TOKENS = 5000  # in all responses that one call writes


def token_rows(
    policy: Policy, buffer: RolloutBuffer, row: int, config: PPOConfig
) -> list[dict[str, Any]]:
    """One response of a rollout, a row for each of its tokens.

    Args:
        policy: after the update.
        buffer: what it was updated on.
        row: which response.
        config: of the run, for its temperature and its clip.

    Returns:
        For each token ``token``, ``id``, ``logprob``, ``ref_logprob``, ``kl``, ``reward``,
        ``value``, ``advantage`` and ``return`` as in the buffer; ``new_logprob``; ``ratio``, new
        to old; and ``clipped``, whether that ratio has no gradient any more.
    """
    rollout = buffer.rollout
    with evaluating(policy):
        new = policy(rollout.sequences.select([row]), temperature=config.temperature)
    columns = {
        "id": rollout.sequences.responses,
        "logprob": rollout.logprobs,
        "ref_logprob": rollout.ref_logprobs,
        "kl": rollout.kl,
        "reward": buffer.rewards,
        "value": rollout.values,
        "advantage": buffer.advantages,
        "return": buffer.returns,
    }
    real = rollout.mask[row]
    lists = {name: column[row][real].tolist() for name, column in columns.items()}
    lists["new_logprob"] = new.logprobs[0].tolist()
    rows = []
    for values in zip(*lists.values(), strict=True):
        numbers = dict(zip(lists, values, strict=True))
        ratio = math.exp(numbers["new_logprob"] - numbers["logprob"])
        near = min(max(ratio, 1 - config.clip), 1 + config.clip)
        advantage = numbers["advantage"]
        clipped = advantage * ratio > advantage * near  # as in the policy loss
        token = policy.tokenizer.decode([numbers["id"]])
        rows.append({"token": token, **numbers, "ratio": ratio, "clipped": clipped})
    return rows


def token_records(
    policy: Policy,
    buffer: RolloutBuffer,
    config: PPOConfig,
    *,
    step: int,
    kl_coef: float,
    rows: int | None = None,
    gold: RewardFunction | None = None,
) -> list[dict[str, Any]]:
    """The responses of a step as rows of ``tokens.jsonl``, one for each.

    Args:
        policy, buffer, config: as in `token_rows`.
        step: that this was.
        kl_coef: that the rewards were made with.
        rows: how many responses; None for all, as long as they have `MOST_TOKENS` together.
        gold: the true reward, where there is one.
    """
    rollout = buffer.rollout
    ends = rollout.lengths.cumsum(0)
    n = max(1, int((ends <= MOST_TOKENS).sum()))
    n = n if rows is None else min(n, rows)
    truths: Sequence[float] = []
    if gold is not None:
        texts = rollout.prompts[:n], rollout.responses[:n]
        truths = call_reward(gold, *texts, rollout.columns[:n]).tolist()
    return [
        _finite(
            {
                "step": step,
                "row": row,
                "rows": len(ends),  # in the whole rollout
                "prompt": rollout.prompts[row],
                "response": rollout.responses[row],
                "score": float(rollout.scores[row]),
                **({"gold_reward": truths[row]} if truths else {}),
                "kl_coef": kl_coef,
                "gamma": config.gamma,
                "lam": config.lam,
                "clip": config.clip,
                "whitened": config.whiten_advantages,
                "tokens": token_rows(policy, buffer, row, config),
            }
        )
        for row in range(n)
    ]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
