"""GRPO beside the ``GRPOTrainer`` of trl 1.16.0, as recorded: advantages, losses, whole runs."""

from typing import Any

import pytest
import torch
from group_harness import (
    README,
    assert_differ,
    assert_is_their_loss,
    assert_is_their_run,
    clips_gap,
    of_rollouts,
    policy_of,
    recording,
    replay,
    shared_options,
    weights_gap,
)
from recordings import NEWEST
from trainer_harness import SHIMMED, Parity, gap

from rlhf_min import grpo
from rlhf_min.advantages import grpo_advantages
from rlhf_min.config import GRPOConfig
from rlhf_min.kl import kl_estimate
from rlhf_min.losses import grpo_loss

FUNCTIONS, RECORDED = recording("grpo_functions"), recording("grpo")
RUNS: dict[str, dict[str, Any]] = RECORDED.facts["runs"]
LOSS_MEANS = {"grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "constant"}
CASES = 120
SAME = [
    "grpo",
    "grpo, sequence",
    "grpo, two steps, cut masked",
    "dr_grpo",
    "dr_grpo, sequence",
    "dapo",
    "dapo, KL",
    "bnpo",
    "unequal prompts, Llama",
]


def config_of(name: str) -> GRPOConfig:
    """trl's options of a run as ours."""
    told = RUNS[name]["config"]
    return GRPOConfig(
        **shared_options(RUNS[name]),
        advantage_scale=told["scale_rewards"],
        loss_mean=LOSS_MEANS[told["loss_type"]],
        ratio_level=told["importance_sampling_level"],
        mask_cut=told.get("mask_truncated_completions", False),
    )


@pytest.mark.eq("grpo_advantages")
@pytest.mark.parity(
    *("grpo_advantages", "GRPOTrainer", NEWEST),
    **{"cases": CASES, "of": "batches", "dtype": SHIMMED},
)
def test_advantages(parity: Parity) -> None:
    cases = FUNCTIONS.cases("grpo_advantages")
    assert len(cases) == CASES
    for case in cases:
        scale = FUNCTIONS.facts["scales"][int(case["scale"])]
        ours = grpo_advantages(case["scores"], group_size=int(case["group_size"]), scale=scale)
        parity(gap(ours, case["advantages"]))


@pytest.mark.eq("grpo")
@pytest.mark.parity(
    *("grpo_loss", "GRPOTrainer._compute_loss", NEWEST),
    **{"cases": CASES, "of": "ragged", "dtype": SHIMMED},
)
def test_losses_and_gradients(parity: Parity) -> None:
    cases = FUNCTIONS.cases("grpo_loss")
    assert len(cases) == CASES
    for case in cases:
        new_logprobs = case["new_logprobs"].requires_grad_()
        found = grpo_loss(
            *(new_logprobs, case["logprobs"], case["ref_logprobs"], case["advantages"]),
            case["mask"],
            clip=float(case["clip"]),
            clip_high=float(case["clip_high"]),
            kl_coef=float(case["kl_coef"]),
            ratio_level=FUNCTIONS.facts["levels"][int(case["level"])],
            loss_mean=LOSS_MEANS[FUNCTIONS.facts["losses"][int(case["kind"])]],
            max_new_tokens=int(case["longest"]),
        )
        assert_is_their_loss(found.loss, new_logprobs, case, parity)


@pytest.mark.eq("grpo")
@pytest.mark.parity(
    *("grpo.train", "GRPOTrainer.train", NEWEST),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED},
)
@pytest.mark.parametrize("name", SAME)
def test_a_whole_run_ends_at_the_weights_of_trl(name: str, parity: Parity) -> None:
    replayed = replay(grpo, RECORDED, name, config_of(name))
    assert_is_their_run(replayed, RECORDED, name, parity)
    if RUNS[name]["config"]["importance_sampling_level"] == "sequence":
        parity(clips_gap(replayed, RUNS[name]))


@pytest.mark.parity(
    *("online.report, grpo_loss", "GRPOTrainer.train", NEWEST),
    **{"cases": 6, "of": "steps", "dtype": SHIMMED, "convention": "one micro-batch"},
)
def test_metrics(parity: Parity) -> None:
    # trl takes the mean of micro-batches' token means: where there is one, it is ours.
    run = RUNS["bnpo"]
    replayed = replay(grpo, RECORDED, "bnpo", config_of("bnpo"))
    parity(clips_gap(replayed, run))
    for ours, theirs in zip(replayed.metrics, of_rollouts(run), strict=True):
        parity(abs(ours["rollout_entropy"] - theirs["entropy"]))
        parity(abs(ours["k3"] / ours["response_length"] - theirs["kl"]))  # trl's is per token


# Where trl differs: by how much, and that it is nothing else


@pytest.mark.parity(
    *("grpo.train", "GRPOTrainer.train", NEWEST),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED, "convention": "k3 times the ratio"},
)
def test_the_kl_of_trl_is_multiplied_by_the_ratio(parity: Parity) -> None:
    def corrected(new_logprobs, logprobs, ref_logprobs, advantages, mask, **options):
        kl_coef = options.pop("kl_coef")
        found = grpo_loss(
            *(new_logprobs, logprobs, ref_logprobs, advantages, mask), **options, kl_coef=0.0
        )
        k3 = kl_estimate(new_logprobs, ref_logprobs, kind="k3")
        weighed = torch.where(mask, k3 * (new_logprobs - logprobs).exp(), 0)
        return found._replace(loss=found.loss + kl_coef * (weighed.sum(1) / mask.sum(1)).mean())

    name = "corrected KL"
    plain = replay(grpo, RECORDED, name, config_of(name))
    assert_differ(plain, RECORDED, name, [1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "grpo_loss", corrected)
        replayed = replay(grpo, RECORDED, name, config_of(name))
    assert_is_their_run(replayed, RECORDED, name, parity)


@pytest.mark.parity(
    *("grpo.train", "GRPOTrainer.train", NEWEST),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED, "convention": "tokens of the rollout"},
)
def test_dapo_of_trl_divides_by_the_tokens_of_the_rollout(parity: Parity) -> None:
    # Each minibatch by its share of the rollout's, as if all of them had as many tokens.
    def divided(step, policy, optimizer, buffer, rows, config):
        tokens = buffer.rollout.lengths
        share = int(tokens[rows].sum()) * config.minibatches / int(tokens.sum())
        backward = optimizer.backward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizer, "backward", lambda loss: backward(loss * share))
            stats = step(policy, optimizer, buffer, rows, config)
        return stats | {"loss": stats["loss"] * share}

    name = "dapo, two steps"
    plain = replay(grpo, RECORDED, name, config_of(name))
    assert_differ(plain, RECORDED, name, [0, 1])
    replayed = replay(grpo, RECORDED, name, config_of(name), around_step=divided)
    assert_is_their_run(replayed, RECORDED, name, parity)


def test_bnpo_of_trl_depends_on_the_micro_batches() -> None:
    name = "bnpo, two micro-batches"
    assert_differ(replay(grpo, RECORDED, name, config_of(name)), RECORDED, name, [0])


@pytest.mark.parity(
    *("token_logprobs", "GRPOTrainer", NEWEST),
    **{"cases": 1, "of": "rollouts", "dtype": SHIMMED, "convention": "positions count padding"},
)
def test_trl_scores_short_prompts_at_positions_that_count_the_padding(parity: Parity) -> None:
    # generate() counts them without, so that GPT-2 is scored at others than it was sampled at.
    name, temperature = "unequal prompts", RUNS["unequal prompts"]["config"]["temperature"]
    replayed = replay(grpo, RECORDED, name, config_of(name))
    assert weights_gap(replayed, RECORDED, name) > 0.01

    ref_policy = policy_of(RECORDED, "gpt2", "policy")
    prompts = RECORDED.rows(f"{name}/0.prompts")
    responses = RECORDED.rows(f"{name}/0.responses")
    recorded = RECORDED.tensors[f"{name}/0.old_per_token_logps"]
    widest = max(map(len, prompts))
    gaps = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        theirs = recorded[i, : len(response)]
        for first in (0, widest - len(prompt)):
            ids = torch.cat([prompt, response])
            positions = torch.arange(first, first + len(ids))
            logits = ref_policy.lm(ids[None], position_ids=positions[None]).logits[0]
            rows = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
            gaps.append(gap(rows.gather(1, response[:, None])[:, 0].detach(), theirs))
        parity(gaps[-1])
    assert max(gaps) > 0.1
    last = RECORDED.tensors[f"{name}/2.old_per_token_logps"]
    apart = (replayed.buffers[2].rollout.logprobs - last)[replayed.buffers[2].rollout.mask]
    assert f"up to {apart.abs().max():.1f} nats a token" in README
