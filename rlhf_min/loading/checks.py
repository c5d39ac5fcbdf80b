"""What we rely on in a model of transformers: its head, its positions, and what padding does."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import BadInput, require
from ..logprobs import at_least_float32, lm_head_logits
from .models import require_embeddings

UNKNOWN_POSITIONS = 512  # of a reward model that does not say


@torch.no_grad()
def require_known_head(lm: PreTrainedModel, head: Mapping[str, Any]) -> None:
    """Raise `BadInput` unless `lm_head_logits` with this head gives the model's own logits."""
    ids = torch.arange(2, device=lm.device)[None]  # (1, 2), any two tokens
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    hidden = lm.base_model(**inputs).last_hidden_state
    ours = lm_head_logits(hidden, temperature=1.0, **head)
    theirs = at_least_float32(lm(**inputs).logits)
    if not theirs.isfinite().all():
        raise BadInput(
            f"{lm.name_or_path or type(lm).__name__}: its weights are finite and its "
            "logits are not; give weights from before they went wrong"
        )
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.std())):
        raise BadInput(
            f"{type(lm).__name__} makes its logits in a way that is not known here, so its "
            "log-probabilities would be wrong; use another model"
        )


def positions_of(model: PreTrainedModel) -> float:
    """How many tokens the model has positions for; infinite where its config does not say.

    A model with rotary positions could compute more, but was not trained for that. And where the
    frequencies change beyond a length, one long row changes them for its whole batch.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if isinstance(table, nn.Embedding) and table.padding_idx is not None:
        # RoBERTa counts from behind its pad id
        limits.append(table.num_embeddings - table.padding_idx - 1)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in [rope, *(x for x in rope.values() if isinstance(x, dict))]:  # or one for each kind
        if part.get("rope_type") == "longrope":
            limits.append(part.get("original_max_position_embeddings"))
    return min((n for n in limits if n is not None and n > 0), default=math.inf)  # XLNet says -1


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many ids the model has embeddings for."""
    embeddings: Any = model.get_input_embeddings()
    return len(embeddings.weight)


def require_room(
    model: PreTrainedModel, rows: Iterable[Sequence[Tensor]], *, new_tokens: int = 0
) -> None:
    """Raise `BadInput` unless the model has embeddings and positions for these rows.

    Args:
        rows: the parts of each row, ``(P_b,)`` and perhaps ``(T_b,)``; none is empty.
        new_tokens: how many are to be written after each row.
    """
    rows = [tuple(parts) for parts in rows]
    positions, vocabulary = positions_of(model), vocabulary_of(model)
    if _all_fit(rows, positions - new_tokens, vocabulary):
        return
    for row, parts in enumerate(rows):
        if why := _misfit(type(model).__name__, parts, positions, vocabulary, new_tokens):
            raise BadInput(f"row {row}: {why}")


def _all_fit(rows: list[Sequence[Tensor]], positions: float, vocabulary: int) -> bool:
    """Whether all rows fit, by one look at all ids; also False where one look cannot tell."""
    every = [ids for parts in rows for ids in parts]
    if not all(ids.dim() == 1 and not ids.is_floating_point() and len(ids) > 0 for ids in every):
        return False
    if len({ids.device for ids in every}) != 1 or positions < max(sum(map(len, x)) for x in rows):
        return False
    low, high = torch.cat(every).aminmax()
    return bool(low >= 0 and high < vocabulary)


def _misfit(
    name: str, parts: Sequence[Tensor], positions: float, vocabulary: int, new_tokens: int
) -> str | None:
    """Why a model of this name has no room for a row; None if it has."""
    for ids in parts:
        if ids.dim() != 1 or ids.is_floating_point() or len(ids) == 0:
            return (
                f"ids of shape {tuple(ids.shape)} and {ids.dtype}; a prompt and a "
                "response are one row of whole numbers each, with at least one token"
            )
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocabulary:
            return (
                f"id {low if low < 0 else high} is none of the {vocabulary} that "
                f"{name} has embeddings for; encode with the model's own tokenizer"
            )
    length = sum(map(len, parts))
    if length + new_tokens <= positions:
        return None
    size = f"{length} tokens" + f" and {new_tokens} to be written" * (new_tokens > 0)
    return (
        f"{size} do not fit into the {positions} positions of {name}; shorten "
        "the rows (of a Codec: max_prompt_tokens, max_response_tokens)"
    )


def scoring_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> PreTrainedTokenizerBase:
    """A copy of a classifier's tokenizer that pads, and knows how long texts may be.

    Args:
        model: is told the pad token.
        max_length: tokens of a text; None for as many as the model reads.

    Raises:
        BadInput: if tokenizer, model or length do not fit.
    """
    positions = positions_of(model)
    positions = UNKNOWN_POSITIONS if math.isinf(positions) else int(positions)
    if max_length is None:
        max_length = min(positions, tokenizer.model_max_length)
    require(tokenizer.is_fast, "the reward model's tokenizer needs a tokenizer.json")
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    require(
        tokenizer.pad_token is not None,
        "the reward model's tokenizer has no pad and no EOS token; set tokenizer.pad_token",
    )
    # GPT-2 and its kin read the score at the last token that is none of padding.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    require(
        8 <= max_length <= positions,
        f"max_length {max_length} must lie between 8 and the model's {positions} positions",
    )
    require_embeddings("the reward model", model, tokenizer)
    tokenizer.model_max_length = max_length  # saved with the model
    return tokenizer


def choose_padding_side(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    last_layer: nn.Linear,
    score: Callable[[slice], Tensor],
) -> None:
    """Pad on the right, or on the left as XLNet needs it: wherever padding changes no score.

    The two are compared by the direction of what the last layer reads, since a new head may score
    all texts alike. The tokenizer keeps the side, and it is saved with it.

    Args:
        model: the classifier.
        tokenizer: the side is set here.
        last_layer: of the classifier.
        score: the scores of a long and a short text, or of those of the two that a slice takes.

    Raises:
        BadInput: if padding on either side changes a score.
    """
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(last_layer.weight.shape, generator=rng, dtype=torch.float32)

    def by_direction(_layer: nn.Linear, inputs: tuple[Tensor], _output: Tensor) -> Tensor:
        return F.linear(F.normalize(inputs[0].float(), dim=-1), weight.to(model.device))

    near = max(torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32)) ** 0.5
    hook = last_layer.register_forward_hook(by_direction)
    try:
        for side in ("right", "left"):
            tokenizer.padding_side = side
            tokenizer.init_kwargs["padding_side"] = side  # what is saved
            alone, beside = score(slice(1, 2))[0], score(slice(2))[1]
            if torch.allclose(alone, beside, rtol=near, atol=near, equal_nan=True):
                return
    finally:
        hook.remove()
    raise BadInput(
        f"{type(model).__name__} scores a text otherwise alone than beside a longer one, "
        "so padding changes its scores; give a classifier that heeds attention_mask"
    )
