"""From texts to the tensors that the models see: encoding, cutting, padding, batching, order.

Prompt and response are always encoded apart and their ids joined, in every stage, so that what is
trained on is what is sampled. A row is [prompt, response, padding]:

    sequence index          0     1     2  |  3     4     5     6       P = 3, T = 4
    token                   p     p     p  |  r0    r1    EOS   pad
    response index t                       |  0     1     2     3
    predicted at index                     |  2     3     4     5       P - 1 + t
    mask                                   |  1     1     1     0       EOS is real
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .encoding.chat import MARKS, Refused, doubts, holds, render, require_content
from .encoding.conversation import Conversation, Place, PlacedRow
from .encoding.template import AS_IS, CHAT, SURROGATE, require_template
from .errors import BadInput, require
from .masking import response_mask

Example = TypeVar("Example")

MOST_NAMED = 5  # of rows, reasons and special tokens
READ_AT_ONCE = 2**18  # characters of a text, at least; more are read only if they may be needed


@dataclass(frozen=True)
class Sequences:
    """A batch of right-padded rows [prompt, response, padding].

    `ids` and `attention_mask` are (B, L), `prompt_lengths` (B,), `responses` and `mask` (B, T).
    """

    ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    responses: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int]) -> "Sequences":
        """These rows, with the padding that they no longer need cut off."""
        index = torch.as_tensor(rows, device=self.ids.device)
        length = int(self.attention_mask[index].sum(1).max())
        width = int(self.mask[index].sum(1).max())
        return Sequences(
            self.ids[index, :length],
            self.attention_mask[index, :length],
            self.prompt_lengths[index],
            self.responses[index, :width],
            self.mask[index, :width],
        )

    def to(self, device: torch.device | str) -> "Sequences":
        """The same rows on another device."""
        return Sequences(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def collate(
    prompt_ids: Sequence[Tensor], response_ids: Sequence[Tensor], *, pad_id: int
) -> Sequences:
    """Pad rows on the right. Masks come from lengths, so `pad_id` may be any id, EOS included.

    Args:
        prompt_ids: one ``(P_b,)`` tensor for each row.
        response_ids: one ``(T_b,)`` tensor for each row, EOS included where there is one.
        pad_id: what stands in the padding; no result depends on it.

    Raises:
        BadInput: if there is no row, or one without a prompt token or a response token.
    """
    empty = [
        row
        for row, (p, r) in enumerate(zip(prompt_ids, response_ids, strict=True))
        if not (len(p) and len(r))
    ]
    require(
        len(prompt_ids) > 0 and not empty,
        "every row needs at least one prompt token and one response token"
        + (f", and row {empty[0]} has not" if empty else "; there is no row"),
    )
    joined = [torch.cat([p, r]) for p, r in zip(prompt_ids, response_ids, strict=True)]
    lengths = torch.tensor([len(ids) for ids in joined])  # (B,)
    response_lengths = torch.tensor([len(ids) for ids in response_ids])  # (B,)
    return Sequences(
        _pad(joined, pad_id),
        response_mask(lengths, int(lengths.max())).long(),
        lengths - response_lengths,
        _pad(response_ids, pad_id),
        response_mask(response_lengths, int(response_lengths.max())),
    )


def _pad(rows: Sequence[Tensor], pad_id: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id)


class Unencodable(BadInput):
    """A text that is no use to the policy. `reason` says why, without the text."""

    def __init__(self, reason: str, text: str, cure: str, *, why: str = "") -> None:
        why = f" ({why})" if why else ""
        super().__init__(f"{reason} {text[:60]!r}{why}; {cure}")
        self.reason = reason + why


class Spelled(NamedTuple):
    """A text that spells special tokens, or what are special tokens of other tokenizers."""

    what: str  # prompts or responses
    known: bool  # to this tokenizer
    marks: tuple[str, ...]
    place: Place


@dataclass(frozen=True)
class PromptExample:
    """A prompt to sample from: its text before template and cut, its ids, its other columns."""

    text: str
    ids: Tensor
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SFTExample:
    """A prompt with the response to imitate, as ids."""

    prompt_ids: Tensor
    response_ids: Tensor


@dataclass(frozen=True)
class PreferenceExample:
    """A prompt with its chosen and its rejected response, as ids.

    `ref_logprobs` holds the reference's summed log-probabilities of both, once they are cached.
    """

    prompt_ids: Tensor
    chosen_ids: Tensor
    rejected_ids: Tensor
    ref_logprobs: tuple[float, float] | None = None


@dataclass
class CutReport:
    """How much of the text did not fit, counted while encoding. Nothing is cut silently.

    The lengths are in tokens and before any cut, template and EOS included. `dropped` holds the
    reason and the place of rows that are no use; `changed` the places of prompts of which a chat
    template leaves out or changes a message.
    """

    prompts: int = 0
    prompts_cut: int = 0
    prompt_tokens_cut: int = 0
    responses: int = 0
    responses_cut: int = 0
    response_tokens_cut: int = 0
    equal_after_cut: int = 0
    equal_tokens: int = 0
    tokens: int = field(default=0, compare=False)  # looked at for unknown ones
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

    def add(self, other: "CutReport") -> None:
        """Count in another report's rows."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def __str__(self) -> str:
        parts = []
        for name in ("prompt", "response"):
            total, cut = getattr(self, f"{name}s"), getattr(self, f"{name}s_cut")
            if total:
                tokens = getattr(self, f"{name}_tokens_cut")
                parts.append(f"{cut} of {total} {name}s cut ({tokens} tokens lost)")
        if self.equal_after_cut:
            parts.append(f"{self.equal_after_cut} pairs dropped: equal after the cut")
        if self.equal_tokens:
            parts.append(
                f"{self.equal_tokens} pairs dropped: the tokenizer makes the same tokens of both "
                "responses (case, accents, white space, unknown signs)"
            )
        if self.unknown_tokens:
            parts.append(f"{self.unknown_tokens / self.tokens:.1%} of the tokens are unknown")
        if self.dropped:
            parts.append(f"{len(self.dropped)} rows dropped: {self.reasons()}")
        if self.read_in_part:
            parts.append(
                f"{self.read_in_part} texts were read only as far as they may fit, so they lose "
                "more than is counted"
            )
        if self.eos_in_text:
            parts.append(
                f"{self.eos_in_text} of {self.responses} responses hold an EOS that their text "
                "spells; this tokenizer cannot read it as text"
            )
        return "; ".join(parts)

    def reasons(self) -> str:
        """Why rows were dropped, with the number of the rows for each reason and the first places.

        >>> CutReport(dropped=[("too long", 2), ("empty", 4), ("too long", 7)]).reasons()
        'too long (2: rows 2, 7), empty (1: row 4)'
        """
        places: dict[str, list[Place]] = {}
        for reason, place in self.dropped:
            places.setdefault(reason, []).append(place)
        parts = [f"{reason} ({len(at)}: {_rows(at)})" for reason, at in places.items()]
        return ", ".join(parts[:MOST_NAMED]) + ", ..." * (len(parts) > MOST_NAMED)

    def lengths(self) -> str:
        """The median, the 95th percentile and the maximum of the lengths; "" if none are known.

        >>> CutReport(prompt_lengths=[3, 1, 2]).lengths()
        'prompts 2, 3, 3'
        """
        parts = []
        for name, lengths in (
            ("prompts", self.prompt_lengths),
            ("responses", self.response_lengths),
        ):
            if ranked := sorted(lengths):
                p50, p95 = (ranked[math.ceil(q * len(ranked)) - 1] for q in (0.5, 0.95))
                parts.append(f"{name} {p50}, {p95}, {ranked[-1]}")
        return "; ".join(parts)


def _rows(places: Sequence[Place]) -> str:
    places = list(dict.fromkeys(places))  # a row may have two responses
    first = ", ".join(map(str, places[:MOST_NAMED])) + ", ..." * (len(places) > MOST_NAMED)
    return f"row{'s' * (len(places) > 1)} {first}"


class _Read(NamedTuple):
    """The ids of a text; whether they are those of a part of it, and whether it was changed."""

    ids: list[int]
    in_part: bool = False
    changed: bool = False


@dataclass(frozen=True)
class Codec:
    """Text to ids and back for one tokenizer. The only place where a prompt gets its template.

    A long response loses its end but keeps EOS; a long prompt loses its beginning, but not a BOS.
    What the user's text spells like a special token is read as text, if the tokenizer can do so;
    where a response still has an EOS inside it, `CutReport.eos_in_text` counts it. In a chat
    template all special tokens are what they spell. `CutReport.spelled` has the texts that spell
    some.

    With the template ``as_is`` prompt and response are exactly the ids that the tokenizer makes of
    them: special tokens are what they spell, and no template, BOS or EOS is added.

    Args:
        tokenizer: with an EOS token.
        max_prompt_tokens: a longer prompt is cut on the left.
        max_response_tokens: a longer response is cut on the right, EOS counted in.
        template: holds ``{prompt}`` once, or is the word ``chat``, for the chat template of the
            tokenizer, or ``as_is``. A tokenizer that starts its texts with BOS starts a prompt in a
            template of text with it too.

    Raises:
        BadInput: if a limit leaves no room, or the template has no place for the prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    max_response_tokens: int
    template: str = "{prompt}\n"

    def __post_init__(self) -> None:
        require(
            self.max_prompt_tokens >= 1 and self.max_response_tokens >= 1,
            f"no room: {self.max_prompt_tokens} tokens are left for the prompt and "
            f"{self.max_response_tokens} for the response; raise max_length or lower "
            "max_response_tokens",
        )
        require_template(self.template)
        require(
            self.template != CHAT or bool(getattr(self.tokenizer, "chat_template", None)),
            "template is chat, but the tokenizer has no chat template; give a text with {prompt}",
        )
        require(
            self.tokenizer.eos_token_id is not None,
            "the policy's tokenizer has no EOS token, so no response could end; set one",
        )
        if self.template == CHAT:
            require_content(self.tokenizer)

    def encode_prompt(self, text: str, report: CutReport, place: Place = 0) -> Tensor:
        """Ids of the templated prompt, ``(P,)``; its beginning is cut off if it is too long.

        Args:
            text: before the template.
            report: what the prompt is counted in.
            place: of its row, for the report.

        Raises:
            BadInput: if there is no id, or the text is none that has ids.
        """
        return self._cut_prompt(text, self._read_prompt(text), report, place)

    def encode_response(self, text: str, report: CutReport, place: Place = 0) -> Tensor:
        """Ids of the response and EOS, ``(T,)``; its end is cut off if it is too long."""
        return self._cut_response(text, self._read_response(text), report, place)

    def encode_prompts(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[PromptExample], CutReport]:
        """PPO and evaluation: rows with ``prompt`` and any further columns."""

        def encode(row: Mapping[str, Any], report: CutReport, place: Place) -> list[PromptExample]:
            ids = self.encode_prompt(row["prompt"], report, place)
            columns = {name: value for name, value in row.items() if name != "prompt"}
            return [PromptExample(row["prompt"], ids, columns)]

        return _encode(rows, encode)

    def encode_demonstrations(
        self, rows: Sequence[Mapping[str, str]]
    ) -> tuple[list[SFTExample], CutReport]:
        """SFT: rows with ``prompt`` and ``response``."""

        def encode(row: Mapping[str, str], report: CutReport, place: Place) -> list[SFTExample]:
            prompt, response = row["prompt"], row["response"]
            read = self._read_prompt(prompt), self._read_response(response)
            return [
                SFTExample(
                    self._cut_prompt(prompt, read[0], report, place),
                    self._cut_response(response, read[1], report, place),
                )
            ]

        return _encode(rows, encode)

    def encode_preferences(
        self, rows: Sequence[Mapping[str, str]]
    ) -> tuple[list[PreferenceExample], CutReport]:
        """DPO: rows with ``prompt``, ``chosen`` and ``rejected``. Both share the prompt's ids."""

        def encode(
            row: Mapping[str, str], report: CutReport, place: Place
        ) -> list[PreferenceExample]:
            sides = row["chosen"], row["rejected"]
            prompt, read = self._read_prompt(row["prompt"]), [*map(self._read_response, sides)]
            prompt_ids = self._cut_prompt(row["prompt"], prompt, report, place)
            chosen_ids, rejected_ids = (
                self._cut_response(text, ids, report, place)
                for text, ids in zip(sides, read, strict=True)
            )
            if torch.equal(chosen_ids, rejected_ids):
                if any(len(ids.ids) > self.max_response_tokens or ids.in_part for ids in read):
                    report.equal_after_cut += 1
                else:
                    report.equal_tokens += 1
                return []
            return [PreferenceExample(prompt_ids, chosen_ids, rejected_ids)]

        return _encode(rows, encode)

    def notes(self, report: CutReport) -> list[str]:
        """What the template and the tokenizer make of texts that may not be meant so, by the line.

        Those that are so in a tenth of the texts or more begin with ``warning:``.
        """
        found = doubts(self.tokenizer) if self.template == CHAT else []
        if report.changed:
            found.append(
                f"{_share(report.changed, report.prompts)}the chat template leaves out or changes "
                f"a message of {len(report.changed)} of {report.prompts} prompts "
                f"({_rows(report.changed)})"
            )
        for what, total in (("prompts", report.prompts), ("responses", report.responses)):
            for known in (True, False):
                spelled = [s for s in report.spelled if (s.what, s.known) == (what, known)]
                if spelled and not (known and self.template == AS_IS):
                    marks = list(dict.fromkeys(mark for s in spelled for mark in s.marks))
                    named = ", ".join(marks[:MOST_NAMED]) + ", ..." * (len(marks) > MOST_NAMED)
                    found.append(
                        f"{_share(spelled, total)}{len(spelled)} of {total} {what} spell "
                        f"{'special tokens' if known else 'marks of another chat template'} "
                        f"({named}; {_rows([s.place for s in spelled])}), "
                        f"{self._reading(what, known=known)}"
                    )
        if self.template == AS_IS:
            found += self._notes_as_is(report)
        return found

    def _reading(self, what: str, *, known: bool) -> str:
        if not known:
            other = f", or --template {AS_IS}, which adds no second one"
            return (
                "letters to this tokenizer; if they come from a template, give the model that has "
                f"it{other * (self.template != AS_IS)}"
            )
        if what == "prompts" and self.template == CHAT:
            told = "and go through the chat template once more"
        else:
            told = "which are read as text"
        return f"{told}; --template {AS_IS} reads rows that went through a template before"

    def _notes_as_is(self, report: CutReport) -> list[str]:
        found = []
        if not any(spelled.known for spelled in report.spelled):
            found.append(
                f"warning: --template {AS_IS} adds nothing, and no text spells a special token"
            )
        if report.without_bos:
            found.append(
                f"warning: {report.without_bos} of {report.prompts} prompts do not begin with "
                f"{self.tokenizer.bos_token}, as this tokenizer's texts do; {AS_IS} adds none"
            )
        if endless := report.responses - report.responses_with_eos:
            found.append(
                f"warning: {endless} of {report.responses} responses do not end with "
                f"{self.tokenizer.eos_token}, so they teach no end; {AS_IS} adds none"
            )
        return found

    def _read_prompt(self, text: str) -> _Read:
        if self.template == AS_IS:
            if isinstance(text, Conversation):
                raise Unencodable(
                    f"--template {AS_IS} takes texts, no messages",
                    text,
                    f"--template {CHAT} writes them with the tokenizer's chat template",
                )
            read = self._read(text, special=True)
        elif self.template == CHAT:
            read = self._read_chat(text)
        else:
            read = self._read_in_template(text)
        if not read.ids:
            raise Unencodable(
                "the tokenizer makes no token of the prompt",
                text,
                "drop this prompt, or give a template with words of its own",
            )
        return read

    def _read_chat(self, text: str) -> _Read:
        messages: Sequence[Mapping[str, str]] = [{"role": "user", "content": text}]
        if isinstance(text, Conversation):
            messages = text.messages
        try:
            rendered = render(self.tokenizer, messages)
        except Refused as refusal:
            raise Unencodable(
                "the tokenizer's chat template does not take the prompt",
                text,
                "change this prompt, or give a template with {prompt}",
                why=str(refusal),
            ) from refusal
        # The template has written BOS where there is to be one.
        read = self._read(rendered, special=True)
        return read._replace(changed=not holds(rendered, messages))

    def _read_in_template(self, text: str) -> _Read:
        ids: list[int] = []
        in_part = False
        for piece in self._template_pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                read = self._read(piece.replace("{prompt}", text))
                ids, in_part = ids + read.ids, in_part or read.in_part
        return _Read(ids if ids[:1] == self._bos else self._bos + ids, in_part)

    def _read_response(self, text: str) -> _Read:
        read = self._read(text, special=self.template == AS_IS, from_start=True)
        if self.template != AS_IS:
            return read._replace(ids=[*read.ids, self.tokenizer.eos_token_id])
        if not read.ids:
            raise Unencodable("the tokenizer makes no token of the response", text, "drop this row")
        return read

    def _cut_prompt(self, text: str, read: _Read, report: CutReport, place: Place) -> Tensor:
        ids, lost = read.ids, max(0, len(read.ids) - self.max_prompt_tokens)
        first = int(ids[:1] == [self.tokenizer.bos_token_id])
        report.prompts += 1
        report.prompts_cut += lost > 0
        report.prompt_tokens_cut += lost
        report.prompt_lengths.append(len(ids))
        report.read_in_part += read.in_part
        report.without_bos += ids[:1] != self._bos and len(self._bos) > 0
        report.changed += [place] * read.changed
        report.spelled += self._spelled("prompts", text, place)
        return torch.tensor(ids[:first] + ids[first + lost :], dtype=torch.long)

    def _cut_response(self, text: str, read: _Read, report: CutReport, place: Place) -> Tensor:
        ids, room, eos = read.ids, self.max_response_tokens, self.tokenizer.eos_token_id
        ended = int(ids[-1] == eos)  # always, unless the text is taken as it is
        kept = ids[: room - ended] + ids[-1:] * ended if len(ids) > room else ids
        report.responses += 1
        report.responses_cut += len(ids) > room
        report.response_tokens_cut += len(ids) - len(kept)
        report.response_lengths.append(len(ids))
        report.read_in_part += read.in_part
        report.responses_with_eos += kept[-1] == eos
        report.eos_in_text += eos in kept[:-1]
        report.spelled += self._spelled("responses", text, place)
        return torch.tensor(kept)

    def _spelled(self, what: str, text: str, place: Place) -> Iterator[Spelled]:
        special = set(self._special.findall(text)) if self._special else set()
        foreign = set(MARKS.findall(text)) - special - self._added.keys()
        for known, marks in ((True, special), (False, foreign)):
            if marks:
                yield Spelled(what, known, tuple(sorted(marks, key=text.index)), place)

    @cached_property
    def _added(self) -> dict[str, int]:
        """The id of each token that was added to the vocabulary."""
        return {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _template_pieces(self) -> list[int | str]:
        """The template as the texts between its special tokens, and the ids of these."""
        if self._special is None:
            return [self.template]
        pieces = re.split(f"({self._special.pattern})", self.template)
        return [self._added.get(piece, piece) for piece in pieces if piece]

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """What spells a special token; None without one."""
        added = self.tokenizer.added_tokens_decoder.values()
        spellings = sorted((t.content for t in added if t.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spellings))) if spellings else None

    @cached_property
    def _bos(self) -> list[int]:
        """BOS, if the tokenizer by itself starts a text with it."""
        first = self.tokenizer("x").input_ids[:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    def _read(self, text: str, *, special: bool = False, from_start: bool = False) -> _Read:
        """The ids of a text; of one that is far too long, those of the end that is kept.

        Args:
            special: whether special tokens are what they spell.
            from_start: whether the beginning is kept.
        """
        if SURROGATE.search(text):
            raise Unencodable(
                "half of a surrogate pair, which is no text, stands in", text, "drop it"
            )
        room = self.max_response_tokens if from_start else self.max_prompt_tokens
        most = max(READ_AT_ONCE, 64 * room)
        if len(text) > most:
            near = text[:most] if from_start else text[-most:]
            if len(ids := self._ids(near, special)) > 2 * room:  # it will be cut for certain
                if not from_start and special:  # where BOS is part of the text
                    ids = [*self._ids(text[:100], special)[:1], *ids]
                return _Read(ids, in_part=True)
        return _Read(self._ids(text, special))

    def _ids(self, text: str, special: bool) -> list[int]:
        return self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=not special,
            verbose=False,  # it would warn of lengths; what is cut is counted here
        ).input_ids


def _encode(
    rows: Sequence[Mapping[str, Any]],
    encode: Callable[[Mapping[str, Any], CutReport, Place], list[Example]],
) -> tuple[list[Example], CutReport]:
    """Examples of the rows; a row that is no use is dropped and reported."""
    report, examples = CutReport(), []
    for number, row in enumerate(rows, 1):
        place = row.place if isinstance(row, PlacedRow) else number
        try:
            examples += encode(row, report, place)
        except Unencodable as error:
            report.dropped.append((error.reason, place))
    return examples, report


def _share(places: Sequence[Any], total: int) -> str:
    return "warning: " if len(places) * 10 >= total else ""


def micro_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Group rows of similar length so that no padded group holds more than `max_tokens`.

    Memory then depends on `max_tokens` alone, however many rows there are, and little of it is
    padding. A row longer than `max_tokens` gets a group of its own.

    Example:
        >>> micro_batches([3, 9, 3, 8], max_tokens=18)
        [[1, 3], [0, 2]]
    """
    groups: list[list[int]] = []
    width = 0  # of the current group: its first row is its longest
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * width <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
            width = lengths[row]
    return groups


@dataclass
class Cursor(Generic[Example]):
    """Where a run stands in its shuffled data: epoch and position say all.

    The order of each epoch depends on the seed and the epoch alone, so that a restored cursor
    continues with the very rows that come next. Same order as the sampler of ``transformers``'
    ``Trainer``.
    """

    examples: Sequence[Example]
    seed: int
    epoch: int = 0
    position: int = 0
    _drawn: tuple[int, list[int]] | None = field(default=None, repr=False)  # the epoch's order

    def __post_init__(self) -> None:
        require(len(self.examples) > 0, "there is no example to train on")

    def take(self, n: int) -> list[Example]:
        """The next n examples; fewer at the end of an epoch, since no batch spans two."""
        if self.position >= len(self.examples):
            self.epoch, self.position = self.epoch + 1, 0
        rows = self._order()[self.position : self.position + n]
        self.position += len(rows)
        return [self.examples[i] for i in rows]

    def take_across(self, n: int) -> list[Example]:
        """The next n examples exactly, going on into the next epochs where need be."""
        taken: list[Example] = []
        while len(taken) < n:
            taken += self.take(n - len(taken))
        return taken

    def batches_per_epoch(self, n: int) -> int:
        """How many `take(n)` one epoch has."""
        return -(-len(self.examples) // n)

    def _order(self) -> list[int]:
        if self._drawn is None or self._drawn[0] != self.epoch:
            rng = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.examples), generator=rng).tolist()
            self._drawn = (self.epoch, order)
        return self._drawn[1]


def in_groups(
    examples: Sequence[Example], length: Callable[[Example], int], *, max_tokens: int
) -> Iterator[list[Example]]:
    """The examples in `micro_batches` by their length."""
    for rows in micro_batches([length(x) for x in examples], max_tokens=max_tokens):
        yield [examples[i] for i in rows]
