"""Keys and values of the tokens so far, so that a step of sampling computes one token a row."""

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import ModelOutput

from ..errors import BadInput

ROWS_AT_ONCE = 128  # at most
SMALL_CACHE = 2**28  # bytes of keys and values that are always allowed
CACHE_NAMES = frozenset({"cache", "past_key_values"})  # the newer name in transformers, the older


class KeyValueCache:
    """The keys and values that a model has computed for rows of a growing batch.

    Args:
        lm: an attention model.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        self.length = 0  # of the rows, as far as they are kept
        self._kept: dict[str, DynamicCache] = {}

    def hidden_states(self, ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """The trunk's states of the tokens that are new. All arguments are ``(b, L)``.

        Raises:
            BadInput: if the model keeps no keys and values.
        """
        output = self.lm.base_model(
            input_ids=ids[:, self.length :],
            attention_mask=attention_mask,
            position_ids=positions[:, self.length :],
            use_cache=True,
            **self._kept,
        )
        self._kept = _kept_by(self.lm, output)
        self.length = ids.shape[1]
        return output.last_hidden_state

    def select(self, rows: Tensor) -> None:
        """Keep these rows only."""
        for cache in self._kept.values():
            cache.batch_select_indices(rows)


def rows_at_once(lm: PreTrainedModel, tokens: int) -> int:
    """How many rows of so many tokens are sampled together, a matter of memory alone.

    Their keys and values take no more room than the weights, as the gradient will later.
    """
    weights = sum(p.numel() * p.element_size() for p in lm.parameters())
    rows = max(weights, SMALL_CACHE) // (tokens * cache_bytes(lm))
    return max(1, min(ROWS_AT_ONCE, rows))


def cache_bytes(lm: PreTrainedModel) -> int:
    """Bytes of a token's keys and values in all layers.

    Raises:
        BadInput: if the model has no attention.
    """
    config = lm.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise _no_cache(lm)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * kept_heads * width * lm.dtype.itemsize)


def _kept_by(lm: PreTrainedModel, output: ModelOutput) -> dict[str, DynamicCache]:
    """The keys and values so far, by the name under which the model hands them out and takes them.

    Refused if there are none, or states of which single rows cannot be taken out.
    """
    kept = {name: output[name] for name in CACHE_NAMES & output.keys()}
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    for cache in kept.values():
        if type(cache) is not DynamicCache or not all(type(x) in known for x in cache.layers):
            raise _no_cache(lm)
    if len(kept) != 1:
        raise _no_cache(lm)
    return kept


def _no_cache(lm: PreTrainedModel) -> BadInput:
    return BadInput(
        f"{type(lm).__name__} has no key-value cache to sample with; "
        "use an attention model, such as a GPT-2, Llama or Qwen"
    )
