"""From a name, a folder or a GGUF file to a model with its tokenizer, or to one line why not."""

import copy
import json
import re
import struct
import textwrap
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .errors import BadInput, require

VALUE_FILE = "value_head.safetensors"
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("spm.model", "sentencepiece.model", "sentencepiece.bpe.model"),
)
TRL_HEAD = {"v_head.summary.weight": "value_head.weight", "v_head.summary.bias": "value_head.bias"}
TRL_PREFIX = "pretrained_model."  # some checkpoints of trl have it before the model's own names

# What transformers raises for a folder whose files are not what they should be.
_LOADING_ERRORS = (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    UnpicklingError,
    ValueError,
    struct.error,
)


class CausalLM(NamedTuple):
    """A language model, its tokenizer, and the tensors of the value head that lay beside it."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    value_head: dict[str, Tensor] | None


def load_causal_lm(name_or_path: str | Path) -> CausalLM:
    """A causal language model in at least float32, with what belongs to it.

    The value head may be ours, in a file of its own, or that of trl 0.x, which keeps it among the
    model's weights (``AutoModelForCausalLMWithValueHead``).

    Args:
        name_or_path: a folder, a name that ``transformers`` knows, or a ``.gguf`` file.

    Raises:
        BadInput: if it cannot be loaded, is no causal language model, or its tokenizer does not
            fit.
    """
    config = _config(name_or_path)
    kind = _architecture(config)
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    for wrong, name in [
        (config.is_encoder_decoder, "an encoder-decoder"),
        (encoder and not getattr(config, "is_decoder", False), "an encoder"),
        (kind.endswith("ForSequenceClassification"), "a classifier"),
    ]:
        require(
            not wrong,
            f"{name_or_path}: {kind} is {name} and cannot be the policy; give a causal language "
            "model, such as a GPT-2, Llama or Qwen",
        )
    model, tokenizer, info = _load(AutoModelForCausalLM, name_or_path, config, may_lack_head=False)
    require(
        tokenizer.eos_token_id is not None,
        f"{name_or_path}: the tokenizer has no EOS token, so no response could end; set its "
        "eos_token to one of its tokens and save it there",
    )
    try:
        head = _value_head(name_or_path, info["unexpected_keys"])
    except _LOADING_ERRORS as error:
        raise BadInput(f"{name_or_path}: the value head cannot be read: {_line(error)}") from error
    return CausalLM(model, tokenizer, head)


class Classifier(NamedTuple):
    """A sequence classifier, its tokenizer, and the names of its weights that were drawn anew."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_weights: list[str]


def load_classifier(name_or_path: str | Path, *, new_head: bool) -> Classifier:
    """A one-label sequence classifier in at least float32, with what belongs to it.

    Args:
        name_or_path: as in `load_causal_lm`.
        new_head: whether a missing classifier may be drawn anew; only to begin training.

    Raises:
        BadInput: if it cannot be loaded, has several labels or lacks its head, or its tokenizer
            does not fit.
    """
    config = _config(name_or_path)
    kind = _architecture(config)
    require(
        not kind.endswith("ForSequenceClassification") or config.num_labels == 1,
        f"{name_or_path}: {kind} has {config.num_labels} labels and a reward model exactly one "
        "label; give the model that this one was trained from",
    )
    config.num_labels = 1
    auto_class = AutoModelForSequenceClassification
    model, tokenizer, info = _load(auto_class, name_or_path, config, may_lack_head=new_head)
    return Classifier(model, tokenizer, sorted(info["missing_keys"]))


def _config(name_or_path: str | Path) -> PreTrainedConfig:
    path = Path(name_or_path)
    prefix = f"{name_or_path}: no model could be loaded from there: "
    is_gguf = path.suffix == ".gguf"
    require(not is_gguf or path.is_file(), prefix + "no such file")
    require(
        not is_gguf or all(find_spec(package) for package in ("gguf", "accelerate")),
        prefix + "GGUF files need two more packages: pip install gguf accelerate",
    )
    require(
        is_gguf or path.is_dir() or (not path.is_absolute() and len(path.parts) <= 2),
        prefix + "no such folder",
    )
    require(
        not path.is_dir() or (path / "config.json").is_file(),
        prefix + "the folder has no config.json",
    )
    try:
        return AutoConfig.from_pretrained(**_source(name_or_path))
    except _LOADING_ERRORS as error:
        nowhere = "" if path.exists() else "no such folder here, and from the Hub: "
        raise BadInput(prefix + nowhere + _line(error)) from error


def _load(
    auto_class: Any, name_or_path: str | Path, config: PreTrainedConfig, *, may_lack_head: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """The model, its tokenizer, and what ``transformers`` says of missing and unexpected keys."""
    source = _source(name_or_path)
    options = {**source, "config": config, "dtype": "auto", "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        if "gguf_file" in source:
            from transformers import GgufConfig  # newer than the rest

            options["quantization_config"] = GgufConfig(dequantize=True)
        model, info = auto_class.from_pretrained(**options)
        prefixed = any(name.startswith(TRL_PREFIX) for name in info["unexpected_keys"])
        if prefixed:
            without = {"^" + re.escape(TRL_PREFIX): ""}
            model, info = auto_class.from_pretrained(**options, key_mapping=without)
        if prefixed or "gguf_file" in source:
            model = _plain(model)
    except _LOADING_ERRORS as error:
        raise BadInput(
            f"{name_or_path}: no model could be loaded from there: {_line(error)}"
        ) from error
    folder = Path(name_or_path)
    require(
        not folder.is_dir() or any(file.name in TOKENIZER_FILES for file in folder.iterdir()),
        f"{name_or_path}: there is no tokenizer beside the model; save it there too",
    )
    trunk = f"{model.base_model_prefix}."
    missing = sorted(
        name
        for name in info["missing_keys"]
        if not may_lack_head or (name.startswith(trunk) and ".pooler." not in name)
    )
    require(
        not missing,
        f"{name_or_path}: weights are missing ({', '.join(missing[:3])}), so what it computes "
        "would be random; give a model that was trained for this, or train its head first",
    )
    largest, rows = max(tokenizer.get_vocab().values()), len(model.get_input_embeddings().weight)
    require(
        largest < rows,
        f"{name_or_path}: the tokenizer has ids up to {largest}, but the model only {rows} "
        "embeddings; save the model's own tokenizer there, or resize the embeddings and train them",
    )
    # Half-precision weights lose small updates: training keeps float32 and may use autocast.
    model = model.to(torch.promote_types(model.dtype, torch.float32)).eval()
    return model, tokenizer, info


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that does not know how they were stored: saving would heed it."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        plain: Any = type(model)(config)
    plain.to(model.dtype).load_state_dict(model.state_dict())
    return plain


def _value_head(name_or_path: str | Path, extra: set[str]) -> dict[str, Tensor] | None:
    if Path(name_or_path).is_file():
        return None
    folder = Path(name_or_path)
    if not folder.is_dir():  # a name: the folder that its files were downloaded to
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=[VALUE_FILE]))
    if (folder / VALUE_FILE).is_file():
        tensors = load_file(folder / VALUE_FILE)
    elif extra >= TRL_HEAD.keys():
        tensors = {name: _stored(folder, name) for name in TRL_HEAD}
    else:
        return None
    return {TRL_HEAD.get(name, name): tensor for name, tensor in tensors.items()}


def _stored(folder: Path, name: str) -> Tensor:
    """One tensor of a checkpoint, whole or in shards, in safetensors or pickled."""
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{file}.index.json").is_file():
            index = json.loads((folder / f"{file}.index.json").read_text(encoding="utf-8"))
            file = index["weight_map"][name]
        if (folder / file).is_file():
            break
    if file.endswith(".safetensors"):
        with safe_open(folder / file, framework="pt") as tensors:
            return tensors.get_tensor(name)
    return torch.load(folder / file, weights_only=True, map_location="cpu")[name]


def _source(name_or_path: str | Path) -> dict[str, str]:
    path = Path(name_or_path)
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": str(name_or_path)}


def _architecture(config: PreTrainedConfig) -> str:
    return (config.architectures or [type(config).__name__])[0]


def _line(error: BaseException) -> str:
    if isinstance(error, UnpicklingError):
        return "its pickled weights hold more than tensors and are not read; give safetensors"
    return textwrap.shorten(str(error), 200, placeholder=" ...")
