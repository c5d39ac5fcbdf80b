"""One step of every stage in bfloat16 by autocast, on the CPU: near float32, with weights, value
head and losses in float32; a float64 model stays float64; and the equations in half precision."""

import pytest
import torch
from small import (
    DEMONSTRATIONS,
    PREFERENCES,
    PROMPTS,
    TEXT_PAIRS,
    UNPAIRED,
    lengths,
    small_policy,
    small_reward_model,
    weights,
)
from strategies import assert_close, outputs_and_gradients
from tolerances import FP32

from rlhf_min import dpo, grpo, kto, online, ppo, reward, rloo, sft
from rlhf_min.advantages import gae, grpo_advantages, rloo_advantages
from rlhf_min.config import GRPOConfig, PPOConfig, RLOOConfig
from rlhf_min.harness.cli import RunOptions
from rlhf_min.harness.models import start_policy, start_reward_model
from rlhf_min.kl import kl_estimate, shape_rewards
from rlhf_min.losses import (
    grpo_loss,
    pairwise_reward_loss,
    ppo_policy_loss,
    ppo_value_loss,
    rloo_loss,
    sft_loss,
)
from rlhf_min.masking import masked_mean, masked_scale, masked_var, masked_whiten
from rlhf_min.preference_losses import dpo_loss, kto_kl, kto_loss
from rlhf_min.rollout import collect

BF16 = 2.0**-8  # half a unit in the last place of a bfloat16 number near 1


def sft_steps(dtype, precision):
    policy = small_policy(dtype=dtype)
    config = sft.SFTConfig(epochs=1, precision=precision)
    state = sft.new_state(policy, DEMONSTRATIONS, config)
    return policy, sft.train(policy, config, state)


def reward_steps(dtype, precision):
    model = small_reward_model(dtype=dtype)
    config = reward.RewardConfig(epochs=1, precision=precision)
    examples, _ = reward.prepare_pairs(model, TEXT_PAIRS)
    return model, reward.train(model, config, reward.new_state(model, examples, config))


def ppo_steps(dtype, precision, **watched):
    policy = small_policy(critic="shared", dtype=dtype)
    config = ppo.PPOConfig(
        steps=1, batch_size=4, minibatch_size=4, epochs=1, max_new_tokens=5, precision=precision
    )
    state = ppo.new_state(policy, PROMPTS, config)
    return policy, ppo.train(policy, policy.reference(), lengths, config, state, **watched)


GROUPS = {"steps": 1, "batch_size": 4, "group_size": 2, "minibatch_size": 4, "epochs": 1}


def grpo_steps(dtype, precision, algorithm=grpo, make=GRPOConfig):
    policy = small_policy(dtype=dtype)
    config = make(**GROUPS, max_new_tokens=5, precision=precision, warmup_share=0.0)
    state = algorithm.new_state(policy, PROMPTS, config)
    return policy, algorithm.train(policy, policy.reference(), lengths, config, state)


def rloo_steps(dtype, precision):
    return grpo_steps(dtype, precision, rloo, RLOOConfig)


def dpo_steps(dtype, precision):
    policy = small_policy(dtype=dtype)
    config = dpo.DPOConfig(precision=precision)
    reference = policy.reference()
    state = dpo.new_state(policy, reference, PREFERENCES, config)
    return policy, dpo.train(policy, reference, config, state)


def kto_steps(dtype, precision):
    policy = small_policy(dtype=dtype)
    config = kto.KTOConfig(precision=precision)
    reference = policy.reference()
    state = kto.new_state(policy, reference, UNPAIRED, config)
    return policy, kto.train(policy, reference, config, state)


STAGES = pytest.mark.parametrize(
    "steps", [sft_steps, reward_steps, ppo_steps, grpo_steps, rloo_steps, dpo_steps, kto_steps]
)


def losses(steps, dtype, precision):
    """The dtypes that the losses are computed in, seen where they are handed to backward."""
    seen = []
    model, train = steps(dtype, precision)
    before = weights(model)
    original = torch.Tensor.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", lambda x: seen.append(x.dtype) or original(x))
        [metrics] = train
    moved = max(
        float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()
    )
    assert moved > 0
    return model, metrics, set(seen)


@STAGES
def test_bfloat16_is_near_float32_and_leaves_weights_and_losses_in_it(steps):
    model, plain, _ = losses(steps, torch.float32, "fp32")
    model, metrics, seen = losses(steps, torch.float32, "bf16")
    assert seen == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(torch.isfinite(torch.tensor(x)) for x in metrics.values())
    if steps in (ppo_steps, grpo_steps, rloo_steps):
        # Other tokens may be drawn, so only what holds for any of them: at the first pass the
        # policy is the one that sampled, and the reference.
        assert metrics["ratio"] == pytest.approx(1, abs=BF16)
        assert metrics["kl"] == 0
        return
    loss = metrics["loss"]
    assert loss == pytest.approx(plain["loss"], rel=4 * BF16)
    if steps in (dpo_steps, kto_steps):  # policy and reference are equal in any precision
        assert loss == plain["loss"]
    else:
        assert loss != plain["loss"]  # it really was another precision
    assert metrics["grad_norm"] != plain["grad_norm"]
    assert metrics["grad_norm"] == pytest.approx(plain["grad_norm"], rel=20 * BF16)


def looked_at(stage):
    """A run in bfloat16, what its last look said, and the same look once more."""
    if stage == "sft":
        policy = small_policy(dtype=torch.float32)
        config = sft.SFTConfig(epochs=1, precision="bf16")
        state = sft.new_state(policy, DEMONSTRATIONS, config)
        steps = sft.train(policy, config, state, heldout=DEMONSTRATIONS)
        return steps, state, lambda: sft.evaluate(policy, DEMONSTRATIONS, sft.SFTConfig())
    if stage == "reward":
        model = small_reward_model(dtype=torch.float32)
        config = reward.RewardConfig(epochs=1, precision="bf16")
        pairs, _ = reward.prepare_pairs(model, TEXT_PAIRS)
        state = reward.new_state(model, pairs, config)
        steps = reward.train(model, config, state, heldout=pairs)
        return steps, state, lambda: reward.evaluate(model, pairs, config)
    if stage == "dpo":
        policy, ref_policy = (small_policy(seed=i, dtype=torch.float32) for i in (0, 1))
        config = dpo.DPOConfig(precision="bf16", cache_reference=False)
        state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
        steps = dpo.train(policy, ref_policy, config, state, heldout=PREFERENCES)
        return steps, state, lambda: dpo.evaluate(policy, ref_policy, PREFERENCES, config)
    if stage == "kto":
        policy, ref_policy = (small_policy(seed=i, dtype=torch.float32) for i in (0, 13))
        config = kto.KTOConfig(precision="bf16", cache_reference=False)
        state = kto.new_state(policy, ref_policy, UNPAIRED, config)
        steps = kto.train(policy, ref_policy, config, state, heldout=UNPAIRED)
        return steps, state, lambda: kto.evaluate(policy, ref_policy, UNPAIRED, config)
    algorithm, make = {
        "ppo": (ppo, PPOConfig),
        "grpo": (grpo, GRPOConfig),
        "rloo": (rloo, RLOOConfig),
    }[stage]
    critic = "shared" if stage == "ppo" else "none"
    policy = small_policy(critic=critic, dtype=torch.float32)
    ref_policy = small_policy(seed=1, dtype=torch.float32)
    sizes = {"steps": 1, "batch_size": 8, "minibatch_size": 8, "max_new_tokens": 5}
    config = make(**sizes, precision="bf16")
    state = algorithm.new_state(policy, PROMPTS, config)
    steps = algorithm.train(policy, ref_policy, lengths, config, state, eval_prompts=PROMPTS)
    return steps, state, lambda: online.evaluate(policy, ref_policy, lengths, PROMPTS, config)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "ppo", "grpo", "rloo"])
def test_a_look_has_the_precision_of_the_run(stage):
    steps, state, look = looked_at(stage)
    (metrics,) = steps
    with state.optimizer.autocast():
        expected = look()
    assert {k: v for k, v in metrics.items() if k.startswith("eval/")} == expected
    assert look() != expected


def test_a_rollout_has_the_precision_of_the_run():
    buffers = []
    _, train = ppo_steps(torch.float32, "bf16", on_rollout=buffers.append)
    sampler = small_policy(critic="shared", dtype=torch.float32)  # the policy before the step
    state = train.gi_frame.f_locals["state"]
    for _ in train:
        pass
    rollout = buffers[-1].rollout
    with torch.no_grad(), state.optimizer.autocast():
        half = sampler(rollout.sequences).logprobs
    with torch.no_grad():
        full = sampler(rollout.sequences).logprobs
    assert float((rollout.logprobs - half).abs().max()) < 1e-5 < float((half - full).abs().max())


@pytest.mark.parametrize("steps", [ppo_steps, grpo_steps, rloo_steps])
def test_an_update_has_the_precision_of_its_rollout(steps):
    """At the first pass nothing has moved, so the same pass gives the same probabilities."""
    (metrics,) = steps(torch.float32, "bf16")[1]
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)


def test_a_cached_reference_of_held_out_pairs_has_the_precision_of_the_run():
    policy = small_policy(dtype=torch.float32)
    config = dpo.DPOConfig(precision="bf16", learning_rate=1e-30)  # the policy stays what it is
    reference = policy.reference()
    state = dpo.new_state(policy, reference, PREFERENCES, config)
    (metrics,) = dpo.train(policy, reference, config, state, heldout=PREFERENCES)
    for name in ("chosen_logprobs_change", "rejected_logprobs_change", "margin"):
        assert metrics[name] == pytest.approx(0, abs=1e-6)
        assert metrics[f"eval/{name}"] == pytest.approx(0, abs=1e-6)


def test_the_kl_of_a_step_has_the_precision_of_the_run():
    policy, ref_policy = (small_policy(seed=i, dtype=torch.float32) for i in (0, 13))
    config = kto.KTOConfig(precision="bf16")
    optimizer = kto.new_state(policy, ref_policy, UNPAIRED, config).optimizer
    found = kto.means(policy, ref_policy, UNPAIRED, config, optimizer)["kl"]
    with optimizer.autocast():
        assert found == kto.means(policy, ref_policy, UNPAIRED, config)["kl"]
    assert found != kto.means(policy, ref_policy, UNPAIRED, config)["kl"]


@STAGES
def test_float64_stays_float64(steps):
    model, _, seen = losses(steps, torch.float64, "fp32")
    assert seen == {torch.float64}
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_values_are_the_float32_head_on_the_hidden_state(critic):
    policy = small_policy(critic=critic, dtype=torch.float32)
    assert policy.value_head.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollout = collect(
            policy,
            policy.reference(),
            lengths,
            PROMPTS[:2],
            PPOConfig(max_new_tokens=4, max_tokens=100),
            rng=torch.Generator().manual_seed(0),
        )
    for x in (rollout.logprobs, rollout.values, rollout.entropy, rollout.scores):
        assert x.dtype == torch.float32
    seen = rollout.values[rollout.mask]
    assert not torch.equal(seen, seen.bfloat16().float())  # not rounded to bfloat16


@pytest.mark.parametrize("critic", ["none", "shared"])
def test_the_command_line_starts_in_float32_and_checkpoints_if_asked(critic):
    for asked in (False, True):
        options = RunOptions(max_length=16, max_response_tokens=8, gradient_checkpointing=asked)
        policy = start_policy(options, ["red ball"], critic=critic, seed=0)
        reward_model = start_reward_model(options, ["red ball"], seed=0)
        for model in (policy.lm, reward_model.model):
            layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
            assert {m.gradient_checkpointing for m in layers} == {asked}
            assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_reference_on_the_cpu_runs_in_the_policys_precision(device_type):
    policy = small_policy(dtype=torch.float32)
    optimizer = sft.new_state(policy, DEMONSTRATIONS, sft.SFTConfig(precision="bf16")).optimizer
    optimizer.device_type = device_type  # of the policy; what is on the CPU is beside it
    layer = torch.nn.Linear(2, 2)
    assert layer(torch.ones(2)).dtype == torch.float32
    with optimizer.autocast():
        assert layer(torch.ones(2)).dtype == torch.bfloat16
    assert layer(torch.ones(2)).dtype == torch.float32


# The equations

MASK = torch.tensor([[True] * 64, [True] * 41 + [False] * 23])

# Each takes three tensors (2, 64) of any dtype.
COMPUTED = {
    "masked_mean": lambda a, *_: masked_mean(a, MASK),
    "masked_var": lambda a, *_: masked_var(a, MASK),
    "masked_whiten": lambda a, *_: masked_whiten(a, MASK),
    "masked_scale": lambda a, *_: masked_scale(a, MASK),
    "k1": lambda a, b, _: kl_estimate(a, b, kind="k1"),
    "k3": lambda a, b, _: kl_estimate(a, b, kind="k3"),
    "shape_rewards": lambda a, _, c: shape_rewards(c[:, 0], a, MASK, kl_coef=0.1),
    "gae": lambda a, b, _: gae(a, b, MASK, gamma=0.99, lam=0.95),
    "sft_loss": lambda a, *_: sft_loss(a, MASK),
    "reward": lambda a, b, c: pairwise_reward_loss(a[0], b[0], margin=c[0], center_coef=0.1),
    "policy": lambda a, b, c: ppo_policy_loss(a, b, c, MASK, clip=0.2),
    "grpo": lambda a, b, c: grpo_loss(
        *(a, b, c, c[:, 0], MASK),
        **{"clip": 0.2, "clip_high": 0.3, "kl_coef": 0.1, "ratio_level": "token"},
        loss_mean="token",
        max_new_tokens=64,
    ),
    "gspo": lambda a, b, c: grpo_loss(
        *(a, b, c, c[:, 0], MASK),
        **{"clip": 0.2, "clip_high": 0.3, "kl_coef": 0.0, "ratio_level": "sequence"},
        loss_mean="sequence",
        max_new_tokens=64,
    ),
    "rloo": lambda a, b, c: rloo_loss(*(a / 64, b / 64, c[:, 0], MASK), clip=0.2, clip_high=0.3),
    "rloo_advantages": lambda a, *_: rloo_advantages(a[0], group_size=4),
    "grpo_advantages": lambda a, *_: grpo_advantages(a[0], group_size=4, scale="group"),
    "value": lambda a, b, c: ppo_value_loss(a, b, c, MASK, clip=0.2),
    "dpo": lambda a, b, c: dpo_loss(a[0], b[0], c[0], c[1], beta=0.3, label_smoothing=0.1),
    "kto": lambda a, b, c: kto_loss(
        a[0],
        b[0],
        MASK[1],
        kto_kl(c[0].abs(), c[1]),
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
    ),
}


@pytest.mark.parametrize("function", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_how_the_inputs_are_stored(function, half):
    rng = torch.Generator().manual_seed(0)
    stored = [torch.randn(2, 64, generator=rng).to(half) for _ in range(3)]
    outputs, gradients = outputs_and_gradients(function, *stored)
    expected, expected_gradients = outputs_and_gradients(function, *(x.double() for x in stored))
    for found, exact in zip(outputs, expected, strict=True):
        if found.is_floating_point():
            assert found.dtype == torch.float32
            assert_close(found, exact.float(), FP32)
    for found, exact in zip(gradients, expected_gradients, strict=True):
        assert found.dtype == half
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(half).eps, atol=FP32)
