"""Direct preference optimization: learn from preference pairs without a reward model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from .config import DPOConfig
from .data import Cursor, PreferenceExample, collate, in_groups
from .optim import Optimizer, State, accumulate, adamw
from .policy import Policy, disable_dropout, evaluating
from .preference_losses import dpo_loss


def new_state(
    policy: Policy, ref_policy: Policy, examples: Sequence[PreferenceExample], config: DPOConfig
) -> State:
    """The state before the first step, with the reference's log-probabilities if they are cached.

    Dropout is switched off in the policy: it would make policy and reference differ at the start.

    Raises:
        BadInput: if the model has no room for a pair.
    """
    _require_room(policy, examples)
    disable_dropout(policy)
    cursor = Cursor(examples, seed=config.seed)
    optimizer = adamw(policy, config, total(cursor, config))
    if config.cache_reference:
        with optimizer.autocast():  # in the policy's precision, or the two would differ at step 0
            cursor.examples = cache_reference(ref_policy, examples, max_tokens=config.max_tokens)
    return State(optimizer, cursor)


def total(cursor: Cursor, config: DPOConfig) -> int:
    """Optimizer steps in the whole run."""
    return config.epochs * cursor.batches_per_epoch(config.batch_size)


def first_loss(_config: DPOConfig) -> tuple[float, str]:
    """The loss while policy and reference are the same, and what that number is called.

    Both margins are 0 then, and -log sigmoid(0) is ln 2 with any `beta` and `label_smoothing`.
    """
    return math.log(2), "ln 2"


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
    gradient. The changes are those since step 0, when the policy was the reference."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here
    chosen_logprobs: Tensor
    rejected_logprobs: Tensor
    chosen_logprobs_change: Tensor
    rejected_logprobs_change: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margin: Tensor
    accuracy: Tensor


def batch_loss(
    policy: Policy, ref_policy: Policy, examples: Sequence[PreferenceExample], config: DPOConfig
) -> PairsLoss:
    """Loss of one micro-batch of pairs, and what is worth logging of each pair."""
    chosen, rejected = response_logprobs(policy, examples)
    ref_chosen, ref_rejected = _reference(ref_policy, examples, like=chosen)
    found = dpo_loss(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
    )
    return PairsLoss(
        loss=found.loss,
        count=found.count,
        chosen_logprobs=chosen.detach(),
        rejected_logprobs=rejected.detach(),
        chosen_logprobs_change=(chosen - ref_chosen).detach(),
        rejected_logprobs_change=(rejected - ref_rejected).detach(),
        chosen_rewards=found.chosen_rewards,
        rejected_rewards=found.rejected_rewards,
        margin=found.chosen_rewards - found.rejected_rewards,
        accuracy=(found.chosen_rewards > found.rejected_rewards).to(chosen.dtype),
    )


def train(
    policy: Policy,
    ref_policy: Policy,
    config: DPOConfig,
    state: State,
    *,
    heldout: Sequence[PreferenceExample] = (),
) -> Iterator[dict[str, float]]:
    """One optimizer step per yield, until the epochs are over. The pairs are the cursor's.

    Yields:
        The means of `PairsLoss` over all pairs of the batch, before the step; ``grad_norm``,
        ``learning_rate``, ``epoch``, ``tokens``; every `config.eval_every` steps the same means of
        `heldout` under ``eval/``.

    Raises:
        NonFinite: before the optimizer step that would have used a number that is not finite.
    """
    _require_room(policy, heldout)
    total_steps = total(state.cursor, config)
    if config.cache_reference and heldout:
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
    policy: Policy, ref_policy: Policy, heldout: Sequence[PreferenceExample], config: DPOConfig
) -> dict[str, float]:
    """The means of `PairsLoss` over held-out pairs, under ``eval/``."""
    with evaluating(policy):
        metrics = means(policy, ref_policy, heldout, config)
    return {f"eval/{name}": value for name, value in metrics.items()}


def means(
    policy: Policy,
    ref_policy: Policy,
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
    cached: dict[int, PreferenceExample] = {}
    for part in in_groups(
        list(enumerate(examples)), lambda x: _length(x[1]), max_tokens=max_tokens
    ):
        with evaluating(ref_policy):
            chosen, rejected = response_logprobs(ref_policy, [example for _, example in part])
        for (i, example), c, r in zip(part, chosen.tolist(), rejected.tolist(), strict=True):
            cached[i] = replace(example, ref_logprobs=(c, r))
    return [cached[i] for i in range(len(examples))]


def _reference(
    ref_policy: Policy, examples: Sequence[PreferenceExample], *, like: Tensor
) -> tuple[Tensor, Tensor]:
    cached = [x.ref_logprobs for x in examples if x.ref_logprobs is not None]
    if len(cached) == len(examples):
        chosen, rejected = like.new_tensor(cached).unbind(1)
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
