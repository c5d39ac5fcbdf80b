"""Whole PPO runs against the ``PPOTrainer`` of trl 1.12.0: all weights and all metrics."""

from dataclasses import replace
from pathlib import Path

import pytest
from ppo_harness import (
    EXTRA_TEMPERATURE,
    policy_of,
    random_batches,
    random_models,
    train_ours,
    train_trl,
)
from small import largest_difference
from trainer_harness import SHIMMED, VERSION, Parity

from rlhf_min.ppo import PPOConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of trl to transformers

CONFIG = PPOConfig(
    steps=3,
    batch_size=32,
    minibatch_size=8,
    epochs=2,
    critic="separate",
    max_new_tokens=6,
    temperature=0.7 + EXTRA_TEMPERATURE,
    learning_rate=5e-3,
    weight_decay=0.1,
    # The gradient of a key's bias is 0 but for rounding, which Adam divides by its epsilon. With
    # 1e-8 these biases, and nothing else, end 1e-10 apart.
    adam_eps=1e-5,
    max_grad_norm=None,  # trl never clips
    gamma=0.97,
    max_tokens=50,  # about two micro-batches in each minibatch; trl takes it whole
)
COUNTERS = {"episode", "epoch", "step", "eps"}  # the last one is episodes per second
RUNS = {
    "k1": CONFIG,
    "k3": replace(CONFIG, kl="k3"),
    "k1, whitened rewards": replace(CONFIG, whiten_rewards=True),
    "k3, whitened rewards, EOS penalty": replace(
        CONFIG, kl="k3", whiten_rewards=True, eos_penalty=1.5
    ),
}


@pytest.mark.eq("ppo_policy")
@pytest.mark.eq("ppo_value")
@pytest.mark.parity(
    *("judge, ppo_epoch", "PPOTrainer.train", VERSION),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED, "convention": "score cell; padded metrics"},
)
@pytest.mark.parametrize("config", RUNS.values(), ids=RUNS.keys())
def test_a_whole_run_ends_at_the_weights_and_metrics_of_trl(
    config: PPOConfig, tmp_path: Path, parity: Parity
) -> None:
    batches, models, start = random_batches(config), random_models(), policy_of(random_models())
    trained = train_trl(models, batches, config, tmp_path)  # trains the models in place
    orders = [order for epochs in trained.orders for order in epochs]
    policy, metrics = train_ours(random_models(), batches, config, orders)

    parity(largest_difference(policy, policy_of(models)))
    assert len(metrics) == len(trained.logged) == config.steps
    for ours, theirs in zip(metrics, trained.logged, strict=True):
        assert ours.keys() == theirs.keys() - COUNTERS
        parity([abs(value - theirs[name]) for name, value in ours.items()])

    # The run was worth comparing: it moved, and both losses met their clips.
    assert largest_difference(policy, start) > 0.05
    assert all(m["policy/clipfrac_avg"] > 0 and m["val/clipfrac_avg"] > 0 for m in metrics)
