"""Low rank that loses least of the outputs: the matrix is whitened by its inputs, cut there, and taken back.

Source: CASP, arXiv:2503.05936, for queries and keys; the same as SVD-LLM, arXiv:2403.07378. Differs: float64
throughout, and what is added to a Gram matrix that has no Cholesky factor is relative to its mean diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.errors import WeightError
from exporter.maths.lowrank import truncated

SHIFT = 1e-6  # of the mean diagonal: the smallest eigenvalue of a Gram matrix that was singular


def kept_rank(out: int, width: int, keep: float) -> int:
    """The rank at which both factors hold `keep` of the matrix's numbers: `int(out * in * keep / (out + in))`."""
    return int(out * width * keep / (out + width))


def whitener(gram: Tensor) -> Tensor:
    """Lower L with L L^T = G, so that |L^T e| is the norm of what a row error e does to the calibration outputs.

    Where G has no Cholesky factor, -lambda_min + `SHIFT` (both of G over its mean diagonal) is added to the diagonal.

    Args:
        gram: [..., in, in], G: sum of x x^T over tokens.

    Returns:
        [..., in, in], float64.

    Raises:
        WeightError: G is not finite.
    """
    if not bool(gram.isfinite().all()):
        raise WeightError("the Gram matrix is not finite; the calibration inputs are not")
    size = gram.double().diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    size = torch.where(size > 0, size, 1.0)  # without any input every weight counts the same
    lower, failed = torch.linalg.cholesky_ex(gram.double() / size)
    if bool(failed.any()):
        lower = torch.linalg.cholesky(_lifted(gram.double() / size, failed > 0))
    factor: Tensor = lower * size.sqrt()
    return factor


def whitened(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two thin matrices that lose least of the outputs on the calibration inputs, among all of their rank.

    W L = U S V^T; A = U_r S_r^1/2, B = S_r^1/2 V_r^T L^-1. What is lost, |X (W - A B)^T| = |(W - A B) L|, is
    sqrt(sum of S_j^2 from r on).

    Args:
        weight: [..., out, in], W; computed in float64.
        gram: [..., in, in], X^T X.
        rank: r, 0..min(out, in).

    Returns:
        A [..., out, rank] and B [..., rank, in], float64.

    Raises:
        WeightError: the rank is out of range, or something is not finite.
    """
    lower = whitener(gram)
    left, right, _ = truncated(weight.to(lower.device).double() @ lower, rank)
    back: Tensor = torch.linalg.solve_triangular(lower, right, upper=False, left=False)  # right L^-1
    return left, back


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with both factors of one size, channel by channel: columns of A over t, rows of B times t.

    t_j = sqrt(max |A[:, j]| / max |B[j]|) makes the two maxima equal, so that few bits suit both. A channel of which
    either side is 0 stays.

    Args:
        left: [..., out, rank], A.
        right: [..., rank, in], B.

    Source: ours; the released CASP takes t = 10 for every channel.
    """
    above, below = left.abs().amax(-2), right.abs().amax(-1)  # [..., rank]
    channel = torch.where((above > 0) & (below > 0), (above / below).sqrt(), 1.0)
    return left / channel[..., None, :], right * channel[..., :, None]


def _lifted(gram: Tensor, where: Tensor) -> Tensor:
    """Gram matrices moved up the diagonal, where asked, until the smallest eigenvalue is `SHIFT`."""
    lowest = torch.linalg.eigvalsh(gram)[..., 0]
    shift = torch.where(where, SHIFT - lowest, 0.0)
    return gram + shift[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
