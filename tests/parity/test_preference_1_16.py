"""DPO's family beside trl 1.16.0, as recorded: functions, batches and whole runs of its
``DPOTrainer``, ``CPOTrainer`` and ``ORPOTrainer``."""

from typing import Any

import pytest
import torch
from recordings import NEWEST, Recording, load
from small import StubTokenizer
from tolerances import FP64
from trainer_harness import (
    DPO_METRICS,
    SHIMMED,
    Parity,
    gap,
    gradients,
    largest_gap,
    metric_gap,
    weights,
)
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_min import dpo
from rlhf_min.data import PreferenceExample
from rlhf_min.optim import State
from rlhf_min.policy import Policy
from rlhf_min.preference_losses import cpo_loss, orpo_loss, simpo_loss

RECORDED = Recording("preference", version=NEWEST)
FUNCTIONS = Recording("preference_functions", version=NEWEST)
RUNS: dict[str, dict[str, Any]] = RECORDED.facts["runs"]
EVEN = "one-token prompts, chosen responses of equal length"

# Of each run of trl what is chosen here.
FAMILY: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid_norm": {"length_normalised": True},
    "ipo": {"loss": "ipo", "length_normalised": True},
    "hinge": {"loss": "hinge"},
    "robust": {"loss": "robust", "label_smoothing": 0.2},
    "apo_zero": {"loss": "apo_zero"},
    "apo_down": {"loss": "apo_down"},
    "cpo without sft": {"loss": "cpo", "sft_coef": 0.0},
    "simpo": {"loss": "simpo", "simpo_gamma": 0.5},
}
# Where the mean of an SFT term is over the same tokens, on rows that leave no choice.
WITH_SFT: dict[str, dict[str, Any]] = {
    "sigmoid and sft": {"sft_coef": 0.5},
    "cpo": {"loss": "cpo"},
    "orpo": {"loss": "orpo"},
}
# Metrics that are the same. Of means per token, trl's rewards are sums in DPO, and its
# log-probabilities means in SimPO and ORPO; ours are the other way round.
REWARDS = {ours: name for ours, name in DPO_METRICS.items() if "logprobs" not in ours}
LOGPROBS = {ours: name for ours, name in DPO_METRICS.items() if "logprobs" in ours}
METRICS = {
    **dict.fromkeys(("sigmoid_norm", "ipo"), LOGPROBS),
    **dict.fromkeys(("simpo", "orpo"), REWARDS),
}


class Ours:
    """Policy, reference, pairs and state of a run of ours with trl's options."""

    def __init__(self, name: str, **own: Any) -> None:
        told = RUNS[name]["config"]
        config = {
            "epochs": told["num_train_epochs"],
            "batch_size": told["per_device_train_batch_size"],
            "learning_rate": told["learning_rate"],
            "schedule": told["lr_scheduler_type"],
            "warmup_share": told["warmup_steps"] / len(RUNS[name]["steps"]),
            "weight_decay": told["weight_decay"],
            "max_grad_norm": told["max_grad_norm"],
            "beta": told["beta"],
            "max_tokens": 40,  # several micro-batches, where trl has one
            "seed": RECORDED.facts["seed"],
        }
        self.config = dpo.DPOConfig(**(config | own))
        self.policy = _policy("policy")
        self.ref_policy = None if self.config.reference_free else _policy("ref_policy").reference()
        rows = f"{told['trainer']}/{told['rows']}"
        ids = [RECORDED.rows(f"{rows}/{part}") for part in ("prompts", "chosen", "rejected")]
        self.pairs = [PreferenceExample(*row) for row in zip(*ids, strict=True)]
        self.state: State = dpo.new_state(self.policy, self.ref_policy, self.pairs, self.config)

    def batch_loss(self, rows: list[int]) -> dpo.PairsLoss:
        pairs = [self.state.cursor.examples[row] for row in rows]
        return dpo.batch_loss(self.policy, self.ref_policy, pairs, self.config)

    def train(self) -> list[dict[str, float]]:
        return list(dpo.train(self.policy, self.ref_policy, self.config, self.state))


def _policy(name: str) -> Policy:
    config = GPT2Config(**RECORDED.facts["gpt2"])
    tokenizer = StubTokenizer(config.eos_token_id, config.pad_token_id)
    return Policy(load(GPT2LMHeadModel(config), RECORDED.under(name)), tokenizer)


# Functions


OURS = {
    "cpo without sft": lambda *x: cpo_loss(*x, beta=0.2),
    "simpo": lambda *x: simpo_loss(*x, beta=2.0, gamma=0.5),
    "orpo": lambda *x: orpo_loss(*x, beta=0.2),
}


def assert_is_their_function(name: str, parity: Parity) -> None:
    cases = FUNCTIONS.cases(name)
    assert len(cases) == 100
    for case in cases:
        found = OURS[name](case["chosen"], case["rejected"])
        parity(gap(found.loss, case["losses"].mean()))
        parity(gap(found.chosen_rewards, case["chosen_rewards"]))
        parity(gap(found.rejected_rewards, case["rejected_rewards"]))


@pytest.mark.eq("cpo")
@pytest.mark.parity(
    *("cpo_loss", "CPOTrainer.cpo_loss", NEWEST), cases=100, of="batches", dtype=SHIMMED
)
def test_cpo(parity: Parity) -> None:
    assert_is_their_function("cpo without sft", parity)


@pytest.mark.eq("simpo")
@pytest.mark.parity(
    *("simpo_loss", "CPOTrainer.cpo_loss", NEWEST), cases=100, of="batches", dtype=SHIMMED
)
def test_simpo(parity: Parity) -> None:
    assert_is_their_function("simpo", parity)


@pytest.mark.eq("orpo")
@pytest.mark.parity(
    *("orpo_loss", "ORPOTrainer.odds_ratio_loss", NEWEST), cases=100, of="batches", dtype=SHIMMED
)
def test_orpo(parity: Parity) -> None:
    assert_is_their_function("orpo", parity)


# Batches and whole runs


def assert_is_their_batch(name: str, own: dict[str, Any], parity: Parity) -> None:
    ours = Ours(name, **own)
    for i, (batch, theirs) in enumerate(
        zip(RECORDED.facts["batches"], RUNS[name]["losses"], strict=True)
    ):
        found = ours.batch_loss(batch)
        parity(abs(found.loss.item() - theirs))
        if i == 1:
            gradient = RECORDED.under(f"{name}/gradient")
            parity(largest_gap(gradients(ours.policy.lm, found.loss), gradient))


def assert_is_their_run(name: str, own: dict[str, Any], parity: Parity) -> None:
    ours, steps = Ours(name, **own), RUNS[name]["steps"]
    start = weights(ours.policy.lm)
    metrics = ours.train()
    assert len(metrics) == len(steps) == 6
    names = METRICS.get(name, DPO_METRICS)
    names = names | {x: x for x in ("loss", "grad_norm", "learning_rate")}
    for ours_now, theirs_now in zip(metrics, steps, strict=True):
        parity(metric_gap(ours_now, theirs_now, names))
    parity(largest_gap(weights(ours.policy.lm), RECORDED.under(f"{name}/trained")))
    # The run was worth comparing: it moved, and each epoch had another order.
    assert largest_gap(weights(ours.policy.lm), start) > RUNS[name]["config"]["learning_rate"]


@pytest.mark.eq("dpo")
@pytest.mark.eq("ipo")
@pytest.mark.eq("hinge")
@pytest.mark.eq("robust")
@pytest.mark.eq("apo_zero")
@pytest.mark.eq("apo_down")
@pytest.mark.parity(
    *("dpo.batch_loss", "DPOTrainer, CPOTrainer", NEWEST), cases=3, of="batches", dtype=SHIMMED
)
@pytest.mark.parametrize("name", FAMILY)
def test_batches(name: str, parity: Parity) -> None:
    assert_is_their_batch(name, FAMILY[name], parity)


@pytest.mark.parity(
    *("dpo.train", "DPOTrainer, CPOTrainer", NEWEST), cases=1, of="runs", dtype=SHIMMED
)
@pytest.mark.parametrize("name", FAMILY)
def test_whole_runs(name: str, parity: Parity) -> None:
    assert_is_their_run(name, FAMILY[name], parity)


@pytest.mark.eq("sft_term")
@pytest.mark.parity(
    *("dpo.batch_loss", "DPOTrainer, CPOTrainer, ORPOTrainer", NEWEST),
    **{"cases": 3, "of": "batches", "dtype": SHIMMED, "convention": EVEN},
)
@pytest.mark.parametrize("name", WITH_SFT)
def test_batches_with_an_sft_term(name: str, parity: Parity) -> None:
    assert_is_their_batch(name, WITH_SFT[name], parity)


@pytest.mark.parity(
    *("dpo.train", "DPOTrainer, CPOTrainer, ORPOTrainer", NEWEST),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED, "convention": EVEN},
)
@pytest.mark.parametrize("name", WITH_SFT)
def test_whole_runs_with_an_sft_term(name: str, parity: Parity) -> None:
    assert_is_their_run(name, WITH_SFT[name], parity)


# Where trl has other conventions


def test_ipo_of_the_paper_is_of_sums() -> None:
    """trl takes means per token."""
    theirs = RUNS["ipo"]["losses"][-1]
    batch = RECORDED.facts["batches"][-1]
    ours = Ours("ipo", loss="ipo").batch_loss(batch).loss.item()
    assert (round(theirs, 2), round(ours, 2)) == (2.63, 4.97)


def test_their_sigmoid_ignores_label_smoothing() -> None:
    assert RUNS["sigmoid, smoothing"]["losses"] == RUNS["sigmoid"]["losses"]
    theirs = RUNS["sigmoid, smoothing"]["losses"][-1]
    batch = RECORDED.facts["batches"][-1]
    ours = Ours("sigmoid", label_smoothing=0.2).batch_loss(batch).loss.item()
    assert (round(theirs, 4), round(ours, 4)) == (0.6993, 0.7089)


def test_their_sft_term_weighs_tokens_alike() -> None:
    """trl's mean is over all tokens of a micro-batch, so that a long response weighs more, and its
    share depends on what it is with. Ours is over pairs, as in the papers."""
    ours = Ours("sigmoid and sft, ragged", sft_coef=0.5)
    batch = RECORDED.facts["batches"][-1]
    found = ours.batch_loss(batch)
    lengths = torch.tensor([len(ours.pairs[row].chosen_ids) for row in batch])
    of_tokens = (found.sft_loss * lengths).sum() / lengths.sum()
    theirs = RUNS["sigmoid and sft, ragged"]["losses"][-1]
    mixed = found.loss - 0.5 * found.sft_loss.mean() + 0.5 * of_tokens
    assert abs(mixed.item() - theirs) <= FP64
    assert (round(theirs, 3), round(found.loss.item(), 3)) == (1.928, 1.915)


def test_their_orpo_learns_the_prompts_too() -> None:
    """All tokens of prompt and chosen response but the first; the paper's are the response's."""
    ours = Ours("orpo, ragged", loss="orpo")
    batch = RECORDED.facts["batches"][-1]
    found = ours.batch_loss(batch)
    whole = [(x.prompt_ids[:1], torch.cat([x.prompt_ids[1:], x.chosen_ids])) for x in ours.pairs]
    pairs = [PreferenceExample(first, rest, rest) for first, rest in whole]
    with torch.no_grad():
        logprobs, _ = dpo.response_logprobs(ours.policy, [pairs[row] for row in batch])
    of_all = -logprobs.sum() / sum(len(pairs[row].chosen_ids) for row in batch)
    theirs = RUNS["orpo, ragged"]["losses"][-1]
    assert abs((found.loss - found.sft_loss.mean() + of_all).item() - theirs) <= FP64
    assert (round(theirs, 3), round(found.loss.item(), 3)) == (2.599, 2.577)
