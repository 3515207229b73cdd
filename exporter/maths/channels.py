"""Which channels of a matrix's input matter least, and what the others can do to make up for them."""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.errors import WeightError


def column_scores(weight: Tensor, gram: Tensor | None) -> Tensor:
    """Sum over a column of |w|, times the norm of its input over the calibration tokens.

    Args:
        weight: [out, in].
        gram: [in, in], sum of x x^T; None counts every input the same, which is magnitude pruning.

    Returns:
        [in], float64, >= 0, where the weight is.

    Source: FASP, arXiv:2501.09412, on the metric of Wanda, arXiv:2306.11695.
    """
    magnitude = weight.double().abs().sum(0)
    return magnitude if gram is None else magnitude * gram.diagonal().sqrt().to(weight.device)


def strongest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores along the last dimension, rising; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def restored(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float, cross: Tensor | None = None) -> Tensor:
    """Least squares: the kept columns, changed so that the outputs stay closest to those of all columns.

    W' = (W C[:, K] + lam W[:, K]) (G[K, K] + lam I)^-1 with lam = ridge * mean diag G[K, K], and C = G. The ridge pulls
    towards W[:, K], so on the calibration tokens the result is never worse than W[:, K] itself, for any ridge. It is
    worked out as W[:, K] + (W C[:, K] - W[:, K] G[K, K]) (G[K, K] + lam I)^-1, where for C = G the bracket is what the
    pruned columns P gave, W[:, P] G[P, K].

    Args:
        weight: [out, in]; computed in float64, where gram is.
        gram: [in, in], float64, sum of x x^T.
        kept: [count], rising indices.
        ridge: >= 0.
        cross: [in, in], float64, C = sum of y x^T, where the outputs to reach are those for other inputs y.

    Returns:
        [out, count], float64, where the weight is.

    Raises:
        WeightError: ridge is 0 and the kept inputs depend on each other linearly.

    Source: FASP, arXiv:2501.09412, section on restoration. Differs: it does not say its ridge; this one is ours.
    """
    whole, kept = weight.to(gram.device, torch.float64), kept.to(gram.device)
    base, inputs = whole[:, kept], gram[kept[:, None], kept]
    if float(inputs.diagonal().max()) == 0:  # nothing to learn from
        return base.to(weight.device)
    left = whole @ cross[:, kept] - base @ inputs if cross is not None else _share_of_the_pruned(whole, gram, kept)
    inputs.diagonal().add_(ridge * inputs.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(inputs)
    if int(failed):
        raise WeightError(f"the inputs of the kept channels depend on each other; give a ridge over {ridge:g}")
    return base.add_(torch.cholesky_solve(left.T, factor).T).to(weight.device)


def _share_of_the_pruned(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """W[:, P] G[P, K]: what the pruned columns added to the products of the outputs with the kept inputs."""
    is_pruned = torch.ones(len(gram), dtype=torch.bool, device=gram.device).index_fill(0, kept, False)
    pruned = is_pruned.nonzero().flatten()
    return weight[:, pruned] @ gram[pruned[:, None], kept]
