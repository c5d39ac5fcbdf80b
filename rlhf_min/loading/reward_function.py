"""A reward function as users write it: what it is called with, and what its answer means."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from contextlib import suppress
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..errors import BadInput

RewardFunction = Callable[..., Sequence[float] | Tensor]

LARGEST_SCORE = 1e15  # the squares of a whole rollout's still add up in float32
_NO_NUMBER = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_TEXTS = (str, bytes, bytearray)


def call_reward(
    reward: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Sequence[Mapping[str, Any]] = (),
) -> Tensor:
    """Score texts by any callable ``reward(prompts, responses) -> floats``.

    Further columns of the data are handed over as keyword lists if the callable names them, and
    all of them if it takes ``**columns``. All that it gets is a copy, which it may change.

    If there are several processes the first one calls it, with all texts, since it may keep a state
    or compare them. One that says ``row_wise = True`` is called by each, with rows of its own.

    Returns:
        Shape ``(B,)``, float64, on the CPU.

    Raises:
        BadInput: if the callable returns anything else than one number for each response, or ends
            the process; if a number is not finite, or too large to train on.
    """
    if getattr(reward, "everywhere", False):  # it deals out its rows itself
        return _scores(reward, prompts, responses, columns)
    if not getattr(reward, "row_wise", False):
        return distributed.on_main(lambda: _scores(reward, prompts, responses, columns))
    n = distributed.size()
    found = distributed.deal(
        lambda rows: _scores(reward, prompts[rows], responses[rows], columns[rows]),
        [slice(first, None, n) for first in range(min(n, len(prompts)))],
    )
    scores = torch.empty(len(prompts), dtype=torch.float64)
    for first, part in enumerate(found):
        scores[first::n] = part
    return scores


def _scores(
    reward: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Sequence[Mapping[str, Any]],
) -> Tensor:
    """What `call_reward` returns, of rows that this process asks for."""
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
        raise BadInput(
            f"reward {name} gave {scores[bad[0]]} for the prompt {prompts[bad[0]][:60]!r} "
            f"in row {bad[0]} of the batch{cure}"
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
    if not isinstance(found, Iterable) or isinstance(found, (Mapping, AbstractSet, *_TEXTS)):
        raise BadInput(f"{wanted}, in their order, as a list; it returned a {kind}")
    shape = tuple(getattr(found, "shape", (n,)))
    if len(shape) == 2 and shape[1] == 1 and hasattr(found, "reshape"):
        found, shape = found.reshape(-1), shape[:1]
    if len(shape) != 1:
        raise BadInput(f"{wanted}; it returned a {kind} of shape {shape}, not ({n},)")
    if isinstance(found, Tensor):
        found = found.detach().tolist()
    listed = list(islice(found, None if isinstance(found, Sized) else n + 1))
    if len(listed) != n:
        raise BadInput(f"reward {name} returned {len(listed)} scores for {n} responses")
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
    if any(map(inspect.iscoroutinefunction, (called, called.__call__))):
        raise BadInput(
            f"reward {name} is async; write it without, with asyncio.run in it where need be"
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
    # The other way round it would score the prompts, and nothing would look wrong.
    first, second = parameters[0].name, parameters[min(1, len(parameters) - 1)].name
    answers_first = first in ("response", "responses", "completion", "completions")
    if answers_first or second in ("prompt", "prompts", "question", "questions"):
        raise BadInput(f"reward {name} takes {first} first; write def {name}(prompts, responses)")
    return parameters


def _columns_wanted(reward: RewardFunction, columns: Mapping[str, Any]) -> list[str]:
    parameters = reward_parameters(reward)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = {p.name for p in parameters[:2] if p.kind is not p.POSITIONAL_ONLY}
    named = {p.name for p in parameters[2:] if p.kind is not p.POSITIONAL_ONLY}
    # The prompts are a column of the data too, for those who name it.
    wanted = ["prompt"] if "prompt" in named and "prompt" not in columns else []
    return wanted + [key for key in columns if key not in taken and (takes_all or key in named)]
