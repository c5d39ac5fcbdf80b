"""Numbers that are injected where they go wrong: no step is taken with them, in any algorithm."""

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
    lengths,
    real_copy,
    small_policy,
    small_reward_model,
    weights,
)

from rlhf_min import dpo, grpo, kto, ppo, reward, rloo, sft
from rlhf_min.config import GRPOConfig, RLOOConfig, TrainingConfig
from rlhf_min.data import PreferenceExample, SFTExample, UnpairedExample
from rlhf_min.errors import BadInput, Diverged, NonFinite
from rlhf_min.harness.run.faults import first_nonfinite
from rlhf_min.harness.stages import dpo as dpo_stage
from rlhf_min.harness.stages import kto as kto_stage
from rlhf_min.harness.stages import reward as reward_stage
from rlhf_min.harness.stages import rollouts
from rlhf_min.harness.stages import sft as sft_stage
from rlhf_min.optim import MAX_OVERFLOWS, adamw
from rlhf_min.rollout import collect
from rlhf_min.sampling import sample
from rlhf_min.speed.cache import ROWS_AT_ONCE

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
UNPAIRED = [UnpairedExample(x.prompt_ids, x.chosen_ids, True) for x in PREFERENCES]
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


def kto_run(**options):
    policy, ref_policy = small_policy(dtype=torch.float32), small_policy(dtype=torch.float32)
    config = kto.KTOConfig(**SAME | options)
    state = kto.new_state(policy, ref_policy, UNPAIRED, config)
    steps = kto.train(policy, ref_policy, config, state)
    return policy, policy.lm.transformer.wpe, state, steps


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


def distinct(_prompts, responses):
    """No two responses of a group score the same."""
    return [float(i * i) for i in range(len(responses))]


def grpo_run(algorithm=grpo, make=GRPOConfig, *, score=distinct, **options):
    policy = small_policy(dtype=torch.float32)
    config = make(
        **{
            **{"steps": STEPS, "batch_size": 4, "group_size": 2, "minibatch_size": 4, "epochs": 1},
            **{"max_new_tokens": 3, "schedule": "constant", "warmup_share": 0.0},
            **options,
        }
    )
    state = algorithm.new_state(policy, PROMPTS, config)
    ref_policy = small_policy(seed=1, dtype=torch.float32)
    return policy, None, state, algorithm.train(policy, ref_policy, score, config, state)


def rloo_run(**options):
    return grpo_run(rloo, RLOOConfig, **options)


ONLINE = [ppo_run, grpo_run, rloo_run]
RUNS = pytest.mark.parametrize("run", [sft_run, reward_run, dpo_run, kto_run, *ONLINE])
# What the loss of each row is made of, as the harness looks for rows at fault.
ALONE = {
    sft_run: sft_stage.alone,
    reward_run: lambda model, pairs: reward_stage.alone(model, reward.RewardConfig(), pairs),
    dpo_run: lambda policy, pairs: dpo_stage.alone(
        policy, small_policy(dtype=torch.float32), dpo.DPOConfig(), pairs
    ),
    kto_run: lambda policy, rows: kto_stage.alone(
        policy, small_policy(dtype=torch.float32), kto.KTOConfig(), rows
    ),
}
SUPERVISED = pytest.mark.parametrize("run", [sft_run, reward_run, dpo_run, kto_run])


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
    tensor = {dpo_run: "chosen_logprobs", kto_run: "desirable_logprobs"}.get(run, "loss")
    next(steps)
    with torch.no_grad():
        positions.weight[POSITION + (3 if run is reward_run else 0)] = math.nan  # [CLS] and [SEP]s
    before = weights(module)
    with pytest.raises(NonFinite, match="optimizer step 1: loss is not finite;") as caught:
        next(steps)
    error = caught.value
    assert (error.step, error.tensor, error.rows, state.step) == (1, "loss", [], 1)
    rows = [i for i, x in enumerate(error.batch) if length(x) > POSITION]
    assert first_nonfinite(ALONE[run](module, error.batch)) == (tensor, rows)
    assert len(rows) == 1
    assert_untouched(module, before)
    assert state.optimizer.skipped == 0


@pytest.mark.parametrize("run", ONLINE)
def test_a_policy_that_is_nan_stops_while_it_samples(run):
    policy, _, state, steps = run()
    next(steps)
    with torch.no_grad():
        policy.lm.transformer.ln_f.bias[0] = math.nan
    before = weights(policy)
    with pytest.raises(Diverged, match="gives NaN while sampling, first for row 0;"):
        next(steps)
    assert state.step == state.optimizer.steps == 1
    assert_untouched(policy, before)


def test_sampling_names_the_row_of_the_whole_batch():
    policy = small_policy()
    with torch.no_grad():
        policy.lm.transformer.wpe.weight[POSITION] = math.nan
    prompts = [ids(RED)] * (ROWS_AT_ONCE + 2)
    prompts[ROWS_AT_ONCE + 1] = ids(*LONG, BIG)
    rng = torch.Generator().manual_seed(0)
    with pytest.raises(Diverged, match=f"NaN while sampling, first for row {ROWS_AT_ONCE + 1};"):
        sample(policy, prompts, max_new_tokens=2, temperature=1.0, rng=rng)


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
    buffer = caught.value.batch
    assert first_nonfinite(rollouts.alone(policy, config, buffer)) == (tensor, [0, 1, 2])
    assert caught.value.step == taken == state.optimizer.steps
    assert not getattr(buffer.rollout, tensor).isfinite().all()
    assert_untouched(policy, before)


def test_a_rollout_that_is_not_finite_in_one_row_moves_no_weight():
    """Without whitening only one minibatch of four would see it."""
    policy = small_policy(critic="shared", dtype=torch.float32)
    ref_policy = small_policy(seed=1, dtype=torch.float32)
    config = ppo.PPOConfig(
        steps=1, batch_size=8, minibatch_size=1, max_new_tokens=3, whiten_advantages=False
    )
    state = ppo.new_state(policy, PROMPTS, config)
    with torch.no_grad():
        ref_policy.lm.transformer.wpe.weight[POSITION] = math.nan
    before = weights(policy)
    with pytest.raises(NonFinite) as caught:
        next(ppo.train(policy, ref_policy, lengths, config, state))
    name, rows = first_nonfinite(rollouts.alone(policy, config, caught.value.batch))
    assert (name, state.optimizer.steps) == ("ref_logprobs", 0)
    assert 0 < len(rows) < 8
    assert_untouched(policy, before)


@pytest.mark.parametrize(
    ("run", "options"),
    [(grpo_run, {}), (grpo_run, {"kl_in": "reward"}), (rloo_run, {})],
    ids=["KL in the loss", "KL in the reward", "rloo"],
)
def test_a_reference_that_is_nan_in_one_row_of_a_group_moves_no_weight(run, options):
    sizes = {"batch_size": 8, "minibatch_size": 1, "steps": 9}
    policy, _, state, steps = run(**sizes, **options)
    ref_policy = steps.gi_frame.f_locals["ref_policy"]
    with torch.no_grad():
        ref_policy.lm.transformer.wpe.weight[POSITION] = math.nan
    kept = [weights(policy)]
    with pytest.raises(NonFinite) as caught:
        exhaust(steps, policy, kept)
    name, rows = first_nonfinite(rollouts.alone(policy, GRPOConfig(), caught.value.batch))
    assert name == "ref_logprobs"
    assert 0 < len(rows) < 8
    assert state.optimizer.steps == 8 * state.step  # 0 times NaN is NaN, so the returns show it
    assert_untouched(policy, kept[-1])


def overflow_in_row_1(_prompts, responses):
    return [1.0, 1e39, 2.0, 0.0][: len(responses)]  # finite, but not in the policy's float32


@pytest.mark.parametrize("run", ONLINE)
def test_a_score_beyond_float32_is_named(run):
    policy, _, state, steps = run(score=overflow_in_row_1)
    before = weights(policy)
    with pytest.raises(BadInput, match=r"gave 1e\+39 for the prompt .* in row 1 "):
        next(steps)
    assert state.step == 0
    assert_untouched(policy, before)


@pytest.mark.parametrize(("where", "bad"), [("ratio", -200.0), ("logprobs", math.nan)])
def test_a_minibatch_names_the_rows_of_the_rollout(where, bad):
    policy = small_policy(critic="shared", dtype=torch.float32)
    config = ppo.PPOConfig(batch_size=8, minibatch_size=4, max_new_tokens=3)
    rollout = collect(
        *(policy, policy.reference(), lengths, PROMPTS),
        ppo.PPOConfig(max_new_tokens=3, max_tokens=1000),
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
        before, expected = weights(policy), list(range(8))
    optimizer = ppo.new_state(policy, PROMPTS, config).optimizer
    with pytest.raises(NonFinite) as caught:
        ppo.minibatch_step(policy, optimizer, buffer, [1, 6, 3, 4], config)
    assert caught.value.batch is buffer
    assert first_nonfinite(rollouts.alone(policy, config, buffer)) == (where, expected)
    assert_untouched(policy, before)


def test_a_ratio_of_a_response_overflows_where_no_token_does():
    policy = small_policy(dtype=torch.float32)
    sizes = {"batch_size": 8, "minibatch_size": 4, "group_size": 2, "max_new_tokens": 3}
    config = RLOOConfig(**sizes, max_tokens=1000)
    rng = torch.Generator().manual_seed(0)
    state = rloo.new_state(policy, PROMPTS, config)
    rollout = collect(policy, policy.reference(), lengths, PROMPTS, config, rng=rng)
    row = int(rollout.lengths.argmax())
    rollout.logprobs[row, : rollout.lengths[row]] -= 60.0  # exp(60) is in float32, exp(180) not
    buffer = rloo.judge(rollout, config)
    before = weights(policy)
    with pytest.raises(NonFinite, match="is not finite"):
        rloo.minibatch_step(policy, state.optimizer, buffer, [row, (row + 1) % 8], config)
    assert first_nonfinite(rollouts.alone(policy, config, buffer)) == ("ratio", [row])
    assert_untouched(policy, before)


# In one row of the data


def test_a_margin_of_nan():
    pairs = [PAIRS[0], PAIRS[1] | {"margin": math.nan}, PAIRS[2]]
    module, _, state, steps = reward_run(pairs=pairs)
    before = weights(module)
    with pytest.raises(NonFinite) as caught:
        next(steps)
    _, (row,) = first_nonfinite(ALONE[reward_run](module, caught.value.batch))
    assert math.isnan(caught.value.batch[row].margin)
    assert_untouched(module, before)
    assert state.optimizer.steps == 0


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
    found = reward_stage.alone(module, reward.RewardConfig(center_coef=0.0), caught.value.batch)
    name, (row,) = first_nonfinite(found)
    assert (name, caught.value.batch[row].chosen) == ("margin", "small")
    assert_untouched(module, before)


def test_a_reference_of_nan_in_one_pair():
    module, _, state, steps = dpo_run(batch_size=1, epochs=1)
    state.cursor.examples[1] = replace(
        state.cursor.examples[1], ref_logprobs=(math.nan, state.cursor.examples[1].ref_logprobs[1])
    )
    kept = []
    with pytest.raises(NonFinite) as caught:
        exhaust(steps, module, kept)
    found = first_nonfinite(ALONE[dpo_run](module, caught.value.batch))
    assert found == ("chosen_logprobs_change", [0])
    assert caught.value.batch == [state.cursor.examples[1]]
    assert_untouched(module, kept[-1])


def test_a_row_that_is_at_fault_as_a_mismatched_pair_only():
    # Prompt and response of the long row fit before the position; those of two rows do not.
    module, positions, state, steps = kto_run()
    state.cursor.examples = [
        UnpairedExample(ids(RED), ids(ONE, TWO, BIG, END), True),
        UnpairedExample(ids(RED, BALL, BIG, ONE), ids(END), False),
    ]
    with torch.no_grad():
        positions.weight[POSITION] = math.nan
    with pytest.raises(NonFinite) as caught:
        next(steps)
    batch = caught.value.batch
    name, (row,) = first_nonfinite(ALONE[kto_run](module, batch))
    assert (name, len(batch[row].prompt_ids)) == ("mismatched_logprobs", 4)


# In the gradient, and in the weights


@RUNS
def test_a_gradient_names_its_parameter(run):
    module, _, state, steps = run()
    next(steps)
    if run is reward_run:
        name = "model.bert.encoder.layer.0.intermediate.dense.weight"
    else:
        name = "lm.transformer.h.0.mlp.c_fc.weight"
    dict(module.named_parameters())[name].register_hook(lambda g: g / 0)
    before, adam = weights(module), adam_of(state)
    with pytest.raises(NonFinite) as caught:
        next(steps)
    assert (caught.value.tensor, caught.value.rows) == (f"gradient of {name}", [])
    assert all(p.grad is None for p in module.parameters())
    assert_untouched(module, before)
    assert_same_adam(state, adam)


@RUNS
def test_a_learning_rate_that_explodes(run):
    module, _, state, steps = run(learning_rate=1e30, max_grad_norm=None)
    kept = []
    with pytest.raises((NonFinite, Diverged)):  # PPO sees it when it samples
        exhaust(steps, module, kept)
    assert state.optimizer.steps == len(kept) >= 1
    assert_untouched(module, kept[-1])
    assert all(torch.isfinite(weight).all() for weight in kept[-1].values())


@pytest.mark.parametrize("run", ONLINE)
def test_a_reward_that_gives_nan_is_bad_input(run):
    def score(_prompts, responses):
        calls.append(len(responses))
        found = [0.0, 0.0, math.nan, 0.0] if len(calls) == 2 else [0.0, 1.0, 2.0, 0.0]
        return found[: len(responses)]

    calls: list[int] = []
    policy, _, _, steps = run(score=score)
    next(steps)
    before = weights(policy)
    with pytest.raises(BadInput, match=r"reward score gave nan for the prompt '.*' in row 2 "):
        next(steps)
    assert_untouched(policy, before)


def overflowing(steps):
    """A module, its optimizer under fp16, and so many steps whose gradient overflows."""
    module = torch.nn.Linear(2, 1)
    config = TrainingConfig(learning_rate=0.1, schedule="constant", precision="fp16")
    optimizer = adamw(module, config, 9)
    for _ in range(steps):
        overflow(module, optimizer)
    return module, optimizer


def overflow(module, optimizer):
    handle = module.weight.register_hook(lambda g: g * math.inf)
    optimizer.backward(module(torch.ones(2)).sum())
    handle.remove()
    optimizer.step()


def test_under_fp16_so_many_overflows_in_a_row_are_no_accident():
    module, optimizer = overflowing(MAX_OVERFLOWS)
    before = weights(module)
    with pytest.raises(NonFinite, match="gradient of weight"):
        overflow(module, optimizer)
    assert optimizer.skipped == optimizer.steps == MAX_OVERFLOWS
    assert_untouched(module, before)
    optimizer.backward(module(torch.ones(2)).sum())  # whoever has caught it may go on
    optimizer.step()
    assert largest_difference(module, before) > 0


def test_a_good_step_between_starts_the_count_again():
    module, optimizer = overflowing(MAX_OVERFLOWS)
    optimizer.backward(module(torch.ones(2)).sum())
    optimizer.step()
    assert optimizer.skipped_in_a_row == 0
    for _ in range(MAX_OVERFLOWS):
        overflow(module, optimizer)
    assert optimizer.skipped == 2 * MAX_OVERFLOWS
    with pytest.raises(NonFinite):
        overflow(module, optimizer)


def test_under_fp16_only_the_gradient_may_overflow():
    module, optimizer = overflowing(0)
    before = weights(module)
    optimizer.backward(module(torch.ones(2)).sum())  # whose own gradient is finite
    with pytest.raises(NonFinite, match="step 0: loss is not finite;"):
        optimizer.step(metrics={"accuracy": 1.0, "loss": math.inf})
    assert_untouched(module, before)
