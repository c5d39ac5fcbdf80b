"""The reward model against ``RewardTrainer.compute_loss`` of trl 0.11.3, as recorded."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from recordings import VERSION, Recording, load
from small import END, word_tokenizer
from tolerances import FP64
from torch import Tensor
from trainer_harness import Parity, gradients, largest_gap
from transformers import GPT2Config, GPT2ForSequenceClassification

from rlhf_min import reward
from rlhf_min.reward_model import RewardModel

RECORDED = Recording("reward")
BATCHES: dict[str, list[list[int]]] = RECORDED.facts["batches"]
LOSSES: dict[str, float] = RECORDED.facts["losses"]

center = pytest.mark.parametrize("center_coef", [0, 0.05])


def reward_model() -> RewardModel:
    config = GPT2Config(**RECORDED.facts["model"])
    model = load(GPT2ForSequenceClassification(config), RECORDED.under("model"))
    tokenizer = word_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # as GPT-2's own: no segments
    return RewardModel(model, tokenizer)


def examples_of(model: RewardModel, *, margins: bool) -> list[reward.RewardExample]:
    """The recorded ids as texts, which the model must encode to the same ids again."""

    def texts(rows: list[Tensor]) -> list[str]:
        return [" ".join(model.tokenizer.convert_ids_to_tokens(ids)) for ids in rows]

    ids = {name: RECORDED.rows(name) for name in ("prompts", "chosen", "rejected")}
    prompts = texts(ids["prompts"])
    for side in ("chosen", "rejected"):
        for prompt, text, *parts in zip(
            *(prompts, texts(ids[side]), ids["prompts"], ids[side]), strict=True
        ):
            encoded = model.encode([prompt], [text]).input_ids[0]
            assert torch.equal(encoded, torch.cat([*parts, torch.tensor([END])]))
    columns = zip(
        *(prompts, texts(ids["chosen"]), texts(ids["rejected"]), RECORDED.facts["margins"]),
        strict=True,
    )
    rows = [dict(zip(("prompt", "chosen", "rejected", "margin"), x, strict=True)) for x in columns]
    examples, _ = reward.prepare_pairs(model, rows)
    assert len(examples) == len(rows)
    return examples if margins else [replace(example, margin=None) for example in examples]


@pytest.mark.eq("reward")
@center
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "no margin",
            marks=pytest.mark.parity(
                *("reward.batch_loss", "RewardTrainer.compute_loss", VERSION),
                **{"cases": 3, "of": "batches"},
            ),
        ),
        pytest.param(
            "margin",
            marks=pytest.mark.parity(
                *("reward.batch_loss", "RewardTrainer.compute_loss", VERSION),
                **{"cases": 2, "of": "batches", "convention": "margins one by one"},
            ),
        ),
    ],
)
def test_loss_and_gradient_of_batches(kind: str, center_coef: float, parity: Parity) -> None:
    model = reward_model()
    examples = examples_of(model, margins=kind == "margin")
    for i, batch in enumerate(BATCHES[kind]):
        name = f"{kind}/{center_coef}/{i}"
        pairs = [examples[row] for row in batch]
        found = reward.batch_loss(model, pairs, center_coef=center_coef)
        parity(abs(found.loss.item() - LOSSES[name]))
        parity(largest_gap(gradients(model.model, found.loss), RECORDED.under(name)))


def test_margins_and_centring_make_a_difference() -> None:
    losses = [LOSSES[f"{kind}/{center_coef}/0"] for kind in BATCHES for center_coef in (0, 0.05)]
    assert min(abs(x - y) for x, y in combinations(losses, 2)) > 0.01


@pytest.mark.eq("reward")
@center
@pytest.mark.parity(
    *("reward.batch_loss", "RewardTrainer.compute_loss", VERSION),
    **{"cases": 1, "of": "batches", "convention": "every margin with every pair"},
)
def test_trl_takes_every_margin_with_every_pair(center_coef: float, parity: Parity) -> None:
    # Scores of shape (B, 1) less margins of shape (B,) are (B, B).
    model = reward_model()
    (batch,) = BATCHES["margins"]
    pairs = [examples_of(model, margins=True)[row] for row in batch]

    def loss_of(pairs: list[reward.RewardExample]) -> Tensor:
        return reward.batch_loss(model, pairs, center_coef=center_coef).loss

    each = [loss_of([replace(x, margin=y.margin) for x in pairs]) for y in pairs]
    loss, name = torch.stack(each).mean(), f"margins/{center_coef}/0"
    parity(abs(loss.item() - LOSSES[name]))
    parity(largest_gap(gradients(model.model, loss), RECORDED.under(name)))
    assert abs(loss_of(pairs).item() - LOSSES[name]) > 1e9 * FP64
