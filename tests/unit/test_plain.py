"""A plain model computes as a textbook does: slower, and the same numbers."""

from itertools import islice

import pytest
import torch
from small import (
    PREFERENCES,
    PROMPTS,
    UNPAIRED,
    bert,
    bert_syllables,
    cohere,
    gemma2,
    gpt2,
    gpt2_classifier,
    granite,
    ids,
    largest_difference,
    llama,
    small_policy,
    small_reward_model,
    syllables,
)
from strategies import assert_close, weighted
from tolerances import FP32, FP64
from torch import nn
from transformers.activations import NewGELUActivation

from rlhf_min import dpo, kto, ppo
from rlhf_min import policy as policy_file
from rlhf_min.data import collate
from rlhf_min.harness.cli import RunOptions
from rlhf_min.harness.models import start_policy, start_reward_model
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.harness.stages.run_stage import copy_policy
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.sampling import sample

BATCH = collate(
    [ids(3, 4, 5), ids(6), ids(3, 4, 5), ids(7, 8, 9, 3)],
    [ids(5, 6), ids(7, 8, 9, 1), ids(4), ids(3, 4, 5)],
    pad_id=0,
)
# All but GPT-2 compute their norms in float32, whatever the dtype.
HEADS = pytest.mark.parametrize(
    ("make", "tolerance"),
    [(gpt2, 10 * FP64), (llama, FP32), (gemma2, FP32), (cohere, FP32), (granite, FP32)],
    ids=["gpt2", "llama", "gemma2", "cohere", "granite"],
)
CRITIC = pytest.mark.parametrize("critic", ["none", "shared", "separate"])


def both(make, critic="none"):
    """A plain policy and one that is sped up, of the same weights."""
    pair = [Policy(make(), syllables(), critic=critic, plain=plain) for plain in (True, False)]
    for policy in pair:
        if policy.value_head is not None:
            policy.value_head.weight.data[0] = torch.linspace(-1, 2, policy.value_head.in_features)
    return pair


@HEADS
@CRITIC
def test_outputs_and_gradients_are_the_same(make, tolerance, critic):
    found = []
    for policy in both(make, critic):
        output = policy(BATCH, temperature=0.7, with_logits=True)
        weighted(*(x for x in (output.logprobs, output.values) if x is not None)).backward()
        assert not output.entropy.requires_grad
        numbers = {k: v.detach() for k, v in output._asdict().items() if v is not None}
        numbers |= {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        found.append(numbers)
    plain, fast = found
    assert plain.keys() == fast.keys()
    for name, value in plain.items():
        assert value.abs().max() > 0
        assert_close(value, fast[name], tolerance)


def noting_shapes(name, shapes):
    right = getattr(policy_file, name)

    def noting(x, *rest, **how):
        shapes[name] = tuple(x.shape)
        return right(x, *rest, **how)

    return noting


def test_the_textbooks_functions_are_what_runs(monkeypatch):
    shapes = {}
    for name in ("token_logprobs", "entropy", "lm_head_logits"):
        monkeypatch.setattr(policy_file, name, noting_shapes(name, shapes))
    plain, fast = both(gpt2)
    fast(BATCH)
    assert shapes == {}
    plain(BATCH)
    n, vocabulary = int(BATCH.mask.sum()), plain.vocabulary
    all_positions = (*BATCH.ids.shape, plain.lm.config.hidden_size)
    assert shapes == {
        "lm_head_logits": all_positions,
        "token_logprobs": (n, vocabulary),
        "entropy": (n, vocabulary),
    }


def test_nothing_of_a_plain_model_is_sped_up():
    plain, fast = both(gpt2, critic="separate")

    def activations(policy):
        return {type(m) for m in policy.modules() if "GELU" in type(m).__name__}

    assert (activations(plain), activations(fast)) == ({NewGELUActivation}, {nn.GELU})
    for policy in (plain, plain.reference()):
        assert policy.plain
        assert not any(m.sparse for m in policy.modules() if isinstance(m, nn.Embedding))
    assert not fast.reference().plain
    plain = RewardModel(gpt2_classifier(), syllables(), plain=True)
    assert activations(plain) == {NewGELUActivation}


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_the_same_uniform_numbers_draw_the_same_tokens(make, monkeypatch):
    prompts, found = [ids(3, 4, 5), ids(6), ids(7, 8, 9, 3, 4)] * 10, []
    for policy in both(make):
        caches, trunk = [], type(policy.lm.base_model)
        right = trunk.forward

        def noting(self, *args, right=right, caches=caches, **how):
            caches.append((how["use_cache"], how["input_ids"].shape[1]))
            return right(self, *args, **how)

        with monkeypatch.context() as patch:
            patch.setattr(trunk, "forward", noting)
            rng = torch.Generator().manual_seed(3)
            found.append(sample(policy, prompts, max_new_tokens=6, temperature=0.9, rng=rng))
        steps = range(len(caches))
        # plain reads all tokens again at each step, the other only the new one
        lengths = [5 + t if policy.plain else 1 if t else 5 for t in steps]
        assert caches == [(not policy.plain, length) for length in lengths]
    for plain, fast in zip(*found, strict=True):
        assert torch.equal(plain, fast)
    assert len({len(response) for response in found[0]}) > 1


@pytest.mark.parametrize(
    ("make", "tokenizer"),
    [(bert, bert_syllables), (gpt2_classifier, syllables)],
    ids=["bert", "gpt2"],
)
def test_scores_are_those_of_one_padded_batch(make, tokenizer):
    prompts = ["ba be bi", "bo", "bu " * 20, "ba", "be " * 15]
    responses = ["bo", "bu ba " * 12, "be", "bi", "ba"]
    found, calls = [], []
    for plain in (True, False):
        model = RewardModel(make(), tokenizer(), plain=plain)
        sizes = []
        model.model.register_forward_hook(
            lambda _m, _i, output, sizes=sizes: sizes.append(len(output.logits))
        )
        scores = model(prompts * 8, responses * 8)
        scores.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([scores.detach(), model.score(prompts, responses), *gradients])
        calls.append(sizes[: -1 if plain else None])
    assert calls[0] == [40]
    assert len(calls[1]) > 2
    for plain, fast in zip(*found, strict=True):
        assert_close(plain, fast, 10 * FP64)


def test_the_command_line_asks_for_it(tmp_path):
    save_policy(small_policy(dtype=torch.float32), tmp_path / "policy")
    save_reward_model(small_reward_model(dtype=torch.float32), tmp_path / "reward_model")
    named = {"model": str(tmp_path / "policy"), "reward_model": str(tmp_path / "reward_model")}
    for folders in ({}, named):
        for plain in (True, False):
            options = RunOptions(plain=plain, max_length=12, max_response_tokens=4, **folders)
            policy = start_policy(options, ["red ball"], critic="none", seed=0)
            reward_model = start_reward_model(options, ["red ball"], seed=0)
            copied = copy_policy(policy, critic="shared")
            assert {policy.plain, reward_model.plain, copied.plain} == {plain}


def reward(_prompts, responses):
    return [float(len(response)) for response in responses]


def second(steps):
    """The metrics of the second step: at the first, policy and reference differ by rounding."""
    return list(islice(steps, 2))[-1]


def run_ppo(policy):
    config = ppo.PPOConfig(batch_size=4, minibatch_size=2, max_new_tokens=5, seed=1)
    state = ppo.new_state(policy, PROMPTS, config)
    return second(ppo.train(policy, policy.reference(), reward, config, state))


def run_dpo(policy):
    config = dpo.DPOConfig(batch_size=4, seed=1)
    ref_policy = policy.reference()
    state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
    return second(dpo.train(policy, ref_policy, config, state))


def run_kto(policy):
    config = kto.KTOConfig(batch_size=4, seed=1)
    ref_policy = policy.reference()
    state = kto.new_state(policy, ref_policy, UNPAIRED, config)
    return second(kto.train(policy, ref_policy, config, state))


@pytest.mark.parametrize(
    ("run", "critic"), [(run_ppo, "shared"), (run_dpo, "none"), (run_kto, "none")]
)
def test_steps_are_the_same(run, critic):
    policies, metrics = [], []
    for plain in (True, False):
        policy = small_policy(critic=critic, plain=plain)
        before = [p.detach().clone() for p in policy.parameters()]
        found = run(policy)
        metrics.append({k: v for k, v in found.items() if not k.startswith(("time/", "memory/"))})
        policies.append(policy)
        moved = [(p - q).abs().max() for p, q in zip(policy.parameters(), before, strict=True)]
        assert max(moved) > 1e-6
    assert metrics[0].keys() == metrics[1].keys()
    for name, value in metrics[0].items():
        assert value == pytest.approx(metrics[1][name], rel=10 * FP64, abs=10 * FP64), name
    assert largest_difference(*policies) < 10 * FP64
