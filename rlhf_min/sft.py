"""Supervised fine-tuning: imitate demonstrations, on response tokens and EOS only."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

from .config import SFTConfig
from .data import Cursor, SFTExample, collate
from .losses import SFTLoss, sft_loss
from .optim import Optimizer, State, accumulate, adamw, dropout_rng
from .policy import Policy, evaluating


def new_state(policy: Policy, examples: Sequence[SFTExample], config: SFTConfig) -> State:
    """The state before the first step.

    Raises:
        BadInput: if the model has no room for an example.
    """
    policy.require_room((x.prompt_ids, x.response_ids) for x in examples)
    cursor = Cursor(examples, seed=config.seed)
    return State(adamw(policy, config, total(cursor, config)), cursor)


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
        ``learning_rate``, ``epoch``, ``tokens`` of prompts and responses, and every
        `config.eval_every` steps ``eval/loss`` and ``eval/perplexity`` of `heldout`.

    Raises:
        NonFinite: before the optimizer step that would have used a number that is not finite.
    """
    policy.require_room((x.prompt_ids, x.response_ids) for x in heldout)
    total_steps = total(state.cursor, config)
    while state.step < total_steps:
        policy.train()
        learning_rate = state.optimizer.learning_rate
        batch = state.cursor.take(config.batch_size)
        dropout = partial(dropout_rng, config.seed, state.step, policy.device)
        metrics = means(policy, batch, config, state.optimizer, dropout=dropout)
        metrics["grad_norm"] = state.optimizer.step(batch, metrics)
        state.step += 1
        metrics |= {
            "learning_rate": learning_rate,
            "epoch": state.cursor.epochs,
            "tokens": sum(map(_length, batch)),
        }
        if heldout and (state.step % config.eval_every == 0 or state.step == total_steps):
            with state.optimizer.autocast():
                metrics |= evaluate(policy, heldout, config)
        yield metrics


def evaluate(policy: Policy, heldout: Sequence[SFTExample], config: SFTConfig) -> dict[str, float]:
    """Loss and perplexity per response token, without dropout."""
    with evaluating(policy):
        loss = means(policy, heldout, config)["loss"]
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}


def means(
    policy: Policy,
    examples: Sequence[SFTExample],
    config: SFTConfig,
    optimizer: Optimizer | None = None,
    dropout: Callable[[int], AbstractContextManager[None]] | None = None,
) -> dict[str, float]:
    """Loss per response token of a whole batch; its gradient too, if there is an optimizer."""
    return accumulate(
        partial(batch_loss, policy),
        examples,
        total=sum(len(x.response_ids) for x in examples),
        length=_length,
        max_tokens=config.max_tokens,
        optimizer=optimizer,
        dropout=dropout,
    )


def _length(example: SFTExample) -> int:
    return len(example.prompt_ids) + len(example.response_ids)
