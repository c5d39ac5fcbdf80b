"""Record what unmodified trl 1.16.0 computes with adapters of peft, for the tests beside this file.

    PYTHON tests/parity/record_lora_1_16.py            # writes tests/parity/recorded/
    PYTHON tests/parity/record_lora_1_16.py --check    # compares with what is there

PYTHON is one that has trl 1.16.0 and peft, see `recorder_1_16`.

An adapter is new, and trl makes it, or it was trained before, and trl is given the model with it:
then DPO's reference is the model with a copy of that adapter.
"""

from __future__ import annotations

import random
import sys
import tempfile
from importlib.metadata import version
from typing import Any

from recorder_1_16 import (
    GPT2,
    LLAMA,
    PLAIN,
    SEED,
    WORDS,
    Facts,
    Fixture,
    main,
    random_lm,
    tokenizer,
)

# isort: split
# From here on what needs the environment and the path that are set there.
import peft
import torch
from compare.theirs.float64 import float64, isolated
from datasets import Dataset
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

# A run's own keys, beside trl's options.
MODEL, ADAPTER, TRAINED = "model", "adapter", "trained"
DEFAULT: Facts = {
    MODEL: "gpt2",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
}
ALL = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"]}
ALL |= {"fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
FEW = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
DPO = DEFAULT | {"beta": 0.5, "loss_type": ["sigmoid"]}
SFT = DEFAULT | {"completion_only_loss": True}
RUNS: dict[str, Facts] = {
    "dpo, new": DPO | {ADAPTER: ALL, TRAINED: False, "max_grad_norm": 0.8},
    "dpo, trained": DPO | {ADAPTER: ALL, TRAINED: True, "max_grad_norm": 1.2},
    "dpo, Llama": DPO | {MODEL: "llama", ADAPTER: FEW, TRAINED: True, "max_grad_norm": 0.5},
    "sft, new": SFT | {ADAPTER: ALL, TRAINED: False, "max_grad_norm": 0.55},
    "sft, trained": SFT | {ADAPTER: ALL, TRAINED: True, "max_grad_norm": 1.0},
}


def rows(kind: str) -> list[dict[str, str]]:
    """10 rows of unequal lengths. A prompt ends in the space by which trl joins the texts."""
    rng = random.Random(SEED)

    def text(longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    if kind == "sft":
        return [{"prompt": f"{text(5)} ", "completion": text(6)} for _ in range(10)]
    return [
        {"prompt": f"{text(5)} ", "chosen": f"one {text(5)}", "rejected": f"two {text(5)}"}
        for _ in range(10)
    ]


def trainer_of(kind: str, told: Facts, model: Any, folder: str) -> Any:
    """A trainer of this model with an adapter."""
    config = peft.LoraConfig(**told[ADAPTER])
    torch.manual_seed(SEED)
    if told[TRAINED]:
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    trainer, arguments = {"dpo": (DPOTrainer, DPOConfig), "sft": (SFTTrainer, SFTConfig)}[kind]
    return trainer(
        model=model,
        args=arguments(
            output_dir=folder,
            **{k: v for k, v in PLAIN.items() if kind == "dpo" or k != "disable_dropout"},
            **{k: v for k, v in told.items() if k not in (MODEL, ADAPTER, TRAINED)},
        ),
        processing_class=tokenizer(),
        train_dataset=Dataset.from_list(rows(kind)),
        peft_config=None if told[TRAINED] else config,
    )


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """Of the adapter that is trained, by the names of peft's files."""
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def record() -> dict[str, Fixture]:
    """Of each run the adapter before and after, and what was logged after each step."""
    fixture = Fixture(gpt2=GPT2, llama=LLAMA, words=WORDS, runs={}, peft=version("peft"))
    fixture.facts["rows"] = {kind: rows(kind) for kind in ("dpo", "sft")}
    for kind in ("gpt2", "llama"):
        fixture.add_weights(kind, random_lm(1, kind=kind))
    for name, told in RUNS.items():
        model = random_lm(1, kind=told[MODEL])
        with tempfile.TemporaryDirectory() as folder, isolated(), float64():
            trainer = trainer_of(name.partition(",")[0], told, model, folder)
            if name.startswith("sft"):  # it has no option for that
                for module in trainer.model.modules():
                    if isinstance(module, nn.Dropout):
                        module.p = 0.0
            start = adapter(trainer.model)
            trainer.train()
        for moment, tensors in [("start", start), ("end", adapter(trainer.model))]:
            fixture.tensors |= {f"{name}.{moment}.{key}": x for key, x in tensors.items()}
        steps = [
            {k: v for k, v in entry.items() if k not in ("step_time", "epoch", "step")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        fixture.facts["runs"][name] = {"config": told, "steps": steps}
    return {"lora": fixture}


if __name__ == "__main__":
    sys.exit(main(__doc__, record))
