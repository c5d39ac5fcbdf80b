"""How a config declares and checks its options. Each algorithm's config stands in its own file."""

import dataclasses
import math
import typing
from typing import Any

from .errors import BadInput


def option(default: Any, help: str) -> Any:
    """A config field with its one description, which the command line's ``--help`` shows too."""
    return dataclasses.field(default=default, metadata={"help": help})


def require_positive(config: Any, *names: str) -> None:
    """Raise `BadInput` unless each of these fields is above 0 and finite; None passes."""
    _require_range(config, names, "above 0 and finite", lambda x: 0 < x < math.inf)


def require_not_negative(config: Any, *names: str) -> None:
    """Raise `BadInput` unless each of these fields is at least 0 and finite; None passes."""
    _require_range(config, names, "at least 0 and finite", lambda x: 0 <= x < math.inf)


def require_share(config: Any, *names: str) -> None:
    """Raise `BadInput` unless each of these fields lies in [0, 1]; None passes."""
    _require_range(config, names, "between 0 and 1", lambda x: 0 <= x <= 1)


def require_choices(config: Any) -> None:
    """Raise `BadInput` unless each field of a `Literal` type holds one of its choices."""
    for name, kind in typing.get_type_hints(type(config)).items():
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        if choices and getattr(config, name) not in choices:
            raise BadInput(
                f"{type(config).__name__}: {name} is {getattr(config, name)!r}; it must be one of "
                + ", ".join(map(str, choices))
            )


def require_seed(config: Any, *names: str) -> None:
    """Raise `BadInput` unless each of these fields is a seed that every generator accepts."""
    _require_range(config, names, "between 0 and 2**31", lambda x: 0 <= x <= 2**31)


def _require_range(config: Any, names: tuple[str, ...], range_text: str, within: Any) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not within(value):
            raise BadInput(f"{type(config).__name__}: {name} is {value}; it must be {range_text}")
