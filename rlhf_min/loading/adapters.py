"""LoRA: small matrices beside the linear layers of a frozen model, made and read by `peft`.

    y = W x + alpha / rank * B A x      W is frozen; A, (rank, in), and B, (out, rank), are trained

A starts at random and B at zero, so a new adapter changes nothing. A copy of an adapted model has
an adapter of its own and the same frozen weights: however many copies there are, those are in
memory once. The reference is such a copy whose adapter is frozen too, as it was at the start: zero,
or that of an SFT before.

Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import require
from ..speed.sharding import gathered, is_split
from .sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json

Model = TypeVar("Model", bound=nn.Module)

ADAPTER = "default"  # its name in the model; peft knows several side by side
SETTINGS = "rlhf_min.json"  # beside the adapter: what no file of peft holds
PREFIX = "base_model.model."  # of the names in that file
CAUSAL_LM, CLASSIFIER = "CAUSAL_LM", "SEQ_CLS"  # the tasks as peft calls them
SHOWN = 3  # names in a message
MERGE_FIRST = "merge it into its base with peft, and give that folder"


@dataclass(frozen=True)
class LoRA:
    """A new adapter, or how one that is loaded is trained further.

    Args:
        rank: of the product B A. A loaded adapter has its own, which this must be.
        alpha: B A is scaled by ``alpha / rank``. None: twice the rank, or as it was loaded.
        targets: ends of the names of the layers that get matrices, such as ``q_proj``. None named:
            every linear layer but the head, or as it was loaded.
        merge: whether the model is saved with the adapter added to its weights.
        seed: of A.
    """

    rank: int
    alpha: int | None = None
    targets: Sequence[str] = ()
    merge: bool = False
    seed: int = 0


# Making and loading


def add_adapter(
    model: PreTrainedModel, lora: LoRA, *, base: str | Path, new_weights: Sequence[str] = ()
) -> None:
    """Freeze the model and give it a new adapter, in place.

    The head of a classifier is trained whole and saved with the adapter, and so is every layer that
    was drawn anew: whoever loads the adapter onto its base has them from nowhere else.

    Args:
        base: where the model came from; the saved adapter says so.
        new_weights: names of what was drawn anew.

    Raises:
        BadInput: if there is no such layer.
    """
    import peft

    trunk, whole = model.base_model_prefix, _to_train_whole(model, new_weights)
    linear = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and _within(name, trunk) and name not in whole
    }
    for target in lora.targets:
        require(
            any(_ends(name, target) for name in linear),
            f"--lora_targets {target}: {base} has no linear layer of that name below its head; "
            f"there are {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}",
        )
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
        target_modules=[n for n in linear if not lora.targets or _ends_in_one(n, lora.targets)],
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),
        task_type=_task(model),
        base_model_name_or_path=_absolute(base),
    )
    _inject(model, config, whole, seed=lora.seed)
    _note_merge(model, lora)


def load_adapter(model: PreTrainedModel, folder: Path, *, base: str) -> set[str]:
    """Freeze the model and give it the adapter of a folder, in place.

    Returns:
        The names of the model's own weights that came with it, such as a head.

    Raises:
        BadInput: if it does not fit; what `peft` raises is left to the caller.
    """
    import peft
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    config: Any = peft.PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = _absolute(base)
    config.inference_mode = False  # or peft would freeze the adapter too
    tensors = load_peft_weights(str(folder), device="cpu")
    tensors = {name.removeprefix(PREFIX): x for name, x in tensors.items()}
    own = {name for name in tensors if not _of_lora(name)}
    for name, x in tensors.items():
        require(
            bool(x.isfinite().all()),
            f"{folder}: {name} holds NaN or infinite numbers; give one from before it went wrong",
        )
    require(
        config.task_type != CLASSIFIER or _is_classifier(model),
        f"{folder}: this is the adapter of a classifier and cannot be the policy; give one of a "
        "causal language model",
    )
    for name in ("trainable_token_indices", "target_parameters"):
        require(
            not getattr(config, name, None),
            f"{folder}: the adapter has {name}, which is not read here; {MERGE_FIRST}",
        )
    tied = _tied(model)
    if template := read_json(folder / SETTINGS).get("prompt_template"):
        model.config.prompt_template = str(template)
    whole, config.modules_to_save = config.modules_to_save, None
    _inject(model, config, whole or (), seed=0)
    require(
        not tied & (own | {f"{name}.weight" for name, _ in adapted_layers(model)}),
        f"{folder}: the adapter changes an embedding, which is the vocabulary projection of "
        f"{type(model).__name__} too; {MERGE_FIRST}",
    )
    found: Any = set_peft_model_state_dict(model, tensors)
    for names, what in [
        ([name for name in found.missing_keys if _of_lora(name)], "lacks"),
        (found.unexpected_keys, "also has"),
    ]:
        require(
            not names,
            f"{folder}: the adapter does not fit {base}: it {what} "
            f"{', '.join(sorted(names)[:SHOWN])}; give the base that it was trained on as "
            f"base_model_name_or_path in its {ADAPTER_CONFIG}",
        )
    return own


def continue_adapter(
    model: PreTrainedModel, lora: LoRA, *, folder: str | Path, new_weights: Sequence[str] = ()
) -> None:
    """Prepare a model whose adapter was loaded for its further training. What `add_adapter` trains
    whole is trained whole here too, also where the adapter came without it.

    Args:
        new_weights: names of what was drawn anew.

    Raises:
        BadInput: if it is not what was asked for.
    """
    config = config_of(model)
    for what, given, has in [
        ("rank", lora.rank, config.r),
        ("alpha", lora.alpha, config.lora_alpha),
    ]:
        require(
            given is None or given == has,
            f"--lora_{what} {given}: the adapter in {folder} has {what} {has} and is trained "
            f"further as it is; give that{' or leave it out' if what == 'alpha' else ''}, or leave "
            "all of --lora_rank out to train the model whole",
        )
    require(
        not lora.targets,
        f"--lora_targets: the adapter in {folder} has its layers and is trained further as it is; "
        "leave the option out",
    )
    for name, layer in adapted_layers(model):
        require(
            isinstance(layer.get_base_layer(), nn.Linear | Conv1D)
            and _within(name, model.base_model_prefix)
            and config.task_type in (None, _task(model)),
            f"{folder}: an adapter of {name}, for {config.task_type}, cannot be trained further "
            "here; leave --lora_rank out to merge it and train the model whole",
        )
    _train_whole(model, {*(config.modules_to_save or ()), *_to_train_whole(model, new_weights)})
    _note_merge(model, lora)


def _inject(model: Any, config: Any, whole: Iterable[str], *, seed: int) -> None:
    """Freeze the model and put the adapter in; the layers `whole` are trained as they are."""
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, ADAPTER)
    _train_whole(model, whole)


def _to_train_whole(model: PreTrainedModel, new_weights: Iterable[str]) -> list[str]:
    """The layers to train whole: the head of a classifier, and what was drawn anew."""
    heads = {name.partition(".")[0] for name, _ in model.named_parameters()}
    heads -= {model.base_model_prefix}
    drawn = {name.rpartition(".")[0] for name in new_weights}
    return [
        *(sorted(heads) if _is_classifier(model) else []),
        *sorted(name for name in drawn if not any(_within(name, head) for head in heads)),
    ]


def _train_whole(model: Any, whole: Iterable[str]) -> None:
    # peft would keep each of these layers twice, as it was and as it is trained, to be able to turn
    # the adapter off. Here they are trained in place, and only saved as peft saves them.
    config_of(model).modules_to_save = sorted(whole) or None
    for p in _trained_whole(model).values():
        p.requires_grad_(True)


# What an adapted model is


def is_adapted(model: nn.Module) -> bool:
    """Whether it has an adapter."""
    return bool(getattr(model, "peft_config", None))


def config_of(model: Any) -> Any:
    """The adapter's ``LoraConfig`` of `peft`."""
    return model.peft_config[ADAPTER]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have matrices, by their names in the model without an adapter."""
    from peft.tuners.lora import LoraLayer

    yield from [(n, layer) for n, layer in model.named_modules() if isinstance(layer, LoraLayer)]


def copied(model: Model, device: torch.device | None = None) -> Model:
    """A copy to train or to freeze. Of an adapted model only what is trained is copied: the frozen
    weights are the same tensors, so the copy must stay where they are. Of one that is split among
    the processes the copy is whole.

    Args:
        device: where the copy will be put; None for where the model is. On another one it has all
            weights for itself.
    """
    if is_split(model):
        return gathered(model)
    shared: dict[int, Any] = {}
    if is_adapted(model) and _is_on(model, device):
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared)


def _is_on(model: nn.Module, device: torch.device | None) -> bool:
    here = next(model.parameters()).device
    return device is None or torch.empty(0, device=device).device == here  # cuda is cuda:0


# Saving


def merge_adapter(model: Any) -> None:
    """Add the adapter to the weights, in place, and be a model without one; all is trained then.

    No frozen tensor changes, since copies of the model may have it too.
    """
    for name, layer in list(adapted_layers(model)):
        base = layer.get_base_layer()
        for key, p in list(base.named_parameters(recurse=False)):
            setattr(base, key, nn.Parameter(p.detach().clone()))
        layer.merge()
        model.set_submodule(name, base)
    del model.peft_config


def is_saved_merged(model: nn.Module) -> bool:
    """Whether a model without an adapter is saved: it has none, or `LoRA.merge` says so."""
    return not is_adapted(model) or bool(getattr(model, "merge_when_saved", False))


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter and the layers that were trained whole as `peft` does; and the template,
    which of a whole model stands in its config."""
    from peft.utils import get_peft_model_state_dict

    config = copy.copy(config_of(model))
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors |= _trained_whole(model)
    named = {f"{PREFIX}{name}": x.detach().cpu().contiguous() for name, x in tensors.items()}
    save_file(named, folder / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
    config.inference_mode = True  # as peft saves it: whoever loads it does not train it
    config.save_pretrained(str(folder))
    # With a config.json beside it transformers would look for a whole model.
    settings = {"prompt_template": getattr(model.config, "prompt_template", None)}
    (folder / SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")


def _trained_whole(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the layers that are trained beside the adapter, by their names."""
    whole = config_of(model).modules_to_save or ()
    return {
        f"{name}.{key}": p
        for name, layer in model.named_modules()
        if _ends_in_one(name, whole)
        for key, p in layer.named_parameters()
    }


def _note_merge(model: Any, lora: LoRA) -> None:
    model.merge_when_saved = lora.merge


def _tied(model: PreTrainedModel) -> set[str]:
    """The names of the weight that is embedding and vocabulary projection at once, if one is."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return set()
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, p in named if p is embedding.weight}


def _is_classifier(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings() is None


def _task(model: PreTrainedModel) -> str:
    return CLASSIFIER if _is_classifier(model) else CAUSAL_LM


def _absolute(base: str | Path) -> str:
    """A folder by its whole path, which is the same one from everywhere; a name as it is."""
    return str(Path(base).resolve() if Path(base).is_dir() else base)


def _of_lora(name: str) -> bool:
    return "lora_" in name


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _ends(name: str, target: str) -> bool:
    """Whether `peft` takes this target for the module of this name."""
    return name == target or name.endswith(f".{target}")


def _ends_in_one(name: str, targets: Iterable[str]) -> bool:
    return any(_ends(name, target) for target in targets)
