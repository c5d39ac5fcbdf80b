"""Proximal policy optimization: act, judge, learn, report."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .advantages import gae
from .config import PPOConfig
from .data import Cursor, PromptExample, micro_batches
from .errors import NonFinite, require
from .kl import AdaptiveKL, FixedKL, kl_estimate, shape_rewards
from .loading.reward_function import RewardFunction, call_reward
from .losses import ppo_policy_loss, ppo_value_loss
from .masking import masked_mean, masked_scale, masked_var, masked_whiten
from .optim import Optimizer, adamw
from .policy import Policy, disable_dropout
from .rollout import Rollout, RolloutBuffer, collect
from .text_metrics import distinct_n, repeated_ngrams


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
class State:
    """What outlives a PPO step; the other algorithms share `optim.State`. Each random draw has a
    generator of its own."""

    optimizer: Optimizer
    cursor: Cursor[PromptExample]
    kl_control: FixedKL | AdaptiveKL
    sampling_rng: torch.Generator
    minibatch_rng: torch.Generator
    moments: RunningMoments = field(default_factory=RunningMoments)
    step: int = 0
    too_far: bool = False  # the KL has exceeded max_kl: the run is over

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values only."""
        return {
            "step": self.step,
            "too_far": self.too_far,
            "epoch": self.cursor.epoch,
            "position": self.cursor.position,
            "optimizer": self.optimizer.state_dict(),
            "kl_coef": self.kl_control.coef,
            "moments": [self.moments.count, self.moments.mean, self.moments.squares],
            "sampling_rng": self.sampling_rng.get_state(),
            "minibatch_rng": self.minibatch_rng.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`: training goes on with the bits of the uninterrupted run."""
        self.step, self.too_far = state["step"], state["too_far"]
        self.cursor.epoch, self.cursor.position = state["epoch"], state["position"]
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.kl_control, AdaptiveKL):  # else it is the config's
            self.kl_control.coef = state["kl_coef"]
        self.moments = RunningMoments(*state["moments"])
        self.sampling_rng.set_state(state["sampling_rng"])
        self.minibatch_rng.set_state(state["minibatch_rng"])


def new_state(policy: Policy, prompts: Sequence[PromptExample], config: PPOConfig) -> State:
    """The state before the first step. Dropout is switched off in the policy, so that the same
    tokens have the same probability in every pass.

    Raises:
        BadInput: if there is no value head, or no room for a prompt and the longest response.
    """
    policy.require_room(([x.ids] for x in prompts), new_tokens=config.max_new_tokens)
    require(policy.value_head is not None, "PPO needs a value head: critic='shared' or 'separate'")
    disable_dropout(policy)
    total_steps = config.steps * config.epochs * config.minibatches
    optimizer = adamw(policy, config, total_steps, eps=config.adam_eps)
    kl_control: FixedKL | AdaptiveKL = FixedKL(config.kl_coef)
    if config.kl_control == "adaptive":
        kl_control = AdaptiveKL(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
    return State(
        optimizer,
        Cursor(prompts, seed=config.seed),
        kl_control,
        # Seeds far from each other and from the cursor's, which are seed + epoch.
        sampling_rng=torch.Generator().manual_seed(config.seed + 10**6),
        minibatch_rng=torch.Generator().manual_seed(config.seed + 2 * 10**6),
    )


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
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    scores = torch.where(rollout.ended, scores, scores - config.eos_penalty)
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
    lengths = rollout.sequences.attention_mask[rows].sum(1).tolist()
    stats = dict.fromkeys(UPDATE_STATS, 0.0)
    for group in micro_batches(lengths, max_tokens=config.max_tokens):
        part = [rows[i] for i in group]
        sequences = rollout.sequences.select(part)
        mask = sequences.mask  # (b, t), as wide as the longest response of the part
        cells = part, slice(mask.shape[1])  # of a (B, T): these rows, the first t columns
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
        for name, mean in means.items():
            stats[name] += float(mean.detach() * share)
        stats["ratio_max"] = max(stats["ratio_max"], float(policy_loss.ratio_max))
    stats["grad_norm"] = optimizer.step(buffer, stats)
    return stats


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
    policy.train()  # for gradient checkpointing; there is no dropout, see `new_state`
    steps = [
        minibatch_step(policy, optimizer, buffer, rows, config)
        for rows in buffer.minibatches(order, config.minibatch_size)
    ]
    return _mean_stats(steps)


def ppo_update(
    policy: Policy,
    optimizer: Optimizer,
    buffer: RolloutBuffer,
    config: PPOConfig,
    *,
    rng: torch.Generator,
) -> dict[str, float]:
    """All epochs over one rollout; ends after a pass in which the policy has moved by `stop_kl`.

    That is the pass's mean ``update_k1``. The learning rate then ends above 0, since its schedule
    counts all passes.

    Returns:
        Means over all minibatches, and ``epochs``, the number of passes made.
    """
    epochs: list[dict[str, float]] = []
    for _ in range(config.epochs):
        order = torch.randperm(len(buffer.rollout.sequences), generator=rng)
        epochs.append(ppo_epoch(policy, optimizer, buffer, order, config))
        if config.stop_kl is not None and epochs[-1]["update_k1"] > config.stop_kl:
            break
    return {**_mean_stats(epochs), "epochs": len(epochs)}


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
        `evaluate`.

    Raises:
        NonFinite: before the optimizer step that would have used a number that is not finite.
        Diverged: if the policy gives NaN while it samples.
    """
    monitors = monitors or {}
    for prompts in (state.cursor.examples, eval_prompts):
        policy.require_room(([x.ids] for x in prompts), new_tokens=config.max_new_tokens)
    while state.step < config.steps and not state.too_far:
        # Act: sample responses, and keep what policy, value head and reference gave for them.
        prompts = state.cursor.take_across(config.batch_size)
        with state.optimizer.autocast():
            rollout = collect(policy, ref_policy, reward, prompts, config, rng=state.sampling_rng)

        # Judge: rewards for each token, then how much better than expected it was.
        moments = state.moments if config.normalise_scores else None
        if moments is not None:
            moments.update(rollout.scores)
        buffer = judge(rollout, config, kl_coef=state.kl_control.coef, moments=moments)
        if not bool(torch.isfinite(buffer.advantages + buffer.returns).all()):
            raise NonFinite(state.optimizer.steps, "advantages", buffer)

        # Learn: several passes over the same rollout, never far from it.
        learning_rate = state.optimizer.learning_rate
        started = time.perf_counter()
        stats = ppo_update(policy, state.optimizer, buffer, config, rng=state.minibatch_rng)
        seconds = {**rollout.seconds, "update": time.perf_counter() - started}

        # Report, and steer the penalty.
        metrics = report(buffer) | stats
        metrics |= {"kl_coef": state.kl_control.coef, "learning_rate": learning_rate}
        metrics |= {name: _mean_reward(monitor, rollout) for name, monitor in monitors.items()}
        metrics |= {f"time/{name}": value for name, value in seconds.items()}
        state.kl_control.update(metrics["kl"], config.batch_size)
        state.step += 1
        if on_rollout is not None:
            on_rollout(buffer)
        if eval_prompts and (state.step % config.eval_every == 0 or state.step == config.steps):
            with state.optimizer.autocast():
                metrics |= evaluate(
                    policy, ref_policy, reward, eval_prompts, config, monitors=monitors
                )
        state.too_far = config.max_kl is not None and metrics["k1"] > config.max_kl
        yield metrics


def report(buffer: RolloutBuffer) -> dict[str, float]:
    """What a rollout says of the policy that sampled it.

    ``kl``, ``k1`` and ``k3`` are nats per response, sums over tokens and then means over responses:
    ``kl`` is the estimate in the rewards, the other two are the unbiased ones.
    """
    rollout, mask = buffer.rollout, buffer.rollout.mask
    k3 = kl_estimate(rollout.logprobs, rollout.ref_logprobs, kind="k3")
    returns_variance = float(masked_var(buffer.returns, mask))
    error_variance = float(masked_var(buffer.returns - rollout.values, mask))
    return {
        "score": float(rollout.scores.mean()),
        "score_std": float(rollout.scores.std()),
        "kl": _per_response(rollout.kl, mask),
        "k1": _per_response(rollout.logprobs - rollout.ref_logprobs, mask),
        "k3": _per_response(k3, mask),
        "reward": _per_response(buffer.rewards, mask),
        "rollout_entropy": float(masked_mean(rollout.entropy, mask)),
        "value": float(masked_mean(rollout.values, mask)),
        "return": float(masked_mean(buffer.returns, mask)),
        "explained_variance": 1 - error_variance / max(returns_variance, 1e-12),
        "response_length": _mean_count(rollout.lengths),
        "eos_rate": _mean_count(rollout.ended),
        "tokens": int(rollout.sequences.attention_mask.sum()),
    }


def evaluate(
    policy: Policy,
    ref_policy: Policy,
    reward: RewardFunction,
    prompts: Sequence[PromptExample],
    config: PPOConfig,
    *,
    monitors: Mapping[str, RewardFunction] | None = None,
) -> dict[str, float]:
    """Score, KL, length and repetition on fixed prompts with fixed random numbers."""
    rng = torch.Generator().manual_seed(config.seed + 3 * 10**6)
    rollout = collect(policy, ref_policy, reward, prompts, config, rng=rng)
    metrics = {
        "score": float(rollout.scores.mean()),
        "k1": _per_response(rollout.logprobs - rollout.ref_logprobs, rollout.mask),
        "response_length": _mean_count(rollout.lengths),
        "distinct_2": distinct_n(rollout.responses, 2),
        "repeated_4": repeated_ngrams(rollout.responses, 4),
    }
    for name, monitor in (monitors or {}).items():
        metrics[name] = _mean_reward(monitor, rollout)
    return {f"eval/{name}": value for name, value in metrics.items()}


def _mean_reward(reward: RewardFunction, rollout: Rollout) -> float:
    return float(call_reward(reward, rollout.prompts, rollout.responses, rollout.columns).mean())


def _per_response(x: Tensor, mask: Tensor) -> float:
    return float(torch.where(mask, x, 0).sum(1).mean())


def _mean_count(x: Tensor) -> float:
    """The mean of whole numbers or of truth values."""
    return int(x.sum()) / len(x)


def _mean_stats(stats: Sequence[dict[str, float]]) -> dict[str, float]:
    means = {name: sum(s[name] for s in stats) / len(stats) for name in stats[0]}
    return means | {"ratio_max": max(s["ratio_max"] for s in stats)}
