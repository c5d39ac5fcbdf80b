"""Options of the command line, made from the fields of configs, and errors of one line."""

import argparse
import atexit
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, NoReturn

from rlhf_min.errors import BadInput
from rlhf_min.harness.run import lifeline

TRUTH = dict.fromkeys(("true", "t", "yes", "y", "1"), True)
TRUTH |= dict.fromkeys(("false", "f", "no", "n", "0"), False)


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are one line and no usage of forty options.

    Args:
        description: what the command does; its line ends are kept.
        instead: options that this command does not know, and what to give in their place.
    """

    def __init__(
        self, description: str | None, *, instead: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.instead = instead or {}
        # argparse would take -1e-3, -inf and the weight in "-0.3*brevity" for options.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)

    def add_fields(self, config_class: Any, without: Sequence[str] = ()) -> None:
        """An option for each field of a config, written ``--a_b`` or ``--a-b``."""
        self.usage = "%(prog)s [OPTIONS]"
        hints = typing.get_type_hints(config_class)
        for field in fields(config_class):
            if field.name not in without and field.name not in self.instead:
                self._add_field(field, hints[field.name])

    def _add_field(self, field: "Field[Any]", hint: Any) -> None:
        if isinstance(hint, types.UnionType):  # X | None
            (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
        kind: dict[str, Any] = {"type": hint, "metavar": field.name.rpartition("_")[2].upper()}
        if hint in (int, float):
            kind["metavar"] = "N" if hint is int else "X"
        elif hint is bool:
            kind = {"type": _truth, "nargs": "?", "const": True, "metavar": "yes|no"}
        elif typing.get_origin(hint) is Literal:
            kind = {"choices": typing.get_args(hint)}
        elif typing.get_origin(hint) is list:
            kind |= {"type": typing.get_args(hint)[0], "nargs": "+"}
        explained: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field)}
        self.add_argument(*_spellings(field.name), **kind, **explained)
        if field.default is True:
            explained["help"] = f"Turns --{field.name} off."
            names = _spellings(f"no_{field.name}")
            self.add_argument(*names, dest=field.name, action="store_false", **explained)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """What stands on the command line; of the fields of configs no more than that.

        Raises:
            SystemExit: with code 2, for an unknown option or a value that cannot be read.
        """
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0].removeprefix("--").replace("-", "_")
            cure = self.instead.get(name)
            self.error(f"unknown option {unknown[0]}" + (f"; {cure}" if cure else ""))
        return options

    def error(self, message: str) -> NoReturn:
        """Print the message and end with code 2."""
        if message.endswith(("expected one argument", "expected at least one argument")):
            message += "; a value that begins with - is written --option=-VALUE"
        has_options = len(self._actions) > 1  # beside --help
        where = "--help explains all options" if has_options else "this command has none"
        fail(f"{message}; {where}", 2)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _truth(word: str) -> bool:
    if word.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return TRUTH[word.lower()]


def _help(field: "Field[Any]") -> str:
    """The description, the default if the description says none, and what papers use."""
    text = str(field.metadata["help"])
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if "Default:" not in text and default is not None and default is not False and default != []:
        words = map(str, default) if isinstance(default, list) else [str(default)]
        text += f" Default: {' '.join(words)}."
    if published := field.metadata.get("pretrained"):
        value, source = published
        text += f" Pretrained models: {value} ({source})."
    return text.replace("%", "%%")


def fail(message: str, code: int) -> NoReturn:
    """Print an error on one line, and end, with all other processes of the run if there are."""
    line = f"error: {BadInput(message)}"
    lifeline.fail(line, code)
    print(line, file=sys.stderr)
    # With no room or no descriptor left, libraries fail once more while Python ends.
    atexit.register(setattr, sys, "unraisablehook", lambda _: None)
    sys.exit(code)
