"""RLOO beside the ``RLOOTrainer`` of trl 1.16.0, as recorded: advantages, losses, whole runs."""

from typing import Any

import pytest
from group_harness import (
    assert_differ,
    assert_is_their_loss,
    assert_is_their_run,
    clips_gap,
    of_rollouts,
    recording,
    replay,
    shared_options,
)
from recordings import NEWEST
from trainer_harness import SHIMMED, Parity, gap

from rlhf_min import rloo
from rlhf_min.advantages import rloo_advantages
from rlhf_min.config import RLOOConfig
from rlhf_min.losses import rloo_loss

FUNCTIONS, RECORDED = recording("grpo_functions"), recording("rloo")
RUNS: dict[str, dict[str, Any]] = RECORDED.facts["runs"]
CASES = 120
SAME = ["rloo", "rloo, two steps", "rloo, clipped rewards", "rloo, unequal prompts, Llama"]


def config_of(name: str) -> RLOOConfig:
    """trl's options of a run as ours."""
    clip_range = RUNS[name]["config"].get("reward_clip_range")
    return RLOOConfig(
        **shared_options(RUNS[name]), score_clip=None if clip_range is None else clip_range[1]
    )


@pytest.mark.eq("rloo_advantages")
@pytest.mark.parity(
    *("rloo_advantages", "RLOOTrainer", NEWEST),
    **{"cases": CASES, "of": "batches", "dtype": SHIMMED},
)
def test_advantages(parity: Parity) -> None:
    cases = FUNCTIONS.cases("rloo_advantages")
    assert len(cases) == CASES
    for case in cases:
        kl = (case["logprobs"] - case["ref_logprobs"]).sum(1)
        rewards = case["scores"] - case["kl_coef"] * kl
        ours = rloo_advantages(rewards, group_size=int(case["group_size"]))
        parity(gap(ours, case["advantages"]))


@pytest.mark.eq("rloo")
@pytest.mark.parity(
    *("rloo_loss", "RLOOTrainer._compute_loss", NEWEST),
    **{"cases": CASES, "of": "ragged", "dtype": SHIMMED},
)
def test_losses_and_gradients(parity: Parity) -> None:
    cases = FUNCTIONS.cases("rloo_loss")
    assert len(cases) == CASES
    for case in cases:
        new_logprobs = case["new_logprobs"].requires_grad_()
        found = rloo_loss(
            *(new_logprobs, case["logprobs"], case["advantages"], case["mask"]),
            clip=float(case["clip"]),
            clip_high=float(case["clip_high"]),
        )
        assert_is_their_loss(found.loss, new_logprobs, case, parity)


@pytest.mark.eq("rloo")
@pytest.mark.parity(
    *("rloo.train", "RLOOTrainer.train", NEWEST),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED},
)
@pytest.mark.parametrize("name", SAME)
def test_a_whole_run_ends_at_the_weights_of_trl(name: str, parity: Parity) -> None:
    replayed = replay(rloo, RECORDED, name, config_of(name))
    assert_is_their_run(replayed, RECORDED, name, parity)
    parity(clips_gap(replayed, RUNS[name]))
    if RUNS[name]["config"]["beta"]:
        for ours, theirs in zip(replayed.metrics, of_rollouts(RUNS[name]), strict=True):
            parity(abs(ours["k1"] / ours["response_length"] - theirs["kl"]))  # trl's is per token


@pytest.mark.parity(
    *("rloo.train", "RLOOTrainer.train", NEWEST),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED, "convention": "advantages whitened"},
)
def test_advantages_of_trl_may_be_whitened(parity: Parity) -> None:
    def whitened(rewards, *, group_size):
        advantages = rloo_advantages(rewards, group_size=group_size)
        return (advantages - advantages.mean()) / (advantages.std() + 1e-4)

    name = "normalised"
    plain = replay(rloo, RECORDED, name, config_of(name))
    assert_differ(plain, RECORDED, name, [0], "grad_norm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rloo, "rloo_advantages", whitened)
        replayed = replay(rloo, RECORDED, name, config_of(name))
    assert_is_their_run(replayed, RECORDED, name, parity)
