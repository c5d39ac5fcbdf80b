"""Texts to ids for the policy: the template, BOS and EOS, and the cut to the room there is.

    prompt      BOS? template with the text in it     too long: its beginning goes, BOS stays
    response    text EOS                              too long: its end goes, EOS stays

Prompt and response are encoded apart and their ids joined, in every stage. As one text a tokenizer
may merge the end of the one with the beginning of the other, and the ids of a response that the
policy has sampled are in general not those that a tokenizer makes of its text. Joined, what is
trained on is what is sampled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data import PreferenceExample, PromptExample, SFTExample, UnpairedExample
from ..errors import require
from .chat import render_prompt, require_content
from .conversation import Conversation, Place, PlacedRow
from .cuts import CutReport, Unencodable
from .reading import Read, TextReader
from .template import AS_IS, CHAT, require_template

Example = TypeVar("Example")


@dataclass(frozen=True)
class Codec:
    """Texts to ids for one tokenizer. The only place where a prompt gets its template.

    What a text spells like a special token is read as text, if the tokenizer can do so. In a chat
    template all special tokens are what they spell. With the template ``as_is`` prompt and response
    are exactly the ids that the tokenizer makes of them: no template, BOS or EOS is added.

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
        ids, in_part = self._read_prompt(text, report, place)
        bos = int(ids[:1] == [self.tokenizer.bos_token_id])
        kept = ids[:bos] + ids[bos + max(0, len(ids) - self.max_prompt_tokens) :]
        report.count_prompt(len(ids), len(kept))
        report.read_in_part += in_part
        report.without_bos += ids[:1] != self._reader.bos and len(self._reader.bos) > 0
        report.spelled += self._reader.spelled("prompts", text, place)
        return torch.tensor(kept)

    def encode_response(self, text: str, report: CutReport, place: Place = 0) -> Tensor:
        """Ids of the response and EOS, ``(T,)``; its end is cut off if it is too long."""
        ids, in_part = self._read_response(text)
        room, eos = self.max_response_tokens, self.tokenizer.eos_token_id
        ended = int(ids[-1] == eos)  # always, unless the text is taken as it is
        kept = ids[: room - ended] + ids[-1:] * ended if len(ids) > room else ids
        report.count_response(len(ids), len(kept))
        report.read_in_part += in_part
        report.responses_with_eos += kept[-1] == eos
        report.eos_in_text += eos in kept[:-1]
        report.spelled += self._reader.spelled("responses", text, place)
        return torch.tensor(kept)

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
            prompt_ids = self.encode_prompt(row["prompt"], report, place)
            return [SFTExample(prompt_ids, self.encode_response(row["response"], report, place))]

        return _encode(rows, encode)

    def encode_preferences(
        self, rows: Sequence[Mapping[str, str]]
    ) -> tuple[list[PreferenceExample], CutReport]:
        """DPO: rows with ``prompt``, ``chosen`` and ``rejected``. Both share the prompt's ids.

        Pairs whose responses are equal to the model, perhaps because of the cut, teach nothing.
        """

        def encode(
            row: Mapping[str, str], report: CutReport, place: Place
        ) -> list[PreferenceExample]:
            prompt_ids = self.encode_prompt(row["prompt"], report, place)
            chosen_ids = self.encode_response(row["chosen"], report, place)
            rejected_ids = self.encode_response(row["rejected"], report, place)
            if torch.equal(chosen_ids, rejected_ids):
                was_cut = report.responses_cut > 0  # the report is this row's
                report.equal_after_cut += was_cut
                report.equal_tokens += not was_cut
                return []
            return [PreferenceExample(prompt_ids, chosen_ids, rejected_ids)]

        return _encode(rows, encode)

    def encode_unpaired(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[UnpairedExample], CutReport]:
        """KTO: rows with ``prompt``, ``response`` and ``label``, which is True or False."""

        def encode(
            row: Mapping[str, Any], report: CutReport, place: Place
        ) -> list[UnpairedExample]:
            prompt_ids = self.encode_prompt(row["prompt"], report, place)
            response_ids = self.encode_response(row["response"], report, place)
            return [UnpairedExample(prompt_ids, response_ids, row["label"])]

        return _encode(rows, encode)

    @cached_property
    def _reader(self) -> TextReader:
        return TextReader(self.tokenizer)

    def _read_prompt(self, text: str, report: CutReport, place: Place) -> Read:
        room = self.max_prompt_tokens
        if self.template == AS_IS:
            if isinstance(text, Conversation):
                raise Unencodable(
                    f"--template {AS_IS} takes texts, no messages",
                    text,
                    f"--template {CHAT} writes them with the tokenizer's chat template",
                )
            read = self._reader.read(text, room=room, special=True)
        elif self.template == CHAT:
            rendered, unchanged = render_prompt(self.tokenizer, text)
            report.changed += [] if unchanged else [place]
            # If there is to be a BOS, the template has written it.
            read = self._reader.read(rendered, room=room, special=True)
        else:
            read = self._reader.read_in_template(self.template, text, room=room)
        if not read.ids:
            raise Unencodable(
                "the tokenizer makes no token of the prompt",
                text,
                "drop this prompt, or give a template with words of its own",
            )
        return read

    def _read_response(self, text: str) -> Read:
        as_is = self.template == AS_IS
        ids, in_part = self._reader.read(
            text, room=self.max_response_tokens, special=as_is, from_start=True
        )
        if not as_is:
            return Read([*ids, self.tokenizer.eos_token_id], in_part)
        if not ids:
            raise Unencodable("the tokenizer makes no token of the response", text, "drop this row")
        return Read(ids, in_part)


def _encode(
    rows: Sequence[Mapping[str, Any]],
    encode: Callable[[Mapping[str, Any], CutReport, Place], list[Example]],
) -> tuple[list[Example], CutReport]:
    """Examples of the rows. A row that cannot be used is dropped, reported and not counted."""
    report, examples = CutReport(), []
    for number, row in enumerate(rows, 1):
        place = row.place if isinstance(row, PlacedRow) else number
        of_row = CutReport()
        try:
            examples += encode(row, of_row, place)
        except Unencodable as error:
            report.dropped.append((error.reason, place))
        else:
            report.add(of_row)
    return examples, report
