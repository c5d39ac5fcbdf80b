"""One rollout: prompts, sampled responses, and what policy, value head and reference gave them."""

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from .data import PromptExample, Sequences, collate, micro_batches
from .errors import BadInput, BadNumbers, require
from .kl import exact_kl, kl_estimate
from .masking import require_right_padded
from .policy import Policy, evaluating, scatter_tokens
from .reward_model import RewardModel
from .sampling import sample

RewardFunction = Callable[..., Sequence[float] | Tensor]
RolloutKL = Literal["k1", "abs", "k2", "k3", "full"]

LARGEST_SCORE = 1e15  # the squares of a whole rollout's still add up in float32
_NO_NUMBER = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_TEXTS = (str, bytes, bytearray)


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

    def __str__(self) -> str:
        return "\n".join(_told(self.sequences, self.sequences) + _told(self, self.sequences))


def collect(
    policy: Policy,
    ref_policy: Policy,
    reward: RewardFunction,
    prompts: Sequence[PromptExample],
    *,
    max_new_tokens: int,
    temperature: float,
    kl: RolloutKL,
    max_tokens: int,
    rng: torch.Generator,
) -> Rollout:
    """Sample a response to each prompt, score it, and remember what everyone believed.

    Args:
        policy: samples, and gives log-probabilities and values.
        ref_policy: frozen.
        reward: any callable of texts, see `call_reward`.
        prompts: one for each row.
        max_new_tokens: the longest response.
        temperature: of sampling and of all log-probabilities, the reference's too.
        kl: the estimate that the rewards will be charged with.
        max_tokens: padded tokens in one forward pass; a matter of memory only.
        rng: a CPU generator.

    Returns:
        A `Rollout` without gradient, on the policy's device.
    """
    started = time.perf_counter()
    prompt_ids = [prompt.ids for prompt in prompts]
    response_ids = sample(
        policy, prompt_ids, max_new_tokens=max_new_tokens, temperature=temperature, rng=rng
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
        temperature=temperature,
        kl=kl,
        max_tokens=max_tokens,
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
    with evaluating(policy, ref_policy):
        for rows in micro_batches(lengths, max_tokens=max_tokens):
            part = sequences.select(rows)
            width = part.mask.shape[1]
            found = policy(part, temperature=temperature)
            ref_found = ref_policy(part, temperature=temperature)
            logprobs[rows, :width] = found.logprobs
            ref_logprobs[rows, :width] = ref_found.logprobs.to(policy.device)
            entropies[rows, :width] = found.entropy
            if found.values is not None:
                values[rows, :width] = found.values
            if kl == "full":
                logits = policy.token_logits(part, temperature=temperature)
                ref_logits = ref_policy.token_logits(part, temperature=temperature)
                per_token = exact_kl(logits, ref_logits.to(policy.device))  # (N,)
                kls[rows, :width] = scatter_tokens(per_token, part.mask)
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


@dataclass(frozen=True)
class RolloutBuffer:
    """A judged rollout, ready to be learned from in minibatches.

    `rewards`, `advantages` and `returns` are (B, T), zero at padding. `value_mask` says which
    cells the value loss counts: all real tokens and at most one cell after them; None, as
    everywhere here, means the rollout's own mask. (trl 1.12.0 also trains the value after EOS; the
    mask lets the tests compare the two.)
    """

    rollout: Rollout
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    value_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.value_mask is None:
            return
        if bool((self.rollout.mask & ~self.value_mask).any()):
            raise ValueError("value_mask leaves out a real response token")
        # A value is read off the token before its cell, so one cell after EOS has one.
        require_right_padded(self.value_mask)
        if bool((self.value_mask.sum(1) > self.rollout.lengths + 1).any()):
            raise ValueError("value_mask goes more than one cell beyond the response")

    def __str__(self) -> str:
        return "\n".join([str(self.rollout), *_told(self, self.rollout.sequences)])

    def minibatches(self, order: Tensor, size: int) -> Iterator[list[int]]:
        """The rows of each minibatch: consecutive slices of `order`; the last may be smaller."""
        for rows in order.split(size):
            yield rows.tolist()


def call_reward(
    reward: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Sequence[Mapping[str, Any]] = (),
) -> Tensor:
    """Score texts by any callable ``reward(prompts, responses) -> floats``.

    Further columns of the data are handed over as keyword lists if the callable names them, and
    all of them if it takes ``**columns``. All that it gets is a copy, which it may change.

    Returns:
        Shape ``(B,)``, float64, on the CPU.

    Raises:
        BadInput: if the callable returns anything else than one number for each response, or ends
            the process.
        BadNumbers: if a number is not finite, or too large to train on.
    """
    name = _name(reward)
    data = {key: [row[key] for row in columns] for key in (columns[0] if columns else {})}
    named = {key: _copies(data.get(key, prompts)) for key in _columns_wanted(reward, data)}
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # put back if the callable sets it
            found = reward(_copies(prompts), _copies(responses), **named)
            scores = as_scores(found, name, len(responses))
    except SystemExit as error:
        raise BadInput(
            f"reward {name} ends the process (sys.exit, code {one_line(error.code)}); let it "
            "return scores, or raise an error"
        ) from error
    bad = [row for row, score in enumerate(scores) if not abs(score) <= LARGEST_SCORE]
    if bad:
        cure = "" if not math.isfinite(scores[bad[0]]) else "; scale it to numbers around 1"
        raise BadNumbers(
            f"reward {name} gave {scores[bad[0]]} for the prompt {prompts[bad[0]][:60]!r} "
            f"in row {bad[0]} of the batch{cure}",
            ("scores", bad),
        )
    return torch.tensor(scores, dtype=torch.float64)


def as_scores(found: Any, name: str, n: int) -> list[float]:
    """What a reward has returned, as the numbers that it stands for.

    Args:
        found: a sequence, iterator, array or tensor of numbers, ``(B,)`` or ``(B, 1)``.
        name: of the reward, for messages.
        n: responses.

    Raises:
        BadInput: if it is not one number for each response.

    >>> as_scores((x > 1 for x in [1, 2]), "by_size", 2)
    [0.0, 1.0]
    """
    wanted = f"reward {name} must return one number per response"
    kind = type(found).__name__
    # The keys of a dict, the letters of a text: numbers at times, and never the scores.
    if inspect.iscoroutine(found):
        found.close()  # else Python warns that nobody waited for it
    if isinstance(found, Sized) and not isinstance(found, Iterable):
        with suppress(*_NO_NUMBER):  # a sequence of the old kind
            found = [found[i] for i in range(len(found))]  # type: ignore[index]
    require(
        isinstance(found, Iterable) and not isinstance(found, (Mapping, AbstractSet, *_TEXTS)),
        f"{wanted}, in their order, as a list; it returned a {kind}",
    )
    shape = tuple(getattr(found, "shape", (n,)))
    if len(shape) == 2 and shape[1] == 1 and hasattr(found, "reshape"):
        found, shape = found.reshape(-1), shape[:1]
    require(len(shape) == 1, f"{wanted}; it returned a {kind} of shape {shape}, not ({n},)")
    if isinstance(found, Tensor):
        found = found.detach().tolist()
    listed = list(islice(found, None if isinstance(found, Sized) else n + 1))
    require(
        len(listed) == n,
        f"reward {name} returned {len(listed)} scores for {n} responses",
    )
    scores = []
    for row, score in enumerate(listed):
        try:
            scores.append(_number(score))
        except _NO_NUMBER as error:
            told = one_line(error)[:80]
            if isinstance(error, TypeError):
                told = f"{one_line(score, repr):.40} is a {type(score).__name__}, not a number"
            raise BadInput(f"{wanted}; row {row} of the batch: {told}") from error
    return scores


def _number(score: Any) -> float:
    """A number of any library's as Python's own."""
    if isinstance(score, _TEXTS):  # float would read them
        raise TypeError
    return float(score.item() if isinstance(score, Tensor) else score)


def one_line(value: Any, spell: Callable[[Any], str] = str) -> str:
    """An object of a user's as text on one line, even if its own ``__str__`` raises."""
    with suppress(Exception):  # a user's code may raise anything
        return " ".join(spell(value).split())
    return f"a {type(value).__name__} that cannot be shown"


def _name(reward: RewardFunction) -> str:
    return str(getattr(reward, "__name__", type(reward).__name__))


def _copies(values: Iterable[Any]) -> list[Any]:
    """Each value with all that lies in it, unless it is of a kind that cannot be copied."""
    copies = list(values)
    for i, value in enumerate(copies):
        with suppress(Exception):  # a user's code may raise anything
            copies[i] = deepcopy(value)
    return copies


def reward_parameters(reward: RewardFunction) -> list[inspect.Parameter]:
    """Prompts, responses, and then the columns that a reward names; none if it does not tell.

    Raises:
        BadInput: if it does not take prompts and responses, in this order.
    """
    name, called = _name(reward), inspect.unwrap(reward)
    require(
        not any(map(inspect.iscoroutinefunction, (called, called.__call__))),
        f"reward {name} is async; write it without, with asyncio.run in it where need be",
    )
    try:
        signature = inspect.signature(reward)
    except ValueError:  # some callables written in C do not tell theirs
        return []
    try:
        signature.bind_partial([], [])
    except TypeError as error:
        raise BadInput(f"reward {name} must take prompts and responses: {error}") from error
    parameters = list(signature.parameters.values())
    if isinstance(getattr(reward, "__self__", None), RewardModel):
        return parameters[:2]  # what its score takes further is no column of the data
    # The other way round it would score the prompts, and nothing would look wrong.
    first, second = parameters[0].name, parameters[min(1, len(parameters) - 1)].name
    require(
        first not in ("response", "responses", "completion", "completions")
        and second not in ("prompt", "prompts", "question", "questions"),
        f"reward {name} takes {first} first; write def {name}(prompts, responses)",
    )
    return parameters


def _columns_wanted(reward: RewardFunction, columns: Mapping[str, Any]) -> list[str]:
    parameters = reward_parameters(reward)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = {p.name for p in parameters[:2] if p.kind is not p.POSITIONAL_ONLY}
    named = {p.name for p in parameters[2:] if p.kind is not p.POSITIONAL_ONLY}
    # The prompts are a column of the data too, for those who name it.
    wanted = ["prompt"] if "prompt" in named and "prompt" not in columns else []
    return wanted + [key for key in columns if key not in taken and (takes_all or key in named)]


def _told(owner: Any, sequences: Sequences) -> list[str]:
    """A line for each tensor: name, shape, dtype, and the range of what is not padding."""
    masks = (sequences.mask, sequences.attention_mask.bool())
    lines = []
    for f in fields(owner):
        x = getattr(owner, f.name)
        if isinstance(x, Tensor):
            real = next((x[m] for m in masks if m.shape == x.shape), x).cpu().double()
            dtype = str(x.dtype).removeprefix("torch.")
            span = f"{real.min():.4g}..{real.max():.4g}"
            lines.append(f"{f.name:<16}{tuple(x.shape)!s:<13}{dtype:<9}{span}")
    return lines


def _at_least_float32(policy: Policy) -> torch.dtype:
    return torch.promote_types(policy.lm.dtype, torch.float32)
