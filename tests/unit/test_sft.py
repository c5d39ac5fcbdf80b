import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from small import (
    BIG,
    DEMONSTRATIONS,
    assert_deterministic,
    assert_is_the_plain_loop,
    assert_resumes,
    largest_difference,
    shuffled,
    small_policy,
    weights,
)
from tolerances import EXACT, FP64
from torch.nn.functional import cross_entropy, pad

from rlhf_min import sft
from rlhf_min.data import Cursor
from rlhf_min.errors import NonFinite
from rlhf_min.optim import Optimizer, State

# Where a gradient is 0 but for rounding, as that of a key's bias, Adam divides rounding by 1e-8:
# only a low rate keeps two loops within FP64 of each other.
RATE = 1e-4
CONFIG = sft.SFTConfig(epochs=2, batch_size=3, learning_rate=1e-2, weight_decay=0.1, eval_every=2)


def plain_loss(policy, examples):
    """Each row alone: cross entropy of the plain logits over its response, EOS included."""
    losses = []
    for x in examples:
        row = torch.cat([x.prompt_ids, x.response_ids])
        logits = policy.lm(row[None]).logits[0]
        losses += [cross_entropy(logits[i - 1], row[i]) for i in range(len(x.prompt_ids), len(row))]
    return torch.stack(losses).mean()


def test_training_is_the_plain_loop():
    policy, plain = small_policy(), small_policy()
    config = replace(
        CONFIG, epochs=1, max_tokens=12, warmup_share=0.34, learning_rate=RATE, schedule="linear"
    )
    state = sft.new_state(policy, DEMONSTRATIONS, config)
    found = list(sft.train(policy, config, state))

    def loss_of(rows):
        return plain_loss(plain, [DEMONSTRATIONS[i] for i in rows]), {}

    assert_is_the_plain_loop(found, plain, loss_of, order=shuffled(8, seed=0), rate=RATE)
    assert [m["epoch"] for m in found] == [3 / 8, 6 / 8, 1.0]
    assert largest_difference(policy, plain) < FP64
    assert largest_difference(policy, small_policy()) > RATE / 2


def test_prompt_tokens_get_no_loss():
    policy = small_policy()
    width = max(len(x.prompt_ids) + len(x.response_ids) for x in DEMONSTRATIONS)
    rows, labels, everything = [], [], []
    for x in DEMONSTRATIONS:
        room = (0, width - len(x.prompt_ids) - len(x.response_ids))
        row = torch.cat([x.prompt_ids, x.response_ids])
        rows.append(pad(row, room, value=BIG))
        hidden = torch.full_like(x.prompt_ids, -100)  # what cross_entropy leaves out
        labels.append(pad(torch.cat([hidden, x.response_ids]), room, value=-100))
        everything.append(pad(row, room, value=-100))
    logits = policy.lm(torch.stack(rows)).logits[:, :-1].flatten(0, 1)
    masked, unmasked = (
        cross_entropy(logits, torch.stack(y)[:, 1:].flatten()).item() for y in (labels, everything)
    )
    loss, count = sft.batch_loss(policy, DEMONSTRATIONS)
    assert loss.item() == pytest.approx(masked, abs=FP64)
    assert abs(loss.item() - unmasked) > 0.01
    assert int(count) == 2 + 5 + 1 + 3 + 4 + 2 + 3 + 2


def one_step(max_tokens):
    """One step of plain descent on all eight rows, and the rows of each forward pass."""
    policy, batches = small_policy(), []
    policy.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    state = State(
        Optimizer(torch.optim.SGD(policy.parameters(), lr=0.5)), Cursor(DEMONSTRATIONS, seed=0)
    )
    config = replace(CONFIG, batch_size=8, max_tokens=max_tokens)
    metrics = next(sft.train(policy, config, state))
    return policy, metrics, batches


def test_micro_batches_leave_the_gradient_as_it_is():
    together, metrics, batches = one_step(10_000)
    assert batches == [8]
    for max_tokens, expected in ((1, [1] * 8), (14, [2, 2, 2, 2])):
        apart, split_metrics, batches = one_step(max_tokens)
        assert batches == expected
        assert largest_difference(apart, together) < FP64
        for name in ("loss", "grad_norm"):
            assert split_metrics[name] == pytest.approx(metrics[name], abs=FP64)
    assert largest_difference(together, small_policy()) > 1e-3


def test_evaluate_by_hand():
    policy = small_policy(dropout=0.5)
    policy.train()  # evaluation has to switch it off
    found = sft.evaluate(policy, DEMONSTRATIONS, replace(CONFIG, max_tokens=13))
    mean = plain_loss(small_policy(dropout=0.5).eval(), DEMONSTRATIONS).item()
    assert found["eval/loss"] == pytest.approx(mean, abs=FP64)
    assert found["eval/perplexity"] == pytest.approx(math.exp(mean), rel=FP64)
    assert set(found) == {"eval/loss", "eval/perplexity"}
    assert policy.training  # as it was found


def test_held_out_rows_are_looked_at_now_and_then_and_at_the_end():
    policy = small_policy()
    config = replace(CONFIG, epochs=1, batch_size=2, eval_every=3)
    state = sft.new_state(policy, DEMONSTRATIONS, config)
    looked = ["eval/loss" in m for m in sft.train(policy, config, state, heldout=DEMONSTRATIONS)]
    assert looked == [False, False, True, True]
    unchanged = small_policy()
    state = sft.new_state(unchanged, DEMONSTRATIONS, config)
    assert len(list(sft.train(unchanged, config, state))) == 4
    assert largest_difference(policy, unchanged) == EXACT


def test_epochs_and_tokens_are_counted_on():
    policy = small_policy()
    config = replace(CONFIG, batch_size=5)
    found = list(sft.train(policy, config, sft.new_state(policy, DEMONSTRATIONS, config)))
    assert [m["epoch"] for m in found] == [5 / 8, 1.0, 13 / 8, 2.0]
    lengths = [len(x.prompt_ids) + len(x.response_ids) for x in DEMONSTRATIONS]
    for metrics, epoch, rows in zip(found, (0, 0, 1, 1), [slice(5), slice(5, 8)] * 2, strict=True):
        assert metrics["tokens"] == sum(lengths[i] for i in shuffled(8, seed=epoch)[rows])


def test_a_perplexity_beyond_any_float_is_a_large_number():
    policy = small_policy()
    with torch.no_grad():
        policy.lm.transformer.ln_f.weight.mul_(10_000)
    found = sft.evaluate(policy, DEMONSTRATIONS, CONFIG)
    assert found["eval/loss"] > 710
    assert found["eval/perplexity"] == pytest.approx(math.exp(700))


def test_a_pass_holds_no_more_than_max_tokens():
    policy, cells = small_policy(), []
    policy.register_forward_pre_hook(lambda _, inputs: cells.append(inputs[0].ids.numel()))
    config = replace(CONFIG, epochs=1, max_tokens=14, eval_every=1)
    state = sft.new_state(policy, DEMONSTRATIONS, config)
    for _ in sft.train(policy, config, state, heldout=DEMONSTRATIONS):
        pass
    assert 10 < max(cells) <= 14


def test_dropout_acts_in_training_whatever_the_mode_was_and_not_in_a_look():
    policy = small_policy(dropout=0.5).eval()  # as a loaded model is
    config = replace(CONFIG, eval_every=1)
    state = sft.new_state(policy, DEMONSTRATIONS, config)
    modes = []
    policy.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    for _ in islice(sft.train(policy, config, state, heldout=DEMONSTRATIONS[:1]), 2):
        pass
    assert modes == [True, False, True, False]


def test_a_small_model_learns_eight_rows_by_heart():
    policy = small_policy(dtype=torch.float32)
    config = sft.SFTConfig(epochs=120, batch_size=8, learning_rate=2e-2)
    state = sft.new_state(policy, DEMONSTRATIONS, config)
    losses = [m["loss"] for m in sft.train(policy, config, state)]
    assert losses[0] > 1.5
    assert losses[-1] < 0.05


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step():
    policy = small_policy()
    state = sft.new_state(policy, DEMONSTRATIONS, CONFIG)
    steps = sft.train(policy, CONFIG, state)
    next(steps)
    with torch.no_grad():
        policy.lm.transformer.ln_f.bias[0] = math.nan
    before = weights(policy)
    with pytest.raises(NonFinite) as caught:
        next(steps)
    assert caught.value.step == state.step == 1
    assert len(caught.value.batch) == 3
    for name, weight in weights(policy).items():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num())


def build(dropout: float = 0.0):
    policy = small_policy(dtype=torch.float32, dropout=dropout)
    state = sft.new_state(policy, DEMONSTRATIONS, CONFIG)
    return (
        policy,
        state,
        lambda: sft.train(policy, CONFIG, state, heldout=DEMONSTRATIONS[:3]),
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resume(dropout):
    assert_resumes(lambda: build(dropout), steps=6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_determinism(dropout):
    assert_deterministic(lambda: build(dropout))


def test_dropout_acts_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    with_dropout, without = (next(build(dropout)[2]())["loss"] for dropout in (0.1, 0.0))
    assert with_dropout != without
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_differs_from_step_to_step_and_from_seed_to_seed():
    """One row, weights that stay: only the dropout can make two losses differ."""
    losses = []
    for seed in (0, 1):
        policy = small_policy(dropout=0.5)
        optimizer = Optimizer(torch.optim.SGD(policy.parameters(), lr=0.0))
        config = replace(CONFIG, epochs=3, seed=seed)
        state = State(optimizer, Cursor(DEMONSTRATIONS[1:2], seed=seed))
        losses += [m["loss"] for m in sft.train(policy, config, state)]
    assert len(set(losses)) == 6


def test_the_seed_is_the_order_of_the_data():
    runs = {}
    for seed in (0, 1):
        policy = small_policy()
        config = replace(CONFIG, seed=seed)
        state = sft.new_state(policy, DEMONSTRATIONS, config)
        runs[seed] = next(sft.train(policy, config, state))["loss"]
        rows = [DEMONSTRATIONS[i] for i in shuffled(8, seed)[:3]]
        assert runs[seed] == pytest.approx(plain_loss(small_policy(), rows).item(), abs=FP64)
    assert runs[0] != runs[1]
