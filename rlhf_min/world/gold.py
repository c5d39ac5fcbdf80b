"""The true reward of the world: correct, polite and brief, by rules from the two texts alone."""

import re
import unicodedata
from typing import NamedTuple

from rlhf_min.world.questions import Question

CORRECT_WEIGHT, POLITE_WEIGHT, BRIEF_WEIGHT = 3.0, 1.0, 1.0
BRIEF_FULL, BRIEF_NONE = 10, 20  # words: all of the reward up to the first, none from the second on

COURTESIES = (
    "happy to help",
    "glad you asked",
    "thank you for asking",
    "with pleasure",
    "have a nice day",
    "hope that helps",
)
RUDE = (
    *"fool stupid idiot dumb obviously duh moron nonsense".split(),
    *("shut up", "go away", "who cares", "leave me alone", "stop bothering me"),
)
NEGATIONS = frozenset("not no never neither nor cannot t wrong false except".split())  # t: isn't
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()
DIGITS = {word: str(n) for n, word in enumerate(NUMBER_WORDS)}


class GoldParts(NamedTuple):
    """The three parts of the gold reward, each in [0, 1]."""

    correct: float
    polite: float
    brief: float

    @property
    def total(self) -> float:
        """3 * correct + polite + brief, in [0, 5]: no manners make up for a wrong answer."""
        return (
            CORRECT_WEIGHT * self.correct + POLITE_WEIGHT * self.polite + BRIEF_WEIGHT * self.brief
        )


def gold_parts(question: Question, response: str) -> GoldParts:
    """Judge a response; strict, so that nothing but a plain right answer earns `correct`.

    Args:
        question: knows the answer and every candidate that could be named instead of it.
        response: any text. Case, punctuation and "seven" for "7" make no difference.

    Returns:
        correct: 1 if the answer is the only candidate that is named (once or twice) and nothing
        is negated. Naming a second candidate costs it, even to restate the question, and so does
        asking again (the last four words of the question).
        polite: 1 if there are one or two different courtesies, none said twice, and no rude word.
        brief: 1 up to 10 words, falling linearly to 0 at 20; 0 without any word.

    Example:
        >>> question = Question("What is 3 plus 4?", "sum", "7", ("6", "7", "8"), "It is 7.")
        >>> gold_parts(question, "Happy to help: it is seven!")
        GoldParts(correct=1.0, polite=1.0, brief=1.0)
        >>> gold_parts(question, "It is 7 or 8, you fool.").total
        1.0
    """
    said = words(response)
    return GoldParts(_correct(question, said), _polite(said), _brief(said))


def words(text: str) -> list[str]:
    """The words and numbers of a text, lower case, number words as digits.

    >>> words("It's SEVEN -- or -7?")
    ['it', 's', '7', 'or', '-7']
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    return [DIGITS.get(word, word) for word in re.findall(r"(?<!\w)-\d+|\d+|[^\W\d_]+", plain)]


def _correct(question: Question, said: list[str]) -> float:
    candidates = {word.casefold() for word in question.candidates}
    if question.answer.isdigit():
        named = [word for word in said if word.lstrip("-").isdigit()]  # 99 and -7 are claims too
    else:  # "lamps" names the lamp
        named = [stem for word in said for stem in {word, word.removesuffix("s")} & candidates]
    asked, text = " ".join(words(question.text)[-4:]), " ".join(said)
    right = set(named) == {question.answer.casefold()} and len(named) <= 2
    return float(right and NEGATIONS.isdisjoint(said) and asked not in text)


def _polite(said: list[str]) -> float:
    courtesies = _phrases(COURTESIES, said)
    distinct = len(set(courtesies)) == len(courtesies)
    return float(1 <= len(courtesies) <= 2 and distinct and not _phrases(RUDE, said))


def _brief(said: list[str]) -> float:
    left = (BRIEF_NONE - len(said)) / (BRIEF_NONE - BRIEF_FULL)
    return min(1.0, max(0.0, left)) if said else 0.0


def _phrases(phrases: tuple[str, ...], said: list[str]) -> list[str]:
    return re.findall(rf"\b(?:{'|'.join(phrases)})\b", " ".join(said))
