import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch
from small import (
    BALL,
    BIG,
    BLUE,
    END,
    ONE,
    PROMPTS,
    RED,
    SMALL,
    TWO,
    assert_deterministic,
    assert_resumes,
    clip_by_hand,
    decayed,
    ids,
    largest_difference,
    row_logprobs,
    shuffled,
    small_policy,
    weights,
    without_time,
)
from strategies import NAN, assert_close
from tolerances import EXACT, FP64

from rlhf_min import ppo
from rlhf_min.config import PPOConfig
from rlhf_min.data import Sequences
from rlhf_min.errors import BadInput, NonFinite
from rlhf_min.harness.run.faults import first_nonfinite
from rlhf_min.harness.stages.rollouts import alone
from rlhf_min.optim import Optimizer
from rlhf_min.rollout import Rollout, RolloutBuffer, collect, score_rollout
from rlhf_min.sampling import sample

CONFIG = ppo.PPOConfig(
    steps=2,
    batch_size=6,
    minibatch_size=3,
    epochs=2,
    max_new_tokens=5,
    learning_rate=1e-2,
    max_tokens=1000,
)


def red_share(_prompts, responses):
    """The share of a response's words that are red."""
    return [r.split().count("red") / max(len(r.split()), 1) for r in responses]


def fives(prompts, _responses):
    return [5.0] * len(prompts)


def uneven(prompts, responses):
    """A reward that tells almost all texts apart."""
    return [
        len(p) / 7 + 3 * math.sin(sum(map(ord, r))) for p, r in zip(prompts, responses, strict=True)
    ]


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def hand_rollout(lengths, *, scores, ended, **tokens):
    """A rollout of chosen numbers; what is not given is 0, and padding holds what it must not."""
    width = max(lengths) + 1
    mask = torch.tensor([[t < n for t in range(width)] for n in lengths])
    empty = torch.zeros(mask.shape, dtype=torch.long)
    sequences = Sequences(empty, empty, torch.ones(len(lengths)), empty, mask)
    names = ("logprobs", "ref_logprobs", "kl", "entropy", "values")
    cells = {
        name: f64([[*row, *[NAN] * (width - len(row))] for row in tokens[name]])
        if name in tokens
        else torch.zeros(mask.shape, dtype=torch.float64)
        for name in names
    }
    return Rollout([], [], sequences, f64(scores), torch.tensor(ended), **cells)


# Judge

# Clipped at 2 and less 1.3 without EOS, the scores are 2 and -1 - 1.3 = -2.3. With the KL at 0.5:
#   rewards   -0.5 * 0.1 = -0.05,   -0.5 * 0.2 = -0.1,   0.5 * 0.1 + 2 = 2.05
#             -0.5 * 0.4 - 2.3 = -2.5
REWARDS = [[-0.05, -0.1, 2.05, 0.0], [-2.5, 0.0, 0.0, 0.0]]
# With gamma 0.9 and lambda 0.5, backwards:
#   A_2 = 2.05 - 1.0                              = 1.05
#   A_1 = -0.1 + 0.9 * 1.0 - 0.25 + 0.45 * 1.05   = 1.0225
#   A_0 = -0.05 + 0.9 * 0.25 - 0.5 + 0.45 * 1.0225 = 0.135125
#   A_0 = -2.5 - 0.5                              = -3.0        (second row)
ADVANTAGES = [[0.135125, 1.0225, 1.05], [-3.0]]
RETURNS = [[0.635125, 1.2725, 2.05, 0.0], [-2.5, 0.0, 0.0, 0.0]]
JUDGED = replace(
    CONFIG, gamma=0.9, lam=0.5, score_clip=2.0, eos_penalty=1.3, whiten_advantages=False
)


def judged_by_hand():
    return hand_rollout(
        [3, 1],
        scores=[5.0, -1.0],
        ended=[True, False],
        kl=[[0.1, 0.2, -0.1], [0.4]],
        values=[[0.5, 0.25, 1.0], [0.5]],
    )


def whitened(rows, *, keep_mean=False):
    """By the standard library, over the real cells of all rows; padded with 0."""
    flat = [x for row in rows for x in row]
    mean, std = statistics.fmean(flat), math.sqrt(statistics.variance(flat) + 1e-8)
    width = max(map(len, rows)) + 1
    return [
        [(x - mean) / std + (mean if keep_mean else 0) for x in row] + [0.0] * (width - len(row))
        for row in rows
    ]


def test_judge_by_hand():
    buffer = ppo.judge(judged_by_hand(), JUDGED, kl_coef=0.5)
    assert_close(buffer.rewards, REWARDS, FP64)
    assert_close(buffer.advantages, [[*ADVANTAGES[0], 0.0], [-3.0, 0.0, 0.0, 0.0]], FP64)
    assert_close(buffer.returns, RETURNS, FP64)
    assert buffer.rollout.scores.tolist() == [5.0, -1.0]  # reported as they were


def test_judge_whitens_advantages_but_not_returns():
    config = replace(JUDGED, whiten_advantages=True)
    buffer = ppo.judge(judged_by_hand(), config, kl_coef=0.5)
    assert_close(buffer.advantages, whitened(ADVANTAGES), FP64)
    assert_close(buffer.returns, RETURNS, FP64)


def test_judge_whitens_rewards_and_keeps_their_mean():
    rollout = judged_by_hand()
    config = replace(JUDGED, whiten_rewards=True, lam=0.0, gamma=0.0)
    buffer = ppo.judge(rollout, config, kl_coef=0.5)
    expected = whitened([REWARDS[0][:3], REWARDS[1][:1]], keep_mean=True)
    assert_close(buffer.rewards, expected, FP64)
    assert_close(buffer.returns, expected, FP64)  # with gamma 0 a return is the reward


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"score_clip": None, "eos_penalty": 0.0}, (5.05, -1.2)),
        ({"score_clip": 0.5, "eos_penalty": 0.0}, (0.55, -0.7)),
        ({"score_clip": None, "eos_penalty": 3.3}, (5.05, -4.5)),
        ({"score_clip": 0.5, "eos_penalty": 3.3}, (0.55, -4.0)),  # cut first, then fined
    ],
)
def test_score_clip_and_eos_penalty(options, last):
    buffer = ppo.judge(judged_by_hand(), replace(JUDGED, **options), kl_coef=0.5)
    found = (buffer.rewards[0, 2].item(), buffer.rewards[1, 0].item())
    assert found == pytest.approx(last, abs=FP64)


# Running moments


@pytest.mark.eq("running_moments")
def test_running_moments_are_those_of_all_scores():
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, generator=rng, dtype=torch.float64) * 3 + n for n in (4, 1, 7, 2)]
    moments = ppo.RunningMoments()
    for i, batch in enumerate(batches, start=1):
        moments.update(batch)
        seen = torch.cat(batches[:i])
        assert moments.count == len(seen)
        assert moments.mean == pytest.approx(seen.mean().item(), abs=FP64)
        expected = (batch - seen.mean()) / (seen.var() + 1e-8).sqrt()
        assert_close(moments.normalise(batch), expected, FP64)


@pytest.mark.eq("running_moments")
def test_running_moments_by_hand():
    moments = ppo.RunningMoments()
    moments.update(f64([1.0, 3.0]))
    moments.update(f64([8.0]))
    assert moments == ppo.RunningMoments(count=3, mean=4.0, squares=9.0 + 1.0 + 16.0)
    # In deviations of sqrt(26 / 2).
    assert moments.normalise(f64([4.0, 17.0])).tolist() == pytest.approx(
        [0.0, math.sqrt(13)], abs=1e-8
    )


@pytest.mark.eq("running_moments")
def test_running_moments_of_float32_scores_are_sums_in_float64():
    moments = ppo.RunningMoments()
    moments.update(torch.tensor([2.0**24, 2.0**24 + 2]))  # float32 has no number between them
    assert moments == ppo.RunningMoments(count=2, mean=2.0**24 + 1, squares=2.0)


def test_a_single_score_is_0():
    moments = ppo.RunningMoments()
    moments.update(f64([5.0]))
    assert moments.normalise(f64([5.0])).tolist() == [0.0]


# One optimizer step

RESPONSES = [
    ids(RED, BALL, END),
    ids(END),
    ids(BIG, BIG, SMALL, ONE, TWO),
    ids(TWO, END),
    ids(BLUE, RED, ONE, END),
    ids(SMALL, RED),
]


def judged_rollout(policy, ref_policy=None, config=CONFIG, kl="k1"):
    rollout = score_rollout(
        policy,
        ref_policy or small_policy(seed=5),
        [x.ids for x in PROMPTS[:6]],
        RESPONSES,
        f64([1.0, -0.5, 2.0, 0.25, -2.0, 0.5]),
        temperature=config.temperature,
        kl=kl,
        max_tokens=1000,
    )
    return ppo.judge(rollout, config, kl_coef=0.1)


def descent(policy, rate=1.0):
    return Optimizer(torch.optim.SGD(policy.parameters(), lr=rate))


def test_at_ratio_1_the_gradient_is_that_of_reinforce():
    policy, plain = small_policy(critic="shared"), small_policy(critic="shared")
    config = replace(CONFIG, value_coef=0.0, temperature=0.7)
    buffer = judged_rollout(policy, config=config)
    before = weights(policy)
    stats = ppo.minibatch_step(policy, descent(policy), buffer, [4, 0, 2, 1, 3], config)
    for row in (0, 1, 2, 3, 4):
        logits = plain.lm(torch.cat([PROMPTS[row].ids, RESPONSES[row]])[None]).logits[0]
        logprobs = (logits[len(PROMPTS[row].ids) - 1 : -1] / 0.7).log_softmax(-1)
        for t, token in enumerate(RESPONSES[row].tolist()):
            n = 3 + 1 + 5 + 2 + 4  # real tokens of these rows
            (-buffer.advantages[row, t] * logprobs[t, token] / n).backward(retain_graph=True)
    moved = {name: before[name] - weight for name, weight in weights(policy).items()}
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:  # the value head has no part in it
            assert_close(moved[name], torch.zeros_like(moved[name]), EXACT)
        else:
            assert_close(moved[name], parameter.grad, FP64)
    assert stats["ratio"] == pytest.approx(1.0, abs=FP64)
    assert stats["ratio_max"] == pytest.approx(1.0, abs=FP64)
    assert stats["clip_fraction"] == EXACT
    assert stats["update_k1"] == pytest.approx(0.0, abs=FP64)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_micro_batches_leave_the_gradient_as_it_is(critic):
    # The policy has moved since the rollout, so that some tokens are clipped.
    buffer = judged_rollout(small_policy(critic=critic, seed=2))
    runs = []
    for max_tokens in (1000, 1, 12):
        policy, batches = small_policy(critic=critic), []
        policy.register_forward_pre_hook(lambda _, inputs, b=batches: b.append(len(inputs[0])))
        config = replace(CONFIG, max_tokens=max_tokens)
        stats = ppo.minibatch_step(policy, descent(policy, 0.1), buffer, [3, 5, 0, 2, 1], config)
        runs.append((policy, stats, batches))
    (whole, whole_stats, whole_batches), *split = runs
    assert whole_batches == [5]
    assert 0 < whole_stats["clip_fraction"] < 1
    assert largest_difference(whole, small_policy(critic=critic)) > 1e-3
    for policy, stats, batches in split:
        assert len(batches) > 2
        assert largest_difference(policy, whole) < FP64
        assert stats == pytest.approx(whole_stats, rel=FP64, abs=FP64)
    assert split[0][2] == [1] * 5


def test_the_rows_at_fault_are_looked_for_where_they_were_learned_from():
    policy, config = small_policy(critic="shared"), replace(CONFIG, temperature=0.7)
    buffer = judged_rollout(policy, config=config)
    for row, found in list(alone(policy, config, buffer))[6:]:  # after those of the rollout itself
        n = len(RESPONSES[row])
        assert_close(found["ratio"], torch.ones(1, n, dtype=torch.float64), FP64)
        assert_close(found["values"], buffer.rollout.values[[row], :n], FP64)
        assert_close(found["returns"], buffer.returns[[row], :n], EXACT)


def test_an_advantage_that_is_not_finite_stops_before_the_step():
    policy = small_policy(critic="shared")
    buffer = judged_rollout(policy)
    buffer.advantages[1, 0] = NAN
    before = weights(policy)
    with pytest.raises(NonFinite) as caught:
        ppo.minibatch_step(policy, descent(policy), buffer, [0, 1], CONFIG)
    assert caught.value.batch is buffer
    assert first_nonfinite(alone(policy, CONFIG, buffer)) == ("advantages", [1])
    assert largest_difference(policy, before) == EXACT


# The whole of it, once more

REPLAYED = replace(
    CONFIG,
    temperature=0.7,
    gamma=0.95,
    lam=0.8,
    clip=0.05,
    value_clip=0.1,
    value_coef=0.5,
    kl_coef=0.3,
    kl_control="adaptive",
    kl_target=0.5,
    kl_horizon=20.0,
    normalise_scores=True,
    score_clip=1.0,
    eos_penalty=0.7,
    weight_decay=0.1,
    max_grad_norm=0.5,
    warmup_share=0.25,
    batch_size=5,
    minibatch_size=3,
    learning_rate=5e-3,
    max_tokens=12,
    seed=3,
)


def plain_values(policy, row):
    trunk = policy.critic_trunk or policy.lm.transformer
    return policy.value_head(trunk(row[None]).last_hidden_state[0])[:, 0]


def plain_pass(policy, prompt_ids, response_ids, temperature, *, values=True):
    """Log-probabilities, entropies and values of one response, from its row alone."""
    row, p = torch.cat([prompt_ids, response_ids]), len(prompt_ids)
    logits = policy.lm(row[None]).logits[0, p - 1 : -1] / temperature
    logp = torch.log(torch.softmax(logits, -1))
    taken = torch.stack([logp[t, y] for t, y in enumerate(response_ids.tolist())])
    entropies = -(logp.exp() * logp).sum(-1)
    return taken, entropies, plain_values(policy, row)[p - 1 : -1] if values else None


def plain_policy_loss(ratio, advantage, clip):
    """Case by case: a good token earns nothing above 1 + clip, a bad one nothing below 1 - clip."""
    good = torch.where(ratio > 1 + clip, (1 + clip) * advantage, ratio * advantage)
    bad = torch.where(ratio < 1 - clip, (1 - clip) * advantage, ratio * advantage)
    return -torch.where(advantage > 0, good, bad)


def plain_value_loss(new, old, returns, clip):
    held = torch.where(new > old + clip, old + clip, torch.where(new < old - clip, old - clip, new))
    near, far = (held - returns) ** 2, (new - returns) ** 2
    return torch.where(near > far, near, far) / 2


def plain_ppo(policy, ref_policy, reward, config):
    """PPO without batches, padding, buffers or classes: every row alone, every sum written out."""
    sampling = torch.Generator().manual_seed(config.seed + 10**6)
    orders = torch.Generator().manual_seed(config.seed + 2 * 10**6)
    queue = [i for epoch in range(9) for i in shuffled(len(PROMPTS), config.seed + epoch)]
    optimizer = torch.optim.AdamW(decayed(policy, config.weight_decay), lr=1.0, eps=1e-5)
    seen, coef, taken_steps, reports = [], config.kl_coef, 0, []
    for step in range(config.steps):
        prompts = [PROMPTS[i] for i in queue[step * 5 : step * 5 + 5]]
        responses = sample(
            policy,
            [x.ids for x in prompts],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            rng=sampling,
        )
        texts = [policy.decode(x) for x in responses]
        scores = reward([x.text for x in prompts], texts)
        seen.append(f64(scores))
        everything = torch.cat(seen)
        old, advantages, returns, kls, rewards_sum = [], [], [], [], []
        for prompt, response, score in zip(prompts, responses, scores, strict=True):
            with torch.no_grad():
                logp, _, values = plain_pass(policy, prompt.ids, response, config.temperature)
                ref, _, _ = plain_pass(
                    ref_policy, prompt.ids, response, config.temperature, values=False
                )
            shaped = (score - everything.mean()) / (everything.var() + 1e-8).sqrt()
            shaped = max(-1.0, min(1.0, float(shaped)))
            if response[-1] != END:
                shaped -= 0.7
            rewards = [-coef * float(k) for k in logp - ref]
            rewards[-1] += shaped
            n = len(rewards)
            after = [*values.tolist(), 0.0]
            delta = [rewards[t] + 0.95 * after[t + 1] - after[t] for t in range(n)]
            a = f64(
                [sum((0.95 * 0.8) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
            )
            old.append((logp, values))
            advantages.append(a)
            returns.append(a + values)
            kls.append(float((logp - ref).sum()))
            rewards_sum.append(sum(rewards))
        flat = torch.cat(advantages)
        advantages = [(a - flat.mean()) / (flat.var() + 1e-8).sqrt() for a in advantages]

        sums = []
        for _ in range(config.epochs):
            order = torch.randperm(5, generator=orders).tolist()
            passes = []
            for rows in (order[:3], order[3:]):
                tokens = sum(len(responses[i]) for i in rows)
                found = dict.fromkeys(("policy_loss", "value_loss", "entropy", "update_k1"), 0.0)
                ratios = []
                total = 0.0
                for i in rows:
                    logp, entropies, values = plain_pass(
                        policy, prompts[i].ids, responses[i], config.temperature
                    )
                    ratio = (logp - old[i][0]).exp()
                    ratios += ratio.tolist()
                    policy_loss = plain_policy_loss(ratio, advantages[i], 0.05).sum() / tokens
                    value_loss = plain_value_loss(values, old[i][1], returns[i], 0.1).sum() / tokens
                    total = total + policy_loss + 0.5 * value_loss
                    found["policy_loss"] += policy_loss.item()
                    found["value_loss"] += value_loss.item()
                    found["entropy"] += entropies.sum().item() / tokens
                    found["update_k1"] += (old[i][0] - logp).sum().item() / tokens
                optimizer.zero_grad()
                total.backward()
                found["grad_norm"] = clip_by_hand(policy, 0.5)
                found["ratio"], found["update_k3"] = (
                    statistics.fmean(ratios),
                    statistics.fmean(r - 1 - math.log(r) for r in ratios),
                )
                found["ratio_max"] = max(ratios)
                # 8 steps, 2 of warm-up, then down to 0
                rate = min(taken_steps / 2, (8 - taken_steps) / 6) * config.learning_rate
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                found["learning_rate"] = rate
                taken_steps += 1
                passes.append(found)
            sums += passes
        means = {k: statistics.fmean(s[k] for s in sums) for k in sums[0]}
        # The largest of all, and the rate of the first step.
        means["ratio_max"] = max(s["ratio_max"] for s in sums)
        means["learning_rate"] = sums[0]["learning_rate"]
        mean_kl = statistics.fmean(kls)
        reports.append(
            means | {"kl": mean_kl, "kl_coef": coef, "reward": statistics.fmean(rewards_sum)}
        )
        coef *= 1 + max(-0.2, min(0.2, mean_kl / 0.5 - 1)) * 5 / 20
    return reports


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_training_is_the_plain_loop(critic):
    policy, plain = small_policy(critic=critic), small_policy(critic=critic)
    ref_policy = small_policy(seed=1)
    state = ppo.new_state(policy, PROMPTS, REPLAYED)
    found = list(ppo.train(policy, ref_policy, uneven, REPLAYED, state))
    expected = plain_ppo(plain, ref_policy, uneven, REPLAYED)
    assert len(found) == 2
    for metrics, report in zip(found, expected, strict=True):
        assert {k: metrics[k] for k in report} == pytest.approx(report, abs=FP64)
    assert found[1]["kl_coef"] != found[0]["kl_coef"]
    assert any(m["clip_fraction"] > 0 for m in found)
    assert any(m["value_clip_fraction"] > 0 for m in found)
    assert any(0 < m["eos_rate"] < 1 for m in found)
    assert largest_difference(policy, plain) < FP64
    assert largest_difference(policy, small_policy(critic=critic)) > 1e-3


# What train does besides


def run(policy=None, config=CONFIG, reward=uneven, **options):
    policy = policy or small_policy(critic="shared")
    state = ppo.new_state(policy, PROMPTS, config)
    metrics = list(ppo.train(policy, small_policy(seed=1), reward, config, state, **options))
    return policy, state, metrics


def test_dropout_is_off():
    policy = small_policy(critic="separate", dropout=0.5)
    config = replace(CONFIG, epochs=1, minibatch_size=6, steps=1)
    _, _, (metrics,) = run(policy, config)
    assert metrics["ratio"] == pytest.approx(1.0, abs=FP64)
    assert policy.lm.config.resid_pdrop == 0.5


def test_gradients_are_recorded_in_train_mode_and_rollouts_in_eval_mode():
    """Gradient checkpointing acts in train mode only."""
    policy, modes = small_policy(critic="separate").eval(), set()
    policy.register_forward_pre_hook(lambda m, _: modes.add((m.training, torch.is_grad_enabled())))
    run(policy, replace(CONFIG, steps=1), eval_prompts=PROMPTS[:2])
    assert modes == {(True, True), (False, False)}


def test_a_policy_without_critic_is_refused():
    with pytest.raises(BadInput, match="value head"):
        ppo.new_state(small_policy(), PROMPTS, CONFIG)


@pytest.mark.parametrize("control", ["fixed", "adaptive"])
def test_the_coefficient_in_use_is_the_one_from_before(control):
    config = replace(
        CONFIG, steps=4, kl_control=control, kl_target=100.0, kl_horizon=12.0, kl_coef=0.4
    )
    _, state, metrics = run(config=config)
    # The KL is far below the target: each time 20% of 6 / 12 less.
    factor = 1 - 0.2 * 6 / 12 if control == "adaptive" else 1.0
    coefs = [0.4 * factor**i for i in range(5)]
    assert [m["kl_coef"] for m in metrics] == pytest.approx(coefs[:4], rel=FP64)
    assert state.kl_control.coef == pytest.approx(coefs[4], rel=FP64)
    for m in metrics:
        assert m["reward"] == pytest.approx(m["score"] - m["kl_coef"] * m["kl"], abs=FP64)


@pytest.mark.parametrize("kl", ["abs", "k2", "k3", "full"])
def test_the_coefficient_follows_the_estimate_in_the_rewards(kl):
    """The KL that the rewards are charged with is steered, and no other."""
    config = replace(CONFIG, steps=1, kl=kl, kl_control="adaptive", kl_horizon=12.0)
    _, _, (metrics,) = run(config=config)
    target = metrics["kl"] / 1.01  # k1 is elsewhere
    _, state, (metrics,) = run(config=replace(config, kl_target=target))
    assert state.kl_control.coef == pytest.approx(0.05 * (1 + 0.01 * 6 / 12), rel=1e-9)
    assert abs(metrics["k1"] / metrics["kl"] - 1) > 0.01


def test_a_fixed_coefficient_is_the_configs_after_a_resume_too():
    policy, state, _ = run(config=replace(CONFIG, steps=1))
    other = ppo.new_state(policy, PROMPTS, replace(CONFIG, kl_coef=0.7))
    other.restore(state.state_dict())
    assert other.kl_control.coef == 0.7


def test_a_rollout_and_its_update_pass_no_more_than_max_tokens():
    cells = {}
    policy, ref_policy = small_policy(critic="separate"), small_policy(seed=1)
    for name, model in (("policy", policy), ("reference", ref_policy)):
        model.register_forward_pre_hook(
            lambda _, inputs, name=name: cells.setdefault(name, []).append(inputs[0].ids.numel())
        )
    config = replace(CONFIG, steps=1, max_tokens=20)
    state = ppo.new_state(policy, PROMPTS, config)
    list(ppo.train(policy, ref_policy, uneven, config, state, eval_prompts=PROMPTS))
    for sizes in cells.values():
        assert 10 < max(sizes) <= 20


@pytest.mark.parametrize("share", [0.999, 1.001])
def test_stop_kl_is_a_limit_of_k1(share):
    """Two minibatches: the second one of the first pass is already behind a step."""
    config = replace(CONFIG, steps=1, warmup_share=0.0, learning_rate=0.02, schedule="constant")
    _, _, (first,) = run(config=replace(config, epochs=1))
    assert abs(first["update_k3"] / first["update_k1"] - 1) > 0.002
    limit = share * first["update_k1"]
    _, _, (metrics,) = run(config=replace(config, epochs=2, stop_kl=limit))
    assert metrics["epochs"] == (1 if share < 1 else 2)


def test_stop_kl_ends_the_update():
    config = replace(CONFIG, steps=1, epochs=6, learning_rate=0.02, warmup_share=0.0)
    _, state, (free,) = run(config=replace(config, stop_kl=100.0))
    assert free["epochs"] == 6
    assert state.optimizer.steps == 6 * 2
    stopped, state, (metrics,) = run(config=replace(config, stop_kl=1e-4))
    n = metrics["epochs"]
    assert 1 <= n < 6
    assert state.optimizer.steps == 2 * n
    # It is the policy of the run that has no more than these epochs.
    same_total = replace(config, epochs=int(n), schedule="constant")
    constant, _, _ = run(config=replace(config, schedule="constant", stop_kl=1e-4))
    fewer, _, _ = run(config=same_total)
    assert largest_difference(constant, fewer) == EXACT
    assert largest_difference(stopped, fewer) > 0


def test_stop_kl_is_measured_in_the_last_epoch():
    """One minibatch for each epoch: the first is at k1 0, the second is already behind it."""
    config = replace(CONFIG, minibatch_size=6, epochs=5, steps=1, warmup_share=0.0)
    config = replace(config, learning_rate=0.02, stop_kl=1e-5)
    _, _, (metrics,) = run(config=config)
    assert metrics["epochs"] == 2
    assert metrics["update_k1"] > 1e-5 / 2  # a mean over both


@pytest.mark.parametrize(("limit", "steps"), [(1e-3, 1), (1e3, 3), (None, 3)])
def test_max_kl_ends_the_run(limit, steps):
    _, state, metrics = run(config=replace(CONFIG, steps=3, max_kl=limit))
    assert metrics[0]["kl"] > 1e-3
    assert len(metrics) == state.step == steps


@pytest.mark.parametrize("kl", ["abs", "k2", "k3", "full"])
def test_max_kl_looks_at_k1_whatever_the_rewards_hold(kl):
    _, _, metrics = run(config=replace(CONFIG, steps=1, kl=kl))
    estimate, k1 = metrics[0]["kl"], metrics[0]["k1"]
    assert abs(estimate - k1) > 0.01
    for limit in (k1 - 0.005, k1 + 0.005):
        _, state, _ = run(config=replace(CONFIG, steps=1, kl=kl, max_kl=limit))
        assert state.too_far == (k1 > limit)


def test_monitors_are_reported_and_not_trained_on():
    seen = []

    def spy(prompts, responses):
        seen.append((prompts, responses))
        return uneven(prompts, responses)

    silent, _, metrics = run(reward=spy)
    watched, _, watched_metrics = run(monitors={"red": red_share, "five": fives})
    assert largest_difference(silent, watched) == EXACT
    for m, w, (prompts, responses) in zip(metrics, watched_metrics, seen, strict=True):
        assert w["five"] == 5.0
        assert w["red"] == pytest.approx(statistics.fmean(red_share(prompts, responses)), abs=FP64)
        assert without_time(m) == {
            k: v for k, v in without_time(w).items() if k not in ("red", "five")
        }


def test_eval_prompts_are_looked_at_with_the_same_random_numbers():
    config = replace(CONFIG, steps=3, eval_every=2, kl="k2")  # k1 is reported all the same
    plain, _, _ = run(config=config)
    policy, _, metrics = run(config=config, eval_prompts=PROMPTS[:4], monitors={"red": red_share})
    assert largest_difference(policy, plain) == EXACT  # looking changes nothing
    assert ["eval/score" in m for m in metrics] == [False, True, True]
    rng = torch.Generator().manual_seed(config.seed + 3 * 10**6)
    responses = sample(
        policy, [x.ids for x in PROMPTS[:4]], max_new_tokens=5, temperature=1.0, rng=rng
    )
    texts = [policy.decode(x) for x in responses]
    scores = uneven([x.text for x in PROMPTS[:4]], texts)
    ref_policy = small_policy(seed=1)
    kls = []
    for prompt, response in zip(PROMPTS[:4], responses, strict=True):
        ours, theirs = (
            row_logprobs(m, prompt.ids, response).detach() for m in (policy, ref_policy)
        )
        kls.append(sum(float(ours[t, y] - theirs[t, y]) for t, y in enumerate(response.tolist())))
    pairs = [p for x in texts for p in itertools.pairwise(x.split())]
    fours = [list(zip(*(x.split()[i:] for i in range(4)), strict=False)) for x in texts]
    expected = {
        "eval/distinct_2": len(set(pairs)) / len(pairs),
        "eval/repeated_4": statistics.fmean(1 - len(set(x)) / len(x) if x else 0.0 for x in fours),
        "eval/score": statistics.fmean(scores),
        "eval/k1": statistics.fmean(kls),
        "eval/red": statistics.fmean(red_share([], texts)),
        "eval/response_length": statistics.fmean(map(len, responses)),
    }
    assert {k: metrics[-1][k] for k in expected} == pytest.approx(expected, abs=FP64)


@pytest.mark.parametrize("kl", ["k1", "abs", "k2", "k3", "full"])
def test_report_by_hand(kl):
    policy, ref_policy = small_policy(critic="shared"), small_policy(seed=1)
    rollout = collect(
        policy,
        ref_policy,
        uneven,
        PROMPTS,
        PPOConfig(max_new_tokens=5, kl=kl, max_tokens=20),
        rng=torch.Generator().manual_seed(0),
    )
    config = replace(CONFIG, eos_penalty=0.5)
    buffer = ppo.judge(rollout, config, kl_coef=0.2)
    found = ppo.report(buffer)

    rows = list(range(8))
    lengths = rollout.lengths.tolist()
    sums = {name: [0.0] * 8 for name in ("k1", "abs", "k2", "k3", "full")}
    entropies = []
    for row, prompt in enumerate(PROMPTS):
        response = rollout.sequences.responses[row, : lengths[row]]
        ours, theirs = (
            row_logprobs(m, prompt.ids, response).detach() for m in (policy, ref_policy)
        )
        for t, y in enumerate(response.tolist()):
            d = float(ours[t, y] - theirs[t, y])
            sums["k1"][row] += d
            sums["abs"][row] += abs(d)
            sums["k2"][row] += d * d / 2
            sums["k3"][row] += math.exp(-d) - 1 + d
            sums["full"][row] += float((ours[t].exp() * (ours[t] - theirs[t])).sum())
            entropies.append(-float((ours[t].exp() * ours[t]).sum()))
    scores = uneven([x.text for x in PROMPTS], rollout.responses)
    ended = [int(rollout.sequences.responses[r, lengths[r] - 1]) == END for r in rows]
    assert 0 < sum(ended) < 8
    cells = [(r, t) for r in rows for t in range(lengths[r])]
    returns = [float(buffer.returns[c]) for c in cells]
    values = [float(rollout.values[c]) for c in cells]
    errors = [r - v for r, v in zip(returns, values, strict=True)]
    rewards = [s - 0.5 * (not e) - 0.2 * k for s, e, k in zip(scores, ended, sums[kl], strict=True)]
    assert found == pytest.approx(
        {
            "score": statistics.fmean(scores),
            "score_std": statistics.stdev(scores),
            "kl": statistics.fmean(sums[kl]),
            "k1": statistics.fmean(sums["k1"]),
            "k3": statistics.fmean(sums["k3"]),
            "reward": statistics.fmean(rewards),
            "rollout_entropy": statistics.fmean(entropies),
            "value": statistics.fmean(values),
            "return": statistics.fmean(returns),
            "explained_variance": 1 - statistics.variance(errors) / statistics.variance(returns),
            "response_length": statistics.fmean(lengths),
            "eos_rate": sum(ended) / 8,
            "tokens": sum(len(x.ids) for x in PROMPTS) + sum(lengths),
        },
        rel=FP64,
        abs=FP64,
    )


def test_report_never_looks_at_padding():
    # rows of 2 tokens and 1; padding is NaN in everything
    ours, theirs = [[-1.0, -2.0], [-3.0]], [[-1.5, -4.0], [-2.0]]  # d = 0.5, 2 | -1
    rollout = hand_rollout(
        [2, 1],
        scores=[1.0, 4.0],
        ended=[True, False],
        logprobs=ours,
        ref_logprobs=theirs,
        kl=[[1.0, 2.0], [3.0]],
        entropy=[[0.5, 1.0], [3.0]],
        values=[[1.0, 2.0], [3.0]],
    )
    rewards, returns = f64([[2.0, 3.0, NAN], [5.0, NAN, NAN]]), f64([[2.0, 4.0, NAN], [9.0] * 3])
    found = ppo.report(RolloutBuffer(rollout, rewards, NAN * rewards, returns))
    assert found == pytest.approx(
        {
            "score": 2.5,
            "score_std": math.sqrt(4.5),
            "kl": (1 + 2 + 3) / 2,
            "k1": (0.5 + 2 - 1) / 2,
            # exp(-d) - 1 + d
            "k3": (math.exp(-0.5) + math.exp(-2) + math.exp(1) - 3 + 1.5) / 2,
            "reward": (2 + 3 + 5) / 2,
            "rollout_entropy": 4.5 / 3,
            "value": 6 / 3,
            "return": 15 / 3,
            # of 1, 2, 6 around 3, and of 2, 4, 9 around 5
            "explained_variance": 1 - (4 + 1 + 9) / (9 + 1 + 16),
            "response_length": 1.5,
            "eos_rate": 0.5,
            "tokens": int(rollout.sequences.attention_mask.sum()),
        },
        abs=FP64,
    )


def test_tokens_are_those_of_prompts_and_responses():
    seen = []

    def spy(prompts, responses):
        seen.append(prompts)
        return uneven(prompts, responses)

    _, _, metrics = run(reward=spy)
    for m, prompts in zip(metrics, seen, strict=True):
        assert min(m["time/sample"], m["time/score"], m["time/update"]) > 0
        tokens = sum(len(p.split()) for p in prompts) + 6 * m["response_length"]
        assert m["tokens"] == pytest.approx(tokens, rel=FP64)


def test_explained_variance_of_perfect_and_useless_values():
    # lambda 1 and gamma 1: every return is the score of its row, here 1 or -1
    config = replace(CONFIG, lam=1.0, gamma=1.0, whiten_advantages=False)
    for values, expected in (([[1.0, 1.0], [-1.0]], 1.0), ([[0.3, 0.3], [0.3]], 0.0)):
        rollout = hand_rollout([2, 1], scores=[1.0, -1.0], ended=[True, True], values=values)
        found = ppo.report(ppo.judge(rollout, config, kl_coef=0.0))
        assert found["explained_variance"] == pytest.approx(expected, abs=FP64)


def test_explained_variance_of_returns_that_are_all_equal():
    """There is nothing to explain: 1 if the values are level too, else far below 0."""
    rows = hand_rollout([2, 1], scores=[0.0] * 2, ended=[True] * 2, values=[[1.0, 1.0], [1.0]])
    level = RolloutBuffer(rows, rows.values * 0, rows.values * 0, torch.where(rows.mask, 1.0, NAN))
    assert ppo.report(level)["explained_variance"] == EXACT + 1
    uneven_rows = replace(rows, values=rows.values * f64([[1.0, 2.0, 1.0], [3.0, 1.0, 1.0]]))
    assert ppo.report(replace(level, rollout=uneven_rows))["explained_variance"] < -1000


def test_scores_are_reported_as_they_were_before_normalising():
    """The metrics speak in the reward's own units."""
    _, _, plain = run(config=replace(CONFIG, steps=1))
    _, _, normalised = run(config=replace(CONFIG, steps=1, normalise_scores=True))
    assert plain[0]["reward"] != normalised[0]["reward"]
    assert plain[0]["score"] == normalised[0]["score"]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_ppo_learns_to_say_red(critic):
    policy = small_policy(critic=critic, dtype=torch.float32)
    ref_policy = policy.reference()
    config = ppo.PPOConfig(
        steps=25, batch_size=32, max_new_tokens=5, learning_rate=1e-2, kl_coef=0.01, critic=critic
    )
    state = ppo.new_state(policy, PROMPTS, config)
    steps = ppo.train(policy, ref_policy, red_share, config, state)
    scores = [m["score"] for m in steps]
    assert statistics.fmean(scores[:3]) < 0.35
    assert statistics.fmean(scores[-3:]) > 0.8


def build():
    config = replace(
        CONFIG,
        steps=6,
        kl_control="adaptive",
        kl_target=0.5,
        kl_horizon=30.0,
        normalise_scores=True,
        eval_every=4,
    )
    policy = small_policy(critic="shared", dtype=torch.float32)
    ref_policy = small_policy(seed=1, dtype=torch.float32)
    state = ppo.new_state(policy, PROMPTS, config)

    def train():
        return ppo.train(
            policy,
            ref_policy,
            uneven,
            config,
            state,
            monitors={"red": red_share},
            eval_prompts=PROMPTS[:3],
        )

    return policy, state, train


def test_resume():
    assert_resumes(build, steps=6)


def test_determinism():
    assert_deterministic(build)


def test_a_run_that_went_too_far_stays_over_when_it_is_restored():
    config = replace(CONFIG, steps=3, max_kl=1e-6)
    policy, state, metrics = run(config=config)
    assert len(metrics) == 1
    restored = ppo.new_state(policy, PROMPTS, config)
    restored.restore(state.state_dict())
    assert list(ppo.train(policy, policy.reference(), uneven, config, restored)) == []


def test_monitors_get_the_columns_that_they_name():
    prompts = [replace(prompt, columns={"weight": float(i)}) for i, prompt in enumerate(PROMPTS)]
    seen = []

    def weighed(_prompts, responses, weight):
        seen.append(weight)
        return [w * len(r) for w, r in zip(weight, responses, strict=True)]

    policy = small_policy(critic="shared")
    config = replace(CONFIG, steps=1)
    state = ppo.new_state(policy, prompts, config)
    (metrics,) = ppo.train(
        policy, policy.reference(), weighed, config, state, monitors={"again": weighed}
    )
    assert seen[0] == seen[1]  # the monitor saw what the reward saw
    assert metrics["again"] == pytest.approx(metrics["score"], abs=FP64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_control": "adaptive", "kl_horizon": 25.6}, "must exceed a fifth of batch_size 128"),
        ({"batch_size": 1, "minibatch_size": 1}, "batch_size is 1; it must be at least 2"),
        ({"batch_size": 4, "minibatch_size": 5}, "minibatch_size 5 exceeds batch_size 4"),
        ({"value_clip": 0.0}, "value_clip is 0.0; it must be above 0"),
    ],
)
def test_what_cannot_be_trained_with_is_refused(options, message):
    with pytest.raises(BadInput, match=message):
        ppo.PPOConfig(**options)


def test_a_horizon_bounds_an_adaptive_coefficient_only():
    assert ppo.PPOConfig(kl_horizon=25.6).kl_control == "fixed"
    assert ppo.PPOConfig(kl_control="adaptive", kl_horizon=25.7, value_clip=math.inf)


@pytest.mark.parametrize(
    ("field", "value"), [("precision", "bf32"), ("kl_control", "Adaptive"), ("kl", "k9")]
)
def test_a_choice_that_does_not_exist_is_refused(field, value):
    with pytest.raises(BadInput, match=f"{field} is '{value}'"):
        replace(CONFIG, **{field: value})
