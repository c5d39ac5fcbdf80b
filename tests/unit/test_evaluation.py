"""BLEU, ROUGE, intervals, win rate, diversity: other programs, counts by hand, enumeration."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from rouge_score.rouge_scorer import RougeScorer
from small import PROMPTS, small_policy
from tolerances import EXACT, FP64

from rlhf_min.errors import BadInput
from rlhf_min.estimates import (
    Estimate,
    _resampled_sums,
    bleu_estimate,
    mean_estimate,
    proportion_estimate,
    win_rate,
)
from rlhf_min.evaluation import evaluate_policies
from rlhf_min.hf_metrics import Bleu, Rouge
from rlhf_min.text_metrics import (
    bleu_from_statistics,
    bleu_statistics,
    blind_spots,
    distinct_n,
    repeated_ngrams,
    rouge_scores,
    tokenize_13a,
)

# sacrebleu 2.6.0, corpus_bleu with its defaults: tok 13a, smooth exp, mixed case.
SACREBLEU = {
    "identical": (
        ["the small red ball is here"],
        [["the small red ball is here"]],
        100.00000000000004,
    ),
    "smoothed": (["the cat sat on a mat"], [["the cat lay on the mat"]], 19.304869754804482),
    "short rows in the corpus": (
        ["the ball is red .", "blue", "It is."],
        [["the ball is dark red ."], ["blue"], ["It was."]],
        36.531662132931764,
    ),
    "one word": (["blue"], [["blue"]], 0.0),
    "no match": (["one two three four"], [["five six seven eight"]], 0.0),
    "all empty": ([""], [["a b c d"]], 0.0),
    "one empty": (
        ["", "the ball is on the big table"],
        [["a b c d"], ["the ball is on the table"]],
        41.91742490576712,
    ),
    "brevity": (["the ball is red"], [["the ball is red and round and big"]], 36.78794411714425),
    "two references": (
        ["the cat is on the mat now", "he read the book"],
        [
            ["the cat sat on the mat", "there is a cat on the mat now"],
            ["he has read the book today", "he read it"],
        ],
        50.81327481546147,
    ),
    "numbers": (
        ["It costs 1,000.50, or 3-4 of 5...5 coins."],
        [["It costs 1,000.50 or 3 - 4 of 5 . . .5 coins ."]],
        61.04735835807847,
    ),
    "unicode": (
        ["Das Café öffnet um 9.30 Uhr – vielleicht…"],
        [["Das café öffnet um 9.30 Uhr – vielleicht …"]],
        47.750342648354646,
    ),
    "newline and markup": (
        ["A line-\nbreak, &quot;quoted&quot; &amp;amp;\nand <skipped>more text here\n"],
        [['A linebreak, "quoted" & and more text there']],
        57.83569866465144,
    ),
    "case and punctuation": (
        ["Isn't it (really) $5? Yes: it is!"],
        [["isn't it (really) $5? Yes; it is!"]],
        67.03420896351791,
    ),
}


def close(expected):
    return pytest.approx(expected, rel=FP64, abs=FP64)


def sentences(rng: random.Random, count: int, shortest: int) -> list[str]:
    """Random texts of a few words, so that n-grams of every order match now and then."""
    return [" ".join(rng.choices("abcde", k=rng.randint(shortest, 9))) for _ in range(count)]


# BLEU


@pytest.mark.eq("bleu")
@pytest.mark.parametrize("case", SACREBLEU)
def test_bleu_sacrebleu(case):
    predictions, references, expected = SACREBLEU[case]
    result = Bleu().compute(predictions=predictions, references=references)
    assert result["bleu"] == close(expected)
    total = bleu_statistics(predictions, references).sum(axis=0)
    assert float(bleu_from_statistics(total)) == result["bleu"]


@pytest.mark.eq("bleu")
def test_bleu_nltk():
    """The corpus BLEU of nltk, which counts otherwise only for fewer than four tokens."""
    rng = random.Random(0)
    for _ in range(50):
        predictions = sentences(rng, 3, shortest=4)
        references = [sentences(rng, 2, shortest=1) for _ in predictions]
        expected = 100 * corpus_bleu(
            [[text.split() for text in row] for row in references],
            [text.split() for text in predictions],
            smoothing_function=SmoothingFunction().method3,
        )
        total = bleu_statistics(predictions, references).sum(axis=0)
        assert float(bleu_from_statistics(total)) == close(expected)


def test_bleu_thousand_predictions():
    # 500 of 1,000 rows of four tokens match: p_n = 1/2 for n = 1..4, no brevity penalty.
    predictions = [f"row {i} is right" if i % 2 else "w x y z" for i in range(1000)]
    references = [[f"row {i} is right"] for i in range(1000)]
    result = Bleu().compute(predictions=predictions, references=references)
    assert result["bleu"] == close(50.0)


@pytest.mark.parametrize(
    ("references", "shown"), [([["a"], ["b"]], "1"), ([["a"], ["b", "c"]], "var")]
)
def test_signatures(references, shown):
    bleu = Bleu().compute(predictions=["a", "b"], references=references)
    rouge = Rouge().compute(predictions=["a", "b"], references=references)
    assert bleu["signature"] == (
        f"BLEU|tok:13a|smooth:exp|eff:no|case:mixed|refs:{shown}|corpus|rlhf_min"
    )
    assert rouge["signature"] == (
        f"ROUGE|rouge_score 0.1.2|stem:no|case:lower|tok:a-z0-9|F1|refs:{shown}"
    )


def test_bleu_statistics_closed():
    # Papineni et al. 2002, section 2.1: "the" counts twice at most; references of 6 and 7 tokens.
    references = [["the cat is on the mat", "there is a cat on the mat"]]
    row = bleu_statistics(["the the the the the the the"], references)
    assert row.tolist() == [[2, 0, 0, 0, 7, 6, 5, 4, 7, 7]]


def test_bleu_statistics_length_tie():
    # Three tokens, references of four and two: the shorter counts. One bigram, "b c".
    row = bleu_statistics(["a b c"], [["a x b c", "x y"]])
    assert row.tolist() == [[3, 1, 0, 0, 3, 2, 1, 0, 3, 2]]


def test_bleu_from_statistics_rows():
    """Many corpora at once give what each gives alone."""
    rng = random.Random(1)
    predictions = ["", "a", *sentences(rng, 20, shortest=1)]
    rows = bleu_statistics(predictions, [sentences(rng, 1, shortest=1) for _ in predictions])
    together = bleu_from_statistics(rows)
    assert together.shape == (22,)
    assert together.tolist() == close([float(bleu_from_statistics(row)) for row in rows])


def test_tokenize_13a():
    assert tokenize_13a("") == []
    assert tokenize_13a("so-\ncalled, so-\n") == ["socalled", ",", "so-"]
    assert tokenize_13a("don't stop-gap 3-4, x/y.") == (
        ["don't", "stop-gap", "3", "-", "4", ",", "x", "/", "y", "."]
    )


PROGRAM = """
import socket, sys
def refuse(*args): sys.exit("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
from rlhf_min.hf_metrics import Bleu
rows = [f"row {i} is here" for i in range(1000)]
print(Bleu().compute(predictions=rows, references=[[row] for row in rows])["bleu"])
"""


def test_bleu_offline(tmp_path):
    """No network, nothing printed but the score, and no file that two processes could share."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, "100.0\n"), run.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# ROUGE


def test_rouge_scores_closed():
    predictions = ["Police kill the gunman.", "the gunman kill police", "a b c d e f", "", "blue"]
    references = [["police killed the gunman"]] * 2 + [["b x d f"], ["blue"], ["blue"]]
    scores = rouge_scores(predictions, references)
    # Shared words 3 of 4 and 4; 3 of 4 and 4; b, d, f: P = 3/6, R = 3/4, F = 2 P R / (P + R) = 0.6.
    assert scores["rouge1"] == close([0.75, 0.75, 0.6, 0.0, 1.0])
    # "the gunman" is one of three bigrams on both sides; one word has no bigram.
    assert scores["rouge2"] == close([1 / 3, 1 / 3, 0.0, 0.0, 0.0])
    # In order: "police the gunman" (3); "the gunman" (2); "b d f" (3).
    assert scores["rougeL"] == close([0.75, 0.5, 0.6, 0.0, 1.0])


def test_rouge_scores_best_reference():
    # rouge1 is best for the first reference (all words), rouge2 and rougeL for the second.
    scores = rouge_scores(["a b c d"], [["d c b a", "a b c"]])
    assert scores["rouge1"] == close([1.0])
    assert scores["rouge2"] == close([2 * 2 / (3 + 2)])
    assert scores["rougeL"] == close([2 * 3 / (4 + 3)])


def test_rouge_lcs_enumeration():
    """rougeL is 2 L / (p + r) with L found by trying all subsequences of the prediction."""
    rng = random.Random(2)
    for prediction, reference in zip(sentences(rng, 20, 1), sentences(rng, 20, 1), strict=True):
        p, r = prediction.split(), reference.split()
        subsequences = (s for k in range(len(p) + 1) for s in itertools.combinations(p, k))
        longest = max(len(s) for s in subsequences if s in itertools.combinations(r, len(s)))
        expected = 2 * longest / (len(p) + len(r))
        assert rouge_scores([prediction], [[reference]])["rougeL"] == close([expected])


def test_rouge_direct():
    rng = random.Random(3)
    predictions = sentences(rng, 30, shortest=0)
    references = [sentences(rng, 2, shortest=0) for _ in predictions]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    result = Rouge().compute(predictions=predictions, references=references)
    for name, values in rouge_scores(predictions, references).items():
        direct = [
            max(scorer.score(reference, prediction)[name].fmeasure for reference in row)
            for prediction, row in zip(predictions, references, strict=True)
        ]
        assert values.tolist() == direct
        assert result[name] == close(math.fsum(direct) / 30)


# Intervals


def test_estimate_shown():
    estimate = Estimate(0.6124, 0.58, 0.6436, 900)
    assert str(estimate) == "0.612 [0.580, 0.644]"
    assert json.dumps(estimate.as_json()) == '{"mean": 0.6124, "ci95": [0.58, 0.6436], "n": 900}'


def test_mean_estimate_normal():
    """For many values the interval is mean -+ 1.96 standard errors.

    Over 2,000 resamples a 2.5 % quantile has a standard deviation of 0.06 standard errors:
    sqrt(0.025 * 0.975 / 2000) over the normal density at 1.96, 0.0584. Four of these are allowed.
    """
    values = np.random.default_rng(0).gamma(4.0, size=2000)
    error = values.std(ddof=1) / math.sqrt(2000)
    estimate = mean_estimate(values, seed=5)
    assert (estimate.mean, estimate.n) == (close(math.fsum(values) / 2000), 2000)
    assert estimate.lo == pytest.approx(estimate.mean - 1.96 * error, abs=0.24 * error)
    assert estimate.hi == pytest.approx(estimate.mean + 1.96 * error, abs=0.24 * error)


def test_mean_estimate_enumeration():
    """The ends of the interval, from the shares of all resamples of a few values."""
    # One in 27 resamples of three values is all 0, one in 27 all 1: both more than 2.5 %.
    assert mean_estimate([0.0, 1.0, 0.5], seed=0)[:3] == close((0.5, 0.0, 1.0))
    # Of 0, 0, 0, 1 the share of resamples without a 1 is (3/4)^4 = 0.32; with three or more
    # ones 4 * 3/4 / 64 + 1/256 = 0.051; with four 0.004: from 0 to 3/4.
    assert mean_estimate([0, 0, 0, 1], seed=0) == close((0.25, 0.0, 0.75, 4))
    assert mean_estimate([0.7], seed=0) == (0.7, 0.7, 0.7, 1)


def test_bleu_estimate_all():
    rng = random.Random(4)
    predictions = sentences(rng, 40, shortest=2)
    references = [sentences(rng, 1, shortest=2) for _ in predictions]
    expected = Bleu().compute(predictions=predictions, references=references)["bleu"]
    estimate = bleu_estimate(bleu_statistics(predictions, references), seed=0)
    assert (estimate.mean, estimate.n) == (expected, 40)
    assert estimate.lo < expected < estimate.hi
    predictions, references, expected = SACREBLEU["short rows in the corpus"]
    estimate = bleu_estimate(bleu_statistics(predictions, references), seed=0)
    assert estimate.mean == close(expected)


def test_bleu_estimate_enumeration():
    """Of two questions, a quarter of the resamples has only the first, a quarter the second."""
    rows = bleu_statistics(
        ["the ball is red", "the small red ball is here"],
        [["the ball is red and round and big"], ["the small red ball is here"]],
    )
    estimate = bleu_estimate(rows, seed=0)
    assert (estimate.lo, estimate.hi) == close((SACREBLEU["brevity"][2], 100.0))


def test_resampling_paired():
    """Seed and N alone decide which questions are drawn."""
    values = np.random.default_rng(1).normal(size=(50, 3))
    together = _resampled_sums(values, 7)
    alone = np.hstack([_resampled_sums(values[:, [k]], 7) for k in range(3)])
    assert together == close(alone)
    assert np.ptp(_resampled_sums(np.ones((50, 1), dtype=int), 7)) == EXACT  # N rows in each
    assert not np.allclose(together, _resampled_sums(values, 8))


def test_mean_estimate_paired():
    """A second model that is 2 x + 3 on every question has the interval of the first, mapped."""
    values = np.random.default_rng(2).normal(size=60)
    first, second = mean_estimate(values, seed=3), mean_estimate(2 * values + 3, seed=3)
    assert second[:3] == close(tuple(2 * x + 3 for x in first[:3]))


@pytest.mark.eq("wilson")
def test_proportion_estimate_closed():
    """5 of 10 by hand: 1.96 * sqrt(0.025 + 0.0096037) / 1.3841459 = 0.2634."""
    estimate = proportion_estimate(5, 10)
    assert estimate == pytest.approx((0.5, 0.236593, 0.763407, 10), abs=5e-6)
    # No success leaves z^2 / (n + z^2) above, and exactly 0 below.
    assert proportion_estimate(0, 7) == pytest.approx((0, 0, 3.841459 / 10.841459, 7), abs=1e-7)
    assert proportion_estimate(7, 7)[1:3] == pytest.approx((7 / 10.841459, 1.0), abs=1e-7)
    assert (proportion_estimate(0, 1000).lo, proportion_estimate(7, 7).hi) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(1, 3), (30, 40), (999, 1000)])
def test_proportion_estimate_definition(successes, n):
    """The ends are the shares q for which p lies 1.96 standard deviations of q away."""
    p, lo, hi, _ = proportion_estimate(successes, n)
    for q, sign in ((lo, 1), (hi, -1)):
        z = sign * (p - q) / math.sqrt(q * (1 - q) / n)
        assert z == pytest.approx(1.959963984540054, rel=1e-9)


def test_win_rate_closed():
    # Two wins, two ties, one loss: (2 + 2/2) / 5.
    estimate, ties = win_rate([3, 2, 1, 1, 0.5], [1, 1, 1, 1, 1], seed=0)
    assert (estimate.mean, estimate.n, ties) == (close(0.6), 5, close(0.4))
    reverse, _ = win_rate([1, 1, 1, 1, 1], [3, 2, 1, 1, 0.5], seed=0)
    # The other side wins the rest, in every resample.
    assert reverse[:3] == close((1 - estimate.mean, 1 - estimate.hi, 1 - estimate.lo))


# Diversity


def test_distinct_n_closed():
    texts = ["a b a b", "a b c"]  # a b, b a, a b | a b, b c
    assert distinct_n(texts, 2) == close(3 / 5)
    assert distinct_n(texts, 1) == close(3 / 7)
    assert distinct_n(["", "a"], 2) == 0.0


def test_repeated_ngrams_closed():
    texts = ["a b a b", "a b c", "", "a"]
    assert repeated_ngrams(texts, 2) == close((1 / 3 + 0 + 0 + 0) / 4)
    assert repeated_ngrams(texts, 1) == close((2 / 4 + 0 + 0 + 0) / 4)


# What cannot be scored

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Bleu().compute(predictions=[], references=[]), "no predictions"),
        (lambda: Rouge().compute(predictions=[], references=[]), "no predictions"),
        (lambda: bleu_statistics(["a"], [["a"], ["b"]]), "1 predictions but 2 rows"),
        (lambda: bleu_statistics(["a", "b"], [["a"], "b"]), "references, row 1: 'b'"),
        (lambda: rouge_scores(["a", "b"], [["a"], []]), r"references, row 1: \[\]"),
        (lambda: rouge_scores(["a", None], [["a"], ["b"]]), "predictions, row 1: None"),
        (lambda: bleu_estimate(np.zeros((0, 10)), seed=0), r"shape is \(0, 10\)"),
        (lambda: mean_estimate([], seed=0), "values: expected N > 0"),
        (lambda: mean_estimate([1.0, NAN, INF], seed=0), r"values, row 1: nan .*2 of 3"),
        (lambda: win_rate([1.0, 2.0], [1.0, INF], seed=0), "baseline_scores, row 1: inf"),
        (lambda: win_rate([1.0, 2.0], [1.0], seed=0), "2 scores but 1 baseline_scores"),
        (lambda: proportion_estimate(0, 0), "0 of 0"),
        (lambda: proportion_estimate(3, 2), "3 of 2"),
        (lambda: distinct_n([], 1), "no texts"),
        (lambda: repeated_ngrams([], 1), "no texts"),
        (lambda: distinct_n(["a"], 0), "n = 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(BadInput, match=message):
        call()


# What is 0 by definition


def notes(*pairs):
    """Reasons by measure, and which measures see nothing, of responses and their one reference."""
    found = blind_spots([response for response, _ in pairs], [[ref] for _, ref in pairs])
    return {name: blind.reason for name, blind in found.items()}, {
        name for name, blind in found.items() if blind.wholly
    }


SHORT = ["Paris", "Rome", "It is 4", "Two"]
SCRIPTS = ["тест привет мир вам", "你好世界今天很好", "Cristóbal está aquí hoy", "สวัสดีชาวโลก"]


def test_perfect_answers_of_fewer_than_four_words():
    reasons, wholly = notes(*((text, text) for text in SHORT))
    assert wholly == {"bleu"}
    assert reasons == {
        "bleu": "BLEU needs 4 words: 4 of 4 references and 4 of 4 responses have fewer; not "
        "measured",
        "rouge2": "ROUGE-2 needs 2 words of a-z and 0-9: 3 of 4 references and 3 of 4 responses "
        "have fewer; such rows count as 0",
    }
    assert notes(*((text, text) for text in SHORT[:2]))[1] == {"bleu", "rouge2"}


def test_texts_without_the_letters_of_rouge():
    reasons, wholly = notes(*((text, text) for text in SCRIPTS))
    assert wholly == set()
    assert reasons["rouge1"] == (
        "ROUGE-1 and ROUGE-L need words of a-z and 0-9: 3 of 4 references and 3 of 4 responses "
        "have none, 4 of 4 references have other letters, which part words; such rows count as 0"
    )
    assert notes(*((text, text) for text in SCRIPTS if text != SCRIPTS[2]))[1] >= {"rouge1"}
    # two of the four have four words between spaces
    assert "2 of 4 references and 2 of 4 responses have fewer" in reasons["bleu"]


def test_what_is_measured_has_no_note():
    whole = "the ball is red"
    assert notes((whole, whole), ("", whole), ("ball", whole)) == ({}, set())
    # what a reference lacks another one has
    assert blind_spots([whole, whole], [["Paris", whole], [whole]]) == {}
    # one of many, or none at all to be read
    reasons, wholly = notes(*[(whole, whole)] * 9, ("Paris", "Paris"))
    assert (reasons.keys(), wholly) == ({"bleu", "rouge2"}, set())
    assert notes(("", whole), ("", whole))[1] == {"bleu", "rouge2", "rouge1"}
    assert notes((whole, ""), (whole, "?!"))[1] == {"rouge2", "rouge1"}
    reasons, _ = notes((whole, whole), (whole, "the café is red"))
    assert reasons == {
        "rouge1": "ROUGE-1 and ROUGE-L need words of a-z and 0-9: 1 of 2 references have other "
        "letters, which part words"
    }


def test_bleu_of_short_references_alone_is_no_0():
    response, reference = "the answer is Paris in France", "Paris in France"
    reasons, wholly = notes((response, reference))
    assert wholly == set()
    assert "1 of 1 references and 0 of 1 responses have fewer" in reasons["bleu"]
    assert Bleu().compute(predictions=[response], references=[[reference]])["bleu"] > 1


def test_blind_spots_are_where_a_perfect_answer_has_0():
    rng = random.Random(5)
    for _ in range(100):
        texts = [
            " ".join(rng.choices(["a", "7", "é", "猫"], k=rng.randint(0, 5))) for _ in range(3)
        ]
        wholly = notes(*((text, text) for text in texts))[1]
        references = [[text] for text in texts]
        total = bleu_statistics(texts, references).sum(axis=0)
        found = {"bleu": float(bleu_from_statistics(total))}
        found |= {k: float(v.sum()) for k, v in rouge_scores(texts, references).items()}
        assert wholly == {name for name in ("bleu", "rouge1", "rouge2") if found[name] == 0}


def test_the_metrics_have_the_note():
    bleu = Bleu().compute(predictions=["Paris"], references=[["Paris"]])
    assert (bleu["bleu"], bleu["note"].partition(":")[0]) == (0.0, "BLEU needs 4 words")
    rouge = Rouge().compute(predictions=["Paris"], references=[["Paris"]])
    assert (rouge["rouge1"], rouge["rouge2"]) == (1.0, 0.0)
    assert rouge["note"].startswith("ROUGE-2 needs 2 words")
    assert "note" not in Rouge().compute(predictions=["a b"], references=[["a b"]])


@pytest.mark.parametrize(
    ("references", "missing"),
    [
        (["one"] * 8, {"rouge2"}),
        (["猫"] * 8, {"rouge1", "rouge2", "rougeL"}),
        (["the one big ball"] * 8, set()),
    ],
)
def test_an_evaluation_has_no_number_where_there_is_none(references, missing):
    policy = small_policy()
    found = evaluate_policies(
        {"ours": policy},
        policy.reference(),
        lambda _prompts, responses: [0.0] * len(responses),
        PROMPTS,
        [[text] for text in references],
        baseline="ours",
        monitors={},
        max_new_tokens=8,
        max_tokens=64,
        seed=0,
    )["ours"]
    assert {"bleu", "rouge1", "rouge2", "rougeL"} - found.estimates.keys() == missing
    # Responses of four words and more have a BLEU, smoothed where the references are shorter.
    told = {"bleu"} if missing else set()
    assert found.notes.keys() == missing - {"rougeL"} | told


def test_an_evaluation_of_responses_without_a_word():
    policy = small_policy()
    with torch.no_grad():  # it ends at once
        policy.lm.transformer.ln_f.weight.zero_()
        policy.lm.transformer.ln_f.bias.copy_(1e3 * policy.lm.lm_head.weight[0])
    found = evaluate_policies(
        {"ours": policy},
        policy.reference(),
        lambda _prompts, responses: [0.0] * len(responses),
        PROMPTS,
        [],
        baseline="ours",
        monitors={},
        max_new_tokens=8,
        max_tokens=64,
        seed=0,
    )["ours"]
    assert set(found.responses) == {""}
    assert found.shares.keys() == {"ties"}
    assert found.notes["distinct_2"] == (
        "distinct-2: no response has a run of 2 words; not measured"
    )
