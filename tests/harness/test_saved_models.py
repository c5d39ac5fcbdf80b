"""Saved folders: bit-equal for whoever loads them, and never half written."""

import copy
import math
import os
from functools import partial
from pkgutil import resolve_name

import pytest
import torch
from safetensors import SafetensorError
from small import (
    CAUSAL,
    PAD,
    POSITIONS,
    SYLLABLES,
    bert,
    bert_syllables,
    gpt2,
    gpt2_classifier,
    small_policy,
    small_reward_model,
    syllables,
    token_rows,
)
from strategies import assert_close
from tolerances import EXACT
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_min.data import collate
from rlhf_min.errors import BadInput
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model, unsound
from rlhf_min.policy import VALUE_FILE, Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.speed.fast import fuse_gelu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
VOCABULARY = 3 + len(SYLLABLES)
BATCH = collate(
    token_rows([3, 1, 5], seed=40, vocabulary=VOCABULARY),
    token_rows([2, 6, 1], seed=41, vocabulary=VOCABULARY),
    pad_id=PAD,
)
TEXTS = (["ba be", "bi"], ["bo bu da", "de"])


def make_policy(make=gpt2, critic="shared", seed=0):
    """A policy whose critic has been trained: its head is not zero, its trunk no copy."""
    model = Policy(make(seed, vocabulary=VOCABULARY), syllables(), critic=critic)
    with torch.no_grad():
        for k, tensor in enumerate(model.critic_tensors().values()):
            tensor += 0.01 * (k + 1)
    return model


def files(folder):
    """Every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What comes back


@CAUSAL
@DTYPES
@pytest.mark.parametrize("critic", ["none", "shared", "separate"])
def test_a_policy_comes_back_to_the_bit(make, dtype, critic, tmp_path):
    model = make_policy(make, critic).to(dtype)
    save_policy(model, tmp_path / "out")
    loaded = Policy.from_pretrained(tmp_path / "out", critic=critic)
    with torch.no_grad():
        for now, then in zip(loaded(BATCH)[:3], model(BATCH)[:3], strict=True):
            assert (now is None and then is None) or bool(now.abs().sum() > 0)
            if now is not None:
                assert_close(now, then, EXACT)
    assert (tmp_path / "out" / VALUE_FILE).exists() == (critic != "none")


@CAUSAL
@DTYPES
def test_plain_transformers_reads_a_policy(make, dtype, tmp_path):
    model = make_policy(make).to(dtype)
    save_policy(model, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = BATCH.ids
    fuse_gelu(loaded)  # as it is in ours; the weights are the same to the bit
    # In memory too: where weights begin within a file, some processors round otherwise.
    loaded = copy.deepcopy(loaded)
    assert_close(loaded.eval()(ids).logits, model.lm(ids).logits, EXACT)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert tokenizer("ba be").input_ids == model.tokenizer("ba be").input_ids
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_reward_model_comes_back_to_the_bit(kind, tmp_path):
    parts = (bert(), bert_syllables()) if kind == "bert" else (gpt2_classifier(), syllables())
    model = RewardModel(*parts)
    scores = model.score(*TEXTS)
    save_reward_model(model, tmp_path / "out")
    loaded = RewardModel.from_pretrained(tmp_path / "out")
    assert_close(loaded.score(*TEXTS), scores, EXACT)
    assert loaded.max_length == POSITIONS
    plain, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", dtype=torch.float64, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")(
        *(TEXTS if kind == "bert" else (["ba be bo bu da <eos>", "bi de <eos>"],)),
        padding=True,
        return_tensors="pt",
    )
    assert_close(plain.eval()(**inputs).logits[:, 0], scores, EXACT)


def test_a_normalised_reward_model_stays_so(tmp_path):
    model = RewardModel(bert(), bert_syllables())
    model.rescale(gain=3.0, bias=-2.0)
    save_reward_model(model, tmp_path / "out")
    loaded = RewardModel.from_pretrained(tmp_path / "out")
    assert_close(loaded.score(*TEXTS), model.score(*TEXTS), EXACT)


@CAUSAL
def test_model_pt_holds_the_weights_and_no_code(make, tmp_path):
    model = make_policy(make)
    save_policy(model, tmp_path / "out")
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    other = make(7, vocabulary=VOCABULARY)
    assert not torch.equal(other(BATCH.ids).logits, model.lm(BATCH.ids).logits)
    other.load_state_dict(state)
    fuse_gelu(other)
    assert_close(other(BATCH.ids).logits, model.lm(BATCH.ids).logits, EXACT)


def test_model_pt_of_a_reward_model(tmp_path):
    model = RewardModel(bert(), bert_syllables())
    save_reward_model(model, tmp_path / "out")
    other = RewardModel(bert(seed=7), bert_syllables())
    assert not torch.equal(other.score(*TEXTS), model.score(*TEXTS))
    other.model.load_state_dict(torch.load(tmp_path / "out" / "model.pt", weights_only=True))
    assert_close(other.score(*TEXTS), model.score(*TEXTS), EXACT)


def test_the_files_of_a_folder(tmp_path):
    save_policy(make_policy(), tmp_path / "deep" / "er" / "out")
    assert names(tmp_path / "deep" / "er") == ["out"]
    wanted = {"config.json", "model.safetensors", "model.pt", VALUE_FILE}
    wanted |= {"tokenizer.json", "tokenizer_config.json"}
    assert wanted <= set(names(tmp_path / "deep" / "er" / "out"))


def test_saving_again_replaces_everything(tmp_path):
    folder = tmp_path / "out"
    save_policy(make_policy(critic="separate"), folder)
    (folder / "left_over.json").write_text("", encoding="utf-8")
    second = make_policy(critic="none", seed=1)
    save_policy(second, folder)
    assert {"left_over.json", VALUE_FILE}.isdisjoint(names(folder))
    loaded = Policy.from_pretrained(folder, critic="none")
    assert_close(loaded(BATCH).logprobs, second(BATCH).logprobs, EXACT)
    assert names(tmp_path) == ["out"]


def test_what_the_user_has_put_beside_a_model_stays(tmp_path):
    folder = tmp_path / "out"
    save_policy(make_policy(), folder)
    (folder / "README.md").write_text("mine", encoding="utf-8")
    (folder / "onnx").mkdir()
    (folder / "onnx/model.json").write_text("mine", encoding="utf-8")
    save_policy(make_policy(critic="none", seed=1), folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
    assert (folder / "onnx/model.json").read_text(encoding="utf-8") == "mine"
    assert VALUE_FILE not in names(folder)
    assert names(tmp_path) == ["out"]


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = make_policy().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_policy(model, tmp_path / "out")
    assert model.training
    for name, tensor in model.state_dict().items():
        assert_close(tensor, before[name], EXACT)


# What is not finite


def at_fault(name, value):
    """A model of which one tensor holds this value everywhere."""

    def make(dtype=torch.float32):
        reward = name.startswith("model.")
        model = (small_reward_model if reward else partial(small_policy, critic="separate"))(
            dtype=dtype
        )
        torch.nn.init.constant_(dict(model.named_parameters())[name], value)
        return model

    return make


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "lm.transformer.wte.weight",
        "critic_trunk.h.0.mlp.c_fc.weight",
        "value_head.bias",
        "model.classifier.weight",
        "model.bert.embeddings.position_embeddings.weight",
    ],
)
def test_a_weight_that_is_not_finite_is_named(name, value):
    assert unsound(at_fault(name, value)()) == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lm.transformer.wte.weight", "the log-probability"),
        ("value_head.bias", None),
        ("value_head.weight", "the value"),
        ("model.classifier.weight", "the score"),
    ],
)
def test_weights_so_large_that_their_answers_are_not_finite(name, what, dtype):
    model = at_fault(name, 3e38)(dtype)
    found = unsound(model, ["red ball", "", "one two"])
    if what is None:
        assert found is None
    else:
        assert found == f"{what} (the largest weight is 3e+38, in {name})"
    assert unsound(model) is None  # without a text to try it on
    assert unsound(at_fault(name, 0.0)(dtype), ["red ball"]) is None


def test_a_text_longer_than_the_positions_is_no_fault():
    assert unsound(small_policy(), ["red ball " * 50]) is None


def test_a_text_that_spells_a_token_without_an_embedding_is_no_fault():
    policy = small_policy()
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    assert policy.tokenizer("<extra>").input_ids[-1] >= policy.vocabulary
    assert unsound(policy, ["red <extra> ball"]) is None


@pytest.mark.parametrize("name", ["lm.transformer.wte.weight", "value_head.bias"])
def test_weights_that_are_not_finite_are_not_saved(name, tmp_path):
    save_policy(make_policy(seed=1), tmp_path / "out")
    before, model = files(tmp_path), make_policy()
    torch.nn.init.constant_(dict(model.named_parameters())[name], torch.nan)
    with pytest.raises(BadInput, match=f"out: not saved, since {name} is infinite or NaN; train"):
        save_policy(model, tmp_path / "out")
    assert files(tmp_path) == before


# What fails


class Full:
    """Stands in for a function that works `n` times and then finds the disk full."""

    def __init__(self, function, n=0):
        self.function, self.left = function, n

    def __call__(self, *args, **kwargs):
        if self.left == 0:
            raise OSError(28, "No space left on device")
        self.left -= 1
        return self.function(*args, **kwargs)


FAILURES = {  # which function fails, after how many calls
    "weights": ("transformers.PreTrainedModel.save_pretrained", 0),
    "model.pt": ("torch.save", 0),
    "tokenizer": ("transformers.PreTrainedTokenizerBase.save_pretrained", 0),
    "value head": ("rlhf_min.harness.run.saved_models.save_file", 0),
    "flush": ("os.fsync", 2),
    "rename": ("os.rename", 0),
}


@pytest.fixture(params=FAILURES)
def fill_disk(request, monkeypatch):
    name, n = FAILURES[request.param]
    return lambda: monkeypatch.setattr(name, Full(resolve_name(name), n))


def test_a_failed_save_leaves_nothing(fill_disk, tmp_path):
    fill_disk()
    with pytest.raises(BadInput, match="could not be saved: No space left") as raised:
        save_policy(make_policy(), tmp_path / "out")
    assert str(tmp_path / "out") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == []


def test_a_failed_save_keeps_what_was_there(fill_disk, tmp_path):
    save_policy(make_policy(seed=1), tmp_path / "out")
    before = files(tmp_path)
    fill_disk()
    with pytest.raises(BadInput):
        save_policy(make_policy(), tmp_path / "out")
    assert files(tmp_path) == before


def raising(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_save_keeps_what_was_there(interrupt, tmp_path, monkeypatch):
    save_reward_model(RewardModel(bert(seed=1), bert_syllables()), tmp_path / "out")
    before = files(tmp_path)
    monkeypatch.setattr(torch, "save", raising(interrupt))
    with pytest.raises(interrupt):
        save_reward_model(RewardModel(bert(), bert_syllables()), tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.parametrize("place", ["a file", "a file/out", "a file/deep/out"])
def test_a_place_where_no_folder_can_be_is_refused(place, tmp_path):
    (tmp_path / "a file").write_text("mine", encoding="utf-8")
    with pytest.raises(BadInput, match="could not be saved") as raised:
        save_policy(make_policy(), tmp_path / place)
    assert str(tmp_path / place) in str(raised.value)
    assert files(tmp_path) == {"a file": b"mine"}


@pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_folder_without_permission_is_refused(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(BadInput, match="Permission denied"):
        save_policy(make_policy(), closed / "out")
    assert names(closed) == []


@pytest.mark.parametrize(
    ("function", "error", "reason"),
    [
        # how these libraries report a write that did not fit
        (
            "rlhf_min.harness.run.saved_models.save_file",
            SafetensorError("I/O error (os error 28)"),
            "os error 28",
        ),
        ("torch.save", RuntimeError("unexpected pos 576 vs 534"), "unexpected pos"),
        ("torch.save", OSError("the file system is read-only"), "the file system is read-only"),
    ],
    ids=["safetensors", "torch", "without a number"],
)
def test_a_full_disk_is_refused_whoever_notices_it(function, error, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(function, raising(error))
    with pytest.raises(BadInput, match=f"could not be saved: .*{reason}"):
        save_policy(make_policy(), tmp_path / "out")
