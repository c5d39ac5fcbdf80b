"""What a folder that holds no model is taken for, and how long a name without a Hub takes."""

import json
import time

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from small import gpt2, syllables

from rlhf_min.errors import BadInput
from rlhf_min.loading import sources
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel

LORA = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "task_type": "CAUSAL_LM"}


def said(load, *args, **options):
    with pytest.raises(BadInput) as raised:
        load(*args, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


def write(folder, **files):
    """Files by their names; "__" stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def whole(tmp_path):
    folder = tmp_path / "whole"
    gpt2().save_pretrained(folder)
    syllables().save_pretrained(folder)
    return folder


def test_an_adapter_needs_its_weights_its_base_and_to_be_one_of_lora(tmp_path):
    folder = write(tmp_path / "a", adapter_config__json=LORA)
    message = said(Policy.from_pretrained, folder, critic="none")
    assert "there is an adapter_config.json, but no adapter_model.safetensors" in message
    write(folder, adapter_model__safetensors="version https://git-lfs.github.com/spec/v1")
    message = said(sources.require_source, folder)
    assert "adapter_model.safetensors is a pointer of Git LFS" in message
    write(folder, adapter_model__safetensors="")
    message = said(RewardModel.from_pretrained, folder)
    assert f"{folder}: the base of this adapter is owner/base, says adapter_config.json" in message
    assert "no such folder here, no such name among the downloaded models" in message
    other = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS"}
    message = said(sources.require_source, write(folder, adapter_config__json=other))
    assert "an adapter of PROMPT_TUNING, and only LoRA's are read; merge it" in message


def test_an_adapter_without_peft_says_what_to_install(tmp_path, monkeypatch):
    folder = write(tmp_path / "a", adapter_config__json=LORA, adapter_model__safetensors="")
    sources.require_source(folder)
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    assert "an adapter needs peft: pip install peft" in said(sources.require_source, folder)


def test_an_adapter_beside_a_model_is_not_left_out_silently(whole):
    write(whole, adapter_config__json=LORA)
    message = said(Policy.from_pretrained, whole, critic="none")
    assert "there are both a model and an adapter; take the one that is not meant away" in message


@pytest.mark.parametrize(
    ("name", "config", "method"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsand"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "fp8"}, "fp8"),
        ("quantization_config", {"load_in_4bit": True}, "4 bits"),
        ("compression_config", {"format": "pack-quantized"}, "pack-quantized"),
        ("quantization", {"group_size": 64, "bits": 8}, "8 bits"),  # of MLX
    ],
)
def test_quantised_weights_are_refused_before_any_is_read(name, config, method, whole):
    given = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    write(whole, config__json={**given, name: config})
    (whole / "model.safetensors").unlink()
    message = said(Policy.from_pretrained, whole, critic="none")
    assert f"its weights are quantised ({method}" in message
    assert "dequantize()" in message


def test_no_quantisation_is_none(whole):
    given = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    write(whole, config__json={**given, "quantization_config": None})
    Policy.from_pretrained(whole, critic="none")


FOREIGN = [
    ("model-q4.gguf", "give the file itself: {folder}/model-q4.gguf"),
    ("model.onnx", "an ONNX model"),
    ("__0_0.distcp", "a distributed checkpoint"),
    ("zero_to_fp32.py", "run its zero_to_fp32.py first"),
    ("consolidated.00.pth", "not as transformers saves them"),
    ("tf_model.h5", "weights of TensorFlow"),
    ("flax_model.msgpack", "weights of Flax"),
]


@pytest.mark.parametrize(("file", "says"), FOREIGN)
@pytest.mark.parametrize("config", [False, True], ids=["alone", "beside a config"])
@pytest.mark.parametrize("place", ["", "inside"])
def test_weights_of_another_kind_are_named(file, says, config, place, tmp_path):
    folder = write(tmp_path / "model", **({"config__json": {}} if config else {}))
    (folder / place).mkdir(exist_ok=True)
    (folder / place / file).touch()
    message = said(sources.require_weights if config else sources.require_source, folder)
    assert says.format(folder=folder / place).replace("/./", "/") in message
    assert ("there is a config.json, but no model.safetensors" in message) == config


def test_a_folder_beside_the_right_one_names_that(whole, tmp_path):
    assert f"give {whole}" in said(sources.require_source, tmp_path)
    write(whole / "sub", x__txt="")
    assert f"its parent does, give {whole}" in said(sources.require_source, whole / "sub")
    write(tmp_path / "1_Pooling", config__json={})  # of sentence-transformers, and no model
    assert f"give {whole}" in said(sources.require_source, tmp_path)
    outer = tmp_path / "outer"
    write(outer / "checkpoint-10", adapter_config__json=LORA)
    assert f"adapters in it, {outer}/checkpoint-10" in said(sources.require_source, outer)
    for n in (1, 2, 3, 4, 5):
        write(tmp_path / "many" / f"checkpoint-{n}", config__json={"model_type": "gpt2"})
    assert "and 2 more" in said(sources.require_source, tmp_path / "many")
    empty = write(tmp_path / "empty")
    assert "the folder is empty" in said(sources.require_source, empty)


def test_a_file_of_a_folder_names_the_folder(whole):
    for name in ("model.safetensors", "config.json"):
        assert f"give its folder, {whole}" in said(sources.require_source, whole / name)


def test_missing_parts_and_pointers_are_named(whole):
    (whole / "model.safetensors").write_bytes(sources.LFS + b"/spec/v1\noid sha256:0\nsize 9\n")
    assert "model.safetensors is a pointer of Git LFS" in said(sources.require_weights, whole)
    (whole / "model.safetensors").unlink()
    write(whole, training_args__bin="")
    assert "but no model.safetensors; copy the weights there too" in (
        said(sources.require_weights, whole)
    )
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    write(whole, pytorch_model__bin__index__json=index)
    assert "names pytorch_model-1.bin, pytorch_model-2.bin, and no such file is there" in (
        said(sources.require_weights, whole)
    )
    for name in index["weight_map"].values():
        save_file({"x": torch.ones(1)}, whole / name)
    sources.require_weights(whole)
    write(whole, pytorch_model__bin__index__json="{")  # told by whoever reads it
    sources.require_weights(whole)


# Names


@pytest.fixture
def unasked(monkeypatch):
    """As if the Hub had not been asked before."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    sources._hub_answers.cache_clear()
    yield monkeypatch
    sources._hub_answers.cache_clear()


class Hub:
    def __init__(self, head):
        self.head = head


def refuse(*_args, **_options):
    raise OSError("Name or service not known")


@pytest.mark.parametrize("head", [refuse, lambda *_, **__: time.sleep(9)], ids=["no", "silent"])
@pytest.mark.parametrize("name", ["gpt2-medum", "owner/nothing"])
def test_a_name_that_is_nowhere_is_told_at_once(head, name, unasked, tmp_path):
    unasked.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    unasked.setattr(sources, "HUB_SECONDS", 0.1)
    unasked.setattr(sources, "get_session", lambda: Hub(head))
    began = time.perf_counter()
    message = said(Policy.from_pretrained, name, critic="none")
    assert time.perf_counter() - began < 2
    assert message.startswith(f"{name}: no model could be loaded from there: no such folder here")
    assert "cannot be asked: it does not answer; look at the name, or give a folder" in message


def test_without_a_hub_what_was_downloaded_before_is_taken(unasked):
    unasked.setattr(sources, "get_session", lambda: Hub(refuse))
    unasked.setattr(sources, "try_to_load_from_cache", lambda *_: "config.json")
    sources.require_known("owner/name")
    assert not sources.hub_answers()
    sources._hub_answers.cache_clear()
    unasked.setattr(sources, "get_session", lambda: Hub(lambda *_, **__: "any answer"))
    assert sources.hub_answers()
    unasked.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not sources.hub_answers()
