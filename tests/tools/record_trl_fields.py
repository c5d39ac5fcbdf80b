"""Record what the configs of trl hold and what its trainers log, for the page on coming from trl.

    PYTHON_WITH_TRL tests/tools/record_trl_fields.py [FILE]

To be run in the Python of the trl that is to be recorded; this project need not be there. Without a
file it prints them.
"""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the next lines are imported

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast, TrainingArguments

WORDS = ["[PAD]", "[EOS]", *"abcdefgh"]
PAIRS = [{"prompt": "a b ", "chosen": f"c {x}", "rejected": "h h"} for x in "defg"]
DEMONSTRATIONS = [{"prompt": x["prompt"], "completion": x["chosen"]} for x in PAIRS]
# Of each stage: trl's config, its trainer, transformers' model, and rows.
STAGES: dict[str, tuple[str, str, str, list[dict[str, str]]]] = {
    "sft": ("SFTConfig", "SFTTrainer", "GPT2LMHeadModel", DEMONSTRATIONS),
    "reward": ("RewardConfig", "RewardTrainer", "GPT2ForSequenceClassification", PAIRS),
    "dpo": ("DPOConfig", "DPOTrainer", "GPT2LMHeadModel", PAIRS),
    "grpo": ("GRPOConfig", "GRPOTrainer", "GPT2LMHeadModel", PAIRS),
    "rloo": ("RLOOConfig", "RLOOTrainer", "GPT2LMHeadModel", PAIRS),
}
# What trainers that sample need beside.
SAMPLING = {"beta": 0.1, "num_generations": 2, "max_completion_length": 4}


def reward(completions: list[str], **_: Any) -> list[float]:
    """Trainers that sample log it by this name."""
    return [float(len(text)) for text in completions]


def defaults(config: Any) -> dict[str, Any]:
    """Each field with its default, as JSON knows it."""
    found = {}
    for field in dataclasses.fields(config):
        made = field.default_factory is not dataclasses.MISSING
        value = field.default_factory() if made else field.default
        found[field.name] = str(value.value) if hasattr(value, "value") else value
    return found


def fields() -> dict[str, dict[str, Any]]:
    """The Trainer's fields, and of each config of trl what it adds or changes."""
    shared = defaults(TrainingArguments)
    found = {"TrainingArguments": shared}
    for name, *_ in STAGES.values():
        own = defaults(getattr(trl, name))
        found[name] = {k: v for k, v in own.items() if k not in shared or shared[k] != v}
    return found


def logged(stage: str, folder: Path) -> list[str]:
    """The names of all that a trainer logs in a run of a few steps with an evaluation."""
    config, trainer, model, rows = STAGES[stage]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="a"
    )
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    tiny = {"vocab_size": len(WORDS), "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}
    made = getattr(transformers, model)(GPT2Config(**tiny, **ids, num_labels=1))
    made.save_pretrained(folder / "model")  # DPO reads its reference from there
    tokenizer.save_pretrained(folder / "model")
    told = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "seed": 0}
    told |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    of_rewards = {}
    if stage in ("grpo", "rloo"):
        of_rewards = {"reward_funcs": reward}
        told |= SAMPLING
    run = getattr(trl, trainer)(
        **of_rewards,
        model=str(folder / "model"),
        args=getattr(trl, config)(str(folder), num_train_epochs=1, eval_strategy="epoch", **told),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    run.train()
    return sorted({name for entry in run.state.log_history for name in entry})


def main() -> None:
    torch.set_num_threads(1)
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    metrics = {}
    with contextlib.redirect_stdout(sys.stderr):  # where trl prints what it logs
        for stage, (_, trainer, *_) in STAGES.items():
            with tempfile.TemporaryDirectory() as folder:
                metrics[trainer] = logged(stage, Path(folder))
    text = json.dumps({"versions": versions, "fields": fields(), "metrics": metrics}, indent=1)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
