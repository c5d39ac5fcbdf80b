"""Where a model comes from: a folder, a GGUF file, or a name on the Hub. All else is refused.

Only names and small JSON files are looked at here, before any weight is read.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session

from ..errors import BadInput, require

NOT_LOADED = "no model could be loaded from there"
HUB_SECONDS = 2.5  # for an answer of the Hub
SHOWN = 3  # folders and files that are named

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = tuple(f"{name}.index.json" for name in WEIGHTS)  # of weights in several files
LFS = b"version https://git-lfs"  # how a file begins that only names the real one

# What else a folder may hold: the end of a file's name, and what to say of it.
FOREIGN = {
    ".gguf": "there is a GGUF file; give the file itself: {file}",
    ".onnx": "there is an ONNX model, which cannot be trained; give the one that it was made from",
    ".distcp": "there are parts of a distributed checkpoint; merge them into model.safetensors",
    "zero_to_fp32.py": "there are parts of a DeepSpeed checkpoint; run its zero_to_fp32.py first",
    ".pth": "there are weights, but not as transformers saves them; convert them first",
    ".h5": "there are weights of TensorFlow; give PyTorch's",
    ".msgpack": "there are weights of Flax; give PyTorch's",
    ".safetensors": "there are weights, but no config.json; save the model's config there too",
    ".bin": "there are weights, but no config.json; save the model's config there too",
}


def require_source(name_or_path: str | Path) -> None:
    """Raise `BadInput` for what can be no model, as far as the names of files tell."""
    path, is_file = Path(name_or_path), Path(name_or_path).is_file()
    prefix = f"{name_or_path}: {NOT_LOADED}: "
    if path.suffix == ".gguf":
        require(is_file, prefix + "no such file")
        require(
            all(find_spec(package) for package in ("gguf", "accelerate")),
            prefix + "GGUF files need two more packages: pip install gguf accelerate",
        )
        return
    require(not is_file, f"{prefix}this is a file; give its folder, {path.parent}")
    if path.is_dir():
        names = _names(path)
        if ADAPTER_CONFIG in names:
            _require_adapter(path, names)
        else:
            require("config.json" in names, prefix + _without_config(path, names))
        return
    require(not path.is_absolute() and len(path.parts) <= 2, prefix + "no such folder")


def split_label(name: str) -> tuple[str, str | None]:
    """What stands before and behind the last @ of ``FOLDER@LABEL``; no label in a folder's name."""
    source, at, label = name.rpartition("@")
    return (source, label) if at and not Path(name).exists() else (name, None)


def require_weights(name_or_path: str | Path) -> None:
    """Raise `BadInput` for a folder whose weights are missing, in whole or in part."""
    path = Path(name_or_path)
    if not path.is_dir():
        return
    names, prefix = _names(path), f"{path}: {NOT_LOADED}: "
    found = next((name for name in (*WEIGHTS, *INDEX) if name in names), None)
    if found is None:
        foreign = _foreign(path, names - {"training_args.bin", "optimizer.bin", "scheduler.bin"})
        raise BadInput(
            f"{prefix}there is a config.json, but no {WEIGHTS[0]}"
            + (f": {foreign}" if foreign else "; copy the weights there too")
        )
    parts = {found}
    if found in INDEX:
        files = read_json(path / found).get("weight_map")
        parts = set(map(str, files.values())) if isinstance(files, dict) else set()
        require(
            parts <= names,
            f"{prefix}{found} names {_listed(sorted(parts - names))}, and no such file is there; "
            "copy all parts",
        )
    for name in sorted(parts):
        _require_no_pointer(path, name)


def require_not_quantised(name_or_path: str | Path, config: Any) -> None:
    """Raise `BadInput` if the config says that the weights are quantised."""
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config", "quantization"):
            found = getattr(part, key, None)
            if not found:
                continue
            told = found if isinstance(found, dict) else vars(found)
            method = told.get("quant_method") or told.get("format") or told.get("mode")
            bits = told.get("bits") or (told.get("load_in_4bit") and 4)
            method = method or (f"{bits} bits" if bits else key)
            raise BadInput(
                f"{name_or_path}: its weights are quantised ({method}), and cannot be trained or "
                "compared so; give the model that it was made from, or load it with transformers, "
                "call dequantize() and save that"
            )


def require_known(name: str) -> None:
    """Raise `BadInput` for a name that can be looked up neither on the Hub nor in its cache."""
    if hub_answers() or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it does not answer"
    raise BadInput(
        f"{name}: {NOT_LOADED}: no such folder here, no such name among the downloaded models, and "
        f"the Hub ({constants.ENDPOINT}) cannot be asked: {reason}; look at the name, or give a "
        "folder"
    )


def hub_answers() -> bool:
    """Whether the Hub can be asked; if not, only what was downloaded before is looked at."""
    return not constants.HF_HUB_OFFLINE and _hub_answers()


@cache
def _hub_answers() -> bool:
    answers = []

    def ask() -> None:
        with suppress(Exception):  # those of whatever HTTP library the Hub's own uses
            answers.append(get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS))

    asking = Thread(target=ask, daemon=True)  # since looking up a host's name has no time limit
    asking.start()
    asking.join(HUB_SECONDS)
    return bool(answers)


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def base_of(name_or_path: str | Path) -> str | None:
    """The base that an adapter's folder names; None for what is no such folder."""
    file = Path(name_or_path) / ADAPTER_CONFIG
    return str(read_json(file).get("base_model_name_or_path")) if file.is_file() else None


@contextmanager
def naming_base(name_or_path: str | Path, base: str | None) -> Iterator[None]:
    """Inside, what is wrong with the base of an adapter is said of both."""
    try:
        yield
    except BadInput as error:
        if base is None:
            raise
        raise BadInput(
            f"{name_or_path}: the base of this adapter is {base}, says {ADAPTER_CONFIG} there; "
            f"{error}; if it lies elsewhere, correct base_model_name_or_path"
        ) from error


def _require_adapter(folder: Path, names: set[str]) -> None:
    """Raise `BadInput` unless this is an adapter of LoRA whose base may be one."""
    config = read_json(folder / ADAPTER_CONFIG)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    prefix = f"{folder}: {NOT_LOADED}: "
    require(
        not names & {*WEIGHTS, *INDEX},
        f"{prefix}there are both a model and an adapter; take the one that is not meant away",
    )
    require(
        kind == "LORA",
        f"{prefix}this is an adapter of {kind}, and only LoRA's are read; merge it into its base "
        "with peft, save the tokenizer there too, and give that folder",
    )
    found = next((name for name in ADAPTER_WEIGHTS if name in names), None)
    require(found is not None, f"{prefix}there is an {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS[0]}")
    _require_no_pointer(folder, str(found))
    require(find_spec("peft") is not None, f"{prefix}an adapter needs peft: pip install peft")
    require(
        isinstance(base, str) and bool(base),
        f"{prefix}{ADAPTER_CONFIG} does not say of which model this is an adapter; write it there "
        "as base_model_name_or_path",
    )
    with naming_base(folder, base):
        require(
            base_of(str(base)) is None,
            f"{base} is an adapter itself; merge it into its own base with peft first",
        )
        require_source(str(base))


def _require_no_pointer(folder: Path, name: str) -> None:
    with (folder / name).open("rb") as file:
        require(
            file.read(len(LFS)) != LFS,
            f"{folder}: {NOT_LOADED}: {name} is a pointer of Git LFS and not the weights; run git "
            "lfs pull",
        )


def _without_config(folder: Path, names: set[str]) -> str:
    inside = sorted(
        (x.parent for x in folder.glob("*/config.json") if "model_type" in read_json(x)),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    if inside:
        return f"the folder has no config.json, but there are models in it; give {_listed(inside)}"
    adapters = sorted(file.parent for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if adapters:
        return f"the folder has no config.json, but there are adapters in it, {_listed(adapters)}"
    if foreign := _foreign(folder, names):
        return foreign
    if "config.json" in _names(folder.resolve().parent):
        return f"the folder has no config.json; its parent does, give {folder.parent}"
    return "the folder has no config.json" if names else "the folder is empty"


def _foreign(folder: Path, names: set[str]) -> str | None:
    deeper = {str(file.relative_to(folder)) for file in folder.glob("*/*") if file.is_file()}
    for end, told in FOREIGN.items():
        if found := sorted(name for name in names | deeper if name.endswith(end)):
            return told.format(file=folder / found[0])
    return None


def _listed(items: Iterable[Any]) -> str:
    some = list(map(str, items))
    more = f" and {len(some) - SHOWN} more" if len(some) > SHOWN else ""
    return ", ".join(some[:SHOWN]) + more


def read_json(file: Path) -> dict[str, Any]:
    """What the file holds, or nothing: whoever reads it in earnest tells what is wrong with it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
