"""The sampler against full forward passes without cache and padding, one row at a time."""

import contextlib
import copy
import inspect
import math
import warnings
from collections import Counter, OrderedDict
from itertools import accumulate, product

import pytest
import torch
from small import (
    CAUSAL,
    EOS,
    PAD,
    generator,
    gpt2,
    llama,
    llama_like,
    policy_of,
    seeded,
    token_rows,
)
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    RwkvConfig,
)

from rlhf_min.data import collate
from rlhf_min.errors import BadInput, Diverged
from rlhf_min.sampling import (
    _inverse_cdf,
    below_one,
    sample,
    widest_float,
)
from rlhf_min.speed.cache import CACHE_NAMES, cache_bytes, rows_at_once

EDGE = 1e-12  # from an edge of the cdf, where float32 would be 1e-8 off
FEW = 5  # tokens in the vocabulary, so that EOS comes now and then
PROMPTS = token_rows([3, 1, 7, 2, 5, 1], seed=20, vocabulary=FEW)


def wide_heads():
    """Heads whose width is not the model's over their number."""
    config = LlamaConfig(**llama_like(), head_dim=6)
    return seeded(lambda: LlamaForCausalLM(config))


def draw(model, prompts, *, tokens=8, temperature=1.0, seed=0):
    found = sample(
        model, prompts, max_new_tokens=tokens, temperature=temperature, rng=generator(seed)
    )
    return [row.tolist() for row in found]


@torch.no_grad()
def distribution(lm, ids, temperature=1.0):
    """Of the token after these ids, by one full pass without cache."""
    logits = lm(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    return (logits / temperature).softmax(-1).tolist()


def drawn_by_hand(lm, prompt, uniforms, temperature):
    """Walk along the probabilities until they exceed the uniform number; no cache, no padding."""
    response = []
    for u in uniforms:
        cdf = accumulate(distribution(lm, prompt + response, temperature))
        token = next(v for v, total in enumerate(cdf) if total > u)
        response.append(token)
        if token == EOS:
            break
    return response


@CAUSAL
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_each_row_is_what_the_row_alone_draws_by_hand(make, temperature):
    lm = make(vocabulary=FEW)
    prompts = token_rows([3, 1, 7, 2, 5, 1] * 3, seed=23, vocabulary=FEW)
    uniforms = torch.rand(18, 9, generator=generator(), dtype=torch.float64).tolist()
    expected = [
        drawn_by_hand(lm, prompt.tolist(), row, temperature)
        for prompt, row in zip(prompts, uniforms, strict=True)
    ]
    assert draw(policy_of(lm), prompts, tokens=9, temperature=temperature) == expected
    # the case has rows that end early, at different times, and rows that are cut
    assert len({len(row) for row in expected}) >= 3
    assert any(row[-1] == EOS for row in expected)
    assert any(row[-1] != EOS for row in expected)


def test_a_uniform_number_on_an_edge_takes_the_next_token():
    # probabilities 0, 1/2, 0, 1/2, 0: the edges are 0 and 1/2, and none of the zeros is ever drawn
    logits = torch.tensor([-math.inf, 1.0, -math.inf, 1.0, -math.inf]).expand(5, 5)
    uniforms = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert _inverse_cdf(logits, uniforms).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_largest_uniform_number_draws_no_impossible_token(dtype):
    # The probabilities add up to less than the number, and the last token has none.
    below_one = 1 - torch.finfo(dtype).eps / 2
    logits = torch.arange(40, dtype=dtype).sin()
    ends = {n: logits[:n].softmax(-1).cumsum(-1)[-1].item() for n in range(2, 40)}
    short = [n for n, end in ends.items() if end <= below_one]
    assert short
    for n in short:
        row = torch.cat([logits[:n], logits.new_tensor([-math.inf])])[None]
        assert _inverse_cdf(row, torch.tensor([below_one], dtype=dtype)).tolist() == [n - 1]


def test_no_uniform_number_is_rounded_up_to_1(monkeypatch):
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert below_one(largest, torch.device("cpu")).tolist() == [1 - 2.0**-53]
    assert widest_float(torch.device("mps")) == torch.float32
    monkeypatch.setattr("rlhf_min.sampling.widest_float", lambda _: torch.float32)
    assert below_one(largest, torch.device("cpu")).tolist() == [1 - 2.0**-24]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_of_the_logits_moves_no_edge(dtype):
    logits = torch.linspace(-2, 3, 50).to(dtype)
    weights = [math.exp(z) for z in logits.tolist()]
    edges = [total / sum(weights) for total in accumulate(weights)][:-1]
    below, above = (
        torch.tensor([e + d for e in edges], dtype=torch.float64) for d in (-EDGE, EDGE)
    )
    rows = logits.expand(49, 50)
    assert _inverse_cdf(rows, below).tolist() == list(range(49))
    assert _inverse_cdf(rows, above).tolist() == list(range(1, 50))


@CAUSAL
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_are_the_exact_probabilities(make, temperature):
    # tokens 0, EOS = 1, 2; all 15 responses of at most 3 tokens, two prompts of unequal length
    lm, rows = make(seed=3, vocabulary=3), 4000
    prompts = [[2], [0, 2, 2, 0]]
    sampled = draw(
        policy_of(lm),
        [torch.tensor(prompt) for prompt in prompts] * rows,
        tokens=3,
        temperature=temperature,
    )
    for k, prompt in enumerate(prompts):
        exact = {}
        for n in (1, 2, 3):
            for response in product(range(3), repeat=n):
                if EOS in response[:-1] or (n < 3 and response[-1] != EOS):
                    continue
                steps = [
                    distribution(lm, prompt + list(response[:t]), temperature)[response[t]]
                    for t in range(n)
                ]
                exact[response] = math.prod(steps)
        assert len(exact) == 15
        assert sum(exact.values()) == pytest.approx(1, abs=1e-9)
        counts = Counter(tuple(row) for row in sampled[k::2])
        assert set(counts) <= set(exact)
        for response, p in exact.items():
            standard_error = math.sqrt(p * (1 - p) / rows)
            assert abs(counts[response] / rows - p) < 4 * standard_error + 1 / rows
        chi_square = sum((counts[r] - rows * p) ** 2 / (rows * p) for r, p in exact.items())
        assert chi_square < 36.1  # 14 degrees of freedom: exceeded once in 1000


@CAUSAL
def test_a_low_temperature_is_greedy_decoding(make):
    lm = make(vocabulary=FEW)
    expected = []
    for prompt in PROMPTS:
        ids = prompt.tolist()
        while len(ids) < len(prompt) + 8 and EOS not in ids[len(prompt) :]:
            p = distribution(lm, ids)
            ids.append(p.index(max(p)))
        expected.append(ids[len(prompt) :])
    assert draw(policy_of(lm), PROMPTS, temperature=1e-6) == expected


@CAUSAL
def test_a_row_does_not_depend_on_what_the_others_do(make):
    model = policy_of(make(vocabulary=FEW))
    first = draw(model, PROMPTS)
    others = [PROMPTS[0], *token_rows([9, 2, 1, 4], seed=24, vocabulary=FEW), PROMPTS[5]]
    second = draw(model, others)
    assert (first[0], first[5]) == (second[0], second[5])
    assert first[1:5] != second[1:5]


def test_the_generator_alone_decides():
    model = policy_of(gpt2(vocabulary=FEW))
    torch.manual_seed(0)
    first = draw(model, PROMPTS, seed=5)
    before = torch.get_rng_state()
    assert draw(model, PROMPTS, seed=5) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(model, PROMPTS, seed=6) != first
    rng = generator(5)
    both = [sample(model, PROMPTS, max_new_tokens=8, temperature=1.0, rng=rng) for _ in range(2)]
    assert [row.tolist() for row in both[0]] == first
    assert [row.tolist() for row in both[1]] != first  # it goes on, it does not start again


def test_rows_end_at_the_first_eos_or_at_the_limit():
    found = draw(
        policy_of(gpt2(vocabulary=FEW)), token_rows([2] * 60, seed=22, vocabulary=FEW), tokens=6
    )
    for row in found:
        assert EOS not in row[:-1]
        assert len(row) == 6 or row[-1] == EOS
    assert {len(row) for row in found} == {1, 2, 3, 4, 5, 6}
    assert all(len(row) == 1 for row in draw(policy_of(gpt2(vocabulary=FEW)), PROMPTS, tokens=1))


def test_how_many_rows_are_sampled_at_once_changes_nothing(monkeypatch):
    model = policy_of(gpt2(vocabulary=FEW))
    expected = draw(model, PROMPTS)
    monkeypatch.setattr("rlhf_min.speed.cache.ROWS_AT_ONCE", 2)  # each row keeps its own numbers
    assert draw(model, PROMPTS) == expected


def test_the_cache_takes_no_more_room_than_the_weights(monkeypatch):
    model = policy_of(gpt2())
    config, dtype = model.lm.config, model.lm.dtype
    row = 5 * 2 * config.n_layer * config.n_embd * dtype.itemsize  # of 5 tokens
    weights = sum(p.nbytes for p in model.lm.parameters())
    assert rows_at_once(model.lm, 5) == 128
    monkeypatch.setattr("rlhf_min.speed.cache.SMALL_CACHE", 0)
    assert 1 < rows_at_once(model.lm, 5) == weights // row < 128
    monkeypatch.setattr("rlhf_min.speed.cache.SMALL_CACHE", 2 * weights)
    assert rows_at_once(model.lm, 5) == 2 * weights // row
    assert rows_at_once(model.lm, 10**9) == 1


@pytest.mark.parametrize("make", [gpt2, llama, wide_heads], ids=lambda make: make.__name__)
def test_a_tokens_keys_and_values_are_as_large_as_the_model_makes_them(make):
    lm = make().float()
    with torch.no_grad():
        cache = lm(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    kept = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert cache_bytes(lm) == kept / 3


def test_rows_at_once_have_room_for_prompt_and_response(monkeypatch):
    model, sizes = policy_of(gpt2(vocabulary=FEW)), []
    model.lm.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr("rlhf_min.speed.cache.SMALL_CACHE", 0)
    draw(model, PROMPTS * 6, tokens=7)
    weights = sum(p.nbytes for p in model.lm.parameters())
    longest = 7 + 7  # a prompt, and a response
    assert max(sizes) == weights // (longest * cache_bytes(model.lm)) < 20


def test_it_stops_when_every_row_has_ended_and_carries_only_rows_that_go_on():
    model, sizes = policy_of(gpt2(vocabulary=FEW)), []
    model.lm.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ends = [len(row) for row in draw(model, PROMPTS, tokens=50)]
    assert max(ends) < 50
    assert sizes == [sum(end > t for end in ends) for t in range(max(ends))]


@pytest.mark.parametrize("pad", [PAD, EOS, 4, None])
def test_what_pads_the_prompts_changes_nothing(pad):
    model = policy_of(gpt2(vocabulary=FEW))
    expected = draw(model, PROMPTS)
    model.tokenizer.pad_token_id = pad
    assert draw(model, PROMPTS) == expected


def test_ids_are_longs_on_the_cpu_without_gradient():
    model = policy_of(gpt2(vocabulary=FEW))
    for row in sample(model, PROMPTS, max_new_tokens=2, temperature=1.0, rng=generator()):
        assert (row.dtype, row.device.type, row.requires_grad) == (torch.long, "cpu", False)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_sampling_and_the_mode_comes_back(training):
    model = policy_of(gpt2(vocabulary=FEW, dropout=0.5))
    expected = draw(policy_of(gpt2(vocabulary=FEW)), PROMPTS)
    weights = copy.deepcopy(model.state_dict())
    assert draw(model.train(training), PROMPTS) == expected
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(now, weights[name]) for name, now in model.state_dict().items())


def test_log_probabilities_of_the_policy_are_those_of_its_samples():
    # tokens were drawn by inverse cdf: u lies between the cdf before and after the token
    model, temperature = policy_of(llama(vocabulary=FEW)), 0.8
    uniforms = torch.rand(6, 8, generator=generator(), dtype=torch.float64)
    responses = [torch.tensor(row) for row in draw(model, PROMPTS, temperature=temperature)]
    batch = collate(PROMPTS, responses, pad_id=PAD)
    with torch.no_grad():
        p = model(batch, temperature=temperature, with_logits=True).logits.softmax(-1)
        logprobs = model(batch, temperature=temperature).logprobs[batch.mask]
    upper = p.cumsum(-1).gather(-1, batch.responses[batch.mask][:, None])[:, 0]
    rows, t = batch.mask.nonzero(as_tuple=True)
    assert (uniforms[rows, t] < upper + 1e-9).all()
    assert (uniforms[rows, t] >= upper - logprobs.exp() - 1e-9).all()


def test_a_policy_that_gives_nan_is_refused():
    lm = gpt2()
    made = policy_of(lm)
    with torch.no_grad():
        lm.transformer.wte.weight[5] = float("nan")  # one token, which no prompt holds
    with pytest.raises(Diverged, match="the policy gives NaN while sampling"):
        draw(made, [torch.tensor([2, 3])])


# Names that transformers has changed, and models that keep something else


class Renamed(torch.nn.Module):
    """A trunk as another version of transformers has it: one name for the cache, and no other."""

    def __init__(self, trunk, name):
        super().__init__()
        self.trunk, self.name = trunk, name

    def forward(self, input_ids, attention_mask, position_ids, use_cache, **cached):
        assert cached.keys() <= {self.name}
        found = self.trunk(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{name: cached[self.name] for name in CACHE_NAMES & OWN_NAMES if cached},
        )
        [cache] = [found[name] for name in CACHE_NAMES & found.keys()]
        return Output(last_hidden_state=found.last_hidden_state, **{self.name: cache})


class Output(OrderedDict):
    """Like that of a model."""

    @property
    def last_hidden_state(self):
        return self["last_hidden_state"]


# What the installed version calls it.
OWN_NAMES = set(inspect.signature(LlamaModel.forward).parameters)


@pytest.mark.parametrize("name", sorted(CACHE_NAMES))
def test_the_cache_is_found_by_its_old_and_its_new_name(name, monkeypatch):
    model = policy_of(llama(vocabulary=FEW))
    uniforms = torch.rand(6, 8, generator=generator(), dtype=torch.float64).tolist()
    expected = [
        drawn_by_hand(model.lm, prompt.tolist(), row, 1.0)
        for prompt, row in zip(PROMPTS, uniforms, strict=True)
    ]
    renamed = Renamed(model.lm.model, name)
    monkeypatch.setattr(type(model.lm), "base_model", property(lambda _: renamed))
    found = None
    with contextlib.suppress(BadInput):
        found = draw(model, PROMPTS)
    assert found == expected


def test_no_name_is_used_that_will_go():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in (gpt2, llama):
            draw(policy_of(make(vocabulary=FEW)), PROMPTS)


SMALL = {"vocab_size": FEW, "hidden_size": 16, "bos_token_id": EOS, "eos_token_id": EOS}
STATES = {"num_hidden_layers": 2, "state_size": 4}


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(**SMALL, **STATES),
        FalconMambaConfig(**SMALL, **STATES),
        RwkvConfig(**SMALL, num_hidden_layers=2, attention_hidden_size=16),
        OpenAIGPTConfig(vocab_size=FEW, n_embd=16, n_layer=2, n_head=2),
        # some layers of attention, some with states of which no row can be taken out
        Lfm2Config(
            **SMALL,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            layer_types=["conv", "full_attention"],
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_without_keys_and_values_is_refused(config):
    lm = AutoModelForCausalLM.from_config(config).eval()
    name = type(lm).__name__
    with pytest.raises(BadInput, match=f"^{name} has no key-value cache to sample with; use an "):
        draw(policy_of(lm), PROMPTS[:1])  # at once, not when a row is to be taken out


def test_a_sliding_window_leaves_the_right_keys():
    # Prompts of up to 7 tokens and responses of 9, of which a token sees itself and two others.
    config = MistralConfig(**llama_like(FEW), sliding_window=3)
    lm = seeded(lambda: MistralForCausalLM(config))
    uniforms = torch.rand(6, 9, generator=generator(), dtype=torch.float64).tolist()
    expected = [
        drawn_by_hand(lm, prompt.tolist(), row, 1.0)
        for prompt, row in zip(PROMPTS, uniforms, strict=True)
    ]
    assert draw(policy_of(lm), PROMPTS, tokens=9) == expected
    assert len(set(map(len, expected))) > 1
