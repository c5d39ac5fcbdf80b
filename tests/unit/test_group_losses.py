"""The losses of GRPO and RLOO, by hand and against loops over single tokens."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    INF,
    NAN,
    assert_close,
    ragged_batches,
)
from tolerances import FP64

from rlhf_min.losses import grpo_loss, rloo_loss

LN2, LN3 = math.log(2), math.log(3)
MASK = torch.tensor([[True, True], [True, False]])


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def grpo(new, old, ref, advantages, mask, **changed):
    options = {"clip": 0.2, "clip_high": 0.3, "kl_coef": 0.0, "ratio_level": "token"}
    options |= {"loss_mean": "sequence", "max_new_tokens": 4}
    return grpo_loss(new, old, ref, advantages, mask, **(options | changed))


def rloo(new, old, advantages, mask, **changed):
    return rloo_loss(new, old, advantages, mask, **({"clip": 0.2, "clip_high": 0.3} | changed))


# Ratios 2, 1/2 and 3; advantages 1 for the first response and -2 for the second. Per token:
#   -1 * min(2, 1.3) = -1.3 clipped;  -1 * 1/2, clip(1/2) = 0.8 would gain, so -0.5;  2 * 3 = 6.
OLD = torch.zeros(2, 2, dtype=torch.float64)
NEW = torch.tensor([[LN2, -LN2], [LN3, 99]], dtype=torch.float64)
ADVANTAGES = f64(1, -2)


@pytest.mark.eq("grpo")
@pytest.mark.parametrize(
    ("loss_mean", "loss", "count", "clipped", "ratios"),
    [
        ("sequence", (-0.9 + 6) / 2, 2, 0.25, (1.25, 3)),  # half of one response, none of the other
        ("token", (-1.3 - 0.5 + 6) / 3, 3, 1 / 3, (2.5, 3)),
        ("constant", (-1.8 + 6) / (2 * 4), 2, 0.25, (1.25, 3)),
    ],
)
def test_grpo_loss_closed(loss_mean, loss, count, clipped, ratios):
    found = grpo(NEW, OLD, OLD, ADVANTAGES, MASK, loss_mean=loss_mean)
    assert_close(found.loss, f64(loss)[0], FP64)
    assert int(found.count) == count
    assert_close(found.clip_fraction.sum() / count, f64(clipped)[0], FP64)
    assert_close(found.ratio, f64(*ratios), FP64)
    assert_close(found.ratio_max, f64(3)[0], FP64)


@pytest.mark.eq("grpo")
def test_the_lower_limit():
    # A bad response at half its probability: less would earn nothing, so 0.8 and not 0.5.
    found = grpo(OLD[:1, :1] - LN2, OLD[:1, :1], OLD[:1, :1], f64(-1), MASK[:1, :1])
    assert_close(found.loss, f64(0.8)[0], FP64)
    assert_close(found.clip_fraction, f64(1), FP64)


@pytest.mark.eq("grpo")
def test_grpo_loss_closed_ratio_of_a_response():
    # (ln 2 - ln 2) / 2 = 0: ratio 1 at both tokens of the first; 3 in the second.
    found = grpo(NEW, OLD, OLD, ADVANTAGES, MASK, ratio_level="sequence")
    assert_close(found.loss, f64((-1 + 6) / 2)[0], FP64)
    # A response of ratios 2 and 8 has the geometric mean 4, clipped at 1.3.
    new = f64(LN2, 3 * LN2)[None]
    found = grpo(new, OLD[:1], OLD[:1], f64(1), MASK[:1], ratio_level="sequence")
    assert_close(found.ratio, f64(4), FP64)
    assert_close(found.loss, f64(-1.3)[0], FP64)


@pytest.mark.eq("grpo")
def test_grpo_loss_closed_kl():
    # No advantage; new - ref = ln 2: k3 = 1/2 - 1 + ln 2 at every token.
    new, ref = OLD + LN2, OLD.clone()
    found = grpo(new, new, ref, f64(0, 0), MASK, kl_coef=0.1)
    assert_close(found.loss, f64(0.1 * (LN2 - 0.5))[0], FP64)


def plainly(new, old, ref, advantages, mask, options):
    """The sums of the definition, a token at a time."""
    losses, lengths = [], []
    for b, keep in enumerate(mask.tolist()):
        ratios = [float(new[b, t] - old[b, t]) for t, real in enumerate(keep) if real]
        lengths.append(len(ratios))
        if options["ratio_level"] == "sequence":
            ratios = [sum(ratios) / len(ratios)] * len(ratios)
        losses.append([])
        for t, log_ratio in enumerate(ratios):
            ratio, a = math.exp(log_ratio), float(advantages[b])
            near = min(max(ratio, 1 - options["clip"]), 1 + options["clip_high"])
            d = float(new[b, t] - ref[b, t])
            kl = math.exp(-d) - 1 + d
            losses[-1].append(-min(a * ratio, a * near) + options["kl_coef"] * kl)
    if options["loss_mean"] == "sequence":
        return sum(sum(x) / n for x, n in zip(losses, lengths, strict=True)) / len(losses)
    total = sum(map(sum, losses))
    if options["loss_mean"] == "token":
        return total / sum(lengths)
    return total / len(losses) / options["max_new_tokens"]


@pytest.mark.eq("grpo")
@given(ragged_batches(3), st.data())
def test_grpo_loss_definition(batch, data):
    new, old, ref, mask = [x.tanh() for x in batch[:3]] + [batch[3]]
    advantages = f64(*data.draw(st.lists(st.floats(-3, 3), min_size=len(mask), max_size=len(mask))))
    for ratio_level, loss_mean, kl_coef in product(
        ("token", "sequence"), ("sequence", "token", "constant"), (0.0, 0.5)
    ):
        options = {"clip": 0.1, "clip_high": 0.4, "kl_coef": kl_coef, "max_new_tokens": 7}
        options |= {"ratio_level": ratio_level, "loss_mean": loss_mean}
        found = grpo_loss(new, old, ref, advantages, mask, **options)
        expected = plainly(new, old, ref, advantages, mask, options)
        assert_close(found.loss, f64(expected)[0], FP64 * 100)


@pytest.mark.eq("rloo")
def test_rloo_loss_closed():
    # Ratios 2 * 1/2 = 1 and 3: -1 and 2 * 3, over two responses.
    found = rloo(NEW, OLD, ADVANTAGES, MASK)
    assert_close(found.loss, f64((-1 + 6) / 2)[0], FP64)
    assert int(found.count) == 2
    assert_close(found.ratio, f64(1, 3), FP64)
    # Ratios 2 * 8 = 16 with a good response: clipped at 1.3.
    found = rloo(f64(LN2, 3 * LN2)[None], OLD[:1], f64(2), MASK[:1])
    assert_close(found.loss, f64(-2.6)[0], FP64)
    assert_close(found.clip_fraction, f64(1), FP64)


@pytest.mark.eq("rloo")
def test_rloo_loss_has_the_gradient_of_reinforce():
    new = OLD.clone().requires_grad_()
    rloo(new, OLD, ADVANTAGES, MASK).loss.backward()
    assert_close(new.grad, f64(-0.5, -0.5, 1, 0).view(2, 2), FP64)  # -A / B at real tokens


@pytest.mark.parametrize("k", ["update_k1", "update_k3"])
def test_how_far_it_moved(k):
    # log ratios ln 2, -ln 2 and ln 3: k1 is minus them, k3 is ratio - 1 - log ratio.
    each = {"update_k1": [-LN2, LN2, -LN3], "update_k3": [1 - LN2, LN2 - 0.5, 2 - LN3]}[k]
    of_responses = f64((each[0] + each[1]) / 2, each[2])
    assert_close(getattr(grpo(NEW, OLD, OLD, ADVANTAGES, MASK), k), of_responses, FP64)
    assert_close(getattr(rloo(NEW, OLD, ADVANTAGES, MASK), k), of_responses, FP64)
    of_tokens = getattr(grpo(NEW, OLD, OLD, ADVANTAGES, MASK, loss_mean="token"), k)
    assert_close(of_tokens, f64(each[0] + each[1], each[2]), FP64)


@pytest.mark.parametrize("loss_mean", ["sequence", "token", "constant"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_nothing_is_learned_from_padding(loss_mean, ratio_level):
    for junk in (NAN, INF, -INF, 7.0):
        new, old, ref = (x.clone().masked_fill(~MASK, junk) for x in (NEW, OLD, OLD + 1))
        new.requires_grad_()
        found = grpo(
            new, old, ref, ADVANTAGES, MASK,
            kl_coef=0.3, loss_mean=loss_mean, ratio_level=ratio_level,
        )  # fmt: skip
        plain = grpo(
            NEW, OLD, OLD + 1, ADVANTAGES, MASK,
            kl_coef=0.3, loss_mean=loss_mean, ratio_level=ratio_level,
        )  # fmt: skip
        found.loss.backward()
        assert_close(found.loss, plain.loss, FP64)
        assert new.grad[1, 1] == 0
        assert bool(new.grad.isfinite().all())
        again = rloo(new.detach(), old, ADVANTAGES, MASK)
        assert_close(again.loss, rloo(NEW, OLD, ADVANTAGES, MASK).loss, FP64)


def test_a_response_that_is_left_out_counts_as_one_of_the_responses():
    mask = torch.tensor([[True, True], [False, False]])
    for loss_mean, loss in [("sequence", -0.9 / 2), ("token", -1.8 / 2), ("constant", -1.8 / 8)]:
        found = grpo(NEW, OLD, OLD, ADVANTAGES, mask, loss_mean=loss_mean)
        assert_close(found.loss, f64(loss)[0], FP64)
        nothing = grpo(NEW, OLD, OLD, ADVANTAGES, mask & False, loss_mean=loss_mean)
        assert float(nothing.loss) == 0


def test_only_the_loss_carries_gradient():
    new, old, ref = (x.clone().requires_grad_() for x in (NEW, OLD, OLD))
    advantages = ADVANTAGES.clone().requires_grad_()
    found = grpo(new, old, ref, advantages, MASK, kl_coef=0.1)
    found.loss.backward()
    assert new.grad is not None
    assert all(x.grad is None for x in (old, ref, advantages))
    assert not any(x.requires_grad for x in found[1:])
    assert not any(x.requires_grad for x in rloo(new, old, advantages, MASK)[1:])


def test_shapes_are_checked():
    for inputs in [(NEW, OLD, OLD, f64(1), MASK), (NEW[:1], OLD, OLD, ADVANTAGES, MASK)]:
        with pytest.raises(ValueError, match="shapes differ"):
            grpo(*inputs)
    for inputs in [(NEW, OLD, f64(1), MASK), (NEW[:1], OLD, ADVANTAGES, MASK)]:
        with pytest.raises(ValueError, match="shapes differ"):
            rloo(*inputs)
