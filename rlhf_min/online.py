"""What PPO, GRPO and RLOO share: they learn from responses that the policy itself samples.

Each of them acts, judges, learns and reports. How responses are judged and what is learned from
them is the algorithm's own; this file has the rest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .advantages import gae
from .config import RolloutConfig
from .data import Cursor, PromptExample
from .errors import NonFinite
from .kl import kl_estimate
from .loading.reward_function import RewardFunction, call_reward
from .masking import masked_mean
from .optim import Optimizer, adamw
from .policy import Policy, disable_dropout
from .rollout import Rollout, RolloutBuffer, collect
from .text_metrics import distinct_n, repeated_ngrams


@dataclass
class State:
    """What outlives a step of GRPO and RLOO; PPO's has more. Each random draw has a generator of
    its own."""

    optimizer: Optimizer
    cursor: Cursor[PromptExample]
    sampling_rng: torch.Generator
    minibatch_rng: torch.Generator
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
            "sampling_rng": self.sampling_rng.get_state(),
            "minibatch_rng": self.minibatch_rng.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`: training goes on with the bits of the uninterrupted run."""
        self.step, self.too_far = state["step"], state["too_far"]
        self.cursor.epoch, self.cursor.position = state["epoch"], state["position"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampling_rng.set_state(state["sampling_rng"])
        self.minibatch_rng.set_state(state["minibatch_rng"])


def new_state(policy: Policy, prompts: Sequence[PromptExample], config: RolloutConfig) -> State:
    """The state before the first step. Dropout is switched off in the policy, so that the same
    tokens have the same probability in every pass.

    Raises:
        BadInput: if there is no room for a prompt and the longest response.
    """
    require_room(policy, prompts, config)
    disable_dropout(policy)
    total_steps = config.steps * config.epochs * config.minibatches
    return State(
        adamw(policy, config, total_steps, eps=config.adam_eps),
        Cursor(prompts, seed=config.seed),
        # Seeds far from each other and from the cursor's, which are seed + epoch.
        sampling_rng=torch.Generator().manual_seed(config.seed + 10**6),
        minibatch_rng=torch.Generator().manual_seed(config.seed + 2 * 10**6),
    )


def require_room(policy: Policy, prompts: Iterable[PromptExample], config: RolloutConfig) -> None:
    """Raise `BadInput` unless each prompt and the longest response have room."""
    policy.require_room(([x.ids] for x in prompts), new_tokens=config.max_new_tokens)


def act(
    policy: Policy,
    ref_policy: Policy,
    reward: RewardFunction,
    config: RolloutConfig,
    state: State,
    *,
    group_size: int = 1,
) -> Rollout:
    """The rollout of this step: `batch_size` responses, `group_size` to each of the next prompts,
    as the policy, its value head and the reference see them."""
    prompts = state.cursor.take_across(config.batch_size // group_size)
    with state.optimizer.autocast():
        return collect(
            policy,
            ref_policy,
            reward,
            prompts,
            config,
            rng=state.sampling_rng,
            group_size=group_size,
        )


def final_scores(rollout: Rollout, scores: Tensor, config: RolloutConfig) -> Tensor:
    """The scores, ``(B,)``, as they enter the rewards: clipped, and then reduced by the penalty
    where a response has no EOS."""
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    return torch.where(rollout.ended, scores, scores - config.eos_penalty)


def rewards_to_come(rewards: Tensor, mask: Tensor) -> Tensor:
    """What each token and all after it earn, ``(B, T)``; that of the first is the whole response's.

    These are GAE's returns where nothing is discounted and there are no values.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)[1]


def at_each_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """The advantage of a response, ``(B,)``, at each of its real tokens, ``(B, T)``."""
    return torch.where(mask, advantages[:, None], 0)


def equal_groups(buffer: RolloutBuffer, group_size: int) -> float:
    """The share of groups whose rewards are all equal: nothing is learned from them."""
    groups = buffer.returns[:, 0].view(-1, group_size)  # (B/G, G)
    # Up to rounding: the KL in the rewards of equal responses depends on their micro-batches.
    return _mean_count(torch.isclose(groups.amax(1), groups.amin(1), atol=1e-6))


def epoch(
    policy: Policy,
    minibatch_step: Callable[[list[int]], dict[str, float]],
    buffer: RolloutBuffer,
    order: Tensor,
    config: RolloutConfig,
) -> dict[str, float]:
    """One pass over the buffer, minibatch by minibatch, an optimizer step after each.

    Args:
        minibatch_step: the step on these rows; returns its means.
        order: the rows in the order of use; slices of it are the minibatches. Shape ``(B,)``.

    Returns:
        Means over the minibatches of the pass (``ratio_max``: the largest).
    """
    policy.train()  # for gradient checkpointing; there is no dropout, see `new_state`
    return mean_stats(
        [minibatch_step(rows) for rows in buffer.minibatches(order, config.minibatch_size)]
    )


def update(
    epoch: Callable[[Tensor], dict[str, float]],
    responses: int,
    config: RolloutConfig,
    *,
    rng: torch.Generator,
) -> dict[str, float]:
    """All epochs over one rollout; ends after a pass in which the policy has moved by `stop_kl`.

    That is the pass's mean ``update_k1``. The learning rate then ends above 0, since its schedule
    counts all passes.

    Args:
        epoch: one pass over the rows in the order that it is given; returns the means over it.
        responses: in the rollout, B.
        rng: draws an order for each pass.

    Returns:
        Means over all minibatches, and ``epochs``, the number of passes made.
    """
    epochs: list[dict[str, float]] = []
    for _ in range(config.epochs):
        epochs.append(epoch(torch.randperm(responses, generator=rng)))
        if config.stop_kl is not None and epochs[-1]["update_k1"] > config.stop_kl:
            break
    return {**mean_stats(epochs), "epochs": len(epochs)}


def mean_stats(stats: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over minibatches or passes; of ``ratio_max`` the largest."""
    means = {name: sum(s[name] for s in stats) / len(stats) for name in stats[0]}
    return means | {"ratio_max": max(s["ratio_max"] for s in stats)}


def require_finite(buffer: RolloutBuffer, state: State) -> None:
    """Raise `NonFinite` for a judgement that no optimizer step may use."""
    if not bool(torch.isfinite(buffer.advantages + buffer.returns).all()):
        raise NonFinite(state.optimizer.steps, "advantages", buffer)


def conclude(
    policy: Policy,
    ref_policy: Policy,
    reward: RewardFunction,
    buffer: RolloutBuffer,
    metrics: dict[str, float],
    config: RolloutConfig,
    state: State,
    *,
    monitors: Mapping[str, RewardFunction] | None,
    eval_prompts: Sequence[PromptExample],
    on_rollout: Callable[[RolloutBuffer], None] | None,
) -> dict[str, float]:
    """End a step: count it, and say whether it was the last.

    Args:
        buffer: what was learned from.
        metrics: of the step so far.
        monitors, eval_prompts, on_rollout: as in `ppo.train`.

    Returns:
        The metrics with those of the monitors, ``time/`` in seconds, and every
        `config.eval_every` steps those of `evaluate`.
    """
    monitors, rollout = monitors or {}, buffer.rollout
    metrics |= {name: _mean_reward(monitor, rollout) for name, monitor in monitors.items()}
    metrics |= {f"time/{name}": value for name, value in rollout.seconds.items()}
    state.step += 1
    if on_rollout is not None:
        on_rollout(buffer)
    if eval_prompts and (state.step % config.eval_every == 0 or state.step == config.steps):
        with state.optimizer.autocast():
            metrics |= evaluate(policy, ref_policy, reward, eval_prompts, config, monitors=monitors)
    state.too_far = config.max_kl is not None and metrics["k1"] > config.max_kl
    return metrics


def report(buffer: RolloutBuffer) -> dict[str, float]:
    """What a rollout says of the policy that sampled it.

    ``kl``, ``k1`` and ``k3`` are nats per response, sums over tokens and then means over responses:
    ``kl`` is the estimate that `config.kl` names, the other two are the unbiased ones.
    """
    rollout, mask = buffer.rollout, buffer.rollout.mask
    k3 = kl_estimate(rollout.logprobs, rollout.ref_logprobs, kind="k3")
    return {
        "score": float(rollout.scores.mean()),
        "score_std": float(rollout.scores.std()),
        "kl": _per_response(rollout.kl, mask),
        "k1": _per_response(rollout.logprobs - rollout.ref_logprobs, mask),
        "k3": _per_response(k3, mask),
        "reward": _per_response(buffer.rewards, mask),
        "rollout_entropy": float(masked_mean(rollout.entropy, mask)),
        "response_length": _mean_count(rollout.lengths),
        "eos_rate": _mean_count(rollout.ended),
        "tokens": int(rollout.sequences.attention_mask.sum()),
    }


def evaluate(
    policy: Policy,
    ref_policy: Policy,
    reward: RewardFunction,
    prompts: Sequence[PromptExample],
    config: RolloutConfig,
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
