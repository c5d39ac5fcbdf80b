"""A row that a model has no room for: one line, before anything is computed."""

from dataclasses import replace

import pytest
import torch
from small import (
    BALL,
    BIG,
    DEMONSTRATIONS,
    END,
    ONE,
    PREFERENCES,
    PROMPTS,
    RED,
    VOCABULARY,
    StubTokenizer,
    ids,
    seeded,
    small_policy,
)
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf_min import dpo, grpo, kto, ppo, rloo, sft
from rlhf_min.config import GRPOConfig, RLOOConfig
from rlhf_min.data import (
    PreferenceExample,
    PromptExample,
    SFTExample,
    UnpairedExample,
    collate,
)
from rlhf_min.errors import BadInput
from rlhf_min.evaluation import evaluate_policies
from rlhf_min.loading.checks import positions_of
from rlhf_min.policy import Policy
from rlhf_min.rollout import score_rollout
from rlhf_min.sampling import sample

RESPONSE = ids(BIG, BALL, END)  # of 3 tokens; the model has 16 positions and 10 tokens
NEW = 3
EMPTY = torch.zeros(0, dtype=torch.long)


def rng():
    return torch.Generator().manual_seed(0)


def sampled(policy, prompt):
    sample(policy, [ids(RED), prompt], max_new_tokens=NEW, temperature=1.0, rng=rng())


def forward(policy, prompt):
    policy(collate([ids(RED), prompt], [RESPONSE, RESPONSE], pad_id=END))


def logits(policy, prompt):
    batch = collate([ids(RED), prompt], [RESPONSE, RESPONSE], pad_id=END)
    assert policy(batch, with_logits=True).logits is not None


def scored(policy, prompt):
    how = {"temperature": 1.0, "kl": "k1", "max_tokens": 8}
    rows = [ids(RED), prompt], [RESPONSE, RESPONSE]
    score_rollout(policy, policy.reference(), *rows, torch.zeros(2), **how)


def evaluated(policy, prompt):
    evaluate_policies(
        {"ours": policy},
        policy.reference(),
        lambda _prompts, responses: [0.0] * len(responses),
        [*PROMPTS, PromptExample("", prompt)],
        [],
        baseline="ours",
        monitors={},
        max_new_tokens=NEW,
        max_tokens=64,
        seed=0,
    )


def sft_state(policy, prompt):
    sft.new_state(policy, [*DEMONSTRATIONS, SFTExample(prompt, RESPONSE)], sft.SFTConfig())


def sft_heldout(policy, prompt):
    state = sft.new_state(policy, DEMONSTRATIONS, sft.SFTConfig())
    next(sft.train(policy, sft.SFTConfig(), state, heldout=[SFTExample(prompt, RESPONSE)]))


def dpo_state(policy, prompt):
    pair = PreferenceExample(prompt, ids(END), RESPONSE)
    dpo.new_state(policy, policy.reference(), [*PREFERENCES, pair], dpo.DPOConfig())


def dpo_heldout(policy, prompt):
    config = dpo.DPOConfig(cache_reference=False)
    state = dpo.new_state(policy, policy.reference(), PREFERENCES, config)
    pair = PreferenceExample(prompt, RESPONSE, ids(END))
    next(dpo.train(policy, policy.reference(), config, state, heldout=[pair]))


SHORT = [UnpairedExample(x.prompt_ids, ids(END), True) for x in DEMONSTRATIONS]


def kto_state(policy, prompt):
    row = UnpairedExample(prompt, RESPONSE, False)
    kto.new_state(policy, policy.reference(), [*SHORT, row], kto.KTOConfig())


def kto_heldout(policy, prompt):
    config = kto.KTOConfig(cache_reference=False)
    state = kto.new_state(policy, policy.reference(), SHORT, config)
    rows = [UnpairedExample(prompt, RESPONSE, True), SHORT[0]]
    next(kto.train(policy, policy.reference(), config, state, heldout=rows))


PPO = ppo.PPOConfig(batch_size=4, minibatch_size=2, max_new_tokens=NEW)


def ppo_state(policy, prompt):
    ppo.new_state(policy, [*PROMPTS, PromptExample("", prompt)], PPO)


def ppo_eval(policy, prompt):
    state = ppo.new_state(policy, PROMPTS, PPO)
    other = [PromptExample("", prompt)]
    next(ppo.train(policy, policy.reference(), constant, PPO, state, eval_prompts=other))


GROUPS = {"batch_size": 4, "minibatch_size": 2, "max_new_tokens": NEW, "group_size": 2}
GROUP_CONFIGS = {grpo: GRPOConfig(**GROUPS), rloo: RLOOConfig(**GROUPS)}


def grpo_state(policy, prompt, *, module=grpo):
    policy.value_head = None
    module.new_state(policy, [*PROMPTS, PromptExample("", prompt)], GROUP_CONFIGS[module])


def rloo_eval(policy, prompt, *, module=rloo):
    policy.value_head = None
    config, other = GROUP_CONFIGS[module], [PromptExample("", prompt)]
    state = module.new_state(policy, PROMPTS, config)
    next(module.train(policy, policy.reference(), constant, config, state, eval_prompts=other))


def rloo_state(policy, prompt):
    grpo_state(policy, prompt, module=rloo)


def grpo_eval(policy, prompt):
    rloo_eval(policy, prompt, module=grpo)


def constant(_prompts, responses):
    return [0.0] * len(responses)


ENTRIES = [
    *(sampled, forward, logits, scored, evaluated),
    *(sft_state, sft_heldout, dpo_state, dpo_heldout, kto_state, kto_heldout),
    *(ppo_state, ppo_eval, grpo_state, grpo_eval, rloo_state, rloo_eval),
]


@pytest.fixture
def untouched(monkeypatch):
    """A policy that must not be asked to compute anything."""
    policy, ref_policy = small_policy(critic="shared"), small_policy()
    monkeypatch.setattr(policy, "reference", lambda *_: ref_policy)

    def never(*_args, **_inputs):
        raise AssertionError("computed before it was checked")

    monkeypatch.setattr(type(policy.lm.transformer), "forward", never)
    return policy


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (ids(*[RED] * 14), "do not fit into the 16 positions of GPT2LMHeadModel"),
        (ids(RED, 10), "id 10 is none of the 10 that GPT2LMHeadModel has embeddings for"),
        (ids(-1, RED), "id -1 is none of the 10"),
        (EMPTY, "at least one"),
    ],
    ids=["too long", "beyond the vocabulary", "negative", "empty"],
)
def test_a_row_that_the_model_has_no_room_for(untouched, entry, prompt, says):
    with pytest.raises(BadInput, match=says) as caught:
        entry(untouched, prompt)
    assert "row" in str(caught.value)


@pytest.mark.parametrize("entry", [forward, logits])
def test_a_padded_neighbour_is_not_named(untouched, entry):
    with pytest.raises(BadInput, match="row 1: 17 tokens do not fit"):
        entry(untouched, ids(*[RED] * 14))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_a_row_that_just_fits(entry):
    entry(small_policy(critic="shared"), ids(*[RED] * 13))


@pytest.mark.parametrize("response", [ids(ONE, 10), EMPTY], ids=["unknown", "empty"])
def test_a_response_that_the_model_has_no_room_for(untouched, response):
    with pytest.raises(BadInput, match="row 8"):
        sft.new_state(untouched, [*DEMONSTRATIONS, SFTExample(ids(RED), response)], sft.SFTConfig())
    for pair in ((RESPONSE, response), (response, RESPONSE)):
        examples = [*PREFERENCES, PreferenceExample(ids(RED), *pair)]
        with pytest.raises(BadInput, match="row 8"):
            dpo.new_state(untouched, untouched.reference(), examples, dpo.DPOConfig())


@pytest.mark.parametrize(
    "prompt", [ids(RED)[None], torch.ones(2), torch.tensor(3)], ids=["(1, P)", "floats", "number"]
)
def test_ids_are_a_row_of_whole_numbers(untouched, prompt):
    with pytest.raises(BadInput, match="row 1: ids of shape"):
        sampled(untouched, prompt)


def test_sound_rows_are_seen_at_once(monkeypatch):
    policy, calls = small_policy(), []
    monkeypatch.setattr(
        Tensor, "aminmax", lambda ids: calls.append(len(ids)) or (ids.min(), ids.max())
    )
    policy.require_room([(ids(RED), ids(RED, BALL)), (ids(BIG).int(),)])
    assert calls == [4]
    policy.require_room([])


def test_more_new_tokens_than_the_state_was_made_for(untouched):
    state = ppo.new_state(untouched, PROMPTS, PPO)
    longer = replace(PPO, max_new_tokens=14)
    with pytest.raises(BadInput, match="row 2: 4 tokens and 14 to be written do not fit"):
        next(ppo.train(untouched, untouched, constant, longer, state))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"max_new_tokens": 0, "temperature": 1.0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 1, "temperature": 0.0}, "temperature is 0"),
    ],
)
def test_samples_need_a_token_and_a_temperature(untouched, how, says):
    with pytest.raises(BadInput, match=says):
        sample(untouched, [ids(RED)], **how, rng=rng())


def test_no_rows():
    with pytest.raises(BadInput, match="there is no row"):
        collate([], [], pad_id=END)
    assert sample(small_policy(), [], max_new_tokens=2, temperature=1.0, rng=rng()) == []


# How many positions there are


def config(make, **changes):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1}
    return make(**sizes, num_attention_heads=2, **changes)


def llama(**rope):
    rope = {"rope_theta": 1e4, **rope} if rope else None
    given = {"intermediate_size": 32, "max_position_embeddings": 12, "rope_parameters": rope}
    return LlamaForCausalLM(config(LlamaConfig, **given))


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("make", "positions"),
    [
        (lambda: llama(), 12),
        (lambda: llama(rope_type="dynamic", factor=2.0), 12),
        # from 9 tokens on all rows of a batch get other frequencies
        (lambda: llama(rope_type="longrope", original_max_position_embeddings=8, **LONG), 8),
        (lambda: MptForCausalLM(MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=12)), 12),
    ],
    ids=["rotary", "dynamic", "longrope", "mpt"],
)
def test_positions(make, positions):
    assert positions_of(make()) == positions


def test_positions_without_a_bound():
    lm = seeded(lambda: BloomForCausalLM(config(BloomConfig)))
    rows = collate([torch.full((700,), 5)], [torch.tensor([6])], pad_id=0)
    assert Policy(lm, StubTokenizer())(rows).logprobs.isfinite().all()


def test_positions_whose_table_is_longer_by_what_it_counts_from():
    # OPT's table has two rows before the first position, RoBERTa's those up to its pad id
    sizes = {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 12}
    policy = Policy(seeded(lambda: OPTForCausalLM(config(OPTConfig, **sizes))), StubTokenizer())
    assert policy.lm.model.decoder.embed_positions.num_embeddings == 14
    fits, long = (collate([torch.full((n,), 5)], [torch.tensor([6])], pad_id=0) for n in (11, 12))
    assert policy(fits).logprobs.isfinite().all()
    with pytest.raises(BadInput, match="13 tokens do not fit into the 12 positions of OPTFor"):
        policy(long)
    roberta = config(
        RobertaConfig, intermediate_size=32, pad_token_id=3, max_position_embeddings=12
    )
    assert positions_of(RobertaForSequenceClassification(roberta)) == 8


def test_log_probabilities_beyond_the_positions_would_depend_on_the_batch():
    # why rotary models with dynamic frequencies are held to their original length
    lm = seeded(lambda: llama(rope_type="dynamic", factor=2.0))
    short, long = torch.arange(3)[None], torch.arange(20)[None]
    alone = lm(short, use_cache=False).logits[0]
    both = torch.cat([torch.nn.functional.pad(short, (0, 17)), long])
    assert not torch.allclose(lm(both, use_cache=False).logits[0, :3], alone)


def test_a_pad_token_that_was_added_to_the_tokenizer_alone():
    policy = small_policy()
    expected = policy(collate([ids(RED)], [RESPONSE], pad_id=END)).logprobs
    policy.tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert policy.tokenizer.pad_token_id == 10
    assert policy.pad_id == END
    assert torch.equal(
        policy(collate([ids(RED)], [RESPONSE], pad_id=policy.pad_id)).logprobs, expected
    )
