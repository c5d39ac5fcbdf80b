"""Log-probabilities of given tokens, without keeping the logits of the whole batch."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    r"""Log-probability of each token under the logits of its own position.     [eq:token_logprobs]

        log p(y) = z_y - log sum_v exp(z_v)                                        (1)

    Args:
        logits: z, already at the position that *predicts* the token. Shape ``(..., V)``.
        tokens: y. Shape ``(...)``.

    Returns:
        Shape ``(...)``, in at least float32 (float64 stays float64).

    Source: trl ``selective_log_softmax``.

    Example:
        >>> token_logprobs(torch.zeros(1, 4), torch.tensor([2]))  # log(1/4)
        tensor([-1.3863])
    """
    logits = at_least_float32(logits)
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return chosen - logits.logsumexp(-1)  # (1)


def entropy(logits: Tensor) -> Tensor:
    r"""Entropy in nats of the distribution at each position.                          [eq:entropy]

        H = log sum_v exp(z_v) - sum_v p_v z_v                                     (1)

    Args:
        logits: z. Shape ``(..., V)``. A logit of minus infinity has probability 0.

    Returns:
        Shape ``(...)``, in at least float32.

    Source: trl ``entropy_from_logits``.

    Example:
        >>> entropy(torch.zeros(1, 4))  # log 4
        tensor([1.3863])
    """
    logits = at_least_float32(logits)
    probabilities = logits.softmax(-1)
    mean_logit = (probabilities * torch.where(probabilities > 0, logits, 0)).sum(-1)
    return logits.logsumexp(-1) - mean_logit  # (1)


def lm_head_logits(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    *,
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    scale: float,
    temperature: float,
) -> Tensor:
    r"""What a causal language model makes of its last hidden state.                 [eq:lm_head]

        z = scale * (W h + b)                                                      (1)
        z = softcap * tanh(z / softcap)      where the model caps its logits       (2)
        z = z / temperature                                                        (3)

    Args:
        hidden: h, the trunk's last hidden state. Shape ``(N, H)``.
        weight: W, the vocabulary projection. Shape ``(V, H)``.
        bias: b, or None. Shape ``(V,)``.
        softcap: the model's cap of the logits (Gemma 2), or None.
        scale: the model's factor on the logits (Cohere, Granite), else 1.
        temperature: of the distribution that is sampled from.

    Returns:
        Shape ``(N, V)``, in at least float32.

    Source: the ``forward`` of the ``*ForCausalLM`` classes of transformers; (3) as in trl 1.12.0
    ``PPOTrainer`` (0.11.3 leaves it out).

    Example:
        >>> h, w = torch.ones(1, 2), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        >>> lm_head_logits(h, w, bias=None, softcap=None, scale=1.0, temperature=0.5)
        tensor([[4., 8.]])
    """
    logits = at_least_float32(torch.nn.functional.linear(hidden, weight, bias)) * scale  # (1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)  # (2)
    return logits / temperature  # (3)


def lm_head_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    tokens: Tensor,  # (N,)
    *,
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    scale: float,
    temperature: float,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and `entropy` of `lm_head_logits`, a chunk of tokens at a time.

    If there are several chunks, backward computes each one's logits again instead of keeping
    them, so memory holds those of one chunk, however many tokens there are.

    Args:
        hidden: the trunk's last hidden state where it predicts the token. Shape ``(N, H)``.
        weight: as in `lm_head_logits`, like all that is not named here.
        tokens: shape ``(N,)``.
        chunk_tokens: rows of logits held at once; a matter of memory, not of the result.

    Returns:
        ``(logprobs, entropy)``, each ``(N,)``, in at least float32. The entropy is a measurement
        and carries no gradient.
    """

    def one_chunk(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = lm_head_logits(
            hidden, weight, bias=bias, softcap=softcap, scale=scale, temperature=temperature
        )
        return token_logprobs(logits, tokens), entropy(logits.detach())

    chunks = list(zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        parts = [one_chunk(h, y) for h, y in chunks]
    else:
        parts = [checkpoint(one_chunk, h, y, use_reentrant=False) for h, y in chunks]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
