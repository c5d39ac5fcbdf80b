"""The reward model: a classifier of (prompt, response) that learns which response people chose."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .config import (
    option,
    require_choices,
    require_not_negative,
    require_positive,
    require_seed,
    require_share,
)
from .data import Cursor, in_groups
from .encoding.cuts import CutReport
from .encoding.pairs import TextPair
from .errors import BadInput
from .losses import RewardLoss, pairwise_reward_loss
from .optim import OnNonFinite, Precision, Schedule, State, adamw, dropout_rng
from .policy import evaluating
from .reward_model import RewardModel

Pair = Mapping[str, Any]  # a row with prompt, chosen, rejected, and perhaps margin


@dataclass(frozen=True)
class RewardConfig:
    """Options of reward training. Defaults suit the small models of the embedded world."""

    trains: ClassVar = "reward_model"
    pretrained: ClassVar = {
        "epochs": (3, "BERT, Devlin et al. 2019"),
        "learning_rate": (2e-5, "BERT"),
    }
    epochs: int = option(4, "Passes over the preference pairs.")
    batch_size: int = option(32, "Pairs for each optimizer step.")
    learning_rate: float = option(7e-4, "AdamW's rate after warm-up.")
    schedule: Schedule = option("linear", "How the rate falls after warm-up.")
    warmup_share: float = option(0.1, "Share of the steps in which the rate rises from 0.")
    weight_decay: float = option(0.01, "AdamW's decay of matrices.")
    max_grad_norm: float | None = option(1.0, "Gradients longer than this are scaled down to it.")
    center_coef: float = option(0.01, "Pulls the scores, of which only differences count, to 0.")
    max_tokens: int = option(1024, "Padded tokens in one forward pass; memory only.")
    normalise: bool = option(True, "Rescale the scores to mean 0 and variance 1 afterwards.")
    precision: Precision = option("fp32", "Of forward passes, by autocast; weights stay fp32.")
    on_nonfinite: OnNonFinite = option(
        "stop", "At a number that is not finite: stop, or skip the step, 20 in a row at most."
    )
    eval_every: int = option(200, "Steps between looks at the held-out pairs.")
    seed: int = option(0, "Order of the data.")

    def __post_init__(self) -> None:
        require_positive(self, "epochs", "batch_size", "max_tokens", "learning_rate")
        require_positive(self, "max_grad_norm", "eval_every")
        require_not_negative(self, "weight_decay", "center_coef")
        require_seed(self, "seed")
        require_choices(self)
        require_share(self, "warmup_share")


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
    total_steps = total(cursor, config)
    optimizer = adamw(
        reward_model,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        warmup_share=config.warmup_share,
        total_steps=total_steps,
        max_grad_norm=config.max_grad_norm,
        precision=config.precision,
        on_nonfinite=config.on_nonfinite,
    )
    return State(optimizer, cursor)


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
        ``grad_norm``, ``learning_rate``, ``skipped`` steps so far; now and then the same of
        `heldout` under ``eval/``.

    Raises:
        NonFinite: before the optimizer step that would have used a number that is not finite.
    """
    total_steps = total(state.cursor, config)
    while state.step < total_steps:
        reward_model.train()
        started = time.perf_counter()
        learning_rate = state.optimizer.learning_rate
        batch = state.cursor.take(config.batch_size)
        metrics: dict[str, float] = {}
        with dropout_rng(config.seed, state.step, reward_model.device):
            for part in in_groups(batch, _length, max_tokens=config.max_tokens):
                with state.optimizer.autocast():
                    found = batch_loss(reward_model, part, center_coef=config.center_coef)
                state.optimizer.backward(found.loss * found.count / len(batch))
                _add_means(metrics, found, len(batch))
        alone = (
            batch_loss(reward_model, [x], center_coef=config.center_coef)._asdict() for x in batch
        )
        state.optimizer.check(metrics, enumerate(alone))
        metrics["grad_norm"] = state.optimizer.step(batch)
        state.step += 1
        metrics |= {
            "learning_rate": learning_rate,
            "skipped": state.optimizer.skipped,
            "epoch": state.cursor.epoch + state.cursor.position / len(state.cursor.examples),
            "time/seconds": time.perf_counter() - started,
        }
        if heldout and (state.step % config.eval_every == 0 or state.step == total_steps):
            with state.optimizer.autocast():
                metrics |= evaluate(reward_model, heldout, config)
        yield metrics


def evaluate(
    reward_model: RewardModel, heldout: Sequence[RewardExample], config: RewardConfig
) -> dict[str, float]:
    """Loss, accuracy, ties and margin over held-out pairs, under ``eval/``."""
    metrics: dict[str, float] = {}
    with evaluating(reward_model):
        for part in in_groups(heldout, _length, max_tokens=config.max_tokens):
            found = batch_loss(reward_model, part, center_coef=config.center_coef)
            _add_means(metrics, found, len(heldout))
    return {f"eval/{name}": value for name, value in metrics.items()}


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


def _add_means(metrics: dict[str, float], found: RewardLoss, pairs: int) -> None:
    share = int(found.count) / pairs
    for name in ("loss", "accuracy", "ties", "margin"):
        metrics[name] = metrics.get(name, 0.0) + float(getattr(found, name).detach()) * share


def _length(example: RewardExample) -> int:
    return example.length


def _sign(x: int) -> int:
    return (x > 0) - (x < 0)
