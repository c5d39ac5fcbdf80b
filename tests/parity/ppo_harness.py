"""Whole runs of the ``PPOTrainer`` of trl 1.12.0, unmodified, and the same runs by our functions.

What is supplied to both: weights and token ids. To ours alone: the order in which trl draws the
rows, trl's optimizer and schedule, and the convention that differs: trl puts the score one cell
behind EOS and counts that cell in the value loss. The rest is `score_rollout`, `judge` and
`ppo_epoch` as they are.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import END, WORD_PAD, WORDS, decayed, small_policy, word_tokenizer
from torch import Tensor, nn
from torch.nn.functional import pad
from trainer_harness import SEED, float64, import_trl, options
from transformers import GPT2ForSequenceClassification, PreTrainedModel

from rlhf_min import ppo
from rlhf_min.data import Sequences
from rlhf_min.logprobs import entropy
from rlhf_min.masking import masked_whiten, response_mask
from rlhf_min.optim import Optimizer
from rlhf_min.policy import Policy, PolicyOutput, disable_dropout, evaluating
from rlhf_min.rollout import Rollout, RolloutBuffer, score_rollout

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import_trl()
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402
from trl.experimental.ppo import ppo_trainer as trl_ppo  # noqa: E402

PROMPT_WIDTH = 5
FIRST_WORD = max(END, WORD_PAD) + 1
EXTRA_TEMPERATURE = 1e-7  # trl adds it to the one it is told

Metrics = dict[str, float]


@dataclass(frozen=True)
class Batch:
    """Prompts with given responses, of which the cut ones are `width` long."""

    prompt_ids: list[Tensor]
    response_ids: list[Tensor]
    width: int

    @property
    def prompts(self) -> Tensor:
        """Padded on the left, as trl takes them. Shape ``(B, PROMPT_WIDTH)``."""
        return torch.stack(
            [pad(ids, (PROMPT_WIDTH - len(ids), 0), value=WORD_PAD) for ids in self.prompt_ids]
        )

    @property
    def rows(self) -> Tensor:
        """With the responses, padded on the right. Shape ``(B, PROMPT_WIDTH + width)``."""
        responses = [
            pad(ids, (0, self.width - len(ids)), value=WORD_PAD) for ids in self.response_ids
        ]
        return torch.cat([self.prompts, torch.stack(responses)], 1)


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
) -> list[Metrics]:
    """``PPOTrainer.train()`` on given responses. `lm` and `value` are trained in place.

    Returns:
        What the trainer logs after each update.
    """
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
    rows = iter([batch.rows for batch in batches])

    def given(lm: Any, _prompts: Tensor, _size: int, pad_id: int, _config: Any) -> Any:
        """In the place of sampling: the next batch, and the logits that it might come from."""
        ids = next(rows)
        logits = trl_ppo.forward(lm, ids, pad_id).logits[:, PROMPT_WIDTH - 1 : -1]
        return ids, logits / config.temperature

    logged: list[Metrics] = []
    with float64(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_ppo, "batch_generation", given)
        dataset = [{"input_ids": ids.tolist()} for batch in batches for ids in batch.prompts]
        trainer = PPOTrainer(
            args=PPOConfig(**told),
            processing_class=word_tokenizer(),
            model=models.lm,
            ref_model=models.ref_lm,
            reward_model=models.reward,
            value_model=models.value,
            train_dataset=dataset,
            eval_dataset=dataset,
        )
        trainer.dataloader = [{"input_ids": batch.prompts} for batch in batches]
        trainer.log = lambda metrics: logged.append(dict(metrics))
        np.random.seed(SEED)  # trl draws its minibatches from numpy's global state
        trainer.train()
    return logged


def train_ours(
    models: Models,
    batches: Sequence[Batch],
    config: ppo.PPOConfig,
    orders: Iterator[Tensor] | None = None,
) -> tuple[Policy, list[Metrics]]:
    """The same by our functions. The models stay as they are; the policy returned is trained.

    `orders` are those of the rows, one for each epoch, if they are not those of `train_trl`.
    """
    orders = _orders(config) if orders is None else orders
    policy = policy_of(models)
    ref_policy = Policy(models.ref_lm, policy.tokenizer)
    optimizer = trl_optimizer(policy, config)
    logged = []
    for step, batch in enumerate(batches, 1):
        rollout = rollout_of(policy, ref_policy, models.reward, batch, config)
        buffer = trl_judge(policy, rollout, config)
        rate = optimizer.learning_rate
        with watched(policy, buffer.rollout, batch, config) as watch, policy_loss_over_tokens():
            epochs = [
                ppo.ppo_epoch(policy, optimizer, buffer, next(orders), config)
                for _ in range(config.epochs)
            ]
        stats = {name: float(np.mean([epoch[name] for epoch in epochs])) for name in epochs[0]}
        metrics = trl_metrics(buffer, stats, watch, config)
        logged.append(metrics | {"lr": rate, "episode": step * config.batch_size})
    return policy, logged


def _orders(config: ppo.PPOConfig) -> Iterator[Tensor]:
    rng = np.random.RandomState(SEED)
    while True:
        yield torch.from_numpy(rng.permutation(config.batch_size))


def policy_of(models: Models) -> Policy:
    """A copy of language model and value model as one policy; trl's head has no bias."""
    policy = Policy(copy.deepcopy(models.lm), word_tokenizer(), critic="separate")
    value = copy.deepcopy(models.value)
    policy.critic_trunk, policy.value_head = value.transformer, value.score
    disable_dropout(policy)
    return policy


def trl_optimizer(policy: Policy, config: ppo.PPOConfig) -> Optimizer:
    """AdamW as ``transformers`` groups it. The rate falls linearly, but only between updates."""
    adamw = torch.optim.AdamW(
        decayed(policy, config.weight_decay), lr=config.learning_rate, eps=config.adam_eps
    )
    per_update = config.epochs * config.minibatches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda step: 1 - step // per_update / config.steps
    )
    return Optimizer(adamw, schedule, max_grad_norm=config.max_grad_norm)


def rollout_of(
    policy: Policy,
    ref_policy: Policy,
    reward: PreTrainedModel,
    batch: Batch,
    config: ppo.PPOConfig,
) -> Rollout:
    """The given responses; each is scored alone, by the classifier's own last position."""
    pairs = zip(batch.prompt_ids, batch.response_ids, strict=True)
    rows = [torch.cat(pair)[None] for pair in pairs]
    with evaluating(reward):
        scores = [reward(ids, attention_mask=torch.ones_like(ids)).logits[0, 0] for ids in rows]
    return score_rollout(
        policy,
        ref_policy,
        batch.prompt_ids,
        batch.response_ids,
        torch.stack(scores),
        temperature=config.temperature,
        kl=config.kl,
        max_tokens=config.max_tokens,
    )


def trl_judge(policy: Policy, rollout: Rollout, config: ppo.PPOConfig) -> RolloutBuffer:
    """`judge` with the value mask in the place of the mask, but for the advantages' whitening."""
    value_mask = trl_value_mask(rollout.mask)
    wider = replace(rollout.sequences, mask=value_mask)
    with evaluating(policy):
        values = policy(wider, temperature=config.temperature).values
    judged = ppo.judge(
        replace(rollout, sequences=wider, values=values),
        replace(config, whiten_advantages=False),
        kl_coef=config.kl_coef,
    )
    return RolloutBuffer(
        replace(rollout, sequences=wider, values=values),
        judged.rewards,
        masked_whiten(judged.advantages, rollout.mask),
        judged.returns,
    )


@contextmanager
def policy_loss_over_tokens() -> Iterator[None]:
    """Inside, the policy's loss leaves out the cells behind the responses, in which trl trains the
    values too: where the old log-probability is the 0 of padding."""
    over_cells, step, cells_per_token = ppo.ppo_policy_loss, ppo.minibatch_step, [1.0]

    def minibatch_step(
        policy: Policy, optimizer: Optimizer, buffer: RolloutBuffer, rows: Sequence[int], *rest: Any
    ) -> Metrics:
        mask, old = buffer.rollout.mask[rows], buffer.rollout.logprobs[rows]
        cells_per_token[0] = int(mask.sum()) / int((mask & (old != 0)).sum())
        return step(policy, optimizer, buffer, rows, *rest)

    def over_tokens(
        new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, clip: float
    ) -> Any:
        found = over_cells(new, old, advantages, mask & (old != 0), clip=clip)
        # A mean over tokens, as a share of one over cells.
        share = int(found.count) / int(mask.sum()) * cells_per_token[0]
        means = ("loss", "clip_fraction", "k1", "k3", "ratio")
        shares = {name: getattr(found, name) * share for name in means}
        return found._replace(**shares, count=mask.sum())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "ppo_policy_loss", over_tokens)
        patch.setattr(ppo, "minibatch_step", minibatch_step)
        yield


def trl_value_mask(mask: Tensor) -> Tensor:
    """The real tokens and, where there is room, the cell behind them. Shape ``(B, T)``."""
    width = mask.shape[1]
    return response_mask((mask.sum(1) + 1).clamp(max=width), width)


@contextmanager
def watched(
    policy: Policy, rollout: Rollout, batch: Batch, config: ppo.PPOConfig
) -> Iterator[list[Tensor]]:
    """Collects, while the policy learns, what trl averages over all T cells, padding included.

    Behind a response the ratio is 1, its log is 0, and the entropy is of what the model says there
    of a row whose padding trl replaces by id 0 and hides.

    Yields:
        For each forward pass half the squared log-ratio, ratio and entropy of each row, averaged
        over its cells. Shape ``(3, rows)``.
    """
    tokens = [torch.cat(pair) for pair in zip(batch.prompt_ids, batch.response_ids, strict=True)]
    row_of = {tuple(ids.tolist()): row for row, ids in enumerate(tokens)}
    means: list[Tensor] = []

    @torch.no_grad()
    def look(_policy: nn.Module, inputs: tuple[Sequences], output: PolicyOutput) -> None:
        part = inputs[0]
        real_ids = [
            ids[real.bool()] for ids, real in zip(part.ids, part.attention_mask, strict=True)
        ]
        rows = [row_of[tuple(ids.tolist())] for ids in real_ids]
        new_logprobs = pad(output.logprobs, (0, batch.width - output.logprobs.shape[1]))
        real = rollout.mask[rows] & (rollout.logprobs[rows] != 0)
        log_ratio = torch.where(real, new_logprobs - rollout.logprobs[rows], 0)
        ids = batch.rows[rows]
        attention_mask = ids != WORD_PAD
        logits = policy.lm(
            input_ids=ids.masked_fill(~attention_mask, 0),
            attention_mask=attention_mask,
            position_ids=attention_mask.cumsum(1) - attention_mask.long(),
        ).logits[:, PROMPT_WIDTH - 1 : -1]
        cells = [log_ratio.square() / 2, log_ratio.exp(), entropy(logits / config.temperature)]
        means.append(torch.stack([x.mean(1) for x in cells]))

    handle = policy.register_forward_hook(look)
    try:
        yield means
    finally:
        handle.remove()


def trl_metrics(
    buffer: RolloutBuffer, stats: Metrics, watch: list[Tensor], config: ppo.PPOConfig
) -> Metrics:
    """Ours under trl's names, where trl measures the same; the others from our tensors."""
    found = ppo.report(buffer)
    score = found["score"] - config.eos_penalty * (1 - found["eos_rate"])  # trl: after the penalty
    by_minibatch = torch.cat(watch, 1).unflatten(1, (-1, config.minibatch_size)).mean(2)
    approx_kl, ratio, entropy_of_cells = by_minibatch  # over padding too
    return {
        "objective/kl": found["kl"],
        "objective/entropy": -float(buffer.rollout.logprobs.sum(1).mean()),  # of what was sampled
        "objective/non_score_reward": -config.kl_coef * found["kl"],
        "objective/scores": score,
        "objective/rlhf_reward": score - config.kl_coef * found["kl"],
        "loss/policy_avg": stats["policy_loss"],
        "loss/value_avg": stats["value_loss"],
        "policy/clipfrac_avg": stats["clip_fraction"],
        "val/clipfrac_avg": stats["value_clip_fraction"],
        "policy/approxkl_avg": float(approx_kl.mean()),
        "policy/entropy_avg": float(entropy_of_cells.mean()),
        "val/ratio": float(ratio.mean()),
        "val/ratio_var": float(ratio.var()),  # between minibatches
        "val/num_eos_tokens": found["eos_rate"] * config.batch_size,
    }
