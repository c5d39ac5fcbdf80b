"""What must never change a result: how a batch is split, what pads it, in which order it comes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import (
    DEMONSTRATIONS,
    PREFERENCES,
    PROMPTS,
    UNPAIRED,
    WORDS,
    gpt2_classifier,
    largest_difference,
    small_policy,
    small_reward_model,
    syllables,
    text,
    without_time,
)
from strategies import assert_close, assert_rows_are_a_set, tensors
from tolerances import EXACT, FP64

from rlhf_min import data, dpo, grpo, kto, ppo, reward, rloo, rollout, sft
from rlhf_min.config import GRPOConfig, PPOConfig, RLOOConfig
from rlhf_min.data import Cursor
from rlhf_min.kl import kl_estimate
from rlhf_min.logprobs import entropy, lm_head_logits, token_logprobs
from rlhf_min.optim import Optimizer, State
from rlhf_min.policy import scatter_tokens
from rlhf_min.reward_model import RewardModel
from rlhf_min.speed.packing import padded

SCORES = torch.tensor([1.0, -0.5, 2.0, 0.25, -2.0, 0.5, -1.0, 3.0], dtype=torch.float64)
PAIRS = [
    {"prompt": " ".join(WORDS[:p]), "chosen": " ".join(WORDS[-c:]), "rejected": WORDS[p]}
    for p, c in ((1, 3), (4, 1), (2, 5), (6, 2), (3, 3), (1, 6), (5, 2), (2, 1))
]


def descent(module):
    return Optimizer(torch.optim.SGD(module.parameters(), lr=0.1))


# One step of each algorithm over the same 8 rows of unequal lengths. Each returns the module and
# what it reports.


def sft_step():
    policy = small_policy()
    state = State(descent(policy), Cursor(DEMONSTRATIONS, seed=0))
    steps = sft.train(policy, sft.SFTConfig(epochs=1, batch_size=8), state)
    return policy, next(steps)


def reward_step():
    reward_model = small_reward_model()
    pairs, _ = reward.prepare_pairs(reward_model, PAIRS)
    state = State(descent(reward_model), Cursor(pairs, seed=0))
    steps = reward.train(reward_model, reward.RewardConfig(epochs=1, batch_size=8), state)
    return reward_model, next(steps)


def dpo_step(*, pad="<pad>", cached=False):
    policy, ref_policy = padded_with(pad), padded_with(pad, seed=1)
    config = dpo.DPOConfig(epochs=1, batch_size=8, cache_reference=cached)
    pairs = PREFERENCES
    if cached:
        pairs = dpo.cache_reference(ref_policy, PREFERENCES, max_tokens=40)
    state = State(descent(policy), Cursor(pairs, seed=0))
    return policy, next(dpo.train(policy, ref_policy, config, state))


def kto_step(*, pad="<pad>", cached=False):
    policy, ref_policy = padded_with(pad), padded_with(pad, seed=13)
    config = kto.KTOConfig(epochs=1, batch_size=8, cache_reference=cached)
    examples = UNPAIRED
    if cached:
        examples = kto.cache_reference(ref_policy, UNPAIRED, max_tokens=40)
    state = State(descent(policy), Cursor(examples, seed=0))
    found = next(kto.train(policy, ref_policy, config, state))
    assert found["kl"] > 0.1  # it is felt
    return policy, found


def ppo_step(critic, *, pad="<pad>"):
    # The rollout is another policy's, so that some tokens and some values are clipped.
    config = ppo.PPOConfig(batch_size=8, minibatch_size=8)
    found = rollout.score_rollout(
        padded_with(pad, seed=2, critic=critic),
        padded_with(pad, seed=1),
        [x.prompt_ids for x in DEMONSTRATIONS],
        [x.response_ids for x in DEMONSTRATIONS],
        SCORES,
        temperature=1.0,
        kl="full",
        max_tokens=1000,
    )
    policy = padded_with(pad, critic=critic)
    buffer = ppo.judge(found, config, kl_coef=0.1)
    stats = ppo.minibatch_step(policy, descent(policy), buffer, [6, 3, 0, 7, 1, 5, 2, 4], config)
    assert 0 < stats["clip_fraction"] < 1
    assert 0 < stats["value_clip_fraction"] < 1
    return policy, stats


def group_step(algorithm, *, pad="<pad>", **options):
    """As `ppo_step`, with groups of two."""
    configs = {grpo: GRPOConfig, rloo: RLOOConfig}
    config = configs[algorithm](batch_size=8, minibatch_size=8, group_size=2, **options)
    rollout_of_another = rollout.score_rollout(
        padded_with(pad, seed=2),
        padded_with(pad, seed=1),
        [x.prompt_ids for x in DEMONSTRATIONS],
        [x.response_ids for x in DEMONSTRATIONS],
        SCORES,
        temperature=1.0,
        kl="full",
        max_tokens=1000,
    )
    policy = padded_with(pad)
    buffer = algorithm.judge(rollout_of_another, config)
    rows = [6, 3, 0, 7, 1, 5, 2, 4]
    stats = algorithm.minibatch_step(policy, descent(policy), buffer, rows, config)
    assert 0 < stats["clip_fraction"] < 1
    return policy, stats


def padded_with(pad, **options):
    policy = small_policy(**options)
    policy.tokenizer.pad_token = pad
    return policy


STEPS = pytest.mark.parametrize(
    "step",
    [
        sft_step,
        reward_step,
        dpo_step,
        lambda: dpo_step(cached=True),
        kto_step,
        lambda: kto_step(cached=True),
        lambda: ppo_step("shared"),
        lambda: ppo_step("separate"),
        lambda: group_step(grpo),
        lambda: group_step(grpo, loss_mean="token", mask_cut=True),
        lambda: group_step(rloo),
    ],
    ids="sft,reward,dpo,dpo cached,kto,kto cached,ppo shared,ppo separate,grpo,dapo,rloo".split(
        ","
    ),
)


# Splitting


@STEPS
def test_micro_batches_of_every_size_give_the_gradient_of_the_whole(step, monkeypatch):
    # Rows as they come, not sorted by length: micro-batches of unequal rows, and of unequal tokens.
    sizes = []

    def slices(lengths, *, max_tokens, among=1):  # noqa: ARG001
        sizes.append(size)
        return [list(range(8))[i : i + size] for i in range(0, 8, size)]

    for module in (data, dpo, kto, rollout):
        monkeypatch.setattr(module, "micro_batches", slices)
    size = 8
    whole, expected = step()
    for size in (1, 2, 4):
        split, found = step()
        assert sizes[-1] == size
        assert largest_difference(split, whole) < FP64
        assert without_time(found) == pytest.approx(without_time(expected), rel=FP64, abs=FP64)
    assert float(expected["grad_norm"]) > 1e-2  # it is a step


# Padding


@pytest.mark.parametrize(
    "step",
    [dpo_step, lambda pad: dpo_step(pad=pad, cached=True), kto_step]
    + [lambda pad, critic=critic: ppo_step(critic, pad=pad) for critic in ("shared", "separate")]
    + [lambda pad, module=module: group_step(module, pad=pad) for module in (grpo, rloo)],
    ids=["dpo", "dpo cached", "kto", "ppo shared", "ppo separate", "grpo", "rloo"],
)
def test_eos_is_as_good_a_pad_as_any(step):
    # Of the 8 rows all but one end in EOS: a mask made from ids would lose it.
    policy, found = step(pad="<pad>")
    other, other_found = step(pad="<end>")
    assert (policy.pad_id, other.pad_id) == (1, 0)
    assert other.tokenizer.eos_token_id == 0
    assert largest_difference(policy, other) == EXACT
    assert without_time(found) == without_time(other_found)


def test_a_rollout_padded_with_eos_is_the_same():
    def collected(pad):
        return rollout.collect(
            padded_with(pad, critic="shared"),
            padded_with(pad, seed=1),
            lambda _prompts, responses: [float(len(response)) for response in responses],
            PROMPTS * 3,
            PPOConfig(max_new_tokens=10, temperature=0.8, kl="full", max_tokens=40),
            rng=torch.Generator().manual_seed(0),
        )

    found, other = collected("<pad>"), collected("<end>")
    assert found.responses == other.responses
    assert_close(found.mask, other.mask, EXACT)
    assert 0 < int(found.ended.sum()) < 24
    for name in ("scores", "ended", "logprobs", "ref_logprobs", "kl", "entropy", "values"):
        assert_close(getattr(found, name), getattr(other, name), EXACT)


def test_a_gpt2_that_scores_is_padded_by_any_token():
    # Where EOS is the pad, the classifier reads the token before it, alone and in a batch alike.
    prompts = [text(range(n)) for n in (1, 5, 2, 3)]
    responses = [text(range(n, n + k)) for n, k in ((9, 4), (2, 1), (7, 6), (4, 2))]
    together = {}
    for pad in ("<pad>", "<eos>", "<unk>"):
        model = RewardModel(gpt2_classifier(), syllables(pad=pad))
        together[pad] = model.score(prompts, responses)
        alone = [model.score([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
        assert_close(together[pad], torch.stack(alone), FP64)
    assert_close(together["<unk>"], together["<pad>"], EXACT)


# Order


@given(tensors(4, 3), tensors(4, 3), tensors(5, 3), st.permutations(range(4)))
def test_what_is_done_to_each_row_knows_no_order(x, other, weight, order):
    order, tokens = torch.tensor(order), torch.tensor([0, 2, 1, 2])
    mask = torch.tensor([[True] * n + [False] * (3 - n) for n in (2, 3, 1, 2)])
    assert_rows_are_a_set(entropy, x, order=order)
    assert_rows_are_a_set(token_logprobs, x, tokens, order=order)
    assert_rows_are_a_set(
        lambda x: lm_head_logits(x, weight, bias=None, softcap=2.0, scale=0.5, temperature=0.7),
        x,
        order=order,
    )
    for kind in ("k1", "abs", "k2", "k3"):
        assert_rows_are_a_set(
            lambda x, y, kind=kind: kl_estimate(x, y, kind=kind), x, other, order=order
        )
    assert_rows_are_a_set(lambda x, mask: scatter_tokens(x[mask], mask), x, mask, order=order)


# Gradient: where it flows, and where it must not


def test_the_shift_and_its_inverse_carry_gradient_to_their_own_cells():
    batch = data.collate(
        [x.prompt_ids for x in DEMONSTRATIONS[:3]],
        [x.response_ids for x in DEMONSTRATIONS[:3]],
        pad_id=0,
    )
    hidden = torch.linspace(-1, 1, batch.ids.numel() * 2, dtype=torch.float64)
    hidden = hidden.reshape(*batch.ids.shape, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: scatter_tokens(h.flatten(0, 1)[padded(batch).at].prod(-1), batch.mask), (hidden,)
    )


@pytest.mark.parametrize("cached", [True, False])
def test_dpo_hands_no_gradient_to_the_reference(cached):
    policy, ref_policy = small_policy(), small_policy(seed=1)
    assert all(p.requires_grad for p in ref_policy.parameters())  # though nothing froze it
    pairs = PREFERENCES
    if cached:
        pairs = dpo.cache_reference(ref_policy, PREFERENCES, max_tokens=40)
    found = dpo.batch_loss(policy, ref_policy, pairs, dpo.DPOConfig())
    found.loss.backward()
    assert all(p.grad is None for p in ref_policy.parameters())
    assert any(p.grad is not None for p in policy.parameters())
    assert [name for name, x in found._asdict().items() if x.requires_grad] == ["loss"]


@pytest.mark.parametrize("algorithm", [ppo, grpo, rloo])
def test_no_gradient_goes_to_whoever_only_judged(algorithm):
    critic = "shared" if algorithm is ppo else "none"
    sampler, ref_policy = small_policy(seed=2, critic=critic), small_policy(seed=1)
    found = rollout.score_rollout(
        sampler,
        ref_policy,
        [x.prompt_ids for x in DEMONSTRATIONS],
        [x.response_ids for x in DEMONSTRATIONS],
        SCORES,
        temperature=1.0,
        kl="full",
        max_tokens=40,
    )
    config = {ppo: PPOConfig, grpo: GRPOConfig, rloo: RLOOConfig}[algorithm](
        batch_size=8, minibatch_size=8
    )
    more = {"kl_coef": 0.1} if algorithm is ppo else {}
    buffer = algorithm.judge(found, config, **more)
    for x in (buffer.rewards, buffer.advantages, buffer.returns, found.logprobs, found.values):
        assert not x.requires_grad
    policy = small_policy(critic=critic)
    algorithm.minibatch_step(policy, descent(policy), buffer, list(range(8)), config)
    for model in (sampler, ref_policy):
        assert all(p.grad is None for p in model.parameters())
