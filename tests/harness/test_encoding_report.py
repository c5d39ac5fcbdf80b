"""What is said of encoded rows: cuts, lengths, dropped rows, and what may not be meant."""

import re

import pytest
from codecs_of_words import CHATML, TALK, chat_codec, word_codec
from hypothesis import given
from hypothesis import strategies as st
from small import small_policy, small_reward_model, syllables

from rlhf_min import reward
from rlhf_min.encoding.codec import Codec
from rlhf_min.encoding.conversation import Conversation
from rlhf_min.encoding.cuts import CutReport
from rlhf_min.errors import BadInput
from rlhf_min.harness.rows.encoding_report import (
    describe,
    describe_heldout,
    describe_pairs,
    lengths,
    notes,
    summary,
)


def small_codec(room):
    return Codec(small_policy().tokenizer, 3, room, "{prompt}")


DEMONSTRATIONS = [
    {"prompt": "red ball", "response": "one"},
    {"prompt": "big red ball two", "response": "one two"},
    {"prompt": "red", "response": "one two one"},
    {"prompt": "blue", "response": "one"},
    {"prompt": "green", "response": "one"},
]


def test_cut_report_reads_as_a_sentence():
    report, short = CutReport(), word_codec(prompt=2, response=2)
    for typed in ("ba", "ba be bi bo", "ba be bi"):
        short.encode_prompt(typed, report)
    short.encode_response("ba be bi", report)
    report.equal_after_cut = 4
    assert summary(report) == (
        "2 of 3 prompts cut (3 tokens lost); 1 of 1 responses cut (2 tokens lost); "
        "4 pairs dropped: equal after the cut"
    )
    assert summary(CutReport(prompts=1)) == "0 of 1 prompts cut (0 tokens lost)"


def test_messages_that_the_chat_template_leaves_out_or_changes_are_counted():
    codec = chat_codec(
        chat_template="{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}> "
        "{{ m.content.split('/')[-1] | trim }} <end> {% endif %}{% endfor %}<assistant>"
    )
    system = [{"role": "system", "content": "bu"}]
    prompts = ["ba", " ba\n", Conversation([*system, *TALK]), "be / bi", Conversation(TALK)]
    report = codec.encode_prompts([{"prompt": prompt} for prompt in prompts])[1]
    assert report.changed == [3, 4]
    assert notes(report, codec)[-1] == (
        "warning: the chat template leaves out or changes a message of 2 of 5 prompts (rows 3, 4)"
    )


def test_what_a_chat_template_does_otherwise_is_told():
    # EOS is <eos>; what is before and after the assistant's turn are the templates' own words
    assert "strftime" not in CHATML
    ends = "ends an assistant's turn with ' <end> ', but a response ends with EOS, '<eos>'"
    (note,) = notes(CutReport(), chat_codec())
    assert note.endswith(ends)
    good = CHATML.replace("<end>", "<eos>")
    assert notes(CutReport(), chat_codec(chat_template=good)) == []
    (note,) = notes(CutReport(), chat_codec(chat_template=good + "bo"))
    assert "begins a response with ' <eos> <assistant> bo'" in note
    assert "in a conversation with ' <eos> <assistant> '" in note
    dated = "{{ strftime_now('%d') }} " + good
    assert "writes today's date" in " ".join(notes(CutReport(), chat_codec(chat_template=dated)))


def test_what_as_is_does_not_add_is_told():
    codec = chat_codec(template="as_is", bos=True)
    rows = [("<s> <user> ba", "be <eos>"), ("ba", "be"), ("<s> ba", "be <eos>")]
    report = codec.encode_demonstrations([{"prompt": p, "response": r} for p, r in rows])[1]
    assert notes(report, codec) == [
        "warning: 1 of 3 prompts do not begin with <s>, as this tokenizer's texts do; as_is adds "
        "none",
        "warning: 1 of 3 responses do not end with <eos>, so they teach no end; as_is adds none",
    ]
    report = codec.encode_prompts([{"prompt": "ba"}])[1]
    assert notes(report, codec)[0] == (
        "warning: --template as_is adds nothing, and no text spells a special token"
    )


@pytest.mark.parametrize(
    ("template", "reading"),
    [
        ("chat", "and go through the chat template once more"),
        ("{prompt} bu", "which are read as text"),
    ],
)
def test_texts_that_spell_special_tokens_are_told_with_their_rows(template, reading):
    codec = chat_codec(template=template)
    rows = [("<user> ba <end>", "be <end>"), *[("ba", "be")] * 20, ("<user> bu", "be")]
    report = codec.encode_demonstrations([{"prompt": p, "response": r} for p, r in rows])[1]
    assert notes(report, codec)[-2:] == [
        f"2 of 22 prompts spell special tokens (<user>, <end>; rows 1, 22), {reading}; --template "
        "as_is reads rows that went through a template before",
        "1 of 22 responses spell special tokens (<end>; row 1), which are read as text; --template "
        "as_is reads rows that went through a template before",
    ]


def test_a_row_whose_two_responses_spell_special_tokens_is_named_once():
    codec = chat_codec(template="{prompt}")
    row = {"prompt": "ba", "chosen": "be <end>", "rejected": "bi <end>"}
    (note,) = notes(codec.encode_preferences([row, {**row, "chosen": "bo <user>"}])[1], codec)
    assert note.startswith(
        "warning: 4 of 4 responses spell special tokens (<end>, <user>; rows 1, 2), "
    )


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user ba<|im_end|>",
        "<|begin_of_text|>ba",
        "[INST] ba [/INST]",
        "<<SYS>> be <</SYS>> ba",
        "### Human: ba\n### Assistant:",
        "### Instruction:\nba",
        "<start_of_turn>user ba<end_of_turn>",
        "ba</s>",
        "<｜User｜>ba",
    ],
)
def test_marks_of_the_template_of_another_model_are_told(text):
    codec = Codec(syllables(), 50, 50)
    rows = [{"prompt": text, "response": "ba"}, {"prompt": "ba", "response": text}]
    marks = [n.partition(" spell marks of another chat template (")[0::2]
             for n in notes(codec.encode_demonstrations(rows)[1], codec)]  # fmt: skip
    assert [told for told, _ in marks] == ["warning: 1 of 2 prompts", "warning: 1 of 2 responses"]
    assert [named.partition("; ")[2].partition(")")[0] for _, named in marks] == ["row 1", "row 2"]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_percentiles_have_their_share_below_them(found):
    p50, p95, most = map(int, lengths(CutReport(prompt_lengths=found))[8:].split(", "))
    for percentile, share in ((p50, 0.5), (p95, 0.95)):
        assert percentile in found
        assert sum(x <= percentile for x in found) >= share * len(found)
        assert sum(x < percentile for x in found) < share * len(found)
    assert most == max(found)


def test_report_of_demonstrations():
    codec = small_codec(room=4)
    assert describe(codec.encode_demonstrations(DEMONSTRATIONS)[1], codec) == (
        "1 of 5 prompts cut (1 tokens lost); 0 of 5 responses cut (0 tokens lost)\n"
        "  tokens before the cut (median, p95, max): prompts 1, 4, 4; responses 2, 4, 4; "
        "EOS is supervised in 100.0% of the responses"
    )


def test_many_cut_responses_are_a_warning():
    # a fifth is none yet; two of five are
    assert (
        describe(small_codec(3).encode_demonstrations(DEMONSTRATIONS)[1], small_codec(3)).count(
            "\n"
        )
        == 1
    )
    told = describe(small_codec(2).encode_demonstrations(DEMONSTRATIONS)[1], small_codec(2))
    assert told.splitlines()[2:] == [
        "  warning: 40% of the responses lose their end; raise --max_response_tokens, now 2, "
        "and --max_length with it"
    ]


def test_report_of_prompts_tells_nothing_of_responses():
    codec = small_codec(4)
    assert describe(codec.encode_prompts(DEMONSTRATIONS)[1], codec) == (
        "1 of 5 prompts cut (1 tokens lost)\n"
        "  tokens before the cut (median, p95, max): prompts 1, 4, 4"
    )


def test_supervised_eos_is_measured():
    codec = small_codec(4)
    report = codec.encode_demonstrations(DEMONSTRATIONS)[1]
    report.responses_with_eos = 2
    assert "EOS is supervised in 40.0% of the responses" in describe(report, codec)
    with pytest.raises(BadInput, match="none of the 5 responses ends with EOS") as caught:
        describe(CutReport(responses=5), codec)
    assert str(caught.value).isprintable()


def test_report_of_pairs_for_the_reward_model():
    reward_model = small_reward_model()  # 32 positions, 3 of them special, 27 beside a prompt of 2
    words = " ".join(["red"] * 31)
    pairs = [
        {"prompt": "red ball", "chosen": words, "rejected": "one"},
        {"prompt": "red ball two", "chosen": "one two", "rejected": "two one"},
    ]
    told = describe_pairs(reward.prepare_pairs(reward_model, pairs)[1], reward_model).splitlines()
    assert told[1:] == [
        "  tokens before the cut (median, p95, max): prompts 2, 3, 3; responses 2, 31, 31",
        "  warning: 25% of the responses lose their end; the reward model reads 32 tokens of "
        "prompt and response; give a --reward_model with more positions (a small new one: raise "
        "--max_length)",
    ]
    assert re.search(r"1 of 4 responses cut \(4 tokens lost\)", told[0])


def test_a_report_names_what_was_dropped_and_refuses_if_nothing_is_left():
    codec = small_codec(4)
    report = codec.encode_demonstrations([*DEMONSTRATIONS, {"prompt": "", "response": "one"}])[1]
    lines = describe(report, codec).splitlines()
    assert lines[0].endswith(
        "; 1 rows dropped: the tokenizer makes no token of the prompt (1: row 6)"
    )
    assert describe_heldout(report, 5) == (
        "\n  held out: 1 rows dropped: the tokenizer makes no token of the prompt (1: row 6)"
    )
    assert describe_heldout(CutReport(prompts=3), 3) == describe_heldout(CutReport(), 0) == ""
    nothing = "\n  warning: no held-out row is left, so nothing is measured on such rows"
    assert describe_heldout(report, 0) == describe_heldout(report, 5) + nothing
    equal = CutReport(prompts=3, equal_after_cut=2, equal_tokens=1)
    assert (
        describe_heldout(equal, 0) == "\n  held out: 3 pairs dropped: equal to the model" + nothing
    )
    report = codec.encode_prompts([{"prompt": ""}])[1]
    with pytest.raises(BadInput, match=r"no row is left: the tokenizer .*\(1: row 1\); change"):
        describe(report, codec)


def test_a_report_has_the_notes_of_its_codec():
    codec = small_codec(4)
    report = codec.encode_demonstrations([{"prompt": "red <end>", "response": "one"}])[1]
    assert describe(report, codec).splitlines()[2:] == [
        "  warning: 1 of 1 prompts spell special tokens (<end>; row 1), which are read as text; "
        "--template as_is reads rows that went through a template before"
    ]


def test_texts_as_they_are_without_an_end():
    codec = Codec(small_policy().tokenizer, 3, 4, "as_is")
    report = codec.encode_demonstrations(DEMONSTRATIONS)[1]
    with pytest.raises(BadInput, match=r"end them with the tokenizer's <end> .* adds none"):
        describe(report, codec)
    ended = [{**row, "response": f"{row['response']} <end>"} for row in DEMONSTRATIONS]
    assert "EOS is supervised in 100.0%" in describe(codec.encode_demonstrations(ended)[1], codec)
