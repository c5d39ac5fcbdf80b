"""What is faster is the same."""

import torch
from small import small_policy, word_tokenizer
from strategies import assert_close
from tiny import llama, policy
from tolerances import FP64
from torch import nn
from torch.profiler import profile
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from rlhf_min.data import collate
from rlhf_min.policy import Policy
from rlhf_min.speed.fast import fuse_gelu, make_tied_gradient_sparse


def gpt2() -> GPT2LMHeadModel:
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
    lm, ids = gpt2(), torch.tensor([[3, 7, 3, 9]])
    dense = gradient_of(lm, ids)
    make_tied_gradient_sparse(lm)
    assert lm.transformer.wte.sparse
    found = gradient_of(lm, ids)
    assert not found.is_sparse
    assert_close(found / dense.abs().max(), dense / dense.abs().max(), FP64)


def test_only_a_tied_weight_has_a_sparse_part():
    # alone it would stay sparse, which no clipping and no AdamW takes
    lm = policy(llama()).lm
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
