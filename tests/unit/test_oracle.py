"""A world in which nothing has to be estimated: two words, EOS, and responses of three tokens.

There are 15 responses: 7 end by EOS, the empty one among them, and 8 are cut. Each expectation is
a sum over them, and the probabilities in it are read off the plain logits of one row at a time.
"""

import math
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from small import EOS, gpt2_config, row_logprobs, seeded, weights
from strategies import assert_close
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerances import FP64
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_min import dpo, ppo
from rlhf_min.config import PPOConfig
from rlhf_min.data import PreferenceExample, PromptExample
from rlhf_min.kl import kl_estimate
from rlhf_min.optim import Optimizer
from rlhf_min.policy import Policy
from rlhf_min.rollout import collect, score_rollout

VOCABULARY = {"a": 0, "<eos>": EOS, "b": 2}
PROMPT = torch.tensor([2])
LONGEST = 3
RESPONSES = [
    torch.tensor(tokens)
    for n in range(1, LONGEST + 1)
    for tokens in product(VOCABULARY.values(), repeat=n)
    if EOS not in tokens[:-1] and (n == LONGEST or tokens[-1] == EOS)
]
LENGTHS = torch.tensor([len(response) for response in RESPONSES])
# With r = ln(worth), the Bradley-Terry probability sigmoid(r - r') is worth / (worth + worth'), a
# ratio of whole numbers: so many copies of a pair and of its reverse are its exact label.
WORTH = [1, 2, 1, 3, 4, 1, 2, 4, 3, 4, 1, 3, 2, 4, 1]
REWARDS = torch.tensor(WORTH, dtype=torch.float64).log()
BETA = 0.5
SAMPLES = 25_000
ERRORS = 3  # standard errors that a seeded estimate may be off

CONFIG = ppo.PPOConfig(
    batch_size=SAMPLES,
    minibatch_size=SAMPLES,
    max_new_tokens=LONGEST,
    max_tokens=4000,
    kl_coef=BETA,
    gamma=1.0,
    lam=1.0,
    whiten_advantages=False,
)


def word_tokenizer():
    """One token for each word; EOS is the pad token too."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def small_gpt2(seed, *, critic="none"):
    """A float64 GPT-2 of one layer and three tokens; its value head, if any, is new and so 0."""
    config = gpt2_config(len(VOCABULARY))
    config.n_layer = 1
    return Policy(seeded(lambda: GPT2LMHeadModel(config), seed), word_tokenizer(), critic=critic)


def table(_prompts, responses):
    """The reward of each text. The 15 responses have 15 texts: EOS is not written, yet a text of
    less than three words can only have ended by it."""
    texts = map(small_gpt2(0).decode, RESPONSES)
    reward = dict(zip(texts, REWARDS.tolist(), strict=True))
    assert len(reward) == len(RESPONSES)
    return [reward[response] for response in responses]


# What is known exactly


def taken(rows, response):
    """Of the rows (T, V), the entries of the response's own tokens, (T,)."""
    return rows[torch.arange(len(response)), response]


def exact_logprobs(policy):
    """Log-probability of each of the 15 responses."""
    return torch.stack(
        [taken(row_logprobs(policy, PROMPT, response), response).sum() for response in RESPONSES]
    )


def divergence(logp, other):
    return (logp.exp() * (logp - other)).sum()


def exact_objective(logp, ref_logp):
    """J = sum_y pi(y) [r(y) - beta log(pi(y) / ref(y))], what PPO and DPO maximise."""
    return (logp.exp() * (REWARDS - BETA * (logp - ref_logp))).sum()


def optimum(ref_logp):
    """log of pi* = ref exp(r / beta) / Z, and beta log Z, the value of J there."""
    tilted = ref_logp + REWARDS / BETA
    return tilted.log_softmax(0), BETA * tilted.logsumexp(0)


def gradient_of(value, policy):
    """With respect to the language model, as one vector."""
    gradients = torch.autograd.grad(value, list(policy.lm.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def kl_by_hand(kind, ours, theirs, response):
    """Of the rows (T, V) of both models: what `kind` charges the whole response for."""
    d = taken(ours - theirs, response)
    return {
        "k1": d,
        "abs": d.abs(),
        "k2": d**2 / 2,
        "k3": (-d).exp() - 1 + d,
        "full": (ours.exp() * (ours - theirs)).sum(-1),
    }[kind].sum()


def charges(policy, ref_policy, kind):
    """`kl_by_hand` of each of the 15 responses."""
    return torch.stack(
        [
            kl_by_hand(kind, *(row_logprobs(m, PROMPT, y) for m in (policy, ref_policy)), y)
            for y in RESPONSES
        ]
    ).detach()


# What is tried


def every_response(policy, ref_policy, *, kl="k1"):
    """A judged rollout of each response once."""
    rollout = score_rollout(
        policy,
        ref_policy,
        [PROMPT] * len(RESPONSES),
        RESPONSES,
        REWARDS,
        temperature=1.0,
        kl=kl,
        max_tokens=CONFIG.max_tokens,
    )
    return ppo.judge(rollout, CONFIG, kl_coef=BETA)


def gradient_of_one_epoch(policy, buffer):
    """What the language model is moved by, down the loss at rate 1, in one step over all rows.

    The value loss is part of that loss. It moves the head alone, since a new head is 0 and hands
    nothing down to the trunk.
    """
    before = weights(policy.lm)
    descent = Optimizer(torch.optim.SGD(policy.parameters(), lr=1.0))
    ppo.ppo_epoch(policy, descent, buffer, torch.arange(len(buffer.rollout.sequences)), CONFIG)
    assert descent.steps == 1
    return torch.cat([(before[n] - now).flatten() for n, now in weights(policy.lm).items()])


@pytest.fixture(autouse=True, scope="module")
def _many_rows_at_once():
    """The sampler's chunks decide its speed, not what it draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_min.speed.cache.ROWS_AT_ONCE", 1000)
        yield


@pytest.fixture(scope="module")
def sampled():
    """25,000 responses, charged with the KL of the whole vocabulary."""
    return collect(
        small_gpt2(0, critic="shared"),
        small_gpt2(1),
        table,
        [PromptExample("b", PROMPT)] * SAMPLES,
        PPOConfig(max_new_tokens=LONGEST, kl="full", max_tokens=CONFIG.max_tokens),
        rng=torch.Generator().manual_seed(0),
    )


# The world


def test_the_15_responses_are_all_there_are():
    assert len(RESPONSES) == 15
    for seed in (0, 1):
        assert_close(exact_logprobs(small_gpt2(seed)).exp().sum().detach(), 1.0, FP64)


# Policy gradient


@pytest.mark.eq("shape_rewards")
@pytest.mark.eq("gae")
@pytest.mark.eq("ppo_policy")
@pytest.mark.parametrize("kl", ["k1", "abs", "k2", "k3", "full"])
def test_the_expected_update_is_the_gradient_of_the_objective(kl):
    # One row for each response, and its probability as a factor of its advantages: the loss, in
    # which the advantages are linear, becomes an expectation. It is a mean over the 41 tokens of
    # these rows and is descended, so the update is -1/41 of a gradient:
    #   sum_y pi(y) sum_t grad log pi(y_t) [r(y) - beta (kl_t + ... + kl_T)]
    # A token cannot change what was charged before it: grad log pi(y_t) has mean 0 given y_<t, so
    # the sum may as well run over all of the response. With the charge held fixed this is
    #   grad of  sum_y pi(y) [r(y) - beta * fixed kl(y)]
    policy, ref_policy = small_gpt2(0, critic="shared"), small_gpt2(1)
    buffer = every_response(policy, ref_policy, kl=kl)
    logp, ref_logp = exact_logprobs(policy), exact_logprobs(ref_policy).detach()
    charged = charges(policy, ref_policy, kl)
    fixed = gradient_of((logp.exp() * (REWARDS - BETA * charged)).sum(), policy)
    true = gradient_of(exact_objective(exact_logprobs(policy), ref_logp), policy)

    weighed = replace(buffer, advantages=buffer.advantages * logp.detach().exp()[:, None])
    update = gradient_of_one_epoch(policy, weighed)
    assert int(LENGTHS.sum()) == 41
    assert_close(-41 * update, fixed, FP64)
    # The derivative of log(pi / ref) itself has mean 0, so holding k1 fixed loses nothing. The
    # others depend on pi in ways that do not average out; "full" does not even see which token
    # was taken, so that a token is never charged for its own KL, only for what comes after it.
    if kl == "k1":
        assert_close(-41 * update, true, FP64)
    else:
        assert float((fixed - true).norm() / true.norm()) > 0.01


def test_the_update_of_a_large_rollout_is_the_gradient_of_the_objective(sampled):
    policy, ref_policy = small_gpt2(0, critic="shared"), small_gpt2(1)
    logp, ref_logp = exact_logprobs(policy), exact_logprobs(ref_policy).detach()
    true = gradient_of(exact_objective(logp, ref_logp), policy)
    charge = kl_estimate(sampled.logprobs, sampled.ref_logprobs, kind="k1")
    buffer = ppo.judge(replace(sampled, kl=charge), CONFIG, kl_coef=BETA)
    update = gradient_of_one_epoch(small_gpt2(0, critic="shared"), buffer)

    assert torch.cosine_similarity(-update, true, dim=0) > 0.999
    # The loss is a mean over tokens, not over responses: the factor between them is the mean
    # length. Along the true gradient, each response contributes its own share, with mean 1.
    shares = []
    for response, reward in zip(RESPONSES, REWARDS, strict=True):
        ours, theirs = (taken(row_logprobs(m, PROMPT, response), response)
                        for m in (policy, ref_policy))  # fmt: skip
        to_come = reward - BETA * (ours - theirs).detach().flip(0).cumsum(0).flip(0)
        shares.append(gradient_of((to_come * ours).sum(), policy) @ true / (true @ true))
    mean, error = mean_and_error(logp.detach(), torch.stack(shares))
    assert_close(mean, 1.0, FP64)
    found = -update * sampled.lengths.double().mean()
    assert abs(found @ true / (true @ true) - 1) < ERRORS * error


# Sampling, and what a rollout reports


def mean_and_error(logp, x):
    """Of a number x for each response: its mean, and the standard error of the mean of SAMPLES."""
    mean = (logp.exp() * x).sum()
    return mean, ((logp.exp() * (x - mean) ** 2).sum() / SAMPLES).sqrt()


def test_every_response_is_sampled_as_often_as_it_is_probable(sampled):
    counts = Counter(
        tuple(ids[:n])
        for ids, n in zip(
            sampled.sequences.responses.tolist(), sampled.lengths.tolist(), strict=True
        )
    )
    logp = exact_logprobs(small_gpt2(0)).detach()
    assert set(counts) == {tuple(response.tolist()) for response in RESPONSES}
    for response, p in zip(RESPONSES, logp.exp().tolist(), strict=True):
        found = counts[tuple(response.tolist())] / SAMPLES
        assert abs(found - p) < ERRORS * math.sqrt(p * (1 - p) / SAMPLES)


@pytest.mark.eq("kl")
@pytest.mark.eq("exact_kl")
def test_what_a_rollout_reports_is_what_is_true(sampled):
    policy, ref_policy = small_gpt2(0), small_gpt2(1)
    logp, ref_logp = exact_logprobs(policy).detach(), exact_logprobs(ref_policy).detach()
    of_each = {
        "score": REWARDS,
        "k1": charges(policy, ref_policy, "k1"),
        "k3": charges(policy, ref_policy, "k3"),
        "kl": charges(policy, ref_policy, "full"),
        "reward": REWARDS - BETA * charges(policy, ref_policy, "full"),
        "response_length": LENGTHS.double(),
        "eos_rate": torch.tensor([float(y[-1] == EOS) for y in RESPONSES], dtype=torch.float64),
    }
    report = ppo.report(ppo.judge(sampled, CONFIG, kl_coef=BETA))
    errors = {}
    for name, x in of_each.items():
        mean, errors[name] = mean_and_error(logp, x)
        assert abs(report[name] - mean) < ERRORS * errors[name]
        if name in ("k1", "k3", "kl"):  # all three are the KL of whole responses
            assert_close(mean, divergence(logp, ref_logp), FP64)
    assert errors["kl"] < errors["k3"] < errors["k1"]


# The optimum


def assert_objective_is_lost_by_the_divergence(policy, ref_policy):
    """J(pi) = beta log Z - beta KL(pi || pi*): what is not yet gained is the way that is left.

    J is taken from the rewards that PPO makes, the other side from plain logits.
    """
    logp, ref_logp = exact_logprobs(policy).detach(), exact_logprobs(ref_policy).detach()
    best, value = optimum(ref_logp)
    objective = (logp.exp() * every_response(policy, ref_policy).rewards.sum(1)).sum()
    assert_close(objective, value - BETA * divergence(logp, best), FP64)
    assert_close(exact_objective(best, ref_logp), value, FP64)


def distance(policy, ref_policy):
    best, _ = optimum(exact_logprobs(ref_policy).detach())
    return divergence(exact_logprobs(policy).detach(), best).item()


@pytest.mark.eq("dpo")
def test_dpo_ends_at_the_optimum():
    # The start is not the reference: the optimum depends on the reference alone.
    policy, ref_policy = small_gpt2(0), small_gpt2(1)
    assert distance(policy, ref_policy) > 0.5
    assert_objective_is_lost_by_the_divergence(policy, ref_policy)
    pairs = [
        PreferenceExample(PROMPT, chosen, rejected)
        for chosen, worth in zip(RESPONSES, WORTH, strict=True)
        for rejected in RESPONSES
        if rejected is not chosen
        for _ in range(worth)
    ]
    config = dpo.DPOConfig(
        epochs=80, batch_size=len(pairs), learning_rate=1e-2, beta=BETA, max_tokens=4000
    )
    state = dpo.new_state(policy, ref_policy, pairs, config)
    assert len(list(dpo.train(policy, ref_policy, config, state))) == 80
    assert distance(policy, ref_policy) < 0.001
    assert_objective_is_lost_by_the_divergence(policy, ref_policy)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_ppo_ends_at_the_optimum(critic):
    policy, ref_policy = small_gpt2(0, critic=critic), small_gpt2(1)
    assert distance(policy, ref_policy) > 0.5
    config = ppo.PPOConfig(
        steps=40,
        batch_size=512,
        minibatch_size=128,
        max_new_tokens=LONGEST,
        max_tokens=4000,
        learning_rate=3e-3,
        kl="k1",
        kl_coef=BETA,
        kl_control="fixed",
        critic=critic,
    )
    state = ppo.new_state(policy, [PromptExample("b", PROMPT)] * 512, config)
    assert len(list(ppo.train(policy, ref_policy, table, config, state))) == 40
    assert distance(policy, ref_policy) < 0.02
    assert_objective_is_lost_by_the_divergence(policy, ref_policy)
