"""What is faster is the same."""

import copy

import pytest
import torch
from small import (
    PAD,
    bert,
    bert_syllables,
    gpt2,
    llama,
    policy_of,
    small_policy,
    syllables,
    token_rows,
    word_tokenizer,
)
from strategies import assert_close, weighted
from tolerances import EXACT, FP64
from torch import nn
from torch.profiler import profile
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from rlhf_min.data import collate
from rlhf_min.errors import BadInput
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.speed.fast import fuse_gelu, make_tied_gradient_sparse


def tied_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=50, n_positions=8, n_layer=2, n_embd=8, n_head=2)
    return GPT2LMHeadModel(config).double().eval()


def gradient_of(lm: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    lm.zero_grad()
    lm(input_ids=ids).logits.square().sum().backward()
    return lm.get_input_embeddings().weight.grad.clone()


def test_the_fused_activation_is_gpt2s_own():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    holder = nn.ModuleDict({"act": NewGELUActivation()})
    own = holder["act"](x)
    (own_gradient,) = torch.autograd.grad(own.sum(), x)
    fuse_gelu(holder)
    fused = holder["act"](x)
    (gradient,) = torch.autograd.grad(fused.sum(), x)
    assert type(holder["act"]) is nn.GELU
    assert_close(fused, own, FP64)
    assert_close(gradient, own_gradient, FP64)


def test_a_sparse_part_leaves_the_gradient_of_a_tied_weight_as_it_is():
    lm, ids = tied_gpt2(), torch.tensor([[3, 7, 3, 9]])
    dense = gradient_of(lm, ids)
    make_tied_gradient_sparse(lm)
    assert lm.transformer.wte.sparse
    found = gradient_of(lm, ids)
    assert not found.is_sparse
    assert_close(found / dense.abs().max(), dense / dense.abs().max(), FP64)


def test_only_a_tied_weight_has_a_sparse_part():
    # alone it would stay sparse, which no clipping and no AdamW takes
    lm = policy_of(llama()).lm
    assert lm.get_output_embeddings().weight is not lm.get_input_embeddings().weight
    assert not lm.get_input_embeddings().sparse


def test_a_separate_critic_has_a_dense_gradient_of_its_own():
    # made of a language model that a policy has had before
    model = Policy(small_policy().lm, word_tokenizer(), critic="separate")
    model.value_head.weight.data[0] = torch.linspace(-1, 2, 16)  # unequal: a norm comes before
    batch = collate([torch.tensor([2, 3])], [torch.tensor([4, 5, 0])], pad_id=1)
    output = model(batch)
    (output.logprobs.sum() + output.values.sum()).backward()
    gradient = model.critic_trunk.get_input_embeddings().weight.grad
    assert not gradient.is_sparse
    assert gradient.any(1).nonzero()[:, 0].tolist() == [2, 3, 4, 5]  # EOS predicts nothing


def test_the_parts_of_a_tied_gradient_are_added_in_place():
    model = small_policy(dtype=torch.float32)
    weight = model.lm.get_output_embeddings().weight
    batch = collate([torch.tensor([2, 3])], [torch.tensor([4, 5, 0])], pad_id=1)
    loss = model(batch).logprobs.sum()
    with profile(record_shapes=True) as record:
        loss.backward()
    sizes = {
        (event.key, tuple(shape))
        for event in record.key_averages(group_by_input_shape=True)
        for shape in event.input_shapes
    }
    assert ("aten::add_", tuple(weight.shape)) in sizes
    assert ("aten::copy_", tuple(weight.shape)) not in sizes


# Gradient checkpointing

BATCH = collate(token_rows([3, 1, 5], seed=10), token_rows([2, 6, 1], seed=11), pad_id=PAD)
TEXTS = (["ba be", "bi", "bo bu ba"], ["be", "bi bo bu", ""])


def gradients(model, loss, seed=0):
    """Of all parameters in train mode, with dropout drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss(model.train()).backward()
    return [p.grad for p in model.parameters()]


def policy_loss(model):
    found = model(BATCH)
    return weighted(found.logprobs) + (0 if found.values is None else weighted(found.values))


@pytest.mark.parametrize("critic", ["none", "shared", "separate"])
@pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)
def test_checkpointed_gradients_of_a_policy_are_the_same(make, critic):
    plain, checkpointed = (policy_of(make(dropout=0.1), critic=critic) for _ in range(2))
    checkpointed.checkpoint_gradients()
    calls = count_calls([m for m in checkpointed.modules() if type(m).__name__.endswith("MLP")])
    found = gradients(checkpointed, policy_loss)
    trunks = 2 if critic == "separate" else 1
    assert len(calls) == 2 * 2 * trunks  # each of two layers forward, and again for backward
    for now, then in zip(found, gradients(plain, policy_loss), strict=True):
        assert_close(now, then, FP64)


def test_checkpointed_gradients_of_a_reward_model_are_the_same():
    plain, checkpointed = (RewardModel(bert(dropout=0.1), bert_syllables()) for _ in range(2))
    checkpointed.checkpoint_gradients()
    layers = [m for m in checkpointed.modules() if type(m).__name__ == "BertIntermediate"]
    calls = count_calls(layers)
    found = gradients(checkpointed, lambda model: weighted(model(*TEXTS)))
    assert len(calls) == 2 * len(layers)
    plain_gradients = gradients(plain, lambda model: weighted(model(*TEXTS)))
    for now, then in zip(found, plain_gradients, strict=True):
        assert_close(now, then, FP64)


def count_calls(modules):
    calls = []
    for module in modules:
        module.register_forward_pre_hook(lambda module, _inputs: calls.append(module))
    return calls


def checkpoints(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_checkpointing_is_kept_by_copies_and_left_out_in_eval_mode():
    model = policy_of(gpt2())
    model.checkpoint_gradients()
    for each in (
        copy.deepcopy(model),
        Policy(copy.deepcopy(model.lm), syllables(), critic="separate"),
    ):
        trunks = [each.lm, *([] if each.critic_trunk is None else [each.critic_trunk])]
        assert all(checkpoints(trunk) for trunk in trunks)
    reference = model.reference()
    calls = count_calls([m for m in reference.modules() if type(m).__name__.endswith("MLP")])
    assert_close(reference(BATCH).logprobs, policy_of(gpt2())(BATCH).logprobs.detach(), EXACT)
    assert len(calls) == 2


def test_a_model_without_checkpointing_is_refused():
    model = policy_of(gpt2())
    model.lm.supports_gradient_checkpointing = False
    with pytest.raises(BadInput, match="GPT2LMHeadModel has no gradient checkpointing") as raised:
        model.checkpoint_gradients()
    assert "\n" not in str(raised.value)
