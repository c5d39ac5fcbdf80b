"""From texts to ids: templates, BOS and EOS, special tokens in texts, and cuts."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from codecs_of_words import (
    ASSISTANT,
    BOS,
    CHATML,
    END,
    SYSTEM,
    TALK,
    USER,
    chat_codec,
    chat_words,
    word_codec,
)
from small import EOS, StubTokenizer, syllables
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from rlhf_min.encoding import reading
from rlhf_min.encoding.codec import Codec
from rlhf_min.encoding.conversation import Conversation, PlacedRow
from rlhf_min.encoding.cuts import CutReport
from rlhf_min.errors import BadInput
from rlhf_min.harness.rows.encoding_report import lengths, reasons, summary
from rlhf_min.world import train_bpe

# Codec


def test_prompt_stands_in_the_template():
    # <eos> 1, <unk> 2, ba 3, be 4, bi 5, bo 6, bu 7
    report = CutReport()
    ids = word_codec(template="ba {prompt} bu").encode_prompt("be bi", report)
    assert ids.tolist() == [3, 4, 5, 7]
    assert (report.prompts, report.prompts_cut, report.prompt_tokens_cut) == (1, 0, 0)


def test_other_braces_are_plain_text():
    # neither {0} nor {prompt} inside the user's text is filled in, nor {be} in the template
    plain = syllables()
    found = word_codec(template="{be} {{prompt}}").encode_prompt("ba", CutReport())
    assert found.tolist() == plain("{be} {ba}", add_special_tokens=False).input_ids
    for typed in ("ba {0} be", "ba {prompt} be", "{"):
        found = word_codec(template="bu {prompt} bu").encode_prompt(typed, CutReport())
        assert found.tolist() == plain(f"bu {typed} bu", add_special_tokens=False).input_ids


def test_a_long_prompt_loses_its_beginning():
    report, short = CutReport(), word_codec(prompt=3, template="ba {prompt} bu")
    assert short.encode_prompt("be bi bo", report).tolist() == [5, 6, 7]  # of 3 4 5 6 7
    assert short.encode_prompt("be", report).tolist() == [3, 4, 7]
    assert (report.prompts, report.prompts_cut, report.prompt_tokens_cut) == (2, 1, 2)


def test_a_long_response_loses_its_end_and_keeps_eos():
    report, short = CutReport(), word_codec(response=3)
    assert short.encode_response("ba be bi bo bu", report).tolist() == [3, 4, EOS]
    assert short.encode_response("ba be", report).tolist() == [3, 4, EOS]
    assert short.encode_response("", report).tolist() == [EOS]
    assert (report.responses, report.responses_cut, report.response_tokens_cut) == (3, 1, 3)
    assert word_codec(response=1).encode_response("ba be", CutReport()).tolist() == [EOS]


def test_ids_are_longs_and_prompts_have_no_special_tokens():
    ids = word_codec().encode_response("", CutReport())
    assert ids.dtype == torch.long
    bos = transformers.PreTrainedTokenizerFast(
        tokenizer_object=syllables().backend_tokenizer, eos_token="<eos>", bos_token="<eos>"
    )
    with_bos = Codec(bos, max_prompt_tokens=4, max_response_tokens=4)
    assert with_bos.encode_prompt("ba", CutReport()).tolist() == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 0}, "no room: 0 tokens are left for the prompt"),
        ({"response": 0}, "no room.* 0 for the response"),
        ({"prompt": -5}, "no room"),
        ({"template": "Question:"}, "template 'Question:'"),
        ({"template": "{prompt} {prompt}"}, "exactly once"),
    ],
)
def test_codec_refuses(changes, message):
    with pytest.raises(BadInput, match=message) as raised:
        word_codec(**changes)
    assert "\n" not in str(raised.value)


def test_codec_refuses_a_tokenizer_without_eos():
    without = StubTokenizer(eos_token_id=None)
    with pytest.raises(BadInput, match="no EOS token"):
        Codec(without, max_prompt_tokens=4, max_response_tokens=4)


def test_encode_prompts_keeps_text_and_columns():
    rows = [
        {"prompt": "ba be bi", "answer": "bo", "kind": 1},
        {"prompt": "bo", "answer": "", "kind": 2},
    ]
    examples, report = word_codec(prompt=2, template="{prompt} bu").encode_prompts(rows)
    assert [x.text for x in examples] == ["ba be bi", "bo"]
    assert [x.ids.tolist() for x in examples] == [[5, 7], [6, 7]]
    assert [dict(x.columns) for x in examples] == [
        {"answer": "bo", "kind": 1},
        {"answer": "", "kind": 2},
    ]
    assert (report.prompts, report.prompts_cut, report.prompt_tokens_cut) == (2, 1, 2)
    assert report.responses == 0


def test_encode_demonstrations():
    examples, report = word_codec(prompt=2, response=2).encode_demonstrations(
        [{"prompt": "ba be bi", "response": "bo"}, {"prompt": "ba", "response": "bo bu"}]
    )
    assert [x.prompt_ids.tolist() for x in examples] == [[4, 5], [3]]
    assert [x.response_ids.tolist() for x in examples] == [[6, EOS], [6, EOS]]
    assert (report.prompts_cut, report.responses_cut, report.responses) == (1, 1, 2)


def test_encode_preferences_shares_the_prompt_and_drops_what_the_cut_made_equal():
    rows = [
        {"prompt": "ba be bi", "chosen": "bo", "rejected": "bu"},
        {"prompt": "ba", "chosen": "bo bu ba", "rejected": "bo bu be"},  # both become "bo bu"
        {"prompt": "ba", "chosen": "bo bu ba", "rejected": "bo bu"},  # so do these
        {"prompt": "be", "chosen": "bo bu ba", "rejected": "bo"},
    ]
    examples, report = word_codec(prompt=2, response=3).encode_preferences(rows)
    found = [
        (x.prompt_ids.tolist(), x.chosen_ids.tolist(), x.rejected_ids.tolist()) for x in examples
    ]
    assert found == [([4, 5], [6, EOS], [7, EOS]), ([4], [6, 7, EOS], [6, EOS])]
    assert all(x.ref_logprobs is None for x in examples)
    assert report == CutReport(
        prompts=4,
        prompts_cut=1,
        prompt_tokens_cut=1,
        responses=8,
        responses_cut=4,
        response_tokens_cut=4,
        equal_after_cut=2,
    )


def test_pairs_that_are_equal_without_a_cut_are_told_as_such():
    rows = [{"prompt": "ba", "chosen": "bo bu", "rejected": "bo  bu"}]
    examples, report = word_codec(prompt=2, response=3).encode_preferences(rows)
    assert (len(examples), report.equal_tokens, report.equal_after_cut) == (0, 1, 0)


def test_the_added_tokens_are_read_once(monkeypatch):
    reads, made = [], word_codec(prompt=2, response=3)
    read = type(made.tokenizer).added_tokens_decoder.fget
    counted = property(lambda tokenizer: reads.append(1) or read(tokenizer))
    monkeypatch.setattr(type(made.tokenizer), "added_tokens_decoder", counted)
    rows = [{"prompt": "ba", "response": "be"}]
    made.encode_demonstrations(rows)
    before = len(reads)
    made.encode_demonstrations(rows * 9)
    assert len(reads) == before


# Conversation


def test_a_conversation_is_its_text():
    talk = Conversation(TALK)
    assert talk == "user: ba be\n\nassistant: bi\n\nuser: bo"
    assert hash(talk) == hash(str(talk))
    assert {talk: 1}["user: ba be\n\nassistant: bi\n\nuser: bo"] == 1
    assert Conversation(TALK[:1]) == "ba be"
    assert Conversation(TALK[1:2]) == "assistant: bi"
    assert Conversation([]) == ""
    assert json.loads(json.dumps([talk])) == [str(talk)]
    for same in (copy.deepcopy(talk), pickle.loads(pickle.dumps(talk))):
        assert same == talk
        assert same.messages == talk.messages == tuple(TALK)


def test_a_conversation_keeps_what_it_was_given():
    given = copy.deepcopy(TALK)
    talk = Conversation(given)
    given[0]["content"] = "else"
    assert talk.messages == tuple(TALK)


# Chat templates


@pytest.mark.parametrize("bos", [False, True])
def test_chat_template_with_the_turn_of_the_assistant_begun(bos):
    codec, report = chat_codec(bos=bos), CutReport()
    # a plain text is one message of the user; nothing is added to what the template writes
    assert codec.encode_prompt("ba be", report).tolist() == [USER, 3, 4, END, ASSISTANT]
    talk = Conversation([{"role": "system", "content": "bu"}, *TALK])
    expected = [SYSTEM, 7, END, USER, 3, 4, END, ASSISTANT, 5, END, USER, 6, END, ASSISTANT]
    assert codec.encode_prompt(talk, report).tolist() == expected
    # a turn of the assistant that is last goes on in the response
    begun = Conversation(TALK[:2])
    assert codec.encode_prompt(begun, report).tolist() == [USER, 3, 4, END, ASSISTANT, 5]
    assert report.prompt_lengths == [5, 14, 6]
    assert codec.encode_response("ba", report).tolist() == [3, EOS]


def test_bos_of_a_chat_template_is_the_only_one_and_survives_the_cut():
    with_bos = chat_codec(bos=True, template="chat")
    with_bos.tokenizer.chat_template = "<s> " + CHATML
    assert with_bos.encode_prompt("ba be", CutReport()).tolist() == [
        BOS, USER, 3, 4, END, ASSISTANT
    ]  # fmt: skip
    report, short = CutReport(), Codec(with_bos.tokenizer, 4, 8, "chat")
    assert short.encode_prompt("ba be", report).tolist() == [BOS, 4, END, ASSISTANT]
    assert (report.prompts_cut, report.prompt_tokens_cut) == (1, 2)


def test_a_text_template_takes_the_text_of_a_conversation():
    codec = chat_codec(template="{prompt} bu")
    talk = Conversation(TALK)
    assert codec.encode_prompt(talk, CutReport()).tolist() == (
        codec.encode_prompt(str(talk), CutReport()).tolist()
    )
    assert codec.encode_prompt(Conversation(TALK[:1]), CutReport()).tolist() == [3, 4, 7]


def test_chat_needs_a_chat_template():
    with pytest.raises(BadInput, match="no chat template; give a text with") as caught:
        word_codec(template="chat")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must\nalternate') }}", "{{ messages[0].no.thing }}"]
)
def test_a_chat_template_that_refuses_a_prompt(template):
    with pytest.raises(BadInput, match=r"chat template does not take the prompt 'ba be'") as caught:
        Codec(chat_words(template=template), 8, 8, "chat").encode_prompt("ba be", CutReport())
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith("change this prompt, or give a template with {prompt}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m.role }}> <end> {% endfor %}",
        "{% for m in messages %}<{{ m.role }}> {{ m.text }} <end> {% endfor %}",
        "{% for m in messages %}<{{ m.role }}> {{ m.content[0].text }} <end> {% endfor %}",
        "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}<s>",
        "{% for m in messages %}<{{ m.role }}> {{ m.content[:9] }} <end> {% endfor %}",
    ],
    ids=["none", "another key", "parts", "system alone", "cut"],
)
def test_a_chat_template_that_leaves_the_content_out(template):
    with pytest.raises(BadInput, match="chat template leaves out what the user says") as caught:
        Codec(chat_words(template=template), 9, 9, "chat")
    assert str(caught.value).isprintable()


REFUSES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)


def test_rows_that_the_chat_template_refuses_are_dropped_with_their_places():
    codec = chat_codec(chat_template=REFUSES)
    talks = [["user"], ["system", "user"], ["user", "user"], ["user", "assistant", "user"]]
    prompts = [Conversation([{"role": r, "content": "ba"} for r in roles]) for roles in talks]
    rows = [
        PlacedRow({"prompt": prompt, "response": "be", "chosen": "be", "rejected": "bi"}, place)
        for prompt, place in zip(prompts, (2, 30, "b.csv:4", 50), strict=True)
    ]
    for encode in (codec.encode_prompts, codec.encode_demonstrations, codec.encode_preferences):
        examples, report = encode(rows)
        assert len(examples) == report.prompts == 2
        assert summary(report).endswith(
            "2 rows dropped: the tokenizer's chat template does not take the prompt (roles must "
            "alternate) (2: rows 30, b.csv:4)"
        )
        plain = [dict(row) for row in rows]
        assert [place for _, place in encode(plain)[1].dropped] == [2, 3]
    # what belongs to a prompt goes with it
    examples, _ = codec.encode_prompts([row | {"n": n} for n, row in enumerate(rows)])
    assert [example.columns["n"] for example in examples] == [0, 3]


# Texts that went through a template before


def test_as_is_are_exactly_the_ids_of_the_tokenizer():
    for bos in (False, True):
        codec, report = chat_codec(template="as_is", bos=bos), CutReport()
        for text in ("<s> <user> ba <end> <assistant>", "ba", "<s> <s> be", "<user> bu <eos>"):
            expected = codec.tokenizer(text, add_special_tokens=False).input_ids
            assert codec.encode_prompt(text, report).tolist() == expected
            assert codec.encode_response(text, report).tolist() == expected
        assert (report.responses, report.responses_with_eos) == (4, 1)


def test_a_long_text_as_it_is_keeps_its_bos_and_its_eos():
    codec, report = Codec(chat_words(), 3, 3, "as_is"), CutReport()
    assert codec.encode_prompt("<s> ba be <end> bi", report).tolist() == [BOS, END, 5]
    assert codec.encode_response("ba be bi bo <eos>", report).tolist() == [3, 4, EOS]
    assert codec.encode_response("ba be bi bo", report).tolist() == [3, 4, 5]
    assert codec.encode_response("ba be <eos>", report).tolist() == [3, 4, EOS]
    assert (report.responses_cut, report.response_tokens_cut) == (2, 2 + 1)
    assert report.responses_with_eos == 2


def test_what_as_is_cannot_take_is_dropped():
    rows = [
        {"prompt": Conversation(TALK), "response": "ba"},
        {"prompt": "ba", "response": "\u200b"},
        {"prompt": "\u200b", "response": "ba"},
        {"prompt": "ba", "response": "be <eos>"},
    ]
    bpe = train_bpe(["ba be bi"], 300)
    bpe.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    examples, report = Codec(bpe, 9, 9, "as_is").encode_demonstrations(rows)
    assert (len(examples), report.prompts, report.responses) == (1, 1, 1)
    assert reasons(report) == (
        "--template as_is takes texts, no messages (1: row 1), "
        "the tokenizer makes no token of the response (1: row 2), "
        "the tokenizer makes no token of the prompt (1: row 3)"
    )


@pytest.mark.parametrize(
    "text", ["a < b | c > d", "x <|> y", "a[i] <s", "# Human", "I said: ### no", "<br> <b>", "||"]
)
def test_other_texts_have_no_marks(text):
    report = CutReport()
    Codec(syllables(), 50, 50).encode_prompt(text, report)
    assert report.spelled == []


# Texts of megabytes


@pytest.mark.parametrize("template", ["{prompt}\n", "chat", "as_is"])
def test_a_text_of_megabytes_is_read_only_as_far_as_it_may_fit(monkeypatch, template):
    tokenizer = train_bpe(["ba be bi bo bu"] * 3, 300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    codec = Codec(tokenizer, 7, 7, template)
    start = "<s>" if template == "as_is" else ""
    texts = [start + "ba be bi bo bu " * 40, start + "abc" * 400, start + "é😀" * 300]
    reports = []
    found = []
    for most in (10**6, 450):
        monkeypatch.setattr(reading, "READ_AT_ONCE", most)
        reports.append(CutReport())
        found.append(
            [codec.encode_prompt(text, reports[-1]).tolist() for text in texts]
            + [codec.encode_response(text, reports[-1]).tolist() for text in texts]
        )
    assert found[0] == found[1]
    whole, part = reports
    assert (whole.read_in_part, part.read_in_part) == (0, 6)
    assert part.prompt_tokens_cut < whole.prompt_tokens_cut
    assert (part.prompts_cut, part.responses_cut) == (3, 3)
    assert "6 texts were read only as far as they may fit" in summary(part)


def test_a_long_text_of_few_tokens_is_read_whole(monkeypatch):
    monkeypatch.setattr(reading, "READ_AT_ONCE", 10)
    report, codec = CutReport(), Codec(syllables(), 4, 4, "{prompt}")
    text = f"{'x' * 1000} ba"  # two words, the first of them unknown
    assert codec.encode_prompt(text, report).tolist() == [2, 3]
    assert codec.encode_response(text, report).tolist() == [2, 3, EOS]
    assert report.read_in_part == 0


# BOS and special tokens in a text template


@pytest.mark.parametrize("template", ["{prompt} bu", "<s> {prompt} bu"])
def test_one_bos_where_the_tokenizer_starts_with_it(template):
    codec, report = chat_codec(template=template, bos=True), CutReport()
    assert codec.encode_prompt("ba be", report).tolist() == [BOS, 3, 4, 7]
    assert codec.encode_response("ba", report).tolist() == [3, EOS]
    assert report.prompt_lengths == [4]


def test_bos_survives_the_cut():
    report, how = CutReport(), {"template": "{prompt} bu", "bos": True}
    found = [
        chat_codec(room, **how).encode_prompt("ba be bi", report).tolist() for room in (5, 4, 2, 1)
    ]
    assert found == [[BOS, 3, 4, 5, 7], [BOS, 4, 5, 7], [BOS, 7], [BOS]]
    assert (report.prompts, report.prompts_cut, report.prompt_tokens_cut) == (4, 3, 1 + 3 + 4)


def test_special_tokens_are_read_in_the_template_and_not_in_texts():
    codec = chat_codec(template="<user> {prompt} <end> bu <assistant>")
    plain = codec.tokenizer.backend_tokenizer
    plain.encode_special_tokens = True
    typed = plain.encode("ba <end> <eos> be", add_special_tokens=False).ids
    plain.encode_special_tokens = False
    assert END not in typed
    assert EOS not in typed
    found = codec.encode_prompt("ba <end> <eos> be", CutReport()).tolist()
    assert found == [USER, *typed, END, 7, ASSISTANT]
    report = CutReport()
    found = codec.encode_response("ba <end> <eos> be", report).tolist()
    assert found == [*typed[:7], EOS]
    assert report.eos_in_text == 0
    # nothing is left behind in the tokenizer
    assert codec.tokenizer("<end>", add_special_tokens=False).input_ids == [END]


def test_eos_in_a_text_is_text_for_byte_level_bpe():
    tokenizer = train_bpe(["hello world"], 300)
    codec, report = Codec(tokenizer, 80, 80, "{prompt}\n"), CutReport()
    text = "hello<|endoftext|> world<|pad|>"
    for ids in (codec.encode_prompt(text, report)[:-1], codec.encode_response(text, report)[:-1]):
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids.tolist())
        assert tokenizer.decode(ids) == text
    assert report.eos_in_text == 0


def test_eos_in_a_text_is_counted_where_the_tokenizer_knows_the_word():
    # split or not, this tokenizer looks up whole words, and EOS is one of them
    vocabulary = {"<end>": 0, "ba": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    codec = Codec(
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), 4, 4
    )
    _, report = codec.encode_demonstrations(
        [{"prompt": "ba", "response": r} for r in ("ba <end> ba", "ba", "ba ba ba <end>")]
    )
    assert report.eos_in_text == 1  # the third loses it to the cut
    assert summary(report).endswith(
        "1 of 3 responses hold an EOS that their text spells; this tokenizer cannot read it as text"
    )


# Lengths


def test_lengths_are_those_before_the_cut():
    short = word_codec(prompt=2, response=2, template="{prompt} bu")
    _, report = short.encode_demonstrations(
        [{"prompt": "ba " * p, "response": "ba " * r} for p, r in [(1, 3), (4, 1), (2, 2)]]
    )
    assert report.prompt_lengths == [2, 5, 3]
    assert report.response_lengths == [4, 2, 3]  # EOS counted
    assert report.responses_with_eos == 3
    assert lengths(report) == "prompts 3, 5, 5; responses 3, 4, 4"
    both = CutReport()
    both.add(report)
    both.add(report)
    assert both.prompt_lengths == [2, 5, 3] * 2
    assert both.responses_with_eos == 6
    assert lengths(CutReport(prompts=3)) == ""
