"""Packed rows: where everything lies, and that no number depends on it."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import ids, word_tokenizer
from strategies import assert_close
from tolerances import FP32, FP64
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf_min.data import Sequences, collate
from rlhf_min.policy import Policy
from rlhf_min.speed.fast import can_pack
from rlhf_min.speed.forward import layout_of
from rlhf_min.speed.packing import first_fit, packed, padded

SIZES = {"vocab_size": 10, "bos_token_id": 0, "eos_token_id": 0}
ROPE = SIZES | {
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_positions=64, n_layer=2, n_embd=12, n_head=2, **SIZES),
    "llama": LlamaConfig(**ROPE),
    "qwen2": Qwen2Config(**ROPE),
    "qwen3": Qwen3Config(**ROPE, head_dim=6),
}


def two_families() -> Sequences:
    """The drawing in packing.py: prompt 5 6 with two responses, prompt 7 8 with one."""
    return collate([ids(5, 6), ids(5, 6), ids(7, 8)], [ids(1, 2, 3), ids(4, 3), ids(9)], pad_id=0)


def random_batch(rng: torch.Generator, rows: int) -> Sequences:
    """Prompts of 1 to 6 tokens, some of them equal, with responses of 1 to 7."""

    def draw(longest: int) -> torch.Tensor:
        length = int(torch.randint(1, longest + 1, (), generator=rng))
        return torch.randint(2, 10, (length,), generator=rng)

    prompts = [draw(6) for _ in range(rows)]
    prompts = [prompts[int(torch.randint(0, i + 1, (), generator=rng))] for i in range(rows)]
    return collate(prompts, [draw(7) for _ in range(rows)], pad_id=0)


def random_policy(config: PreTrainedConfig, attention: str = "sdpa") -> Policy:
    config = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()
        for parameter in lm.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return Policy(lm.eval(), word_tokenizer(), critic="shared")


def test_padded_by_hand():
    batch = collate([ids(5, 5, 5), ids(5)], [ids(5, 5), ids(5, 5, 5)], pad_id=0)
    # rows of 5 cells; P = 3 and 1: predicted at 2, 3 and at 0, 1, 2
    assert padded(batch).at.tolist() == [2, 3, 5, 6, 7]


def test_packed_by_hand():
    layout = packed(two_families(), width=9)
    assert layout.inputs["input_ids"].tolist() == [[5, 6, 1, 2, 4, 7, 8]]
    assert layout.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert layout.at.tolist() == [1, 2, 3, 1, 4, 6]
    sees = [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 4],  # the second response: its prompt and itself
        [5],
        [5, 6],
    ]
    mask = layout.inputs["attention_mask"][0, 0]
    assert [row.nonzero()[:, 0].tolist() for row in mask] == sees


def test_prompts_that_differ_in_one_token_are_two():
    prompts = [ids(5, 6), ids(5, 7), ids(4, 6)]
    layout = packed(collate(prompts, [ids(1, 2), ids(1, 2), ids(1, 2)], pad_id=0), width=9)
    assert layout.inputs["input_ids"].tolist() == [[5, 6, 1, 5, 7, 1, 4, 6, 1]]
    assert layout.at.tolist() == [1, 2, 4, 5, 7, 8]


def test_many_responses_to_one_prompt_are_no_row_without_end():
    # Rows of 2 + 3 tokens before the last: two of 5 and 3 fill 8 of 10, a third would make 11.
    batch = collate([ids(5, 6)] * 5, [ids(1, 2, 3, 4)] * 5, pad_id=0)
    layout = packed(batch, width=1)
    assert layout.inputs["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 2, 3, 4],
        [0, 1, 2, 3, 4, 2, 3, 4],
        [0, 1, 2, 3, 4, 0, 0, 0],
    ]
    first = [1, 2, 3, 4, 1, 5, 6, 7]
    assert layout.at.tolist() == [*first, *(8 + i for i in first), 17, 18, 19, 20]


def test_a_wide_row_holds_all_responses_to_a_prompt():
    batch = collate([ids(5, 6)] * 5, [ids(1, 2, 3, 4)] * 5, pad_id=0)
    layout = packed(batch, width=17)
    assert layout.inputs["position_ids"].tolist() == [[0, 1, *[2, 3, 4] * 5]]


def test_packed_rows_have_their_own_padding():
    # 5 tokens and 2 into rows of 5: the second row has 3 cells that nobody reads
    layout = packed(two_families(), width=1)
    assert layout.inputs["input_ids"].tolist() == [[5, 6, 1, 2, 4], [7, 8, 0, 0, 0]]
    assert layout.at.tolist() == [1, 2, 3, 1, 4, 6]
    mask = layout.inputs["attention_mask"][1, 0]
    assert not mask[:2, 2:].any()
    assert not mask[2:, :2].any()
    assert mask.any(1).all()  # a softmax over nothing would be NaN


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("width", [1, 20, 1000])
def test_packing_changes_no_value_and_no_gradient(config, width, monkeypatch):
    # All but GPT-2 compute their norms in float32, whatever the dtype.
    tolerance = FP64 if config.model_type == "gpt2" else FP32
    batch = random_batch(torch.Generator().manual_seed(width), 9)
    policy = random_policy(config)
    assert can_pack(policy.lm)

    def found(layout):
        monkeypatch.setattr("rlhf_min.speed.forward.layout_of", lambda _, b: layout(b))
        policy.zero_grad()
        output = policy(batch, temperature=0.7)
        (output.logprobs.square().sum() + output.values.square().sum()).backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
        outputs = {k: v for k, v in output._asdict().items() if v is not None}
        return {**outputs, **gradients}

    policy.value_head.weight.data.fill_(0.1)
    plain, dense = found(padded), found(lambda b: packed(b, width=width))
    for name, value in plain.items():
        scale = float(value.detach().abs().max()) + 1
        assert_close(dense[name] / scale, value / scale, tolerance)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 60))
def test_first_fit_fills_its_bins(sizes, width):
    bins = first_fit(sizes, width=width)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in members) for members in bins]
    assert max(filled) <= width
    assert sum(2 * total < width for total in filled) <= 1


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**ROPE, sliding_window=8),
        Qwen2Config(**ROPE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ],
    ids=["mistral", "qwen2 with windows"],
)
def test_a_model_with_a_sliding_window_is_not_packed(config):
    policy = random_policy(config)
    assert not can_pack(policy.lm)
    assert "position_ids" not in layout_of(policy.lm, two_families()).inputs


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_model_whose_frequencies_follow_the_longest_row_is_not_packed(rope):
    sizes = ROPE | {"max_position_embeddings": 4, "original_max_position_embeddings": 4}
    config = LlamaConfig(**sizes, rope_parameters={"rope_theta": 10_000.0, **rope})
    policy = random_policy(config)
    assert not can_pack(policy.lm)
    assert "position_ids" not in layout_of(policy.lm, two_families()).inputs


def test_a_model_whose_attention_takes_no_mask_of_truth_values_is_not_packed():
    assert not can_pack(random_policy(CONFIGS["gpt2"], attention="eager").lm)


def test_a_policy_packs_where_it_can():
    # 5 and 2 tokens: a third of the width, 4, is less than the longest row
    layout = layout_of(random_policy(CONFIGS["gpt2"]).lm, two_families())
    assert layout.inputs["input_ids"].shape == (2, 5)
