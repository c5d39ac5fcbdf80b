"""A model with its tokenizer from a name, a folder or a GGUF file, or one line on why not."""

import copy
import io
import json
import re
import struct
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
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
from transformers.utils import logging as transformers_logging

from ..errors import BadInput, require
from .adapters import (
    LoRA,
    add_adapter,
    continue_adapter,
    load_adapter,
    merge_adapter,
)
from .sources import (
    NOT_LOADED,
    base_of,
    hub_answers,
    naming_base,
    require_known,
    require_not_quantised,
    require_source,
    require_weights,
)

VALUE_FILE = "value_head.safetensors"
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("spm.model", "sentencepiece.model", "sentencepiece.bpe.model"),
)
TRL_HEAD = {"v_head.summary.weight": "value_head.weight", "v_head.summary.bias": "value_head.bias"}
TRL_PREFIX = "pretrained_model."  # some checkpoints of trl have it before the model's own names

MAX_LABELS = 100_000
MAX_LAYERS = 1000  # more than any model has, and few enough to be made before weights are missed
CHAT_TEMPLATE_NAME = re.compile(r"[\w. -]{1,100}")  # each is saved as a file of its name

# What transformers raises for a folder whose files are not what they should be.
_LOADING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
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


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, ``transformers`` shows no bar, table or warning of its own; a download keeps its bar.

    What a caller has to act on is an error here, or said in our own words.
    """
    verbosity = transformers_logging.get_verbosity()
    loading = transformers_logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one comes where the environment forbids the Hub's bars
        try:
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()  # which disables the Hub's too
            if downloads:
                enable_progress_bars()
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if loading:
                transformers_logging.enable_progress_bar()  # and this enables them
            if not downloads:
                disable_progress_bars()


@quiet()
def load_causal_lm(name_or_path: str | Path, *, lora: LoRA | None = None) -> CausalLM:
    """A causal language model in at least float32, with what belongs to it.

    The value head may be ours, in a file of its own, or that of trl 0.x, which keeps it among the
    model's weights (``AutoModelForCausalLMWithValueHead``).

    Args:
        name_or_path: a folder, a name that ``transformers`` knows, or a ``.gguf`` file. The folder
            of an adapter is loaded onto its base, and merged into it.
        lora: the model gets an adapter, or keeps the one that it has, and is frozen otherwise.

    Raises:
        BadInput: if it is no causal language model, or lacks something, or its tokenizer does not
            fit. What other libraries raise is left to `Reading`.
    """
    require_source(name_or_path)
    base = base_of(name_or_path)
    adapter = None if base is None else Path(name_or_path)
    with naming_base(name_or_path, base):
        config = _config(base or name_or_path)
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
    model, tokenizer, info = _load(
        AutoModelForCausalLM, base or name_or_path, config, adapter=adapter, may_lack_head=False
    )
    _adapt(model, name_or_path, base, lora, set())
    require(
        tokenizer.eos_token_id is not None,
        f"{name_or_path}: the tokenizer has no EOS token, so no response could end; set its "
        "eos_token to one of its tokens and save it there",
    )
    with Reading(name_or_path, "the value head cannot be read"):
        beside = adapter is not None and (adapter / VALUE_FILE).is_file()
        source = name_or_path if beside else base or name_or_path
        head = _value_head(source, info["unexpected_keys"])
    _require_finite(name_or_path, (head or {}).items())
    return CausalLM(model, tokenizer, head)


class Classifier(NamedTuple):
    """A sequence classifier, its tokenizer, and the names of its weights that were drawn anew."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_weights: list[str]


@quiet()
def load_classifier(
    name_or_path: str | Path,
    *,
    new_head: bool,
    label: str | None = None,
    lora: LoRA | None = None,
) -> Classifier:
    """A sequence classifier in at least float32, with what belongs to it.

    Args:
        name_or_path: as in `load_causal_lm`, like `lora`.
        new_head: whether a missing classifier may be drawn anew; only to begin training.
        label: the one of several whose probability is asked for. Without it there may be but one.

    Raises:
        BadInput: if it has several labels, or not this one; if it lacks its head, or its tokenizer
            does not fit. What other libraries raise is left to `Reading`.
    """
    require_source(name_or_path)
    base = base_of(name_or_path)
    adapter = None if base is None else Path(name_or_path)
    with naming_base(name_or_path, base):
        config = _config(base or name_or_path)
    if label is None:
        kind, names = _architecture(config), label_names(config)
        require(
            "Classification" not in kind or config.num_labels == 1,
            f"{name_or_path}: {kind} has {config.num_labels} labels ({', '.join(names[:5])}) and a "
            "reward model exactly one score; for the log-probability of one of them give --reward "
            f"{name_or_path}@{names[-1] if names else 'LABEL'}",
        )
        config.num_labels = 1
    else:
        label_number(config, label, name_or_path)
    auto_class = AutoModelForSequenceClassification
    may_lack_head = new_head or base is not None  # it may come with the adapter
    model, tokenizer, info = _load(
        auto_class, base or name_or_path, config, adapter=adapter, may_lack_head=may_lack_head
    )
    missing = set(info["missing_keys"])
    _adapt(model, name_or_path, base, lora, missing)
    _require_none_missing(name_or_path, () if new_head else missing)
    return Classifier(model, tokenizer, sorted(missing))


def label_names(config: PreTrainedConfig) -> list[str]:
    """What a classifier calls its labels, in the order of its logits."""
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def label_number(config: PreTrainedConfig, label: str, where: str | Path) -> int:
    """Which of a classifier's logits is that of a label, by its name.

    Raises:
        BadInput: if it has no such label, or two, or none that has a probability.
    """
    names, shown = label_names(config), 20
    require(
        len(names) > 1 and config.problem_type != "regression",
        f"{where}: it gives a score and no probabilities of labels; leave @{label} out",
    )
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    require(
        names.count(label) == 1,
        f"{where}: it has {'no' if label not in names else 'more than one'} label {label!r}; its "
        f"labels are {', '.join(names[:shown])}{more}",
    )
    return names.index(label)


def _config(name_or_path: str | Path) -> PreTrainedConfig:
    path, prefix = Path(name_or_path), f"{name_or_path}: {NOT_LOADED}: "
    nowhere = "" if path.exists() else ": no such folder here, and from the Hub"
    if not path.exists():
        with Reading(name_or_path, NOT_LOADED + nowhere):
            require_known(str(name_or_path))
    labels = _labels(path)
    require(
        labels <= MAX_LABELS,
        f"{prefix}config.json says {labels} labels; at most {MAX_LABELS} are named",
    )
    with Reading(name_or_path, NOT_LOADED + nowhere):
        config = AutoConfig.from_pretrained(**_source(name_or_path))
    require_not_quantised(name_or_path, config)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    require(
        layers <= MAX_LAYERS,
        f"{prefix}config.json says {layers} layers; at most {MAX_LAYERS} are made",
    )
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = str(getattr(part, "_attn_implementation", None))
        require(
            "/" not in attention, f"{prefix}its attention {attention} is code, which is not run"
        )
    return config


def _labels(folder: Path) -> int:
    """How many labels the config.json has, before ``transformers`` makes a name for each."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_labels"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return 0  # it has none, or `Reading` tells what is wrong
    return found if isinstance(found, int) else 0


def _load(
    auto_class: Any,
    name_or_path: str | Path,
    config: PreTrainedConfig,
    *,
    adapter: Path | None,
    may_lack_head: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """The model, its tokenizer, and what ``transformers`` says of missing and unexpected keys.

    Args:
        adapter: a folder whose tokenizer is taken, if there is one in it.
    """
    require_weights(name_or_path)
    tokenizer_from = name_or_path if adapter is None or not _has_tokenizer(adapter) else adapter
    tokenizer = AutoTokenizer.from_pretrained(**_source(tokenizer_from))
    model, info = _read(auto_class, _source(name_or_path), config)
    require(
        not Path(name_or_path).is_dir() or _has_tokenizer(Path(tokenizer_from)),
        f"{name_or_path}: there is no tokenizer beside the model; save it there too",
    )
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise BadInput(
            f"{name_or_path}: {name} is {tuple(found)}, but config.json says {tuple(expected)}; "
            "give the config that these weights were saved with"
        )
    trunk = f"{model.base_model_prefix}."
    _require_none_missing(
        name_or_path,
        [
            name
            for name in info["missing_keys"]
            if not may_lack_head or (name.startswith(trunk) and ".pooler." not in name)
        ],
    )
    require_embeddings(tokenizer_from, model, tokenizer)
    _require_finite(name_or_path, model.named_parameters())
    _require_chat_templates(tokenizer_from, tokenizer)
    _try_to_save(model, tokenizer)
    # Half-precision weights lose small updates: training keeps float32 and may use autocast.
    model = model.to(torch.promote_types(model.dtype, torch.float32)).eval()
    # The weights are still mapped from the file. There they begin wherever its header ends, which
    # makes some processors round products differently; and overwriting the file would change them.
    for p in model.parameters():
        p.data = p.data.clone()
    return model, tokenizer, info


def _require_none_missing(name_or_path: str | Path, names: Iterable[str]) -> None:
    missing = sorted(names)
    require(
        not missing,
        f"{name_or_path}: weights are missing ({', '.join(missing[:3])}), so what it computes "
        "would be random; give a model that was trained for this, or train its head first",
    )


def _has_tokenizer(folder: Path) -> bool:
    return any(file.name in TOKENIZER_FILES for file in folder.iterdir())


def _read(
    auto_class: Any, source: dict[str, Any], config: PreTrainedConfig
) -> tuple[Any, dict[str, Any]]:
    options = {**source, "config": config, "dtype": "auto", "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are refused by name afterwards
    gguf_config = getattr(transformers, "GgufConfig", None)
    if "gguf_file" in source and gguf_config:  # older versions do this by themselves
        options["quantization_config"] = gguf_config(dequantize=True)
    # For a GGUF file there is a bar that `quiet` does not reach.
    with redirect_stderr(io.StringIO() if "gguf_file" in source else sys.stderr):
        model, info = auto_class.from_pretrained(**options)
    prefixed = any(name.startswith(TRL_PREFIX) for name in info["unexpected_keys"])
    if prefixed:
        without = {"^" + re.escape(TRL_PREFIX): ""}
        model, info = auto_class.from_pretrained(**options, key_mapping=without)
    if prefixed or "gguf_file" in source:
        model = _without_storage(model)
    return model, info


def _adapt(
    model: PreTrainedModel,
    name_or_path: str | Path,
    base: str | None,
    lora: LoRA | None,
    missing: set[str],
) -> None:
    """Give the model the adapter that its folder holds, or a new one; without `lora` a loaded one
    is merged, and all is trained.

    Args:
        missing: the names of weights that were drawn anew; those that come with the adapter are
            taken out.
    """
    if base is not None:
        with Reading(name_or_path, f"the adapter does not fit {base}"):
            missing -= load_adapter(model, Path(name_or_path), base=base)
        if lora is None:
            merge_adapter(model)
            model.requires_grad_(True)
        else:
            continue_adapter(model, lora, folder=name_or_path, new_weights=sorted(missing))
    elif lora is not None:
        require(
            Path(name_or_path).suffix != ".gguf",
            f"{name_or_path}: an adapter of a GGUF file could not be loaded again; give the model "
            "that it was made from",
        )
        add_adapter(model, lora, base=name_or_path, new_weights=sorted(missing))


def require_embeddings(
    name_or_path: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise `BadInput` unless the model has an embedding for every id of the tokenizer."""
    embeddings: Any = model.get_input_embeddings()
    largest, rows = max(tokenizer.get_vocab().values()), len(embeddings.weight)
    require(
        largest < rows,
        f"{name_or_path}: the tokenizer has ids up to {largest}, but the model only {rows} "
        "embeddings; save the model's own tokenizer there, or resize the embeddings and train them",
    )


def _require_finite(name_or_path: str | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        require(
            bool(tensor.isfinite().all()),
            f"{name_or_path}: {name} holds NaN or infinite numbers; give weights from before they "
            "went wrong",
        )


def _require_chat_templates(name_or_path: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    templates = getattr(tokenizer, "chat_template", None) or {}
    named = templates if isinstance(templates, dict) else {"default": templates}
    for name, template in named.items():
        require(
            isinstance(template, str) and CHAT_TEMPLATE_NAME.fullmatch(str(name)) is not None,
            f"{name_or_path}: the chat template {name!r} is no text, or no file can be called so; "
            "correct the tokenizer_config.json there",
        )


def _try_to_save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """What cannot be saved is noticed now, and not when it has been trained."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def _without_storage(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a new model, which is not saved in the format that they came in."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        new: Any = type(model)(config)
    new.to(model.dtype).load_state_dict(model.state_dict())
    return new


def _value_head(name_or_path: str | Path, extra: set[str]) -> dict[str, Tensor] | None:
    if Path(name_or_path).is_file():
        return None
    folder = Path(name_or_path)
    if not folder.is_dir():  # a name: the folder that its files were downloaded to
        found = snapshot_download(
            str(name_or_path), allow_patterns=[VALUE_FILE], local_files_only=not hub_answers()
        )
        folder = Path(found)
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


def _source(name_or_path: str | Path) -> dict[str, Any]:
    """Where ``transformers`` finds it. Unless told not to, it would ask whether to run its code."""
    path, source = Path(name_or_path), dict[str, Any](trust_remote_code=False)
    if path.suffix == ".gguf":
        return source | {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    source["pretrained_model_name_or_path"] = str(name_or_path)
    return source if path.is_dir() else source | {"local_files_only": not hub_answers()}


def _architecture(config: PreTrainedConfig) -> str:
    return (config.architectures or [type(config).__name__])[0]


class Reading(AbstractContextManager[None]):
    """Inside, what other libraries raise becomes `BadInput`: one line, with the name before it."""

    def __init__(self, name_or_path: str | Path, what: str = NOT_LOADED) -> None:
        self.prefix = f"{name_or_path}: {what}: "

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        # The tokenizers library has no error of its own: it raises bare Exceptions.
        known = kind is Exception or isinstance(error, _LOADING_ERRORS)
        if error is not None and known and not isinstance(error, BadInput):
            raise BadInput(self.prefix + _line(error)) from error


def _line(error: BaseException) -> str:
    text = textwrap.shorten(str(error), 200, placeholder=" ...")
    if isinstance(error, UnpicklingError):
        return "its pickled weights hold more than tensors and are not read; give safetensors"
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is not run; give a model that transformers knows"
    if isinstance(error, SafetensorError | EOFError):
        return f"its weights are damaged ({text or 'they are empty'}); copy or save them again"
    if type(error) is Exception:
        return f"its tokenizer is damaged ({text}); copy or save it again"
    if isinstance(error, json.JSONDecodeError):
        return f"one of its JSON files is damaged ({text}); copy or save it again"
    if isinstance(error, OSError | RuntimeError | StrictDataclassError | ValueError):
        return text
    return f"{type(error).__name__}: {text}"
