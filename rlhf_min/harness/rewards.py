"""Rewards by name: a reward model, a Python function, or a weighted sum of several."""

import importlib
import importlib.util
import inspect
import math
import os
import signal
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlhf_min.errors import BadInput, require
from rlhf_min.harness.run.folder import seed_all
from rlhf_min.harness.run.signals import SIGNALS
from rlhf_min.loading.reward_function import (
    RewardFunction,
    as_scores,
    call_reward,
    one_line,
    reward_parameters,
)
from rlhf_min.loading.sources import split_label
from rlhf_min.reward_model import RewardModel

SECONDS = 600.0  # that a function may take for one batch
FORMS = (
    "give module:function, file.py:function, a reward model or classifier@LABEL; 0.5*NAME weighs it"
)

Warn = Callable[[str], None]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _handle(number: signal.Signals, handler: Any) -> None:
    if _in_main_thread() and handler is not None:  # None: not from Python, and cannot be put back
        signal.signal(number, handler)


# What belongs to the whole process, so that a user's code could bend the run: how to read it, and
# how to put it back.
_OF_THE_PROCESS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the working folder": (os.getcwd, os.chdir),
    "PyTorch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "PyTorch's default device": (
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "PyTorch's threads": (torch.get_num_threads, torch.set_num_threads),
    "PyTorch's precision of products": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "sys.stdout": (lambda: sys.stdout, partial(setattr, sys, "stdout")),
    "sys.stderr": (lambda: sys.stderr, partial(setattr, sys, "stderr")),
    **{
        f"what {number.name} does": (partial(signal.getsignal, number), partial(_handle, number))
        for number in SIGNALS
    },
}


class WeightedSum:
    """A reward that is a weighted sum of named rewards.

    Args:
        parts: name -> (weight, reward).
        notes: warnings about them; it may still grow.

    Each part's own mean can be watched by `monitors`, which does not score anything twice.
    """

    everywhere = True  # each part says itself which processes call it, see `call_reward`

    def __init__(
        self, parts: Mapping[str, tuple[float, RewardFunction]], notes: Sequence[str] = ()
    ) -> None:
        self.parts, self.notes = dict(parts), notes
        self._texts: tuple[list[str], list[str]] | None = None
        self._scores: dict[str, Tensor] = {}

    def __call__(self, prompts: list[str], responses: list[str], /, **columns: list[Any]) -> Tensor:
        """Scores, ``(B,)``; further columns go to the parts that name them."""
        rows = [{name: column[i] for name, column in columns.items()} for i in range(len(prompts))]
        self._texts = (prompts, responses)
        self._scores = {
            name: call_reward(reward, prompts, responses, rows)
            for name, (_, reward) in self.parts.items()
        }
        weighted = [weight * self._scores[name] for name, (weight, _) in self.parts.items()]
        return torch.stack(weighted).sum(0)

    @property
    def monitors(self) -> dict[str, RewardFunction]:
        """Each part as a reward of its own, for the metrics."""
        return {f"reward/{name}": partial(self._part, name) for name in self.parts}

    def _part(
        self, name: str, prompts: list[str], responses: list[str], /, **columns: list[Any]
    ) -> Tensor:
        if self._texts != (prompts, responses):
            self(prompts, responses, **columns)
        return self._scores[name]


def _functions(reward: RewardModel | RewardFunction) -> dict[str, RewardModel | RewardFunction]:
    """What a reward is a sum of, by name, or the reward itself."""
    if not isinstance(reward, WeightedSum):
        return {"reward": reward}
    return {name: part for name, (_, part) in reward.parts.items()}


def models_in(reward: RewardModel | RewardFunction) -> list[RewardModel]:
    """The reward models that a reward is, or is a sum of."""
    owners = [getattr(part, "__self__", part) for part in _functions(reward).values()]
    return [owner for owner in owners if isinstance(owner, RewardModel)]


def sources(reward: RewardModel | RewardFunction) -> dict[str, int]:
    """The CRC-32 of the file of each function that a reward is, or is a sum of, by its name."""
    files = {}
    for name, part in _functions(reward).items():
        code = getattr(inspect.unwrap(part), "__code__", None)
        if code is not None and not models_in(part) and Path(code.co_filename).is_file():
            files[name] = Path(code.co_filename)
    return {name: zlib.crc32(file.read_bytes()) for name, file in files.items()}


def given_reward(options: Any, config: Any) -> RewardModel | WeightedSum | None:
    """What ``--reward_model`` or ``--reward`` names; None if neither was given."""

    def load_model(name: str, label: str | None = None) -> RewardModel:
        reward_model = RewardModel.from_pretrained(name, label=label, plain=options.plain)
        return reward_model.to(options.torch_device("reward_device"))

    seed_all((options, config))  # a module of the user's may draw when it is imported
    if options.reward:
        return load_reward(options.reward, load_model, timeout=options.reward_timeout)
    return None if options.reward_model is None else load_model(options.reward_model)


def load_reward(
    specs: Sequence[str],
    load_model: Callable[..., RewardModel],
    *,
    timeout: float = SECONDS,
) -> WeightedSum:
    """The reward that ``--reward`` names.

    Args:
        specs: each ``module:function``, ``file.py:function``, or a reward model's folder or name,
            with ``WEIGHT*`` before it if its weight is not 1. ``@LABEL`` after a classifier's
            folder or name takes the log-probability of its label of that name.
        load_model: makes a reward model of a folder or name, and of the `label` if there is one.
        timeout: seconds that a function may take for one batch, see `guarded`.

    Raises:
        BadInput: if one cannot be found or is named twice.
    """
    parts: dict[str, tuple[float, RewardFunction]] = {}
    notes: list[str] = []

    def warn(line: str) -> None:
        if line not in notes:
            notes.append(line)
            print(line)

    for spec in specs:
        weight, name = _split_weight(spec)
        require(bool(name), f"--reward {spec!r} names nothing; {FORMS}")
        require(
            ":" in name or not name.endswith(".py"),
            f"--reward {spec}: no function of the file is named; give {spec}:FUNCTION",
        )
        require(name not in parts, f"--reward names {name} twice; add up the weights instead")
        if ":" in name:
            parts[name] = (weight, _function(name, timeout, warn))
        else:
            source, label = split_label(name)
            parts[name] = (weight, load_model(source, label=label).score)
    require(bool(parts), f"--reward names nothing; {FORMS}")
    return WeightedSum(parts, notes)


def unserved(reward: RewardModel | RewardFunction, columns: Collection[str]) -> list[str]:
    """A line for each parameter of a reward that no column of the data is called like.

    Args:
        columns: of the data, ``prompt`` among them.
    """
    lines = []
    for function in _functions(reward).values():
        of_model = isinstance(function, RewardModel)
        for p in [] if of_model else reward_parameters(function)[2:]:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name in {"prompt", *columns}:
                continue
            default = f" and keeps its default {one_line(p.default, repr):.40}"
            lines.append(
                f"reward {getattr(function, '__name__', type(function).__name__)}: its parameter "
                f"{p.name} is no column of the data{default if p.default is not p.empty else ''}; "
                f"the columns are {', '.join(columns)}"
            )
    return lines


def _split_weight(spec: str) -> tuple[float, str]:
    before, star, name = spec.partition("*")
    if not star:
        return 1.0, spec
    try:
        weight = float(before)
    except ValueError as error:
        raise BadInput(f"--reward {spec}: {before!r} is not a weight; {FORMS}") from error
    require(math.isfinite(weight), f"--reward {spec}: the weight must be finite")
    return weight, name


def guarded(
    name: str, reward: RewardFunction, folder: Path, *, timeout: float, warn: Warn = print
) -> RewardFunction:
    """The same reward, but what it raises is `BadInput` with the line of the user's that raised it.

    Args:
        name: for messages.
        reward: the user's function.
        folder: of the user's file.
        timeout: seconds until a call is given up. The call has a thread of its own then, since
            nothing else can be left behind while it hangs. With 0 there is no limit, and none of
            this: it is called in the main thread, which some libraries insist on.
        warn: is called with a line when the function has changed what belongs to the whole process.
    """

    @wraps(reward)
    def call(*texts: list[str], **columns: list[Any]) -> Any:
        n = len(texts[-1])  # the function may change its list

        def ask() -> Sequence[float] | BadInput:
            given = reward(*texts, **columns)
            try:  # what is generated is generated only here
                return as_scores(given, name, n)
            except BadInput as refused:
                return refused

        outcome = _Outcome()
        with _process_unchanged(f"reward {name}", warn):
            if timeout > 0:
                thread = threading.Thread(target=outcome.of, args=[ask], daemon=True)
                thread.start()
                thread.join(min(timeout, threading.TIMEOUT_MAX))
                require(
                    not thread.is_alive(),
                    f"reward {name} has not returned after {timeout:g} s; make it faster, or give "
                    "it a longer --reward_timeout (0: no limit)",
                )
            else:
                outcome.of(ask)
        if outcome.error is not None:
            raised = _described(outcome.error, folder)
            if timeout > 0 and isinstance(outcome.error, ValueError) and "main thread" in raised:
                raised += "; --reward_timeout 0 calls it in the main thread"
            raise BadInput(f"reward {name} raised {raised}") from outcome.error
        if isinstance(outcome.result, BadInput):
            raise outcome.result
        return outcome.result

    call.__name__ = getattr(reward, "__name__", type(reward).__name__)
    return call


class _Outcome(AbstractContextManager[None]):
    """What a user's code gave, or raised, which may be anything."""

    result: Any = None
    error: BaseException | None = None

    def of(self, function: Callable[[], Any]) -> "_Outcome":
        """Call the function, and keep what comes of it."""
        with self:
            self.result = function()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self.error = error
        # Ctrl-C arrives in the main thread; anywhere else it is the user's code that raised it.
        return not (isinstance(error, KeyboardInterrupt) and _in_main_thread())


@contextmanager
def _process_unchanged(name: str, warn: Warn) -> Iterator[None]:
    """Inside runs a user's code; what belongs to the whole process is put back after it."""
    before = {}
    for what, (read, _) in _OF_THE_PROCESS.items():
        with suppress(OSError):  # a working folder that is gone
            before[what] = read()
    try:
        yield
    finally:
        for what, value in before.items():
            read, put_back = _OF_THE_PROCESS[what]
            with suppress(OSError):
                if (now := read()) != value:
                    put_back(value)
                    simple = isinstance(now, (str, int, torch.dtype)) and not callable(value)
                    values = f" ({value} to {now})" if simple else ""
                    warn(f"{name} has changed {what}{values}; this was put back")


def _described(error: BaseException, folder: Path) -> str:
    """Type, message and place of an error, on one line."""
    frames = [x for x in traceback.extract_tb(error.__traceback__) if x.filename != __file__]
    places = [frame for frame in frames if Path(frame.filename).parent == folder] or frames
    message = one_line(error)[:200]
    line = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return f"{line} ({places[-1].filename}:{places[-1].lineno})" if places else line


def _function(name: str, timeout: float, warn: Warn) -> RewardFunction:
    where, _, attribute = name.rpartition(":")
    with _process_unchanged(f"--reward {where}", warn):
        module = _module(where)
    function: Any = getattr(module, attribute, None)
    require(callable(function), f"--reward {name}: {where} has no function {attribute!r}; {FORMS}")
    folder = Path(getattr(module, "__file__", None) or "").parent
    return guarded(name, function, folder, timeout=timeout, warn=warn)


def _module(where: str) -> Any:
    file = Path(where)
    is_file = file.suffix == ".py"
    require(not is_file or file.is_file(), f"--reward {where}: no such file; {FORMS}")
    # As if it were imported by a script that lies there: it may import its neighbours.
    beside = str(file.parent.resolve() if is_file else Path.cwd())
    sys.path.insert(0, beside)
    read = partial(_from_file, file) if is_file else partial(importlib.import_module, where)
    imported = _Outcome().of(read)
    with suppress(ValueError):  # the module may have done so
        sys.path.remove(beside)
    if beside not in sys.path:
        sys.path.append(beside)  # a function may import a neighbour when it is called
    if imported.error is not None:
        reason = one_line(imported.error)
        if isinstance(imported.error, SystemExit):
            reason = f"it ends the process: {_described(imported.error, Path(beside))}"
        raise BadInput(
            f"--reward {where}: cannot be imported ({reason}); {FORMS}"
        ) from imported.error
    return imported.result


def _from_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # where dataclasses look for their own
    spec.loader.exec_module(module)
    return module
