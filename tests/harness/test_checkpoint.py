"""Saved folders: bit-equal for whoever loads them, and never half written."""

import copy
import os
import pickle

import pytest
import torch
from safetensors import SafetensorError
from strategies import assert_close
from tiny import (
    PAD,
    POSITIONS,
    WORDS,
    bert,
    bert_words,
    gpt2,
    gpt2_classifier,
    llama,
    token_rows,
    words,
)
from tolerances import EXACT
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rlhf_min.data import collate
from rlhf_min.errors import BadInput
from rlhf_min.harness.run import saved_models
from rlhf_min.harness.run.saved_models import load_state, save_policy, save_reward_model
from rlhf_min.policy import VALUE_FILE, Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.speed.fast import fuse_gelu

CAUSAL = pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
VOCABULARY = 3 + len(WORDS)
BATCH = collate(
    token_rows([3, 1, 5], seed=40, vocabulary=VOCABULARY),
    token_rows([2, 6, 1], seed=41, vocabulary=VOCABULARY),
    pad_id=PAD,
)
TEXTS = (["ba be", "bi"], ["bo bu da", "de"])


def make_policy(make=gpt2, critic="shared", seed=0):
    """A policy whose critic has been trained: its head is not zero, its trunk no copy."""
    model = Policy(make(seed, vocabulary=VOCABULARY), words(), critic=critic)
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
        for now, then in zip(loaded(BATCH), model(BATCH), strict=True):
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
    model = (
        RewardModel(bert(), bert_words())
        if kind == "bert"
        else RewardModel(gpt2_classifier(), words())
    )
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
    model = RewardModel(bert(), bert_words())
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
    again = make(7, vocabulary=VOCABULARY)
    load_state(again, tmp_path / "out" / "model.pt")
    fuse_gelu(again)
    assert_close(again(BATCH.ids).logits, model.lm(BATCH.ids).logits, EXACT)


def test_model_pt_of_a_reward_model(tmp_path):
    model = RewardModel(bert(), bert_words())
    save_reward_model(model, tmp_path / "out")
    other = RewardModel(bert(seed=7), bert_words())
    assert not torch.equal(other.score(*TEXTS), model.score(*TEXTS))
    load_state(other.model, tmp_path / "out" / "model.pt")
    assert_close(other.score(*TEXTS), model.score(*TEXTS), EXACT)


class Code:
    """Pickled as a call."""

    def __reduce__(self):
        return os.getpid, ()


def test_load_state_runs_no_code(tmp_path):
    torch.save({"wte": Code()}, tmp_path / "model.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_state(gpt2(), tmp_path / "model.pt")


def test_the_files_of_a_folder(tmp_path):
    save_policy(make_policy(), tmp_path / "deep" / "er" / "out")
    assert names(tmp_path / "deep" / "er") == ["out"]
    found = set(names(tmp_path / "deep" / "er" / "out"))
    assert found >= {
        "config.json",
        "model.safetensors",
        "model.pt",
        "tokenizer.json",
        "tokenizer_config.json",
        VALUE_FILE,
    }


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


def fail_weights(monkeypatch):
    monkeypatch.setattr(
        "transformers.PreTrainedModel.save_pretrained",
        Full(None),
    )


def fail_model_pt(monkeypatch):
    monkeypatch.setattr(torch, "save", Full(torch.save))


def fail_tokenizer(monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", Full(None))


def fail_value_head(monkeypatch):
    monkeypatch.setattr(saved_models, "save_file", Full(saved_models.save_file))


def fail_flush(monkeypatch):
    monkeypatch.setattr(os, "fsync", Full(os.fsync, 2))


def fail_rename(monkeypatch):
    monkeypatch.setattr(os, "rename", Full(os.rename))


FAILURES = [
    fail_weights,
    fail_model_pt,
    fail_tokenizer,
    fail_value_head,
    fail_flush,
    fail_rename,
]


@pytest.mark.parametrize("fail", FAILURES)
def test_a_failed_save_leaves_nothing(fail, tmp_path, monkeypatch):
    fail(monkeypatch)
    with pytest.raises(BadInput, match="could not be saved: No space left") as raised:
        save_policy(make_policy(), tmp_path / "out")
    assert str(tmp_path / "out") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "fail",
    [
        *FAILURES[:-1],
        fail_rename,
    ],
)
def test_a_failed_save_keeps_what_was_there(fail, tmp_path, monkeypatch):
    save_policy(make_policy(seed=1), tmp_path / "out")
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(BadInput):
            save_policy(make_policy(), tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["lm.transformer.wte.weight", "value_head.bias"])
def test_weights_that_are_not_finite_are_not_saved(name, tmp_path):
    save_policy(make_policy(seed=1), tmp_path / "out")
    before, model = files(tmp_path), make_policy()
    torch.nn.init.constant_(dict(model.named_parameters())[name], torch.nan)
    with pytest.raises(BadInput, match=f"out: not saved, since {name} is infinite or NaN; train"):
        save_policy(model, tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_save_keeps_what_was_there(interrupt, tmp_path, monkeypatch):
    save_reward_model(RewardModel(bert(seed=1), bert_words()), tmp_path / "out")
    before = files(tmp_path)

    def stop(*_args, **_kwargs):
        raise interrupt

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(interrupt):
        save_reward_model(RewardModel(bert(), bert_words()), tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "place",
    [
        "a file",
        "a file/out",
        "a file/deep/out",
    ],
)
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
    ("function", "error"),
    [
        # how these libraries report a write that did not fit
        (
            "rlhf_min.harness.run.saved_models.save_file",
            SafetensorError("I/O error (os error 28)"),
        ),
        ("torch.save", RuntimeError("unexpected pos 576 vs 534")),
    ],
    ids=["safetensors", "torch"],
)
def test_a_full_disk_is_refused_whoever_notices_it(function, error, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(function, fail)
    with pytest.raises(BadInput, match="could not be saved"):
        save_policy(make_policy(), tmp_path / "out")


def test_an_error_without_number_is_told(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("the file system is read-only")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(BadInput, match="read-only"):
        save_policy(make_policy(), tmp_path / "out")
