"""Numbers that are injected where they go wrong: no step is taken with them, in any algorithm."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from small import (
    BALL,
    BIG,
    END,
    ONE,
    PROMPTS,
    RED,
    TWO,
    ids,
    largest_difference,
    real_copy,
    small_policy,
    small_reward_model,
    weights,
)
from tolerances import EXACT

from rlhf_min import dpo, ppo, reward, sft
from rlhf_min.data import PreferenceExample, SFTExample
from rlhf_min.errors import BadInput, BadNumbers, NonFinite
from rlhf_min.optim import SKIPS, adamw
from rlhf_min.rollout import collect
from rlhf_min.sampling import ROWS_AT_ONCE, sample

STEPS = 4
LONG = ids(RED, BALL, BIG, ONE, TWO)
DEMONSTRATIONS = [
    SFTExample(ids(RED), ids(ONE, END)),
    SFTExample(LONG, ids(TWO, BIG, END)),
    SFTExample(ids(BIG, BALL), ids(END)),
]
PREFERENCES = [
    PreferenceExample(ids(RED), ids(ONE, END), ids(TWO, END)),
    PreferenceExample(LONG, ids(TWO, BIG, END), ids(BIG, ONE, END)),
    PreferenceExample(ids(BIG, BALL), ids(END), ids(ONE, END)),
]
PAIRS = [
    {"prompt": "red", "chosen": "one", "rejected": "two"},
    {"prompt": "red ball big one two", "chosen": "two big", "rejected": "big one"},
    {"prompt": "big ball", "chosen": "small", "rejected": "one"},
]
POSITION = 5  # no row but the long one comes so far
SAME = {"epochs": STEPS, "batch_size": 3, "schedule": "constant", "warmup_share": 0.0}


def sft_run(**options):
    policy = small_policy(dtype=torch.float32)
    config = sft.SFTConfig(**SAME | options)
    state = sft.new_state(policy, DEMONSTRATIONS, config)
    return policy, policy.lm.transformer.wpe, state, sft.train(policy, config, state)


def reward_run(*, pairs=PAIRS, **options):
    reward_model = small_reward_model(dtype=torch.float32)
    config = reward.RewardConfig(**SAME | options)
    examples = reward.prepare_pairs(reward_model, pairs)[0]
    state = reward.new_state(reward_model, examples, config)
    positions = reward_model.model.bert.embeddings.position_embeddings
    return reward_model, positions, state, reward.train(reward_model, config, state)


def dpo_run(**options):
    policy, ref_policy = small_policy(dtype=torch.float32), small_policy(dtype=torch.float32)
    config = dpo.DPOConfig(**SAME | options)
    state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
    steps = dpo.train(policy, ref_policy, config, state)
    return policy, policy.lm.transformer.wpe, state, steps


def lengths(_prompts, responses):
    return [float(len(response)) for response in responses]


def ppo_run(*, score=lengths, **options):
    policy = small_policy(critic="shared", dtype=torch.float32)
    config = ppo.PPOConfig(
        **{
            **{"steps": STEPS, "batch_size": 3, "minibatch_size": 3, "epochs": 1},
            **{"max_new_tokens": 3, "schedule": "constant", "warmup_share": 0.0},
            **options,
        }
    )
    state = ppo.new_state(policy, PROMPTS, config)
    ref_policy = small_policy(seed=1, dtype=torch.float32)
    return policy, None, state, ppo.train(policy, ref_policy, score, config, state)


RUNS = pytest.mark.parametrize("run", [sft_run, reward_run, dpo_run, ppo_run])
SUPERVISED = pytest.mark.parametrize("run", [sft_run, reward_run, dpo_run])


def length(example):
    if isinstance(example, reward.RewardExample):
        return len(f"{example.prompt} {example.chosen}".split())
    response = getattr(example, "chosen_ids", getattr(example, "response_ids", ()))
    return len(example.prompt_ids) + len(response)


def assert_untouched(module, before):
    """The same weights to the bit, NaN where NaN was."""
    after = weights(module)
    assert after.keys() == before.keys()
    for name, weight in after.items():
        assert torch.equal(weight.view(torch.int32), before[name].view(torch.int32)), name


def exhaust(steps, module, kept):
    """Run to the end, and keep the weights after each step."""
    for _ in steps:
        kept.append(weights(module))


def adam_of(state):
    return real_copy(state.optimizer.optimizer.state_dict()["state"])


def assert_same_adam(state, before):
    after = adam_of(state)
    assert after.keys() == before.keys()
    for parameter, moments in after.items():
        for name, value in moments.items():
            assert torch.equal(value, before[parameter][name])


# In the forward pass


@SUPERVISED
def test_a_nan_weight_stops_the_run_and_names_the_rows_that_it_reaches(run):
    module, positions, state, steps = run()
    tensor = "chosen_logprobs" if run is dpo_run else "loss"
    next(steps)
    with torch.no_grad():
        positions.weight[POSITION + (3 if run is reward_run else 0)] = math.nan  # [CLS] and [SEP]s
    before = weights(module)
    with pytest.raises(NonFinite, match=f"optimizer step 1: {tensor} is not finite") as caught:
        next(steps)
    error = caught.value
    assert (error.step, error.tensor, state.step) == (1, tensor, 1)
    assert error.rows == [i for i, x in enumerate(error.batch) if length(x) > POSITION]
    assert len(error.rows) == 1
    assert_untouched(module, before)
    assert state.optimizer.skipped == 0


@SUPERVISED
def test_a_nan_weight_is_skipped_and_counted_and_adam_never_sees_it(run):
    module, positions, state, steps = run(on_nonfinite="skip")
    assert next(steps)["skipped"] == 0
    row = POSITION + (3 if run is reward_run else 0)
    good = positions.weight[row].detach().clone()
    with torch.no_grad():
        positions.weight[row] = math.nan
    before, adam = weights(module), adam_of(state)
    metrics = next(steps)
    assert metrics["skipped"] == 1
    assert math.isnan(metrics["loss"])
    assert state.step == state.optimizer.steps == 2
    assert_untouched(module, before)
    assert_same_adam(state, adam)
    with torch.no_grad():
        positions.weight[row] = good
    before = weights(module)
    metrics = next(steps)
    assert metrics["skipped"] == 1
    assert math.isfinite(metrics["loss"])
    assert largest_difference(module, before) > 0


def test_a_policy_that_is_nan_stops_ppo_while_it_samples():
    policy, _, state, steps = ppo_run()
    next(steps)
    with torch.no_grad():
        policy.lm.transformer.ln_f.bias[0] = math.nan
    before = weights(policy)
    with pytest.raises(NonFinite, match="optimizer step 1: logits is not finite in batch row") as e:
        next(steps)
    assert (e.value.rows, len(e.value.batch), state.step) == ([0, 1, 2], 3, 1)
    assert_untouched(policy, before)


def test_sampling_names_the_rows_of_the_whole_batch():
    policy = small_policy()
    with torch.no_grad():
        policy.lm.transformer.wpe.weight[POSITION] = math.nan
    prompts = [ids(RED)] * (ROWS_AT_ONCE + 2)
    prompts[ROWS_AT_ONCE + 1] = ids(*LONG, BIG)
    rng = torch.Generator().manual_seed(0)
    with pytest.raises(BadNumbers, match="the policy gives NaN while sampling") as caught:
        sample(policy, prompts, max_new_tokens=2, temperature=1.0, rng=rng)
    assert caught.value.fault == ("logits", [ROWS_AT_ONCE + 1])


@pytest.mark.parametrize(
    ("tensor", "broken"),
    [
        ("values", lambda policy, _: policy.value_head.weight),
        ("ref_logprobs", lambda _, ref_policy: ref_policy.lm.transformer.wpe.weight),
    ],
)
def test_a_rollout_that_is_not_finite_is_named(tensor, broken):
    policy = small_policy(critic="shared", dtype=torch.float32)
    ref_policy = small_policy(seed=1, dtype=torch.float32)
    config = ppo.PPOConfig(steps=2, batch_size=3, minibatch_size=3, max_new_tokens=3)
    state = ppo.new_state(policy, PROMPTS, config)
    steps = ppo.train(policy, ref_policy, lengths, config, state)
    next(steps)
    with torch.no_grad():
        broken(policy, ref_policy)[0, 0] = math.inf
    before, taken = weights(policy), state.optimizer.steps
    with pytest.raises(NonFinite) as caught:
        next(steps)
    assert (caught.value.tensor, caught.value.rows) == (tensor, [0, 1, 2])
    assert caught.value.step == taken == state.optimizer.steps
    assert not getattr(caught.value.batch, tensor).isfinite().all()
    assert_untouched(policy, before)


def overflow_in_row_1(_prompts, _responses):
    return [1.0, 1e39, 2.0]  # finite, but not in the policy's float32


def test_a_score_beyond_float32_is_named():
    policy, _, state, steps = ppo_run(score=overflow_in_row_1)
    before = weights(policy)
    with pytest.raises(BadNumbers, match=r"gave 1e\+39 for the prompt .* in row 1 ") as caught:
        next(steps)
    assert caught.value.fault == ("scores", [1])
    assert state.step == 0
    assert_untouched(policy, before)


@pytest.mark.parametrize(("where", "bad"), [("ratio", -200.0), ("logprobs", math.nan)])
def test_a_minibatch_names_the_rows_of_the_rollout(where, bad):
    policy = small_policy(critic="shared", dtype=torch.float32)
    config = ppo.PPOConfig(batch_size=8, minibatch_size=4, max_new_tokens=3)
    rollout = collect(
        *(policy, policy.reference(), lengths, PROMPTS),
        **{"max_new_tokens": 3, "temperature": 1.0, "kl": "k1", "max_tokens": 1000},
        rng=torch.Generator().manual_seed(0),
    )
    buffer = ppo.judge(rollout, config, kl_coef=0.1)
    before = weights(policy)
    if where == "ratio":  # exp(about 200) is beyond float32
        rollout.logprobs[6, 0] = bad
        buffer.advantages[6, 0] = 1.0  # the clipped loss itself would be finite
        expected = [6]
    else:
        with torch.no_grad():
            policy.lm.transformer.ln_f.bias[0] = bad
        before, expected = weights(policy), [1, 3, 4, 6]
    optimizer = ppo.new_state(policy, PROMPTS, config).optimizer
    with pytest.raises(NonFinite) as caught:
        ppo.minibatch_step(policy, optimizer, buffer, [1, 6, 3, 4], config)
    assert (caught.value.tensor, caught.value.rows) == (where, expected)
    assert caught.value.batch is buffer
    assert_untouched(policy, before)


# In one row of the data


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_margin_of_nan(mode):
    pairs = [PAIRS[0], PAIRS[1] | {"margin": math.nan}, PAIRS[2]]
    module, _, state, steps = reward_run(pairs=pairs, on_nonfinite=mode)
    before = weights(module)
    if mode == "skip":
        assert [m["skipped"] for m in steps] == [1, 2, 3, 4]
    else:
        with pytest.raises(NonFinite) as caught:
            next(steps)
        (row,) = caught.value.rows
        assert math.isnan(caught.value.batch[row].margin)
    assert_untouched(module, before)
    assert state.optimizer.steps == (STEPS if mode == "skip" else 0)


def test_scores_that_are_infinite_stop_though_their_loss_is_0():
    # -log sigmoid(inf) is 0, and so is its gradient.
    module, _, _, steps = reward_run(center_coef=0.0)
    bias = module.model.classifier.bias[0]
    (small,) = module.tokenizer("small", add_special_tokens=False).input_ids
    module.forward_pairs = lambda pairs: torch.stack(
        [bias + (math.inf if x.response_tokens == 1 and x.ids[-2] == small else 0) for x in pairs]
    )
    before = weights(module)
    with pytest.raises(NonFinite, match="margin is not finite") as caught:
        next(steps)
    assert [caught.value.batch[row].chosen for row in caught.value.rows] == ["small"]
    assert_untouched(module, before)


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_reference_of_nan_in_one_pair(mode):
    module, _, state, steps = dpo_run(on_nonfinite=mode, batch_size=1, epochs=1)
    state.cursor.examples[1] = replace(
        state.cursor.examples[1], ref_logprobs=(math.nan, state.cursor.examples[1].ref_logprobs[1])
    )
    if mode == "stop":
        kept = []
        with pytest.raises(NonFinite) as caught:
            exhaust(steps, module, kept)
        assert (caught.value.tensor, caught.value.rows) == ("chosen_logprobs_change", [0])
        assert caught.value.batch == [state.cursor.examples[1]]
        assert_untouched(module, kept[-1])
        return
    assert sum(math.isnan(m["loss"]) for m in steps) == 1
    # It is the run of the other two pairs.
    plain, _, plain_state, plain_steps = dpo_run(batch_size=1, epochs=1)
    for _ in range(3):
        if plain_state.cursor._order()[plain_state.cursor.position] == 1:
            plain_state.cursor.take(1)
        else:
            next(plain_steps)
    assert (state.step, plain_state.step) == (3, 2)
    assert largest_difference(module, plain) == EXACT
    assert largest_difference(module, dpo_run()[0]) > 0


# In the gradient, and in the weights


@RUNS
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_gradient_names_its_parameter(run, mode):
    module, _, state, steps = run(on_nonfinite=mode)
    next(steps)
    if run is reward_run:
        name = "model.bert.encoder.layer.0.intermediate.dense.weight"
    else:
        name = "lm.transformer.h.0.mlp.c_fc.weight"
    handle = dict(module.named_parameters())[name].register_hook(lambda g: g / 0)
    before, adam = weights(module), adam_of(state)
    if mode == "stop":
        with pytest.raises(NonFinite) as caught:
            next(steps)
        assert (caught.value.tensor, caught.value.rows) == (f"gradient of {name}", [])
        assert all(p.grad is None for p in module.parameters())
    else:
        metrics = next(steps)
        assert metrics["skipped"] == 1
        assert not math.isfinite(metrics["grad_norm"])
        assert math.isfinite(metrics["loss" if run is not ppo_run else "policy_loss"])
    assert_untouched(module, before)
    assert_same_adam(state, adam)
    handle.remove()
    if mode == "skip":
        assert next(steps)["skipped"] == 1
        assert largest_difference(module, before) > 0


@RUNS
def test_a_learning_rate_that_explodes(run):
    module, _, state, steps = run(learning_rate=1e30, max_grad_norm=None)
    kept = []
    with pytest.raises(NonFinite) as caught:
        exhaust(steps, module, kept)
    assert caught.value.step == state.optimizer.steps == len(kept) >= 1
    assert len(caught.value.rows) == 3
    assert_untouched(module, kept[-1])
    assert all(torch.isfinite(weight).all() for weight in kept[-1].values())


# Skipping


def test_a_rollout_that_is_skipped_reaches_nothing():
    seen = []

    def score(_prompts, responses):
        seen.append([float(len(response)) + 3 for response in responses])
        return [1e39, 0.0, 0.0] if len(seen) == 2 else seen[-1]

    options = {"normalise_scores": True, "kl_control": "adaptive", "kl_horizon": 10.0}
    policy, _, state, steps = ppo_run(score=score, on_nonfinite="skip", **options)
    next(steps)
    before, adam, coef = weights(policy), adam_of(state), state.kl_control.coef
    moments, last = replace(state.moments), state.last
    assert next(steps) == {"skipped": 1}
    assert (state.step, state.optimizer.steps) == (2, 1)
    assert_untouched(policy, before)
    assert_same_adam(state, adam)
    assert (state.kl_control.coef, state.moments) == (coef, moments)
    assert state.last is last
    assert [m["skipped"] for m in steps] == [1, 1]
    kept = torch.tensor(seen[0] + seen[2] + seen[3], dtype=torch.float64)
    assert state.moments.count == 9
    assert state.moments.mean == pytest.approx(float(kept.mean()))
    assert state.kl_control.coef != coef


def test_a_rollout_whose_values_are_nan_is_skipped():
    policy, _, state, steps = ppo_run(on_nonfinite="skip")
    next(steps)
    before = weights(policy)
    handle = policy.value_head.register_forward_hook(
        lambda _module, _inputs, values: values if torch.is_grad_enabled() else values * math.nan
    )
    assert next(steps) == {"skipped": 1}
    handle.remove()
    assert_untouched(policy, before)
    assert next(steps)["skipped"] == 1
    assert (state.step, state.optimizer.steps) == (3, 2)
    assert largest_difference(policy, before) > 0


def test_a_reward_that_gives_nan_is_bad_input_or_skipped():
    def score(_prompts, responses):
        calls.append(len(responses))
        return [0.0, 0.0, math.nan] if len(calls) == 2 else [0.0, 1.0, 2.0]

    calls: list[int] = []
    policy, _, state, steps = ppo_run(score=score)
    next(steps)
    before = weights(policy)
    with pytest.raises(BadInput, match=r"reward score gave nan for the prompt '.*' in row 2 "):
        next(steps)
    assert_untouched(policy, before)

    calls.clear()
    policy, _, state, steps = ppo_run(score=score, on_nonfinite="skip")
    assert [m["skipped"] for m in steps] == [0, 1, 1, 1]
    assert state.optimizer.steps == 3

    *_, steps = ppo_run(score=lambda _, responses: [math.nan] * len(responses), on_nonfinite="skip")
    assert list(steps) == [{"skipped": n} for n in (1, 2, 3, 4)]


@RUNS
def test_skipping_ends_where_nothing_is_left_to_learn(run):
    n = {"steps": 2 * SKIPS} if run is ppo_run else {"epochs": 2 * SKIPS}
    module, _, state, steps = run(on_nonfinite="skip", **n)
    with torch.no_grad():
        next(iter(module.parameters()))[:] = math.nan
    before = weights(module)
    with pytest.raises(NonFinite) as caught:
        exhaust(steps, module, [])
    assert state.optimizer.skipped == SKIPS
    assert caught.value.rows == [0, 1, 2]
    assert_untouched(module, before)


def test_a_good_step_between_starts_the_count_again():
    policy, _, state, steps = sft_run(on_nonfinite="skip", epochs=2 * SKIPS + 3)
    parameter = policy.lm.transformer.h[0].mlp.c_fc.weight
    for good in itertools.chain([False] * SKIPS, [True], [False] * SKIPS):
        handle = parameter.register_hook(lambda g, good=good: g if good else g * math.nan)
        next(steps)
        handle.remove()
    assert state.optimizer.skipped == 2 * SKIPS
    parameter.register_hook(lambda g: g * math.nan)
    with pytest.raises(NonFinite):
        next(steps)


@RUNS
def test_what_was_skipped_is_kept_by_a_resume(run):
    module, _, state, steps = run(on_nonfinite="skip")
    next(iter(module.parameters())).register_hook(lambda g: g * math.nan)
    next(steps)
    module, _, restored, steps = run(on_nonfinite="skip")
    restored.restore(real_copy(state.state_dict()))
    assert next(steps)["skipped"] == 1


def test_under_fp16_only_the_gradient_may_overflow():
    module = torch.nn.Linear(2, 1)
    optimizer = adamw(
        module,
        **{"learning_rate": 0.1, "weight_decay": 0.0, "schedule": "constant", "warmup_share": 0.0},
        **{"total_steps": 9, "max_grad_norm": 1.0, "precision": "fp16"},
    )
    before = weights(module)
    optimizer.check({"loss": math.inf}, [(4, {"loss": torch.tensor(math.inf)})])
    optimizer.backward(module(torch.ones(2)).sum())  # whose own gradient is finite
    with pytest.raises(NonFinite, match=r"step 0: loss is not finite in batch row\(s\) 4;"):
        optimizer.step()
    assert_untouched(module, before)
