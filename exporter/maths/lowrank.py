"""Low rank: the best approximation of a matrix by a product of two narrow ones."""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.errors import WeightError


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the largest singular triplets, split evenly: `left = U_r S_r^1/2`, `right = S_r^1/2 V_r^T`.

    `left @ right` is the nearest matrix of that rank; what it misses is, squared and summed, the squares of the
    singular values from `rank` on.

    Args:
        matrix: [..., out, in], any float type; computed in float64.
        rank: Triplets that are kept, 0..min(out, in).

    Returns:
        Left [..., out, rank], right [..., rank, in], and all singular values [..., min(out, in)], falling; float64.

    Raises:
        WeightError: the rank is out of range, or the matrix is not finite.

    Source: Eckart and Young, 1936. The even split is ours: it keeps both factors of one magnitude, so that both fit
    few bits equally well.
    """
    full = min(matrix.shape[-2:])
    if not 0 <= rank <= full:
        raise WeightError(f"a {matrix.shape[-2]} x {matrix.shape[-1]} matrix has no rank {rank}; give 0 to {full}")
    if not bool(matrix.isfinite().all()):
        raise WeightError("the matrix holds values that are not finite; it has no singular values")
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s[..., :rank].sqrt()
    left: Tensor = u[..., :rank] * root[..., None, :]
    right: Tensor = root[..., :, None] * vh[..., :rank, :]
    return left.contiguous(), right.contiguous(), s
