import math
import statistics
from dataclasses import replace

import pytest
import torch
from small import (
    PREFERENCES,
    assert_deterministic,
    assert_is_the_plain_loop,
    assert_resumes,
    largest_difference,
    row_logprobs,
    shuffled,
    small_policy,
)
from tolerances import EXACT, FP64

from rlhf_min import dpo
from rlhf_min.data import Cursor
from rlhf_min.errors import BadInput
from rlhf_min.optim import Optimizer, State

LN2 = math.log(2)
# Where a gradient is 0 but for rounding, as that of a key's bias, Adam divides rounding by 1e-8:
# only a low rate keeps two loops within FP64 of each other.
RATE = 1e-4
CONFIG = dpo.DPOConfig(
    epochs=2,
    batch_size=3,
    learning_rate=1e-2,
    weight_decay=0.1,
    beta=0.4,
    label_smoothing=0.1,
    eval_every=2,
)
# What a batch reports beside its loss.
PER_PAIR = (
    "chosen_rewards",
    "rejected_rewards",
    "margin",
    "accuracy",
    "chosen_logprobs",
    "rejected_logprobs",
    "chosen_logprobs_change",
    "rejected_logprobs_change",
    "sft_loss",
)


def plain_logprob(policy, prompt_ids, response_ids):
    """Of a whole response, from the plain logits of its row alone."""
    rows = row_logprobs(policy, prompt_ids, response_ids)
    return sum(rows[t, token] for t, token in enumerate(response_ids.tolist()))


def plain_batch(policy, ref_policy, examples, beta, eps):
    """The loss in the probabilities of eq. 6 of the paper, and the nine numbers of each pair."""
    losses, reported = [], []
    for x in examples:
        chosen = plain_logprob(policy, x.prompt_ids, x.chosen_ids)
        rejected = plain_logprob(policy, x.prompt_ids, x.rejected_ids)
        with torch.no_grad():
            ref_chosen = plain_logprob(ref_policy, x.prompt_ids, x.chosen_ids)
            ref_rejected = plain_logprob(ref_policy, x.prompt_ids, x.rejected_ids)
        odds = ((chosen - ref_chosen) * beta).exp() / ((rejected - ref_rejected) * beta).exp()
        p = odds / (1 + odds)  # that the chosen one is preferred
        losses.append(-(1 - eps) * p.log() - eps * (1 - p).log())
        change, other = (chosen - ref_chosen).item(), (rejected - ref_rejected).item()
        reported.append(
            (
                beta * change,
                beta * other,
                beta * (change - other),
                float(change > other),
                chosen.item(),
                rejected.item(),
                change,
                other,
                -chosen.item() / len(x.chosen_ids),
            )
        )
    means = [statistics.fmean(column) for column in zip(*reported, strict=True)]
    return sum(losses) / len(losses), dict(zip(PER_PAIR, means, strict=True))


@pytest.mark.parametrize("cached", [True, False])
def test_training_is_the_plain_loop(cached):
    policy, plain, ref_policy = small_policy(), small_policy(), small_policy(seed=1)
    config = replace(
        CONFIG,
        epochs=1,
        max_tokens=30,
        warmup_share=0.34,
        learning_rate=RATE,
        cache_reference=cached,
    )
    state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
    found = list(dpo.train(policy, ref_policy, config, state))

    def loss_of(rows):
        return plain_batch(plain, ref_policy, [PREFERENCES[i] for i in rows], 0.4, 0.1)

    assert_is_the_plain_loop(found, plain, loss_of, order=shuffled(8, seed=0), rate=RATE)
    assert largest_difference(policy, plain) < FP64
    assert largest_difference(policy, small_policy()) > RATE / 2


def test_cached_and_live_reference_are_the_same():
    ref_policy = small_policy(seed=1)
    runs = {}
    for cached in (True, False):
        policy = small_policy()
        # The gradient of a key's bias is 0 but for rounding, and the two may be packed otherwise.
        policy.lm.transformer.h[0].attn.c_attn.bias.requires_grad_(False)
        config = replace(CONFIG, cache_reference=cached)
        state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
        assert all((x.ref_logprobs is not None) == cached for x in state.cursor.examples)
        steps = dpo.train(policy, ref_policy, config, state, heldout=PREFERENCES[:3])
        metrics = [{k: v for k, v in m.items() if not k.startswith("time/")} for m in steps]
        runs[cached] = policy, metrics
    (cached_policy, cached_metrics), (live_policy, live_metrics) = runs[True], runs[False]
    for cached, live in zip(cached_metrics, live_metrics, strict=True):
        assert cached == pytest.approx(live, abs=FP64)
    assert largest_difference(cached_policy, live_policy) < FP64


def test_cache_holds_the_logprobs_of_each_pair_in_its_place():
    ref_policy = small_policy(seed=1)
    cached = dpo.cache_reference(ref_policy, PREFERENCES, max_tokens=25)
    for x, original in zip(cached, PREFERENCES, strict=True):
        assert x.prompt_ids is original.prompt_ids
        expected = tuple(
            plain_logprob(ref_policy, original.prompt_ids, response).item()
            for response in (original.chosen_ids, original.rejected_ids)
        )
        assert x.ref_logprobs == pytest.approx(expected, abs=FP64)


def test_a_reference_that_is_cached_in_part_is_asked_for_all():
    ref_policy, like = small_policy(seed=1), torch.empty(0, dtype=torch.float64)
    pairs = [replace(PREFERENCES[0], ref_logprobs=(-1.0, -2.0)), PREFERENCES[1]]
    chosen, rejected = dpo._reference(ref_policy, pairs, like=like)
    for x, found in zip(pairs, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True):
        expected = [
            plain_logprob(ref_policy, x.prompt_ids, response).item()
            for response in (x.chosen_ids, x.rejected_ids)
        ]
        assert found == pytest.approx(expected, abs=FP64)


def test_a_live_start_is_a_tie_of_policy_and_reference():
    policy = small_policy()
    ref_policy = policy.reference()
    config = replace(CONFIG, cache_reference=False, label_smoothing=0.0)
    state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
    metrics = next(dpo.train(policy, ref_policy, config, state))
    assert metrics["loss"] == pytest.approx(LN2, abs=FP64)
    for name in ("accuracy", "margin", "chosen_rewards", "rejected_rewards"):
        assert metrics[name] == EXACT
    for name in ("chosen_logprobs_change", "rejected_logprobs_change"):
        assert metrics[name] == EXACT


def test_a_cached_start_is_a_tie_but_for_rounding():
    policy = small_policy()
    ref_policy = policy.reference()
    state = dpo.new_state(policy, ref_policy, PREFERENCES, CONFIG)
    metrics = next(dpo.train(policy, ref_policy, CONFIG, state))
    assert metrics["loss"] == pytest.approx(LN2, abs=FP64)
    assert dpo.first_loss(CONFIG) == pytest.approx(LN2, abs=FP64)
    assert metrics["margin"] == pytest.approx(0.0, abs=FP64)


@pytest.mark.parametrize("cached", [True, False])
def test_dropout_is_off(cached):
    policy = small_policy(dropout=0.5)
    ref_policy = policy.reference()
    config = replace(CONFIG, cache_reference=cached)
    state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
    metrics = next(dpo.train(policy, ref_policy, config, state))
    assert policy.training
    assert metrics["loss"] == pytest.approx(LN2, abs=FP64)
    first, second = (dpo.response_logprobs(policy, PREFERENCES)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert policy.lm.config.resid_pdrop == 0.5  # the saved model keeps what it was


def one_step(max_tokens, **own):
    policy, batches = small_policy(), []
    policy.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    state = State(
        Optimizer(torch.optim.SGD(policy.parameters(), lr=0.1)), Cursor(PREFERENCES, seed=0)
    )
    common = {"batch_size": 8, "max_tokens": max_tokens, "cache_reference": False}
    config = dpo.DPOConfig(beta=0.4, **({"label_smoothing": 0.1} | common | own))
    metrics = next(dpo.train(policy, small_policy(seed=1), config, state))
    return policy, metrics, batches


def test_micro_batches_leave_the_gradient_as_it_is():
    together, metrics, batches = one_step(10_000)
    assert batches == [16]
    apart, split_metrics, batches = one_step(1)
    assert batches == [2] * 8
    assert largest_difference(apart, together) < FP64
    for name in ("loss", "grad_norm", *PER_PAIR):
        assert split_metrics[name] == pytest.approx(metrics[name], abs=FP64)
    assert largest_difference(together, small_policy()) > 1e-3


@pytest.mark.parametrize(
    "own", [{"sft_coef": 1.0, "length_normalised": True}, *({"loss": x} for x in ("orpo", "cpo"))]
)
def test_micro_batches_leave_the_gradient_of_an_sft_term_as_it_is(own):
    """The chosen responses are of unequal length, and so are the micro-batches."""
    own = {"label_smoothing": 0.0} | own
    together, metrics, _ = one_step(10_000, **own)
    for max_tokens in (1, 40):
        apart, split_metrics, batches = one_step(max_tokens, **own)
        assert len(batches) > 1
        assert largest_difference(apart, together) < FP64
        for name in ("loss", "grad_norm"):
            assert split_metrics[name] == pytest.approx(metrics[name], abs=FP64)


@pytest.mark.parametrize("cached", [True, False])
def test_a_pass_holds_no_more_than_max_tokens(cached):
    """A pair is two rows, each as wide as the longest of its batch."""
    cells = {}
    policy, ref_policy = small_policy(), small_policy(seed=1)
    for name, model in (("policy", policy), ("reference", ref_policy)):
        model.register_forward_pre_hook(
            lambda _, inputs, name=name: cells.setdefault(name, []).append(inputs[0].ids.numel())
        )
    config = replace(CONFIG, max_tokens=40, batch_size=8, eval_every=1, cache_reference=cached)
    state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
    for _ in dpo.train(policy, ref_policy, config, state, heldout=PREFERENCES):
        pass
    for sizes in cells.values():
        assert 20 < max(sizes) <= 40
    # A cached reference is asked once for each pair, a live one in each step and each look.
    looks = len(cells["policy"])
    assert len(cells["reference"]) == (looks / 2 if cached else looks)


def test_evaluate_by_hand():
    policy, ref_policy, modes = small_policy(), small_policy(seed=1), []
    policy.train().register_forward_pre_hook(lambda model, _: modes.append(model.training))
    found = dpo.evaluate(policy, ref_policy, PREFERENCES[:5], CONFIG)
    loss, reported = plain_batch(small_policy(), ref_policy, PREFERENCES[:5], 0.4, 0.1)
    expected = {"loss": loss.item(), **reported}
    assert found == pytest.approx({f"eval/{k}": v for k, v in expected.items()}, abs=FP64)
    assert modes == [False]
    assert policy.training


def test_what_is_counted_on_the_way_and_when_held_out_pairs_are_looked_at():
    policy, ref_policy = small_policy(), small_policy(seed=1)
    config = replace(CONFIG, batch_size=3, eval_every=4)
    state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
    found = list(dpo.train(policy, ref_policy, config, state, heldout=PREFERENCES[:2]))
    assert ["eval/loss" in m for m in found] == [False, False, False, True, False, True]
    assert [m["epoch"] for m in found] == [3 / 8, 6 / 8, 1.0, 11 / 8, 14 / 8, 2.0]
    rows = shuffled(8, seed=1)[:3]
    padded = [
        len(x.prompt_ids) + max(len(x.chosen_ids), len(x.rejected_ids))
        for x in (PREFERENCES[i] for i in rows)
    ]
    assert found[3]["tokens"] == 2 * sum(padded)


def test_training_prefers_what_was_chosen():
    policy = small_policy(dtype=torch.float32)
    ref_policy = policy.reference()
    config = dpo.DPOConfig(epochs=20, batch_size=8, learning_rate=1e-2, beta=0.5)
    state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
    metrics = list(dpo.train(policy, ref_policy, config, state, heldout=PREFERENCES))[-1]
    assert metrics["eval/accuracy"] == 1.0
    assert metrics["eval/margin"] > 1
    assert metrics["loss"] < LN2 / 2
    assert largest_difference(ref_policy.lm, small_policy(dtype=torch.float32).lm) == EXACT


def build():
    policy = small_policy(dtype=torch.float32)
    ref_policy = policy.reference()
    state = dpo.new_state(policy, ref_policy, PREFERENCES, CONFIG)
    return (
        policy,
        state,
        lambda: dpo.train(policy, ref_policy, CONFIG, state, heldout=PREFERENCES[:3]),
    )


def test_resume():
    assert_resumes(build, steps=6)


def test_determinism():
    assert_deterministic(build)


@pytest.mark.parametrize("cache", [True, False])
def test_a_reference_left_in_train_mode_has_no_dropout(cache):
    config = replace(CONFIG, cache_reference=cache)
    policy, ref_policy = small_policy(dropout=0.1), small_policy(dropout=0.1)
    ref_policy.train()
    state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
    first = next(dpo.train(policy, ref_policy, config, state))
    assert first["loss"] == pytest.approx(math.log(2), abs=FP64)
    assert ref_policy.training


# The family


# The losses in probabilities: c and r are pi/ref of chosen and rejected; without a reference, pi.
PLAIN = {
    "ipo": lambda c, r: ((c / r).log() - 1 / 0.8) ** 2,
    "hinge": lambda c, r: torch.clamp(1 - 0.4 * (c / r).log(), min=0),
    "robust": lambda c, r: (
        (0.9 * torch.log1p((r / c) ** 0.4) - 0.1 * torch.log1p((c / r) ** 0.4)) / 0.8
    ),
    "apo_zero": lambda c, r: 1 / (1 + c**0.4) + r**0.4 / (1 + r**0.4),
    "apo_down": lambda c, r: c**0.4 / (1 + c**0.4) + 1 / (1 + (c / r) ** 0.4),
    "simpo": lambda c, r: torch.log1p((r / c) ** 0.4 * math.exp(0.3)),
    "orpo": lambda c, r: 0.4 * torch.log1p(r / (1 - r) * (1 - c) / c),
    "cpo": lambda c, r: torch.log1p((r / c) ** 0.4),
    "sigmoid": lambda c, r: torch.log1p((r / c) ** 0.4),
}
OPTIONS = {"robust": {"label_smoothing": 0.1}, "simpo": {"simpo_gamma": 0.3}}


def config_of(loss, **own):
    return dpo.DPOConfig(loss=loss, beta=0.4, **(OPTIONS.get(loss, {}) | own))


def plain_family(policy, ref_policy, examples, loss, *, per_token, sft_coef):
    """Loss with gradient, rewards and SFT loss, each pair by itself."""
    losses, rewards, sft_losses = [], [], []
    for x in examples:
        shares = []
        for ids in (x.chosen_ids, x.rejected_ids):
            logprob = plain_logprob(policy, x.prompt_ids, ids)
            if len(shares) == 0:
                sft_losses.append(-logprob / len(ids))
            if ref_policy is not None:
                logprob = logprob - plain_logprob(ref_policy, x.prompt_ids, ids).detach()
            shares.append((logprob / (len(ids) if per_token else 1)).exp())
        losses.append(PLAIN[loss](*shares) + sft_coef * sft_losses[-1])
        rewards.append([0.4 * math.log(share.item()) for share in shares])
    sft_loss = statistics.fmean(x.item() for x in sft_losses)
    return sum(losses) / len(losses), rewards, sft_loss


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("sft_coef", [0.0, 0.7])
@pytest.mark.parametrize("loss", PLAIN)
def test_each_loss_gets_the_numbers_that_it_takes(loss, sft_coef, per_token):
    per_token = per_token or loss in ("simpo", "orpo")
    config = config_of(loss, sft_coef=sft_coef, length_normalised=per_token)
    policy, plain, ref_policy = small_policy(), small_policy(), small_policy(seed=1)
    ref_policy = None if config.reference_free else ref_policy
    found = dpo.batch_loss(policy, ref_policy, PREFERENCES, config)
    found.loss.backward()
    expected, rewards, sft_loss = plain_family(
        plain, ref_policy, PREFERENCES, loss, per_token=per_token, sft_coef=sft_coef
    )
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), abs=FP64)
    assert found.chosen_rewards.tolist() == pytest.approx([r for r, _ in rewards], abs=FP64)
    assert found.rejected_rewards.tolist() == pytest.approx([r for _, r in rewards], abs=FP64)
    assert found.sft_loss.mean().item() == pytest.approx(sft_loss, abs=FP64)
    assert not any(x.requires_grad for x in found[1:] if x is not None)
    for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < FP64


KNOWN = {
    "sigmoid": LN2,
    "ipo": 1 / 0.64,  # 1/(4 beta^2)
    "hinge": 1.0,
    "robust": LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "simpo": math.log(1 + math.exp(0.3)),
    "orpo": 0.4 * LN2,
    "cpo": LN2,
}


@pytest.mark.parametrize("loss", KNOWN)
def test_the_first_loss_of_each(loss):
    config = config_of(loss, cache_reference=False, batch_size=8, sft_coef=0.0)
    assert dpo.first_loss(config) == pytest.approx(KNOWN[loss], abs=FP64)
    pairs = PREFERENCES
    if config.reference_free:  # of a response beside itself
        pairs = [replace(x, rejected_ids=x.chosen_ids) for x in PREFERENCES]
    policy = small_policy()
    ref_policy = None if config.reference_free else policy.reference()
    state = dpo.new_state(policy, ref_policy, pairs, config)
    metrics = next(dpo.train(policy, ref_policy, config, state))
    assert metrics["loss"] == pytest.approx(KNOWN[loss], abs=FP64)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_a_loss_without_a_reference_runs_none(cached, given):
    """If there is one it is asked once, for the changes since step 0; else the policy is."""
    policy, passes = small_policy(), []
    ref_policy = small_policy().reference() if given else None
    if given:
        ref_policy.register_forward_pre_hook(lambda *_: passes.append(1))
    config = config_of("simpo", cache_reference=cached, batch_size=4, eval_every=1)
    state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
    assert bool(passes) == (cached and given)
    heldout = PREFERENCES[:3]
    if cached:
        heldout = dpo.cache_reference(ref_policy or policy, heldout, max_tokens=1024)
    passes.clear()
    steps = dpo.train(policy, ref_policy, config, state, heldout=heldout)
    first, second = next(steps), next(steps)
    assert len(passes) == (1 if cached and given else 0)  # the held-out pairs, before the first
    for metrics in (first, second):
        for name in ("chosen_logprobs_change", "eval/chosen_logprobs_change"):
            assert (name in metrics) == cached
    if cached:
        assert first["chosen_logprobs_change"] == pytest.approx(0, abs=FP64)
        assert abs(second["chosen_logprobs_change"]) > 1e-4
    assert first["chosen_rewards"] < 0  # beta * log pi


def test_a_loss_with_a_reference_needs_it():
    with pytest.raises(BadInput, match="DPO with loss ipo compares with a reference"):
        dpo.new_state(small_policy(), None, PREFERENCES, config_of("ipo"))


@pytest.mark.parametrize("loss", ["ipo", "orpo"])
def test_resume_of_the_family(loss):
    config = config_of(loss, epochs=2, batch_size=3, learning_rate=1e-2, eval_every=2)

    def build():
        policy = small_policy(dtype=torch.float32)
        ref_policy = None if config.reference_free else policy.reference()
        state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
        heldout = PREFERENCES[:3]
        return (
            policy,
            state,
            lambda: dpo.train(policy, ref_policy, config, state, heldout=heldout),
        )

    assert_resumes(build, steps=6)


DEFAULTS = {
    "sigmoid": (0.3, False, 0.0, 0.0),
    "robust": (0.3, False, 0.0, 0.0),
    "simpo": (2.0, True, 0.0, 1.0),
    "orpo": (0.1, True, 1.0, 0.0),
    "cpo": (0.3, False, 1.0, 0.0),
}


@pytest.mark.parametrize("loss", DEFAULTS)
def test_what_a_loss_takes_by_itself(loss):
    config = dpo.DPOConfig(loss=loss, label_smoothing=0.1 if loss == "robust" else 0.0)
    taken = config.beta, config.length_normalised, config.sft_coef, config.simpo_gamma
    assert taken == DEFAULTS[loss]
    assert config.reference_free == (loss in ("simpo", "orpo", "cpo"))
    assert dpo.DPOConfig(length_normalised=True).beta == 2.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "loss ipo ignores label_smoothing 0.1"),
        ({"loss": "cpo", "label_smoothing": 0.1}, "loss cpo ignores label_smoothing 0.1"),
        ({"loss": "robust"}, "loss robust is sigmoid without label_smoothing"),
        ({"simpo_gamma": 0.5}, "loss sigmoid ignores simpo_gamma 0.5"),
        ({"loss": "simpo", "length_normalised": False}, "loss simpo takes means per token only"),
        ({"loss": "orpo", "length_normalised": False}, "loss orpo takes means per token only"),
        ({"loss": "kto"}, "loss is 'kto'; it must be one of sigmoid, ipo, hinge"),
    ],
)
def test_what_a_loss_would_ignore_is_refused(options, told):
    with pytest.raises(BadInput) as caught:
        dpo.DPOConfig(**options)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
