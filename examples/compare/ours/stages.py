"""SFT, reward training and DPO: `train` as it is shipped, on given ids in a given order.

What follows trl in something is a field of `Setup`; as they are by default, all is ours.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn, tensor

from compare.job import Ids, Stage
from compare.theirs.float64 import float64
from compare.theirs.recorder import dropouts
from rlhf_min import dpo, reward, sft
from rlhf_min.config import TrainingConfig
from rlhf_min.data import Cursor, PreferenceExample, SFTExample
from rlhf_min.encoding.pairs import TextPair
from rlhf_min.optim import Optimizer, State, adamw
from rlhf_min.policy import Policy, disable_dropout, evaluating
from rlhf_min.reward import RewardExample
from rlhf_min.reward_model import RewardModel

Example = TypeVar("Example")
Micros = list[list[int]]  # of one step: its micro-batches, as numbers of rows


@dataclass(frozen=True)
class Setup:
    """All that a run of ours depends on, beside the model it starts from.

    Args:
        config: of the stage; its `epochs` does not matter.
        rows: what each row that is trained on consists of.
        total_steps: what the schedule counts to.
        steps: how many are taken.
        batches: the rows of each step; None: as our cursor draws them.
        micro_sizes: of each step's micro-batches, whose means are averaged; None: one mean.
        first_counted: SFT divides by the first token of each row too, which nothing predicts.
        dropout: whether the model's own is on. DPO never has any.
        segments: whether a BERT is told which of two texts a token belongs to.
        pad_id: what a reward model takes for padding; None: as it is.
        margins: of a reward model's pairs, by number of the row.
        eps, betas: of AdamW.
        frozen: names of parameters that are not trained.
        reference: of DPO, folder of its reference; None: the model that it starts from.
    """

    config: TrainingConfig
    rows: Mapping[int, Ids]
    total_steps: int
    steps: int
    batches: Sequence[Sequence[int]] | None = None
    micro_sizes: Sequence[Sequence[int]] | None = None
    first_counted: bool = False
    dropout: bool = True
    segments: bool = True
    pad_id: int | None = None
    margins: Mapping[int, float] = field(default_factory=dict)
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    frozen: Sequence[str] = ()
    reference: str | None = None

    def drawn(self) -> list[Micros]:
        """The rows of each step, in micro-batches if their means are taken."""
        batches = self.batches
        if batches is None:
            cursor = Cursor(sorted(self.rows), seed=self.config.seed)
            size: int = self.config.batch_size  # type: ignore[attr-defined]
            batches = [cursor.take(size) for _ in range(self.steps)]
        batches = batches[: self.steps]
        sizes = self.micro_sizes or [[len(rows)] for rows in batches]
        return [list(_parted(rows, of)) for rows, of in zip(batches, sizes, strict=True)]


def _parted(rows: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Parts of these sizes, the last of which takes what is left."""
    rest = iter(rows)
    for part in [*(list(islice(rest, n)) for n in sizes[:-1]), list(rest)]:
        if part:
            yield part


class Batch(list[Example]):
    """The examples of one step, which remembers its micro-batches."""

    parts: list[list[Example]]

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        super().__init__(example for part in parts for example in part)
        self.parts = [list(part) for part in parts]


@dataclass
class Given(Generic[Example]):
    """A cursor that hands out given batches."""

    examples: Sequence[Example]
    batches: list[Micros]
    number: dict[int, int]  # number of a row -> its place in `examples`
    epoch: int = 0
    position: int = 0

    def take(self, _n: int) -> Batch[Example]:
        """The next batch, whatever its size."""
        micros = self.batches[self.position]
        self.position += 1
        return Batch([[self.examples[self.number[row]] for row in part] for part in micros])

    @property
    def epochs(self) -> float:
        """Not counted here."""
        return 0.0

    def batches_per_epoch(self, _n: int) -> int:
        """All, so that the run ends with the last one."""
        return len(self.batches)


@dataclass
class Side:
    """A start model, and as many runs from it as are asked for."""

    stage: Stage
    model: Policy | RewardModel
    start: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[tuple[nn.Module, str, float]] = field(default_factory=list)
    references: dict[str | None, Policy | RewardModel] = field(default_factory=dict)

    @classmethod
    def load(
        cls, stage: Stage, folder: str | Path, *, float64: bool, device: str = "cpu"
    ) -> "Side":
        """Raises `BadInput` if the model cannot be loaded."""
        model: Policy | RewardModel
        if stage == "reward":
            model = RewardModel.from_pretrained(folder)
        else:
            model = Policy.from_pretrained(folder, critic="none")
        model = model.float()  # as trl's side reads it
        model = (model.double() if float64 else model).to(device)
        side = cls(stage, model)
        side.start = {name: p.detach().clone() for name, p in side.module.named_parameters()}
        side.dropped = list(dropouts(model))
        return side

    @property
    def module(self) -> nn.Module:
        """The trained model, as ``transformers`` has it: its parameters' names are trl's."""
        return self.model.model if isinstance(self.model, RewardModel) else self.model.lm

    @property
    def tokenizer(self) -> Any:
        """Of the model."""
        return self.model.tokenizer

    @property
    def dropout(self) -> float:
        """The largest share that the model itself would drop in training."""
        return max((share for _, _, share in self.dropped), default=0.0)

    def run(self, setup: Setup) -> Iterator[dict[str, float]]:
        """Metrics of each step, from the start weights on; the module is trained in place."""
        double = next(self.module.parameters()).dtype == torch.float64
        if setup.reference not in {None, *self.references}:  # loaded as in `load`
            device = str(self.model.device)
            loaded = Side.load(self.stage, str(setup.reference), float64=double, device=device)
            self.references[setup.reference] = loaded.model
        with float64() if double else nullcontext():
            yield from self._run(setup)

    def _run(self, setup: Setup) -> Iterator[dict[str, float]]:
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                p.copy_(self.start[name])
                p.requires_grad_(name not in setup.frozen)
        for module, name, share in self.dropped:
            setattr(module, name, share)
        if self.stage == "dpo" or not setup.dropout:
            disable_dropout(self.model)
        numbers = sorted({row for micros in setup.drawn() for part in micros for row in part})
        examples = self._examples(setup, numbers)
        places = {number: place for place, number in enumerate(numbers)}
        cursor: Any = Given(examples, setup.drawn(), places)
        config = replace(setup.config, epochs=1)  # type: ignore[call-arg]
        optimizer = adamw(self.model, config, setup.total_steps, eps=setup.eps)
        for group in optimizer.optimizer.param_groups:
            group["betas"] = setup.betas
        with self._following(setup):
            yield from self._train(config, State(optimizer, cursor))

    def _train(self, config: Any, state: State) -> Iterator[dict[str, float]]:
        model: Any = self.model
        if self.stage == "sft":
            return sft.train(model, config, state)
        if self.stage == "reward":
            return reward.train(model, config, state)
        return dpo.train(model, model, config, state)  # the reference is cached

    @contextmanager
    def _following(self, setup: Setup) -> Iterator[None]:
        """Inside, what of the setup no option says."""
        with ExitStack() as stack:
            if setup.micro_sizes is not None:
                module: Any = {"sft": sft, "reward": reward, "dpo": dpo}[self.stage]
                means = partial(mean_of_means, module.means)
                stack.enter_context(patch.object(module, "means", means))
            if setup.first_counted:
                stack.enter_context(patch.object(sft, "means", partial(_first_counted, sft.means)))
            if isinstance(self.model, RewardModel):
                model, tokenizer = self.model, self.model.tokenizer
                if not setup.segments:
                    pad = partial(model.codec.pad, side=tokenizer.padding_side, types=False)
                    stack.enter_context(patch.object(model, "pad", pad))
                if setup.pad_id is not None:
                    before, config = tokenizer.pad_token, model.model.config
                    stack.callback(setattr, tokenizer, "pad_token", before)
                    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(setup.pad_id)
                    stack.enter_context(patch.object(config, "pad_token_id", setup.pad_id))
            yield

    def _examples(self, setup: Setup, numbers: Sequence[int]) -> list[Any]:
        room = getattr(self.model, "positions", math.inf)
        rows = [_in_room(setup.rows[number], room) for number in numbers]
        if self.stage == "sft":
            return [_demonstration(x["prompt_ids"], x["response_ids"]) for x in rows]
        if self.stage == "reward":
            model: Any = self.model
            return [_pair(model, setup.rows[n], setup.margins.get(n)) for n in numbers]
        pairs = [
            PreferenceExample(
                tensor(x["prompt_ids"]), tensor(x["chosen_ids"]), tensor(x["rejected_ids"])
            )
            for x in rows
        ]
        policy: Any = self.model  # which is still its own reference
        policy = self.references.get(setup.reference, policy)
        with evaluating(policy):
            return dpo.cache_reference(policy, pairs, max_tokens=setup.config.max_tokens)


def _in_room(ids: Ids, room: float) -> Ids:
    """A prompt of trl's with a response of ours can be too long: then its beginning goes. Rows that
    are one side's alone always fit."""
    if "prompt_ids" not in ids:
        return ids
    prompt = ids["prompt_ids"]
    longest = max(len(x) for name, x in ids.items() if "prompt" not in name)
    over = len(prompt) + longest - room
    return ids | {"prompt_ids": prompt[int(over) :]} if over > 0 else ids


def mean_of_means(means: Any, *arguments: Any, **dropout: Any) -> dict[str, float]:
    """`means` over a `Batch` as trl takes it: of each micro-batch, and then of these."""
    *models, batch, config, optimizer = arguments
    share = _Share(optimizer, 1 / len(batch.parts))
    found = [means(*models, part, config, share, **dropout) for part in batch.parts]
    return {name: math.fsum(m[name] for m in found) / len(found) for name in found[0]}


def _first_counted(
    means: Any,
    policy: Policy,
    examples: Sequence[SFTExample],
    config: Any,
    optimizer: Any,
    **dropout: Any,
) -> dict[str, float]:
    """`sft.means` with one token more in each row to divide by."""
    tokens = sum(len(x.response_ids) for x in examples)
    share = tokens / (tokens + len(examples))
    found = means(policy, examples, config, _Share(optimizer, share), **dropout)
    return {name: value * share for name, value in found.items()}


@dataclass
class _Share:
    """An optimizer that gets a share of each gradient."""

    optimizer: Optimizer
    share: float

    def autocast(self) -> Any:
        return self.optimizer.autocast()

    def backward(self, loss: Tensor) -> None:
        self.optimizer.backward(loss * self.share)


def _demonstration(prompt_ids: list[int], response_ids: list[int]) -> SFTExample:
    """Of ids alone. Where trl trains on the prompt too, all but its first token is the response:
    nothing predicts that one."""
    ids, first = prompt_ids + response_ids, max(1, len(prompt_ids))
    return SFTExample(tensor(ids[:first]), tensor(ids[first:]))


def _pair(model: RewardModel, ids: Ids, margin: float | None) -> RewardExample:
    """Of ids alone. Which of them belong to the prompt is read off the separator."""
    chosen, rejected = (_text_pair(model, ids[name]) for name in ("chosen_ids", "rejected_ids"))
    return RewardExample("", "", "", margin, chosen, rejected)


def _text_pair(model: RewardModel, ids: list[int]) -> TextPair:
    before, between, after = model.codec.special_ids
    first, end = len(before), len(ids) - len(after)
    separator = between[0] if between else None
    prompt = ids.index(separator, first) - first if separator in ids[first:end] else 0
    return TextPair(tensor(ids), prompt, end - first - prompt - len(between), cut=False)
