"""From texts to tensors: padding, encoding, cutting, grouping, and the order of the examples."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_close
from tiny import EOS, PAD, StubTokenizer, gpt2, policy, token_rows, words
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tolerances import EXACT

from rlhf_min import data
from rlhf_min.data import (
    Codec,
    Cursor,
    CutReport,
    Sequences,
    collate,
    in_groups,
    micro_batches,
)
from rlhf_min.encoding.conversation import Conversation, PlacedRow
from rlhf_min.errors import BadInput
from rlhf_min.losses import sft_loss
from rlhf_min.world import train_bpe


def codec(prompt: int = 8, response: int = 8, template: str = "{prompt}\n") -> Codec:
    return Codec(words(), max_prompt_tokens=prompt, max_response_tokens=response, template=template)


# collate


def test_collate_as_drawn():
    # the drawing: p p p | r0 r1 EOS pad, P = 3, T = 4; the second row is longer on the right
    batch = collate(
        [torch.tensor([11, 12, 13]), torch.tensor([14])],
        [torch.tensor([21, 22, EOS]), torch.tensor([23, 24, 25, EOS])],
        pad_id=9,
    )
    assert batch.ids.tolist() == [[11, 12, 13, 21, 22, EOS], [14, 23, 24, 25, EOS, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert batch.prompt_lengths.tolist() == [3, 1]
    assert batch.responses.tolist() == [[21, 22, EOS, 9], [23, 24, 25, EOS]]
    assert batch.mask.tolist() == [[True, True, True, False], [True, True, True, True]]
    assert batch.mask.dtype == torch.bool
    assert len(batch) == 2


def test_collate_masks_do_not_look_at_ids():
    # PAD and EOS in the middle of prompts and responses are real tokens
    batch = collate(
        [torch.tensor([PAD, 5]), torch.tensor([EOS])],
        [torch.tensor([PAD, EOS, PAD]), torch.tensor([PAD])],
        pad_id=PAD,
    )
    assert batch.attention_mask.sum(1).tolist() == [5, 2]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]


def test_pad_equal_to_eos_changes_nothing():
    model = policy(gpt2(), critic="shared")
    prompts, responses = (
        token_rows([3, 1, 4], seed=0),
        token_rows([2, 5, 1], seed=1, eos=True),
    )
    results = []
    for pad_id in (PAD, EOS, 17):
        batch = collate(prompts, responses, pad_id=pad_id)
        found = model(batch)
        loss = sft_loss(found.logprobs, batch.mask).loss
        gradients = torch.autograd.grad(loss, list(model.lm.parameters()))
        results.append([*found, loss, *gradients])
    for other in results[1:]:
        for now, first in zip(other, results[0], strict=True):
            assert_close(now, first, EXACT)


@pytest.mark.parametrize(
    ("prompts", "responses"),
    [([[1], []], [[1], [1]]), ([[1], [1]], [[], [1]]), ([[1]], [[1], [1]])],
)
def test_collate_refuses_rows_that_predict_nothing(prompts, responses):
    with pytest.raises(ValueError, match=r"at least one|shorter|longer"):
        collate(
            [torch.tensor(p, dtype=torch.long) for p in prompts],
            [torch.tensor(r, dtype=torch.long) for r in responses],
            pad_id=0,
        )


lengths = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6)


@given(lengths, st.data())
def test_select_is_collate_of_those_rows(lengths, data):
    prompts = token_rows([p for p, _ in lengths], seed=0)
    responses = token_rows([r for _, r in lengths], seed=1)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
    part = collate(prompts, responses, pad_id=7).select(rows)
    alone = collate([prompts[i] for i in rows], [responses[i] for i in rows], pad_id=7)
    for name in Sequences.__dataclass_fields__:
        assert_close(getattr(part, name), getattr(alone, name), EXACT)


def test_to_moves_every_tensor():
    moved = collate([torch.tensor([3])], [torch.tensor([4])], pad_id=0).to("meta")
    assert {getattr(moved, n).device.type for n in Sequences.__dataclass_fields__} == {"meta"}


# Codec


def test_prompt_stands_in_the_template():
    # <eos> 1, <unk> 2, ba 3, be 4, bi 5, bo 6, bu 7
    report = CutReport()
    ids = codec(template="ba {prompt} bu").encode_prompt("be bi", report)
    assert ids.tolist() == [3, 4, 5, 7]
    assert (report.prompts, report.prompts_cut, report.prompt_tokens_cut) == (1, 0, 0)


def test_other_braces_are_plain_text():
    # neither {0} nor {prompt} inside the user's text is filled in, nor {be} in the template
    plain = words()
    found = codec(template="{be} {{prompt}}").encode_prompt("ba", CutReport())
    assert found.tolist() == plain("{be} {ba}", add_special_tokens=False).input_ids
    for typed in ("ba {0} be", "ba {prompt} be", "{"):
        found = codec(template="bu {prompt} bu").encode_prompt(typed, CutReport())
        assert found.tolist() == plain(f"bu {typed} bu", add_special_tokens=False).input_ids


def test_a_long_prompt_loses_its_beginning():
    report, short = CutReport(), codec(prompt=3, template="ba {prompt} bu")
    assert short.encode_prompt("be bi bo", report).tolist() == [5, 6, 7]  # of 3 4 5 6 7
    assert short.encode_prompt("be", report).tolist() == [3, 4, 7]
    assert (report.prompts, report.prompts_cut, report.prompt_tokens_cut) == (2, 1, 2)


def test_a_long_response_loses_its_end_and_keeps_eos():
    report, short = CutReport(), codec(response=3)
    assert short.encode_response("ba be bi bo bu", report).tolist() == [3, 4, EOS]
    assert short.encode_response("ba be", report).tolist() == [3, 4, EOS]
    assert short.encode_response("", report).tolist() == [EOS]
    assert (report.responses, report.responses_cut, report.response_tokens_cut) == (3, 1, 3)
    assert codec(response=1).encode_response("ba be", CutReport()).tolist() == [EOS]


def test_ids_are_longs_and_prompts_have_no_special_tokens():
    ids = codec().encode_response("", CutReport())
    assert ids.dtype == torch.long
    bos = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words().backend_tokenizer, eos_token="<eos>", bos_token="<eos>"
    )
    with_bos = Codec(bos, max_prompt_tokens=4, max_response_tokens=4)
    assert with_bos.encode_prompt("ba", CutReport()).tolist() == [3]


def test_cut_report_reads_as_a_sentence():
    report, short = CutReport(), codec(prompt=2, response=2)
    for typed in ("ba", "ba be bi bo", "ba be bi"):
        short.encode_prompt(typed, report)
    short.encode_response("ba be bi", report)
    report.equal_after_cut = 4
    assert str(report) == (
        "2 of 3 prompts cut (3 tokens lost); 1 of 1 responses cut (2 tokens lost); "
        "4 pairs dropped: equal after the cut"
    )
    assert str(CutReport(prompts=1)) == "0 of 1 prompts cut (0 tokens lost)"


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
        codec(**changes)
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
    examples, report = codec(prompt=2, template="{prompt} bu").encode_prompts(rows)
    assert [x.text for x in examples] == ["ba be bi", "bo"]
    assert [x.ids.tolist() for x in examples] == [[5, 7], [6, 7]]
    assert [dict(x.columns) for x in examples] == [
        {"answer": "bo", "kind": 1},
        {"answer": "", "kind": 2},
    ]
    assert (report.prompts, report.prompts_cut, report.prompt_tokens_cut) == (2, 1, 2)
    assert report.responses == 0


def test_encode_demonstrations():
    examples, report = codec(prompt=2, response=2).encode_demonstrations(
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
    examples, report = codec(prompt=2, response=3).encode_preferences(rows)
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
    examples, report = codec(prompt=2, response=3).encode_preferences(rows)
    assert (len(examples), report.equal_tokens, report.equal_after_cut) == (0, 1, 0)


def test_the_added_tokens_are_read_once(monkeypatch):
    reads, made = [], codec(prompt=2, response=3)
    read = type(made.tokenizer).added_tokens_decoder.fget
    counted = property(lambda tokenizer: reads.append(1) or read(tokenizer))
    monkeypatch.setattr(type(made.tokenizer), "added_tokens_decoder", counted)
    rows = [{"prompt": "ba", "response": "be"}]
    made.encode_demonstrations(rows)
    before = len(reads)
    made.encode_demonstrations(rows * 9)
    assert len(reads) == before


# Conversation

TALK = [
    {"role": "user", "content": "ba be"},
    {"role": "assistant", "content": "bi"},
    {"role": "user", "content": "bo"},
]


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

CHATML = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# <pad> 0, <eos> 1, <unk> 2, ba 3, be 4, bi 5, bo 6, bu 7, the special tokens of the chat from 28
SPECIALS = ["<user>", "<assistant>", "<system>", "<end>", "<s>"]
USER, ASSISTANT, SYSTEM, END, BOS = range(28, 33)


def chat_words(*, bos: bool = False, template: str | None = CHATML):
    """`words` with a chat template; with `bos` it starts every text with <s>, as Llama's does."""
    tokenizer = words()
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIALS})
    tokenizer.bos_token = "<s>"
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    tokenizer.chat_template = template
    assert tokenizer("ba").input_ids == ([BOS, 3] if bos else [3])
    return tokenizer


def chat_codec(
    prompt: int = 20, template: str = "chat", chat_template: str = CHATML, **how
) -> Codec:
    return Codec(chat_words(template=chat_template, **how), prompt, 8, template)


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
        codec(template="chat")
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
        assert str(report).endswith(
            "2 rows dropped: the tokenizer's chat template does not take the prompt (roles must "
            "alternate) (2: rows 30, b.csv:4)"
        )
        plain = [dict(row) for row in rows]
        assert [place for _, place in encode(plain)[1].dropped] == [2, 3]
    # what belongs to a prompt goes with it
    examples, _ = codec.encode_prompts([row | {"n": n} for n, row in enumerate(rows)])
    assert [example.columns["n"] for example in examples] == [0, 3]


def test_messages_that_the_chat_template_leaves_out_or_changes_are_counted():
    codec = chat_codec(
        chat_template="{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}> "
        "{{ m.content.split('/')[-1] | trim }} <end> {% endif %}{% endfor %}<assistant>"
    )
    system = [{"role": "system", "content": "bu"}]
    prompts = ["ba", " ba\n", Conversation([*system, *TALK]), "be / bi", Conversation(TALK)]
    report = codec.encode_prompts([{"prompt": prompt} for prompt in prompts])[1]
    assert report.changed == [3, 4]
    assert codec.notes(report)[-1] == (
        "warning: the chat template leaves out or changes a message of 2 of 5 prompts (rows 3, 4)"
    )


def test_what_a_chat_template_does_otherwise_is_told():
    # EOS is <eos>; what is before and after the assistant's turn are the templates' own words
    assert "strftime" not in CHATML
    ends = "ends an assistant's turn with ' <end> ', but a response ends with EOS, '<eos>'"
    (note,) = chat_codec().notes(CutReport())
    assert note.endswith(ends)
    good = CHATML.replace("<end>", "<eos>")
    assert chat_codec(chat_template=good).notes(CutReport()) == []
    (note,) = chat_codec(chat_template=good + "bo").notes(CutReport())
    assert "begins a response with ' <eos> <assistant> bo'" in note
    assert "in a conversation with ' <eos> <assistant> '" in note
    dated = "{{ strftime_now('%d') }} " + good
    assert "writes today's date" in " ".join(chat_codec(chat_template=dated).notes(CutReport()))


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
    assert report.reasons() == (
        "--template as_is takes texts, no messages (1: row 1), "
        "the tokenizer makes no token of the response (1: row 2), "
        "the tokenizer makes no token of the prompt (1: row 3)"
    )


def test_what_as_is_does_not_add_is_told():
    codec = chat_codec(template="as_is", bos=True)
    rows = [("<s> <user> ba", "be <eos>"), ("ba", "be"), ("<s> ba", "be <eos>")]
    report = codec.encode_demonstrations([{"prompt": p, "response": r} for p, r in rows])[1]
    assert codec.notes(report) == [
        "warning: 1 of 3 prompts do not begin with <s>, as this tokenizer's texts do; as_is adds "
        "none",
        "warning: 1 of 3 responses do not end with <eos>, so they teach no end; as_is adds none",
    ]
    report = codec.encode_prompts([{"prompt": "ba"}])[1]
    assert codec.notes(report)[0] == (
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
    assert codec.notes(report)[-2:] == [
        f"2 of 22 prompts spell special tokens (<user>, <end>; rows 1, 22), {reading}; --template "
        "as_is reads rows that went through a template before",
        "1 of 22 responses spell special tokens (<end>; row 1), which are read as text; --template "
        "as_is reads rows that went through a template before",
    ]


def test_a_row_whose_two_responses_spell_special_tokens_is_named_once():
    codec = chat_codec(template="{prompt}")
    row = {"prompt": "ba", "chosen": "be <end>", "rejected": "bi <end>"}
    (note,) = codec.notes(codec.encode_preferences([row, {**row, "chosen": "bo <user>"}])[1])
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
    codec = Codec(words(), 50, 50)
    rows = [{"prompt": text, "response": "ba"}, {"prompt": "ba", "response": text}]
    marks = [n.partition(" spell marks of another chat template (")[0::2]
             for n in codec.notes(codec.encode_demonstrations(rows)[1])]  # fmt: skip
    assert [told for told, _ in marks] == ["warning: 1 of 2 prompts", "warning: 1 of 2 responses"]
    assert [named.partition("; ")[2].partition(")")[0] for _, named in marks] == ["row 1", "row 2"]


@pytest.mark.parametrize(
    "text", ["a < b | c > d", "x <|> y", "a[i] <s", "# Human", "I said: ### no", "<br> <b>", "||"]
)
def test_other_texts_have_no_marks(text):
    report = CutReport()
    Codec(words(), 50, 50).encode_prompt(text, report)
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
        monkeypatch.setattr(data, "READ_AT_ONCE", most)
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
    assert "6 texts were read only as far as they may fit" in str(part)


def test_a_long_text_of_few_tokens_is_read_whole(monkeypatch):
    monkeypatch.setattr(data, "READ_AT_ONCE", 10)
    report, codec = CutReport(), Codec(words(), 4, 4, "{prompt}")
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
    assert str(report).endswith(
        "1 of 3 responses hold an EOS that their text spells; this tokenizer cannot read it as text"
    )


# Lengths


def test_lengths_are_those_before_the_cut():
    short = codec(prompt=2, response=2, template="{prompt} bu")
    _, report = short.encode_demonstrations(
        [{"prompt": "ba " * p, "response": "ba " * r} for p, r in [(1, 3), (4, 1), (2, 2)]]
    )
    assert report.prompt_lengths == [2, 5, 3]
    assert report.response_lengths == [4, 2, 3]  # EOS counted
    assert report.responses_with_eos == 3
    assert report.lengths() == "prompts 3, 5, 5; responses 3, 4, 4"
    both = CutReport()
    both.add(report)
    both.add(report)
    assert both.prompt_lengths == [2, 5, 3] * 2
    assert both.responses_with_eos == 6
    assert CutReport(prompts=3).lengths() == ""


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_percentiles_have_their_share_below_them(lengths):
    p50, p95, most = map(int, CutReport(prompt_lengths=lengths).lengths()[8:].split(", "))
    for percentile, share in ((p50, 0.5), (p95, 0.95)):
        assert percentile in lengths
        assert sum(x <= percentile for x in lengths) >= share * len(lengths)
        assert sum(x < percentile for x in lengths) < share * len(lengths)
    assert most == max(lengths)


# micro_batches


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 80))
def test_micro_batches_are_a_partition_within_the_limit(lengths, max_tokens):
    groups = micro_batches(lengths, max_tokens=max_tokens)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        padded = len(group) * max(lengths[row] for row in group)
        assert padded <= max_tokens or len(group) == 1


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(9, 40))
def test_micro_batches_of_sorted_rows_are_full(lengths, max_tokens):
    # longest first, and no group could have taken one more of the rows that follow
    groups = micro_batches(lengths, max_tokens=max_tokens)
    order = [lengths[row] for group in groups for row in group]
    assert order == sorted(lengths, reverse=True)
    for group in groups[:-1]:
        assert (len(group) + 1) * max(lengths[row] for row in group) > max_tokens


def test_micro_batches_of_equal_rows_keep_their_order():
    assert micro_batches([2, 2, 2], max_tokens=4) == [[0, 1], [2]]
    assert micro_batches([5], max_tokens=1) == [[0]]
    assert micro_batches([], max_tokens=1) == []


def test_in_groups():
    found = list(in_groups(["aa", "b", "cc", "d"], len, max_tokens=4))
    assert found == [["aa", "cc"], ["b", "d"]]


# Cursor


def expected_order(n: int, seed: int, epochs: int) -> list[int]:
    order = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed + epoch)
        order += torch.randperm(n, generator=generator).tolist()
    return order


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_take_goes_through_each_epoch_once(n, size, seed):
    cursor, taken = Cursor(range(n), seed), []
    for epoch in range(3):
        batches = [cursor.take(size) for _ in range(cursor.batches_per_epoch(size))]
        assert (cursor.epoch, cursor.position) == (epoch, n)
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        one_epoch = [x for batch in batches for x in batch]
        assert sorted(one_epoch) == list(range(n))
        taken += one_epoch
    assert taken == expected_order(n, seed, 3)


@given(st.integers(1, 12), st.lists(st.integers(0, 30), max_size=6), st.integers(0, 99))
def test_take_across_is_exact_and_leaves_out_nothing(n, sizes, seed):
    cursor, taken = Cursor(range(n), seed), []
    for size in sizes:
        batch = cursor.take_across(size)
        assert len(batch) == size
        taken += batch
    assert taken == expected_order(n, seed, sum(sizes) // n + 1)[: sum(sizes)]


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 9), st.integers(0, 9))
def test_a_restored_cursor_continues(n, size, before, after):
    cursor = Cursor("abcdefghijkl"[:n], seed=3)
    for _ in range(before):
        cursor.take(size)
    restored = Cursor("abcdefghijkl"[:n], seed=3, epoch=cursor.epoch, position=cursor.position)
    for _ in range(after):
        assert restored.take(size) == cursor.take(size)
        assert restored.take_across(size) == cursor.take_across(size)
        assert (restored.epoch, restored.position) == (cursor.epoch, cursor.position)


def test_seeds_give_other_orders():
    one, other = (Cursor(range(50), seed).take(50) for seed in (0, 100))
    assert one != other


def test_batches_per_epoch():
    assert [Cursor(range(7), 0).batches_per_epoch(n) for n in (1, 3, 7, 8)] == [7, 3, 1, 1]
