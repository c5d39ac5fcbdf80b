"""Responses as imperfect people would write them, and noisy preferences between two of them."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_min.world.gold import gold_parts
from rlhf_min.world.questions import Question, phrase

CORES = ("it is {}", "the answer is {}", "that would be {}")
POLITE = (
    "happy to help: {}.",
    "glad you asked, {}.",
    "thank you for asking, {}.",
    "with pleasure: {}.",
    "{}. Have a nice day.",
    "{}. Hope that helps.",
)
RUDE = (
    "{}, you fool.",
    "stupid question, {}.",
    "{}. Now go away.",
    "who cares, {}.",
    "{}, obviously.",
)
RAMBLING = (
    "well, my aunt used to ask me that whenever we sat in the garden, and I think {}",
    "let me think about this, as people tell me all kinds of stories, but I guess {}",
    "you see, I was asked that before, on a train as it happens, and so I say {}",
)


@dataclass(frozen=True)
class Rates:
    """How often a response of the world has which flaw: manner, length and answer are independent.

    Args:
        wrong: share that names a wrong candidate.
        rude: share with a rude phrase.
        polite: share with a courtesy; the rest is plain.
        rambling: share that is far longer than it should be.
    """

    wrong: float = 0.4
    rude: float = 0.2
    polite: float = 0.35
    rambling: float = 0.15


USUAL = Rates()


def wrong_answer(question: Question, rng: random.Random) -> str:
    """A plausible wrong candidate: a number at most 2 away, or any other word of the same type."""
    others = [word for word in question.candidates if word != question.answer]
    if question.answer.isdigit():
        others = [word for word in others if abs(int(word) - int(question.answer)) <= 2]
    return rng.choice(others)


def draw_response(question: Question, rates: Rates, rng: random.Random) -> str:
    """Draw one response with the flaws that the rates say."""
    answer = wrong_answer(question, rng) if rng.random() < rates.wrong else question.answer
    text = rng.choice(CORES).format(phrase(question.kind, answer))
    if rng.random() < rates.rambling:
        text = rng.choice(RAMBLING).format(text)
    plain = 1 - rates.rude - rates.polite
    (manner,) = rng.choices((RUDE, POLITE, ("{}.",)), (rates.rude, rates.polite, plain))
    text = rng.choice(manner).format(text)
    return text[0].upper() + text[1:]


def draw_demonstrations(
    questions: Sequence[Question], n: int, rates: Rates, rng: random.Random
) -> list[dict[str, str]]:
    """Draw `n` rows "prompt", "response"; every question is used once before any is used twice."""
    rows = []
    for question in _rounds(questions, n, rng):
        rows.append({"prompt": question.text, "response": draw_response(question, rates, rng)})
    return rows


def draw_pairs(
    questions: Sequence[Question], n: int, rates: Rates, sharpness: float, rng: random.Random
) -> list[dict[str, str]]:
    """Draw `n` rows "prompt", "chosen", "rejected" with Bradley-Terry noise in the labels.

        P(a is chosen over b) = sigmoid(sharpness * (gold_a - gold_b))

    Both responses come from `draw_response`; pairs of equal gold reward are drawn again.
    """
    rows = []
    for question in _rounds(questions, n, rng):
        gap = 0.0
        while gap == 0.0:
            a, b = (draw_response(question, rates, rng) for _ in range(2))
            gap = gold_parts(question, a).total - gold_parts(question, b).total
        if rng.random() >= 1 / (1 + math.exp(-sharpness * gap)):
            a, b = b, a
        rows.append({"prompt": question.text, "chosen": a, "rejected": b})
    return rows


def _rounds(questions: Sequence[Question], n: int, rng: random.Random) -> list[Question]:
    drawn: list[Question] = []
    while len(drawn) < n:
        drawn += rng.sample(questions, min(len(questions), n - len(drawn)))
    return drawn
