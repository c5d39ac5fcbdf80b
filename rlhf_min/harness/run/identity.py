"""What a resumed run must find as it was: its data, and of its models the tokenizers, the configs
and the weights that are not trained."""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.speed.sharding import full, is_split

# Of a config, what no number depends on, or what is looked at in the weights.
NO_MATTER = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")

SCALE_TOLERANCE = 1e-3  # of the largest number of the layer


def identity(model: Policy | RewardModel, *, trained: bool) -> dict[str, Any]:
    """What a model is, as JSON.

    Args:
        trained: what training changes comes back from a checkpoint; it is left out.
    """
    inner = model.lm if isinstance(model, Policy) else model.model
    facts: dict[str, Any] = {
        "tokenizer": tokenizer_digest(model.tokenizer),
        "config": _settings(inner.config),
    }
    facts["weights"] = weight_digests(model, without=trained_tensors(model) if trained else ())
    if isinstance(model, RewardModel):
        facts["config"]["max_length"] = model.max_length
        if model.rescaled and not trained:
            facts["weights"] |= _numbers(model, model._last_layer)
    return facts


def difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In what two identities differ, in words; None if they do not."""
    if was["tokenizer"] != now["tokenizer"]:
        return "its tokenizer or chat template is another"
    for name in was["config"].keys() & now["config"].keys():  # other versions know others too
        if was["config"][name] != now["config"][name]:
            return f"{name} in its config was {was['config'][name]}, now {now['config'][name]}"
    then, weights = was.get("weights", {}), now.get("weights", {})
    names = sorted(
        x for x in then.keys() | weights.keys() if not _same(then.get(x), weights.get(x))
    )
    if names:
        return f"{len(names)} of its {len(weights)} weights differ, such as {names[0]}"
    return None


def weight_digests(module: nn.Module, *, without: Collection[str] = ()) -> dict[str, int]:
    """The CRC-32 of each parameter and saved buffer, but of those of some names."""
    saved = module.state_dict().keys() - set(without)
    tensors = {name: x for name, x in named_tensors(module).items() if name in saved}
    if is_split(module):  # one after the other, which are gathered in the same order everywhere
        return {name: _crc32(full(x)) for name, x in tensors.items()}
    return dict(zip(tensors, in_threads(_crc32, tensors.values()), strict=True))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once, however many names it has."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Those that training changes: all, or beside frozen weights those parameters that are not."""
    if all(p.requires_grad for p in module.parameters()):
        return named_tensors(module)
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def in_threads(function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """What `map` gives, by several threads; by one if the system gives no more."""
    try:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(function, *arguments))
    except RuntimeError:
        return list(map(function, *arguments))


def _numbers(module: nn.Module, layer: nn.Module) -> dict[str, list[float]]:
    """All numbers of a layer. A scale that was measured since the model was loaded is measured
    again by a resumed run, where other threads or another device round it otherwise."""
    own = set(layer.parameters())
    return {name: p.flatten().tolist() for name, p in module.named_parameters() if p in own}


def _same(was: int | list[float] | None, now: int | list[float] | None) -> bool:
    if isinstance(was, list) and isinstance(now, list):
        near = SCALE_TOLERANCE * max(1e-30, *map(abs, was))
        return len(was) == len(now) and all(
            abs(x - y) <= near for x, y in zip(was, now, strict=True)
        )
    return was == now


def _crc32(tensor: Tensor) -> int:
    given = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data, zlib.crc32(given))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that says how texts become ids, and ids texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own: Any = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:  # it notes there how it was called last
        own |= {"padding": None, "truncation": None}
    given = {
        "own": own,
        "special": tokenizer.special_tokens_map,
        "template": getattr(tokenizer, "chat_template", None),
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
    }
    text = json.dumps(given, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="backslashreplace"), digest_size=16).hexdigest()


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    values = json.loads(config.to_json_string(use_diff=False), parse_constant=str)  # Infinity
    return {name: value for name, value in values.items() if name not in NO_MATTER}


def fingerprint(examples: Sequence[Any]) -> str:
    """A digest of all that these dataclasses hold, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        for part in fields(example):
            value = getattr(example, part.name)
            if part.name not in ("ref_logprobs", "chosen_pair", "rejected_pair"):  # computed
                # An object is somewhere else in another process.
                text = re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(_plain(value)))
                digest.update(f"{part.name}={text};".encode(errors="backslashreplace"))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """The value, with all that arrays and images hold, of which they only show some."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else repr(value)
    if isinstance(value, (set, frozenset)):  # in no order of its own
        return sorted(map(repr, value))
    if hasattr(value, "tobytes") and not isinstance(value, np.generic):
        return repr(value), zlib.crc32(value.tobytes())
    return value
