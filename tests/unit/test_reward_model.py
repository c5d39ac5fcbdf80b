"""The reward model against inputs put together by hand."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import (
    EOS,
    SYLLABLES,
    WIDTH,
    bert,
    bert_syllables,
    gpt2_classifier,
    gpt2_config,
    seeded,
    syllables,
    text,
)
from strategies import assert_close
from tokenizers import processors
from tolerances import EXACT, FP32, FP64
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
    pipeline,
)

from rlhf_min.errors import BadInput
from rlhf_min.harness.run.identity import tokenizer_digest
from rlhf_min.harness.run.saved_models import save_reward_model
from rlhf_min.reward_model import RewardModel
from rlhf_min.world import train_bpe

# RewardModel: inputs


def reward_model(max_length=None, *, seed=0, dropout=0.0):
    return RewardModel(bert(seed, dropout=dropout), bert_syllables(), max_length=max_length)


def test_a_pair_is_cls_prompt_sep_response_sep():
    # [PAD] 0, [CLS] 2, [SEP] 3, ba 5, be 6, bi 7, bo 8, bu 9
    found = reward_model().encode(["ba be", "bi"], ["bo", "bu ba be"])
    assert found["input_ids"].tolist() == [[2, 5, 6, 3, 8, 3, 0], [2, 7, 3, 9, 5, 6, 3]]
    assert found["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0], [1] * 7]


numbers_of_words = st.lists(st.integers(0, len(SYLLABLES) - 1), max_size=40)


@given(numbers_of_words, numbers_of_words, st.integers(8, 30))
def test_cuts_end_of_response_then_beginning_of_prompt(prompt, response, max_length):
    model = reward_model(max_length)
    room = max_length - 3  # beside [CLS] and two [SEP]
    quarter = -(-room // 4)  # rounded up, for the prompt
    kept_response = response[: room - min(quarter, len(prompt))]
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
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ba", "##be", *SYLLABLES[1:24]]
    tokenizer = type(bert_syllables())(vocab={token: i for i, token in enumerate(tokens)})
    model = RewardModel(bert(), tokenizer, max_length=11)
    found = model.encode(["be be"], ["ba  ba ba\nba ba babe be"])["input_ids"]
    assert found.tolist() == [[2, 7, 7, 3, 5, 5, 5, 5, 5, 5, 3]]


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
    model = reward_model() if make == "bert" else RewardModel(gpt2_classifier(), syllables())
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
    model = RewardModel(gpt2_classifier(), syllables())  # <pad> 0, <eos> 1, ba 3, be 4, bi 5
    found = model.encode(["ba be", "bi"], ["bi", ""])
    assert found["input_ids"].tolist() == [[3, 4, 5, 1], [5, 1, 0, 0]]
    with torch.no_grad():
        hidden = model.model.transformer(torch.tensor([[3, 4, 5, 1]])).last_hidden_state
        expected = hidden[0, -1] @ model.model.score.weight[0]
    assert_close(model.score(["ba be"], ["bi"])[0], expected, FP64)


def test_half_precision_gives_float32_scores():
    model = RewardModel(bert().bfloat16(), bert_syllables())
    assert model(*TEXTS).dtype == torch.float32


def test_rescale():
    model = reward_model()
    before = model.score(*TEXTS)
    model.rescale(gain=2.5, bias=-0.75)
    assert_close(model.score(*TEXTS), 2.5 * before - 0.75, FP64)


def test_rescale_needs_a_bias():
    model = RewardModel(gpt2_classifier(), syllables())
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
        syllables(pad="<eos>"),
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
    without = RewardModel(gpt2_classifier(), syllables(pad=None)).score(*texts)
    assert_close(
        without, RewardModel(gpt2_classifier(), syllables(pad="<eos>")).score(*texts), EXACT
    )


def test_a_tokenizer_with_neither_pad_nor_eos_is_refused():
    tokenizer = syllables(pad=None)
    tokenizer.eos_token = None
    with pytest.raises(BadInput, match="pad"):
        RewardModel(gpt2_classifier(), tokenizer)


def test_a_classifier_whose_pad_token_is_eos():
    # it reads the last token that is no EOS: with a pad token of its own it would read the EOS
    classifier = gpt2_classifier()
    classifier.config.pad_token_id = EOS
    model = RewardModel(classifier, syllables(pad="<eos>"))
    scores = model.score(["ba", "be bo"], ["be", "bi bo bu"])
    assert_close(scores[:1], model.score(["ba"], ["be"]), FP64)
    with torch.no_grad():
        hidden = classifier.transformer(torch.tensor([[3, 4]])).last_hidden_state
        assert_close(scores[0], hidden[0, -1] @ classifier.score.weight[0], FP64)


# RewardModel: one label of several


def sentiment(make=bert, **options):
    model = make(labels=2, **options)
    model.config.id2label = {0: "NEGATIVE", 1: "POSITIVE"}
    model.config.label2id = {"NEGATIVE": 0, "POSITIVE": 1}
    return model


def gpt2_of_labels(labels):
    return classifier(gpt2_config(3 + len(SYLLABLES)), GPT2ForSequenceClassification, labels)


@pytest.mark.parametrize("label", ["NEGATIVE", "POSITIVE"])
@pytest.mark.parametrize(
    ("problem_type", "function"),
    [(None, "softmax"), ("multi_label_classification", "sigmoid")],
)
@pytest.mark.parametrize(
    ("make", "tokenizer"), [(bert, bert_syllables), (gpt2_of_labels, syllables)]
)
def test_a_labels_score_is_the_log_of_what_the_pipeline_says(
    make, tokenizer, problem_type, function, label
):
    # as in the tutorials of GPT-2 on film reviews: one text of prompt and response
    model = sentiment(make)
    model.config.problem_type = problem_type
    scorer = RewardModel(model, tokenizer(), label=label)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer(), top_k=None)
    prompts, responses, expected = ["ba be", "bi", "bo"], ["bu da", " de di", "do"], []
    for prompt, response in zip(prompts, responses, strict=True):
        together = f"{prompt} {response.strip()}"
        (found,) = classify([together], function_to_apply=function)
        (score,) = [x["score"] for x in found if x["label"] == label]
        expected.append(math.log(score))
    assert_close(scorer.score(prompts, responses), expected, FP32)  # the pipeline's own precision


def test_the_probabilities_of_the_labels_add_up_to_1():
    texts = ["ba be", "bi"], ["bu da", "de di"]
    scores = [
        RewardModel(sentiment(), bert_syllables(), label=label).score(*texts)
        for label in ("NEGATIVE", "POSITIVE")
    ]
    assert_close(sum(x.exp() for x in scores), [1.0, 1.0], FP64)
    assert not torch.allclose(*scores)


def test_a_log_probability_is_not_rescaled():
    with pytest.raises(BadInput, match="cannot be rescaled"):
        RewardModel(sentiment(), bert_syllables(), label="POSITIVE").rescale(gain=2.0, bias=0.0)


# RewardModel: neighbours


def classifier(config, make, labels=1):
    """With weights so large that no two texts have nearly the same score."""
    config.num_labels = labels
    return seeded(lambda: make(config))


def small_config(make, **options):
    return make(
        **{
            **{
                "vocab_size": 3 + len(SYLLABLES),
                "max_position_embeddings": 66,
                "hidden_size": WIDTH,
            },
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
    tokenizer = bert_syllables() if name == "bert" else syllables()
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
    tokenizer = syllables()
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
    syllables(pad=None).save_pretrained(tmp_path)
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
    tokenizer = syllables(pad=None)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(BadInput, match="has ids up to 28, but the model only 28 embed") as raised:
        RewardModel(gpt2_classifier(), tokenizer)
    assert "\n" not in str(raised.value)


def test_no_text_has_no_score():
    assert scorer("bert").forward([], []).shape == scorer("bert").score([], []).shape == (0,)


def test_a_classifier_that_counts_ends_takes_responses_that_are_cut():
    sizes = {"d_model": WIDTH, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=28, eos_token_id=1, decoder_start_token_id=0, **sizes)
    tokenizer = syllables()
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
        RewardModel(model, bert_syllables())
    assert "\n" not in str(raised.value)


def test_the_pad_token_of_a_decoder_is_the_tokenizers(monkeypatch):
    # it reads the score at the last token that is no padding: with another pad token at the padding
    monkeypatch.setattr("rlhf_min.loading.checks.choose_padding_side", lambda *_: None)
    for pad in (5, None):
        given = gpt2_classifier()
        given.config.pad_token_id = pad
        model = RewardModel(given, syllables())
        assert model.model.config.pad_token_id == 0
        assert_close(
            model.score(*TEXTS), RewardModel(gpt2_classifier(), syllables()).score(*TEXTS), 0
        )


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
    model = RewardModel(bert().float(), bert_syllables())
    texts = [text([i % 25, i // 25]) for i in range(100)]
    spread = model.score(["ba"] * 100, texts)
    model.rescale(gain=0.1 / float(spread.std()), bias=0.0)
    model.rescale(gain=1.0, bias=2.0 - float(model.score(["ba"] * 100, texts).mean()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model.score(["ba"] * 100, texts)
    assert len(set(scores.tolist())) == 100
    assert len(set(scores.bfloat16().tolist())) < 50
    weights = RewardModel(copy.deepcopy(model.model).bfloat16(), bert_syllables())
    assert len(set(weights.score(["ba"] * 100, texts).tolist())) == 100
