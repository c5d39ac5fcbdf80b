"""The policy against its own full logits, taken row by row without padding."""

import copy

import pytest
import torch
from small import (
    CAUSAL,
    EOS,
    PAD,
    WIDTH,
    bert,
    cohere,
    gemma2,
    gpt2,
    granite,
    llama,
    policy_of,
    stacked,
    syllables,
    token_rows,
)
from strategies import assert_close, weighted
from tolerances import EXACT, FP32, FP64
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from rlhf_min.data import collate
from rlhf_min.policy import Policy, disable_dropout, evaluating, scatter_tokens

HEADS = pytest.mark.parametrize(
    "make", [gpt2, llama, gemma2, cohere, granite], ids=lambda make: make.__name__
)
PROMPTS = token_rows([3, 1, 5, 2], seed=10)
RESPONSES = token_rows([2, 6, 1, 4], seed=11, eos=True)
BATCH = collate(PROMPTS, RESPONSES, pad_id=PAD)


def row_logits(lm, row, *, temperature=1.0):
    """The model's own logits of one row without padding, where they predict its response."""
    ids = torch.cat([PROMPTS[row], RESPONSES[row]])[None]
    logits = lm(ids).logits[0] / temperature
    first = len(PROMPTS[row]) - 1  # index P - 1 predicts response token 0
    return torch.stack([logits[first + t] for t in range(len(RESPONSES[row]))])


def row_logprobs(lm, row, *, temperature=1.0):
    logp = row_logits(lm, row, temperature=temperature).log_softmax(-1)
    return torch.stack([logp[t, token] for t, token in enumerate(RESPONSES[row].tolist())])


def row_values(trunk, head, row):
    ids = torch.cat([PROMPTS[row], RESPONSES[row]])[None]
    hidden = trunk(ids).last_hidden_state[0]
    first = len(PROMPTS[row]) - 1
    return torch.stack(
        [hidden[first + t] @ head.weight[0] + head.bias[0] for t in range(len(RESPONSES[row]))]
    )


# Policy.forward


@HEADS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_the_model_itself(make, temperature):
    model = policy_of(make())
    with torch.no_grad():
        found = model(BATCH, temperature=temperature)
        logprobs = stacked(row_logprobs(model.lm, b, temperature=temperature) for b in range(4))
        entropies = []
        for b in range(4):
            p = row_logits(model.lm, b, temperature=temperature).softmax(-1)
            entropies.append(torch.special.entr(p).sum(-1))
    assert_close(found.logprobs, logprobs, FP64)
    assert_close(found.entropy, stacked(entropies), FP64)
    assert found.values is None


@pytest.mark.parametrize("chunk_tokens", [1024, 3])
@pytest.mark.parametrize(
    ("make", "tolerance"),
    # Llama's norms are computed in float32 in every model
    [(gpt2, 10 * FP64), (llama, FP32)],
    ids=["gpt2", "llama"],
)
def test_gradients_are_those_of_the_plain_computation(make, tolerance, chunk_tokens, monkeypatch):
    monkeypatch.setattr("rlhf_min.speed.forward.CHUNK_TOKENS", chunk_tokens)
    model = policy_of(make(), critic="shared")
    parameters = list(model.parameters())
    found = model(BATCH, temperature=0.7)
    gradients = torch.autograd.grad(weighted(found.logprobs, found.values), parameters)
    plain = weighted(
        stacked(row_logprobs(model.lm, b, temperature=0.7) for b in range(4)),
        stacked(row_values(model.lm.base_model, model.value_head, b) for b in range(4)),
    )
    for now, expected in zip(gradients, torch.autograd.grad(plain, parameters), strict=True):
        assert now.abs().max() > 0
        assert_close(now, expected, tolerance)


@CAUSAL
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_values_are_the_head_on_the_hidden_state_before_each_token(make, critic):
    model = policy_of(make(), critic=critic)
    with torch.no_grad():
        trunk = model.lm.base_model if critic == "shared" else model.critic_trunk
        expected = stacked(row_values(trunk, model.value_head, b) for b in range(4))
        assert_close(model(BATCH).values, expected, FP64)


@CAUSAL
def test_a_row_alone_is_the_row_in_a_batch(make):
    model = policy_of(make(), critic="shared")
    with torch.no_grad():
        together = model(BATCH)
        for b in range(4):
            alone = model(collate([PROMPTS[b]], [RESPONSES[b]], pad_id=PAD))
            for one, all_rows in zip(alone[:3], together[:3], strict=True):
                assert_close(one[0], all_rows[b, : len(RESPONSES[b])], FP64)


@CAUSAL
def test_padding_ids_never_matter(make):
    model = policy_of(make(), critic="separate")
    with torch.no_grad():
        first = model(BATCH)[:3]
        for pad_id in (EOS, 17, 31):
            other = model(collate(PROMPTS, RESPONSES, pad_id=pad_id))[:3]
            for now, then in zip(other, first, strict=True):
                assert_close(now, then, EXACT)
    for found in first:
        assert (found[~BATCH.mask] == 0).all()


@HEADS
def test_token_logits(make):
    model = policy_of(make())
    with torch.no_grad():
        expected = torch.cat([row_logits(model.lm, b, temperature=0.7) for b in range(4)])
        assert_close(model(BATCH, temperature=0.7, with_logits=True).logits, expected, FP64)


def test_scatter_tokens_by_hand():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert_close(scatter_tokens(x, mask), x.new_tensor([[1, 0, 0], [2, 3, 0]]), EXACT)


# The value head


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_new_value_head_is_zero(critic):
    values = Policy(gpt2(), syllables(), critic=critic)(BATCH).values
    assert_close(values, torch.zeros(BATCH.mask.shape, dtype=torch.float64), EXACT)


def test_a_separate_critic_starts_as_a_copy_with_weights_of_its_own():
    model = Policy(gpt2(), syllables(), critic="separate")
    trunk = dict(model.lm.base_model.named_parameters())
    for name, parameter in model.critic_trunk.named_parameters():
        assert_close(parameter, trunk[name], EXACT)
        assert parameter.data_ptr() != trunk[name].data_ptr()


@CAUSAL
def test_a_separate_critic_and_the_policy_share_no_gradient(make):
    model = policy_of(make(), critic="separate")
    trunk, critic = list(model.lm.parameters()), list(model.critic_trunk.parameters())
    found = model(BATCH)

    def reached(output, parameters):
        gradients = torch.autograd.grad(
            weighted(output), parameters, allow_unused=True, retain_graph=True
        )
        return [g is not None and bool(g.any()) for g in gradients]

    assert not any(reached(found.values, trunk))
    assert all(reached(found.values, critic))
    assert not any(reached(found.logprobs, critic))
    assert all(reached(found.logprobs, trunk))


def test_a_shared_critic_reaches_the_trunk_but_not_the_vocabulary():
    model = policy_of(llama(), critic="shared")
    model(BATCH).values.sum().backward()
    assert model.lm.lm_head.weight.grad is None
    assert all(p.grad.any() for n, p in model.lm.model.named_parameters() if "embed" not in n)


def test_float64_stays_float64_and_half_precision_gives_float32():
    for dtype, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ]:
        model = Policy(gpt2().to(dtype), syllables(), critic="shared")
        assert [x.dtype for x in model(BATCH, with_logits=True)] == [expected] * 4
        assert model.value_head.weight.dtype == expected


def test_pad_id_and_decode():
    assert Policy(gpt2(), syllables()).pad_id == 0
    assert Policy(gpt2(), syllables(pad=None)).pad_id == 1
    ids = torch.tensor([3, 4, 0, 5, 1])  # ba be <pad> bi <eos>
    assert Policy(gpt2(), syllables()).decode(ids) == "ba be bi"
    assert Policy(gpt2(), syllables()).decode(torch.tensor([1])) == ""


# The reference


def test_the_reference_is_frozen_and_stays_what_it_was():
    model = policy_of(gpt2(dropout=0.3), critic="shared").train()
    before = copy.deepcopy(model).eval()
    reference = model.reference()
    assert not any(p.requires_grad for p in reference.parameters())
    assert not reference.training
    assert reference.value_head is None
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(BATCH).logprobs.sum().backward()
    optimizer.step()
    assert not torch.equal(model.eval()(BATCH).logprobs, before(BATCH).logprobs)
    for mode in (False, True):
        assert_close(reference.train(mode)(BATCH).logprobs, before(BATCH).logprobs.detach(), EXACT)


def test_making_a_reference_leaves_the_policys_dropout():
    model = policy_of(gpt2(dropout=0.3)).train()
    model.reference()
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(model(BATCH).logprobs, model(BATCH).logprobs)


# disable_dropout


def opt():
    config = OPTConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=WIDTH,
        dropout=0.1,
    )
    return OPTForCausalLM(config).double()


def bloom():
    config = BloomConfig(vocab_size=32, hidden_size=WIDTH, n_layer=2, n_head=2, hidden_dropout=0.1)
    return BloomForCausalLM(config).double()


@pytest.mark.parametrize(
    "make",
    [
        lambda: gpt2(dropout=0.1),
        lambda: llama(dropout=0.1),
        lambda: bert(dropout=0.1),
        opt,  # its dropout is a number, not a module
        bloom,
    ],
    ids=["gpt2", "llama", "bert", "opt", "bloom"],
)
def test_without_dropout_train_mode_is_eval_mode(make):
    model = make().train()
    said = model.config.to_dict()
    ids = torch.cat([PROMPTS[1], RESPONSES[1]])[None] % 30

    def logits():
        return model(ids).logits

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(logits(), logits())
        disable_dropout(model)
        first = logits()
        assert_close(logits(), first, EXACT)
    assert_close(first, model.eval()(ids).logits, FP64)
    assert model.config.to_dict() == said


# evaluating


class Interruption(Exception):
    pass


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_evaluating_restores_each_mode_even_after_an_error(modes):
    models = [torch.nn.Sequential(torch.nn.Dropout(0.5)).train(mode) for mode in modes]
    x = torch.ones(100, requires_grad=True)

    def look():
        with evaluating(*models):
            for model in models:
                assert torch.equal(model(x), x)
                assert not (2 * model(x)).requires_grad
        raise Interruption

    def fail():
        with evaluating(*models):
            raise Interruption

    for act in (look, fail):
        with pytest.raises(Interruption):
            act()
        assert [model.training for model in models] == list(modes)
        assert [model[0].training for model in models] == list(modes)
        assert torch.is_grad_enabled()


def test_a_look_restores_the_mode_of_every_module():
    model = policy_of(gpt2(dropout=0.1))
    model.train()
    model.lm.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
