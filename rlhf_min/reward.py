"""The reward model: a classifier of (prompt, response) that learns which response people chose."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .config import RewardConfig
from .data import Cursor
from .encoding.cuts import CutReport
from .encoding.pairs import TextPair
from .errors import BadInput
from .losses import RewardLoss, pairwise_reward_loss
from .optim import Optimizer, State, accumulate, adamw, dropout_rng
from .policy import evaluating
from .reward_model import RewardModel

Pair = Mapping[str, Any]  # a row with prompt, chosen, rejected, and perhaps margin


@dataclass(frozen=True)
class RewardExample:
    """A preference pair, as texts and as the reward model reads them.

    `chosen_pair` and `rejected_pair` hold the ids, so that no text is tokenised in each epoch.
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float | None
    chosen_pair: TextPair
    rejected_pair: TextPair

    @property
    def length(self) -> int:
        """Tokens of the two inputs, each padded to the longer one."""
        return 2 * max(len(self.chosen_pair.ids), len(self.rejected_pair.ids))


def prepare_pairs(
    reward_model: RewardModel, pairs: Sequence[Pair]
) -> tuple[list[RewardExample], CutReport]:
    """Rows with ``prompt``, ``chosen``, ``rejected`` and perhaps ``margin``, and what was cut.

    A row whose two responses are the same for the reward model, which no score could tell apart, is
    left out and counted.
    """
    prompts = [pair["prompt"] for pair in pairs]
    responses = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    encoded, report = reward_model.codec.encode(prompts * 2, responses)
    examples = []
    for pair, chosen, rejected in zip(
        pairs, encoded[: len(pairs)], encoded[len(pairs) :], strict=True
    ):
        if not torch.equal(chosen.ids, rejected.ids):
            texts = pair["prompt"], pair["chosen"], pair["rejected"]
            examples.append(RewardExample(*texts, pair.get("margin"), chosen, rejected))
        elif chosen.cut or rejected.cut:
            report.equal_after_cut += 1
        else:
            report.equal_tokens += 1
    return examples, report


def new_state(
    reward_model: RewardModel, examples: Sequence[RewardExample], config: RewardConfig
) -> State:
    """The state before the first step."""
    cursor = Cursor(examples, seed=config.seed)
    return State(adamw(reward_model, config, total(cursor, config)), cursor)


def total(cursor: Cursor, config: RewardConfig) -> int:
    """Optimizer steps in the whole run."""
    return config.epochs * cursor.batches_per_epoch(config.batch_size)


def batch_loss(
    reward_model: RewardModel, examples: Sequence[RewardExample], *, center_coef: float
) -> RewardLoss:
    """Loss of one micro-batch; both responses of a pair pass in the same forward."""
    pairs = [x.chosen_pair for x in examples] + [x.rejected_pair for x in examples]
    chosen, rejected = reward_model.forward_pairs(pairs).split(len(examples))
    margin = None
    if any(x.margin is not None for x in examples):
        margin = chosen.new_tensor([x.margin or 0.0 for x in examples])
    return pairwise_reward_loss(chosen, rejected, margin=margin, center_coef=center_coef)


def train(
    reward_model: RewardModel,
    config: RewardConfig,
    state: State,
    *,
    heldout: Sequence[RewardExample] = (),
) -> Iterator[dict[str, float]]:
    """One optimizer step per yield, until the epochs are over. The pairs are the cursor's.

    Yields:
        ``loss``, ``accuracy``, ``ties``, ``margin`` over all pairs of the batch, before the step;
        ``grad_norm``, ``learning_rate``, ``epoch``, ``tokens``; every `config.eval_every` steps
        the first four of `heldout` under ``eval/``.

    Raises:
        NonFinite: before the optimizer step that would have used a number that is not finite.
    """
    total_steps = total(state.cursor, config)
    while state.step < total_steps:
        reward_model.train()
        learning_rate = state.optimizer.learning_rate
        batch = state.cursor.take(config.batch_size)
        dropout = partial(dropout_rng, config.seed, state.step, reward_model.device)
        metrics = means(reward_model, batch, config, state.optimizer, dropout=dropout)
        metrics["grad_norm"] = state.optimizer.step(batch, metrics)
        state.step += 1
        metrics |= {
            "learning_rate": learning_rate,
            "epoch": state.cursor.epochs,
            "tokens": sum(x.length for x in batch),
        }
        if heldout and (state.step % config.eval_every == 0 or state.step == total_steps):
            with state.optimizer.autocast():
                metrics |= evaluate(reward_model, heldout, config)
        yield metrics


def evaluate(
    reward_model: RewardModel, heldout: Sequence[RewardExample], config: RewardConfig
) -> dict[str, float]:
    """Loss, accuracy, ties and margin over held-out pairs, under ``eval/``, without dropout."""
    with evaluating(reward_model):
        metrics = means(reward_model, heldout, config)
    return {f"eval/{name}": value for name, value in metrics.items()}


def means(
    reward_model: RewardModel,
    examples: Sequence[RewardExample],
    config: RewardConfig,
    optimizer: Optimizer | None = None,
    dropout: Callable[[int], AbstractContextManager[None]] | None = None,
) -> dict[str, float]:
    """Loss and metrics of a whole batch; its gradient too, if there is an optimizer."""
    return accumulate(
        partial(batch_loss, reward_model, center_coef=config.center_coef),
        examples,
        total=len(examples),
        length=lambda example: example.length,
        max_tokens=config.max_tokens,
        optimizer=optimizer,
        dropout=dropout,
    )


def pair_scores(reward_model: RewardModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected responses, without dropout. ``(N,)`` each."""
    prompts = [pair["prompt"] for pair in pairs]
    chosen = reward_model.score(prompts, [pair["chosen"] for pair in pairs])
    return chosen, reward_model.score(prompts, [pair["rejected"] for pair in pairs])


def length_rules(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """How "the longer one wins" and "the shorter one wins" do: right 1, wrong 0, equal length 1/2.

    Length in characters. ``(N,)`` each.
    """
    longer = torch.tensor(
        [(1 + _sign(len(pair["chosen"]) - len(pair["rejected"]))) / 2 for pair in pairs]
    )
    return longer, 1 - longer


def normalise(
    reward_model: RewardModel, prompts: Sequence[str], responses: Sequence[str]
) -> tuple[float, float]:
    """Fold a gain and a bias into the classifier so that these texts score mean 0, variance 1.

    A classifier without bias gets variance 1 only.

    Returns:
        Mean and standard deviation of the scores before.

    Raises:
        BadInput: if all scores are equal, so that no gain could give them a variance.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.
    """
    scores = reward_model.score(prompts, responses)
    mean, std = float(scores.mean()), float(scores.std())
    if not std > 1e-6:
        raise BadInput(
            f"the reward model gives all {len(scores)} texts the same score {mean:.4g}: "
            "it has learned nothing; train it longer or look at the pairs"
        )
    reward_model.rescale(gain=1 / std, bias=-mean / std if reward_model.has_bias else 0.0)
    return mean, std


def _sign(x: int) -> int:
    return (x > 0) - (x < 0)
