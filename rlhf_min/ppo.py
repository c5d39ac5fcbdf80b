"""Proximal policy optimization: act, judge, learn, report."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import distributed, online
from .advantages import gae
from .config import PPOConfig
from .data import PromptExample, in_groups
from .errors import require
from .kl import AdaptiveKL, FixedKL, shape_rewards
from .loading.reward_function import RewardFunction
from .losses import ppo_policy_loss, ppo_value_loss
from .masking import masked_mean, masked_scale, masked_var, masked_whiten
from .online import final_scores
from .optim import Optimizer
from .policy import Policy
from .rollout import Rollout, RolloutBuffer


@dataclass
class RunningMoments:
    r"""Mean and variance of all scores so far, batch by batch.                [eq:running_moments]

        delta = mean_batch - mean                                                  (1)
        mean <- mean + delta * n / (count + n)                                     (2)
        M    <- M + M_batch + delta^2 * count * n / (count + n)                    (3)

    where M is the sum of squared deviations, so that the variance is M / (count - 1).

    Source: Chan et al. 1979, "Updating formulae and a pairwise algorithm"; trl 0.11.3
    ``RunningMoments``.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, scores: Tensor) -> None:
        """Take in one batch of scores, ``(B,)``."""
        scores = scores.cpu().double()
        n, batch_mean = len(scores), float(scores.mean())
        delta = batch_mean - self.mean  # (1)
        total = self.count + n
        self.mean += delta * n / total  # (2)
        batch_squares = float((scores - batch_mean).square().sum())
        self.squares += batch_squares + delta**2 * self.count * n / total  # (3)
        self.count = total

    def normalise(self, scores: Tensor) -> Tensor:
        """Scores in standard deviations from the running mean, ``(B,)``."""
        variance = self.squares / max(self.count - 1, 1)
        return (scores - self.mean) / (variance + 1e-8) ** 0.5


@dataclass
class State(online.State):
    """What outlives a PPO step: also the KL coefficient and the moments of the scores."""

    kl_control: FixedKL | AdaptiveKL = field(kw_only=True)
    moments: RunningMoments = field(default_factory=RunningMoments)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values only."""
        moments = [self.moments.count, self.moments.mean, self.moments.squares]
        return super().state_dict() | {"kl_coef": self.kl_control.coef, "moments": moments}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`: training goes on with the bits of the uninterrupted run."""
        super().restore(state)
        if isinstance(self.kl_control, AdaptiveKL):  # else it is the config's
            self.kl_control.coef = state["kl_coef"]
        self.moments = RunningMoments(*state["moments"])


def new_state(policy: Policy, prompts: Sequence[PromptExample], config: PPOConfig) -> State:
    """The state before the first step, as `online.new_state`.

    Raises:
        BadInput: if there is no value head, or no room for a prompt and the longest response.
    """
    require(policy.value_head is not None, "PPO needs a value head: critic='shared' or 'separate'")
    kl_control: FixedKL | AdaptiveKL = FixedKL(config.kl_coef)
    if config.kl_control == "adaptive":
        kl_control = AdaptiveKL(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
    return State(**vars(online.new_state(policy, prompts, config)), kl_control=kl_control)


def judge(
    rollout: Rollout, config: PPOConfig, *, kl_coef: float, moments: RunningMoments | None = None
) -> RolloutBuffer:
    """From scores to advantages: how much better than expected was each token?

    Args:
        rollout: its `scores` are first normalised, then clipped, then reduced by the penalty where
            a response has no EOS.
        config: for everything but the KL coefficient, which may have moved.
        kl_coef: weight of the KL in the rewards.
        moments: what the scores are normalised by, or None to take them as they are.

    Returns:
        Rewards, advantages (whitened, unless the config says no) and returns, ``(B, T)`` each.
    """
    scores = rollout.scores if moments is None else moments.normalise(rollout.scores)
    scores = final_scores(rollout, scores, config)
    rewards = shape_rewards(scores, rollout.kl, rollout.mask, kl_coef=kl_coef)  # (B, T)
    if config.whiten_rewards:
        rewards = masked_scale(rewards, rollout.mask)
    advantages, returns = gae(
        rewards, rollout.values, rollout.mask, gamma=config.gamma, lam=config.lam
    )
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, rollout.mask)
    return RolloutBuffer(rollout, rewards, advantages, returns)


def minibatch_step(
    policy: Policy,
    optimizer: Optimizer,
    buffer: RolloutBuffer,
    rows: Sequence[int],
    config: PPOConfig,
) -> dict[str, float]:
    """One optimizer step on these rows, in micro-batches that leave the gradient as it is."""
    rollout = buffer.rollout
    tokens = int(rollout.mask[rows].sum())
    lengths = rollout.sequences.attention_mask.sum(1).tolist()
    parts = in_groups(
        rows, lengths.__getitem__, max_tokens=config.max_tokens, among=distributed.size()
    )
    learn = partial(micro_batch, policy, optimizer, buffer, config, tokens)
    stats = dict.fromkeys(UPDATE_STATS, 0.0)
    for shares in distributed.deal(learn, parts):
        for name, share in shares.items():
            stats[name] = max(stats[name], share) if name == "ratio_max" else stats[name] + share
    stats["grad_norm"] = optimizer.step(buffer, stats)
    return stats


def micro_batch(
    policy: Policy,
    optimizer: Optimizer,
    buffer: RolloutBuffer,
    config: PPOConfig,
    tokens: int,
    rows: Sequence[int],
) -> dict[str, float]:
    """Add the gradient of these rows' share of the loss.

    Args:
        tokens: real response tokens of the whole minibatch.

    Returns:
        What they add to the means over those tokens; ``ratio_max`` as it is.
    """
    rollout = buffer.rollout
    sequences = rollout.sequences.select(rows)
    mask = sequences.mask  # (b, t), as wide as the longest response of these rows
    cells = rows, slice(mask.shape[1])  # of a (B, T): these rows, the first t columns
    with optimizer.autocast():
        new = policy(sequences, temperature=config.temperature)
    policy_loss = ppo_policy_loss(
        new.logprobs,
        rollout.logprobs[cells],
        buffer.advantages[cells],
        mask,
        clip=config.clip,
    )
    value_loss = ppo_value_loss(
        new.values,
        rollout.values[cells],
        buffer.returns[cells],
        mask,
        clip=config.value_clip,
    )
    share = int(policy_loss.count) / tokens  # of the minibatch's
    optimizer.backward(policy_loss.loss * share + config.value_coef * value_loss.loss * share)
    means = {
        "policy_loss": policy_loss.loss,
        "value_loss": value_loss.loss,
        "clip_fraction": policy_loss.clip_fraction,
        "value_clip_fraction": value_loss.clip_fraction,
        "update_k1": policy_loss.k1,
        "update_k3": policy_loss.k3,
        "ratio": policy_loss.ratio,
        "entropy": masked_mean(new.entropy, mask),
    }
    shares = {name: float(mean.detach() * share) for name, mean in means.items()}
    return shares | {"ratio_max": float(policy_loss.ratio_max)}


UPDATE_STATS = (
    "policy_loss",
    "value_loss",
    "clip_fraction",
    "value_clip_fraction",
    "update_k1",
    "update_k3",
    "ratio",
    "ratio_max",
    "entropy",
    "grad_norm",
)


def ppo_epoch(
    policy: Policy,
    optimizer: Optimizer,
    buffer: RolloutBuffer,
    order: Tensor,
    config: PPOConfig,
) -> dict[str, float]:
    """One pass over the buffer, minibatch by minibatch, an optimizer step after each.

    Args:
        order: the rows in the order of use; slices of it are the minibatches. Shape ``(B,)``.

    Returns:
        Means over the minibatches of the pass (``ratio_max``: the largest).
    """
    step = partial(minibatch_step, policy, optimizer, buffer, config=config)
    return online.epoch(policy, step, buffer, order, config)


def ppo_update(
    policy: Policy,
    optimizer: Optimizer,
    buffer: RolloutBuffer,
    config: PPOConfig,
    *,
    rng: torch.Generator,
) -> dict[str, float]:
    """All epochs over one rollout, as `online.update`."""
    epoch = partial(ppo_epoch, policy, optimizer, buffer, config=config)
    return online.update(epoch, len(buffer.rollout.sequences), config, rng=rng)


def train(
    policy: Policy,
    ref_policy: Policy,
    reward: RewardFunction,
    config: PPOConfig,
    state: State,
    *,
    monitors: Mapping[str, RewardFunction] | None = None,
    eval_prompts: Sequence[PromptExample] = (),
    on_rollout: Callable[[RolloutBuffer], None] | None = None,
) -> Iterator[dict[str, float]]:
    """One rollout and its update per yield. The prompts are the cursor's.

    Args:
        policy: with a value head.
        ref_policy: frozen; what the KL is measured to.
        reward: any callable of texts, see `call_reward`.
        monitors: further rewards by name, reported and not trained on.
        eval_prompts: fixed prompts that are sampled every `eval_every` steps with the same
            random numbers each time.
        on_rollout: called with each rollout after its update.

    Yields:
        The metrics of `report`, of the rollout as it was sampled, and of `ppo_update`, means over
        its minibatches; ``kl_coef`` and ``learning_rate`` as they were in this step; ``tokens`` of
        prompts and responses; ``time/`` in seconds; and every `config.eval_every` steps those of
        `online.evaluate`.

    Raises:
        NonFinite: before the optimizer step that would have used a number that is not finite.
        Diverged: if the policy gives NaN while it samples.
    """
    online.require_room(policy, [*state.cursor.examples, *eval_prompts], config)
    while state.step < config.steps and not state.too_far:
        # Act: sample responses, and keep what policy, value head and reference gave for them.
        rollout = online.act(policy, ref_policy, reward, config, state)

        # Judge: rewards for each token, then how much better than expected it was.
        moments = state.moments if config.normalise_scores else None
        if moments is not None:
            moments.update(rollout.scores)
        buffer = judge(rollout, config, kl_coef=state.kl_control.coef, moments=moments)
        online.require_finite(buffer, state)

        # Learn: several passes over the same rollout, never far from it.
        learning_rate, started = state.optimizer.learning_rate, time.perf_counter()
        stats = ppo_update(policy, state.optimizer, buffer, config, rng=state.minibatch_rng)
        seconds = time.perf_counter() - started

        # Report, and steer the penalty.
        metrics = report(buffer) | stats | {"learning_rate": learning_rate, "time/update": seconds}
        metrics["kl_coef"] = state.kl_control.coef
        state.kl_control.update(metrics["kl"], config.batch_size)
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


def report(buffer: RolloutBuffer) -> dict[str, float]:
    """What a rollout says of the policy that sampled it, as `online.report`, and of its values."""
    rollout, mask = buffer.rollout, buffer.rollout.mask
    returns_variance = float(masked_var(buffer.returns, mask))
    error_variance = float(masked_var(buffer.returns - rollout.values, mask))
    return online.report(buffer) | {
        "value": float(masked_mean(rollout.values, mask)),
        "return": float(masked_mean(buffer.returns, mask)),
        "explained_variance": 1 - error_variance / max(returns_variance, 1e-12),
    }
