"""Questions made by rule, of eight kinds, each with its one right answer.

There is little to know (sums up to 8, about a hundred facts), so that tiny models can learn it in
a minute; names and phrasings make the texts distinct.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_min.errors import require

NAMES = (
    "Ada Adam Alma Anna Ben Bert Bill Carl Clara Cora Dan David Dora Ella Emil Emma Eric Eva Felix "
    "Finn Frank Fred Gina Greta Hugo Ida Ines Irma Ivan Jack Jane Jim Joe John Julia Karl Kate Kim "
    "Lara Lea Leo Lily Lisa Luis Mary Max Mia Nina Noah Nora Olga Omar Otto Paul Pia Rita Rosa "
    "Ruth Sam Sara Simon Ted Tim Tina Tom Uma Vera Victor Zara Zoe"
).split()
THINGS = "ball bike book cake coat drum kite lamp".split()
NUMBERS = tuple(str(n) for n in range(11))
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
OPPOSITES = [
    pair.split("/")
    for pair in (
        "hot/cold big/small fast/slow old/young full/empty hard/soft wet/dry "
        "high/low early/late rich/poor strong/weak clean/dirty"
    ).split()
]
CATEGORIES = {
    "fish": "trout salmon shark tuna herring cod",
    "bird": "robin eagle sparrow crow swan goose",
    "fruit": "pear plum cherry banana mango grape",
    "tool": "hammer saw wrench drill chisel rake",
}
COLOURS = {
    "white": "snow milk salt chalk",
    "black": "coal tar soot ink",
    "red": "blood ketchup lipstick ruby",
    "green": "grass spinach moss clover",
    "yellow": "butter mustard corn custard",
}


@dataclass(frozen=True)
class Question:
    """One question of the world.

    Args:
        text: what is asked; unique in a world.
        kind: one of `KINDS`.
        answer: the one right word.
        candidates: every word that would count as an answer of this type, the right one included.
        reference: a response with the full gold reward.
    """

    text: str
    kind: str
    answer: str
    candidates: tuple[str, ...]
    reference: str


def phrase(kind: str, answer: str) -> str:
    """The answer as it stands in a sentence: "7", "Monday", "a fish"."""
    return f"a {answer}" if kind == "category" else answer


# A maker draws (question text, answer, candidates).
Drawn = tuple[str, str, tuple[str, ...]]


def _sum(rng: random.Random) -> Drawn:
    a, b = rng.randint(1, 4), rng.randint(1, 4)
    asked = rng.choice(("What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} and {b}?"))
    return asked.format(a=a, b=b), str(a + b), NUMBERS


def _difference(rng: random.Random) -> Drawn:
    b, rest = rng.randint(1, 4), rng.randint(1, 4)
    asked = rng.choice(("What is {a} minus {b}?", "Take {b} from {a}.", "{a} less {b} is what?"))
    return asked.format(a=b + rest, b=b), str(rest), NUMBERS


def _next(rng: random.Random) -> Drawn:
    i = rng.randrange(7)
    word, step = rng.choice((("after", 1), ("before", -1)))
    asked = rng.choice(("Which day is {} {}?", "Name the day {} {}.", "What comes {} {}?"))
    return asked.format(word, WEEKDAYS[i]), WEEKDAYS[(i + step) % 7], tuple(WEEKDAYS)


def _opposite(rng: random.Random) -> Drawn:
    word, answer = rng.sample(rng.choice(OPPOSITES), 2)
    asked = rng.choice(
        ("What is the opposite of {}?", "Name the opposite of {}.", "Not {} but what?")
    )
    return asked.format(word), answer, tuple(w for pair in OPPOSITES for w in pair)


def _fact(rng: random.Random, facts: dict[str, str], phrasings: tuple[str, ...]) -> Drawn:
    answer = rng.choice(list(facts))
    thing = rng.choice(facts[answer].split())
    return rng.choice(phrasings).format(thing), answer, tuple(facts)


def _category(rng: random.Random) -> Drawn:
    return _fact(
        rng, CATEGORIES, ("What kind of thing is {}?", "What sort is {}?", "Which kind is {}?")
    )


def _colour(rng: random.Random) -> Drawn:
    return _fact(
        rng, COLOURS, ("What colour is {}?", "Name the colour of {}.", "How does {} look?")
    )


def _count(rng: random.Random) -> Drawn:
    n = rng.randint(1, 4)
    row = " ".join([rng.choice(THINGS)] * n)
    asked = rng.choice(("How many words are here: {}?", "Count these: {}."))
    return asked.format(row), str(n), NUMBERS


def _lookup(rng: random.Random) -> Drawn:
    owner, thing, colour = rng.choice(NAMES), rng.choice(THINGS), rng.choice(list(COLOURS))
    fact = rng.choice(("{} has a {} {}.", "{} buys a {} {}.")).format(owner, colour, thing)
    return f"{fact} Which colour is it?", colour, tuple(COLOURS)


KINDS: dict[str, Callable[[random.Random], Drawn]] = {
    "sum": _sum,
    "difference": _difference,
    "next": _next,
    "opposite": _opposite,
    "category": _category,
    "colour": _colour,
    "count": _count,
    "lookup": _lookup,
}


def draw_question(kind: str, rng: random.Random) -> Question:
    """Draw one question of a kind; two draws may be equal."""
    text, answer, candidates = KINDS[kind](rng)
    if kind != "lookup":  # which names somebody already
        text = rng.choice(["", *(f"{name}: " for name in NAMES)]) + text
    reference = f"Happy to help: it is {phrase(kind, answer)}."
    return Question(text, kind, answer, candidates, reference)


def distinct_questions(kind: str, n: int, rng: random.Random) -> list[Question]:
    """Draw `n` questions of a kind with `n` different texts, in the order they are found."""
    found: dict[str, Question] = {}
    for _ in range(100 * n):
        question = draw_question(kind, rng)
        found.setdefault(question.text, question)
        if len(found) == n:
            break
    require(len(found) == n, f"kind {kind!r} has fewer than {n} distinct questions: ask for fewer")
    return list(found.values())
