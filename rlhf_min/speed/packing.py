"""How rows lie in the model's input: padded, as anyone would write it, or packed, without padding.

Both say where the hidden states are that predict the response tokens, and these are the same:

    padded, two responses of 3 and 2 tokens to one prompt of 2, and another prompt

        p  p  r0 r1 r2
        p  p  r0 r1 .                 15 cells: 3 of padding, 2 of a prompt for the second time,
        q  q  r0 .  .                 and 3 of last tokens, which predict nothing

    packed

        p  p  r0 r1 r0 q  q           7 cells; position ids 0 1 2 3 2 0 1

A packed token sees itself, what came before it in its own response, and its prompt; so a prompt
with several responses, as in DPO, stands there once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Sequences


class Layout(NamedTuple):
    """`inputs` of the trunk, and for each of the N real response tokens, row after row, where in
    its flattened output ``(R * W, H)`` the hidden state is that predicts it: `at`, (N,)."""

    inputs: dict[str, Tensor]
    at: Tensor


def padded(batch: Sequences) -> Layout:
    """Each row as it is.

    Right-padded, so the default positions 0, 1, 2, ... are the true ones.
    """
    rows, at = batch.predicting()  # (N,) each
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention_mask}
    return Layout(inputs, rows * batch.ids.shape[1] + at)


def packed(batch: Sequences, *, width: int) -> Layout:
    """The rows end to end, and equal prompts once, in as few rows of about `width` as they fill.

    Args:
        batch: right-padded rows.
        width: W, at least; the longest row with its siblings may need more. Attention costs W for
            each token, seen or not, so a packed row should not be much longer than need be.

    Returns:
        A `Layout` with ids and positions ``(R, W)`` and a boolean attention mask ``(R, 1, W, W)``.
    """
    device, ids = batch.ids.device, batch.ids.cpu()
    prompt_lengths = batch.prompt_lengths.tolist()
    prompts = [tuple(ids[row, :P].tolist()) for row, P in enumerate(prompt_lengths)]
    # A response's last token is predicted, and predicts nothing: it need not be there.
    kept = (batch.mask.sum(1) - 1).tolist()  # tokens of each response
    siblings = _siblings(prompts, kept, width=width)
    sizes = [prompt_lengths[rows[0]] + sum(kept[row] for row in rows) for rows in siblings]
    bins = first_fit(sizes, width=max(width, *sizes))
    shape = len(bins), max(sum(sizes[i] for i in members) for members in bins)

    tokens = torch.zeros(shape, dtype=ids.dtype)
    positions, branch = torch.zeros(2, *shape, dtype=torch.long)  # branch 0 is the prompt
    family = torch.full(shape, -1)
    at: list[Tensor] = [torch.empty(0)] * len(ids)
    for r, members in enumerate(bins):
        end = 0  # of what the packed row holds so far
        for i in members:
            P = prompt_lengths[siblings[i][0]]
            start, stop = end, end + P
            tokens[r, start:stop] = ids[siblings[i][0], :P]
            positions[r, start:stop] = torch.arange(P)
            family[r, start : start + sizes[i]] = i
            for k, row in enumerate(siblings[i], 1):
                n = kept[row]
                tokens[r, stop : stop + n] = ids[row, P : P + n]
                positions[r, stop : stop + n] = torch.arange(P, P + n)
                branch[r, stop : stop + n] = k
                # The prompt's last token predicts the first one, each token the one after it.
                predicts = [start + P - 1, *range(stop, stop + n)]
                at[row] = r * shape[1] + torch.tensor(predicts)
                stop += n
            end = stop
    mine, theirs = branch[:, :, None], branch[:, None, :]
    sees = (family[:, :, None] == family[:, None, :]) & ((theirs == mine) | (theirs == 0))
    inputs = {
        "input_ids": tokens,
        "position_ids": positions,
        "attention_mask": sees.tril()[:, None],  # (R, 1, W, W)
    }
    return Layout({k: v.to(device) for k, v in inputs.items()}, torch.cat(at).to(device))


def _siblings(
    prompts: Sequence[tuple[int, ...]], lengths: Sequence[int], *, width: int
) -> list[list[int]]:
    """The rows of each prompt. No more than fill twice the longest row, which holds any pair."""
    longest = max(len(p) + n for p, n in zip(prompts, lengths, strict=True))
    found: list[list[int]] = []
    latest: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows = latest.get(prompt, [])
        size = len(prompt) + sum(lengths[i] for i in rows) + lengths[row]
        if not rows or size > max(width, 2 * longest):
            found.append([])
            latest[prompt] = found[-1]
        latest[prompt].append(row)
    return found


def first_fit(sizes: Sequence[int], *, width: int) -> list[list[int]]:
    """Bins of at most `width` for things of these sizes, the largest first, each into the first
    bin that has room.

    Source: Johnson 1973, "Near-optimal bin packing algorithms": at most 11/9 of the best, plus 4.

    Example:
        >>> first_fit([2, 5, 3, 4], width=7)
        [[1, 0], [3, 2]]
    """
    bins: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for members in bins:
            if sum(sizes[j] for j in members) + sizes[i] <= width:
                members.append(i)
                break
        else:
            bins.append([i])
    return bins
