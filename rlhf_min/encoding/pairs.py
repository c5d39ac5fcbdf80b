"""What a reward model reads: a prompt and a response, joined as its tokenizer joins two texts.

    BERT      [CLS] prompt [SEP] response [SEP]
    RoBERTa   <s> prompt </s> </s> response </s>
    GPT-2     prompt "\\n" response EOS

A tokenizer without a separator gets a new line between the two, and EOS behind the response, unless
it adds that by itself, as T5's does. If the two are too long, the response loses its end, and then
the prompt its beginning.

A classifier that is asked for one of its labels, such as the sentiment of a review, was trained on
single texts. It reads prompt and response as one, with nothing that its tokenizer does not add:

    BERT      [CLS] prompt response [SEP]
    GPT-2     prompt response

A response that goes on where the prompt ends is read as it stands; a space comes between the two if
neither has one there.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from tokenizers import Encoding
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..errors import require
from .cuts import CutReport

AT_ONCE = 1000  # texts in one call of the tokenizer
LETTERS = 64  # that are read for each token that there is room for


class TextPair(NamedTuple):
    """A prompt with a response: all ids, ``(L,)``, and how many of them each text has.

    `cut` says whether the response lost its end.
    """

    ids: Tensor
    prompt_tokens: int
    response_tokens: int
    cut: bool


class PairCodec:
    """Texts to ids for one tokenizer, the same in training and scoring.

    A text that spells a special token is read as plain text, or as unknown where the tokenizer
    cannot do that. So neither data nor a policy can write a separator, an end or padding.

    Args:
        tokenizer: a fast one with a pad token.
        max_length: tokens of both texts together, special tokens included.
        one_text: read prompt and response as one text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, one_text: bool = False
    ) -> None:
        self.tokenizer, self.max_length, self.one_text = tokenizer, max_length, one_text
        pair = tokenizer(*["x"] * (1 if one_text else 2), return_token_type_ids=True)
        of = pair.sequence_ids(0)  # 0 and 1 at the tokens of the texts, None at special ones
        texts = {0} if one_text else {0, 1}
        require(texts <= set(of), "the reward model's tokenizer makes no token of the letter x")
        first = of.index(0)
        end = first + of.count(0)
        second = end if one_text else of.index(1)
        ends = end, second + of.count(1)
        slices = slice(first), slice(ends[0], second), slice(ends[1], None)
        self.special_ids = [pair.input_ids[part] for part in slices]  # before, between and after
        self.separates = tokenizer.sep_token_id in self.special_ids[1]
        self.special_types = [pair.token_type_ids[part] for part in slices]
        self.text_types = pair.token_type_ids[first], pair.token_type_ids[ends[1] - 1]
        self.room = max_length - sum(map(len, self.special_ids))
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.spelled = special - {tokenizer.unk_token_id}

    def encode(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[list[TextPair], CutReport]:
        """The ids of each row, and what of the texts was cut or is unknown."""
        pairs, report = [], CutReport()
        before, between, after = self.special_ids
        ended = self.one_text or self.separates or self.tokenizer.eos_token_id in after
        eos_id = None if ended else self.tokenizer.eos_token_id
        if self.one_text:
            both = [_as_one(*texts) for texts in zip(prompts, responses, strict=True)]
            prompts, responses = [x[0] for x in both], [x[1] for x in both]
        elif not self.separates:
            prompts = [f"{prompt}\n" for prompt in prompts]
        for prompt, response in zip(
            self._read(prompts, report, from_end=True),
            self._read(responses, report, eos_id=eos_id),
            strict=True,
        ):
            # The response has what the prompt leaves. A quarter of the room at least stays for a
            # prompt that is as long: the response is judged by it.
            kept = response.fitting(max(self.room * 3 // 4, self.room - len(prompt.ids)))
            prompt_ids = prompt.ids[max(0, len(prompt.ids) - self.room + kept) :]
            ids = [*before, *prompt_ids, *between, *response.ids[:kept], *after]
            pair = TextPair(torch.tensor(ids), len(prompt_ids), kept, response.total > kept)
            pairs.append(pair)
            report.count_prompt(prompt.total, len(prompt_ids))
            report.count_response(response.total, kept)
        return pairs, report

    def pad(self, pairs: Sequence[TextPair], *, side: str, types: bool) -> BatchEncoding:
        """The rows as a batch, ``(B, L)`` each.

        Args:
            side: "right" or "left".
            types: whether the model has embeddings for the types of the two texts.
        """

        def padded(rows: list[Tensor], value: int) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

        inputs = {
            "input_ids": padded([pair.ids for pair in pairs], self.tokenizer.pad_token_id),
            "attention_mask": padded([torch.ones_like(pair.ids) for pair in pairs], 0),
        }
        if types:
            rows = [self._types(pair) for pair in pairs]
            inputs["token_type_ids"] = padded(rows, self.tokenizer.pad_token_type_id)
        return BatchEncoding(inputs)

    def _types(self, pair: TextPair) -> Tensor:
        before, between, after = self.special_types
        prompt = [self.text_types[0]] * pair.prompt_tokens
        response = [self.text_types[1]] * pair.response_tokens
        return torch.tensor([*before, *prompt, *between, *response, *after])

    def _read(
        self,
        texts: Sequence[str],
        report: CutReport,
        *,
        from_end: bool = False,
        eos_id: int | None = None,
    ) -> Iterator["_Tokens"]:
        """Each text's tokens, from its beginning or its end as far as any could be kept."""
        letters, unknown_id = LETTERS * self.max_length, self.tokenizer.unk_token_id
        for first in range(0, len(texts), AT_ONCE):
            some = texts[first : first + AT_ONCE]
            found = self.tokenizer(
                [text[-letters:] if from_end else text[:letters] for text in some],
                add_special_tokens=False,
                split_special_tokens=True,
                verbose=False,
            )
            for text, encoding in zip(some, found.encodings, strict=True):
                ids = [unknown_id if i in self.spelled else i for i in encoding.ids]
                ids = [i for i in ids if i is not None]
                report.tokens += len(ids)
                report.unknown_tokens += ids.count(unknown_id)
                in_part = len(text) > letters
                report.read_in_part += in_part
                if eos_id is not None and not in_part:
                    ids.append(eos_id)
                yield _Tokens(ids, encoding, len(ids) + in_part)


def _as_one(prompt: str, response: str) -> tuple[str, str]:
    """The two parts of one text. The white space between them is the response's, as tokenizers that
    keep it want it before a word."""
    if not prompt or not response:
        return prompt, response
    kept = prompt.rstrip()
    space = prompt[len(kept) :] or ("" if response[0].isspace() else " ")
    return kept, space + response


class _Tokens(NamedTuple):
    ids: list[int]
    encoding: Encoding
    total: int  # of the whole text, at least

    def fitting(self, room: int) -> int:
        """How many tokens are kept: no character that is several of them is cut in two."""
        kept, spans = min(room, len(self.ids)), self.encoding.offsets
        while 0 < kept < len(spans) and spans[kept][0] < spans[kept - 1][1]:
            kept -= 1
        return kept
