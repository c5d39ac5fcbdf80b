"""Counts of what was cut when texts became ids, and of what is odd about these texts."""

from dataclasses import dataclass, field, fields
from typing import NamedTuple

from ..errors import BadInput
from .conversation import Place


class Unencodable(BadInput):
    """A text that the policy cannot use. `reason` says why, without the text."""

    def __init__(self, reason: str, text: str, cure: str, *, why: str = "") -> None:
        why = f" ({why})" if why else ""
        super().__init__(f"{reason} {text[:60]!r}{why}; {cure}")
        self.reason = reason + why


class Spelled(NamedTuple):
    """A text that spells special tokens, of this tokenizer or of others."""

    what: str  # prompts or responses
    known: bool  # to this tokenizer
    marks: tuple[str, ...]
    place: Place


@dataclass
class CutReport:
    """How much of the texts did not fit, counted while encoding.

    The lengths are in tokens and before any cut, template and EOS included. `dropped` holds the
    reason and the place of rows that cannot be used; `changed` the places of prompts of which a
    chat template leaves out or changes a message.
    """

    prompts: int = 0
    prompts_cut: int = 0
    prompt_tokens_cut: int = 0
    responses: int = 0
    responses_cut: int = 0
    response_tokens_cut: int = 0
    equal_after_cut: int = 0
    equal_tokens: int = 0
    tokens: int = field(default=0, compare=False)  # all, of which some are unknown
    unknown_tokens: int = field(default=0, compare=False)
    responses_with_eos: int = field(default=0, compare=False)
    eos_in_text: int = field(default=0, compare=False)
    without_bos: int = field(default=0, compare=False)
    read_in_part: int = field(default=0, compare=False)
    dropped: list[tuple[str, Place]] = field(default_factory=list)
    changed: list[Place] = field(default_factory=list, compare=False)
    spelled: list[Spelled] = field(default_factory=list, compare=False)
    prompt_lengths: list[int] = field(default_factory=list, compare=False, repr=False)
    response_lengths: list[int] = field(default_factory=list, compare=False, repr=False)

    def count_prompt(self, length: int, kept: int) -> None:
        """Count in a prompt of so many tokens, and how many of them are kept."""
        self.prompts += 1
        self.prompts_cut += kept < length
        self.prompt_tokens_cut += length - kept
        self.prompt_lengths.append(length)

    def count_response(self, length: int, kept: int) -> None:
        """Count in a response of so many tokens, and how many of them are kept."""
        self.responses += 1
        self.responses_cut += kept < length
        self.response_tokens_cut += length - kept
        self.response_lengths.append(length)

    def add(self, other: "CutReport") -> None:
        """Count in another report's rows."""
        for f in fields(self):
            total = getattr(self, f.name)
            total += getattr(other, f.name)  # a list grows in place
            setattr(self, f.name, total)
