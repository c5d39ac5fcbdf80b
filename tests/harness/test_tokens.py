"""The token view: each number is what the update saw, and a step's metrics are its means."""

import json
import math
from dataclasses import replace

import pytest
import torch
from small import (
    BALL,
    BIG,
    END,
    GREEN,
    ONE,
    PROMPTS,
    RED,
    SMALL,
    TWO,
    WORDS,
    ids,
    row_logprobs,
    small_policy,
)
from tolerances import FP64

from rlhf_min import grpo, ppo, rloo
from rlhf_min.config import GRPOConfig, RLOOConfig
from rlhf_min.harness.report import tokens
from rlhf_min.harness.report.tokens import token_records, token_rows
from rlhf_min.harness.run.log import MetricsLog
from rlhf_min.losses import ppo_policy_loss
from rlhf_min.rollout import score_rollout

PROMPT_IDS = [ids(RED, BALL), ids(BIG), ids(GREEN, ONE, SMALL)]
RESPONSE_IDS = [ids(ONE, END), ids(TWO, TWO, SMALL, BALL, END), ids(RED, BIG, END)]
SCORES = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
CONFIG = ppo.PPOConfig(
    steps=1, batch_size=3, minibatch_size=2, learning_rate=0.05, clip=0.1, gamma=0.9, lam=0.8,
    schedule="constant", warmup_share=0.0, temperature=0.7, max_new_tokens=5,
)  # fmt: skip
KL_COEF = 0.3
GROUPS = {"batch_size": 4, "minibatch_size": 2, "group_size": 2, "temperature": 0.7}


def text(row):
    return " ".join(WORDS[int(i) - 2] for i in row if i >= 2)


@pytest.fixture(scope="module")
def updated():
    """A policy after its update, what it learned from, and the reference."""
    policy, ref_policy = small_policy(critic="shared"), small_policy(seed=5)
    rollout = score_rollout(
        policy, ref_policy, PROMPT_IDS, RESPONSE_IDS, SCORES, temperature=0.7, kl="k1",
        max_tokens=1024,
    )  # fmt: skip
    rollout = replace(
        rollout,
        prompts=[text(row) for row in PROMPT_IDS],
        responses=[text(row) for row in RESPONSE_IDS],
    )
    buffer = ppo.judge(rollout, CONFIG, kl_coef=KL_COEF)
    state = ppo.new_state(policy, PROMPTS, CONFIG)
    ppo.ppo_update(policy, state.optimizer, buffer, CONFIG, rng=state.minibatch_rng)
    return policy, buffer, ref_policy


def test_a_row_for_each_token_of_the_response(updated):
    policy, buffer, _ = updated
    rows = token_rows(policy, buffer, 1, CONFIG)
    assert [row["token"] for row in rows] == ["two", "two", "small", "ball", "<end>"]
    assert [row["id"] for row in rows] == RESPONSE_IDS[1].tolist()
    assert len(token_rows(policy, buffer, 0, CONFIG)) == 2


def test_logprobs_are_those_of_the_row_alone(updated):
    policy, buffer, ref_policy = updated
    for b, (prompt, response) in enumerate(zip(PROMPT_IDS, RESPONSE_IDS, strict=True)):
        for t, row in enumerate(token_rows(policy, buffer, b, CONFIG)):
            for name, model in (("new_logprob", policy), ("ref_logprob", ref_policy)):
                logits = row_logprobs(model, prompt, response) / 0.7
                expected = float(logits.log_softmax(-1)[t, response[t]].detach())
                assert row[name] == pytest.approx(expected, abs=FP64)
            assert row["kl"] == pytest.approx(row["logprob"] - row["ref_logprob"], abs=FP64)
            assert math.log(row["ratio"]) == pytest.approx(
                row["new_logprob"] - row["logprob"], abs=FP64
            )


def test_clipped_tokens_are_those_of_the_policy_loss(updated):
    policy, buffer, _ = updated
    rows = [row for b in range(3) for row in token_rows(policy, buffer, b, CONFIG)]
    found = ppo_policy_loss(
        *(
            torch.tensor([[row[name] for row in rows]], dtype=torch.float64)
            for name in ("new_logprob", "logprob", "advantage")
        ),
        torch.ones(1, len(rows), dtype=torch.bool),
        clip=CONFIG.clip,
    )
    clipped = [row["clipped"] for row in rows]
    assert 0 < sum(clipped) < len(rows)
    assert sum(clipped) / len(rows) == pytest.approx(float(found.clip_fraction), abs=FP64)
    for row in rows:  # only in the direction that the advantage asks for
        better, worse = row["ratio"] > 1.1, row["ratio"] < 0.9
        assert row["clipped"] == (better if row["advantage"] > 0 else worse)


def test_a_ratio_of_a_response_that_no_float_holds_is_infinite(updated):
    policy, buffer, _ = updated
    rollout = replace(buffer.rollout, logprobs=buffer.rollout.logprobs - 400)
    rows = token_rows(policy, replace(buffer, rollout=rollout), 0, RLOOConfig(**GROUPS))
    assert [row["ratio"] for row in rows] == [math.inf, math.inf]
    assert [row["clipped"] for row in rows] == [row["advantage"] > 0 for row in rows]


def written(file, updated, **options):
    policy, buffer, _ = updated
    records = token_records(policy, buffer, CONFIG, step=7, kl_coef=KL_COEF, **options)
    MetricsLog(lambda: file.parent).append(file.name, records)
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]


def test_the_metrics_of_a_step_are_means_of_its_tokens(tmp_path, updated):
    records = written(tmp_path / "tokens.jsonl", updated)
    metrics = ppo.report(updated[1])
    assert [record["row"] for record in records] == [0, 1, 2]
    assert {record["rows"] for record in records} == {3}
    rows = [row for record in records for row in record["tokens"]]
    assert len(rows) == 10
    for name in ("kl", "reward"):
        total = sum(row[name] for row in rows)
        assert total / 3 == pytest.approx(metrics[name], abs=FP64)
    for name in ("value", "return"):
        assert sum(row[name] for row in rows) / 10 == pytest.approx(metrics[name], abs=FP64)
    assert sum(record["score"] for record in records) / 3 == metrics["score"]


def test_rewards_and_advantages_can_be_computed_by_hand(tmp_path, updated):
    records = written(tmp_path / "tokens.jsonl", updated)
    raw = []
    for record in records:
        rows = record["tokens"]
        values = [row["value"] for row in rows] + [0.0]
        for t, row in enumerate(rows):
            score = record["score"] if t == len(rows) - 1 else 0.0
            reward = score - record["kl_coef"] * row["kl"]
            assert row["reward"] == pytest.approx(reward, abs=FP64)
            # GAE as the sum of all later errors, not as a recursion
            advantage = sum(
                (record["gamma"] * record["lam"]) ** (u - t)
                * (rows[u]["reward"] + record["gamma"] * values[u + 1] - values[u])
                for u in range(t, len(rows))
            )
            assert row["return"] == pytest.approx(advantage + row["value"], abs=FP64)
            raw.append((advantage, row["advantage"]))
    mean = sum(advantage for advantage, _ in raw) / len(raw)
    deviation = (sum((a - mean) ** 2 for a, _ in raw) / (len(raw) - 1) + 1e-8) ** 0.5
    assert records[0]["whitened"] is True
    for advantage, whitened in raw:
        assert whitened == pytest.approx((advantage - mean) / deviation, abs=FP64)


def test_a_few_rows_or_as_many_as_there_is_room_for(tmp_path, updated, monkeypatch):
    few = written(tmp_path / "few.jsonl", updated, rows=2)
    assert [(record["row"], record["rows"]) for record in few] == [(0, 3), (1, 3)]
    monkeypatch.setattr(tokens, "MOST_TOKENS", 7)  # the third response would be tokens 8 to 10
    assert [record["row"] for record in written(tmp_path / "room.jsonl", updated)] == [0, 1]
    assert [record["row"] for record in written(tmp_path / "one.jsonl", updated, rows=1)] == [0]


def test_steps_are_added_to_the_file_and_the_gold_reward_is_noted(tmp_path, updated):
    file = tmp_path / "tokens.jsonl"
    written(file, updated, rows=1)
    records = written(file, updated, rows=2, gold=lambda _, responses: map(len, responses))
    assert [record["response"] for record in records] == ["one", "one", "two two small ball"]
    assert "gold_reward" not in records[0]
    assert [record["gold_reward"] for record in records[1:]] == [3.0, 18.0]


def test_a_number_that_is_not_finite_does_not_break_the_json(tmp_path, updated):
    policy, buffer, ref_policy = updated
    ruled_out = buffer.rollout.ref_logprobs.clone()
    ruled_out[1, 2] = -math.inf
    buffer = replace(buffer, rollout=replace(buffer.rollout, ref_logprobs=ruled_out))
    records = written(tmp_path / "tokens.jsonl", (policy, buffer, ref_policy))
    found = [row["ref_logprob"] for row in records[1]["tokens"]]
    assert [x is None for x in found] == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("algorithm", "config"),
    [
        (grpo, GRPOConfig(kl_in="reward", advantage_scale="none", **GROUPS)),
        (grpo, GRPOConfig(ratio_level="sequence", **GROUPS)),
        (rloo, RLOOConfig(**GROUPS)),
    ],
    ids=["Dr. GRPO", "GSPO", "RLOO"],
)
def test_the_advantage_of_a_group_can_be_computed_by_hand(algorithm, config):
    policy, rollout = small_policy(), rollout_of_two_groups()
    buffer = algorithm.judge(rollout, config)
    records = token_records(policy, buffer, config, step=1, kl_coef=config.kl_coef)
    assert [record["place"] for record in records] == [0, 1, 0, 1]
    for record, score in zip(records, rollout.scores.tolist(), strict=True):
        rows, reward = record["tokens"], record["group"][record["place"]]
        assert not any("value" in row for row in rows)
        kl = sum(row["kl"] for row in rows)
        assert reward == pytest.approx(score - record["kl_coef"] * kl, abs=FP64)
        assert sum(row["reward"] for row in rows) == pytest.approx(reward, abs=FP64)
        assert "-0.0" not in [str(row["reward"]) for row in rows]
        (other,) = {*record["group"]} - {reward}
        expected = {
            "leave_one_out": reward - other,
            "none": (reward - other) / 2,
            # The deviation of two is their distance by the root of 2.
            "group": (reward - other) / 2 / (abs(reward - other) / 2**0.5 + 1e-4),
        }[record["scale"]]
        for row in rows:
            assert row["advantage"] == pytest.approx(expected, abs=FP64)
        ratios = [row["new_logprob"] - row["logprob"] for row in rows]
        log = {"leave_one_out": sum(ratios), "group": sum(ratios) / len(ratios)}
        for row, own in zip(rows, ratios, strict=True):
            assert math.log(row["ratio"]) == pytest.approx(log.get(record["scale"], own), abs=FP64)


def rollout_of_two_groups():
    prompts, responses = PROMPT_IDS[:2], [*RESPONSE_IDS, ids(TWO, END)]
    rollout = score_rollout(
        small_policy(seed=2), small_policy(seed=5), [p for p in prompts for _ in range(2)],
        responses, torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64), temperature=0.7,
        kl="k1", max_tokens=1024,
    )  # fmt: skip
    return replace(rollout, prompts=[""] * 4, responses=[""] * 4)
