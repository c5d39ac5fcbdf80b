"""How a reward model reads two texts, against the tokenizer's own way of joining a pair."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import EOS, SYLLABLES, bert_syllables, syllables, text
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_min.encoding.pairs import LETTERS, PairCodec
from rlhf_min.harness.rows.encoding_report import summary
from rlhf_min.world import train_bpe

ROOM = 40  # of max_length; more than any pair below needs


def with_template(template, **special):
    """`words` with <s> and </s>, and what its template puts around a pair."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *SYLLABLES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = template
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **special)


def roberta_words():
    return with_template(
        processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), sep_token="</s>", cls_token="<s>"
    )


def xlnet_words():
    """The special tokens come last, and the very last has a type of its own."""
    template = processors.TemplateProcessing(
        single="$A:0 </s>:0 <s>:2",
        pair="$A:0 </s>:0 $B:1 </s>:1 <s>:2",
        special_tokens=[("</s>", 2), ("<s>", 1)],
    )
    return with_template(template, sep_token="</s>", cls_token="<s>")


def llama_words():
    """BOS before each of the two, and nothing between prompt and response of its own."""
    template = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return with_template(template)


def t5_words():
    """An end behind each of the two, and no separator by name."""
    template = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return with_template(template)


def words_with_sep():
    """It has a separator, and does not put it between two texts."""
    tokenizer = syllables()
    tokenizer.sep_token = "<unk>"
    return tokenizer


def unigram():
    """A SentencePiece vocabulary, in which special tokens are pieces like all others."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = [("▁", -3.0), *((c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz</>")]
    tokenizer = Tokenizer(models.Unigram([*((piece, 0.0) for piece in pieces), *letters], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "cls_token": "<s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", sep_token="</s>", **special
    )


def bytewise():
    return train_bpe(["ba be bi bo bu"], 300)


def numbers(low):
    return st.lists(st.integers(0, len(SYLLABLES) - 1), min_size=low, max_size=12)


@pytest.mark.parametrize("make", [bert_syllables, roberta_words, xlnet_words])
@given(prompt=numbers(0), response=numbers(0))
def test_a_tokenizer_that_separates_joins_the_two_in_its_own_way(make, prompt, response):
    tokenizer = make()
    codec = PairCodec(tokenizer, ROOM)
    (pair,), _ = codec.encode([text(prompt)], [text(response)])
    expected = tokenizer([text(prompt)], [text(response)], return_token_type_ids=True)
    found = codec.pad([pair], side="right", types=True)
    assert found.input_ids.tolist() == expected.input_ids
    assert found.token_type_ids.tolist() == expected.token_type_ids
    assert found.attention_mask.tolist() == expected.attention_mask
    assert (pair.prompt_tokens, pair.response_tokens) == (len(prompt), len(response))


@pytest.mark.parametrize("make", [syllables, words_with_sep, llama_words, bytewise])
@given(prompt=numbers(1), response=numbers(1))
def test_elsewhere_a_new_line_and_an_eos_are_added(make, prompt, response):
    tokenizer = make()
    codec = PairCodec(tokenizer, 10 * ROOM)
    (pair,), _ = codec.encode([text(prompt)], [text(response)])
    both = f"{text(prompt)}\n", f"{text(response)}"
    expected = tokenizer(*both).input_ids
    assert pair.ids.tolist() == [*expected, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "make", [bert_syllables, roberta_words, xlnet_words, syllables, llama_words, t5_words, bytewise]
)
@given(
    between=st.sampled_from([("", ""), (" ", ""), ("", " "), ("\n", ""), ("", "\n")]),
    prompt=numbers(1),
    response=numbers(1),
)
def test_two_parts_of_one_text_are_what_the_tokenizer_makes_of_it(make, between, prompt, response):
    tokenizer = make()
    codec = PairCodec(tokenizer, 10 * ROOM, one_text=True)
    first, second = f"{text(prompt)}{between[0]}", f"{between[1]}{text(response)}"
    (pair,), _ = codec.encode([first], [second])
    space = "" if any(between) else " "
    expected = tokenizer([f"{first}{space}{second}"], return_token_type_ids=True)
    found = codec.pad([pair], side="right", types=True)
    assert found.input_ids.tolist() == expected.input_ids
    assert found.token_type_ids.tolist() == expected.token_type_ids


@pytest.mark.parametrize("make", [bert_syllables, roberta_words, bytewise])
def test_a_text_of_one_part_has_no_space_added(make):
    codec = PairCodec(make(), ROOM, one_text=True)
    pairs, _ = codec.encode(["", "ba be"], ["ba be", ""])
    assert [pair.ids.tolist() for pair in pairs] == [make()("ba be").input_ids] * 2


def test_one_text_that_is_too_long_loses_the_end_of_the_response_first():
    # Of 8 tokens 6 are left for the two texts: prompt 2, response 5, of which 4 are kept.
    codec = PairCodec(bert_syllables(), 8, one_text=True)
    (pair,), report = codec.encode(["ba be"], ["bo bu da de di"])
    expected = bert_syllables()("ba be bo bu da de").input_ids
    assert pair.ids.tolist() == expected
    assert pair.cut
    assert (report.prompts_cut, report.responses_cut) == (0, 1)


@given(prompt=numbers(1), response=numbers(1))
def test_an_end_that_the_tokenizer_puts_there_is_no_second_time(prompt, response):
    tokenizer = t5_words()
    (pair,), report = PairCodec(tokenizer, 20).encode([text(prompt)], [text(response)])
    if report.responses_cut == report.prompts_cut == 0:
        assert pair.ids.tolist() == tokenizer(text(prompt), text(response)).input_ids
    assert pair.ids[-1] == tokenizer.eos_token_id
    assert int((pair.ids == tokenizer.eos_token_id).sum()) == 2  # of a response that is cut, too


SPELLED = {
    bert_syllables: "ba [SEP] be [PAD] [CLS] [MASK]",
    roberta_words: "ba </s> be <pad> <s>",
    llama_words: "ba </s> be <pad> <s>",
    unigram: "ba </s> be<pad></s></s> <s>",
    syllables: "ba <eos> be <pad> <eos>",
    bytewise: "ba<|endoftext|>be<|pad|><|endoftext|>",
}


@pytest.mark.parametrize("make", SPELLED, ids=lambda make: make.__name__)
def test_what_a_text_spells_is_no_special_token(make):
    tokenizer, spelled = make(), SPELLED[make]
    codec = PairCodec(tokenizer, 4 * ROOM)
    assert set(tokenizer(spelled, add_special_tokens=False).input_ids) & codec.spelled or (
        make in (roberta_words, llama_words)  # whose pre-tokenizer splits them
    )
    (pair,), _ = codec.encode([spelled], [spelled])
    special = [i for i in pair.ids.tolist() if i in codec.spelled | {tokenizer.eos_token_id}]
    own = [i for part in codec.special_ids for i in part]
    assert special == own + ([] if codec.separates else [tokenizer.eos_token_id])
    assert pair.prompt_tokens + pair.response_tokens + len(own) == len(pair.ids)


def test_a_special_token_that_cannot_be_read_as_text_is_unknown_and_counted():
    codec = PairCodec(unigram(), ROOM)
    (pair,), report = codec.encode(["ba"], ["b</s>"])
    assert pair.ids.tolist()[-4:] == [4, 6, 3, 2]  # "▁" "b" <unk> </s>
    assert (report.unknown_tokens, report.tokens) == (1, 6)
    codec.tokenizer.unk_token = None
    (pair,), report = PairCodec(codec.tokenizer, ROOM).encode(["ba"], ["b</s>"])
    assert pair.ids.tolist()[-3:] == [4, 6, 2]  # there is nothing that it could be


def test_the_backend_keeps_neither_cut_nor_padding(tmp_path):
    tokenizer = bert_syllables()
    codec = PairCodec(tokenizer, 12)
    codec.pad(codec.encode(["ba"] * 2, ["be " * 30, "bi"])[0], side="left", types=True)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["truncation"] is None
    assert saved["padding"] is None
    assert tokenizer("[SEP]", add_special_tokens=False).input_ids == [3]


def test_a_response_that_just_fits_is_whole():
    codec = PairCodec(syllables(), 8)  # 6 for the response with its EOS, 2 for the prompt
    for n, kept, cut in [(5, [3] * 5 + [EOS], False), (6, [3] * 6, True), (7, [3] * 6, True)]:
        (pair,), report = codec.encode([text([1] * 2)], [text([0] * n)])
        assert pair.ids.tolist() == [4, 4, *kept]
        assert pair.cut == cut
        assert (report.responses_cut, report.response_tokens_cut) == (cut, max(0, n - 5))
    (pair,), report = codec.encode([text([1] * 3)], [text([0] * 4)])
    assert pair.ids.tolist() == [4, 4, 4, 3, 3, 3, 3, EOS]  # a prompt that just fits
    assert report.prompts_cut == 0
    (pair,), report = codec.encode([text([1])], [text([0] * 6)])
    assert pair.ids.tolist() == [4, *[3] * 6, EOS]  # a short prompt leaves more
    assert report.responses_cut == 0


@pytest.mark.parametrize("from_end", [False, True])
def test_a_text_that_is_far_too_long_is_not_tokenised_whole(from_end, monkeypatch):
    codec, seen = PairCodec(bert_syllables(), 12), []
    call = type(codec.tokenizer).__call__

    def watched(tokenizer, texts, *args, **options):
        seen.extend(map(len, texts))
        return call(tokenizer, texts, *args, **options)

    monkeypatch.setattr(type(codec.tokenizer), "__call__", watched)
    long, short = "ba bo " * 100_000, "be"
    texts = ([long], [short]) if from_end else ([short], [long])
    (pair,), report = codec.encode(*texts)
    assert max(seen) == 12 * LETTERS
    words_kept = [5, 8] * 4
    expected = [2, *words_kept, 3, 6, 3] if from_end else [2, 6, 3, *words_kept, 3]
    assert pair.ids.tolist() == expected
    assert pair.cut != from_end
    assert report.read_in_part == 1
    assert "1 texts were read only as far as they may fit" in summary(report)
    cut = report.prompt_tokens_cut if from_end else report.response_tokens_cut
    assert cut == 12 * LETTERS // 3 + 1 - len(words_kept)


def test_a_word_without_end_is_cut_though_it_is_one_token():
    codec = PairCodec(bert_syllables(), 12)
    (pair,), report = codec.encode(["ba"], ["z" * (12 * LETTERS + 1)])
    assert pair.ids.tolist() == [2, 5, 3, 1, 3]
    assert pair.cut
    assert report.responses_cut == 1


def test_nothing_to_read_is_no_error():
    pairs, report = PairCodec(bert_syllables(), 12).encode([], [])
    assert pairs == []
    assert (report.prompts, report.responses) == (0, 0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_masked_on_either_side(side):
    codec = PairCodec(bert_syllables(), 12)
    pairs, _ = codec.encode(["ba", "ba be"], ["bo", "bi bi"])
    found = codec.pad(pairs, side=side, types=True)
    fill = [0, 0]
    row, types = [2, 5, 3, 8, 3], [0, 0, 0, 1, 1]
    expected = [row + fill, types + fill, [1] * 5 + fill]
    if side == "left":
        expected = [fill + row, fill + types, fill + [1] * 5]
    assert [found[k][0].tolist() for k in ("input_ids", "token_type_ids", "attention_mask")] == (
        expected
    )
    assert found.attention_mask[1].all()
    assert "token_type_ids" not in codec.pad(pairs, side=side, types=False)
    assert found.input_ids.dtype == torch.long
