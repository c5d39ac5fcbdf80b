"""Reductions over real tokens. Padding is replaced before any sum, so it never matters.

A mask is boolean, True at real response tokens, and is built from lengths, never from token ids:
a pad token that equals EOS is harmless. `torch.where(mask, x, 0)` is used instead of `x * mask`,
because 0 * NaN is NaN, and it is used *before* what could make a gradient NaN (a product of two, a
power, an exponential), because there a masked NaN still has the gradient NaN.
"""

import torch
from torch import Tensor

from .logprobs import at_least_float32


def response_mask(lengths: Tensor, width: int) -> Tensor:
    """The mask of right-padded rows from their lengths.

    Args:
        lengths: number of real tokens in each row. Shape ``(B,)``.
        width: T, the padded width.

    Returns:
        Boolean mask, True where the column is below the row's length. Shape ``(B, T)``.

    Example:
        >>> response_mask(torch.tensor([2, 1]), 3)
        tensor([[ True,  True, False],
                [ True, False, False]])
    """
    return torch.arange(width, device=lengths.device) < lengths[:, None]  # (B, T)


def require_right_padded(mask: Tensor) -> None:
    """Refuse a mask with real tokens after padding, where "the last real token" means nothing.

    Args:
        mask: True at real tokens. Shape ``(B, T)``.

    Raises:
        ValueError: if a row is not right-padded.
    """
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("a mask row has a real token after padding; rows must be right-padded")


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    r"""Mean over all real tokens of the batch, whatever their rows.             [eq:masked_mean]

        mean = sum_{b,t} m_bt x_bt / n,   n = sum_{b,t} m_bt                       (1)

    Args:
        x: any values, padding included. Shape ``(B, T)``.
        mask: True at real tokens. Shape ``(B, T)``.

    Returns:
        A scalar, in at least float32, that carries gradient to the real tokens only.

    Raises:
        ValueError: if no token is real or the shapes differ.

    Source: the definition; trl ``masked_mean``.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> masked_mean(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), mask)
        tensor(3.)
    """
    x, n = at_least_float32(x), _count(x, mask, at_least=1)
    return torch.where(mask, x, 0).sum() / n  # (1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    r"""Unbiased variance over all real tokens of the batch.                      [eq:masked_var]

        var = sum_{b,t} m_bt (x_bt - mean)^2 / (n - 1)                             (1)

    Shapes as in `masked_mean`.

    Raises:
        ValueError: if fewer than two tokens are real: one value has no variance.

    Source: the definition; trl ``masked_var``.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> masked_var(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), mask)
        tensor(7.)
    """
    n = _count(x, mask, at_least=2)
    x = at_least_float32(x)
    deviation = torch.where(mask, x - masked_mean(x, mask), 0)  # (B, T)
    return deviation.square().sum() / (n - 1)  # (1)


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    r"""Shift and scale the real tokens to mean 0 and variance 1.                     [eq:whiten]

        w_bt = (x_bt - mean) / sqrt(var + 1e-8)                                    (1)

    Args:
        x: any numbers. Shape ``(B, T)``.
        mask: True at real tokens. Shape ``(B, T)``.

    Returns:
        Shape ``(B, T)``, zero at padding.

    Raises:
        ValueError: if fewer than two tokens are real.

    Source: Huang et al. 2024, arXiv:2403.17031, section 7; trl ``masked_whiten``.

    Example: mean 0.1, variance 0.04.
        >>> advantages = torch.tensor([[-0.1, 0.2, 0.2, 0.4], [-0.1, 0.0, 9.0, 9.0]])
        >>> masked_whiten(advantages, response_mask(torch.tensor([4, 2]), 4))
        tensor([[-1.0000,  0.5000,  0.5000,  1.5000],
                [-1.0000, -0.5000,  0.0000,  0.0000]])
    """
    x = at_least_float32(x)
    deviation = torch.where(mask, x - masked_mean(x, mask), 0)  # (B, T)
    return deviation * torch.rsqrt(masked_var(x, mask) + 1e-8)  # (1)


def masked_scale(x: Tensor, mask: Tensor) -> Tensor:
    r"""Scale the real tokens to variance 1 and leave their mean where it is.          [eq:scale]

        s_bt = w_bt + mean,   w_bt whitened                                        (1)

    For rewards: removing their mean would change what the policy is asked to do.

    Args:
        x: any numbers. Shape ``(B, T)``.
        mask: True at real tokens. Shape ``(B, T)``.

    Returns:
        Shape ``(B, T)``, zero at padding.

    Raises:
        ValueError: if fewer than two tokens are real.

    Source: Ziegler et al. 2019's code; trl ``masked_whiten(..., shift_mean=False)``.

    Example:
        >>> masked_scale(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[1.2929, 2.7071, 0.0000]])
    """
    x = at_least_float32(x)
    return torch.where(mask, masked_whiten(x, mask) + masked_mean(x, mask), 0)  # (1)


def _count(x: Tensor, mask: Tensor, *, at_least: int) -> Tensor:
    if x.shape != mask.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, its mask {tuple(mask.shape)}")
    n = mask.sum()
    if n < at_least:
        raise ValueError(f"{int(n)} real token(s) in the mask; at least {at_least} needed")
    return n
