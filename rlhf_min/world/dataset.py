"""The whole world from one seed: questions in three splits, demonstrations, preference pairs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rlhf_min.errors import BadInput
from rlhf_min.world.gold import GoldParts, gold_parts
from rlhf_min.world.questions import KINDS, Question, distinct_questions
from rlhf_min.world.responses import USUAL, Rates, draw_demonstrations, draw_pairs

PER_KIND = {"train": 2300, "validation": 150, "test": 150}
SHARPNESS = 1.0


@dataclass(frozen=True)
class World:
    """Questions with known answers and everything that is trained on them.

    Args:
        train, validation, test: disjoint questions, all kinds equally often.
        demonstrations: rows "prompt", "response" on train questions, for SFT.
        pairs: rows "prompt", "chosen", "rejected" on train questions, labels noisy.
        heldout_demonstrations, heldout_pairs: the same on validation questions.
    """

    train: list[Question]
    validation: list[Question]
    test: list[Question]
    demonstrations: list[dict[str, str]]
    pairs: list[dict[str, str]]
    heldout_demonstrations: list[dict[str, str]]
    heldout_pairs: list[dict[str, str]]

    @cached_property
    def questions(self) -> dict[str, Question]:
        """Every question of the three splits by its text."""
        return {q.text: q for q in (*self.train, *self.validation, *self.test)}

    @property
    def texts(self) -> list[str]:
        """All train questions and responses: what tokenizers are built from."""
        responses = [row["response"] for row in self.demonstrations]
        judged = [text for row in self.pairs for text in (row["chosen"], row["rejected"])]
        return [q.text for q in self.train] + responses + judged

    def gold(self, prompts: Sequence[str], responses: Sequence[str]) -> list[GoldParts]:
        """The gold reward of each response.

        Args:
            prompts: texts of questions of this world, in any split.
            responses: as many texts.

        Raises:
            BadInput: if the two have different lengths.
            KeyError: if a prompt is not a question of this world.
        """
        if len(prompts) != len(responses):
            raise BadInput(f"{len(prompts)} prompts but {len(responses)} responses: give one each")
        for prompt in prompts:
            if prompt not in self.questions:
                raise KeyError(f"not a question of this world (another seed?): {prompt!r}")
        return [gold_parts(self.questions[p], r) for p, r in zip(prompts, responses, strict=True)]


def make_world(
    seed: int,
    *,
    n_sft: int = 12_000,
    n_pairs: int = 15_000,
    n_heldout_pairs: int = 2_000,
    rates: Rates = USUAL,
    sharpness: float = SHARPNESS,
) -> World:
    """Make the world of a seed; the same seed gives the same world, to the letter, everywhere.

    Args:
        seed: of all random draws.
        n_sft: rows of demonstrations.
        n_pairs: rows of preference pairs.
        n_heldout_pairs: rows of held-out pairs, and of held-out demonstrations.
        rates: how imperfect the responses are.
        sharpness: of the preferences, per unit of gold reward (see `draw_pairs`).
    """
    splits: dict[str, list[Question]] = {name: [] for name in PER_KIND}
    for kind in KINDS:
        rng = random.Random(f"{seed} questions {kind}")
        found = distinct_questions(kind, sum(PER_KIND.values()), rng)
        rng.shuffle(found)  # the more likely ones were found first
        for name, n in PER_KIND.items():
            splits[name] += [found.pop() for _ in range(n)]
    for name, questions in splits.items():
        random.Random(f"{seed} order {name}").shuffle(questions)

    train, validation = splits["train"], splits["validation"]
    named = {name: random.Random(f"{seed} {name}") for name in ("sft", "pairs", "sft2", "pairs2")}
    return World(
        **splits,
        demonstrations=draw_demonstrations(train, n_sft, rates, named["sft"]),
        pairs=draw_pairs(train, n_pairs, rates, sharpness, named["pairs"]),
        heldout_demonstrations=draw_demonstrations(
            validation, n_heldout_pairs, rates, named["sft2"]
        ),
        heldout_pairs=draw_pairs(validation, n_heldout_pairs, rates, sharpness, named["pairs2"]),
    )
