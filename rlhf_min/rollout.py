"""One rollout: prompts, sampled responses, and what policy, value head and reference gave them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .config import RolloutConfig, RolloutKL
from .data import PromptExample, Sequences, collate, micro_batches
from .kl import exact_kl, kl_estimate
from .loading.reward_function import RewardFunction, call_reward
from .policy import Policy, evaluating, scatter_tokens
from .sampling import sample


@dataclass(frozen=True)
class Rollout:
    """Responses and their scoring passes, aligned as drawn in ``data.py``.

    `prompts` and `responses` are texts (empty for given tokens), `sequences` their ids. `scores`
    (B,) is the reward of each whole response, `ended` (B,) whether it ended by EOS instead of being
    cut. `logprobs`, `ref_logprobs`, `kl`, `entropy` and `values` are (B, T), zero at padding;
    `values` is zero for a policy without critic. `columns` are the prompts' further columns;
    `seconds` says where the time went.
    """

    prompts: list[str]
    responses: list[str]
    sequences: Sequences
    scores: Tensor
    ended: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    entropy: Tensor
    values: Tensor
    columns: Sequence[Mapping[str, Any]] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor:
        """True at real response tokens. Shape ``(B, T)``."""
        return self.sequences.mask

    @property
    def lengths(self) -> Tensor:
        """Number of real response tokens. Shape ``(B,)``."""
        return self.mask.sum(1)


def collect(
    policy: Policy,
    ref_policy: Policy,
    reward: RewardFunction,
    prompts: Sequence[PromptExample],
    config: RolloutConfig,
    *,
    rng: torch.Generator,
    group_size: int = 1,
) -> Rollout:
    """Sample responses to each prompt, score them, and remember what everyone believed.

    Args:
        policy: samples, and gives log-probabilities and values.
        ref_policy: frozen.
        reward: any callable of texts, see `call_reward`.
        prompts: one for each group of rows.
        config: says the longest response, the temperature of sampling and of all
            log-probabilities, the estimate of the KL, and the tokens of a forward pass.
        rng: a CPU generator.
        group_size: responses to each prompt, G. Those of a group follow one another: row b is of
            group b // G.

    Returns:
        A `Rollout` without gradient, on the policy's device.
    """
    prompts = [prompt for prompt in prompts for _ in range(group_size)]
    started = time.perf_counter()
    prompt_ids = [prompt.ids for prompt in prompts]
    response_ids = sample(
        policy,
        prompt_ids,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        rng=rng,
    )
    sampled = time.perf_counter()
    texts = [prompt.text for prompt in prompts]
    responses = [policy.decode(ids) for ids in response_ids]
    columns = [prompt.columns for prompt in prompts]
    scores = call_reward(reward, texts, responses, columns)
    rollout = score_rollout(
        policy,
        ref_policy,
        prompt_ids,
        response_ids,
        scores,
        temperature=config.temperature,
        kl=config.kl,
        max_tokens=config.max_tokens,
    )
    seconds = {"sample": sampled - started, "score": time.perf_counter() - sampled}
    return replace(rollout, prompts=texts, responses=responses, columns=columns, seconds=seconds)


def score_rollout(
    policy: Policy,
    ref_policy: Policy,
    prompt_ids: Sequence[Tensor],
    response_ids: Sequence[Tensor],
    scores: Tensor,
    *,
    temperature: float,
    kl: RolloutKL,
    max_tokens: int,
) -> Rollout:
    """The scoring passes of policy and reference over given tokens.

    Args:
        prompt_ids: one ``(P_b,)`` tensor for each row.
        response_ids: one ``(T_b,)`` tensor for each row, at least one token long.
        scores: shape ``(B,)``.
        temperature, kl, max_tokens: as in `collect`.

    Raises:
        BadInput: if one of the models has no room for a row.
    """
    for model in (policy, ref_policy):
        model.require_room(zip(prompt_ids, response_ids, strict=True))
    sequences = collate(prompt_ids, response_ids, pad_id=policy.pad_id).to(policy.device)
    logprobs, ref_logprobs, kls, entropies, values = (
        torch.zeros(sequences.mask.shape, dtype=_at_least_float32(policy), device=policy.device)
        for _ in range(5)
    )
    eos_id = policy.tokenizer.eos_token_id
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True)]
    groups = micro_batches(lengths, max_tokens=max_tokens, among=distributed.size())
    score = partial(_score, policy, ref_policy, temperature=temperature, with_kl=kl == "full")
    with evaluating(policy, ref_policy):
        found = distributed.deal(lambda rows: score(sequences.select(rows)), groups)
    of_all = logprobs, ref_logprobs, entropies, values, kls  # (B, T) each
    for rows, of_rows in zip(groups, found, strict=True):
        for whole, part in zip(of_all, of_rows, strict=True):
            if part is not None:  # (b, t)
                whole[rows, : part.shape[1]] = part.to(policy.device)
    if kl != "full":
        kls = kl_estimate(logprobs, ref_logprobs, kind=kl)
    return Rollout(
        prompts=[],
        responses=[],
        sequences=sequences,
        scores=scores.to(logprobs.dtype).to(policy.device),
        ended=torch.tensor([bool(ids[-1] == eos_id) for ids in response_ids]).to(policy.device),
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        kl=kls,
        entropy=entropies,
        values=values,
    )


def _score(
    policy: Policy, ref_policy: Policy, rows: Sequences, *, temperature: float, with_kl: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What both give for these rows: log-probabilities, those of the reference, entropy, values if
    there are any, and the exact KL if asked for. ``(b, t)`` each."""
    output = policy(rows, temperature=temperature, with_logits=with_kl)
    ref_output = ref_policy(rows, temperature=temperature, with_logits=with_kl)
    kl = None
    if output.logits is not None and ref_output.logits is not None:
        per_token = exact_kl(output.logits, ref_output.logits.to(policy.device))  # (N,)
        kl = scatter_tokens(per_token, rows.mask)
    return output.logprobs, ref_output.logprobs, output.entropy, output.values, kl


@dataclass(frozen=True)
class RolloutBuffer:
    """A judged rollout, ready to be learned from in minibatches.

    `rewards`, `advantages` and `returns` are (B, T), zero at padding. A minibatch may cut a group:
    its advantages are made before.
    """

    rollout: Rollout
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

    def minibatches(self, order: Tensor, size: int) -> Iterator[list[int]]:
        """The rows of each minibatch: consecutive slices of `order`; the last may be smaller."""
        for rows in order.split(size):
            yield rows.tolist()


def _at_least_float32(policy: Policy) -> torch.dtype:
    return torch.promote_types(policy.lm.dtype, torch.float32)
