"""Kahneman-Tversky optimization: learn from single responses, each labelled good or bad."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from . import distributed
from .config import KTOConfig
from .data import Cursor, SFTExample, UnpairedExample, collate, in_groups, micro_batches
from .errors import BadInput, require
from .optim import Optimizer, State, accumulate, adamw
from .policy import Policy, disable_dropout, evaluating
from .preference_losses import kto_kl, kto_loss

Row = SFTExample | UnpairedExample


def new_state(
    policy: Policy, ref_policy: Policy, examples: Sequence[UnpairedExample], config: KTOConfig
) -> State:
    """The state before the first step, with the reference's log-probabilities if they are cached.

    Those of mismatched pairs are not: each epoch has others, and each is needed once.
    Dropout is switched off in the policy: it would make policy and reference differ at the start.

    Raises:
        BadInput: if the model has no room for a row, or a batch of one row would be left over.
    """
    _require_room(policy, examples, config)
    disable_dropout(policy)
    cursor = Cursor(examples, seed=config.seed)
    _require_no_single_row(len(examples), config)
    optimizer = adamw(policy, config, total(cursor, config))
    if config.cache_reference:
        with optimizer.autocast():  # in the policy's precision, or the two would differ at step 0
            cursor.examples = cache_reference(ref_policy, examples, max_tokens=config.max_tokens)
    return State(optimizer, cursor)


def total(cursor: Cursor, config: KTOConfig) -> int:
    """Optimizer steps in the whole run."""
    return config.epochs * cursor.batches_per_epoch(config.batch_size)


def first_loss(examples: Sequence[UnpairedExample], config: KTOConfig) -> float:
    """What the loss of these rows is while policy and reference are the same: half their mean
    weight, since all rewards and the KL are 0 then, and sigmoid(0) is 1/2 with any `beta`."""
    weights = [config.desirable_weight if x.label else config.undesirable_weight for x in examples]
    return sum(weights) / len(weights) / 2


def weight_ratio(examples: Sequence[UnpairedExample], config: KTOConfig) -> float:
    r"""How much the desirable rows weigh together, beside the undesirable ones.  [eq:kto_weights]

        weight_D n_D / (weight_U n_U)                                              (1)

    The authors recommend 1 to 4/3. Infinite if no row weighs anything on the other side.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8; trl ``KTOTrainer`` warns beyond it.
    """
    desirable = sum(x.label for x in examples) * config.desirable_weight
    undesirable = sum(not x.label for x in examples) * config.undesirable_weight
    return desirable / undesirable if undesirable > 0 else float("inf")  # (1)


def mismatched(examples: Sequence[UnpairedExample]) -> list[SFTExample]:
    """Each prompt with the response of another row: the responses are rotated within the batch.

    By one, unless a prompt would meet a response of its own: then by the fewest places at which
    that happens most rarely. Pairs that were taken apart in their order are rotated by two, so.

    Raises:
        BadInput: for a single row, whose response could only meet its own prompt.
    """
    n = len(examples)
    require(n > 1, "KTO's KL takes the response of another row, and the batch has one row only")
    prompts = [tuple(x.prompt_ids.tolist()) for x in examples]

    def meetings(places: int) -> int:
        return sum(prompts[row] == prompts[row - places] for row in range(n))

    none = (places for places in range(1, n) if meetings(places) == 0)
    places = next(none, None) or min(range(1, n), key=meetings)
    return [
        SFTExample(x.prompt_ids, examples[row - places].response_ids)  # row - 1 < 0 is the last
        for row, x in enumerate(examples)
    ]


def reference_point(
    policy: Policy, ref_policy: Policy, examples: Sequence[UnpairedExample], config: KTOConfig
) -> Tensor:
    """The reference point z of a whole batch, in nats, on the policy's device. Shape ``()``."""
    if config.loss == "apo_zero_unpaired":
        return torch.zeros((), dtype=torch.float32, device=policy.device)
    groups = in_groups(
        mismatched(examples), _length, max_tokens=config.max_tokens, among=distributed.size()
    )
    sums = []
    for model in (policy, ref_policy):
        with evaluating(model):
            found = distributed.deal(partial(response_logprobs, model), groups)
        sums.append(torch.cat(found).to(policy.device))  # (B,)
    return kto_kl(*sums)


def response_logprobs(policy: Policy, examples: Sequence[Row]) -> Tensor:
    """Summed log-probabilities of the responses. ``(B,)``."""
    batch = collate(
        [x.prompt_ids for x in examples], [x.response_ids for x in examples], pad_id=policy.pad_id
    )
    return policy(batch).logprobs.sum(1)  # 0 at padding


class RowsLoss(NamedTuple):
    """`loss` is a mean over `count` rows; all else has a number for each row, ``(B,)``, without
    gradient: 0 where a row has the other label."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here
    desirable_logprobs: Tensor
    undesirable_logprobs: Tensor
    desirable_rewards: Tensor
    undesirable_rewards: Tensor
    accuracy: Tensor


def batch_loss(
    policy: Policy,
    ref_policy: Policy,
    examples: Sequence[UnpairedExample],
    kl: Tensor,
    config: KTOConfig,
) -> RowsLoss:
    """Loss of one micro-batch, and what is worth logging of each row.

    Args:
        kl: the reference point of the whole batch, in nats. Shape ``()``.
    """
    logprobs = response_logprobs(policy, examples)
    labels = torch.tensor([x.label for x in examples], dtype=torch.bool, device=logprobs.device)
    found = kto_loss(
        logprobs,
        _reference(ref_policy, examples, like=logprobs),
        labels,
        kl,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    above = found.rewards - config.beta * kl  # the reference point
    return RowsLoss(
        loss=found.loss,
        count=found.count,
        desirable_logprobs=torch.where(labels, logprobs.detach(), 0),
        undesirable_logprobs=torch.where(labels, 0, logprobs.detach()),
        desirable_rewards=torch.where(labels, found.rewards, 0),
        undesirable_rewards=torch.where(labels, 0, found.rewards),
        accuracy=torch.where(labels, above > 0, above < 0).to(logprobs.dtype),
    )


def train(
    policy: Policy,
    ref_policy: Policy,
    config: KTOConfig,
    state: State,
    *,
    heldout: Sequence[UnpairedExample] = (),
) -> Iterator[dict[str, float]]:
    """One optimizer step per yield, until the epochs are over. The rows are the cursor's.

    Yields:
        What `means` returns of the batch, before the step; ``grad_norm``, ``learning_rate``,
        ``epoch``, ``tokens`` of prompts and responses; every `config.eval_every` steps the same
        means of `heldout`, taken as one batch, under ``eval/``.

    Raises:
        NonFinite: before the optimizer step that would have used a number that is not finite.
    """
    _require_room(policy, heldout, config)
    check_heldout(heldout, config)
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
    policy: Policy, ref_policy: Policy, heldout: Sequence[UnpairedExample], config: KTOConfig
) -> dict[str, float]:
    """What `means` returns of held-out rows, under ``eval/``."""
    with evaluating(policy):
        metrics = means(policy, ref_policy, heldout, config)
    return {f"eval/{name}": value for name, value in metrics.items()}


def check_heldout(heldout: Sequence[UnpairedExample], config: KTOConfig) -> None:
    """Raise `BadInput` for a single row, which has no mismatched pair."""
    require(
        len(heldout) != 1 or config.loss != "kto",
        "KTO's KL takes the response of another row, and one row is held out; hold out two or more",
    )


def means(
    policy: Policy,
    ref_policy: Policy,
    examples: Sequence[UnpairedExample],
    config: KTOConfig,
    optimizer: Optimizer | None = None,
) -> dict[str, float]:
    """Loss and metrics of a whole batch; its gradient too, if there is an optimizer.

    ``kl`` is the reference point and ``accuracy`` the share of rows on their side of it. Rewards
    and log-probabilities are means over the rows of one label, and are left out where there is no
    such row; ``margin`` is the difference of the two rewards.
    """
    # Of the whole batch and before any gradient, so that micro-batches cannot change it.
    with contextlib.nullcontext() if optimizer is None else optimizer.autocast():
        kl = reference_point(policy, ref_policy, examples, config)
    metrics = accumulate(
        lambda part: batch_loss(policy, ref_policy, part, kl, config),
        examples,
        total=len(examples),
        length=_length,
        max_tokens=config.max_tokens,
        optimizer=optimizer,
    )
    n_desirable = sum(x.label for x in examples)
    for label, n in (("desirable", n_desirable), ("undesirable", len(examples) - n_desirable)):
        for name in (f"{label}_rewards", f"{label}_logprobs"):
            mean = metrics.pop(name) * len(examples)
            if n > 0:
                metrics[name] = mean / n
    if 0 < n_desirable < len(examples):
        metrics["margin"] = metrics["desirable_rewards"] - metrics["undesirable_rewards"]
    return metrics | {"kl": float(kl)}


def cache_reference(
    ref_policy: Policy, examples: Sequence[UnpairedExample], *, max_tokens: int
) -> list[UnpairedExample]:
    """The same rows with the reference's log-probabilities, which never change, written in."""
    lengths = [_length(example) for example in examples]
    groups = micro_batches(lengths, max_tokens=max_tokens, among=distributed.size())
    logprobs = torch.empty(len(examples), dtype=torch.float64)
    with evaluating(ref_policy):
        found = distributed.deal(
            lambda rows: response_logprobs(ref_policy, [examples[i] for i in rows]), groups
        )
    for rows, sums in zip(groups, found, strict=True):
        logprobs[rows] = sums.cpu().double()  # (b,)
    rows_and_logprobs = zip(examples, logprobs.tolist(), strict=True)
    return [replace(example, ref_logprob=logprob) for example, logprob in rows_and_logprobs]


def _reference(ref_policy: Policy, examples: Sequence[UnpairedExample], *, like: Tensor) -> Tensor:
    cached = [x.ref_logprob for x in examples if x.ref_logprob is not None]
    if len(cached) == len(examples):
        return like.new_tensor(cached)
    with evaluating(ref_policy):
        return response_logprobs(ref_policy, examples).to(like.device)


def _require_room(policy: Policy, examples: Sequence[UnpairedExample], config: KTOConfig) -> None:
    policy.require_room((x.prompt_ids, x.response_ids) for x in examples)
    if config.loss == "kto" and len(examples) > 0:  # any prompt may meet any response
        prompt = max(len(x.prompt_ids) for x in examples)
        response = max(len(x.response_ids) for x in examples)
        require(
            prompt + response <= policy.positions,
            f"the longest prompt, {prompt} tokens, and the longest response, {response}, do not "
            f"fit into {policy.positions} positions together, and KTO's KL may take them together; "
            "shorten the rows (of a Codec: max_prompt_tokens, max_response_tokens)",
        )


def _require_no_single_row(n: int, config: KTOConfig) -> None:
    if config.loss == "kto" and n % config.batch_size == 1:
        require(n > 1, "KTO's KL takes the response of another row, and there is one only")
        other = next(k for k in count(config.batch_size + 1) if n % k != 1)
        raise BadInput(
            f"{n} rows in batches of {config.batch_size} leave a batch of one, and KTO's KL takes "
            f"the response of another row; give another batch_size, such as {other}"
        )


def _length(example: Row) -> int:
    return len(example.prompt_ids) + len(example.response_ids)
