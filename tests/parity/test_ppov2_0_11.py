"""Whole runs of the ``PPOv2Trainer`` of trl 0.11.3, as recorded: all weights and all metrics.

Ours are run by `train_ours`, as against trl 1.12.0; see ppo_harness.py for what is supplied.
"""

from typing import Any

import pytest
from ppo_harness import (
    EXTRA_TEMPERATURE,
    PROMPT_WIDTH,
    Batch,
    Models,
    policy_of,
    train_ours,
)
from recordings import VERSION, Recording, load
from small import END, WORD_PAD, largest_difference
from trainer_harness import SHIMMED, Parity
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from rlhf_min.ppo import PPOConfig

RECORDED = Recording("ppo_v2")
RUNS: dict[str, dict[str, Any]] = RECORDED.facts["runs"]
CONVENTION = "score cell; padded metrics; entropy less 1 for each padded cell"


def models_of(**names: str) -> Models:
    """The recorded models, some of them under other names."""
    config = GPT2Config(**RECORDED.facts["model"])
    assert (config.eos_token_id, config.pad_token_id) == (END, WORD_PAD)
    names = {"policy": "policy", "value": "value_model"} | names
    return Models(
        load(GPT2LMHeadModel(config), RECORDED.under(names["policy"])),
        load(GPT2LMHeadModel(config), RECORDED.under("ref_policy")),
        load(GPT2ForSequenceClassification(config), RECORDED.under("reward_model")),
        load(GPT2ForSequenceClassification(config), RECORDED.under(names["value"])),
    )


def config_of(name: str) -> PPOConfig:
    """trl's options of a run as ours; what it was not told has our default, which is trl's."""
    told = RUNS[name]["config"]
    batch_size = told["per_device_train_batch_size"] * told["num_mini_batches"]
    return PPOConfig(
        steps=told["total_episodes"] // batch_size,
        batch_size=batch_size,
        minibatch_size=told["per_device_train_batch_size"],
        epochs=told["num_ppo_epochs"],
        critic="separate",
        max_new_tokens=told["response_length"],
        temperature=told["temperature"] + EXTRA_TEMPERATURE,
        learning_rate=told["learning_rate"],
        weight_decay=told["weight_decay"],
        adam_eps=told["adam_epsilon"],
        max_grad_norm=None,  # trl never clips
        gamma=told["gamma"],
        whiten_rewards=told.get("whiten_rewards", False),
        eos_penalty=told.get("missing_eos_penalty", 0.0),
        max_tokens=50,  # about two micro-batches in each minibatch; trl takes it whole
    )


@pytest.mark.eq("ppo_policy")
@pytest.mark.eq("ppo_value")
@pytest.mark.parity(
    *("judge, ppo_epoch", "PPOv2Trainer.train", VERSION),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED, "convention": CONVENTION},
)
@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_ends_at_the_weights_and_metrics_of_trl(name: str, parity: Parity) -> None:
    config, models = config_of(name), models_of()
    prompt_width, width = RECORDED.facts["widths"]
    assert prompt_width == PROMPT_WIDTH
    batches = [
        Batch(RECORDED.rows(f"{step}.prompts"), RECORDED.rows(f"{step}.responses"), width)
        for step in range(config.steps)
    ]
    orders = RUNS[name]["orders"]
    policy, metrics = train_ours(models, batches, config, orders)
    trl_metrics = RUNS[name]["metrics"]

    trained = policy_of(models_of(policy=f"{name}.policy", value=f"{name}.value_model"))
    parity(largest_difference(policy, trained))
    assert len(orders) == config.steps * config.epochs
    for batch, ours, theirs in zip(batches, metrics, trl_metrics, strict=True):
        # trl sums -logprobs over padding too, where it has put 1
        padded_cells = sum(width - len(ids) for ids in batch.response_ids)
        ours["objective/entropy"] -= padded_cells / config.batch_size
        assert ours.keys() == theirs.keys() - {"episode"}
        parity([abs(value - theirs[metric]) for metric, value in ours.items()])

    # The run was worth comparing: it moved, both losses met their clips, some responses were cut.
    assert largest_difference(policy, policy_of(models)) > 0.05
    assert max(theirs["val/clipfrac_avg"] for theirs in trl_metrics) > 0
    for theirs in trl_metrics:
        assert theirs["policy/clipfrac_avg"] > 0
        assert 0 < theirs["val/num_eos_tokens"] < config.batch_size
