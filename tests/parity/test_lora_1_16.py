"""SFT and DPO of adapters beside trl 1.16.0 with peft, as recorded: whole runs from one start.

What trl started from is written into folders as peft writes them, and read by our own loaders; what
ours ends with is saved, and compared by the names of peft's file.
"""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
from recordings import NEWEST, Recording, load
from safetensors.torch import load_file, save_file
from small import word_tokenizer
from torch import Tensor
from trainer_harness import (
    DPO_METRICS,
    SHIMMED,
    Parity,
    float64,
    largest_gap,
    metric_gap,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_min import dpo, sft
from rlhf_min.encoding.codec import Codec
from rlhf_min.harness.run.saved_models import save_policy
from rlhf_min.harness.stages.run_stage import copy_policy
from rlhf_min.loading.adapters import LoRA
from rlhf_min.policy import Policy, disable_dropout

RECORDED = Recording("lora", version=NEWEST)
RUNS: dict[str, Any] = RECORDED.facts["runs"]
OF_STEP = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate"}


def runs_of(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in RUNS if name.startswith(kind)])


def in_folders(name: str, folder: Path) -> Path:
    """The adapter that trl started from, and its base beside it."""
    told, kind = RUNS[name]["config"], RUNS[name]["config"]["model"]
    config: Any = (GPT2Config if kind == "gpt2" else LlamaConfig)(**RECORDED.facts[kind])
    model: Any = (GPT2LMHeadModel if kind == "gpt2" else LlamaForCausalLM)(config)
    load(model, RECORDED.under(kind)).save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    adapter = folder / "adapter"
    adapter.mkdir()
    base = str(folder / "base")
    peft.LoraConfig(**told["adapter"], base_model_name_or_path=base).save_pretrained(str(adapter))
    save_file(RECORDED.under(f"{name}.start"), adapter / "adapter_model.safetensors")
    return adapter


def start_of(name: str, folder: Path) -> Policy:
    lora = LoRA(RUNS[name]["config"]["adapter"]["r"])
    return Policy.from_pretrained(in_folders(name, folder), critic="none", lora=lora)


def options(name: str) -> dict[str, Any]:
    """What both algorithms are told, in our words."""
    told = RUNS[name]["config"]
    return {
        "epochs": told["num_train_epochs"],
        "batch_size": told["per_device_train_batch_size"] * told["gradient_accumulation_steps"],
        "learning_rate": told["learning_rate"],
        "schedule": told["lr_scheduler_type"],
        "warmup_share": told["warmup_steps"] / len(RUNS[name]["steps"]),
        "weight_decay": told["weight_decay"],
        "max_grad_norm": told["max_grad_norm"],
        "max_tokens": 40,  # other micro-batches than trl's 2 rows
        "seed": 7,
    }


def compare(
    name: str, policy: Policy, found: list[dict[str, float]], names: dict[str, str],
    folder: Path, parity: Parity,
) -> None:  # fmt: skip
    """Each step's metrics, and the saved adapter. The clip is felt, and not always."""
    steps = RUNS[name]["steps"]
    assert len(found) == len(steps) == 6
    for i, (ours_now, theirs_now) in enumerate(zip(found, steps, strict=True)):
        # Until a step has had a rate, the second, pairs are ties but for rounding.
        told = {ours: theirs for ours, theirs in names.items() if i > 1 or ours != "accuracy"}
        parity(metric_gap(ours_now, theirs_now, told))
    norms = [metrics["grad_norm"] for metrics in found]
    assert min(norms) < RUNS[name]["config"]["max_grad_norm"] < max(norms)
    save_policy(policy, folder / "end")
    ours: dict[str, Tensor] = load_file(folder / "end" / "adapter_model.safetensors")
    parity(largest_gap(ours, RECORDED.under(f"{name}.end")))
    moved = largest_gap(ours, RECORDED.under(f"{name}.start"))
    assert moved > RUNS[name]["config"]["learning_rate"]
    config = json.loads((folder / "end" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(folder / "base")


@pytest.fixture
def precision(name: str) -> Iterator[None]:
    """Norms of Llama are computed in float32 unless they are kept from it, on both sides."""
    with float64() if RUNS[name]["config"]["model"] == "llama" else nullcontext():
        yield


@pytest.mark.eq("dpo")
@pytest.mark.parity(
    *("dpo.train", "DPOTrainer.train", NEWEST),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED, "convention": "LoRA"},
)
@runs_of("dpo")
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_dpo_of_an_adapter(name: str, cached: bool, tmp_path: Path, parity: Parity) -> None:
    start = start_of(name, tmp_path)
    pairs, _ = Codec(start.tokenizer, 8, 8).encode_preferences(RECORDED.facts["rows"]["dpo"])
    config = dpo.DPOConfig(
        **options(name), beta=RUNS[name]["config"]["beta"], cache_reference=cached
    )
    policy, reference = copy_policy(start, critic="none"), start.reference()
    state = dpo.new_state(policy, reference, pairs, config)
    found = list(dpo.train(policy, reference, config, state))
    compare(name, policy, found, OF_STEP | DPO_METRICS, tmp_path, parity)


@pytest.mark.eq("sft")
@pytest.mark.parity(
    *("sft.train", "SFTTrainer.train", NEWEST),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED, "convention": "LoRA, no dropout"},
)
@runs_of("sft")
@pytest.mark.usefixtures("precision")
def test_sft_of_an_adapter(name: str, tmp_path: Path, parity: Parity) -> None:
    policy = start_of(name, tmp_path)
    disable_dropout(policy)  # of which each side would draw its own
    rows = [
        {"prompt": row["prompt"], "response": row["completion"]}
        for row in RECORDED.facts["rows"]["sft"]
    ]
    examples, _ = Codec(policy.tokenizer, 8, 8).encode_demonstrations(rows)
    config = sft.SFTConfig(**options(name))
    state = sft.new_state(policy, examples, config)
    found = list(sft.train(policy, config, state))
    compare(name, policy, found, OF_STEP, tmp_path, parity)


def test_what_is_compared_is_worth_it() -> None:
    for name, run in RUNS.items():
        B = [x for key, x in RECORDED.under(f"{name}.start").items() if "lora_B" in key]
        assert all(bool(x.any()) == run["config"]["trained"] for x in B)
        assert {x.dtype for x in RECORDED.tensors.values()} == {B[0].dtype}
        if name.startswith("dpo"):  # the reference is the start, with its adapter
            assert run["steps"][0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-12)
