"""The embedded world: deterministic, disjoint, with a gold reward that cannot be talked round."""

import hashlib
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tolerances import EXACT, FP64
from transformers import AutoTokenizer

from rlhf_min.errors import BadInput
from rlhf_min.world import (
    KINDS,
    Question,
    World,
    build_wordpiece,
    gold_parts,
    make_world,
    small_bert,
    small_gpt2,
    train_bpe,
)
from rlhf_min.world.dataset import SHARPNESS
from rlhf_min.world.questions import CATEGORIES, COLOURS, OPPOSITES

ROOT = Path(__file__).parents[2]
UNICODE = [
    "naïve café 日本語 🤖👍🏽",
    "tabs\tand\r\nlines",
    " leading",
    "e\u0301 \u200d \U0001f9e0",
    "",
]


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


@pytest.fixture(scope="module")
def bpe(world):
    return train_bpe(world.texts, 1000)


@pytest.fixture(scope="module")
def wordpiece(world):
    return build_wordpiece(world.texts, 1000)


def everything(world: World) -> str:
    return json.dumps([{**vars(q)} for q in (*world.train, *world.validation, *world.test)]) + str(
        [world.demonstrations, world.pairs, world.heldout_demonstrations, world.heldout_pairs]
    )


FINGERPRINT = """
import hashlib, sys
sys.path[:0] = ["tests", "tests/unit"]
from test_world import everything
from rlhf_min.world import build_wordpiece, make_world, train_bpe
world = make_world(3, n_sft=900, n_pairs=900, n_heldout_pairs=90)
tokenizers = [make(world.texts, 800) for make in (train_bpe, build_wordpiece)]
vocabularies = [sorted(t.get_vocab().items(), key=lambda item: item[1]) for t in tokenizers]
ids = [t(world.texts[:500])["input_ids"] for t in tokenizers]
print(hashlib.sha256((everything(world) + str(vocabularies) + str(ids)).encode()).hexdigest())
"""


def test_two_processes_make_the_same_world_and_tokenizers():
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", FINGERPRINT],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    first, second = (run.communicate()[0].strip() for run in runs)
    assert len(first) == len(hashlib.sha256().hexdigest())
    assert first == second


def test_another_seed_is_another_world(world):
    assert everything(make_world(1, n_sft=10, n_pairs=10, n_heldout_pairs=10)) != everything(world)


def test_questions_are_many_distinct_and_of_all_kinds(world):
    splits = {"train": world.train, "validation": world.validation, "test": world.test}
    texts = [q.text for split in splits.values() for q in split]
    assert len(texts) == len(set(texts)) >= 20_000
    assert len({word.lower() for text in texts for word in re.findall(r"\w+", text)}) >= 200
    assert len(world.test) >= 1_000
    for split in splits.values():
        assert set(Counter(q.kind for q in split)) == set(KINDS)


def test_rows_use_the_questions_of_their_split(world):
    train, validation = ({q.text for q in split} for split in (world.train, world.validation))
    assert {row["prompt"] for row in (*world.demonstrations, *world.pairs)} <= train
    assert {
        r["prompt"] for r in (*world.heldout_demonstrations, *world.heldout_pairs)
    } <= validation
    assert all(row["chosen"] != row["rejected"] for row in world.pairs)


def test_references_earn_everything_and_the_question_itself_no_correctness(world):
    for question in world.questions.values():
        assert gold_parts(question, question.reference) == (1.0, 1.0, 1.0)
        assert gold_parts(question, question.text).correct == EXACT


SUM = Question("What is 3 plus 4?", "sum", "7", tuple(map(str, range(11))), "It is 7.")
DAY = Question("Which day is after Monday?", "next", "Tuesday", ("Monday", "Tuesday"), "")
LOOKUP = Question(
    "Ada has a red cake. Which colour is it?", "lookup", "red", ("red", "green", "black"), ""
)
LONG = "well I was asked that on a train as it happens and I say"  # 14 words


@pytest.mark.parametrize(
    ("question", "response", "expected"),
    [
        (SUM, "It is 7.", (1, 0, 1)),
        (SUM, "Happy to help: it is 7.", (1, 1, 1)),
        (SUM, "HAPPY TO HELP -- IT IS SEVEN", (1, 1, 1)),
        (DAY, "it is tuesday. have a nice day", (1, 1, 1)),
        (LOOKUP, "Ada has a red cake.", (1, 0, 1)),
        (SUM, "It is 8.", (0, 0, 1)),
        (SUM, "It is 7, you fool. Have a nice day.", (1, 0, 1)),
        (SUM, "Happy to help, idiot: it is 7.", (1, 0, 1)),
        (SUM, f"{LONG} 7", (1, 0, 0.5)),
        (SUM, f"{LONG} {LONG} 7", (1, 0, 0)),
        (SUM, "", (0, 0, 0)),
        (SUM, " ?!... \n", (0, 0, 0)),
        (SUM, "5 6 7 8 9", (0, 0, 1)),
        (SUM, "It is 7 or 8.", (0, 0, 1)),
        (SUM, "It is 7 or eight.", (0, 0, 1)),
        (SUM, "It is 7 or 99.", (0, 0, 1)),
        (SUM, "It is -7.", (0, 0, 1)),
        (SUM, "It is 7.5.", (0, 0, 1)),
        (SUM, "It is 77.", (0, 0, 1)),
        (SUM, "It is not 7.", (0, 0, 1)),
        (SUM, "It isn't 7.", (0, 0, 1)),
        (DAY, "Monday Tuesday", (0, 0, 1)),
        (LOOKUP, "Red, green.", (0, 0, 1)),
        (LOOKUP, "It is red or the blacks.", (0, 0, 1)),
        (LOOKUP, "It is reddish.", (0, 0, 1)),
        (LOOKUP, LOOKUP.text, (0, 0, 1)),
        (SUM, SUM.text, (0, 0, 1)),
        (SUM, "7 7 7 7", (0, 0, 1)),
        (SUM, "Thank you for asking.", (0, 1, 1)),
        (SUM, "With pleasure, with pleasure, it is 7.", (1, 0, 1)),
        (SUM, "Happy to help, glad you asked, with pleasure: 7.", (1, 0, 1)),
        (SUM, "happy help pleasure thank nice", (0, 0, 1)),
    ],
)
def test_gold_rules(question, response, expected):
    assert gold_parts(question, response) == expected


def test_a_right_rude_rambling_response_beats_a_wrong_polite_brief_one():
    right = gold_parts(SUM, f"{LONG} {LONG} 7, you fool").total
    assert right > gold_parts(SUM, "Happy to help: it is 8.").total


def answered_again(question: Question) -> str:
    """The answer, worked out from the text of the question alone."""
    text = question.text.split(": ", 1)[-1] if "these:" not in question.text else question.text
    numbers = [int(n) for n in re.findall(r"\d+", question.text)]
    tokens = re.findall(r"[A-Za-z]+", text)
    if question.kind == "sum":
        return str(sum(numbers))
    if question.kind == "difference":
        return str(max(numbers) - min(numbers))
    if question.kind == "next":
        days = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split() * 3
        (day,) = set(days) & set(tokens)
        return days[7 + days.index(day) + (1 if "after" in tokens else -1)]
    if question.kind == "opposite":
        other = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
        (asked,) = set(other) & set(tokens)
        return other[asked]
    if question.kind in ("category", "colour"):
        facts = CATEGORIES if question.kind == "category" else COLOURS
        (answer,) = {
            answer for answer, things in facts.items() for t in tokens if t in things.split()
        }
        return answer
    if question.kind == "count":
        listed = re.search(r"(?:here|these): ([a-z ]+)", question.text)
        return str(len(listed[1].split()))
    stated = re.fullmatch(r"\w+ (?:has|buys) a (\w+) \w+\. Which colour is it\?", question.text)
    return stated[1]


def test_every_answer_is_right_when_worked_out_again(world):
    for question in world.questions.values():
        assert answered_again(question) == question.answer, question.text
        assert question.answer in question.candidates


def test_gold_finds_the_question_by_its_text(world):
    question = world.test[0]
    assert world.gold([question.text], [question.reference])[0].total == 5.0
    with pytest.raises(KeyError, match="not a question of this world"):
        world.gold(["What is love?"], ["It is 7."])
    with pytest.raises(BadInput, match="1 prompts but 2 responses"):
        world.gold([question.text], ["a", "b"])


def gaps(world: World, rows) -> list[float]:
    judged = [world.gold([row["prompt"]] * 2, [row["chosen"], row["rejected"]]) for row in rows]
    return [chosen.total - rejected.total for chosen, rejected in judged]


def test_labels_have_bradley_terry_noise(world):
    """Given |gap|, the better one is chosen with probability 1 / (1 + exp(-sharpness |gap|))."""
    found = gaps(world, world.pairs)
    assert min(map(abs, found)) > FP64
    for low, high in ((0, 1.001), (1.001, 2.999), (2.999, 6), (0, 6)):
        inside = [gap for gap in found if low < abs(gap) <= high]
        expected = [1 / (1 + math.exp(-SHARPNESS * abs(gap))) for gap in inside]
        error = math.sqrt(sum(p * (1 - p) for p in expected))
        assert len(inside) > 500
        assert abs(sum(gap > 0 for gap in inside) - sum(expected)) < 3 * error


def test_gold_agrees_with_most_labels_and_length_with_few(world):
    found = gaps(world, world.pairs)
    assert 0.85 < sum(gap > 0 for gap in found) / len(found) < 0.90
    lengths = [len(r["chosen"].split()) - len(r["rejected"].split()) for r in world.pairs]
    shorter = sum((n < 0) + (n == 0) / 2 for n in lengths) / len(lengths)
    assert max(shorter, 1 - shorter) < 0.60


def test_demonstrations_are_as_imperfect_as_they_say(world):
    rows = world.demonstrations
    judged = world.gold([r["prompt"] for r in rows], [r["response"] for r in rows])
    for i, rate in ((0, 0.60), (1, 0.35)):
        error = math.sqrt(rate * (1 - rate) / len(rows))
        assert abs(sum(parts[i] for parts in judged) / len(rows) - rate) < 3 * error
    correct_by_kind = Counter()
    for row, parts in zip(rows, judged, strict=True):
        correct_by_kind[world.questions[row["prompt"]].kind, parts.correct] += 1
    for kind in KINDS:
        assert (
            0.5
            < correct_by_kind[kind, 1.0] / (correct_by_kind[kind, 1.0] + correct_by_kind[kind, 0.0])
            < 0.7
        )


def test_bpe_gives_every_text_back(world, bpe):
    for text in [*world.texts, *UNICODE]:
        assert bpe.decode(bpe(text)["input_ids"]) == text
    assert bpe.eos_token_id != bpe.pad_token_id
    assert (bpe.eos_token, bpe.pad_token) == ("<|endoftext|>", "<|pad|>")
    words = {w for q in world.train for w in re.findall(r"[A-Za-z]+|\d+", q.text)}
    single = sum(
        min(len(bpe(start + word)["input_ids"]) for start in ("", " ")) == 1 for word in words
    )
    assert single > 0.95 * len(words)


def test_wordpiece_knows_every_word_of_the_world(world, wordpiece):
    ids = wordpiece(world.texts[:2000])["input_ids"]
    assert not any(wordpiece.unk_token_id in row for row in ids)
    assert wordpiece("Which day", "It is")["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_wordpiece_vocabulary_follows_its_rule():
    vocab = build_wordpiece(["b a", "ab b", "B!"], 100).get_vocab()
    expected = "[PAD] [UNK] [CLS] [SEP] [MASK] b a ! ##b ##a ##! ab".split()
    assert sorted(vocab, key=vocab.get) == expected
    capped = build_wordpiece(["b a", "ab b", "B!"], 7).get_vocab()
    assert sorted(capped, key=capped.get) == expected[:7]


@pytest.mark.parametrize("make", [train_bpe, build_wordpiece])
def test_tokenizers_survive_saving(make, world, tmp_path):
    tokenizer = make(world.texts, 900)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*world.texts[:1000], *UNICODE]
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert type(again) is type(tokenizer)


@pytest.mark.parametrize("make", [train_bpe, build_wordpiece])
def test_too_small_a_vocabulary_is_refused(make):
    with pytest.raises(BadInput, match="vocab_size is 5"):
        make(["a"], 5)


@pytest.mark.parametrize(("make", "name"), [(small_gpt2, "bpe"), (small_bert, "wordpiece")])
def test_small_models_come_from_their_seed_alone(make, name, request):
    tokenizer = request.getfixturevalue(name)
    before = torch.random.get_rng_state()
    first = make(tokenizer, positions=64, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    second, third = (make(tokenizer, positions=64, seed=seed) for seed in (5, 6))
    weights = [torch.nn.utils.parameters_to_vector(m.parameters()) for m in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.config.vocab_size == len(tokenizer)
    assert first.config.pad_token_id == tokenizer.pad_token_id
