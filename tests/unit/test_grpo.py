"""GRPO and RLOO: what they make of a rollout, whole runs beside a plain loop, and single steps."""

import math
import statistics
from dataclasses import astuple, replace
from functools import partial

import pytest
import torch
from small import (
    DEMONSTRATIONS,
    END,
    PROMPTS,
    assert_deterministic,
    assert_resumes,
    clip_by_hand,
    decayed,
    largest_difference,
    row_logprobs,
    shuffled,
    small_policy,
)
from strategies import assert_close
from tolerances import EXACT, FP64

from rlhf_min import grpo, online, rloo
from rlhf_min.config import GRPOConfig, RLOOConfig
from rlhf_min.data import collate
from rlhf_min.errors import BadInput
from rlhf_min.optim import Optimizer
from rlhf_min.rollout import Rollout, score_rollout
from rlhf_min.sampling import sample


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def judged(scores, *, logprobs=None, ended=None):
    """A rollout of two groups of two responses, of 2, 1, 3 and 1 tokens, with these scores."""
    responses = [torch.ones(n, dtype=torch.int64) for n in (2, 1, 3, 1)]
    sequences = collate([torch.ones(2, dtype=torch.int64)] * 4, responses, pad_id=0)
    zeros = torch.zeros(sequences.mask.shape, dtype=torch.float64)
    logprobs = zeros if logprobs is None else logprobs
    return Rollout(
        prompts=[""] * 4,
        responses=[""] * 4,
        sequences=sequences,
        scores=f64(*scores),
        ended=torch.tensor([True] * 4 if ended is None else ended),
        logprobs=logprobs,
        ref_logprobs=zeros,
        kl=logprobs - zeros,
        entropy=zeros,
        values=zeros,
    )


CONFIG = {
    "batch_size": 4,
    "minibatch_size": 2,
    "group_size": 2,
    "kl_coef": 0.5,
    "max_new_tokens": 3,
}
# KL by k1: 1 + 2, 4, 0, -2 nats per response.
LOGPROBS = torch.tensor(
    [[1, 2, 9], [4, 9, 9], [0, 0, 0], [-2, 9, 9]], dtype=torch.float64
)  # fmt: skip


def test_judge_by_hand():
    rollout = judged([4, 1, 0, 5], logprobs=LOGPROBS)
    # GRPO with its KL in the loss: means 2.5 and 2.5; deviations 3 / sqrt 2 and 5 / sqrt 2.
    buffer = grpo.judge(rollout, GRPOConfig(**CONFIG, advantage_scale="none"))
    assert_close(buffer.advantages[:, 0], f64(1.5, -1.5, -2.5, 2.5), FP64)
    assert buffer.advantages[0].tolist() == [1.5, 1.5, 0]
    assert buffer.advantages[1].tolist() == [-1.5, 0, 0]
    buffer = grpo.judge(rollout, GRPOConfig(**CONFIG))
    scaled = 1.5 / (3 / 2**0.5 + 1e-4), 2.5 / (5 / 2**0.5 + 1e-4)
    assert_close(buffer.advantages[:, 0], f64(scaled[0], -scaled[0], -scaled[1], scaled[1]), FP64)
    # In the reward it takes 1.5, 2, 0 and -1 off: 2.5, -1, 0, 6.
    for judge in (
        lambda: grpo.judge(rollout, GRPOConfig(**CONFIG, advantage_scale="none", kl_in="reward")),
        lambda: rloo.judge(rollout, RLOOConfig(**CONFIG)),
    ):
        buffer = judge()
        assert_close(buffer.returns[:, 0], f64(2.5, -1, 0, 6), FP64)
        assert_close(buffer.rewards[0], f64(-0.5, 3, 0), FP64)
        assert_close(buffer.returns[0], f64(2.5, 3, 0), FP64)
    assert_close(buffer.advantages[:, 0], f64(3.5, -3.5, -6, 6), FP64)
    assert buffer.advantages[1].tolist() == [-3.5, 0, 0]


@pytest.mark.parametrize("kl_coef", [0.05, 5.0])
def test_of_equal_scores_a_deviation_divides_the_weight_of_the_kl_out(kl_coef):
    rollout = judged([4, 4, 0, 0], logprobs=LOGPROBS)
    config = GRPOConfig(**CONFIG | {"kl_coef": kl_coef}, kl_in="reward")
    # Rewards of 4 - 3c and 4 - 4c, 0 and 2c: 1 / sqrt 2 each, but for the 1e-4.
    expected = 0.5**0.5 * f64(1, -1, -1, 1)
    assert_close(grpo.judge(rollout, config).advantages[:, 0], expected, 0.003)
    found = grpo.judge(rollout, replace(config, advantage_scale="none")).advantages[:, 0]
    assert_close(found, kl_coef * f64(0.5, -0.5, -1, 1), FP64)


@pytest.mark.parametrize("algorithm", [grpo, rloo])
def test_scores_are_clipped_and_then_charged_for_a_missing_eos(algorithm):
    config = {grpo: GRPOConfig, rloo: RLOOConfig}[algorithm]
    rollout = judged([9, 1, 0, -9], ended=[True, False, True, True])
    buffer = algorithm.judge(rollout, config(**CONFIG, score_clip=3, eos_penalty=0.25))
    assert_close(buffer.returns[:, 0], f64(3, 0.75, 0, -3), FP64)


def test_equal_groups_are_counted():
    rollout = judged([1, 1, 1, 2], logprobs=LOGPROBS)
    alike = grpo.judge(rollout, GRPOConfig(**CONFIG))
    assert online.equal_groups(alike, 2) == 0.5
    charged = rloo.judge(rollout, RLOOConfig(**CONFIG))  # 1 - 1.5, 1 - 2: equal no more
    assert online.equal_groups(charged, 2) == 0


@pytest.mark.parametrize(("algorithm", "config"), [(grpo, GRPOConfig), (rloo, RLOOConfig)])
def test_a_policy_with_a_critic_is_refused(algorithm, config):
    with pytest.raises(BadInput, match="takes the place of a critic"):
        algorithm.new_state(small_policy(critic="shared"), PROMPTS, config(**CONFIG))


# The whole of it, once more

SHARED = {
    **{"steps": 2, "batch_size": 6, "group_size": 3, "minibatch_size": 4, "epochs": 2},
    **{"max_new_tokens": 5, "temperature": 0.7, "clip": 0.02, "clip_high": 0.05, "kl_coef": 0.3},
    **{"score_clip": 1.5, "eos_penalty": 0.7, "weight_decay": 0.1, "max_grad_norm": 0.5},
    **{"warmup_share": 0.25, "learning_rate": 5e-3, "max_tokens": 12, "seed": 3},
}
CONFIGS = {
    "GRPO": GRPOConfig(**SHARED),
    "DAPO": GRPOConfig(**SHARED | {"kl_coef": 0.0}, loss_mean="token", mask_cut=True),
    "Dr. GRPO": GRPOConfig(**SHARED, advantage_scale="none", loss_mean="constant", kl_in="reward"),
    "GSPO": GRPOConfig(**SHARED, advantage_scale="batch", ratio_level="sequence"),
    "masked": GRPOConfig(**SHARED, mask_cut=True),
    "RLOO": RLOOConfig(**SHARED),
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def uneven(prompts, responses):
    """A reward that tells almost all texts apart."""
    return [
        len(p) / 7 + 3 * math.sin(sum(map(ord, r))) for p, r in zip(prompts, responses, strict=True)
    ]


def module_of(config):
    return rloo if isinstance(config, RLOOConfig) else grpo


def run(config, *, policy=None, reward=uneven, prompts=PROMPTS, **options):
    policy = policy or small_policy()
    state = module_of(config).new_state(policy, prompts, config)
    train = module_of(config).train
    ref_policy = small_policy(seed=1, dtype=policy.lm.dtype)
    steps = train(policy, ref_policy, reward, config, state, **options)
    return policy, state, list(steps)


def taken(policy, prompt, response, temperature):
    logp = row_logprobs(policy, prompt.ids, response, temperature)
    return torch.stack([logp[t, y] for t, y in enumerate(response.tolist())])


def plain_advantages(rewards, config):
    """Of two groups of three, from lists."""
    found = []
    for group in (rewards[:3], rewards[3:]):
        for i, reward in enumerate(group):
            if isinstance(config, RLOOConfig):
                found.append(reward - statistics.fmean(group[:i] + group[i + 1 :]))
                continue
            scale = {
                "group": statistics.stdev(group) + 1e-4,
                "batch": statistics.stdev(rewards) + 1e-4,
                "none": 1.0,
            }[config.advantage_scale]
            found.append((reward - statistics.fmean(group)) / scale)
    return found


def held(ratio, advantage):
    """A good response earns nothing above 1.05, a bad one nothing below 0.98."""
    if (advantage > 0 and ratio > 1.05) or (advantage < 0 and ratio < 0.98):
        return -advantage * (1.05 if advantage > 0 else 0.98) + 0 * ratio, 1.0
    return -advantage * ratio, 0.0


def plain_row(new, old, ref, advantage, config):
    """What a response adds: losses of its tokens, and for each token what is reported."""
    change, n = new - old, len(new)
    if isinstance(config, RLOOConfig):
        ratios = [change.sum().exp()] * n
    elif config.ratio_level == "sequence":
        ratios = [(change.sum() / n).exp()] * n
    else:
        ratios = list(change.exp())
    losses, clipped = zip(*(held(ratio, advantage) for ratio in ratios), strict=True)
    if isinstance(config, GRPOConfig) and config.kl_in == "loss":
        apart = ref - new
        losses = [
            x + config.kl_coef * (d.exp() - 1 - d) for x, d in zip(losses, apart, strict=True)
        ]
    reported = {
        "clip_fraction": list(clipped),
        "update_k1": (-change).tolist(),
        "update_k3": (change.exp() - 1 - change).tolist(),
        "ratio": [ratio.item() for ratio in ratios],
    }
    return list(losses), reported


def plain_mean(rows, config):
    """Of what stands at the tokens of each response."""
    if getattr(config, "loss_mean", "sequence") == "token":
        tokens = [x for row in rows for x in row]
        return sum(tokens) / max(len(tokens), 1)
    return sum(sum(row) / max(len(row), 1) for row in rows) / len(rows)


def plain_groups(policy, ref_policy, reward, config):
    """Without batches, padding, buffers or classes: every row alone, every sum written out."""
    sampling = torch.Generator().manual_seed(config.seed + 10**6)
    orders = torch.Generator().manual_seed(config.seed + 2 * 10**6)
    queue = shuffled(len(PROMPTS), config.seed)
    optimizer = torch.optim.AdamW(decayed(policy, config.weight_decay), lr=1.0, eps=1e-5)
    kl_in_reward = isinstance(config, RLOOConfig) or config.kl_in == "reward"
    constant = getattr(config, "loss_mean", "") == "constant"
    reports, steps_taken = [], 0
    for step in range(2):
        one, two = (PROMPTS[i] for i in queue[2 * step : 2 * step + 2])
        prompts = [one, one, one, two, two, two]
        prompt_ids = [x.ids for x in prompts]
        responses = sample(policy, prompt_ids, max_new_tokens=5, temperature=0.7, rng=sampling)
        scores = reward([x.text for x in prompts], [policy.decode(x) for x in responses])
        old, ref, rewards = [], [], []
        for prompt, response, score in zip(prompts, responses, scores, strict=True):
            old.append(taken(policy, prompt, response, 0.7).detach())
            ref.append(taken(ref_policy, prompt, response, 0.7).detach())
            shaped = max(-1.5, min(1.5, score)) - (0.7 if response[-1] != END else 0.0)
            k1 = float((old[-1] - ref[-1]).sum())
            rewards.append(shaped - config.kl_coef * k1 if kl_in_reward else shaped)
        advantages = plain_advantages(rewards, config)
        found = []
        for _ in range(2):
            order = torch.randperm(6, generator=orders).tolist()
            for rows in (order[:4], order[4:]):
                losses, reported = [], []
                for i in rows:
                    if getattr(config, "mask_cut", False) and responses[i][-1] != END:
                        losses.append([])
                        continue
                    new = taken(policy, prompts[i], responses[i], 0.7)
                    row = plain_row(new, old[i], ref[i], advantages[i], config)
                    losses.append(row[0])
                    reported.append(row[1])
                loss = plain_mean(losses, config)
                if constant:
                    loss = sum(sum(row) for row in losses) / (len(rows) * 5)
                names = ("clip_fraction", "update_k1", "update_k3", "ratio")
                means = dict.fromkeys(names, 0.0)
                if reported:
                    means = {k: plain_mean([row[k] for row in reported], config) for k in names}
                means |= {
                    "loss": torch.as_tensor(loss).item(),
                    "ratio_max": max((max(row["ratio"]) for row in reported), default=0.0),
                }
                optimizer.zero_grad()
                (loss + 0 * sum(p.sum() for p in policy.parameters())).backward()
                means["grad_norm"] = clip_by_hand(policy, 0.5)
                # 8 steps, 2 of warm-up, then down to 0
                rate = min(steps_taken / 2, (8 - steps_taken) / 6) * 5e-3
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                steps_taken += 1
                found.append(means | {"learning_rate": rate})
        report = {k: statistics.fmean(x[k] for x in found) for k in found[0]}
        report["ratio_max"] = max(x["ratio_max"] for x in found)
        report["learning_rate"] = found[0]["learning_rate"]
        reports.append(report | {"reward": statistics.fmean(rewards)})
    return reports


@EACH
def test_training_is_the_plain_loop(config):
    plain, ref_policy = small_policy(), small_policy(seed=1)
    policy, _, found = run(config)
    expected = plain_groups(plain, ref_policy, uneven, config)
    for metrics, report in zip(found, expected, strict=True):
        assert {k: metrics[k] for k in report} == pytest.approx(report, abs=FP64)
    assert any(m["clip_fraction"] > 0 for m in found)
    assert any(0 < m["eos_rate"] < 1 for m in found)
    assert largest_difference(policy, plain) < FP64
    assert largest_difference(policy, small_policy()) > 1e-3


# One optimizer step

ALL_LOSSES = [
    GRPOConfig(
        **SHARED | {"batch_size": 8, "group_size": 2, "minibatch_size": 8, "max_tokens": 1000},
        loss_mean=loss_mean,
        ratio_level=ratio_level,
        kl_in=kl_in,
        mask_cut=mask_cut,
    )
    for loss_mean in ("sequence", "token", "constant")
    for ratio_level in ("token", "sequence")
    for kl_in in ("loss", "reward")
    for mask_cut in (False, True)
] + [RLOOConfig(**SHARED | {"batch_size": 8, "group_size": 2, "minibatch_size": 8})]


@pytest.fixture(scope="module")
def moved_rollout():
    """Of another policy, so that some tokens are clipped; three of eight responses were cut."""
    rollout = score_rollout(
        small_policy(seed=2),
        small_policy(seed=1),
        [x.prompt_ids for x in DEMONSTRATIONS],
        [x.response_ids for x in DEMONSTRATIONS],
        f64(1, -0.5, 1.4, 0.25, -1.2, 0.5, -1, 0.75),
        temperature=0.7,
        kl="k1",
        max_tokens=1000,
    )
    ended = torch.tensor([True, False, True, True, False, True, True, False])
    return replace(rollout, ended=ended)


def step_of(config, rollout, rows=(3, 5, 0, 2, 1, 7, 4)):
    module, policy, batches = module_of(config), small_policy(), []
    policy.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    optimizer = Optimizer(torch.optim.SGD(policy.parameters(), lr=0.1))
    buffer = module.judge(rollout, config)
    return policy, module.minibatch_step(policy, optimizer, buffer, list(rows), config), batches


@pytest.mark.parametrize("config", ALL_LOSSES, ids=lambda x: "-".join(map(str, astuple(x)[-6:])))
def test_micro_batches_leave_the_gradient_as_it_is(config, moved_rollout):
    whole, expected, batches = step_of(replace(config, max_tokens=1000), moved_rollout)
    assert batches == [7]
    assert 0 < expected["clip_fraction"] < 1
    assert largest_difference(whole, small_policy()) > 1e-4
    for max_tokens in (1, 15):
        policy, found, batches = step_of(replace(config, max_tokens=max_tokens), moved_rollout)
        assert len(batches) > 2
        assert largest_difference(policy, whole) < FP64
        assert found == pytest.approx(expected, rel=FP64, abs=FP64)


@pytest.mark.parametrize("loss_mean", ["sequence", "token", "constant"])
def test_cut_responses_have_no_ratio(loss_mean, moved_rollout):
    config = replace(ALL_LOSSES[1], loss_mean=loss_mean)
    found, among_ended = (
        step_of(config, moved_rollout, rows)[1] for rows in ((3, 1, 0, 2, 4, 7, 5), (3, 0, 2, 5))
    )
    for name in ("clip_fraction", "update_k1", "update_k3", "ratio", "ratio_max"):
        assert found[name] == pytest.approx(among_ended[name], rel=FP64)
        assert found[name] != 0


@pytest.mark.parametrize("max_tokens", [1, 1000])
@pytest.mark.parametrize("loss_mean", ["sequence", "token", "constant"])
def test_a_minibatch_of_cut_responses_moves_nothing(loss_mean, max_tokens, moved_rollout):
    config = replace(ALL_LOSSES[1], loss_mean=loss_mean, max_tokens=max_tokens)
    assert config.mask_cut
    policy, found, _ = step_of(config, moved_rollout, rows=[1, 4, 7])
    assert largest_difference(policy, small_policy()) == EXACT
    assert all(math.isfinite(x) for x in found.values())
    assert (found["loss"], found["grad_norm"]) == (0, 0)


def test_at_ratio_1_the_gradient_of_rloo_is_that_of_reinforce(moved_rollout):
    config = ALL_LOSSES[-1]
    rollout = replace(moved_rollout, logprobs=moved_rollout.logprobs.clone())
    plain = small_policy()
    rows = [
        row_logprobs(plain, x.prompt_ids, x.response_ids, 0.7)[
            range(len(x.response_ids)), x.response_ids
        ]
        for x in DEMONSTRATIONS
    ]
    for b, row in enumerate(rows):
        rollout.logprobs[b, : len(row)] = row.detach()
    policy, stats, _ = step_of(config, rollout, rows=range(8))
    advantages = rloo.judge(rollout, config).advantages[:, 0]
    sum(-a * row.sum() / 8 for a, row in zip(advantages, rows, strict=True)).backward()
    for (name, before), after in zip(plain.named_parameters(), policy.parameters(), strict=True):
        assert_close(before - after, 0.1 * before.grad, FP64), name
    assert stats["ratio_max"] == pytest.approx(1, abs=FP64)


# What train does besides


@EACH
def test_dropout_is_off(config):
    config = replace(config, epochs=1, minibatch_size=6, steps=1)
    _, _, (metrics,) = run(config, policy=small_policy(dropout=0.5))
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=FP64)


BOTH = pytest.mark.parametrize("config", [CONFIGS["GRPO"], CONFIGS["RLOO"]], ids=["GRPO", "RLOO"])
FAST = {"learning_rate": 0.02, "warmup_share": 0.0, "schedule": "constant"}


@BOTH
@pytest.mark.parametrize("share", [0.999, 1.001])
def test_stop_kl_ends_the_update_after_a_pass_beyond_it(config, share):
    config = replace(config, **FAST, steps=1)
    policy, _, (first,) = run(replace(config, epochs=1))
    limit = share * first["update_k1"]
    assert limit > 0
    stopped, state, (metrics,) = run(replace(config, epochs=3, stop_kl=limit))
    if share < 1:
        assert (metrics["epochs"], state.optimizer.steps) == (1, 2)
        assert largest_difference(stopped, policy) == EXACT
    else:
        assert metrics["epochs"] > 1


@BOTH
@pytest.mark.parametrize(("limit", "steps"), [(1e-3, 1), (1e3, 3), (None, 3)])
def test_max_kl_ends_the_run_for_good(config, limit, steps):
    config = replace(config, steps=3, max_kl=limit)
    policy, state, metrics = run(config)
    assert metrics[0]["k1"] > 1e-3
    assert len(metrics) == state.step == steps
    restored = module_of(config).new_state(policy, PROMPTS, config)
    restored.restore(state.state_dict())
    train = module_of(config).train
    assert list(train(policy, policy.reference(), uneven, config, restored)) == []


@BOTH
def test_monitors_and_fixed_prompts_are_looked_at_and_not_trained_on(config):
    config = replace(config, eval_every=2)
    silent, _, plain = run(config)
    looked, _, metrics = run(config, monitors={"again": uneven}, eval_prompts=PROMPTS[:3])
    assert largest_difference(silent, looked) == EXACT
    assert ["eval/score" in m for m in metrics] == [False, True]
    for m, p in zip(metrics, plain, strict=True):
        assert m["again"] == pytest.approx(m["score"], abs=FP64) == p["score"]


def build(config):
    config = replace(config, steps=6, epochs=1, eval_every=4, max_tokens=1000)
    policy = small_policy(dtype=torch.float32)
    ref_policy = small_policy(seed=1, dtype=torch.float32)
    state = module_of(config).new_state(policy, PROMPTS, config)
    train = partial(
        *(module_of(config).train, policy, ref_policy, uneven, config, state),
        monitors={"again": uneven},
        eval_prompts=PROMPTS[:3],
    )
    return policy, state, train


@BOTH
def test_resume(config):
    assert_resumes(partial(build, config), steps=6)


@BOTH
def test_determinism(config):
    assert_deterministic(partial(build, config))


@EACH
def test_they_learn_to_say_red(config):
    policy = small_policy(dtype=torch.float32)
    config = replace(
        config,
        **{"steps": 16, "batch_size": 16, "group_size": 4, "minibatch_size": 8, "epochs": 2},
        **{"learning_rate": 1e-2, "kl_coef": 0.01, "clip": 0.2, "clip_high": None},
        **{"temperature": 1.0, "score_clip": None, "eos_penalty": 0.0, "max_tokens": 1000},
    )
    _, _, metrics = run(config, policy=policy, reward=red_share)
    scores = [m["score"] for m in metrics]
    assert statistics.fmean(scores[:3]) < 0.35
    assert statistics.fmean(scores[-3:]) > 0.6


def red_share(_prompts, responses):
    """The share of a response's words that are red."""
    return [r.split().count("red") / max(len(r.split()), 1) for r in responses]


@BOTH
def test_every_column_goes_to_each_response_of_its_group(config):
    prompts = [replace(prompt, columns={"number": i}) for i, prompt in enumerate(PROMPTS)]
    seen = []

    def reward(texts, responses, number):
        seen.append((texts, number))
        return uneven(texts, responses)

    run(replace(config, steps=1), reward=reward, prompts=prompts)
    ((texts, numbers),) = seen
    one, two = shuffled(len(PROMPTS), config.seed)[:2]
    assert numbers == [one] * 3 + [two] * 3
    assert texts == [PROMPTS[i].text for i in numbers]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size is 1; it must be at least 2"),
        ({"batch_size": 8}, "batch_size 8 is no multiple of group_size 3"),
        ({"clip_high": 0.0}, "clip_high is 0.0; it must be above 0"),
    ],
)
@BOTH
def test_what_cannot_be_trained_with_is_refused(config, options, message):
    with pytest.raises(BadInput, match=f"{type(config).__name__}: {message}"):
        replace(config, **options)
