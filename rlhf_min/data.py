"""What an algorithm sees of its data: padded rows of ids with a mask, in batches, in random order.

A row is [prompt, response, padding]. All that belongs to the response is (B, T) and drawn here:

    sequence index          0     1     2  |  3     4     5     6       P = 3, T = 4
    token                   p     p     p  |  r0    r1    EOS   pad
    response index t                       |  0     1     2     3
    predicted at index                     |  2     3     4     5       P - 1 + t
    mask                                   |  1     1     1     0       EOS is real

How texts become ids is in `encoding.codec`.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .errors import require
from .masking import response_mask

Example = TypeVar("Example")


@dataclass(frozen=True)
class Sequences:
    """A batch of right-padded rows [prompt, response, padding].

    `ids` and `attention_mask` are (B, L), `prompt_lengths` (B,), `responses` and `mask` (B, T).
    """

    ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    responses: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def predicting(self) -> tuple[Tensor, Tensor]:
        """Where each of the N real response tokens is predicted: row and P - 1 + t, ``(N,)`` each.

        Nothing else shifts by one token, but for `speed/packing.py`, where rows lie end to end.
        """
        rows, t = self.mask.nonzero(as_tuple=True)
        return rows, self.prompt_lengths[rows] - 1 + t

    def select(self, rows: Sequence[int]) -> "Sequences":
        """These rows alone, without the padding that only the others needed."""
        index = torch.as_tensor(rows, device=self.ids.device)
        length = int(self.attention_mask[index].sum(1).max())
        width = int(self.mask[index].sum(1).max())
        return Sequences(
            self.ids[index, :length],
            self.attention_mask[index, :length],
            self.prompt_lengths[index],
            self.responses[index, :width],
            self.mask[index, :width],
        )

    def to(self, device: torch.device | str) -> "Sequences":
        """The same rows on another device."""
        return Sequences(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def collate(
    prompt_ids: Sequence[Tensor], response_ids: Sequence[Tensor], *, pad_id: int
) -> Sequences:
    """Pad rows on the right. Masks come from lengths, so `pad_id` may be any id, EOS included.

    Args:
        prompt_ids: one ``(P_b,)`` tensor for each row.
        response_ids: one ``(T_b,)`` tensor for each row, EOS included where there is one.
        pad_id: what stands in the padding; no result depends on it.

    Raises:
        BadInput: if there is no row, or one without a prompt token or a response token.
    """
    empty = [
        row
        for row, (p, r) in enumerate(zip(prompt_ids, response_ids, strict=True))
        if not (len(p) and len(r))
    ]
    require(
        len(prompt_ids) > 0 and not empty,
        "every row needs at least one prompt token and one response token"
        + (f", and row {empty[0]} has not" if empty else "; there is no row"),
    )
    joined = [torch.cat([p, r]) for p, r in zip(prompt_ids, response_ids, strict=True)]
    lengths = torch.tensor([len(ids) for ids in joined])  # (B,)
    response_lengths = torch.tensor([len(ids) for ids in response_ids])  # (B,)
    return Sequences(
        _pad(joined, pad_id),
        response_mask(lengths, int(lengths.max())).long(),
        lengths - response_lengths,
        _pad(response_ids, pad_id),
        response_mask(response_lengths, int(response_lengths.max())),
    )


def _pad(rows: Sequence[Tensor], pad_id: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id)


@dataclass(frozen=True)
class PromptExample:
    """A prompt to sample from: its text before template and cut, its ids, its other columns."""

    text: str
    ids: Tensor
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SFTExample:
    """A prompt with the response to imitate, as ids."""

    prompt_ids: Tensor
    response_ids: Tensor


@dataclass(frozen=True)
class PreferenceExample:
    """A prompt with its chosen and its rejected response, as ids.

    `ref_logprobs` holds the reference's summed log-probabilities of both, once they are cached.
    """

    prompt_ids: Tensor
    chosen_ids: Tensor
    rejected_ids: Tensor
    ref_logprobs: tuple[float, float] | None = None


@dataclass(frozen=True)
class UnpairedExample:
    """A prompt with one response, as ids, and whether that response is desirable.

    `ref_logprob` holds the reference's summed log-probability of it, once it is cached.
    """

    prompt_ids: Tensor
    response_ids: Tensor
    label: bool
    ref_logprob: float | None = None


def micro_batches(lengths: Sequence[int], *, max_tokens: int, among: int = 1) -> list[list[int]]:
    """Group rows of similar length so that no padded group holds more than `max_tokens`.

    Memory then depends on `max_tokens` alone, however many rows there are, and little of it is
    padding. A row longer than `max_tokens` gets a group of its own.

    Args:
        lengths: of the rows, in tokens.
        max_tokens: padded tokens of a group, at most.
        among: how many share the groups, in turns. They need no more turns than without this, and
            the largest group is as small as it can be then.

    Example:
        >>> micro_batches([3, 9, 3, 8], max_tokens=18)
        [[1, 3], [0, 2]]
        >>> micro_batches([3, 9, 3, 8], max_tokens=100, among=2)
        [[1, 3], [0, 2]]
    """
    if among > 1:
        n = -(-len(micro_batches(lengths, max_tokens=max_tokens)) // among) * among
        max_tokens = bisect_left(
            range(max_tokens),
            True,
            key=lambda tokens: len(micro_batches(lengths, max_tokens=tokens)) <= n,
        )
    groups: list[list[int]] = []
    width = 0  # of the current group: its first row is its longest
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * width <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
            width = lengths[row]
    return groups


@dataclass
class Cursor(Generic[Example]):
    """Where a run stands in its shuffled data, given by epoch and position alone.

    The order of an epoch depends on the seed and the epoch, so that a restored cursor continues
    with the very rows that come next. It is the order of ``transformers``' ``Trainer``.
    """

    examples: Sequence[Example]
    seed: int
    epoch: int = 0
    position: int = 0
    _drawn: tuple[int, list[int]] | None = field(default=None, repr=False)  # the epoch's order

    def __post_init__(self) -> None:
        require(len(self.examples) > 0, "there is no example to train on")

    def take(self, n: int) -> list[Example]:
        """The next n examples; fewer at the end of an epoch, since no batch spans two."""
        if self.position >= len(self.examples):
            self.epoch, self.position = self.epoch + 1, 0
        rows = self._order()[self.position : self.position + n]
        self.position += len(rows)
        return [self.examples[i] for i in rows]

    def take_across(self, n: int) -> list[Example]:
        """The next n examples exactly, going on into the next epochs where need be."""
        taken: list[Example] = []
        while len(taken) < n:
            taken += self.take(n - len(taken))
        return taken

    @property
    def epochs(self) -> float:
        """Passes over the data so far, with the share of the present one."""
        return self.epoch + self.position / len(self.examples)

    def batches_per_epoch(self, n: int) -> int:
        """How many `take(n)` one epoch has."""
        return -(-len(self.examples) // n)

    def _order(self) -> list[int]:
        if self._drawn is None or self._drawn[0] != self.epoch:
            rng = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.examples), generator=rng).tolist()
            self._drawn = (self.epoch, order)
        return self._drawn[1]


def in_groups(
    examples: Sequence[Example],
    length: Callable[[Example], int],
    *,
    max_tokens: int,
    among: int = 1,
) -> list[list[Example]]:
    """The examples in `micro_batches` by their length."""
    groups = micro_batches([length(x) for x in examples], max_tokens=max_tokens, among=among)
    return [[examples[i] for i in rows] for rows in groups]
