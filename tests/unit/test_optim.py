import itertools
import math
from dataclasses import replace

import pytest
import torch
from small import (
    DEMONSTRATIONS,
    PREFERENCES,
    PROMPTS,
    decayed,
    largest_difference,
    real_copy,
    small_policy,
    small_reward_model,
    weights,
)
from tolerances import EXACT, FP32, FP64
from torch import nn

from rlhf_min import dpo, ppo, reward, sft
from rlhf_min.config import TrainingConfig
from rlhf_min.data import collate
from rlhf_min.errors import NonFinite
from rlhf_min.optim import MAX_OVERFLOWS, Optimizer, adamw, dropout_rng

CONFIG = TrainingConfig(
    learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup_share=0.0, max_grad_norm=None
)


class Toy(nn.Module):
    """A matrix, a bias and a frozen scalar whose gradients can be chosen."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=dtype))
        self.bias = nn.Parameter(torch.tensor([3.0, -1.0], dtype=dtype))
        self.frozen = nn.Parameter(torch.tensor(7.0, dtype=dtype), requires_grad=False)

    def loss(self, matrix, bias):
        """Has these gradients, and is 0 itself."""
        like = self.matrix.new_tensor
        return Given.apply(self.matrix, like(matrix)) + Given.apply(self.bias, like(bias))


class Given(torch.autograd.Function):
    """Zero, with a gradient that is given."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.save_for_backward(gradient)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, scale):
        return scale * ctx.saved_tensors[0], None


def optimizer_of(module, eps=None, **changed):
    options = {} if eps is None else {"eps": eps}
    return adamw(module, replace(CONFIG, **changed), 10, **options)


def descent(module, **changed):
    """Plain gradient descent at rate 1: the step is the gradient."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return Optimizer(torch.optim.SGD(parameters, lr=1.0), **changed)


def learn(module, optimizer, *gradients):
    """A step with each of these gradients."""
    for each in gradients:
        optimizer.backward(module.loss(*each))
        optimizer.step()


GRADIENTS = [
    ([[0.3, -0.1], [2.0, 0.0]], [1.0, -0.5]),
    ([[-0.2, -0.4], [1.0, 0.7]], [0.0, 3.0]),
    ([[0.9, 0.1], [-5.0, 0.2]], [-2.0, 0.1]),
]


def adamw_by_hand(x, gradients, *, rate, decay, eps):
    """Algorithm 2 of Loshchilov and Hutter, for one number."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + eps)
        x = x - rate * decay * x - rate * step
    return x


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adamw_is_its_formula_and_only_matrices_decay(eps):
    toy = Toy()
    start = weights(toy)
    optimizer = optimizer_of(toy, eps=eps)
    learn(toy, optimizer, *GRADIENTS)
    for i in range(2):
        bias = adamw_by_hand(
            float(start["bias"][i]),
            [b[i] for _, b in GRADIENTS],
            rate=0.1,
            decay=0.0,
            eps=eps,
        )
        assert float(toy.bias[i].detach()) == pytest.approx(bias, abs=FP64)
        for j in range(2):
            matrix = adamw_by_hand(
                float(start["matrix"][i, j]),
                [m[i][j] for m, _ in GRADIENTS],
                rate=0.1,
                decay=0.5,
                eps=eps,
            )
            assert float(toy.matrix[i, j].detach()) == pytest.approx(matrix, abs=FP64)
    assert float(toy.frozen) == 7.0
    assert [p.dim() for p in optimizer.parameters] == [2, 1]  # what is frozen is not among them
    assert optimizer.steps == 3


RISE = [0.0, 0.25, 0.5, 0.75]  # four steps of warm-up


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [*RISE, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [*RISE, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        # half of 1 + cos of 0, 30, 60, 90, 120 and 150 degrees
        (
            "cosine",
            [*RISE, 1.0, 0.5 + math.sqrt(3) / 4, 0.75, 0.5, 0.25, 0.5 - math.sqrt(3) / 4],
        ),
    ],
)
def test_schedule(schedule, rates):
    toy = Toy()
    optimizer = optimizer_of(
        toy,
        schedule=schedule,
        warmup_share=0.4,
        learning_rate=1.0,
        weight_decay=0.0,
    )
    found = []
    for _ in range(10):
        found.append(optimizer.learning_rate)
        before = toy.bias.detach().clone()
        learn(toy, optimizer, ([[0.0, 0.0], [0.0, 0.0]], [1.0, -1.0]))
        # With a gradient that never changes, Adam moves by the rate.
        moved = (before - toy.bias.detach()).tolist()
        assert moved == pytest.approx([found[-1], -found[-1]], abs=1e-7)  # its eps is 1e-8
    assert found == pytest.approx(rates, abs=FP64)


@pytest.mark.parametrize(
    ("share", "steps"),
    [(0.0, 0), (0.24, 2), (0.25, 2), (0.26, 3), (0.35, 4), (1.0, 10)],  # 2.5 to 2, 3.5 to 4
)
def test_the_warm_up_is_the_nearest_number_of_steps(share, steps):
    toy = Toy()
    optimizer = optimizer_of(toy, schedule="linear", warmup_share=share)
    rates = []
    for _ in range(10):
        rates.append(optimizer.learning_rate)
        learn(toy, optimizer, GRADIENTS[0])
    rise = [0.1 * i / steps for i in range(steps)]
    fall = [0.1 * (10 - i) / (10 - steps) for i in range(steps, 10)]
    assert rates == pytest.approx([*rise, *fall], abs=FP64)


def test_a_long_gradient_is_scaled_down_as_a_whole():
    toy = Toy()
    start = weights(toy)
    optimizer = descent(toy, max_grad_norm=1.0)
    optimizer.backward(toy.loss([[3.0, 0.0], [0.0, 0.0]], [0.0, -4.0]))
    assert optimizer.step() == pytest.approx(5.0, abs=FP64)  # sqrt(3^2 + 4^2), before clipping
    scale = 1 / (5 + 1e-6)
    assert float(start["matrix"][0, 0] - toy.matrix.detach()[0, 0]) == pytest.approx(
        3 * scale, abs=FP64
    )
    assert float(start["bias"][1] - toy.bias.detach()[1]) == pytest.approx(-4 * scale, abs=FP64)


@pytest.mark.parametrize("limit", [None, 5.1])
def test_a_gradient_within_the_limit_is_left_alone(limit):
    toy = Toy()
    start = weights(toy)
    optimizer = descent(toy, max_grad_norm=limit)
    learn(toy, optimizer, ([[3.0, 0.0], [0.0, 0.0]], [0.0, -4.0]))
    assert float(start["matrix"][0, 0] - toy.matrix.detach()[0, 0]) == 3.0
    assert float(start["bias"][1] - toy.bias.detach()[1]) == -4.0


def test_gradients_of_micro_batches_add_up_and_are_cleared_by_the_step():
    toy = Toy()
    start = weights(toy)
    optimizer = descent(toy)
    for _ in range(2):
        optimizer.backward(toy.loss([[1.0, 0.0], [0.0, 0.0]], [0.0, 0.0]))
        learn(toy, optimizer, ([[0.5, 0.0], [0.0, 0.0]], [0.0, 0.0]))
    assert float(start["matrix"][0, 0] - toy.matrix.detach()[0, 0]) == 3.0


def test_a_sparse_gradient_is_stepped_like_a_dense_one():
    # Adam's first step is the rate times the gradient's sign, and leaves the other rows.
    embedding = nn.Embedding(3, 2, sparse=True, dtype=torch.float64)
    start = embedding.weight.detach().clone()
    optimizer = optimizer_of(embedding, schedule="constant", weight_decay=0.0)
    optimizer.backward(embedding(torch.tensor([1])).sum())
    rate = optimizer.learning_rate
    optimizer.step()
    moved = (start - embedding.weight.detach())[:, 0] / rate
    assert moved.tolist() == pytest.approx([0.0, 1.0, 0.0], abs=FP32)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_raises_before_the_step(bad):
    toy = Toy()
    optimizer = optimizer_of(toy, schedule="linear", max_grad_norm=1.0)
    learn(toy, optimizer, GRADIENTS[0])
    before, state, rate = weights(toy), real_copy(optimizer.state_dict()), optimizer.learning_rate
    optimizer.backward(toy.loss([[bad, 0.0], [0.0, 0.0]], [1.0, 1.0]))
    with pytest.raises(NonFinite) as caught:
        optimizer.step("the batch")
    assert (caught.value.step, caught.value.tensor) == (1, "gradient of matrix")
    assert caught.value.batch == "the batch"
    assert largest_difference(toy, before) == EXACT
    assert optimizer.learning_rate == rate
    # Nothing of the bad step is left: the next one is as if it had never been.
    learn(toy, optimizer, GRADIENTS[1])
    other = Toy()
    other.load_state_dict(toy.state_dict() | before)
    resumed = optimizer_of(other, schedule="linear", max_grad_norm=1.0)
    resumed.load_state_dict(state)
    learn(other, resumed, GRADIENTS[1])
    assert largest_difference(toy, other) == EXACT


def with_another_scheduler(module):
    adam = torch.optim.AdamW(module.parameters(), lr=0.1)
    return Optimizer(adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=10))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "another"])
def test_a_restored_optimizer_goes_on_with_the_same_bits(schedule):
    def made(module):
        if schedule == "another":
            return with_another_scheduler(module)
        return optimizer_of(module, schedule=schedule, warmup_share=0.2)

    toy, other = Toy(), Toy()
    optimizer, restored = made(toy), made(other)
    learn(toy, optimizer, *GRADIENTS)
    other.load_state_dict(real_copy(toy.state_dict()))
    restored.load_state_dict(real_copy(optimizer.state_dict()))
    assert restored.steps == 3
    for gradients in GRADIENTS:
        assert restored.learning_rate == optimizer.learning_rate
        assert (restored.learning_rate < 0.1) == (schedule != "constant")
        for module, stepped in ((toy, optimizer), (other, restored)):
            learn(module, stepped, gradients)
        assert largest_difference(toy, other) == EXACT


def test_a_restored_optimizer_has_the_rates_that_it_was_made_with():
    toy = Toy()
    saved = optimizer_of(toy, schedule="linear", warmup_share=0.2)
    learn(toy, saved, *GRADIENTS)
    other = optimizer_of(toy, schedule="linear", warmup_share=0.2, learning_rate=3e-5)
    other.load_state_dict(real_copy(saved.state_dict()))
    assert math.isclose(
        other.learning_rate / 3e-5, saved.learning_rate / saved.scheduler.base_lrs[0]
    )
    for group in other.optimizer.param_groups:
        assert group["initial_lr"] == 3e-5


def first_batch(policy):
    return collate(
        [x.prompt_ids for x in DEMONSTRATIONS],
        [x.response_ids for x in DEMONSTRATIONS],
        pad_id=policy.pad_id,
    )


def test_bf16_is_only_a_matter_of_the_forward_pass():
    policy = small_policy(critic="shared", dtype=torch.float32)
    optimizer = optimizer_of(policy, precision="bf16")
    plain = policy(first_batch(policy))
    with optimizer.autocast():
        half = policy(first_batch(policy))
    for ours, theirs in zip(half[:3], plain[:3], strict=True):
        assert ours.dtype == torch.float32
        error = float((ours - theirs).detach().abs().max())
        assert 1e-5 < error < 0.2  # bf16 has 8 bits
    optimizer.backward(half.logprobs.sum())
    assert {p.grad.dtype for p in policy.lm.parameters()} == {torch.float32}
    optimizer.step()
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert plain.logprobs.dtype == torch.float32


def test_fp32_is_not_cast():
    policy = small_policy()
    optimizer = optimizer_of(policy)
    with optimizer.autocast():
        inside = policy(first_batch(policy)).logprobs
    assert inside.dtype == torch.float64
    assert torch.equal(inside, policy(first_batch(policy)).logprobs)


def test_fp16_scales_the_loss_and_skips_an_overflow():
    toy, plain = Toy(torch.float32), Toy(torch.float32)
    optimizer = optimizer_of(toy, precision="fp16", max_grad_norm=1.0)
    other = optimizer_of(plain, max_grad_norm=1.0)
    start, scale = weights(toy), optimizer.scaler.get_scale()
    learn(toy, optimizer, ([[math.inf, 0.0], [0.0, 0.0]], [1.0, 1.0]))
    assert largest_difference(toy, start) == EXACT
    assert optimizer.scaler.get_scale() == scale / 2
    assert optimizer.skipped == 1
    # The scale is a power of two, so that a good step has the bits of an unscaled one.
    norms = []
    for module, stepped in ((toy, optimizer), (plain, other)):
        stepped.backward(module.loss(*GRADIENTS[0]))
        norms.append(stepped.step())
    assert norms[0] == norms[1] == pytest.approx(math.sqrt(5.35), rel=FP32)
    assert largest_difference(toy, plain) == EXACT
    assert largest_difference(toy, start) > 0


def test_a_resume_keeps_the_scale_of_fp16_and_how_often_was_skipped():
    def overflow(module, stepped):
        learn(module, stepped, ([[math.inf, 0.0], [0.0, 0.0]], [1.0, 1.0]))

    toy = Toy(torch.float32)
    optimizer = optimizer_of(toy, precision="fp16")
    scale = optimizer.scaler.get_scale()
    for _ in range(MAX_OVERFLOWS - 1):
        overflow(toy, optimizer)
    restored = optimizer_of(toy, precision="fp16")
    restored.load_state_dict(real_copy(optimizer.state_dict()))
    assert restored.skipped == MAX_OVERFLOWS - 1
    restored.backward(toy.loss(*GRADIENTS[0]))  # what it is scaled by is set at the first use
    assert restored.scaler.get_scale() == scale / 2 ** (MAX_OVERFLOWS - 1)
    restored.optimizer.zero_grad()
    overflow(toy, restored)
    with pytest.raises(NonFinite):
        overflow(toy, restored)


def test_a_first_step_that_is_skipped_moves_the_schedule_alone(recwarn):
    toy = Toy(torch.float32)
    optimizer = optimizer_of(
        toy, schedule="linear", warmup_share=0.2, learning_rate=1.0, precision="fp16"
    )
    start = weights(toy)
    learn(toy, optimizer, ([[math.inf, 0.0], [0.0, 0.0]], [1.0, 1.0]))
    assert largest_difference(toy, start) == EXACT  # no weight decay either
    assert optimizer.optimizer.state_dict()["state"] == {}
    assert (optimizer.learning_rate, optimizer.steps, optimizer.skipped) == (0.5, 1, 1)
    assert recwarn.list == []  # there is one where the schedule is ahead of the optimizer


def test_dropout_differs_with_seed_step_and_micro_batch():
    def kept(seed, step, micro_batch):
        with dropout_rng(seed, step, torch.device("cpu"), micro_batch):
            return tuple(nn.functional.dropout(torch.ones(64)).tolist())

    cases = list(itertools.product(range(3), repeat=3))
    assert len({kept(*case) for case in cases}) == 27
    assert kept(2, 1, 2) == kept(2, 1, 2)


def test_a_language_model_decays_its_matrices_only():
    policy = small_policy(critic="shared")
    optimizer = optimizer_of(policy, weight_decay=0.3)
    groups = [
        {id(p) for p in group["params"]}
        for group in optimizer.optimizer.param_groups
        if group["weight_decay"] == 0.3
    ]
    assert groups == [{id(p) for p in decayed(policy, 0.3)[0]["params"]}]
    assert len(groups[0]) == 7  # wte, wpe, c_attn, 2 x c_proj, c_fc, value_head


def sft_state(**options):
    return sft.new_state(small_policy(), DEMONSTRATIONS, sft.SFTConfig(**options))


def reward_state(**options):
    model = small_reward_model()
    rows = [{"prompt": "big", "chosen": "one", "rejected": "two"}] * 8
    examples, _ = reward.prepare_pairs(model, rows)
    return reward.new_state(model, examples, reward.RewardConfig(**options))


def dpo_state(**options):
    policy = small_policy()
    return dpo.new_state(policy, policy, PREFERENCES, dpo.DPOConfig(**options))


def ppo_state(*, epochs, batch_size, **options):
    sizes = {"epochs": 3, "batch_size": 3, "minibatch_size": batch_size, "max_new_tokens": 5}
    config = ppo.PPOConfig(steps=epochs, **sizes, adam_eps=0.1, **options)
    return ppo.new_state(small_policy(critic="shared"), PROMPTS, config)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("new_state", [sft_state, reward_state, dpo_state, ppo_state])
def test_what_a_config_says_reaches_the_optimizer(new_state, schedule):
    state = new_state(
        epochs=2,
        batch_size=3,
        learning_rate=0.3,
        schedule=schedule,
        warmup_share=0.5,
        weight_decay=0.2,
        max_grad_norm=0.7,
        precision="bf16",
        seed=5,
    )
    optimizer = state.optimizer
    rates = []
    for _ in range(6):  # two epochs of three batches
        rates.append(optimizer.learning_rate)
        optimizer.backward(sum(p.sum() for p in optimizer.parameters))
        optimizer.step()
    after = {
        "constant": [1, 1, 1],
        "linear": [1, 2 / 3, 1 / 3],
        "cosine": [1, 0.75, 0.25],  # half of 1 + cos of 0, 60 and 120 degrees
    }
    expected = [0, 1 / 3, 2 / 3, *after[schedule]]
    assert rates == pytest.approx([0.3 * share for share in expected], abs=FP64)
    groups = optimizer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    assert {group["eps"] for group in groups} == {0.1 if new_state is ppo_state else 1e-8}
    assert (optimizer.max_grad_norm, optimizer.precision) == (0.7, "bf16")
    assert state.cursor.seed == 5
