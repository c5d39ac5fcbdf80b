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
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tolerances import EXACT

from rlhf_min.data import (
    Codec,
    Conversation,
    Cursor,
    CutReport,
    Sequences,
    collate,
    in_groups,
    micro_batches,
)
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


def chat_codec(prompt: int = 20, template: str = "chat", **how) -> Codec:
    return Codec(chat_words(**how), prompt, 8, template)


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
