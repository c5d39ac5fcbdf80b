"""Direct preference optimization: learn from preference pairs without a reward model."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from .config import (
    option,
    require_choices,
    require_not_negative,
    require_positive,
    require_seed,
    require_share,
)
from .data import Cursor, PreferenceExample, collate, in_groups
from .errors import require
from .losses import DPOLoss, dpo_loss
from .optim import OnNonFinite, Precision, Schedule, State, adamw
from .policy import Policy, disable_dropout, evaluating


@dataclass(frozen=True)
class DPOConfig:
    """Options of DPO. Defaults suit the small models of the embedded world."""

    trains: ClassVar = "model"
    pretrained: ClassVar = {
        "learning_rate": (1e-6, "Rafailov et al. 2023"),
        "beta": (0.1, "Rafailov et al. 2023"),
    }
    epochs: int = option(1, "Passes over the preference pairs.")
    batch_size: int = option(64, "Pairs for each optimizer step.")
    learning_rate: float = option(1e-4, "AdamW's rate after warm-up.")
    schedule: Schedule = option("linear", "How the rate falls after warm-up.")
    warmup_share: float = option(0.1, "Share of the steps in which the rate rises from 0.")
    weight_decay: float = option(0.0, "AdamW's decay of matrices.")
    max_grad_norm: float | None = option(1.0, "Gradients longer than this are scaled down to it.")
    beta: float = option(0.3, "DPO's temperature; larger keeps the policy nearer the reference.")
    label_smoothing: float = option(0.0, "Assumed share of flipped labels, below 0.5.")
    cache_reference: bool = option(True, "Score the reference once, before training.")
    max_tokens: int = option(1024, "Padded tokens in one forward pass; memory only.")
    precision: Precision = option("fp32", "Of forward passes, by autocast; weights stay fp32.")
    on_nonfinite: OnNonFinite = option(
        "stop", "At a number that is not finite: stop, or skip the step, 20 in a row at most."
    )
    eval_every: int = option(25, "Steps between looks at the held-out pairs.")
    seed: int = option(0, "Order of the data.")

    def __post_init__(self) -> None:
        require_positive(self, "epochs", "batch_size", "learning_rate", "max_grad_norm")
        require_positive(self, "beta", "max_tokens", "eval_every")
        require_not_negative(self, "weight_decay")
        require_seed(self, "seed")
        require_choices(self)
        require_share(self, "warmup_share")
        require(
            0 <= self.label_smoothing < 0.5,
            f"DPOConfig: label_smoothing is {self.label_smoothing}; it must be in [0, 0.5)",
        )


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
    total_steps = total(cursor, config)
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
    )
    if config.cache_reference:
        with optimizer.autocast():  # in the policy's precision, or the two would differ at step 0
            cursor.examples = cache_reference(ref_policy, examples, max_tokens=config.max_tokens)
    return State(optimizer, cursor)


def total(cursor: Cursor, config: DPOConfig) -> int:
    """Optimizer steps in the whole run."""
    return config.epochs * cursor.batches_per_epoch(config.batch_size)


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


def batch_loss(
    policy: Policy, ref_policy: Policy, examples: Sequence[PreferenceExample], config: DPOConfig
) -> tuple[DPOLoss, dict[str, Tensor]]:
    """Loss of one micro-batch of pairs, and what is worth logging of each pair, ``(B,)`` each."""
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
    return found, {
        "chosen_logprobs": chosen.detach(),
        "rejected_logprobs": rejected.detach(),
        # The reference is the policy of step 0, so these are the changes since then.
        "chosen_logprobs_change": (chosen - ref_chosen).detach(),
        "rejected_logprobs_change": (rejected - ref_rejected).detach(),
        "chosen_rewards": found.chosen_rewards,
        "rejected_rewards": found.rejected_rewards,
        "margin": found.chosen_rewards - found.rejected_rewards,
        "accuracy": (found.chosen_rewards > found.rejected_rewards).to(chosen.dtype),
    }


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
        ``loss``, ``accuracy`` and ``margin`` of the implicit rewards, both rewards, both summed
        log-probabilities and their change since step 0, ``grad_norm``, ``learning_rate``,
        ``skipped`` steps so far; now and then the same of `heldout` under ``eval/``. Means over
        all pairs of the batch, before the step.

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
        started = time.perf_counter()
        learning_rate = state.optimizer.learning_rate
        batch = state.cursor.take(config.batch_size)
        metrics: dict[str, float] = {}
        for part in in_groups(batch, _length, max_tokens=config.max_tokens):
            with state.optimizer.autocast():
                found, per_pair = batch_loss(policy, ref_policy, part, config)
            state.optimizer.backward(found.loss * found.count / len(batch))
            _add_means(metrics, found.loss.detach(), per_pair, len(batch))
        alone = (batch_loss(policy, ref_policy, [x], config)[1] for x in batch)
        state.optimizer.check(metrics, enumerate(alone))
        metrics["grad_norm"] = state.optimizer.step(batch)
        state.step += 1
        seconds = time.perf_counter() - started
        metrics |= {
            "learning_rate": learning_rate,
            "skipped": state.optimizer.skipped,
            "epoch": state.cursor.epoch + state.cursor.position / len(state.cursor.examples),
            "time/seconds": seconds,
            "time/tokens_per_second": sum(map(_length, batch)) / seconds,
        }
        if heldout and (state.step % config.eval_every == 0 or state.step == total_steps):
            with state.optimizer.autocast():
                metrics |= evaluate(policy, ref_policy, heldout, config)
        yield metrics


def evaluate(
    policy: Policy, ref_policy: Policy, heldout: Sequence[PreferenceExample], config: DPOConfig
) -> dict[str, float]:
    """The metrics of `batch_loss` over held-out pairs, under ``eval/``."""
    metrics: dict[str, float] = {}
    with evaluating(policy):
        for part in in_groups(heldout, _length, max_tokens=config.max_tokens):
            found, per_pair = batch_loss(policy, ref_policy, part, config)
            _add_means(metrics, found.loss, per_pair, len(heldout))
    return {f"eval/{name}": value for name, value in metrics.items()}


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


def _add_means(
    metrics: dict[str, float], loss: Tensor, per_pair: dict[str, Tensor], pairs: int
) -> None:
    n = len(per_pair["margin"])
    metrics["loss"] = metrics.get("loss", 0.0) + float(loss) * n / pairs
    for name, values in per_pair.items():
        metrics[name] = metrics.get(name, 0.0) + float(values.sum()) / pairs


def _require_room(policy: Policy, examples: Sequence[PreferenceExample]) -> None:
    policy.require_room((x.prompt_ids, x.chosen_ids) for x in examples)
    policy.require_room((x.prompt_ids, x.rejected_ids) for x in examples)


def _length(example: PreferenceExample) -> int:
    # Of the pair's two rows together, each padded to the longer one.
    longer = max(len(example.chosen_ids), len(example.rejected_ids))
    return 2 * (len(example.prompt_ids) + longer)
