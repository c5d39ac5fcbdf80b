"""The policy against its own full logits, taken row by row without padding; the reward model
against inputs put together by hand."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import assert_close
from tiny import (
    EOS,
    PAD,
    WIDTH,
    WORDS,
    bert,
    bert_config,
    bert_words,
    cohere,
    gemma2,
    gpt2,
    gpt2_classifier,
    granite,
    llama,
    policy,
    seeded,
    text,
    token_rows,
    words,
)
from tokenizers import processors
from tolerances import EXACT, FP32, FP64
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from rlhf_min.data import collate
from rlhf_min.errors import BadInput
from rlhf_min.harness.run.identity import tokenizer_digest
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.policy import VALUE_FILE, Policy, disable_dropout, evaluating, scatter_tokens
from rlhf_min.reward_model import RewardModel
from rlhf_min.world import train_bpe

CAUSAL = pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)
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


def padded(rows):
    """Rows as (B, T) with zeros at padding."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def weighted(*tensors):
    """A sum in which every cell has another weight."""
    return sum(
        ((torch.arange(x.numel(), dtype=x.dtype) + k).cos().reshape(x.shape) * x).sum()
        for k, x in enumerate(tensors)
    )


# Policy.forward


@HEADS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_the_model_itself(make, temperature):
    model = policy(make())
    with torch.no_grad():
        found = model(BATCH, temperature=temperature)
        logprobs = padded(row_logprobs(model.lm, b, temperature=temperature) for b in range(4))
        entropies = []
        for b in range(4):
            p = row_logits(model.lm, b, temperature=temperature).softmax(-1)
            entropies.append(torch.special.entr(p).sum(-1))
    assert_close(found.logprobs, logprobs, FP64)
    assert_close(found.entropy, padded(entropies), FP64)
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
    model = policy(make(), critic="shared")
    parameters = list(model.parameters())
    found = model(BATCH, temperature=0.7)
    gradients = torch.autograd.grad(weighted(found.logprobs, found.values), parameters)
    plain = weighted(
        padded(row_logprobs(model.lm, b, temperature=0.7) for b in range(4)),
        padded(row_values(model.lm.base_model, model.value_head, b) for b in range(4)),
    )
    for now, expected in zip(gradients, torch.autograd.grad(plain, parameters), strict=True):
        assert now.abs().max() > 0
        assert_close(now, expected, tolerance)


@CAUSAL
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_values_are_the_head_on_the_hidden_state_before_each_token(make, critic):
    model = policy(make(), critic=critic)
    with torch.no_grad():
        trunk = model.lm.base_model if critic == "shared" else model.critic_trunk
        expected = padded(row_values(trunk, model.value_head, b) for b in range(4))
        assert_close(model(BATCH).values, expected, FP64)


@CAUSAL
def test_a_row_alone_is_the_row_in_a_batch(make):
    model = policy(make(), critic="shared")
    with torch.no_grad():
        together = model(BATCH)
        for b in range(4):
            alone = model(collate([PROMPTS[b]], [RESPONSES[b]], pad_id=PAD))
            for one, all_rows in zip(alone[:3], together[:3], strict=True):
                assert_close(one[0], all_rows[b, : len(RESPONSES[b])], FP64)


@CAUSAL
def test_padding_ids_never_matter(make):
    model = policy(make(), critic="separate")
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
    model = policy(make())
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
    values = Policy(gpt2(), words(), critic=critic)(BATCH).values
    assert_close(values, torch.zeros(BATCH.mask.shape, dtype=torch.float64), EXACT)


def test_a_separate_critic_starts_as_a_copy_with_weights_of_its_own():
    model = Policy(gpt2(), words(), critic="separate")
    trunk = dict(model.lm.base_model.named_parameters())
    for name, parameter in model.critic_trunk.named_parameters():
        assert_close(parameter, trunk[name], EXACT)
        assert parameter.data_ptr() != trunk[name].data_ptr()


@CAUSAL
def test_a_separate_critic_and_the_policy_share_no_gradient(make):
    model = policy(make(), critic="separate")
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
    model = policy(llama(), critic="shared")
    model(BATCH).values.sum().backward()
    assert model.lm.lm_head.weight.grad is None
    assert all(p.grad.any() for n, p in model.lm.model.named_parameters() if "embed" not in n)


def test_float64_stays_float64_and_half_precision_gives_float32():
    for dtype, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ]:
        model = Policy(gpt2().to(dtype), words(), critic="shared")
        assert [x.dtype for x in model(BATCH, with_logits=True)] == [expected] * 4
        assert model.value_head.weight.dtype == expected


def test_pad_id_and_decode():
    assert Policy(gpt2(), words()).pad_id == 0
    assert Policy(gpt2(), words(pad=None)).pad_id == 1
    ids = torch.tensor([3, 4, 0, 5, 1])  # ba be <pad> bi <eos>
    assert Policy(gpt2(), words()).decode(ids) == "ba be bi"
    assert Policy(gpt2(), words()).decode(torch.tensor([1])) == ""


# The reference


def test_the_reference_is_frozen_and_stays_what_it_was():
    model = policy(gpt2(dropout=0.3), critic="shared").train()
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
    model = policy(gpt2(dropout=0.3)).train()
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


# Policy.from_pretrained


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    gpt2(dropout=0.1).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    bert().save_pretrained(folder)
    bert_words().save_pretrained(folder)
    return folder


def one_line(raised):
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_missing_value_head_is_refused_unless_it_may_be_new(gpt2_folder):
    for critic in ("shared", "separate"):
        with pytest.raises(BadInput, match=VALUE_FILE) as raised:
            Policy.from_pretrained(gpt2_folder, critic=critic)
        assert str(gpt2_folder) in one_line(raised)
        new = Policy.from_pretrained(gpt2_folder, critic=critic, new_head=True)
        assert not new.value_head.weight.any()
    assert Policy.from_pretrained(gpt2_folder, critic="none").value_head is None


def test_a_saved_value_head_is_loaded_even_if_it_might_be_new(gpt2_folder, tmp_path):
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    saved = policy(gpt2(), critic="shared").critic_tensors()
    save_file(saved, tmp_path / VALUE_FILE)
    for new_head in (False, True):
        loaded = Policy.from_pretrained(tmp_path, critic="shared", new_head=new_head)
        assert_close(loaded.value_head.weight, saved["value_head.weight"], EXACT)
        assert_close(loaded.value_head.bias, saved["value_head.bias"], EXACT)


@pytest.mark.parametrize(("saved", "asked"), [("shared", "separate"), ("separate", "shared")])
def test_a_value_head_of_the_other_kind_is_refused(saved, asked, gpt2_folder, tmp_path):
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    save_file(policy(gpt2(), critic=saved).critic_tensors(), tmp_path / VALUE_FILE)
    with pytest.raises(BadInput, match=f"critic='{asked}'") as raised:
        Policy.from_pretrained(tmp_path, critic=asked, new_head=True)
    one_line(raised)


def test_a_value_head_of_another_width_is_refused(gpt2_folder, tmp_path):
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    save_file(
        {"value_head.weight": torch.zeros(1, 7), "value_head.bias": torch.zeros(1)},
        tmp_path / VALUE_FILE,
    )
    with pytest.raises(BadInput):
        Policy.from_pretrained(tmp_path, critic="shared")


def test_weights_keep_float64_and_are_raised_from_half_precision(tmp_path):
    words().save_pretrained(tmp_path)
    for saved, loaded in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ]:
        lm = gpt2().to(saved)
        lm.save_pretrained(tmp_path)
        found = Policy.from_pretrained(tmp_path, critic="shared", new_head=True)
        assert {p.dtype for p in found.parameters()} == {loaded}
        state = lm.state_dict()
        for name, tensor in found.lm.state_dict().items():
            assert_close(tensor, state[name].to(loaded), EXACT)


def spoil_nothing(folder):
    """No file at all."""
    for file in folder.iterdir():
        file.unlink()


def spoil_config(folder):
    (folder / "config.json").write_text("{", encoding="utf-8")


def spoil_weights(folder):
    (folder / "model.safetensors").unlink()


def spoil_type(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "no-such-model"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def cut_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("transformer.h.1.mlp.c_fc.weight", None)
    weights.pop("bert.encoder.layer.1.output.dense.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_nothing,
        spoil_config,
        spoil_weights,
        spoil_type,
        drop_weight,
        cut_weights,
        drop_tokenizer,
    ],
)
@pytest.mark.parametrize("kind", ["policy", "reward model"])
def test_a_folder_that_is_no_model_is_refused_in_one_line(
    spoil, kind, gpt2_folder, bert_folder, tmp_path
):
    source, load = {
        "policy": (gpt2_folder, lambda: Policy.from_pretrained(tmp_path, critic="none")),
        "reward model": (bert_folder, lambda: RewardModel.from_pretrained(tmp_path)),
    }[kind]
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    with pytest.raises(BadInput) as raised:
        load()
    assert str(tmp_path) in one_line(raised)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(BadInput) as raised:
        Policy.from_pretrained(tmp_path / "nowhere", critic="none")
    assert "nowhere" in one_line(raised)


# RewardModel: inputs


def reward_model(max_length=None, *, seed=0, dropout=0.0):
    return RewardModel(bert(seed, dropout=dropout), bert_words(), max_length=max_length)


def test_a_pair_is_cls_prompt_sep_response_sep():
    # [PAD] 0, [CLS] 2, [SEP] 3, ba 5, be 6, bi 7, bo 8, bu 9
    found = reward_model().encode(["ba be", "bi"], ["bo", "bu ba be"])
    assert found["input_ids"].tolist() == [[2, 5, 6, 3, 8, 3, 0], [2, 7, 3, 9, 5, 6, 3]]
    assert found["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0], [1] * 7]


numbers_of_words = st.lists(st.integers(0, len(WORDS) - 1), max_size=40)


@given(numbers_of_words, numbers_of_words, st.integers(8, 30))
def test_cuts_end_of_response_then_beginning_of_prompt(prompt, response, max_length):
    model = reward_model(max_length)
    room = max_length - 3  # beside [CLS] and two [SEP]
    quarter = -(-room // 4)  # rounded up, for the prompt
    kept_response = response[: room - quarter]
    kept_prompt = prompt[max(len(prompt) + len(kept_response) - room, 0) :]
    expected = [2, *(5 + i for i in kept_prompt), 3, *(5 + i for i in kept_response), 3]
    texts = [text(prompt)], [text(response)]
    assert model.encode(*texts)["input_ids"].tolist() == [expected]
    assert len(kept_prompt) >= min(len(prompt), room / 4)
    (pair,), report = model.codec.encode(*texts)
    assert pair.ids.tolist() == expected
    assert (pair.prompt_tokens, pair.response_tokens) == (len(kept_prompt), len(kept_response))
    assert pair.cut == (kept_response != response)
    assert (report.prompts, report.responses) == (1, 1)
    assert report.prompts_cut == (kept_prompt != prompt)
    assert report.responses_cut == (kept_response != response)
    assert report.prompt_tokens_cut == len(prompt) - len(kept_prompt)
    assert report.response_tokens_cut == len(response) - len(kept_response)


def test_cut_report_adds_up_over_rows():
    prompts = [text(range(n)) for n in (2, 9, 20)]
    responses = [text(range(n)) for n in (1, 3, 25)]
    model = reward_model(11)  # 8 words; 6 at most for the response
    report = model.codec.encode(prompts, responses)[1]
    kept = model.encode(prompts, responses)["attention_mask"].sum().item() - 3 * 3
    lost = report.prompt_tokens_cut + report.response_tokens_cut
    assert lost == (2 + 9 + 20) + (1 + 3 + 25) - kept
    assert (report.prompts_cut, report.responses_cut) == (2, 1)
    assert (report.prompt_tokens_cut, report.response_tokens_cut) == (4 + 18, 19)


def test_a_word_is_cut_where_its_tokens_end():
    # "babe" is the one word ba ##be; room for 6 response tokens, so it loses its second half
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ba", "##be", *WORDS[1:24]]
    tokenizer = type(bert_words())(vocab={token: i for i, token in enumerate(tokens)})
    model = RewardModel(bert(), tokenizer, max_length=11)
    found = model.encode(["be"], ["ba  ba ba\nba ba babe be"])["input_ids"]
    assert found.tolist() == [[2, 7, 3, 5, 5, 5, 5, 5, 5, 3]]


@pytest.mark.parametrize("max_length", [7, 65])
def test_a_max_length_out_of_range_is_refused(max_length):
    with pytest.raises(BadInput, match=f"max_length {max_length}"):
        reward_model(max_length)
    assert reward_model().max_length == 64


# RewardModel: scores

TEXTS = (
    [text([i, i + 1, 3][: 1 + i % 3]) for i in range(7)],
    [text(range(i, i + 1 + (5 * i) % 9)) for i in range(7)],
)


def test_scores_are_the_classifiers_output_on_hand_made_ids():
    model = reward_model()
    with torch.no_grad():
        for prompt, response in [([0, 1], [3]), ([4], [2, 2, 9])]:
            front = [2, *(5 + i for i in prompt), 3]
            back = [*(5 + i for i in response), 3]
            logits = model.model(
                input_ids=torch.tensor([front + back]),
                token_type_ids=torch.tensor([[0] * len(front) + [1] * len(back)]),
            ).logits
            expected = logits[0]
            assert_close(model([text(prompt)], [text(response)]), expected, FP64)
            assert_close(model.score([text(prompt)], [text(response)]), expected, FP64)


def test_score_is_forward_in_eval_mode_whatever_the_mode():
    model = reward_model(dropout=0.1).train()
    scores = model.score(*TEXTS)
    assert model.training
    assert not scores.requires_grad
    assert scores.dtype == torch.float64
    with_gradient = model.eval()(*TEXTS)
    assert with_gradient.requires_grad
    assert_close(scores, with_gradient.detach(), FP64)
    model.score(*TEXTS)
    assert not model.training
    assert scores.sort().values.diff().min() > 1e-3  # no two rows can be exchanged unnoticed


def test_forward_keeps_the_order_of_the_texts():
    model = reward_model().eval()
    prompts, responses = TEXTS
    lengths = [len(pair.ids) for pair in model.codec.encode(prompts, responses)[0]]
    assert lengths != sorted(lengths, reverse=True)  # which is the order that they pass in
    alone = torch.cat([model([p], [r]) for p, r in zip(prompts, responses, strict=True)])
    assert_close(model(prompts, responses), alone, FP64)


@pytest.mark.parametrize("make", ["bert", "gpt2"])
def test_scores_depend_neither_on_batching_nor_on_order(make, monkeypatch):
    model = reward_model() if make == "bert" else RewardModel(gpt2_classifier(), words())
    together = model.score(*TEXTS)
    alone = torch.cat([model.score([p], [r]) for p, r in zip(*TEXTS, strict=True)])
    assert_close(together, alone, FP64)
    for max_tokens in (1, 20, 40):
        monkeypatch.setattr("rlhf_min.reward_model.SCORED_TOKENS", max_tokens)
        assert_close(model.score(*TEXTS), together, FP64)
    order = [3, 0, 6, 5, 1, 4, 2]
    shuffled = model.score([TEXTS[0][i] for i in order], [TEXTS[1][i] for i in order])
    assert_close(shuffled, together[order], FP64)


def test_micro_batches_hold_no_more_than_so_many_tokens(monkeypatch):
    model, sizes = reward_model(16), []
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    monkeypatch.setattr("rlhf_min.reward_model.SCORED_TOKENS", 32)
    model.score(*TEXTS)
    assert max(sizes) <= 32
    assert len(sizes) > 2


def test_a_gpt2_classifier_reads_prompt_response_and_eos_in_one():
    model = RewardModel(gpt2_classifier(), words())  # <pad> 0, <eos> 1, ba 3, be 4, bi 5
    found = model.encode(["ba be", "bi"], ["bi", ""])
    assert found["input_ids"].tolist() == [[3, 4, 5, 1], [5, 1, 0, 0]]
    with torch.no_grad():
        hidden = model.model.transformer(torch.tensor([[3, 4, 5, 1]])).last_hidden_state
        expected = hidden[0, -1] @ model.model.score.weight[0]
    assert_close(model.score(["ba be"], ["bi"])[0], expected, FP64)


def test_half_precision_gives_float32_scores():
    model = RewardModel(bert().bfloat16(), bert_words())
    assert model(*TEXTS).dtype == torch.float32


def test_rescale():
    model = reward_model()
    before = model.score(*TEXTS)
    model.rescale(gain=2.5, bias=-0.75)
    assert_close(model.score(*TEXTS), 2.5 * before - 0.75, FP64)


def test_rescale_needs_a_bias():
    model = RewardModel(gpt2_classifier(), words())
    before = model.score(*TEXTS)
    with pytest.raises(BadInput, match="no bias"):
        model.rescale(gain=2.0, bias=1.0)
    assert_close(model.score(*TEXTS), before, EXACT)


@pytest.mark.parametrize("pad_id", [0, 1, 4])
def test_a_roberta_counts_its_positions_from_behind_its_pad_id(pad_id):
    model = RewardModel(
        classifier(
            small_config(RobertaConfig, pad_token_id=pad_id), RobertaForSequenceClassification
        ),
        words(pad="<eos>"),
    )
    assert model.max_length == 66 - pad_id - 1
    long = text(range(25)) + " " + text(range(25)) * 4
    assert model.score([long], ["ba"]).isfinite().all()


@pytest.mark.parametrize("max_length", [8, 14])
def test_a_character_of_several_tokens_is_cut_as_counted(max_length):
    # bytes as tokens, "🤖" is four; room for 6 or 10 of the response cuts a robot in the middle
    bytewise = train_bpe([""], 258)
    config = gpt2_classifier().config
    config.vocab_size = 258
    model = RewardModel(type(gpt2_classifier())(config), bytewise, max_length=max_length)
    found = bytewise.decode(model.encode(["aaaaaaaa"], ["🤖🤖🤖🤖"])["input_ids"][0])
    assert found.count("a") + 1 >= max_length // 4  # and the new line
    assert set(found) == set("a\n🤖")
    report = model.codec.encode(["aaaaaaaa"], ["🤖🤖🤖🤖"])[1]
    assert report.prompt_tokens_cut == 8 - found.count("a")


def test_a_tokenizer_without_pad_token_pads_with_eos():
    texts = ["ba", "be bo"], ["be", "bi bo bu"]
    without = RewardModel(gpt2_classifier(), words(pad=None)).score(*texts)
    assert_close(without, RewardModel(gpt2_classifier(), words(pad="<eos>")).score(*texts), EXACT)


def test_a_tokenizer_with_neither_pad_nor_eos_is_refused():
    tokenizer = words(pad=None)
    tokenizer.eos_token = None
    with pytest.raises(BadInput, match="pad"):
        RewardModel(gpt2_classifier(), tokenizer)


def test_a_classifier_whose_pad_token_is_eos():
    # it reads the last token that is no EOS: with a pad token of its own it would read the EOS
    classifier = gpt2_classifier()
    classifier.config.pad_token_id = EOS
    model = RewardModel(classifier, words(pad="<eos>"))
    scores = model.score(["ba", "be bo"], ["be", "bi bo bu"])
    assert_close(scores[:1], model.score(["ba"], ["be"]), FP64)
    with torch.no_grad():
        hidden = classifier.transformer(torch.tensor([[3, 4]])).last_hidden_state
        assert_close(scores[0], hidden[0, -1] @ classifier.score.weight[0], FP64)


# RewardModel: neighbours


def classifier(config, make, labels=1):
    """With weights so large that no two texts have nearly the same score."""
    config.num_labels = labels
    return seeded(lambda: make(config))


def small_config(make, **options):
    return make(
        **{
            **{"vocab_size": 3 + len(WORDS), "max_position_embeddings": 66, "hidden_size": WIDTH},
            **{"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
            **{"bos_token_id": 1, "eos_token_id": 1, "sep_token_id": 1, "cls_token_id": 1},
            **{"pad_token_id": 0},
            **options,
        }
    )


XLNET = {"d_model": WIDTH, "n_layer": 1, "n_head": 2, "d_inner": 32}
CLASSIFIERS = {
    "bert": bert,
    "gpt2": gpt2_classifier,
    "roberta": lambda: classifier(
        small_config(RobertaConfig, pad_token_id=1), RobertaForSequenceClassification
    ),
    "llama": lambda: classifier(small_config(LlamaConfig), LlamaForSequenceClassification),
    "qwen2": lambda: classifier(
        small_config(Qwen2Config, num_key_value_heads=1), Qwen2ForSequenceClassification
    ),
    "distilbert": lambda: classifier(
        DistilBertConfig(vocab_size=28, dim=WIDTH, hidden_dim=32, n_layers=1, n_heads=2),
        DistilBertForSequenceClassification,
    ),
    "electra": lambda: classifier(
        small_config(ElectraConfig, embedding_size=WIDTH), ElectraForSequenceClassification
    ),
    "deberta": lambda: classifier(
        small_config(DebertaV2Config, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        DebertaV2ForSequenceClassification,
    ),
    "albert": lambda: classifier(
        small_config(AlbertConfig, embedding_size=WIDTH), AlbertForSequenceClassification
    ),
    "modernbert": lambda: classifier(
        small_config(ModernBertConfig), ModernBertForSequenceClassification
    ),
    "xlnet": lambda: classifier(
        XLNetConfig(vocab_size=28, **XLNET), XLNetForSequenceClassification
    ),
}
EACH = pytest.mark.parametrize("name", CLASSIFIERS)


def scorer(name, side="right"):
    tokenizer = bert_words() if name == "bert" else words()
    tokenizer.padding_side = side
    return RewardModel(CLASSIFIERS[name](), tokenizer)


@EACH
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_score_depends_on_no_neighbour_whatever_side_the_tokenizer_pads(name, side):
    model = scorer(name, side)
    pairs = list(zip(*TEXTS, strict=True))
    alone = torch.cat([model.score([p], [r]) for p, r in pairs])
    assert alone.diff().abs().min() > 1e-3
    tolerance = FP64 if model.model.dtype == torch.float64 and name not in ROUNDED else FP32
    assert_close(model.score(*TEXTS), alone, tolerance)
    assert_close(model(*TEXTS).detach().double(), alone, tolerance)
    if side == "left":
        assert_close(scorer(name).score(*TEXTS), alone, tolerance)
    assert model.tokenizer.padding_side == ("left" if name == "xlnet" else "right")


@pytest.mark.parametrize("scale", [0.0, 1e-6])
def test_the_side_of_the_padding_is_found_whatever_the_head_and_saved(scale, tmp_path):
    model = CLASSIFIERS["xlnet"]().eval()
    model.logits_proj.weight.data.mul_(scale)
    model.logits_proj.bias.data.zero_()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    tokenizer = words()
    ours = RewardModel(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert tokenizer.padding_side == "right"
    assert not ours(["ba"], ["be"]).any() or scale  # its own head is back
    digest = tokenizer_digest(ours.tokenizer)
    save_reward_model(ours, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
    assert tokenizer_digest(RewardModel.from_pretrained(tmp_path).tokenizer) == digest


ROUNDED = ("llama", "qwen2", "roberta")  # with norms, or all of it, in float32


def test_the_tokenizer_that_was_given_stays_as_it_is(tmp_path):
    words(pad=None).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    tokenizer.save_pretrained(tmp_path / "before")
    model = RewardModel(gpt2_classifier(), tokenizer, max_length=20)
    model.score(*TEXTS)
    tokenizer.save_pretrained(tmp_path / "after")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        before, after = ((tmp_path / x / name).read_bytes() for x in ("before", "after"))
        assert before == after
    save_reward_model(model, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["padding_side"] == "right"  # that of the model
    assert saved["pad_token"] == "<eos>"
    assert RewardModel.from_pretrained(tmp_path / "saved").max_length == 20


def test_an_id_beyond_the_embeddings_is_refused():
    tokenizer = words(pad=None)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(BadInput, match="has ids up to 28, but the model only 28 embed") as raised:
        RewardModel(gpt2_classifier(), tokenizer)
    one_line(raised)


def test_no_text_has_no_score():
    assert scorer("bert").forward([], []).shape == scorer("bert").score([], []).shape == (0,)


def test_a_classifier_that_counts_ends_takes_responses_that_are_cut():
    sizes = {"d_model": WIDTH, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=28, eos_token_id=1, decoder_start_token_id=0, **sizes)
    tokenizer = words()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", EOS)]
    )
    model = RewardModel(classifier(config, T5ForSequenceClassification), tokenizer, max_length=12)
    assert model.score(["ba", "ba"], ["be", "be " * 40]).isfinite().all()
    assert model.cuts.responses_cut == 1


def test_a_classifier_that_heeds_no_mask_is_refused():
    model = bert()

    def without_mask(_module, args, kwargs):
        return args, {**kwargs, "attention_mask": None}

    model.bert.register_forward_pre_hook(without_mask, with_kwargs=True)
    with pytest.raises(BadInput, match=r"BertForSequenceClassification scores .* beside") as raised:
        RewardModel(model, bert_words())
    one_line(raised)


def test_the_pad_token_of_a_decoder_is_the_tokenizers(monkeypatch):
    # it reads the score at the last token that is no padding: with another pad token at the padding
    monkeypatch.setattr("rlhf_min.loading.checks.choose_padding_side", lambda *_: None)
    for pad in (5, None):
        given = gpt2_classifier()
        given.config.pad_token_id = pad
        model = RewardModel(given, words())
        assert model.model.config.pad_token_id == 0
        assert_close(model.score(*TEXTS), RewardModel(gpt2_classifier(), words()).score(*TEXTS), 0)


# RewardModel: precision


@EACH
def test_under_autocast_the_last_layer_is_in_float32(name):
    model = RewardModel(CLASSIFIERS[name]().float(), scorer(name).tokenizer)
    layer, seen = model._last_layer, []
    assert layer.out_features == 1
    plain = model(*TEXTS)
    layer.register_forward_hook(lambda _layer, inputs, output: seen.append((inputs[0], output)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(*TEXTS)
    for hidden, output in seen:
        assert_close(output, F.linear(hidden.float(), layer.weight, layer.bias), EXACT)
    assert (found - plain).abs().max() < 0.3
    assert found.dtype == torch.float32
    gradient = torch.autograd.grad(found.sum(), layer.weight)[0]
    assert gradient.any()


def test_scores_near_2_stay_different_in_bfloat16():
    """Of 100 texts as many scores: bfloat16 has 128 numbers from 2 to 4."""
    model = RewardModel(bert().float(), bert_words())
    texts = [text([i % 25, i // 25]) for i in range(100)]
    spread = model.score(["ba"] * 100, texts)
    model.rescale(gain=0.1 / float(spread.std()), bias=0.0)
    model.rescale(gain=1.0, bias=2.0 - float(model.score(["ba"] * 100, texts).mean()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model.score(["ba"] * 100, texts)
    assert len(set(scores.tolist())) == 100
    assert len(set(scores.bfloat16().tolist())) < 50
    weights = RewardModel(copy.deepcopy(model.model).bfloat16(), bert_words())
    assert len(set(weights.score(["ba"] * 100, texts).tolist())) == 100


# RewardModel.from_pretrained


def test_more_than_one_label_is_refused(tmp_path):
    with pytest.raises(BadInput, match="one label"):
        RewardModel(bert(labels=3), bert_words())
    bert(labels=3).save_pretrained(tmp_path)
    bert_words().save_pretrained(tmp_path)
    with pytest.raises(BadInput) as raised:
        RewardModel.from_pretrained(tmp_path)
    assert str(tmp_path) in one_line(raised)


def test_a_missing_classifier_is_refused_unless_it_may_be_new(tmp_path):
    torch.manual_seed(0)
    trunk = BertModel(bert_config()).double()
    trunk.save_pretrained(tmp_path)
    bert_words().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"classifier\.(bias|weight)") as raised:
        RewardModel.from_pretrained(tmp_path)
    assert str(tmp_path) in one_line(raised)
    found = RewardModel.from_pretrained(tmp_path, new_head=True)
    assert found.model.config.num_labels == 1
    for name, parameter in trunk.named_parameters():
        assert_close(found.model.bert.get_parameter(name), parameter, EXACT)


def test_max_length_is_handed_on(bert_folder):
    assert RewardModel.from_pretrained(bert_folder, max_length=20).max_length == 20
    assert isinstance(RewardModel.from_pretrained(bert_folder).model, BertForSequenceClassification)


def test_a_language_model_with_an_unknown_head_is_refused():
    # BERT's head transforms the hidden state before the vocabulary projection
    config = bert_config()
    config.is_decoder = True
    lm = BertLMHeadModel(config).double()
    with pytest.raises(BadInput, match="BertLMHeadModel makes its logits in a way"):
        policy(lm)


def test_a_look_restores_the_mode_of_every_module():
    model = policy(gpt2(dropout=0.1))
    model.train()
    model.lm.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_loaded_models_have_no_dropout_until_they_are_trained(tmp_path):
    save_policy(Policy(gpt2(dropout=0.1), words()), tmp_path / "policy")
    loaded = Policy.from_pretrained(tmp_path / "policy", critic="none")
    assert not any(module.training for module in loaded.modules())
    save_reward_model(RewardModel(bert(dropout=0.1), bert_words()), tmp_path / "reward_model")
    scorer = RewardModel.from_pretrained(tmp_path / "reward_model")
    scores = scorer(["ba"], ["be"])
    scorer.score(["bi"], ["bo"])
    assert_close(scorer(["ba"], ["be"]), scores, EXACT)


# Gradient checkpointing


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
    plain, checkpointed = (policy(make(dropout=0.1), critic=critic) for _ in range(2))
    checkpointed.checkpoint_gradients()
    calls = count_calls([m for m in checkpointed.modules() if type(m).__name__.endswith("MLP")])
    found = gradients(checkpointed, policy_loss)
    trunks = 2 if critic == "separate" else 1
    assert len(calls) == 2 * 2 * trunks  # each of two layers forward, and again for backward
    for now, then in zip(found, gradients(plain, policy_loss), strict=True):
        assert_close(now, then, FP64)


def test_checkpointed_gradients_of_a_reward_model_are_the_same():
    plain, checkpointed = reward_model(dropout=0.1), reward_model(dropout=0.1)
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
    model = policy(gpt2())
    model.checkpoint_gradients()
    for each in (copy.deepcopy(model), Policy(copy.deepcopy(model.lm), words(), critic="separate")):
        trunks = [each.lm, *([] if each.critic_trunk is None else [each.critic_trunk])]
        assert all(checkpoints(trunk) for trunk in trunks)
    reference = model.reference()
    calls = count_calls([m for m in reference.modules() if type(m).__name__.endswith("MLP")])
    assert_close(reference(BATCH).logprobs, policy(gpt2())(BATCH).logprobs.detach(), EXACT)
    assert len(calls) == 2


def test_a_model_without_checkpointing_is_refused():
    model = policy(gpt2())
    model.lm.supports_gradient_checkpointing = False
    with pytest.raises(BadInput, match="GPT2LMHeadModel has no gradient checkpointing") as raised:
        model.checkpoint_gradients()
    one_line(raised)
