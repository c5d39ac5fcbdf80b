"""What all sides work on alike: the tokens, and what a round must do with them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark import settings
from benchmark.models import BERT_SPECIAL_TOKENS, FIRST_WORD, Size, size_of


@dataclass(frozen=True)
class Expected:
    """What every side must do in one round: `lengths` are tokens of prompt and response by row."""

    lengths: list[tuple[int, int]]
    steps: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(prompt + response for prompt, response in self.lengths)


@dataclass(frozen=True)
class Task:
    """What one process works on. `folder` holds the weights, see `save_models`."""

    workload: str
    size_name: str
    precision: Any  # "fp32", "bf16", or another that a side knows
    folder: str

    @property
    def size(self) -> Size:
        """The models and the batch."""
        return size_of(self.size_name)

    def path(self, model: str) -> str:
        """Where a model of `save_models` lies."""
        return str(Path(self.folder) / model)

    def expected(self) -> Expected:
        """Tokens and optimizer steps of a round."""
        if self.workload in ("ppo", "sampling"):
            updates = self.size.epochs * self.size.prompts // settings.MINIBATCH
            steps = updates if self.workload == "ppo" else 0
            return Expected(Rollouts.draw(self.size).lengths, steps)
        pairs, added = (
            (dpo_pairs(self.size), 1)  # EOS
            if self.workload == "dpo"
            else (reward_pairs(self.size), BERT_SPECIAL_TOKENS)
        )
        return Expected([(p, r + added) for pair in pairs for p, r in pair.rows], steps=1)


def spell(ids: Sequence[int]) -> str:
    """The text that both tokenizers read as these ids."""
    return " ".join(f"w{i}" for i in ids)


@dataclass(frozen=True)
class Rollouts:
    """Prompts, and the response to each that every side has to sample, EOS included."""

    prompts: list[list[int]]
    responses: list[list[int]]

    @classmethod
    def draw(cls, size: Size) -> "Rollouts":
        """Of the lengths that the size says, with words drawn at random."""
        rng = random.Random(settings.SEED)
        eos_id = size.gpt2_config().vocab_size - 1
        return cls(
            [_words(rng, size, n) for n in _spread(rng, *size.prompt_tokens, size.prompts)],
            [
                [*_words(rng, size, n - 1), eos_id]
                for n in _spread(rng, *size.response_tokens, size.prompts)
            ],
        )

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of prompt and response, row by row."""
        return [(len(p), len(r)) for p, r in zip(self.prompts, self.responses, strict=True)]

    @property
    def cells(self) -> Tensor:
        """The responses, filled up with EOS. Shape ``(B, T)``, T that of the longest."""
        eos_id, longest = self.responses[0][-1], max(map(len, self.responses))
        rows = [r + [eos_id] * (longest - len(r)) for r in self.responses]
        return torch.tensor(rows)

    def check(self, responses: Sequence[Tensor]) -> None:
        """Raise ValueError unless these are the responses."""
        if [ids.tolist() for ids in responses] != self.responses:
            raise ValueError("the sampled responses are not those that were to be imposed")


@dataclass(frozen=True)
class Pair:
    """A prompt with two responses, as ids without EOS."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Tokens of prompt and response, for both responses."""
        return [(len(self.prompt), len(self.chosen)), (len(self.prompt), len(self.rejected))]

    def texts(self) -> dict[str, str]:
        """As rows of a data set."""
        return {
            "prompt": spell(self.prompt),
            "chosen": spell(self.chosen),
            "rejected": spell(self.rejected),
        }


def dpo_pairs(size: Size) -> list[Pair]:
    """Prompts of 32 to 128 tokens; responses of 16 to 64, of which the last will be EOS."""
    rng = random.Random(settings.SEED)
    lengths = zip(
        _spread(rng, 32, 128, size.pairs),
        _spread(rng, 16, 64, size.pairs),
        _spread(rng, 16, 64, size.pairs),
        strict=True,
    )
    return [
        Pair(_words(rng, size, p), _words(rng, size, c - 1), _words(rng, size, r - 1))
        for p, c, r in lengths
    ]


def reward_pairs(size: Size) -> list[Pair]:
    """Inputs of 32 to 256 tokens, BERT's three special tokens included; half is the prompt."""
    rng = random.Random(settings.SEED)
    lengths = zip(_spread(rng, 32, 256, size.pairs), _spread(rng, 32, 256, size.pairs), strict=True)
    pairs = []
    for chosen, rejected in lengths:
        prompt = _words(rng, size, min(chosen, rejected) // 2)
        used = len(prompt) + BERT_SPECIAL_TOKENS
        pairs.append(
            Pair(prompt, _words(rng, size, chosen - used), _words(rng, size, rejected - used))
        )
    return pairs


def _words(rng: random.Random, size: Size, n: int) -> list[int]:
    """Ids that are words in both vocabularies."""
    end = min(size.gpt2_config().vocab_size, size.bert_config().vocab_size) - 1
    return [rng.randrange(FIRST_WORD, end) for _ in range(n)]


def _spread(rng: random.Random, low: int, high: int, n: int) -> list[int]:
    """n lengths from low to high at equal distances, in random order."""
    lengths = [low + round((high - low) * i / (n - 1)) for i in range(n)]
    rng.shuffle(lengths)
    return lengths
