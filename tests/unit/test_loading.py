"""What loads as what: architectures, tokenizers, checkpoints of trl, and one line for the rest."""

import copy
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import (
    bert,
    bert_config,
    bert_syllables,
    gpt2,
    gpt2_classifier,
    policy_of,
    small_policy,
    syllables,
)
from strategies import assert_close
from tolerances import EXACT, FP32, FP64
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf_min.data import collate
from rlhf_min.errors import BadInput
from rlhf_min.harness.cli import RunOptions
from rlhf_min.harness.models import start_policy, start_reward_model
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.policy import VALUE_FILE, Policy
from rlhf_min.reward_model import RewardModel

RECORDED = Path(__file__).parents[1] / "parity" / "recorded" / "trl_v_head"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 30}


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def message(raised):
    text = str(raised.value)
    assert "\n" not in text
    return text


# Architectures


@pytest.mark.parametrize(
    ("make", "named", "kind"),
    [
        (lambda: BertModel(BertConfig(**SIZES)), "BertModel", "an encoder"),
        (lambda: BertForMaskedLM(BertConfig(**SIZES)), "BertForMaskedLM", "an encoder"),
        (lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)), "RobertaForMaskedLM", "an encoder"),
        (
            lambda: DistilBertModel(DistilBertConfig(dim=16, n_layers=1, n_heads=2)),
            "DistilBertModel",
            "an encoder",
        ),
        (bert, "BertForSequenceClassification", "an encoder"),
        (
            lambda: BartForConditionalGeneration(BartConfig(**BART)),
            "BartForConditionalGeneration",
            "an encoder-decoder",
        ),
        (
            lambda: T5ForConditionalGeneration(T5Config(d_model=16, num_layers=1, num_heads=2)),
            "T5ForConditionalGeneration",
            "an encoder-decoder",
        ),
        (gpt2_classifier, "GPT2ForSequenceClassification", "a classifier"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_no_causal_language_model_is_refused_as_policy(make, named, kind, tmp_path):
    save(tmp_path, make(), syllables())
    (tmp_path / "model.safetensors").unlink()  # refused before any weight is read
    with pytest.raises(BadInput, match=f"{named} is {kind} and cannot be the policy; give") as got:
        Policy.from_pretrained(tmp_path, critic="none")
    assert str(tmp_path) in message(got)


@pytest.mark.parametrize("labels", [2, 3])
def test_a_classifier_with_more_labels_is_refused_by_their_number(labels, tmp_path):
    save(tmp_path, bert(labels=labels), bert_syllables())
    for new_head in (False, True):
        with pytest.raises(
            BadInput, match=f"BertForSequenceClassification has {labels} labels"
        ) as got:
            RewardModel.from_pretrained(tmp_path, new_head=new_head)
        assert str(tmp_path) in message(got)
        assert message(got).endswith(f"give --reward {tmp_path}@LABEL_{labels - 1}")
    with pytest.raises(BadInput, match="one label"):
        RewardModel(bert(labels=labels), bert_syllables())


def test_one_of_many_labels_is_taken_by_its_name(tmp_path):
    model = bert(labels=3)
    model.config.id2label = {0: "bad", 1: "5 stars", 2: "fair"}
    save(tmp_path, model, bert_syllables())
    found = RewardModel.from_pretrained(tmp_path, label="5 stars")
    assert found.label == 1
    refused = "it has no label 'GOOD'; its labels are bad, 5 stars, fair"
    with pytest.raises(BadInput, match=refused) as got:
        RewardModel.from_pretrained(tmp_path, label="GOOD")
    assert message(got).startswith(str(tmp_path))
    with pytest.raises(BadInput, match=f"BertForSequenceClassification: {refused}"):
        RewardModel(model, bert_syllables(), label="GOOD")


def test_of_many_labels_the_first_are_listed():
    model = bert(labels=30)
    model.config.id2label = {i: f"L{i}" for i in range(29)} | {29: "L7"}
    with pytest.raises(BadInput, match=r"labels are L0, .*, L19 and 10 more$"):
        RewardModel(model, bert_syllables(), label="GOOD")
    with pytest.raises(BadInput, match="it has more than one label 'L7'"):
        RewardModel(model, bert_syllables(), label="L7")


def test_what_gives_no_probabilities_has_no_label_to_take():
    regression = bert(labels=3)
    regression.config.problem_type = "regression"
    for model in (bert(labels=1), regression):
        with pytest.raises(BadInput, match="gives a score and no probabilities of labels"):
            RewardModel(model, bert_syllables(), label="LABEL_0")


def test_a_policy_is_no_reward_model_until_its_head_is_trained(tmp_path):
    save(tmp_path, gpt2(), syllables())
    with pytest.raises(BadInput, match=r"weights are missing \(score.weight\)"):
        RewardModel.from_pretrained(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, new_head=True)
    assert model.new_weights == ["score.weight"]
    assert RewardModel(gpt2_classifier(), syllables()).new_weights == []


def test_a_new_head_excuses_no_missing_trunk(tmp_path):
    save(tmp_path, BertModel(bert().config), bert_syllables())
    weights = load_file(tmp_path / "model.safetensors")
    for name in (
        "pooler.dense.weight",
        "pooler.dense.bias",
    ):  # of the head: language models lack it
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert len(RewardModel.from_pretrained(tmp_path, new_head=True).new_weights) == 4
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"missing \(bert.encoder.layer.1.output.dense.weight\)"):
        RewardModel.from_pretrained(tmp_path, new_head=True)


def test_a_new_head_is_told_and_drawn_by_the_seed(tmp_path, capsys):
    save(tmp_path, BertModel(bert().config), bert_syllables())
    options = RunOptions(reward_model=str(tmp_path), max_length=16, max_response_tokens=8)
    heads = []
    for seed in (0, 1, 0):
        model = start_reward_model(options, [], seed=seed).model
        assert "has no trained head; ['classifier.bias', 'classifier.weight'] are new" in (
            capsys.readouterr().out
        )
        heads.append(model.classifier.weight)
    assert torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], heads[1])


# Tokenizers


def with_another_word(tokenizer, **special):
    """The same tokenizer with one token more than the model has rows."""
    tokenizer.add_tokens([f"extra{i}" for i in range(40 - len(tokenizer))])
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.mark.parametrize("special", [{}, {"pad_token": "[PAD]"}])
def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(special, tmp_path):
    largest = 39 + len(special)
    save(tmp_path / "policy", gpt2(), with_another_word(syllables(pad=None), **special))
    with pytest.raises(BadInput, match=f"ids up to {largest}, but the model only 32") as raised:
        Policy.from_pretrained(tmp_path / "policy", critic="none")
    assert str(tmp_path) in message(raised)
    save(tmp_path / "reward", bert(), with_another_word(bert_syllables(), **special))
    with pytest.raises(BadInput, match="but the model only 30 embeddings") as raised:
        RewardModel.from_pretrained(tmp_path / "reward")
    assert str(tmp_path) in message(raised)


def test_a_model_with_more_rows_than_its_tokenizer_has_ids_is_fine(tmp_path):
    assert len(syllables()) < 32
    save(tmp_path, gpt2(), syllables())
    Policy.from_pretrained(tmp_path, critic="none")


def test_a_policy_without_eos_is_refused_with_the_cure(tmp_path):
    tokenizer = syllables()
    tokenizer.eos_token = None
    save(tmp_path, gpt2(), tokenizer)
    with pytest.raises(BadInput, match=r"has no EOS token, .* set its eos_token to") as raised:
        Policy.from_pretrained(tmp_path, critic="none")
    assert str(tmp_path) in message(raised)


@pytest.mark.parametrize("pad", [None, "<eos>", "<pad>"])
def test_a_policys_pad_token_changes_nothing(pad, tmp_path):
    folder = save(tmp_path, gpt2(), syllables(pad=pad))
    policy = Policy.from_pretrained(folder, critic="none")
    assert policy.tokenizer.bos_token is None
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    responses = [torch.tensor([4, 1]), torch.tensor([9, 9, 3, 1])]
    found = policy(collate(rows, responses, pad_id=policy.pad_id)).logprobs
    assert torch.equal(found, policy(collate(rows, responses, pad_id=7)).logprobs)
    # other memory may be aligned in another way, and then sums are rounded in another order
    expected = Policy(gpt2(), syllables())(collate(rows, responses, pad_id=0)).logprobs
    assert torch.allclose(found, expected, rtol=0, atol=FP64)


def test_loaded_weights_are_those_of_the_file_as_it_was(tmp_path):
    policy = Policy.from_pretrained(save(tmp_path, gpt2(), syllables()), critic="none")
    before = copy.deepcopy(policy.lm.state_dict())
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    assert all(torch.equal(now, before[name]) for name, now in policy.lm.state_dict().items())


def test_a_bert_tokenizer_has_neither_bos_nor_eos_and_scores(tmp_path):
    folder = save(tmp_path, bert(), bert_syllables())
    model = RewardModel.from_pretrained(folder)
    assert model.tokenizer.bos_token is None
    assert model.tokenizer.eos_token is None
    both = model.score(["ba", "be bo"], ["be", "bi bo bu"])
    alone = [model.score([p], [r]) for p, r in [("ba", "be"), ("be bo", "bi bo bu")]]
    assert torch.allclose(both, torch.cat(alone), atol=FP32)


def with_types(tokenizer):
    """Gives the two texts of a pair different types, whatever the model makes of them."""
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def test_token_types_reach_only_a_model_that_has_them():
    plain, typed = syllables(), with_types(syllables())
    assert "token_type_ids" in typed("ba", "be")
    texts = ["ba be", "bi"], ["bo", "bu ba be"]
    scores = RewardModel(gpt2_classifier(), plain).score(*texts)
    # GPT-2 would take them and add the embeddings of its words 0 and 1
    assert torch.equal(RewardModel(gpt2_classifier(), typed).score(*texts), scores)
    assert RewardModel(bert(), bert_syllables()).encode(*texts)["token_type_ids"].any()
    config = DistilBertConfig(vocab_size=30, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    config.num_labels = 1
    distil = RewardModel(DistilBertForSequenceClassification(config), with_types(bert_syllables()))
    assert distil.score(*texts).isfinite().all()  # its forward knows no token_type_ids


# Checkpoints of trl


def trl_tensors(name):
    return load_file(RECORDED / name / "model.safetensors")


def with_prefix(tensors):
    """As it is saved where the whole wrapper is taken for the model."""
    return {
        k if k.startswith("v_head.") else f"pretrained_model.{k}": v for k, v in tensors.items()
    }


def shards(tensors):
    """The first half of the names and the rest, each with its number, and the index of both."""
    names = sorted(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    return [{name: tensors[name] for name in part} for part in parts]


def write(folder, tensors, *, pickled, sharded):
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")

    def write_one(part, name):
        if pickled:
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})

    if not sharded:
        write_one(tensors, f"{stem}.{ending}")
        return
    weight_map = {}
    for i, part in enumerate(shards(tensors), start=1):
        name = f"{stem}-{i:05}-of-00002.{ending}"
        write_one(part, name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index), encoding="utf-8")


def values(policy, recorded):
    """At all places of a row but the last: each predicts a response token."""
    ids = torch.tensor(recorded["ids"])
    with torch.no_grad():
        return policy(collate([ids[:1]], [ids[1:]], pad_id=0)).values[0]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickled"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("prefixed", [False, True], ids=["plain", "prefixed"])
def test_values_of_a_checkpoint_of_trl(name, pickled, sharded, prefixed, tmp_path):
    recorded = json.loads((RECORDED / name / "values.json").read_text(encoding="utf-8"))
    assert recorded["trl"] == "0.11.3"
    folder = tmp_path / "trl"
    folder.mkdir()
    shutil.copy(RECORDED / name / "config.json", folder)
    syllables().save_pretrained(folder)
    tensors = trl_tensors(name)
    write(folder, with_prefix(tensors) if prefixed else tensors, pickled=pickled, sharded=sharded)
    policy = Policy.from_pretrained(folder, critic="shared")
    found = values(policy, recorded)
    assert torch.allclose(found, torch.tensor(recorded["values"][:-1]), rtol=0, atol=FP32)
    for key, tensor in tensors.items():
        if not key.startswith("v_head."):
            assert torch.equal(policy.lm.state_dict()[key], tensor)

    # saved again, it is ours, and plain transformers reads its language model
    save_policy(policy, tmp_path / "ours")
    assert torch.equal(
        values(Policy.from_pretrained(tmp_path / "ours", critic="shared"), recorded), found
    )
    lm, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert not any(
        key.startswith("pretrained_model")
        for key in load_file(tmp_path / "ours" / "model.safetensors")
    )
    for key, tensor in policy.lm.state_dict().items():
        assert torch.equal(lm.state_dict()[key], tensor)


def test_a_value_head_of_trl_in_a_file_of_its_own(tmp_path):
    recorded = json.loads((RECORDED / "gpt2" / "values.json").read_text(encoding="utf-8"))
    shutil.copy(RECORDED / "gpt2" / "config.json", tmp_path)
    syllables().save_pretrained(tmp_path)
    tensors = trl_tensors("gpt2")
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("v_head.")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    save_file(head, tmp_path / "value_head.safetensors")
    found = values(Policy.from_pretrained(tmp_path, critic="shared"), recorded)
    assert torch.allclose(found, torch.tensor(recorded["values"][:-1]), rtol=0, atol=FP32)


def test_a_checkpoint_of_trl_has_no_critic_of_its_own(tmp_path):
    shutil.copytree(RECORDED / "gpt2", tmp_path, dirs_exist_ok=True)
    syllables().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="give the critic that it was trained with") as raised:
        Policy.from_pretrained(tmp_path, critic="separate", new_head=True)
    message(raised)
    assert Policy.from_pretrained(tmp_path, critic="none").value_head is None


def test_start_policy_says_whether_the_value_head_is_new(tmp_path, capsys):
    shutil.copytree(RECORDED / "gpt2", tmp_path / "trl")
    syllables().save_pretrained(tmp_path / "trl")
    save(tmp_path / "plain", gpt2(), syllables())
    for name, said in (("trl", False), ("plain", True)):
        options = RunOptions(model=str(tmp_path / name), max_length=16, max_response_tokens=8)
        start_policy(options, [], critic="shared", seed=0)
        assert ("has no value head; a new one starts at zero" in capsys.readouterr().out) == said


class Dangerous:
    """Unpickled, it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (Path(self.file),))


def test_a_pickle_that_is_more_than_tensors_is_refused_and_not_run(tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(RECORDED / "gpt2", folder)
    syllables().save_pretrained(folder)
    tensors = trl_tensors("gpt2")
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {"more": Dangerous(str(tmp_path / "made"))}, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="hold more than tensors and are not read") as raised:
        Policy.from_pretrained(folder, critic="shared")
    assert str(folder) in message(raised)
    assert not (tmp_path / "made").exists()


# GGUF


def test_a_gguf_file_needs_two_packages_and_to_be_there(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=r"model\.gguf: no model could be loaded .*: no such file"):
        Policy.from_pretrained(tmp_path / "model.gguf", critic="none")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("rlhf_min.loading.sources.find_spec", lambda name: name != "gguf" or None)
    with pytest.raises(BadInput, match="pip install gguf accelerate") as raised:
        Policy.from_pretrained(tmp_path / "model.gguf", critic="none")
    message(raised)


@pytest.mark.real  # the extra brings gguf
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_a_gguf_file_that_is_none_is_refused_in_one_line(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput) as raised:
        Policy.from_pretrained(tmp_path / "model.gguf", critic="none")
    assert str(tmp_path) in message(raised)


# Names


def test_a_name_is_looked_up_where_the_hub_was_downloaded_to(tmp_path, monkeypatch):
    cached = tmp_path / "models--somebody--tiny"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    saved = small_policy(critic="shared", dtype=torch.float32)
    save_policy(saved, tmp_path / "folder")
    shutil.copytree(tmp_path / "folder", snapshot, dirs_exist_ok=True)
    found = Policy.from_pretrained("somebody/tiny", critic="shared")
    assert torch.equal(found.value_head.weight, saved.value_head.weight)
    shutil.rmtree(snapshot)
    shutil.copytree(RECORDED / "llama", snapshot)
    syllables().save_pretrained(snapshot)
    head = Policy.from_pretrained("somebody/tiny", critic="shared").value_head
    assert torch.equal(head.weight, trl_tensors("llama")["v_head.summary.weight"])
    with pytest.raises(BadInput, match="somebody/other") as raised:
        Policy.from_pretrained("somebody/other", critic="none")
    message(raised)


# Policy.from_pretrained


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    gpt2(dropout=0.1).save_pretrained(folder)
    syllables().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    bert().save_pretrained(folder)
    bert_syllables().save_pretrained(folder)
    return folder


def test_a_missing_value_head_is_refused_unless_it_may_be_new(gpt2_folder):
    for critic in ("shared", "separate"):
        with pytest.raises(BadInput, match=VALUE_FILE) as raised:
            Policy.from_pretrained(gpt2_folder, critic=critic)
        assert str(gpt2_folder) in message(raised)
        new = Policy.from_pretrained(gpt2_folder, critic=critic, new_head=True)
        assert not new.value_head.weight.any()
    assert Policy.from_pretrained(gpt2_folder, critic="none").value_head is None


def test_a_saved_value_head_is_loaded_even_if_it_might_be_new(gpt2_folder, tmp_path):
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    saved = policy_of(gpt2(), critic="shared").critic_tensors()
    save_file(saved, tmp_path / VALUE_FILE)
    for new_head in (False, True):
        loaded = Policy.from_pretrained(tmp_path, critic="shared", new_head=new_head)
        assert_close(loaded.value_head.weight, saved["value_head.weight"], EXACT)
        assert_close(loaded.value_head.bias, saved["value_head.bias"], EXACT)


@pytest.mark.parametrize(("saved", "asked"), [("shared", "separate"), ("separate", "shared")])
def test_a_value_head_of_the_other_kind_is_refused(saved, asked, gpt2_folder, tmp_path):
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    save_file(policy_of(gpt2(), critic=saved).critic_tensors(), tmp_path / VALUE_FILE)
    with pytest.raises(BadInput, match=f"critic='{asked}'") as raised:
        Policy.from_pretrained(tmp_path, critic=asked, new_head=True)
    message(raised)


def test_a_value_head_of_another_width_is_refused(gpt2_folder, tmp_path):
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    save_file(
        {"value_head.weight": torch.zeros(1, 7), "value_head.bias": torch.zeros(1)},
        tmp_path / VALUE_FILE,
    )
    with pytest.raises(BadInput):
        Policy.from_pretrained(tmp_path, critic="shared")


def test_weights_keep_float64_and_are_raised_from_half_precision(tmp_path):
    syllables().save_pretrained(tmp_path)
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
def test_a_folder_that_is_no_model_is_refused_in_message(
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
    assert str(tmp_path) in message(raised)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(BadInput) as raised:
        Policy.from_pretrained(tmp_path / "nowhere", critic="none")
    assert "nowhere" in message(raised)


# RewardModel.from_pretrained


def test_a_missing_classifier_is_refused_unless_it_may_be_new(tmp_path):
    torch.manual_seed(0)
    trunk = BertModel(bert_config()).double()
    trunk.save_pretrained(tmp_path)
    bert_syllables().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"classifier\.(bias|weight)") as raised:
        RewardModel.from_pretrained(tmp_path)
    assert str(tmp_path) in message(raised)
    found = RewardModel.from_pretrained(tmp_path, new_head=True)
    assert found.model.config.num_labels == 1
    for name, parameter in trunk.named_parameters():
        assert_close(found.model.bert.get_parameter(name), parameter, EXACT)


def test_max_length_is_handed_on(bert_folder):
    assert RewardModel.from_pretrained(bert_folder, max_length=20).max_length == 20
    assert isinstance(RewardModel.from_pretrained(bert_folder).model, BertForSequenceClassification)


def test_loaded_models_have_no_dropout_until_they_are_trained(tmp_path):
    save_policy(Policy(gpt2(dropout=0.1), syllables()), tmp_path / "policy")
    loaded = Policy.from_pretrained(tmp_path / "policy", critic="none")
    assert not any(module.training for module in loaded.modules())
    save_reward_model(RewardModel(bert(dropout=0.1), bert_syllables()), tmp_path / "reward_model")
    scorer = RewardModel.from_pretrained(tmp_path / "reward_model")
    scores = scorer(["ba"], ["be"])
    scorer.score(["bi"], ["bo"])
    assert_close(scorer(["ba"], ["be"]), scores, EXACT)


def test_a_language_model_with_an_unknown_head_is_refused():
    # BERT's head transforms the hidden state before the vocabulary projection
    config = bert_config()
    config.is_decoder = True
    lm = BertLMHeadModel(config).double()
    with pytest.raises(BadInput, match="BertLMHeadModel makes its logits in a way"):
        policy_of(lm)
