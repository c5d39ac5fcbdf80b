"""Proximal policy optimization: act, judge, learn, report."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .advantages import gae
from .config import (
    option,
    require_choices,
    require_not_negative,
    require_positive,
    require_seed,
    require_share,
)
from .data import Cursor, PromptExample, micro_batches
from .errors import BadNumbers, require
from .kl import AdaptiveKL, FixedKL, kl_estimate, shape_rewards
from .losses import ppo_policy_loss, ppo_value_loss
from .masking import masked_mean, masked_scale, masked_var, masked_whiten
from .optim import OnNonFinite, Optimizer, Precision, Schedule, adamw
from .policy import Policy, disable_dropout
from .rollout import RewardFunction, Rollout, RolloutBuffer, RolloutKL, call_reward, collect
from .text_metrics import distinct_n, repeated_ngrams

MAX_BATCH_SIZE = 2**20  # a rollout is held in memory whole


@dataclass(frozen=True)
class PPOConfig:
    """Options of PPO. Defaults suit the small models of the embedded world.

    A rollout batch of `batch_size` responses is learned from `epochs` times in minibatches of
    `minibatch_size`; each minibatch is one optimizer step.
    """

    trains: ClassVar = "model"
    pretrained: ClassVar = {
        "epochs": (4, "Ziegler et al. 2019"),
        "learning_rate": (1.41e-5, "trl 0.11's GPT-2 runs"),
    }
    steps: int = option(60, "Rollouts, each followed by its update.")
    batch_size: int = option(128, "Prompts in one rollout.")
    minibatch_size: int = option(32, "Responses for each optimizer step.")
    epochs: int = option(2, "Passes over one rollout.")
    critic: Literal["shared", "separate"] = option("shared", "Whose trunk the values are read off.")
    max_new_tokens: int = option(48, "Longest response; a longer one is cut.")
    temperature: float = option(1.0, "Divides the logits, in sampling and in scoring alike.")
    learning_rate: float = option(3e-4, "AdamW's rate after warm-up.")
    schedule: Schedule = option("linear", "How the rate falls after warm-up.")
    warmup_share: float = option(0.05, "Share of the steps in which the rate rises from 0.")
    weight_decay: float = option(0.0, "AdamW's decay of matrices.")
    adam_eps: float = option(1e-5, "AdamW's epsilon; a larger one calms the first steps.")
    max_grad_norm: float | None = option(1.0, "Gradients longer than this are scaled down to it.")
    gamma: float = option(1.0, "Discount for each token.")
    lam: float = option(0.95, "GAE's lambda: 0 trusts the values, 1 the rewards.")
    clip: float = option(0.2, "How far the ratio may leave 1 before it earns nothing.")
    value_clip: float = option(
        0.2, "How far a value may leave the old one before it earns nothing; inf: any."
    )
    value_coef: float = option(0.1, "Weight of the value loss beside the policy loss.")
    kl: RolloutKL = option(
        "k1", "Estimate of the KL in the rewards; only k1 has the objective's gradient."
    )
    kl_coef: float = option(0.05, "Weight of the KL in the rewards, in score per nat.")
    kl_control: Literal["fixed", "adaptive"] = option("fixed", "Whether kl_coef follows the KL.")
    kl_target: float = option(6.0, "Adaptive: the aim, in nats per response.")
    kl_horizon: float = option(
        10_000, "Adaptive: responses in which kl_coef may change by a fifth."
    )
    whiten_advantages: bool = option(True, "Advantages to mean 0, variance 1 over the rollout.")
    whiten_rewards: bool = option(False, "Rewards to variance 1 over the rollout, mean kept.")
    normalise_scores: bool = option(False, "Scores by their running mean and deviation.")
    score_clip: float | None = option(None, "Scores beyond this, either way, are cut to it.")
    eos_penalty: float = option(0.0, "Taken off the score of a response without EOS.")
    stop_kl: float | None = option(
        None, "KL(rollout policy || new policy) by k1, per token, that ends an update."
    )
    max_kl: float | None = option(
        None, "KL(policy || reference) by k1, per response, that ends the run."
    )
    max_tokens: int = option(1024, "Padded tokens in one forward pass; memory only.")
    precision: Precision = option("fp32", "Of forward passes, by autocast; weights stay fp32.")
    on_nonfinite: OnNonFinite = option(
        "stop", "At a number that is not finite: stop, or skip step or rollout, 20 in a row."
    )
    eval_every: int = option(10, "Rollouts between looks at the fixed prompts.")
    seed: int = option(0, "Order of the data, sampling, and minibatches.")

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch_size", "minibatch_size", "epochs", "max_new_tokens")
        require_positive(self, "temperature", "learning_rate", "adam_eps", "max_grad_norm", "clip")
        require_positive(self, "kl_target", "kl_horizon", "score_clip", "stop_kl", "max_kl")
        require_positive(self, "max_tokens", "eval_every")
        require_not_negative(self, "weight_decay", "value_coef", "kl_coef", "eos_penalty")
        require_seed(self, "seed")
        require_choices(self)
        require_share(self, "gamma", "lam", "warmup_share")
        require(self.value_clip > 0, f"PPOConfig: value_clip is {self.value_clip}; it must be > 0")
        require(
            self.kl_control == "fixed" or self.kl_horizon > 0.2 * self.batch_size,
            f"PPOConfig: kl_horizon is {self.kl_horizon}; it must exceed a fifth of batch_size "
            f"{self.batch_size}, or the coefficient could turn negative",
        )
        require(
            self.batch_size <= MAX_BATCH_SIZE,
            f"PPOConfig: batch_size is {self.batch_size}; it must be at most {MAX_BATCH_SIZE}",
        )
        require(self.batch_size >= 2, "PPOConfig: batch_size is 1; whitening needs at least 2")
        require(
            self.minibatch_size <= self.batch_size,
            f"PPOConfig: minibatch_size {self.minibatch_size} exceeds batch_size {self.batch_size}",
        )

    @property
    def minibatches(self) -> int:
        """Optimizer steps in one epoch over a rollout; the last may be smaller."""
        return -(-self.batch_size // self.minibatch_size)


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
    """What outlives a PPO step. Each random draw has a generator of its own."""

    optimizer: Optimizer
    cursor: Cursor[PromptExample]
    kl_control: FixedKL | AdaptiveKL
    sampling_rng: torch.Generator
    minibatch_rng: torch.Generator
    moments: RunningMoments = field(default_factory=RunningMoments)
    step: int = 0
    too_far: bool = False  # the KL has exceeded max_kl: the run is over
    last: RolloutBuffer | None = None  # what was learned from last, to look at; not saved

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
    optimizer = adamw(
        policy,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        warmup_share=config.warmup_share,
        total_steps=total_steps,
        max_grad_norm=config.max_grad_norm,
        precision=config.precision,
        on_nonfinite=config.on_nonfinite,
        eps=config.adam_eps,
    )
    kl_control: FixedKL | AdaptiveKL = FixedKL(config.kl_coef)
    if config.kl_control == "adaptive":
        kl_control = AdaptiveKL(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
    return State(
        optimizer,
        Cursor(prompts, seed=config.seed),
        kl_control,
        # Far apart from each other and from the data's seed + epoch.
        sampling_rng=torch.Generator().manual_seed(config.seed + 10**6),
        minibatch_rng=torch.Generator().manual_seed(config.seed + 2 * 10**6),
    )


def judge(
    rollout: Rollout, config: PPOConfig, *, kl_coef: float, moments: RunningMoments | None = None
) -> RolloutBuffer:
    """From scores to advantages: how much better than expected was each token?

    Args:
        rollout: its `scores` are normalised, clipped and, without EOS, reduced by the penalty.
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
    value_mask = rollout.mask if buffer.value_mask is None else buffer.value_mask
    tokens, value_tokens = int(rollout.mask[rows].sum()), int(value_mask[rows].sum())
    lengths = rollout.sequences.attention_mask[rows].sum(1).tolist()
    stats = dict.fromkeys(UPDATE_STATS, 0.0)
    for group in micro_batches(lengths, max_tokens=config.max_tokens):
        part = [rows[i] for i in group]
        sequences = replace(rollout.sequences, mask=value_mask).select(part)
        width = sequences.mask.shape[1]
        mask = rollout.mask[part, :width]
        with optimizer.autocast():
            new = policy(sequences, temperature=config.temperature)
        policy_loss = ppo_policy_loss(
            new.logprobs,
            rollout.logprobs[part, :width],
            buffer.advantages[part, :width],
            mask,
            clip=config.clip,
        )
        value_loss = ppo_value_loss(
            new.values,
            rollout.values[part, :width],
            buffer.returns[part, :width],
            sequences.mask,
            clip=config.value_clip,
        )
        share = int(policy_loss.count) / tokens
        value_share = int(value_loss.count) / value_tokens
        optimizer.backward(
            policy_loss.loss * share + config.value_coef * value_loss.loss * value_share
        )
        stats["policy_loss"] += float(policy_loss.loss.detach() * share)
        stats["clip_fraction"] += float(policy_loss.clip_fraction * share)
        stats["update_k1"] += float(policy_loss.k1 * share)
        stats["update_k3"] += float(policy_loss.k3 * share)
        stats["ratio"] += float(policy_loss.ratio * share)
        stats["ratio_max"] = max(stats["ratio_max"], float(policy_loss.ratio_max))
        stats["entropy"] += float(masked_mean(new.entropy, mask) * share)
        stats["value_loss"] += float(value_loss.loss.detach() * value_share)
        stats["value_clip_fraction"] += float(value_loss.clip_fraction * value_share)
    alone = (_row(policy, buffer, row, config) for row in rows)
    optimizer.check(stats, zip(rows, alone, strict=True))
    stats["grad_norm"] = optimizer.step(buffer)
    return stats


ROLLOUT_PARTS = ("scores", "logprobs", "ref_logprobs", "kl", "values")
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
    """All epochs over one rollout; ends early once the policy has moved by `stop_kl`.

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
) -> Iterator[dict[str, float]]:
    """One rollout and its update per yield. The prompts are the cursor's.

    Args:
        policy: with a value head.
        ref_policy: frozen; what the KL is measured to.
        reward: any callable of texts, see `call_reward`.
        monitors: further rewards by name, reported and not trained on.
        eval_prompts: fixed prompts that are sampled every `eval_every` steps with the same
            random numbers each time.

    Yields:
        The metrics of `report`, of the rollout as it was sampled, and of `ppo_update`, means over
        its minibatches; how many optimizer steps and rollouts were ``skipped`` so far, and only
        this of a skipped rollout.

    Raises:
        NonFinite: before the optimizer step that would have used a number that is not finite.
    """
    monitors = monitors or {}
    for prompts in (state.cursor.examples, eval_prompts):
        policy.require_room(([x.ids] for x in prompts), new_tokens=config.max_new_tokens)
    while state.step < config.steps and not state.too_far:
        # Act: sample responses, and keep what policy, value head and reference gave for them.
        prompts = state.cursor.take_across(config.batch_size)
        rollout = _finite_rollout(policy, ref_policy, reward, prompts, config, state)
        if rollout is None:
            state.step += 1
            yield {"skipped": state.optimizer.skipped}
            continue

        # Judge: rewards for each token, then how much better than expected it was.
        moments = state.moments if config.normalise_scores else None
        if moments is not None:
            moments.update(rollout.scores)
        buffer = judge(rollout, config, kl_coef=state.kl_control.coef, moments=moments)

        # Learn: several passes over the same rollout, never far from it.
        learning_rate = state.optimizer.learning_rate
        started = time.perf_counter()
        stats = ppo_update(policy, state.optimizer, buffer, config, rng=state.minibatch_rng)
        seconds = {**rollout.seconds, "update": time.perf_counter() - started}

        # Report, and steer the penalty.
        metrics = report(buffer) | stats
        metrics |= {"kl_coef": state.kl_control.coef, "learning_rate": learning_rate}
        metrics["skipped"] = state.optimizer.skipped
        for name, monitor in monitors.items():
            metrics[name] = _mean_reward(monitor, rollout)
        metrics |= _timing(rollout, seconds)
        state.kl_control.update(metrics["kl"], config.batch_size)
        state.step, state.last = state.step + 1, buffer
        if eval_prompts and (state.step % config.eval_every == 0 or state.step == config.steps):
            with state.optimizer.autocast():
                metrics |= evaluate(
                    policy, ref_policy, reward, eval_prompts, config, monitors=monitors
                )
        state.too_far = config.max_kl is not None and metrics["k1"] > config.max_kl
        yield metrics


def report(buffer: RolloutBuffer) -> dict[str, float]:
    """What a rollout says of the policy that sampled it.

    ``kl``, ``k1`` and ``k3`` are nats per response (sums over tokens, then means over responses):
    the one in the rewards, and both unbiased estimates.
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
    rollout = _collect(policy, ref_policy, reward, prompts, config, rng)
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


def _collect(
    policy: Policy,
    ref_policy: Policy,
    reward: RewardFunction,
    prompts: Sequence[PromptExample],
    config: PPOConfig,
    rng: torch.Generator,
) -> Rollout:
    return collect(
        policy,
        ref_policy,
        reward,
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        kl=config.kl,
        max_tokens=config.max_tokens,
        rng=rng,
    )


def _finite_rollout(
    policy: Policy,
    ref_policy: Policy,
    reward: RewardFunction,
    prompts: Sequence[PromptExample],
    config: PPOConfig,
    state: State,
) -> Rollout | None:
    """None if something in it is not finite and the rollout is to be skipped."""
    optimizer = state.optimizer
    try:
        with optimizer.autocast():
            rollout = _collect(policy, ref_policy, reward, prompts, config, state.sampling_rng)
    except BadNumbers as error:
        if error.fault[0] == "scores" and optimizer.on_nonfinite == "stop":
            raise  # the reward is at fault, not the training
        optimizer.fault = error.fault
        optimizer.refused(prompts)
        return None
    parts = {name: getattr(rollout, name) for name in ROLLOUT_PARTS}  # 0 at padding
    alone = ({name: x[row] for name, x in parts.items()} for row in range(len(prompts)))
    total = float(torch.stack([x.sum() for x in parts.values()]).sum())
    optimizer.check({"rollout": total}, enumerate(alone))
    return None if optimizer.refused(rollout) else rollout


def _row(policy: Policy, buffer: RolloutBuffer, row: int, config: PPOConfig) -> dict[str, Tensor]:
    """What the losses of this row are made of; each ``(1, T)``."""
    rollout = buffer.rollout
    sequences = rollout.sequences.select([row])
    width = sequences.mask.shape[1]
    new = policy(sequences, temperature=config.temperature)
    return {
        "logprobs": new.logprobs,
        "values": new.values,
        "ratio": (new.logprobs - rollout.logprobs[[row], :width]).exp(),
        "advantages": buffer.advantages[[row], :width],
        "returns": buffer.returns[[row], :width],
    }


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


def _timing(rollout: Rollout, seconds: Mapping[str, float]) -> dict[str, float]:
    tokens = int(rollout.sequences.attention_mask.sum())
    return {
        **{f"time/{name}": value for name, value in seconds.items()},
        "time/tokens_per_second": tokens / sum(seconds.values()),
    }
