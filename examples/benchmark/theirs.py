"""trl's side: its trainers, unmodified."""

from typing import Any

from transformers import AutoModelForCausalLM, TrainerCallback

from benchmark import settings
from benchmark.commands import Commands
from benchmark.models import bert_tokenizer, policy_tokenizer
from benchmark.their_ppo import ENDLESS, classifier, ppo, training_arguments
from benchmark.workloads import Task, dpo_pairs, reward_pairs

__all__ = ["dpo", "ppo", "reward"]


def dpo(task: Task, commands: Commands) -> None:
    """``DPOTrainer.train()``; its reference is what it loads by itself."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    commands.imported()
    texts = [pair.texts() for pair in dpo_pairs(task.size)]
    for text in texts:
        text["prompt"] += " "  # trl joins prompt and response as they are
    trainer: Any = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(task.path("lm")),
        args=DPOConfig(**_trainer_arguments(task), beta=settings.BETA),
        train_dataset=Dataset.from_list(texts),
        processing_class=policy_tokenizer(task.size),
    )
    names = {
        "loss": "loss",
        "chosen log-probability": "logps/chosen",
        "rejected log-probability": "logps/rejected",
    }
    trainer.add_callback(Rounds(commands, names))
    commands.ready(trained=[trainer.model], frozen=[trainer.ref_model])
    trainer.train()


def reward(task: Task, commands: Commands) -> None:
    """``RewardTrainer.train()`` of a BERT, on the ids that we make of the pairs."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    commands.imported()
    tokenizer = bert_tokenizer(task.size)
    texts = [pair.texts() for pair in reward_pairs(task.size)]
    rows = [
        {
            f"{side}_ids": tokenizer(text["prompt"], text[side]).input_ids
            for side in ("chosen", "rejected")
        }
        for text in texts
    ]
    trainer: Any = RewardTrainer(
        model=classifier(task, "bert"),
        args=RewardConfig(**_trainer_arguments(task)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.add_callback(Rounds(commands, {"loss": "loss", "margin": "margin"}))
    commands.ready(trained=[trainer.model])
    trainer.train()


class Rounds(TrainerCallback):
    """Makes each step of a trainer of ``transformers`` one round.

    Args:
        commands: the line to the parent.
        names: what the trainer logs of each step under our names, and under its own.
    """

    def __init__(self, commands: Commands, names: dict[str, str]) -> None:
        self.commands, self.names, self.tokens = commands, names, 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The batch is there."""
        self.commands.wait()

    def on_log(self, *_: Any, **given: Any) -> None:
        """The step is done. Tokens are counted from the start of the run."""
        logs = given["logs"]
        before, self.tokens = self.tokens, int(logs["num_tokens"])
        figures = {ours: logs[theirs] for ours, theirs in self.names.items()}
        self.commands.done(tokens=self.tokens - before, figures=figures)


def _trainer_arguments(task: Task) -> dict[str, Any]:
    return {
        **training_arguments(task, task.precision),
        "per_device_train_batch_size": task.size.pairs,
        "max_steps": ENDLESS,
        "weight_decay": 0.0,
        "max_grad_norm": settings.MAX_GRAD_NORM,
    }
