"""Supervised fine-tuning: imitate demonstrations, on response tokens and EOS only."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .config import (
    option,
    require_choices,
    require_not_negative,
    require_positive,
    require_seed,
    require_share,
)
from .data import Cursor, SFTExample, collate, in_groups
from .losses import SFTLoss, sft_loss
from .optim import OnNonFinite, Precision, Schedule, State, adamw, dropout_rng
from .policy import Policy, evaluating


@dataclass(frozen=True)
class SFTConfig:
    """Options of supervised fine-tuning. Defaults suit the small models of the embedded world."""

    trains: ClassVar = "model"
    pretrained: ClassVar = {
        "learning_rate": (2e-5, "Alpaca, Taori et al. 2023"),
        "warmup_share": (0.03, "Alpaca"),
        "weight_decay": (0.0, "Alpaca"),
    }
    epochs: int = option(3, "Passes over the demonstrations.")
    batch_size: int = option(32, "Demonstrations for each optimizer step.")
    learning_rate: float = option(1.5e-3, "AdamW's rate after warm-up.")
    schedule: Schedule = option("cosine", "How the rate falls after warm-up.")
    warmup_share: float = option(0.1, "Share of the steps in which the rate rises from 0.")
    weight_decay: float = option(0.01, "AdamW's decay of matrices.")
    max_grad_norm: float | None = option(1.0, "Gradients longer than this are scaled down to it.")
    max_tokens: int = option(1024, "Padded tokens in one forward pass; memory only.")
    precision: Precision = option("fp32", "Of forward passes, by autocast; weights stay fp32.")
    on_nonfinite: OnNonFinite = option(
        "stop", "At a number that is not finite: stop, or skip the step, 20 in a row at most."
    )
    eval_every: int = option(100, "Steps between looks at the held-out demonstrations.")
    seed: int = option(0, "Order of the data.")

    def __post_init__(self) -> None:
        require_positive(self, "epochs", "batch_size", "learning_rate", "max_grad_norm")
        require_positive(self, "max_tokens", "eval_every")
        require_not_negative(self, "weight_decay")
        require_seed(self, "seed")
        require_choices(self)
        require_share(self, "warmup_share")


def new_state(policy: Policy, examples: Sequence[SFTExample], config: SFTConfig) -> State:
    """The state before the first step.

    Raises:
        BadInput: if the model has no room for an example.
    """
    policy.require_room((x.prompt_ids, x.response_ids) for x in examples)
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
    return State(optimizer, cursor)


def total(cursor: Cursor, config: SFTConfig) -> int:
    """Optimizer steps in the whole run."""
    return config.epochs * cursor.batches_per_epoch(config.batch_size)


def batch_loss(policy: Policy, examples: Sequence[SFTExample]) -> SFTLoss:
    """Loss on the responses of one micro-batch."""
    batch = collate(
        [x.prompt_ids for x in examples], [x.response_ids for x in examples], pad_id=policy.pad_id
    ).to(policy.device)
    return sft_loss(policy(batch).logprobs, batch.mask)


def train(
    policy: Policy,
    config: SFTConfig,
    state: State,
    *,
    heldout: Sequence[SFTExample] = (),
) -> Iterator[dict[str, float]]:
    """One optimizer step per yield, until the epochs are over. The examples are the cursor's.

    Yields:
        ``loss`` in nats per response token over the whole batch, ``grad_norm``,
        ``learning_rate``, ``skipped`` steps so far, and now and then ``eval/loss`` and
        ``eval/perplexity`` of `heldout`.

    Raises:
        NonFinite: before the optimizer step that would have used a number that is not finite.
    """
    policy.require_room((x.prompt_ids, x.response_ids) for x in heldout)
    total_steps = total(state.cursor, config)
    while state.step < total_steps:
        policy.train()
        started = time.perf_counter()
        learning_rate = state.optimizer.learning_rate
        batch = state.cursor.take(config.batch_size)
        tokens = sum(len(x.response_ids) for x in batch)
        loss_sum = 0.0
        with dropout_rng(config.seed, state.step, policy.device):
            for part in in_groups(batch, _length, max_tokens=config.max_tokens):
                with state.optimizer.autocast():
                    loss, count = batch_loss(policy, part)
                state.optimizer.backward(loss * count / tokens)
                loss_sum += float(loss.detach() * count)
        alone = (batch_loss(policy, [x])._asdict() for x in batch)
        state.optimizer.check({"loss": loss_sum}, enumerate(alone))
        grad_norm = state.optimizer.step(batch)
        state.step += 1
        seconds = time.perf_counter() - started
        metrics = {
            "loss": loss_sum / tokens,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped": state.optimizer.skipped,
            "epoch": state.cursor.epoch + state.cursor.position / len(state.cursor.examples),
            "time/seconds": seconds,
            "time/tokens_per_second": sum(map(_length, batch)) / seconds,
        }
        if heldout and (state.step % config.eval_every == 0 or state.step == total_steps):
            with state.optimizer.autocast():
                metrics |= evaluate(policy, heldout, max_tokens=config.max_tokens)
        yield metrics


def evaluate(policy: Policy, heldout: Sequence[SFTExample], *, max_tokens: int) -> dict[str, float]:
    """Loss and perplexity per response token, without dropout."""
    loss_sum, tokens = 0.0, 0
    with evaluating(policy):
        for part in in_groups(heldout, _length, max_tokens=max_tokens):
            loss, count = batch_loss(policy, part)
            loss_sum, tokens = loss_sum + float(loss * count), tokens + int(count)
    mean = loss_sum / tokens
    return {"eval/loss": mean, "eval/perplexity": math.exp(min(mean, 700.0))}


def _length(example: SFTExample) -> int:
    return len(example.prompt_ids) + len(example.response_ids)
