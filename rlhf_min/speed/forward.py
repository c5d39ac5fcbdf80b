"""What the policy's forward computes, with no cell computed for nothing and few logits at once."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import Sequences
from ..logprobs import lm_head_logprobs
from .fast import added_in_place, can_pack
from .packing import Layout, packed, padded

CHUNK_TOKENS = 1024  # rows of logits held at once


def logprobs_and_states(
    lm: PreTrainedModel,
    head: Mapping[str, Any],
    critic_trunk: nn.Module | None,
    batch: Sequences,
    *,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropy of the N real response tokens, and what the value head reads.

    Only the positions that predict a real response token reach the vocabulary, which is most of
    the work of a small model.

    Args:
        head: as `lm_head_logits` takes it.
        critic_trunk: what the value head reads, if it is not the model's own trunk.

    Returns:
        Shapes ``(N,)``, ``(N,)`` and ``(N, H)``.
    """
    layout = layout_of(lm, batch)
    head = {**head, "weight": added_in_place(head["weight"])}  # before the trunk
    hidden = hidden_states(lm.base_model, layout)
    logprobs, entropies = lm_head_logprobs(
        hidden,
        tokens=batch.responses[batch.mask],
        temperature=temperature,
        chunk_tokens=CHUNK_TOKENS,
        **head,
    )
    if critic_trunk is not None:
        hidden = hidden_states(critic_trunk, layout)
    return logprobs, entropies, hidden


def layout_of(lm: PreTrainedModel, batch: Sequences) -> Layout:
    """The rows packed where the model allows it, else padded."""
    if not can_pack(lm):
        return padded(batch)
    # At a row of a third of the width of the model, attention is a twentieth of the work.
    return packed(batch, width=lm.config.hidden_size // 3)


def hidden_states(trunk: nn.Module, layout: Layout) -> Tensor:
    """The states that predict the real response tokens, row after row. Shape ``(N, H)``."""
    hidden = trunk(**layout.inputs, use_cache=False).last_hidden_state  # (R, W, H)
    return hidden.flatten(0, 1)[layout.at]
