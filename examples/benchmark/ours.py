"""Our side, by the library's public functions as a user would call them."""

import contextlib
import time
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmark import settings
from benchmark.commands import Commands
from benchmark.models import bert_tokenizer, policy_tokenizer
from benchmark.workloads import Rollouts, Task, dpo_pairs, reward_pairs, spell
from rlhf_min import dpo as our_dpo
from rlhf_min import ppo as our_ppo
from rlhf_min import reward as our_reward
from rlhf_min import sampling as our_sampling
from rlhf_min.data import PreferenceExample, PromptExample
from rlhf_min.policy import Critic, Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.rollout import collect

ENDLESS = 10**6  # steps; the parent says when it is enough


def ppo(task: Task, commands: Commands) -> None:
    """A rollout and its update: what `rlhf_min.ppo.train` does in one step."""
    commands.imported()
    given = Rollouts.draw(task.size)
    policy = _policy(task, critic="shared")
    ref_policy = policy.reference()
    reward_model = _reward_model(task, max_length=settings.REWARD_MAX_LENGTH).eval()
    config = our_ppo.PPOConfig(
        batch_size=task.size.prompts,
        minibatch_size=settings.MINIBATCH,
        epochs=task.size.epochs,
        max_new_tokens=task.size.max_new_tokens,
        learning_rate=settings.LEARNING_RATE,
        schedule="constant",
        warmup_share=0.0,
        adam_eps=1e-8,
        max_grad_norm=None,
        gamma=settings.GAMMA,
        lam=settings.LAM,
        clip=settings.CLIP,
        value_clip=settings.CLIP,
        value_coef=settings.VALUE_COEF,
        kl_coef=settings.KL_COEF,
        precision=task.precision,
    )
    prompts = [PromptExample(spell(ids), torch.tensor(ids)) for ids in given.prompts]
    state = our_ppo.new_state(policy, prompts, config)
    orders = torch.Generator().manual_seed(settings.SEED)
    commands.ready(trained=[policy], frozen=[ref_policy, reward_model])
    while True:
        commands.wait()
        with state.optimizer.autocast(), imposed(given, state.sampling_rng):
            rollout = collect(
                policy,
                ref_policy,
                reward_model.score,
                prompts,
                config,
                rng=state.sampling_rng,
            )
        buffer = our_ppo.judge(rollout, config, kl_coef=settings.KL_COEF)
        started = time.perf_counter()
        stats = our_ppo.ppo_update(policy, state.optimizer, buffer, config, rng=orders)
        updated = time.perf_counter() - started
        told = our_ppo.report(buffer)
        given.check([r[m] for r, m in zip(rollout.sequences.responses, rollout.mask, strict=True)])
        commands.done(
            tokens=int(rollout.sequences.attention_mask.sum()),
            seconds={"sampling": rollout.seconds["sample"], "update": updated},
            figures={
                "policy loss": stats["policy_loss"],
                "value loss": stats["value_loss"],
                "KL": told["kl"],
                "score": told["score"],
            },
        )


def dpo(task: Task, commands: Commands) -> None:
    """Steps of `rlhf_min.dpo.train`, the reference scored in each of them."""
    commands.imported()
    policy = _policy(task, critic="none")
    ref_policy = policy.reference()
    config = our_dpo.DPOConfig(
        epochs=ENDLESS,
        batch_size=task.size.pairs,
        learning_rate=settings.LEARNING_RATE,
        schedule="constant",
        warmup_share=0.0,
        weight_decay=0.0,
        max_grad_norm=settings.MAX_GRAD_NORM,
        beta=settings.BETA,
        cache_reference=False,
        precision=task.precision,
    )
    end = [policy.tokenizer.eos_token_id]
    examples = [
        PreferenceExample(
            torch.tensor(pair.prompt),
            torch.tensor(pair.chosen + end),
            torch.tensor(pair.rejected + end),
        )
        for pair in dpo_pairs(task.size)
    ]
    state = our_dpo.new_state(policy, ref_policy, examples, config)
    steps = our_dpo.train(policy, ref_policy, config, state)
    commands.ready(trained=[policy], frozen=[ref_policy])
    while True:
        commands.wait()
        metrics = next(steps)
        commands.done(
            tokens=sum(
                2 * len(x.prompt_ids) + len(x.chosen_ids) + len(x.rejected_ids) for x in examples
            ),
            figures={
                "loss": metrics["loss"],
                "chosen log-probability": metrics["chosen_logprobs"],
                "rejected log-probability": metrics["rejected_logprobs"],
            },
        )


def reward(task: Task, commands: Commands) -> None:
    """Steps of `rlhf_min.reward.train`."""
    commands.imported()
    reward_model = _reward_model(task)
    config = our_reward.RewardConfig(
        epochs=ENDLESS,
        batch_size=task.size.pairs,
        learning_rate=settings.LEARNING_RATE,
        schedule="constant",
        warmup_share=0.0,
        weight_decay=0.0,
        max_grad_norm=settings.MAX_GRAD_NORM,
        center_coef=0.0,
        precision=task.precision,
    )
    pairs = [pair.texts() for pair in reward_pairs(task.size)]
    examples, _ = our_reward.prepare_pairs(reward_model, pairs)
    state = our_reward.new_state(reward_model, examples, config)
    steps = our_reward.train(reward_model, config, state)
    tokens = sum(
        int(reward_model.encode([x.prompt] * 2, [x.chosen, x.rejected]).attention_mask.sum())
        for x in examples
    )
    commands.ready(trained=[reward_model])
    while True:
        commands.wait()
        metrics = next(steps)
        figures = {name: metrics[name] for name in ("loss", "margin")}
        commands.done(tokens=tokens, figures=figures)


def sampling(task: Task, commands: Commands) -> None:
    """`rlhf_min.sampling.sample` alone."""
    commands.imported()
    given = Rollouts.draw(task.size)
    policy = _policy(task, critic="none")
    prompt_ids = [torch.tensor(ids) for ids in given.prompts]
    rng = torch.Generator().manual_seed(settings.SEED)
    half = torch.autocast("cpu", torch.bfloat16, enabled=task.precision == "bf16")
    commands.ready(frozen=[policy])
    while True:
        commands.wait()
        with half, imposed(given, rng):
            responses = our_sampling.sample(
                policy,
                prompt_ids,
                max_new_tokens=task.size.max_new_tokens,
                temperature=1.0,
                rng=rng,
            )
        given.check(responses)
        commands.done(tokens=sum(map(len, given.prompts)) + sum(map(len, responses)))


@contextlib.contextmanager
def imposed(given: Rollouts, rng: torch.Generator) -> Iterator[None]:
    """Inside, `sample` draws as always, and then each draw is replaced by the given token.

    Which one that is, the uniform number says: `sample` draws all of them at its start, one for
    each cell, so they are known before.
    """
    ahead = torch.Generator()
    ahead.set_state(rng.get_state())
    cells = given.cells  # (B, T)
    uniforms = torch.rand(cells.shape, generator=ahead, dtype=torch.float64)
    sorted_uniforms, order = uniforms.flatten().sort()
    tokens = cells.flatten()[order]
    draw = our_sampling._inverse_cdf

    def draw_given(logits: Tensor, uniforms: Tensor) -> Tensor:
        draw(logits, uniforms)
        return tokens[torch.searchsorted(sorted_uniforms, uniforms)]

    with mock.patch.object(our_sampling, "_inverse_cdf", draw_given):
        yield


def _policy(task: Task, *, critic: Critic) -> Policy:
    lm = AutoModelForCausalLM.from_pretrained(task.path("lm"))
    return Policy(lm, policy_tokenizer(task.size), critic=critic)


def _reward_model(task: Task, *, max_length: int | None = None) -> RewardModel:
    model = AutoModelForSequenceClassification.from_pretrained(task.path("bert"))
    return RewardModel(model, bert_tokenizer(task.size), max_length=max_length)
