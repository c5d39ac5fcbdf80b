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
from typing import Any, Generic, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import BadInput, require
from .masking import response_mask

Example = TypeVar("Example")

CHAT = "chat"  # the template of a Codec that leaves the work to the tokenizer's own

_SURROGATE = re.compile("[\ud800-\udfff]")

# What a chat template, which is a program of its own, can raise.
_TEMPLATE_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TemplateError,
    TypeError,
    ValueError,
)


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


class Conversation(str):
    """A prompt of several chat messages. It is the text of them, which is all that most code sees.

    Args:
        messages: each with its ``role`` and its ``content``.

    Example:
        >>> Conversation([{"role": "user", "content": "Hi"}])
        'Hi'
        >>> turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]
        >>> print(Conversation([{"role": role, "content": text} for role, text in turns]))
        user: Hi
        <BLANKLINE>
        assistant: Hello.
        <BLANKLINE>
        user: Bye
    """

    messages: tuple[Mapping[str, str], ...]

    def __new__(cls, messages: Sequence[Mapping[str, str]]) -> "Conversation":
        """The text: a transcript, or the content alone of a single message of the user."""
        if [message["role"] for message in messages] == ["user"]:
            text = messages[0]["content"]
        else:
            text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        conversation = super().__new__(cls, text)
        conversation.messages = tuple(dict(message) for message in messages)
        return conversation

    def __getnewargs__(self) -> Any:  # what copies are made from
        return (self.messages,)


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

    The lengths are in tokens and before any cut, template and EOS included.
    """

    prompts: int = 0
    prompts_cut: int = 0
    prompt_tokens_cut: int = 0
    responses: int = 0
    responses_cut: int = 0
    response_tokens_cut: int = 0
    equal_after_cut: int = 0
    responses_with_eos: int = field(default=0, compare=False)
    eos_in_text: int = field(default=0, compare=False)
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
        if self.eos_in_text:
            parts.append(
                f"{self.eos_in_text} of {self.responses} responses hold an EOS that their text "
                "spells; this tokenizer cannot read it as text"
            )
        return "; ".join(parts)

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


@dataclass(frozen=True)
class Codec:
    """Text to ids and back for one tokenizer. The only place where a prompt gets its template.

    A long response loses its end but keeps EOS; a long prompt loses its beginning, but not a BOS.
    What the user's text spells like a special token is read as text, if the tokenizer can do so;
    where a response still has an EOS inside it, `CutReport.eos_in_text` counts it. Only in a chat
    template are all special tokens what they spell.

    Args:
        tokenizer: with an EOS token.
        max_prompt_tokens: a longer prompt is cut on the left.
        max_response_tokens: a longer response is cut on the right, EOS counted in.
        template: holds ``{prompt}`` once, or is the word ``chat``, for the chat template of the
            tokenizer. A tokenizer that starts its texts with BOS starts the prompt with it too.

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
        require(
            self.template == CHAT or str(self.template).count("{prompt}") == 1,
            f"template {self.template!r} must hold {{prompt}} exactly once",
        )
        require(
            self.template != CHAT or bool(getattr(self.tokenizer, "chat_template", None)),
            "template is chat, but the tokenizer has no chat template; give a text with {prompt}",
        )
        require(
            self.tokenizer.eos_token_id is not None,
            "the policy's tokenizer has no EOS token, so no response could end; set one",
        )

    def encode_prompt(self, text: str, report: CutReport) -> Tensor:
        """Ids of the templated prompt, ``(P,)``; its beginning is cut off if it is too long.

        Raises:
            BadInput: if there is no id, or the text is none that has ids.
        """
        ids = self._chat_ids(text) if self.template == CHAT else self._prompt_ids(text)
        require(
            len(ids) > 0,
            f"the tokenizer makes no token of the prompt {text[:60]!r}; drop this prompt, or give "
            "a template with words of its own",
        )
        lost = max(0, len(ids) - self.max_prompt_tokens)
        report.prompts += 1
        report.prompts_cut += lost > 0
        report.prompt_tokens_cut += lost
        report.prompt_lengths.append(len(ids))
        first = int(ids[:1] == [self.tokenizer.bos_token_id])
        return torch.tensor(ids[:first] + ids[first + lost :], dtype=torch.long)

    def encode_response(self, text: str, report: CutReport) -> Tensor:
        """Ids of the response and EOS, ``(T,)``; its end is cut off if it is too long."""
        ids, room, eos = self._ids(text), self.max_response_tokens - 1, self.tokenizer.eos_token_id
        kept = [*ids[:room], eos]
        report.responses += 1
        report.responses_cut += len(ids) > room
        report.response_tokens_cut += max(0, len(ids) - room)
        report.response_lengths.append(len(ids) + 1)
        report.responses_with_eos += kept[-1] == eos
        report.eos_in_text += eos in kept[:-1]
        return torch.tensor(kept)

    def encode_prompts(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[PromptExample], CutReport]:
        """PPO and evaluation: rows with ``prompt`` and any further columns."""
        report = CutReport()
        examples = [
            PromptExample(
                row["prompt"],
                self.encode_prompt(row["prompt"], report),
                {name: value for name, value in row.items() if name != "prompt"},
            )
            for row in rows
        ]
        return examples, report

    def encode_demonstrations(
        self, rows: Sequence[Mapping[str, str]]
    ) -> tuple[list[SFTExample], CutReport]:
        """SFT: rows with ``prompt`` and ``response``."""
        report = CutReport()
        examples = [
            SFTExample(
                self.encode_prompt(row["prompt"], report),
                self.encode_response(row["response"], report),
            )
            for row in rows
        ]
        return examples, report

    def encode_preferences(
        self, rows: Sequence[Mapping[str, str]]
    ) -> tuple[list[PreferenceExample], CutReport]:
        """DPO: rows with ``prompt``, ``chosen`` and ``rejected``. Both share the prompt's ids."""
        report, examples = CutReport(), []
        for row in rows:
            prompt_ids = self.encode_prompt(row["prompt"], report)
            chosen_ids = self.encode_response(row["chosen"], report)
            rejected_ids = self.encode_response(row["rejected"], report)
            if torch.equal(chosen_ids, rejected_ids):
                report.equal_after_cut += 1
            else:
                examples.append(PreferenceExample(prompt_ids, chosen_ids, rejected_ids))
        return examples, report

    def _chat_ids(self, text: str) -> list[int]:
        if isinstance(text, Conversation):
            messages = [dict(message) for message in text.messages]
        else:
            messages = [{"role": "user", "content": text}]
        begun = messages[-1]["role"] == "assistant"  # the response then goes on from there
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
            )
        except _TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())
            raise BadInput(
                f"the tokenizer's chat template does not take the prompt {text[:60]!r} ({reason}); "
                "change this prompt, or give a template with {prompt}"
            ) from error
        # The template has written BOS where there is to be one.
        return self._ids(str(rendered), split_special_tokens=False)

    def _prompt_ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._template_pieces:
            ids += [piece] if isinstance(piece, int) else self._ids(piece.replace("{prompt}", text))
        return ids if ids[:1] == self._bos else self._bos + ids

    @cached_property
    def _template_pieces(self) -> list[int | str]:
        """The template as the texts between its special tokens, and the ids of these."""
        added = self.tokenizer.added_tokens_decoder.items()
        ids = {token.content: i for i, token in added if token.special}
        pattern = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        pieces = re.split(f"({pattern})", self.template) if ids else [self.template]
        return [ids.get(piece, piece) for piece in pieces if piece]

    @cached_property
    def _bos(self) -> list[int]:
        """BOS, if the tokenizer by itself starts a text with it."""
        first = self.tokenizer("x").input_ids[:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    def _ids(self, text: str, *, split_special_tokens: bool = True) -> list[int]:
        require(
            not _SURROGATE.search(text),
            f"{text[:60]!r} holds half of a surrogate pair, which is no text; drop it",
        )
        return self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            verbose=False,  # it would warn of lengths; what is cut is counted here
        ).input_ids


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
