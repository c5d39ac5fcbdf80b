"""trl's PPO, unmodified, of the versions that have one: ``step`` of 0.11 and ``train`` up to 1.12.

What is put in the place of something, from outside: the tokens that sampling would draw, the
batches (that is where the process waits for its next round) and numpy's permutations, which become
those that our side draws.
"""

import importlib
import importlib.metadata
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmark import settings
from benchmark.commands import Commands
from benchmark.generate import imposing, left_padded
from benchmark.models import PAD_ID, bert_tokenizer, policy_tokenizer
from benchmark.workloads import Rollouts, Task, spell

ENDLESS = 10**5  # steps; the parent says when it is enough


def ppo(task: Task, commands: Commands) -> None:
    """The PPO that this version of trl has."""
    legacy = importlib.metadata.version("trl").startswith("0.11.")
    (legacy_ppo if legacy else experimental_ppo)(task, commands)


def legacy_ppo(task: Task, commands: Commands) -> None:
    """``generate`` and ``step`` of trl 0.11, with a reward model between them as users write it."""
    trl: Any = importlib.import_module("trl")
    config_class, trainer_class = trl.PPOConfig, trl.PPOTrainer
    policy_class = trl.AutoModelForCausalLMWithValueHead
    commands.imported()
    given, tokenizer = Rollouts.draw(task.size), policy_tokenizer(task.size)
    policy = policy_class.from_pretrained(task.path("lm"), summary_dropout_prob=0.0)
    nn.init.zeros_(policy.v_head.summary.weight)  # as ours begins
    nn.init.zeros_(policy.v_head.summary.bias)
    reward_model = classifier(task, "bert").eval()
    reward_tokenizer = bert_tokenizer(task.size)
    config = config_class(
        batch_size=task.size.prompts,
        mini_batch_size=settings.MINIBATCH,
        ppo_epochs=task.size.epochs,
        learning_rate=settings.LEARNING_RATE,
        adap_kl_ctrl=False,
        init_kl_coef=settings.KL_COEF,
        vf_coef=settings.VALUE_COEF,
        cliprange=settings.CLIP,
        cliprange_value=settings.CLIP,
        gamma=settings.GAMMA,
        lam=settings.LAM,
        seed=settings.SEED,
    )
    trainer = trainer_class(config, policy, None, tokenizer)  # None: a copy as reference
    permutations()
    prompt_ids = [torch.tensor(ids) for ids in given.prompts]
    prompts = [spell(ids) for ids in given.prompts]
    commands.ready(trained=[trainer.model], frozen=[trainer.ref_model, reward_model])
    while True:
        commands.wait()
        started = time.perf_counter()
        responses = trainer.generate(
            prompt_ids,
            batch_size=len(prompt_ids),
            return_prompt=False,
            do_sample=True,
            top_k=0,
            max_new_tokens=task.size.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=imposing(given),
        )
        sampled = time.perf_counter() - started
        given.check(responses)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        inputs = reward_tokenizer(
            prompts,
            texts,
            padding=True,
            truncation="only_first",
            max_length=settings.REWARD_MAX_LENGTH,
            return_tensors="pt",
        )
        with torch.no_grad():
            scores = reward_model(**inputs).logits[:, 0]
        stats = trainer.step(prompt_ids, responses, list(scores))
        commands.done(
            tokens=sum(map(len, prompt_ids)) + sum(map(len, responses)),
            seconds={"sampling": sampled, "update": stats["time/ppo/optimize_step"]},
            figures={
                "policy loss": float(stats["ppo/loss/policy"]),
                "value loss": float(stats["ppo/loss/value"]),
                "KL": float(stats["objective/kl"]),
                "score": float(stats["ppo/mean_scores"]),
            },
        )


def experimental_ppo(task: Task, commands: Commands) -> None:
    """``train()`` of the PPO of trl 1.0 to 1.12. Reward and value models are GPT-2s there."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    commands.imported()
    given, tokenizer = Rollouts.draw(task.size), policy_tokenizer(task.size)
    policy: Any = AutoModelForCausalLM.from_pretrained(task.path("lm"))
    ref_policy = AutoModelForCausalLM.from_pretrained(task.path("lm"))
    reward_model, value_model = (classifier(task, "classifier") for _ in range(2))
    prompts = left_padded(given.prompts)
    rows = [{"input_ids": ids} for ids in given.prompts]
    config = PPOConfig(
        **training_arguments(task, "fp32"),
        per_device_train_batch_size=task.size.prompts,
        gradient_accumulation_steps=1,
        num_mini_batches=task.size.prompts // settings.MINIBATCH,
        num_ppo_epochs=task.size.epochs,
        total_episodes=ENDLESS * task.size.prompts,
        num_sample_generations=0,
        response_length=task.size.max_new_tokens,
        stop_token="eos",
        temperature=1.0,
        kl_coef=settings.KL_COEF,
        vf_coef=settings.VALUE_COEF,
        cliprange=settings.CLIP,
        cliprange_value=settings.CLIP,
        gamma=settings.GAMMA,
        lam=settings.LAM,
    )
    trainer: Any = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=rows,
        eval_dataset=rows,
    )
    drawn_at = permutations()
    seen: dict[str, float] = {}
    generate = policy.generate

    def generate_given(**arguments: Any) -> Any:
        """Logits in the place of scores, which are those of the given tokens alone."""
        arguments |= {"output_scores": False, "output_logits": True}
        started = time.perf_counter()
        found = generate(**arguments, logits_processor=imposing(given))
        found.scores = [x.div_(config.temperature) for x in found.logits]
        found.logits = None
        seen["sampling"] = time.perf_counter() - started
        responses = [ids[ids != PAD_ID] for ids in found.sequences[:, prompts.shape[1] :]]
        given.check(responses)
        seen["tokens"] = int(arguments["attention_mask"].sum()) + sum(map(len, responses))
        return found

    def log(_metrics: dict[str, float]) -> None:
        seen["update"] = time.perf_counter() - drawn_at[0]

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            commands.wait()
            drawn_at.clear()
            yield {"input_ids": prompts}
            # Asked for the next batch, so trl is through with this one.
            seconds = {part: seen[part] for part in ("sampling", "update")}
            commands.done(tokens=int(seen["tokens"]), seconds=seconds)

    policy.generate, trainer.log, trainer.dataloader = generate_given, log, batches()
    commands.ready(trained=[policy, value_model], frozen=[ref_policy, reward_model])
    trainer.train()


def permutations() -> list[float]:
    """From now on ``np.random.permutation`` draws what our side does; the times of its calls."""
    rng, times = torch.Generator().manual_seed(settings.SEED), []

    def draw(n: int) -> np.ndarray:
        times.append(time.perf_counter())
        return torch.randperm(n, generator=rng).numpy()

    mock.patch.object(np.random, "permutation", draw).start()
    return times


def classifier(task: Task, name: str) -> Any:
    """One of the models of `save_models` with one label."""
    return AutoModelForSequenceClassification.from_pretrained(task.path(name))


def training_arguments(task: Task, precision: str) -> dict[str, Any]:
    """Of all ``TrainingArguments``; the optimizer is the default."""
    return {
        "output_dir": tempfile.mkdtemp(dir=task.folder),
        "use_cpu": True,
        "bf16": precision == "bf16",
        "gradient_checkpointing": False,
        "learning_rate": settings.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": settings.SEED,
    }
