"""Record what small runs of trl leave behind: the files that a finished run is compared by.

    PYTHON tests/tools/record_trl_runs.py [KIND ...]

PYTHON is one that has trl 1.16.0, 1.12.0 or 0.11.3; it needs nothing of this project. Written are
all kinds that this trl has, or those that are named, to ``tests/compare/recorded/<kind>``.

The start weights are a formula and the rows stand here, so that the tests can make the same run of
ours.
"""

import csv
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the tests import the rows and the models
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

RECORDED = Path(__file__).parent.parent / "compare" / "recorded"
PAD, EOS, WORDS = 0, 1, 12  # ids of the first two, and how many words follow
STATE = "trainer_state.json"

# What both sides are told. Six steps in two epochs of three.
SEED, RATE, BETA, BATCH, EPOCHS = 7, 3e-3, 0.3, 4, 2
OPTIONS = {
    "num_train_epochs": EPOCHS,
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": BATCH,
    "learning_rate": RATE,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "seed": SEED,
    "optim": "adamw_torch",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def sentence(first: int, n: int) -> str:
    return " ".join(f"w{(first + 5 * i) % WORDS}" for i in range(n))


def preferences(n: int, first: int = 0) -> list[dict[str, str]]:
    """Prompts end in the space that trl joins them by."""
    return [
        {
            "prompt": sentence(i, 2 + i % 3) + " ",
            "chosen": sentence(i + 1, 1 + i % 4),
            "rejected": sentence(i + 2, 2 + i % 2),
        }
        for i in range(first, first + n)
    ]


PAIRS, HELDOUT = preferences(12), preferences(4, first=40)


def demonstrations(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def tokenizer() -> Any:
    """One id for each word."""
    ids = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": 2 + i for i in range(WORDS)}
    made = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<eos>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )


def model(kind: Any = GPT2LMHeadModel, shift: int = 0) -> Any:
    """A GPT-2 of one layer whose weights are a formula, the same with every transformers."""
    config = GPT2Config(
        vocab_size=2 + WORDS,
        n_positions=32,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        num_labels=1,
    )
    made = kind(config)
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(made.named_parameters())):
            wave = 0.3 * torch.sin(torch.arange(p.numel()) * (1.7 + 0.1 * i) + i + shift)
            p.copy_(wave.view(p.shape) + (".ln_" in name and name.endswith("weight")))
    return made


# trl 1.12.0 and 1.16.0


def options(folder: Path, **own: Any) -> dict[str, Any]:
    """With what these have by another default than plain training in float32 on a CPU."""
    told = {**OPTIONS, "output_dir": str(folder), "bf16": False, "logging_steps": 1}
    told |= {"gradient_checkpointing": False, "save_only_model": True}
    return told | {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3} | own


def dataset(rows: list[dict[str, str]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def sft(folder: Path) -> None:
    import trl

    trainer = trl.SFTTrainer(
        model=model(),
        args=trl.SFTConfig(**options(folder, logging_steps=2)),
        processing_class=tokenizer(),
        train_dataset=dataset(demonstrations(PAIRS)),
        eval_dataset=dataset(demonstrations(HELDOUT)),
    )
    trainer.train()
    trainer.save_state()


def reward(folder: Path) -> None:
    import trl

    trainer = trl.RewardTrainer(
        model=model(GPT2ForSequenceClassification),
        args=trl.RewardConfig(**options(folder)),
        processing_class=tokenizer(),
        train_dataset=dataset(PAIRS),
        eval_dataset=dataset(HELDOUT),
    )
    trainer.train()
    trainer.save_state()


def dpo(folder: Path) -> None:
    import trl

    trainer = trl.DPOTrainer(
        model=model(),
        ref_model=model(),
        args=trl.DPOConfig(**options(folder, beta=BETA)),
        processing_class=tokenizer(),
        train_dataset=dataset(PAIRS),
        eval_dataset=dataset(HELDOUT),
    )
    trainer.train()  # its state is in the checkpoints alone


def ppo(folder: Path) -> None:
    import numpy as np
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    np.random.seed(SEED)
    processing_class = tokenizer()
    processing_class.padding_side = "left"
    prompts = [{"input_ids": tokenizer()(row["prompt"])["input_ids"]} for row in PAIRS]
    told = options(folder, total_episodes=24, num_ppo_epochs=2, num_sample_generations=0)
    told |= {"response_length": 6, "stop_token": "eos", "temperature": 1.0}
    told |= {"eval_strategy": "no", "save_strategy": "no"}
    trainer = PPOTrainer(
        args=PPOConfig(**told),
        processing_class=processing_class,
        model=model(),
        ref_model=model(shift=1),
        reward_model=model(GPT2ForSequenceClassification),
        value_model=model(GPT2ForSequenceClassification, shift=1),
        train_dataset=dataset(prompts),  # type: ignore[arg-type]
        eval_dataset=dataset(prompts),  # type: ignore[arg-type]
    )
    trainer.train()
    trainer.save_state()


# trl 0.11.3


def dpo_of_old(folder: Path) -> None:
    import trl

    told = {**OPTIONS, "output_dir": str(folder), "logging_steps": 1, "eval_steps": 3}
    trainer = trl.DPOTrainer(
        model=model(),
        ref_model=model(),
        args=trl.DPOConfig(**told, eval_strategy="steps", save_strategy="no", beta=BETA),
        tokenizer=tokenizer(),
        train_dataset=dataset(PAIRS),
        eval_dataset=dataset(HELDOUT),
    )
    trainer.train()
    trainer.save_state()


def ppo_step(folder: Path) -> None:
    """`step` as the tutorials call it; its numbers as a CSV, and all it returns as JSONL."""
    import numpy as np
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    config = PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=RATE, ppo_epochs=2, seed=SEED)
    lms = [AutoModelForCausalLMWithValueHead.from_pretrained(model(shift=i)) for i in (0, 1)]
    trainer = PPOTrainer(config, *lms, tokenizer())
    rng = np.random.default_rng(SEED)
    logs: list[dict[str, Any]] = []
    trainer.accelerator.log = lambda stats, **_: logs.append(stats)  # what a tracker would get
    for _ in range(5):
        queries = [torch.from_numpy(rng.integers(2, 2 + WORDS, 3)) for _ in range(4)]
        responses = [torch.from_numpy(rng.integers(2, 2 + WORDS, n)) for n in (2, 5, 3, 4)]
        scores = [torch.tensor(float(len(ids))) for ids in responses]
        stats = trainer.step(queries, responses, scores)
        trainer.log_stats(stats, {"query": queries, "response": responses}, scores)
    kept = [{k: np.asarray(v).tolist() for k, v in x.items() if k[:5] != "time/"} for x in logs]
    rows = [{"step": step, **stats} for step, stats in enumerate(kept, 1)]
    with (folder / "stats.jsonl").open("w") as file:
        file.writelines(json.dumps(_short(row)) + "\n" for row in rows)
    numbers = [k for k, v in rows[0].items() if isinstance(v, (int, float))]
    with (folder / "stats.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, numbers, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Of a list, the beginning: they are one number for each token."""
    return {k: v[:2] if isinstance(v, list) else v for k, v in row.items()}


# All of them

Recorder = Callable[[Path], None]
KINDS: dict[str, dict[str, Recorder]] = {
    "1.16.0": {"sft_1_16": sft, "reward_1_16": reward, "dpo_1_16": dpo},
    "1.12.0": {"dpo_1_12": dpo, "ppo_1_12": ppo},
    "0.11.3": {"dpo_0_11": dpo_of_old, "ppo_0_11": ppo_step},
}


def keep(run: Path, folder: Path) -> None:
    """What was logged; no weights, and no path of this machine."""
    shutil.rmtree(folder, ignore_errors=True)
    for file in sorted(run.rglob("*")):
        if file.name == STATE or file.suffix in (".csv", ".jsonl"):
            kept = folder / file.relative_to(run)
            kept.parent.mkdir(parents=True, exist_ok=True)
            text = file.read_text(encoding="utf-8").replace(str(run), "run")
            kept.write_text(text, encoding="utf-8")


def main() -> None:
    import trl

    kinds = KINDS.get(trl.__version__)
    if kinds is None:
        sys.exit(f"trl {trl.__version__} is not recorded; give a Python with {', '.join(KINDS)}")
    torch.set_num_threads(1)
    for kind in sys.argv[1:] or kinds:
        with tempfile.TemporaryDirectory() as folder:
            kinds[kind](Path(folder))
            keep(Path(folder), RECORDED / kind)
        print(RECORDED / kind)


if __name__ == "__main__":
    main()
