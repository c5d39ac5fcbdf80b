"""Direct preference optimization and its family: learn from pairs without a reward model."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import distributed
from .config import DPOConfig
from .data import Cursor, PreferenceExample, collate, micro_batches
from .errors import require
from .optim import Optimizer, State, accumulate, adamw
from .policy import Policy, disable_dropout, evaluating
from .preference_losses import (
    PreferenceLoss,
    apo_down_loss,
    apo_zero_loss,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    orpo_loss,
    robust_loss,
    sft_term,
    simpo_loss,
)


def new_state(
    policy: Policy,
    ref_policy: Policy | None,
    examples: Sequence[PreferenceExample],
    config: DPOConfig,
) -> State:
    """The state before the first step, with the reference's log-probabilities if they are cached.

    Dropout is switched off in the policy: it would make policy and reference differ at the start.

    Args:
        ref_policy: None for a loss without a reference. If something is cached then, it is of the
            policy as it is now, and serves to see how far it gets.

    Raises:
        BadInput: if the model has no room for a pair, or the loss lacks its reference.
    """
    require(
        ref_policy is not None or config.reference_free,
        f"DPO with loss {config.loss} compares with a reference; give ref_policy",
    )
    _require_room(policy, examples)
    disable_dropout(policy)
    cursor = Cursor(examples, seed=config.seed)
    optimizer = adamw(policy, config, total(cursor, config))
    if config.cache_reference:
        with optimizer.autocast():  # in the policy's precision, or the two would differ at step 0
            start = policy if ref_policy is None else ref_policy
            cursor.examples = cache_reference(start, examples, max_tokens=config.max_tokens)
    return State(optimizer, cursor)


def total(cursor: Cursor, config: DPOConfig) -> int:
    """Optimizer steps in the whole run."""
    return config.epochs * cursor.batches_per_epoch(config.batch_size)


def preference_loss(config: DPOConfig, *logprobs: Tensor) -> PreferenceLoss:
    """The loss that the config chooses.

    Args:
        logprobs: of chosen and rejected responses, then those of the reference, if the loss takes
            any. Sums or means per token. Shape ``(B,)`` each.
    """
    beta = config.beta
    match config.loss:
        case "sigmoid":
            return dpo_loss(*logprobs, beta=beta, label_smoothing=config.label_smoothing)
        case "ipo":
            return ipo_loss(*logprobs, beta=beta)
        case "hinge":
            return hinge_loss(*logprobs, beta=beta)
        case "robust":
            return robust_loss(*logprobs, beta=beta, label_smoothing=config.label_smoothing)
        case "apo_zero":
            return apo_zero_loss(*logprobs, beta=beta)
        case "apo_down":
            return apo_down_loss(*logprobs, beta=beta)
        case "simpo":
            return simpo_loss(*logprobs, beta=beta, gamma=config.simpo_gamma)
        case "orpo":
            return orpo_loss(*logprobs, beta=beta)
        case "cpo":
            return cpo_loss(*logprobs, beta=beta)


def first_loss(config: DPOConfig, *, off: float = 0.0) -> float:
    """What `preference_loss` is before the first step, whatever the pairs are.

    Policy and reference are the same then. Without a reference it is so for a response beside
    itself.

    Args:
        off: nats by which the log-probability of the chosen response is too low.
    """
    equal = torch.full((1,), -1.0, dtype=torch.float64)
    others = [equal] * (1 if config.reference_free else 3)
    return float(preference_loss(config, equal - off, *others).loss)


def response_logprobs(
    policy: Policy, examples: Sequence[PreferenceExample]
) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of the chosen and of the rejected responses. ``(B,)`` each."""
    batch = collate(
        [x.prompt_ids for x in examples] * 2,
        [x.chosen_ids for x in examples] + [x.rejected_ids for x in examples],
        pad_id=policy.pad_id,
    )
    chosen, rejected = policy(batch).logprobs.sum(1).split(len(examples))  # 0 at padding
    return chosen, rejected


class PairsLoss(NamedTuple):
    """`loss` is a mean over `count` pairs; all else has a number for each pair, ``(B,)``, without
    gradient. Log-probabilities are sums over a response, and their changes those since step 0, when
    the policy was the reference: None if nobody knows them. `sft_loss` is `sft_term`."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here
    chosen_logprobs: Tensor
    rejected_logprobs: Tensor
    chosen_logprobs_change: Tensor | None
    rejected_logprobs_change: Tensor | None
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margin: Tensor
    accuracy: Tensor
    sft_loss: Tensor


def batch_loss(
    policy: Policy,
    ref_policy: Policy | None,
    examples: Sequence[PreferenceExample],
    config: DPOConfig,
) -> PairsLoss:
    """Loss of one micro-batch of pairs, and what is worth logging of each pair."""
    chosen, rejected = sums = response_logprobs(policy, examples)
    asked = None if config.reference_free else ref_policy
    ref_sums = _reference(asked, examples, like=chosen)
    changes = [(now - then).detach() for now, then in zip(sums, ref_sums, strict=False)]
    lengths = chosen.new_tensor([(len(x.chosen_ids), len(x.rejected_ids)) for x in examples]).T

    logprobs = [*sums] if config.reference_free else [*sums, *ref_sums]
    if config.length_normalised:  # a mean per token, of chosen and rejected in turn
        logprobs = [x / lengths[i % 2] for i, x in enumerate(logprobs)]
    found = preference_loss(config, *logprobs)
    loss, sft_loss = found.loss, sft_term(chosen, lengths[0])
    if config.sft_coef:
        loss = loss + config.sft_coef * sft_loss.mean()
    return PairsLoss(
        loss=loss,
        count=found.count,
        chosen_logprobs=chosen.detach(),
        rejected_logprobs=rejected.detach(),
        chosen_logprobs_change=changes[0] if changes else None,
        rejected_logprobs_change=changes[1] if changes else None,
        chosen_rewards=found.chosen_rewards,
        rejected_rewards=found.rejected_rewards,
        margin=found.chosen_rewards - found.rejected_rewards,
        accuracy=(found.chosen_rewards > found.rejected_rewards).to(chosen.dtype),
        sft_loss=sft_loss.detach(),
    )


def train(
    policy: Policy,
    ref_policy: Policy | None,
    config: DPOConfig,
    state: State,
    *,
    heldout: Sequence[PreferenceExample] = (),
) -> Iterator[dict[str, float]]:
    """One optimizer step per yield, until the epochs are over. The pairs are the cursor's.

    Args:
        ref_policy: None for a loss without a reference.
        heldout: pairs to measure; without a reference the changes since step 0 are known of those
            only that went through `cache_reference` then.

    Yields:
        The means of `PairsLoss` over all pairs of the batch, before the step; ``grad_norm``,
        ``learning_rate``, ``epoch``, ``tokens``; every `config.eval_every` steps the same means of
        `heldout` under ``eval/``.

    Raises:
        NonFinite: before the optimizer step that would have used a number that is not finite.
    """
    _require_room(policy, heldout)
    total_steps = total(state.cursor, config)
    if config.cache_reference and heldout and ref_policy is not None:
        with state.optimizer.autocast():
            heldout = cache_reference(ref_policy, heldout, max_tokens=config.max_tokens)
    while state.step < total_steps:
        policy.train()  # for gradient checkpointing; there is no dropout, see `new_state`
        learning_rate = state.optimizer.learning_rate
        batch = state.cursor.take(config.batch_size)
        metrics = means(policy, ref_policy, batch, config, state.optimizer)
        metrics["grad_norm"] = state.optimizer.step(batch, metrics)
        state.step += 1
        metrics |= {
            "learning_rate": learning_rate,
            "epoch": state.cursor.epochs,
            "tokens": sum(map(_length, batch)),
        }
        if heldout and (state.step % config.eval_every == 0 or state.step == total_steps):
            with state.optimizer.autocast():
                metrics |= evaluate(policy, ref_policy, heldout, config)
        yield metrics


def evaluate(
    policy: Policy,
    ref_policy: Policy | None,
    heldout: Sequence[PreferenceExample],
    config: DPOConfig,
) -> dict[str, float]:
    """The means of `PairsLoss` over held-out pairs, under ``eval/``."""
    with evaluating(policy):
        metrics = means(policy, ref_policy, heldout, config)
    return {f"eval/{name}": value for name, value in metrics.items()}


def means(
    policy: Policy,
    ref_policy: Policy | None,
    examples: Sequence[PreferenceExample],
    config: DPOConfig,
    optimizer: Optimizer | None = None,
) -> dict[str, float]:
    """Loss and metrics of a whole batch; its gradient too, if there is an optimizer."""
    return accumulate(
        lambda part: batch_loss(policy, ref_policy, part, config),
        examples,
        total=len(examples),
        length=_length,
        max_tokens=config.max_tokens,
        optimizer=optimizer,
    )


def cache_reference(
    ref_policy: Policy, examples: Sequence[PreferenceExample], *, max_tokens: int
) -> list[PreferenceExample]:
    """The same pairs with the reference's log-probabilities, which never change, written in."""
    lengths = [_length(example) for example in examples]
    groups = micro_batches(lengths, max_tokens=max_tokens, among=distributed.size())
    logprobs = torch.empty(len(examples), 2, dtype=torch.float64)
    with evaluating(ref_policy):
        found = distributed.deal(
            lambda rows: response_logprobs(ref_policy, [examples[i] for i in rows]), groups
        )
    for rows, sums in zip(groups, found, strict=True):
        logprobs[rows] = torch.stack(sums, dim=1).cpu().double()  # (b, 2)
    pairs = zip(examples, logprobs.tolist(), strict=True)
    return [replace(example, ref_logprobs=(c, r)) for example, (c, r) in pairs]


def _reference(
    ref_policy: Policy | None, examples: Sequence[PreferenceExample], *, like: Tensor
) -> tuple[Tensor, ...]:
    # Of chosen and rejected, (B,) each; empty if there is neither a cache nor a reference.
    cached = [x.ref_logprobs for x in examples if x.ref_logprobs is not None]
    if len(cached) == len(examples):
        chosen, rejected = like.new_tensor(cached).unbind(1)
    elif ref_policy is None:
        return ()
    else:
        with evaluating(ref_policy):
            chosen, rejected = response_logprobs(ref_policy, examples)
    return chosen.to(like.device), rejected.to(like.device)


def _require_room(policy: Policy, examples: Sequence[PreferenceExample]) -> None:
    policy.require_room((x.prompt_ids, x.chosen_ids) for x in examples)
    policy.require_room((x.prompt_ids, x.rejected_ids) for x in examples)


def _length(example: PreferenceExample) -> int:
    # Of the pair's two rows together, each padded to the longer one.
    longer = max(len(example.chosen_ids), len(example.rejected_ids))
    return 2 * (len(example.prompt_ids) + longer)
