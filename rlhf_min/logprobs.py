"""Log-probabilities of given tokens, without keeping the logits of the whole batch."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    r"""Log-probability of each token under the logits of its own position.     [eq:token_logprobs]

        log p(y) = z_y - log sum_v exp(z_v)                                        (1)

    Args:
        logits: z, already at the position that *predicts* the token. Shape ``(..., V)``.
        tokens: y. Shape ``(...)``.

    Returns:
        Shape ``(...)``, in at least float32 (float64 stays float64).

    Source: the definition; trl 0.11.3 ``logprobs_from_logits``, 1.12.0 ``selective_log_softmax``.

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

    Source: Shannon 1948, theorem 2; trl ``entropy_from_logits``.

    Example:
        >>> entropy(torch.zeros(1, 4))  # log 4
        tensor([1.3863])
    """
    logits = at_least_float32(logits)
    probabilities = logits.softmax(-1)
    mean_logit = (probabilities * torch.where(probabilities > 0, logits, 0)).sum(-1)
    return logits.logsumexp(-1) - mean_logit  # (1)


def label_logprob(logits: Tensor, label: int, *, one_of_them: bool) -> Tensor:
    r"""Log-probability that a classifier gives to one of its labels.           [eq:label_logprob]

        log p(c) = z_c - log sum_k exp(z_k)      where each text has one of the labels     (1)
        log p(c) = -log(1 + exp(-z_c))           where a text has any number of them       (2)

    Args:
        logits: z, one for each label k. Shape ``(B, K)``.
        label: c.
        one_of_them: whether each text has exactly one of the labels.

    Returns:
        Shape ``(B,)``, in at least float32.

    Source: the definitions; (1) and (2) are the logarithms of ``function_to_apply`` "softmax" and
    "sigmoid" in the text-classification pipeline of transformers.

    Example:
        >>> label_logprob(torch.zeros(1, 4), 2, one_of_them=True)  # log(1/4)
        tensor([-1.3863])
    """
    logits = at_least_float32(logits)
    if one_of_them:
        return logits[:, label] - logits.logsumexp(-1)  # (1)
    return logsigmoid(logits[:, label])  # (2)


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

    Source: the ``forward`` of the ``*ForCausalLM`` classes of transformers; trl 1.12.0
    ``PPOTrainer`` for (3), which 0.11.3 leaves out.

    Example:
        >>> h, w = torch.ones(1, 2), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        >>> lm_head_logits(h, w, bias=None, softcap=None, scale=1.0, temperature=0.5)
        tensor([[4., 8.]])
    """
    # With the weight first, its gradient is laid out as the weight is and not transposed, so that
    # autograd can add the embedding's to it in place, where that is the same weight.
    logits = (weight @ hidden.mT).mT
    logits = at_least_float32(logits if bias is None else logits + bias)
    # A factor of 1 is left out: all logits of a batch are a lot to multiply.
    logits = logits if scale == 1 else scale * logits  # (1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)  # (2)
    return logits if temperature == 1 else logits / temperature  # (3)


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
        return _LogprobsAndEntropy.apply(logits, tokens)

    chunks = list(zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        parts = [one_chunk(h, y) for h, y in chunks]
    else:
        parts = [checkpoint(one_chunk, h, y, use_reentrant=False) for h, y in chunks]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


class _LogprobsAndEntropy(torch.autograd.Function):
    """`token_logprobs` and `entropy` at once, with one softmax and its gradient written out.

        d log p(y) / dz_v = [v = y] - p_v                                          (1)

    Of all that is as large as the logits, only the p are kept for backward.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        log_total = logits.logsumexp(-1, keepdim=True)  # (n, 1)
        probabilities = (logits - log_total).exp_()  # (n, V)
        logprobs = (logits.gather(-1, tokens[:, None]) - log_total)[:, 0]  # (n,)
        # A logit of minus infinity has probability 0, and 0 * inf is NaN.
        finite = logits.clamp(min=torch.finfo(logits.dtype).min)
        entropy = log_total[:, 0] - finite.mul_(probabilities).sum(-1)  # (n,)
        ctx.save_for_backward(probabilities, tokens)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        probabilities, tokens = ctx.saved_tensors
        gradient = probabilities * -grad[:, None]  # (n, V)
        return gradient.scatter_add_(-1, tokens[:, None], grad[:, None]), None  # (1)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
