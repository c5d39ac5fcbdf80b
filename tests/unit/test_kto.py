import math
from dataclasses import replace

import pytest
import torch
from small import (
    BALL,
    BIG,
    END,
    ONE,
    PREFERENCES,
    RED,
    TWO,
    UNPAIRED,
    assert_deterministic,
    assert_is_the_plain_loop,
    assert_resumes,
    ids,
    largest_difference,
    row_logprobs,
    shuffled,
    small_policy,
)
from tolerances import EXACT, FP64

from rlhf_min import BadInput, kto
from rlhf_min.data import Cursor, UnpairedExample
from rlhf_min.optim import Optimizer, State
from rlhf_min.preference_losses import kto_kl, kto_loss

# Where a gradient is 0 but for rounding, as that of a key's bias, Adam divides rounding by 1e-8:
# only a low rate keeps two loops within FP64 of each other.
RATE = 1e-4
CONFIG = kto.KTOConfig(
    epochs=2,
    batch_size=3,
    learning_rate=1e-2,
    weight_decay=0.1,
    beta=0.4,
    desirable_weight=1.2,
    undesirable_weight=0.7,
    eval_every=2,
)
REF = 13  # a reference from which the rows' reference points are above 0, most of them
WEIGHTS = {"desirable_weight": 1.2, "undesirable_weight": 0.7}
# What a batch with both labels reports beside its loss.
REPORTED = (
    "desirable_rewards",
    "undesirable_rewards",
    "margin",
    "accuracy",
    "desirable_logprobs",
    "undesirable_logprobs",
    "kl",
)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


# The equations


@pytest.mark.eq("kto")
def test_kto_loss_closed():
    # pi/ref is 3 for each of the three, and the reference point log 2: with beta 1 the odds of a
    # desirable response are 3 : 2, so 2/5 of its weight is lost, and 3/5 of an undesirable one's.
    pi = doubles(math.log(0.3), math.log(0.6), math.log(0.9)).requires_grad_()
    ref = doubles(math.log(0.1), math.log(0.2), math.log(0.3))
    z = doubles(math.log(2))[0].requires_grad_()
    labels = torch.tensor([True, False, True])
    found = kto_loss(pi, ref, labels, z, beta=1.0, **WEIGHTS)
    assert found.loss.item() == pytest.approx((2 * 1.2 * 2 / 5 + 0.7 * 3 / 5) / 3, abs=FP64)
    assert found.count == 3
    assert found.rewards.tolist() == pytest.approx([math.log(3)] * 3, abs=FP64)
    assert not found.rewards.requires_grad
    # The derivative of the sigmoid is 2/5 * 3/5; the reference point has none.
    found.loss.backward()
    slope = 6 / 25 / 3
    expected = [-1.2 * slope, 0.7 * slope, -1.2 * slope]
    assert pi.grad.tolist() == pytest.approx(expected, abs=FP64)
    assert z.grad is None


@pytest.mark.eq("kto")
def test_kto_loss_scales_log_ratio_and_reference_point_by_beta():
    # r = 0.5 * log 9 = log 3, z counts 0.5 * log 4 = log 2: the odds of above.
    z = doubles(math.log(4))[0]
    found = kto_loss(doubles(0.0), -doubles(math.log(9)), torch.tensor([True]), z, beta=0.5,
                     desirable_weight=1.0, undesirable_weight=1.0)  # fmt: skip
    assert found.loss.item() == pytest.approx(2 / 5, abs=FP64)
    assert found.rewards.item() == pytest.approx(math.log(3), abs=FP64)


@pytest.mark.eq("kto")
def test_kto_loss_of_equal_policies_is_half_the_mean_weight():
    labels = torch.tensor([True, False, False, True, True])
    x, zero = -torch.rand(5, dtype=torch.float64, generator=torch.Generator()), doubles(0.0)[0]
    found = kto_loss(x, x, labels, zero, beta=0.3, **WEIGHTS)
    assert found.loss.item() == pytest.approx((3 * 1.2 + 2 * 0.7) / 5 / 2, abs=FP64)


@pytest.mark.eq("kto")
def test_kto_loss_keeps_its_digits_where_a_response_is_very_good():
    # 1 - sigmoid(50) is 0 in any precision; sigmoid(-50) is exp(-50).
    labels, zero = torch.tensor([True, False]), doubles(0.0)[0]
    for label, ratio in ((0, 50.0), (1, -50.0)):
        part = labels[label : label + 1]
        found = kto_loss(doubles(ratio), doubles(0.0), part, zero, beta=1.0, desirable_weight=1.0,
                         undesirable_weight=1.0)  # fmt: skip
        assert found.loss.item() == pytest.approx(math.exp(-50), rel=FP64, abs=EXACT)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"logprobs": doubles(1.0)}, "shapes differ"),
        ({"ref_logprobs": doubles(1.0, 2.0, 3.0)}, "shapes differ"),
        ({"labels": torch.tensor([1, 0])}, "labels are torch.int64, not bool"),
        ({"kl": doubles(0.0)}, r"kl has shape \(1,\)"),
        ({"beta": 0.0}, "beta must be above 0 and weights at least 0, not 0.0"),
        ({"desirable_weight": -1.0}, "not 0.3, -1.0, 1.0"),
        ({"undesirable_weight": math.nan}, "not 0.3, 1.0, nan"),
        (
            {name: doubles() for name in ("logprobs", "ref_logprobs")}
            | {"labels": torch.tensor([], dtype=torch.bool)},
            "one number for each",
        ),
    ],
)
def test_kto_loss_refuses(changed, says):
    given = {
        "logprobs": doubles(-1.0, -2.0),
        "ref_logprobs": doubles(-1.0, -2.0),
        "labels": torch.tensor([True, False]),
        "kl": doubles(0.0)[0],
        "beta": 0.3,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    }
    with pytest.raises(ValueError, match=says):
        kto_loss(**(given | changed))


@pytest.mark.eq("kto_kl")
def test_kto_kl_is_the_kl_where_the_policy_wrote_the_responses():
    # Of the three responses there are, each stands there as often as the policy says it: 2, 1, 1.
    pi, ref = [1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4]
    drawn = [0, 0, 1, 2]
    exact = sum(p * (math.log(p) - math.log(q)) for p, q in zip(pi, ref, strict=True))
    mismatched = doubles(*(math.log(pi[y]) for y in drawn)).requires_grad_()
    found = kto_kl(mismatched, doubles(*(math.log(ref[y]) for y in drawn)))
    assert found.item() == pytest.approx(exact, abs=FP64)
    assert exact > 0.5
    assert found.shape == ()
    assert not found.requires_grad


@pytest.mark.eq("kto_kl")
def test_kto_kl_is_cut_off_after_the_mean():
    # Mean -1, then 0; a cut of each row would give (0 + 1) / 2. Mean 1 with a negative row stays 1.
    assert kto_kl(doubles(-4.0, -2.0), doubles(-1.0, -3.0)).item() == EXACT
    assert kto_kl(doubles(-1.0, -3.0), doubles(-4.0, -2.0)).item() == 1
    with pytest.raises(ValueError, match="shapes differ"):
        kto_kl(doubles(-1.0), doubles(-1.0, -2.0))


@pytest.mark.eq("kto_weights")
def test_weight_ratio():
    config = replace(CONFIG, desirable_weight=2.0, undesirable_weight=3.0)
    assert kto.weight_ratio(UNPAIRED, config) == pytest.approx(2 * 5 / (3 * 3))
    desirable = [x for x in UNPAIRED if x.label]
    assert kto.weight_ratio(desirable, config) == math.inf
    assert kto.weight_ratio([x for x in UNPAIRED if not x.label], config) == 0


# Mismatched pairs


def rows(*prompts):
    """A row for each prompt, whose response is its own number."""
    return [
        UnpairedExample(torch.tensor(prompt), torch.tensor([i]), True)
        for i, prompt in enumerate(prompts)
    ]


def responses_of(examples):
    found = kto.mismatched(examples)
    assert [x.prompt_ids.tolist() for x in found] == [x.prompt_ids.tolist() for x in examples]
    return [int(x.response_ids) for x in found]


def test_responses_are_rotated_by_one():
    assert responses_of(rows([5], [6], [7], [6, 5])) == [3, 0, 1, 2]


def test_no_prompt_meets_a_response_of_its_own():
    # Pairs that follow one another: by two, so that again all responses are there.
    assert responses_of(rows([5], [5], [6], [6], [7], [7])) == [4, 5, 0, 1, 2, 3]
    # Only the last and the first are of one prompt.
    assert responses_of(rows([5], [6], [7], [5])) == [2, 3, 0, 1]


def test_where_prompts_must_meet_their_own_they_do_so_rarely_and_never_the_same_row():
    # By one it happens three times, by two or three places once.
    assert responses_of(rows([5], [5], [6], [6], [5])) == [3, 4, 0, 1, 2]
    assert responses_of(rows([5], [5])) == [1, 0]
    with pytest.raises(BadInput, match="the batch has one row only"):
        kto.mismatched(rows([5]))


# Training


def plain_logprob(policy, prompt_ids, response_ids):
    """Of a whole response, from the plain logits of its row alone."""
    each = row_logprobs(policy, prompt_ids, response_ids)
    return sum(each[t, token] for t, token in enumerate(response_ids.tolist()))


def plain_kl(policy, ref_policy, examples):
    """Each prompt with the response before it; the first with the last."""
    before = [examples[-1], *examples[:-1]]
    with torch.no_grad():
        ratios = [
            plain_logprob(policy, x.prompt_ids, y.response_ids)
            - plain_logprob(ref_policy, x.prompt_ids, y.response_ids)
            for x, y in zip(examples, before, strict=True)
        ]
    return max(0.0, float(sum(ratios)) / len(ratios))


def plain_batch(policy, ref_policy, examples, config=CONFIG, kl=None):
    """The value that is lost, in powers of e, and what is reported."""
    z = plain_kl(policy, ref_policy, examples) if kl is None else kl
    losses, right = [], []
    rewards, logprobs = {True: [], False: []}, {True: [], False: []}
    for x in examples:
        logprob = plain_logprob(policy, x.prompt_ids, x.response_ids)
        reward = config.beta * (
            logprob - plain_logprob(ref_policy, x.prompt_ids, x.response_ids).detach()
        )
        gain = (reward - config.beta * z) * (1 if x.label else -1)
        weight = config.desirable_weight if x.label else config.undesirable_weight
        losses.append(weight * (1 - 1 / (1 + torch.exp(-gain))))
        right.append(float(gain > 0))
        rewards[x.label].append(reward.item())
        logprobs[x.label].append(logprob.item())
    reported = {"kl": z, "accuracy": sum(right) / len(right)}
    for label, name in ((True, "desirable"), (False, "undesirable")):
        for what, found in (("rewards", rewards), ("logprobs", logprobs)):
            if found[label]:
                reported[f"{name}_{what}"] = sum(found[label]) / len(found[label])
    if len(rewards[True]) and len(rewards[False]):
        reported["margin"] = reported["desirable_rewards"] - reported["undesirable_rewards"]
    return sum(losses) / len(losses), reported


@pytest.mark.parametrize("cached", [True, False])
def test_training_is_the_plain_loop(cached):
    policy, plain, ref_policy = small_policy(), small_policy(), small_policy(seed=REF)
    config = replace(CONFIG, epochs=1, learning_rate=RATE, warmup_share=1 / 3,
                     cache_reference=cached)  # fmt: skip
    state = kto.new_state(policy, ref_policy, UNPAIRED, config)
    found = list(kto.train(policy, ref_policy, config, state))

    def loss_of(rows):
        return plain_batch(plain, ref_policy, [UNPAIRED[i] for i in rows], config)

    assert_is_the_plain_loop(found, plain, loss_of, order=shuffled(8, seed=0), rate=RATE)
    assert largest_difference(policy, plain) < FP64
    assert largest_difference(policy, small_policy()) > RATE / 2
    assert max(m["kl"] for m in found) > 0.1  # the reference point is felt
    assert [set(REPORTED) <= m.keys() for m in found] == [True, False, False]  # one label only


def test_what_no_row_of_a_batch_has_is_not_reported():
    policy, ref_policy = small_policy(), small_policy(seed=REF)
    for label, name in ((True, "undesirable"), (False, "desirable")):
        one = [x for x in UNPAIRED if x.label == label]
        found = kto.means(policy, ref_policy, one, CONFIG)
        _, expected = plain_batch(policy, ref_policy, one)
        assert found.pop("loss") > 0
        assert found == pytest.approx(expected, abs=FP64)
        assert not found.keys() & {f"{name}_rewards", f"{name}_logprobs", "margin"}


def one_step(max_tokens):
    policy = small_policy()
    state = State(Optimizer(torch.optim.SGD(policy.parameters(), lr=0.1)), Cursor(UNPAIRED, seed=0))
    config = replace(CONFIG, batch_size=8, max_tokens=max_tokens, cache_reference=False)
    batches, ref_policy = [], small_policy(seed=REF)
    policy.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    return policy, next(kto.train(policy, ref_policy, config, state)), batches


def test_micro_batches_leave_the_kl_and_the_gradient_as_they_are():
    together, metrics, batches = one_step(10_000)
    assert batches == [8, 8]  # the mismatched pairs come first
    apart, split_metrics, batches = one_step(1)
    assert batches == [1] * 16
    assert largest_difference(apart, together) < FP64
    assert metrics["kl"] > 0.1
    for name in ("loss", "grad_norm", *REPORTED):
        assert split_metrics[name] == pytest.approx(metrics[name], abs=FP64)
    assert largest_difference(together, small_policy()) > 1e-3


@pytest.mark.parametrize("cached", [True, False])
def test_a_pass_holds_no_more_than_max_tokens(cached):
    cells = {}
    policy, ref_policy = small_policy(), small_policy(seed=REF)
    for name, model in (("policy", policy), ("reference", ref_policy)):
        model.register_forward_pre_hook(
            lambda _, inputs, name=name: cells.setdefault(name, []).append(inputs[0].ids.numel())
        )
    config = replace(CONFIG, max_tokens=20, batch_size=8, eval_every=1, cache_reference=cached)
    state = kto.new_state(policy, ref_policy, UNPAIRED, config)
    for _ in kto.train(policy, ref_policy, config, state, heldout=UNPAIRED):
        pass
    for sizes in cells.values():
        assert 10 < max(sizes) <= 20
    # Half of the passes are of mismatched pairs, which the reference scores each time.
    looks = len(cells["policy"]) // 4
    assert len(cells["reference"]) == (2 * looks + looks if cached else 4 * looks)


def test_cached_and_live_reference_are_the_same():
    ref_policy = small_policy(seed=REF)
    runs = {}
    for cached in (True, False):
        policy = small_policy()
        # The gradient of a key's bias is 0 but for rounding, and the two may be packed otherwise.
        policy.lm.transformer.h[0].attn.c_attn.bias.requires_grad_(False)
        config = replace(CONFIG, cache_reference=cached)
        state = kto.new_state(policy, ref_policy, UNPAIRED, config)
        assert all((x.ref_logprob is not None) == cached for x in state.cursor.examples)
        steps = kto.train(policy, ref_policy, config, state, heldout=UNPAIRED[:3])
        metrics = [{k: v for k, v in m.items() if not k.startswith("time/")} for m in steps]
        runs[cached] = policy, metrics
    (cached_policy, cached_metrics), (live_policy, live_metrics) = runs[True], runs[False]
    for cached, live in zip(cached_metrics, live_metrics, strict=True):
        assert cached == pytest.approx(live, abs=FP64)
    assert largest_difference(cached_policy, live_policy) < FP64


def test_cache_holds_the_logprob_of_each_row_in_its_place():
    ref_policy = small_policy(seed=REF)
    cached = kto.cache_reference(ref_policy, UNPAIRED, max_tokens=12)
    for x, original in zip(cached, UNPAIRED, strict=True):
        assert x.prompt_ids is original.prompt_ids
        assert x.label == original.label
        expected = plain_logprob(ref_policy, x.prompt_ids, x.response_ids).item()
        assert x.ref_logprob == pytest.approx(expected, abs=FP64)


def test_a_reference_that_is_cached_in_part_is_asked_for_all():
    ref_policy, like = small_policy(seed=REF), torch.empty(0, dtype=torch.float64)
    part = [replace(UNPAIRED[0], ref_logprob=-1.0), UNPAIRED[1]]
    found = kto._reference(ref_policy, part, like=like)
    expected = [plain_logprob(ref_policy, x.prompt_ids, x.response_ids).item() for x in part]
    assert found.tolist() == pytest.approx(expected, abs=FP64)


def test_a_live_start_is_a_tie_of_policy_and_reference():
    policy = small_policy()
    ref_policy = policy.reference()
    config = replace(CONFIG, cache_reference=False, batch_size=8)
    state = kto.new_state(policy, ref_policy, UNPAIRED, config)
    metrics = next(kto.train(policy, ref_policy, config, state))
    expected = kto.first_loss(UNPAIRED, config)
    assert expected == pytest.approx((5 * 1.2 + 3 * 0.7) / 8 / 2, abs=FP64)
    assert metrics["loss"] == pytest.approx(expected, abs=FP64)
    for name in ("accuracy", "margin", "desirable_rewards", "undesirable_rewards", "kl"):
        assert metrics[name] == EXACT


@pytest.mark.parametrize("cached", [True, False])
def test_dropout_is_off(cached):
    policy, ref_policy = small_policy(dropout=0.5), small_policy(dropout=0.5)
    ref_policy.train()  # a reference left so has none either
    config = replace(CONFIG, cache_reference=cached, batch_size=8)
    state = kto.new_state(policy, ref_policy, UNPAIRED, config)
    metrics = next(kto.train(policy, ref_policy, config, state))
    assert policy.training
    assert ref_policy.training
    assert metrics["loss"] == pytest.approx(kto.first_loss(UNPAIRED, config), abs=FP64)
    assert metrics["kl"] == pytest.approx(0.0, abs=FP64)


def test_apo_zero_has_no_reference_point():
    policy, ref_policy, passes = small_policy(), small_policy(seed=REF), []
    config = replace(CONFIG, loss="apo_zero_unpaired")
    policy.register_forward_pre_hook(lambda *_: passes.append(1))
    found = kto.means(policy, ref_policy, UNPAIRED, config)
    assert len(passes) == 1
    loss, expected = plain_batch(policy, ref_policy, UNPAIRED, kl=0.0)
    assert found == pytest.approx({"loss": loss.item(), **expected}, abs=FP64)
    assert found["loss"] != pytest.approx(kto.means(policy, ref_policy, UNPAIRED, CONFIG)["loss"])
    single = replace(config, batch_size=7)  # and one row left, which needs no other
    state = kto.new_state(policy, ref_policy, UNPAIRED, single)
    assert len(list(kto.train(policy, ref_policy, single, state, heldout=UNPAIRED[:1]))) == 4


def test_a_row_alone_has_no_mismatched_pair():
    policy = small_policy()
    new_state = kto.new_state
    with pytest.raises(BadInput, match=r"8 rows in batches of 7 leave .* batch_size, such as 8$"):
        new_state(policy, policy, UNPAIRED, replace(CONFIG, batch_size=7))
    with pytest.raises(BadInput, match="there is one only"):
        new_state(policy, policy, UNPAIRED[:1], CONFIG)
    with pytest.raises(BadInput, match="batch_size is 1; it must be at least 2"):
        replace(CONFIG, batch_size=1)
    state = new_state(policy, policy, UNPAIRED, CONFIG)
    with pytest.raises(BadInput, match="one row is held out"):
        next(kto.train(policy, policy, CONFIG, state, heldout=UNPAIRED[:1]))


def test_evaluate_by_hand():
    policy, ref_policy, modes = small_policy(), small_policy(seed=REF), []
    policy.train().register_forward_pre_hook(lambda model, _: modes.append(model.training))
    found = kto.evaluate(policy, ref_policy, UNPAIRED[:5], CONFIG)
    loss, reported = plain_batch(small_policy(), ref_policy, UNPAIRED[:5])
    expected = {"loss": loss.item(), **reported}
    assert found == pytest.approx({f"eval/{k}": v for k, v in expected.items()}, abs=FP64)
    assert modes == [False, False]
    assert policy.training


def test_what_is_counted_on_the_way_and_when_held_out_rows_are_looked_at():
    policy, ref_policy = small_policy(), small_policy(seed=REF)
    config = replace(CONFIG, eval_every=4)
    state = kto.new_state(policy, ref_policy, UNPAIRED, config)
    found = list(kto.train(policy, ref_policy, config, state, heldout=UNPAIRED[:2]))
    assert ["eval/loss" in m for m in found] == [False, False, False, True, False, True]
    assert [m["epoch"] for m in found] == [3 / 8, 6 / 8, 1.0, 11 / 8, 14 / 8, 2.0]
    taken = [UNPAIRED[i] for i in shuffled(8, seed=1)[:3]]
    assert found[3]["tokens"] == sum(len(x.prompt_ids) + len(x.response_ids) for x in taken)


def unpaired(preferences):
    return [
        UnpairedExample(x.prompt_ids, response, label)
        for x in preferences
        for response, label in ((x.chosen_ids, True), (x.rejected_ids, False))
    ]


def test_training_tells_desirable_from_undesirable():
    policy = small_policy(dtype=torch.float32)
    ref_policy = policy.reference()
    config = kto.KTOConfig(epochs=20, batch_size=8, learning_rate=1e-2, beta=0.5)
    examples = unpaired(PREFERENCES)
    state = kto.new_state(policy, ref_policy, examples, config)
    metrics = list(kto.train(policy, ref_policy, config, state, heldout=examples))[-1]
    assert metrics["eval/accuracy"] == 1.0
    assert metrics["eval/margin"] > 1
    assert metrics["loss"] < 0.25
    assert largest_difference(ref_policy.lm, small_policy(dtype=torch.float32).lm) == EXACT


@pytest.mark.parametrize("label", [True, False])
def test_one_label_alone_raises_or_lowers_what_it_stands_at(label):
    policy = small_policy()
    ref_policy = policy.reference()
    examples = [replace(x, label=label) for x in UNPAIRED]
    state = kto.new_state(policy, ref_policy, examples, replace(CONFIG, batch_size=8))
    last = list(kto.train(policy, ref_policy, replace(CONFIG, batch_size=8), state))[-1]
    assert (last["desirable_rewards"] > 0.05) if label else (last["undesirable_rewards"] < -0.05)


def build():
    policy = small_policy(dtype=torch.float32)
    ref_policy = policy.reference()
    state = kto.new_state(policy, ref_policy, UNPAIRED, CONFIG)
    return (
        policy,
        state,
        lambda: kto.train(policy, ref_policy, CONFIG, state, heldout=UNPAIRED[:3]),
    )


def test_resume():
    assert_resumes(build, steps=6)


def test_determinism():
    assert_deterministic(build)


def test_a_mismatched_pair_needs_room_too():
    policy = small_policy()  # 16 positions
    long_prompt = UnpairedExample(ids(*[RED] * 12), ids(ONE, END), True)
    long_response = UnpairedExample(ids(BIG), ids(*[TWO] * 12, END), False)
    examples = [long_prompt, long_response, UnpairedExample(ids(BALL), ids(END), True)]
    with pytest.raises(
        BadInput, match="12 tokens, and the longest response, 13, do not fit into 16"
    ):
        kto.new_state(policy, policy.reference(), examples, CONFIG)
    kto.new_state(policy, policy, examples, replace(CONFIG, loss="apo_zero_unpaired"))
