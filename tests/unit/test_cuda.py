"""What only a GPU can show: half precision, models on different devices, and the peak of memory."""

import pytest
import torch
from small import (
    DEMONSTRATIONS,
    PREFERENCES,
    PROMPTS,
    TEXT_PAIRS,
    UNPAIRED,
    small_policy,
    small_reward_model,
    weights,
    without_time,
)

from rlhf_min import dpo, grpo, kto, ppo, reward, rloo, sft
from rlhf_min.config import GRPOConfig, RLOOConfig
from rlhf_min.logprobs import lm_head_logprobs, token_logprobs
from rlhf_min.sampling import sample

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
# Where reference and reward model are, beside a policy on the first GPU.
OTHERS = pytest.mark.parametrize(
    "others_on",
    [
        "cuda:0",
        "cpu",
        pytest.param(
            "cuda:1",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here"),
        ),
    ],
)


def sft_steps(policy_on, _others_on, precision):
    policy = small_policy(dtype=torch.float32).to(policy_on)
    config = sft.SFTConfig(epochs=2, batch_size=4, precision=precision)
    state = sft.new_state(policy, DEMONSTRATIONS, config)
    return policy, sft.train(policy, config, state, heldout=DEMONSTRATIONS)


def reward_steps(_policy_on, others_on, precision):
    model = small_reward_model(dtype=torch.float32).to(others_on)
    config = reward.RewardConfig(epochs=2, batch_size=2, precision=precision)
    examples, _ = reward.prepare_pairs(model, TEXT_PAIRS)
    return model, reward.train(model, config, reward.new_state(model, examples, config))


def ppo_steps(policy_on, others_on, precision):
    policy = small_policy(critic="shared", dtype=torch.float32).to(policy_on)
    reference = policy.reference(torch.device(others_on))
    reward_model = small_reward_model(dtype=torch.float32).to(others_on)
    config = ppo.PPOConfig(
        steps=2, batch_size=4, minibatch_size=4, max_new_tokens=5, precision=precision
    )
    state = ppo.new_state(policy, PROMPTS, config)
    return policy, ppo.train(policy, reference, reward_model.score, config, state)


def grpo_steps(policy_on, others_on, precision):
    return group_steps(grpo, GRPOConfig, policy_on, others_on, precision)


def rloo_steps(policy_on, others_on, precision):
    return group_steps(rloo, RLOOConfig, policy_on, others_on, precision)


def group_steps(algorithm, make, policy_on, others_on, precision):
    policy = small_policy(dtype=torch.float32).to(policy_on)
    reference = policy.reference(torch.device(others_on))
    reward_model = small_reward_model(dtype=torch.float32).to(others_on)
    sizes = {"steps": 2, "batch_size": 4, "minibatch_size": 4, "group_size": 2}
    config = make(**sizes, max_new_tokens=5, precision=precision)
    state = algorithm.new_state(policy, PROMPTS, config)
    return policy, algorithm.train(policy, reference, reward_model.score, config, state)


def dpo_steps(policy_on, others_on, precision):
    policy = small_policy(dtype=torch.float32).to(policy_on)
    reference = policy.reference(torch.device(others_on))
    config = dpo.DPOConfig(batch_size=4, cache_reference=False, precision=precision)
    state = dpo.new_state(policy, reference, PREFERENCES, config)
    return policy, dpo.train(policy, reference, config, state)


def kto_steps(policy_on, others_on, precision):
    policy = small_policy(dtype=torch.float32).to(policy_on)
    reference = policy.reference(torch.device(others_on))
    config = kto.KTOConfig(batch_size=4, cache_reference=False, precision=precision)
    state = kto.new_state(policy, reference, UNPAIRED, config)
    return policy, kto.train(policy, reference, config, state)


STAGES = pytest.mark.parametrize(
    "steps", [sft_steps, reward_steps, ppo_steps, grpo_steps, rloo_steps, dpo_steps, kto_steps]
)


@STAGES
@PRECISIONS
@OTHERS
def test_a_stage_runs_and_keeps_its_weights_in_float32(steps, precision, others_on):
    model, train = steps("cuda:0", others_on, precision)
    before = weights(model)
    for metrics in train:
        assert all(torch.isfinite(torch.tensor(x)) for x in metrics.values())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("steps", [sft_steps, reward_steps, dpo_steps, kto_steps])
def test_a_gpu_gives_the_numbers_of_the_cpu(steps):
    _, there = steps("cuda:0", "cuda:0", "fp32")
    _, here = steps("cpu", "cpu", "fp32")
    for found, expected in zip(there, here, strict=True):
        for name, value in without_time(expected).items():
            assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_a_gpu_draws_the_tokens_of_the_cpu():
    rows = []
    for place in ("cuda:0", "cpu"):
        policy = small_policy(dtype=torch.float64).to(place)
        prompt_ids = [prompt.ids for prompt in PROMPTS]
        rng = torch.Generator().manual_seed(0)
        rows.append(sample(policy, prompt_ids, max_new_tokens=6, temperature=1.0, rng=rng))
    assert [row.tolist() for row in rows[0]] == [row.tolist() for row in rows[1]]


def test_an_overflow_in_fp16_is_skipped_and_scaled_less():
    policy = small_policy(dtype=torch.float32).to("cuda:0")
    config = sft.SFTConfig(epochs=2, batch_size=4, precision="fp16")
    state = sft.new_state(policy, DEMONSTRATIONS, config)
    state.optimizer.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**126)
    before = weights(policy)
    next(iter(sft.train(policy, config, state)))
    assert state.optimizer.scaler.get_scale() < 2.0**126
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


def peak(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - start


def test_the_chunked_head_never_holds_all_logits():
    tokens_at_once, vocabulary, width = 4096, 50257, 64
    hidden = torch.randn(tokens_at_once, width, device="cuda", requires_grad=True)
    weight = torch.randn(vocabulary, width, device="cuda", requires_grad=True)
    tokens = torch.randint(vocabulary, (tokens_at_once,), device="cuda")
    logits_bytes = 4 * tokens_at_once * vocabulary

    def chunked():
        logprobs, _ = lm_head_logprobs(
            hidden,
            weight,
            tokens,
            bias=None,
            softcap=None,
            scale=1.0,
            temperature=1.0,
            chunk_tokens=256,
        )
        logprobs.sum().backward()

    def plain():
        token_logprobs(hidden @ weight.T, tokens).sum().backward()

    assert peak(chunked) < logits_bytes < peak(plain)


def test_gradient_checkpointing_lowers_the_peak():
    def step(checkpointed):
        policy = small_policy(dtype=torch.float32)
        policy = type(policy)(deeper(policy.lm), policy.tokenizer).to("cuda:0")
        if checkpointed:
            policy.checkpoint_gradients()
        config = sft.SFTConfig(epochs=1, batch_size=512, max_tokens=10**6)
        examples = DEMONSTRATIONS * 64
        state = sft.new_state(policy, examples, config)
        train = sft.train(policy, config, state)
        return peak(lambda: next(train))

    assert step(True) < 0.7 * step(False)


def deeper(lm):
    """A new model of the same kind with twelve layers."""
    lm.config.n_layer = 12
    return type(lm)(lm.config)
