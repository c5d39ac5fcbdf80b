"""Whole runs of the ``PPOTrainer`` of trl 1.12.0, unmodified, and the same runs by our functions.

Both sides are those of ``examples/compare``. What is supplied to both: weights, token ids and the
scores of one reward model, which trl asks itself. To ours alone: the order in which trl draws the
rows, trl's schedule, and the convention that differs: trl puts the score one cell behind EOS and
counts that cell in the value loss. The rest is `score_rollout`, `judge` and `ppo_epoch` as they
are.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from small import END, WORD_PAD, WORDS, small_policy, weights, word_tokenizer
from torch import Tensor
from trainer_harness import SEED, float64, import_trl, options
from transformers import GPT2ForSequenceClassification, PreTrainedModel

from rlhf_min import ppo
from rlhf_min.policy import Policy, evaluating

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import_trl()
from compare.job import Rollout  # noqa: E402
from compare.ours.ppo import Metrics, Setup, Side  # noqa: E402
from compare.theirs import ppo as theirs  # noqa: E402
from compare.theirs.ppo import EXTRA_TEMPERATURE  # noqa: E402
from trl.experimental.ppo import ppo_trainer as trl_ppo  # noqa: E402

PROMPT_WIDTH = 5
FIRST_WORD = max(END, WORD_PAD) + 1


@dataclass(frozen=True)
class Batch:
    """Prompts with given responses, of which the cut ones are `width` long."""

    prompt_ids: list[Tensor]
    response_ids: list[Tensor]
    width: int


@dataclass(frozen=True)
class Models:
    """Tiny random GPT-2s in float64; `reward` and `value` are classifiers of one label."""

    lm: PreTrainedModel
    ref_lm: PreTrainedModel
    reward: PreTrainedModel
    value: PreTrainedModel


def random_models() -> Models:
    """Four models of unlike weights, with dropout, which PPO has to switch off."""
    lm, ref_lm = (small_policy(seed=seed, dropout=0.1).lm for seed in (1, 2))
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        reward, value = (GPT2ForSequenceClassification(config).double() for _ in range(2))
    return Models(lm, ref_lm, reward, value)


def random_batches(config: ppo.PPOConfig) -> list[Batch]:
    """For each step prompts and responses of unequal lengths, half of them cut, half with EOS."""
    rng = np.random.RandomState(SEED)
    return [
        _random_batch(rng, config.batch_size, config.max_new_tokens) for _ in range(config.steps)
    ]


def _random_batch(rng: np.random.RandomState, n: int, width: int) -> Batch:
    def words(count: int) -> Tensor:
        return torch.from_numpy(rng.randint(FIRST_WORD, FIRST_WORD + len(WORDS), count))

    def ended(length: int) -> Tensor:
        return torch.cat([words(length - 1), torch.tensor([END])])

    edges = [words(width), ended(1), ended(width)]  # cut; EOS at once; EOS in the last cell
    others = [
        words(width) if rng.rand() < 0.5 else ended(rng.randint(1, width + 1))
        for _ in range(n - len(edges))
    ]
    prompt_ids = [words(rng.randint(2, PROMPT_WIDTH + 1)) for _ in range(n)]
    return Batch(prompt_ids, edges + others, width)


def train_trl(
    models: Models, batches: Sequence[Batch], config: ppo.PPOConfig, folder: Path
) -> theirs.Trained:
    """``PPOTrainer.train()`` on given responses. `lm` and `value` are trained in place."""
    told = options(
        folder,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_epsilon=config.adam_eps,
        total_episodes=config.steps * config.batch_size,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=1,
        num_mini_batches=config.minibatches,
        num_ppo_epochs=config.epochs,
        local_rollout_forward_batch_size=config.batch_size,
        num_sample_generations=0,
        response_length=config.max_new_tokens,
        stop_token="eos",
        missing_eos_penalty=config.eos_penalty or None,
        temperature=config.temperature - EXTRA_TEMPERATURE,
        kl_estimator=config.kl,
        kl_coef=config.kl_coef,
        whiten_rewards=config.whiten_rewards,
        gamma=config.gamma,
        lam=config.lam,
        cliprange=config.clip,
        cliprange_value=config.value_clip,
        vf_coef=config.value_coef,
    )
    given = theirs.Models(models.lm, models.ref_lm, models.reward, models.value)
    with float64():
        return theirs.train(given, word_tokenizer(), _rollouts(models, batches), told)


def train_ours(
    models: Models,
    batches: Sequence[Batch],
    config: ppo.PPOConfig,
    orders: Sequence[Sequence[int]],
) -> tuple[Policy, list[Metrics]]:
    """The same by our functions. The models stay as they are; the policy returned is trained.

    Args:
        orders: of the rows, one for each epoch.

    Returns:
        The policy, and after each rollout all that trl logs, computed from our numbers.
    """
    policy, epochs = policy_of(models), config.epochs
    side = Side(policy, Policy(models.ref_lm, policy.tokenizer), weights(policy))
    minibatches = [
        [
            [step * config.batch_size + row for row in order[i : i + config.minibatch_size]]
            for order in orders[step * epochs : (step + 1) * epochs]
            for i in range(0, config.batch_size, config.minibatch_size)
        ]
        for step in range(config.steps)
    ]
    setup = Setup(
        config,
        _rollouts(models, batches),
        batches=minibatches,
        pad_id=WORD_PAD,
        head_bias=False,
        schedule_by_rollout=True,
        metrics_of="PPOTrainer",
    )
    assert len(list(side.run(setup))) == config.steps
    return policy, side.in_words_of_trl


def policy_of(models: Models) -> Policy:
    """A copy of language model and value model as one policy; trl's head has no bias."""
    policy = Policy(copy.deepcopy(models.lm), word_tokenizer(), critic="separate")
    value = copy.deepcopy(models.value)
    policy.critic_trunk, policy.value_head = value.transformer, value.score
    return policy


def _rollouts(models: Models, batches: Sequence[Batch]) -> list[Rollout]:
    return [_rollout(models.reward, batch) for batch in batches]


def _rollout(reward: PreTrainedModel, batch: Batch) -> Rollout:
    """The given responses; each is scored alone, by the classifier's own last position."""
    pairs = zip(batch.prompt_ids, batch.response_ids, strict=True)
    rows = [torch.cat(pair)[None] for pair in pairs]
    with evaluating(reward):
        scores = [reward(ids, attention_mask=torch.ones_like(ids)).logits[0, 0] for ids in rows]
    return Rollout(
        [ids.tolist() for ids in batch.prompt_ids],
        [ids.tolist() for ids in batch.response_ids],
        [float(score) for score in scores],
    )


__all__ = ["EXTRA_TEMPERATURE", "trl_ppo"]
