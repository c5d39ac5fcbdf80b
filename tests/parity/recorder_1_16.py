"""What the recorders of trl 1.16.0 share: its environment, a file of results, writing and checking.

A recorder is run by a Python that has trl 1.16.0, which has no PPO and so is not the trl that the
other tests run live. It needs nothing of this project. Every model is a tiny random GPT-2 in
float64. Tensors are recorded as safetensors, all else as JSON in the same file's header.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {  # read when the libraries below are imported
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

RECORDED = HERE / "recorded"
VERSION = "1.16.0"
BOUND = 1e-9  # between two recordings: another processor's rounding, amplified by Adam

SEED = 7
WORDS = ["red", "blue", "green", "big", "small", "ball", "one", "two"]
END, PAD, FIRST_WORD = 0, 1, 2
GPT2 = {
    "vocab_size": FIRST_WORD + len(WORDS),
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": PAD,
    # trl has to switch these off.
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
# What every trainer of trl is told.
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_dropout": True,
    "optim": "adamw_torch",
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": SEED,
}

# Rotary positions, which do not change when a row is padded on the left.
LLAMA = {
    **{key: GPT2[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
    "max_position_embeddings": 16,
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    # Frequencies of 1 and 1/64, which no precision rounds: each model makes its own.
    "rope_parameters": {"rope_type": "default", "rope_theta": 4096.0},
}

Facts = dict[str, Any]


class Fixture:
    """What goes into one file: tensors by name, and everything else as JSON values."""

    def __init__(self, **facts: Any) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.facts: Facts = facts

    def add_rows(self, name: str, rows: Sequence[Tensor]) -> None:
        """Tensors of unequal shapes as one, with their shapes."""
        self.tensors[name] = torch.cat([row.detach().flatten() for row in rows])
        shapes = [list(row.shape) for row in rows]
        self.tensors[f"{name}.shapes"] = torch.tensor(shapes, dtype=torch.int32)

    def add_cases(self, name: str, cases: Sequence[Facts]) -> None:
        """Arguments and results of one function, each by its name."""
        for key in cases[0]:
            self.add_rows(f"{name}.{key}", [torch.as_tensor(case[key]) for case in cases])

    def add_weights(self, name: str, model: nn.Module) -> None:
        """The parameters, of which tied ones have one name only."""
        for parameter, value in model.named_parameters():
            self.tensors[f"{name}.{parameter}"] = value.detach().clone()

    def add_gradient(self, name: str, model: nn.Module, loss: Tensor) -> None:
        """By each parameter that the loss depends on."""
        model.zero_grad()
        loss.backward()
        for parameter, value in model.named_parameters():
            if value.grad is not None:
                self.tensors[f"{name}.{parameter}"] = value.grad.clone()


def random_lm(seed: int, *, kind: str = "gpt2") -> PreTrainedModel:
    """With weights large enough that distributions are far from uniform, biases included."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**GPT2)).double()
    else:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, an end and a pad."""
    vocabulary = {word: i for i, word in enumerate(["<end>", "<pad>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


# Writing and checking


def write(fixtures: dict[str, Fixture], folder: Path) -> None:
    """Each as a file of its name."""
    versions = {name: version(name) for name in ("trl", "transformers", "torch", "accelerate")}
    for name, fixture in fixtures.items():
        facts = json.dumps(fixture.facts | {"versions": versions}, allow_nan=False)
        save_file(fixture.tensors, folder / f"{name}.safetensors", metadata={"facts": facts})


def read(path: Path) -> Facts:
    """All that a file holds, by name: tensors, numbers, texts."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors | leaves(json.loads(file.metadata()["facts"]))


def leaves(value: Any, name: str = "facts") -> Facts:
    """Nested JSON values, by their path."""
    if not isinstance(value, (dict, list)):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    parts = [leaves(part, f"{name}/{key}") for key, part in items if key != "versions"]
    return {name: len(value)} | {key: leaf for part in parts for key, leaf in part.items()}


def difference(one: Any, other: Any) -> float:
    """The largest difference of two values; infinite if they differ in more than numbers."""
    if isinstance(one, Tensor):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return math.inf
        return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other)
    return 0.0 if one == other else math.inf


def check(fixtures: dict[str, Fixture]) -> bool:
    """Compare with what is there."""
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        write(fixtures, Path(folder))
        for path in sorted(Path(folder).iterdir()):
            new, old = read(path), read(RECORDED / path.name)
            gaps = [math.inf]
            if new.keys() == old.keys():
                gaps = [difference(new[name], old[name]) for name in new]
            print(f"{path.name}: {max(gaps):.0e}")
            fine = fine and all(gap <= BOUND for gap in gaps)  # NaN is not
    return fine


def main(description: str, record: Callable[[], dict[str, Fixture]]) -> int:
    """Record, and write or compare.

    Args:
        description: of the recorder, in its first line.
        record: makes what goes into the files, by their names.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="Compare with what is recorded.")
    options = parser.parse_args()
    if version("trl") != VERSION:
        parser.error(f"needs trl {VERSION}, found {version('trl')}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fixtures = record()
    if options.check:
        return 0 if check(fixtures) else 1
    write(fixtures, RECORDED)
    return 0
