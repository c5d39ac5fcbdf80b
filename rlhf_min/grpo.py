"""Group relative policy optimization: PPO whose critic is the rest of the group.

Several responses are sampled to each prompt; each is judged beside the others. The options lead
from GRPO to what followed it: DAPO, Dr. GRPO and GSPO, see `GRPOConfig` and `grpo_loss`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from . import online
from .advantages import grpo_advantages
from .config import GRPOConfig
from .data import PromptExample
from .errors import require
from .kl import shape_rewards
from .loading.reward_function import RewardFunction
from .losses import GroupLoss, grpo_loss
from .online import State
from .optim import Optimizer, accumulate
from .policy import Policy
from .rollout import Rollout, RolloutBuffer


def new_state(policy: Policy, prompts: Sequence[PromptExample], config: GRPOConfig) -> State:
    """The state before the first step, as `online.new_state`.

    Raises:
        BadInput: if there is a value head, or no room for a prompt and the longest response.
    """
    require(policy.value_head is None, "the group takes the place of a critic: critic='none'")
    return online.new_state(policy, prompts, config)


def judge(rollout: Rollout, config: GRPOConfig) -> RolloutBuffer:
    """From scores to advantages: how much better than its group was each response?

    Args:
        rollout: its `scores` are first clipped, then reduced by the penalty where a response has no
            EOS; with ``kl_in="reward"`` the KL is taken off too.
        config: for all of that.

    Returns:
        Rewards, advantages (the same at all tokens of a response) and returns (the rewards still
        to come), ``(B, T)`` each.
    """
    scores = online.final_scores(rollout, rollout.scores, config)
    kl_coef = config.kl_coef if config.kl_in == "reward" else 0.0
    rewards = shape_rewards(scores, rollout.kl, rollout.mask, kl_coef=kl_coef)  # (B, T)
    returns = online.rewards_to_come(rewards, rollout.mask)  # (B, T)
    advantages = grpo_advantages(
        returns[:, 0], group_size=config.group_size, scale=config.advantage_scale
    )  # (B,)
    return RolloutBuffer(rollout, rewards, online.at_each_token(advantages, rollout.mask), returns)


def batch_loss(
    policy: Policy, buffer: RolloutBuffer, config: GRPOConfig, rows: Sequence[int]
) -> GroupLoss:
    """Loss of one micro-batch, and what is worth logging of it."""
    rollout = buffer.rollout
    sequences = rollout.sequences.select(rows)
    mask = sequences.mask  # (b, t), as wide as the longest response of these rows
    cells = rows, slice(mask.shape[1])  # of a (B, T): these rows, the first t columns
    new = policy(sequences, temperature=config.temperature)
    return grpo_loss(
        new.logprobs,
        rollout.logprobs[cells],
        rollout.ref_logprobs[cells],
        buffer.advantages[rows, 0],
        mask & learned_from(rollout, config)[rows, None],
        clip=config.clip,
        clip_high=config.clip if config.clip_high is None else config.clip_high,
        kl_coef=config.kl_coef if config.kl_in == "loss" else 0.0,
        ratio_level=config.ratio_level,
        loss_mean=config.loss_mean,
        max_new_tokens=config.max_new_tokens,
    )


def learned_from(rollout: Rollout, config: GRPOConfig) -> Tensor:
    """Which responses the loss looks at, ``(B,)``: with `mask_cut` those that ended by EOS."""
    return rollout.ended if config.mask_cut else torch.ones_like(rollout.ended)


def minibatch_step(
    policy: Policy,
    optimizer: Optimizer,
    buffer: RolloutBuffer,
    rows: Sequence[int],
    config: GRPOConfig,
) -> dict[str, float]:
    """One optimizer step on these rows, in micro-batches that leave the gradient as it is."""
    rollout = buffer.rollout
    lengths = rollout.sequences.attention_mask.sum(1).tolist()
    learned = learned_from(rollout, config)[rows]  # (b,)
    per_token = config.loss_mean == "token"
    total = int(rollout.lengths[rows][learned].sum()) if per_token else len(rows)
    stats = accumulate(
        partial(batch_loss, policy, buffer, config),
        rows,
        total=max(total, 1),  # 0 where all responses were cut
        length=lambda row: lengths[row],
        max_tokens=config.max_tokens,
        optimizer=optimizer,
    )
    if not per_token:  # responses that are left out count in the loss, but they have no ratio
        for name in ("clip_fraction", "update_k1", "update_k3", "ratio"):
            stats[name] *= len(rows) / max(int(learned.sum()), 1)
    stats["grad_norm"] = optimizer.step(buffer, stats)
    return stats


def train(
    policy: Policy,
    ref_policy: Policy,
    reward: RewardFunction,
    config: GRPOConfig,
    state: State,
    *,
    monitors: Mapping[str, RewardFunction] | None = None,
    eval_prompts: Sequence[PromptExample] = (),
    on_rollout: Callable[[RolloutBuffer], None] | None = None,
) -> Iterator[dict[str, float]]:
    """One rollout and its update per yield. The prompts are the cursor's.

    Args:
        policy: without a value head.
        ref_policy, reward, monitors, eval_prompts, on_rollout: as in `ppo.train`.

    Yields:
        The metrics of `online.report`, of the rollout as it was sampled; ``equal_groups``, the
        share of groups that say nothing; those of the update, means over its minibatches;
        ``learning_rate`` as it was in this step; ``time/`` in seconds; and every
        `config.eval_every` steps those of `online.evaluate`.

    Raises:
        NonFinite: before the optimizer step that would have used a number that is not finite.
        Diverged: if the policy gives NaN while it samples.
    """
    online.require_room(policy, [*state.cursor.examples, *eval_prompts], config)
    while state.step < config.steps and not state.too_far:
        # Act: sample a group of responses to each prompt.
        rollout = online.act(
            policy, ref_policy, reward, config, state, group_size=config.group_size
        )

        # Judge: each response beside its group.
        buffer = judge(rollout, config)
        online.require_finite(buffer, state)

        # Learn: several passes over the same rollout, never far from it.
        learning_rate, started = state.optimizer.learning_rate, time.perf_counter()
        step = partial(minibatch_step, policy, state.optimizer, buffer, config=config)
        epoch = partial(online.epoch, policy, step, buffer, config=config)
        stats = online.update(epoch, config.batch_size, config, rng=state.minibatch_rng)
        seconds = time.perf_counter() - started

        # Report on the rollout and on its update.
        metrics = online.report(buffer) | stats
        metrics |= {"equal_groups": online.equal_groups(buffer, config.group_size)}
        metrics |= {"learning_rate": learning_rate, "time/update": seconds}
        yield online.conclude(
            policy,
            ref_policy,
            reward,
            buffer,
            metrics,
            config,
            state,
            monitors=monitors,
            eval_prompts=eval_prompts,
            on_rollout=on_rollout,
        )
