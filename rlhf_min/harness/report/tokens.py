"""A rollout token by token: what everyone believed of each, and what the update made of it."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from rlhf_min.config import GroupConfig, GRPOConfig, PPOConfig, RLOOConfig, RolloutConfig
from rlhf_min.loading.reward_function import RewardFunction, call_reward
from rlhf_min.policy import Policy, evaluating
from rlhf_min.rollout import RolloutBuffer

MOST_TOKENS = 5000  # in all responses that one call writes


def token_rows(
    policy: Policy, buffer: RolloutBuffer, row: int, config: RolloutConfig
) -> list[dict[str, Any]]:
    """One response of a rollout, a row for each of its tokens.

    Args:
        policy: after the update.
        buffer: what it was updated on.
        row: which response.
        config: of the run, for its temperature and its clip.

    Returns:
        For each token ``token``, ``id``, ``logprob``, ``ref_logprob``, ``kl``, ``reward``,
        ``value`` (if there is a critic), ``advantage`` and ``return`` as in the buffer;
        ``new_logprob``; ``ratio``, new to old, of the token or of the response, as the algorithm
        takes it; and ``clipped``, whether that ratio has no gradient any more.
    """
    rollout = buffer.rollout
    with evaluating(policy):
        new = policy(rollout.sequences.select([row]), temperature=config.temperature)
    columns = {
        "id": rollout.sequences.responses,
        "logprob": rollout.logprobs,
        "ref_logprob": rollout.ref_logprobs,
        "kl": rollout.kl,
        "reward": buffer.rewards + 0.0,  # no -0, which a KL times 0 leaves
        "value": rollout.values,
        "advantage": buffer.advantages,
        "return": buffer.returns,
    }
    if policy.value_head is None:
        del columns["value"]
    real = rollout.mask[row]
    lists = {name: column[row][real].tolist() for name, column in columns.items()}
    lists["new_logprob"] = new.logprobs[0].tolist()
    ratios = _ratios(lists["new_logprob"], lists["logprob"], config)
    rows = []
    for values, ratio in zip(zip(*lists.values(), strict=True), ratios, strict=True):
        numbers = dict(zip(lists, values, strict=True))
        high = getattr(config, "clip_high", None)
        near = min(max(ratio, 1 - config.clip), 1 + (config.clip if high is None else high))
        advantage = numbers["advantage"]
        clipped = advantage * ratio > advantage * near  # as in the policy loss
        token = policy.tokenizer.decode([numbers["id"]])
        rows.append({"token": token, **numbers, "ratio": ratio, "clipped": clipped})
    return rows


def _ratios(new: Sequence[float], old: Sequence[float], config: RolloutConfig) -> list[float]:
    """The ratio at each token: its own, or that of the whole response."""
    logs = [a - b for a, b in zip(new, old, strict=True)]
    if isinstance(config, RLOOConfig):
        logs = [sum(logs)] * len(logs)
    elif isinstance(config, GRPOConfig) and config.ratio_level == "sequence":
        logs = [sum(logs) / len(logs)] * len(logs)
    # Of a response it may exceed all floats, which is an error to `math.exp`.
    return [math.inf if x > math.log(sys.float_info.max) else math.exp(x) for x in logs]


def token_records(
    policy: Policy,
    buffer: RolloutBuffer,
    config: RolloutConfig,
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
        kl_coef: that the rewards were made with, or would have been, were the KL not in the loss.
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
                "kl_coef": 0.0 if getattr(config, "kl_in", "reward") == "loss" else kl_coef,
                "clip": config.clip,
                **_made_with(config, buffer, row),
                "tokens": token_rows(policy, buffer, row, config),
            }
        )
        for row in range(n)
    ]


def _made_with(config: RolloutConfig, buffer: RolloutBuffer, row: int) -> dict[str, Any]:
    """What the advantages of a response were made with: GAE's options, or its group."""
    if isinstance(config, PPOConfig):
        return {"gamma": config.gamma, "lam": config.lam, "whitened": config.whiten_advantages}
    if not isinstance(config, GroupConfig):
        return {}
    first = row - row % config.group_size
    rewards = buffer.returns[first : first + config.group_size, 0]
    scale = config.advantage_scale if isinstance(config, GRPOConfig) else "leave_one_out"
    return {"group": rewards.tolist(), "place": row - first, "scale": scale}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
