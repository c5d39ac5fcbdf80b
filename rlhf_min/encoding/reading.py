"""One text to ids: texts that spell special tokens, and texts that are far too long.

By itself a tokenizer turns every text that spells a special token into that token. Somebody could
then end a response by writing EOS. So texts are read as plain text. Only in a template is a
special token what it spells.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .conversation import Place
from .cuts import Spelled, Unencodable
from .template import SURROGATE

READ_AT_ONCE = 2**18  # characters of a text, at least; more are read only if they may be needed

# Marks of well-known templates. Of a tokenizer that has them they are tokens; of another, letters.
MARKS = re.compile(
    r"<[|｜][^\s<>]{1,40}[|｜]>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|</?s>|<[be]os>"
    r"|\[/?(?:SYSTEM_PROMPT|gMASK)\]"
    r"|(?m:^### ?(?:Human|Assistant|User|System|Instruction|Response):)"
)


class Read(NamedTuple):
    """The ids of a text, and whether they are only those of the part of it that may be kept."""

    ids: list[int]
    in_part: bool = False


class TextReader:
    """Reads one text at a time with the policy's tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def read(
        self, text: str, *, room: int, special: bool = False, from_start: bool = False
    ) -> Read:
        """The ids of a text; of one that is far too long, only those of the part that may be kept.

        Args:
            room: how many ids will be kept at most.
            special: whether what spells a special token is that token.
            from_start: whether the beginning of the text will be kept, or its end.

        Raises:
            Unencodable: if the text is none.
        """
        if SURROGATE.search(text):
            raise Unencodable(
                "half of a surrogate pair, which is no text, stands in", text, "drop it"
            )
        most = max(READ_AT_ONCE, 64 * room)
        if len(text) > most:
            near = text[:most] if from_start else text[-most:]
            if len(ids := self._ids(near, special)) > 2 * room:  # it will certainly be cut
                if not from_start and special:  # where BOS is part of the text
                    ids = [*self._ids(text[:100], special)[:1], *ids]
                return Read(ids, in_part=True)
        return Read(self._ids(text, special))

    def read_in_template(self, template: str, text: str, *, room: int) -> Read:
        """The ids of a template with the text in it, after BOS if the tokenizer starts with one."""
        ids: list[int] = []
        in_part = False
        for piece in self._pieces(template):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                read = self.read(piece.replace("{prompt}", text), room=room)
                ids, in_part = ids + read.ids, in_part or read.in_part
        return Read(ids if ids[:1] == self.bos else self.bos + ids, in_part)

    def spelled(self, what: str, text: str, place: Place) -> Iterator[Spelled]:
        """The special tokens and the marks of other templates that a text spells."""
        special = set(self._special.findall(text)) if self._special else set()
        foreign = set(MARKS.findall(text)) - special - self._added.keys()
        for known, marks in ((True, special), (False, foreign)):
            if marks:
                yield Spelled(what, known, tuple(sorted(marks, key=text.index)), place)

    @cached_property
    def bos(self) -> list[int]:
        """BOS, if the tokenizer by itself starts a text with it."""
        first = self.tokenizer("x").input_ids[:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    def _pieces(self, template: str) -> list[int | str]:
        """A template as the texts between its special tokens, and the ids of these."""
        if self._special is None:
            return [template]
        pieces = re.split(f"({self._special.pattern})", template)
        return [self._added.get(piece, piece) for piece in pieces if piece]

    @cached_property
    def _added(self) -> dict[str, int]:
        """The id of each token that was added to the vocabulary."""
        return {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """What spells a special token; None without one."""
        added = self.tokenizer.added_tokens_decoder.values()
        spellings = sorted((t.content for t in added if t.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spellings))) if spellings else None

    def _ids(self, text: str, special: bool) -> list[int]:
        return self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=not special,
            verbose=False,  # it would warn of lengths; what is cut is counted here
        ).input_ids
