"""SparseGPT: column after column is pruned to N of M, or pruned and rounded, and those still to come make up for it.

Source: SparseGPT, arXiv:2301.00774. Differs as `gptq` does; how pruning and rounding go together is said at
`quantize_sparse`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.errors import WeightError
from exporter.maths.channels import strongest
from exporter.maths.gptq import Ahead, Fitted, fix_columns, prepared
from exporter.maths.pruning import places_of_mask
from exporter.maths.rounding import Grid, finite, quantize_rows
from exporter.weights import Dense, LowBit, Sparse


def quantize_sparse(
    weight: Tensor, gram: Tensor, grid: Grid, n: int, m: int, damp: float = 1e-2, block: int = 128
) -> Sparse:
    """Prune a weight to N of M and round what is kept, in one walk that makes up for both.

    Scales cover `grid.group` kept columns and must be fitted when the walk enters these, before it is known which are
    kept. So a trial goes ahead over them alone, as `sparsify` does, without rounding: scales are fitted on the values
    that it leaves. Then the walk goes over them, decides for every m neighbours anew, now with what rounding changed,
    prunes and rounds.

    Args:
        weight: [out, in], any float type; computed in float64.
        gram: [in, in], sum of x x^T over tokens.
        grid: Bits, group and scale search. The group counts kept columns: a multiple of n, or it covers a whole row.
        n: Kept in every group of neighbours, 1 <= n < m.
        m: Neighbours in a group; divides `in`.
        damp: Added to the diagonal of gram, as a fraction of its mean, > 0.
        block: Columns between two updates of all later columns: speed only, no code depends on it.

    Raises:
        WeightError: as `gptq.quantize`, or widths do not divide.

    Source: SparseGPT, arXiv:2301.00774, on joint pruning and quantization. Differs: the trial is ours.
    """
    check_sparsity(weight.shape[1], n, m, grid)
    values, upper = prepared(weight, gram, damp)
    width, span = values.shape[0], grid.columns(values.shape[0] // m * n) // n * m  # columns under one scale
    codes, fitted, chosen = torch.empty_like(values), Fitted(grid), _Chosen(values, upper, n, m)

    def rounded(column: int, ahead: Ahead) -> Tensor:
        if column % span == 0:
            under = slice(column, min(column + span, width))
            trial = ahead(under.stop)
            fitted.add(_kept(trial, _prune(trial, upper[under, under], n, m, block)))
        codes[column] = fitted.encode(values[column])
        return chosen.pruned(column, ahead, fitted.decode(codes[column]))

    fix_columns(values, upper, block, rounded)
    return _sparse(fitted.node(_kept(codes, chosen.mask)), chosen.mask, n, m)


def sparsify(weight: Tensor, gram: Tensor, n: int, m: int, damp: float = 1e-2, block: int = 128) -> Sparse:
    """Prune a weight to N of M; the columns still to come make up for what is lost.

    Of every m neighbours, when the walk enters them, the n of the largest `w^2 / U_jj^2` are kept, w as it is by then:
    1 / U_jj^2 is how much output depends on column j alone, once later columns have made up for it.

    Args:
        weight: [out, in], any float type; computed in float64, kept in its own type.
        gram: [in, in], sum of x x^T over tokens.
        n: Kept in every group of neighbours, 1 <= n < m.
        m: Neighbours in a group; divides `in`.
        damp: Added to the diagonal of gram, as a fraction of its mean, > 0.
        block: Columns between two updates of all later columns: speed only, no code depends on it.

    Raises:
        WeightError: as `gptq.quantize`, or m does not divide `in`.

    Source: SparseGPT, arXiv:2301.00774, algorithm 1 with masks of N:M.
    """
    check_sparsity(weight.shape[1], n, m)
    values, upper = prepared(weight, gram, damp)
    mask = _prune(values, upper, n, m, block)
    return _sparse(Dense(_kept(values, mask).to(weight.dtype).cpu()), mask, n, m)


def sparsify_by_size(weight: Tensor, n: int, m: int, grid: Grid | None = None) -> Sparse:
    """Keep the n largest of every m neighbours, and round them to nearest where a grid is given.

    Args:
        weight: [out, in], any float type.
        n: Kept in every group of neighbours, 1 <= n < m.
        m: Neighbours in a group; divides `in`.
        grid: As in `quantize_sparse`, or None.

    Raises:
        WeightError: a weight is not finite, or widths do not divide.
    """
    check_sparsity(weight.shape[1], n, m, grid)
    mask = _largest(finite(weight).abs(), n, m).T
    kept = _kept(weight.T, mask)
    if grid is None:
        return _sparse(Dense(kept), mask, n, m)
    return _sparse(quantize_rows(kept, grid.bits, grid.group, grid.symmetric, grid.search), mask, n, m)


def check_sparsity(width: int, n: int, m: int, grid: Grid | None = None) -> None:
    """Whether a row can be N:M, with scales over whole groups of M.

    Raises:
        WeightError: it cannot.
    """
    if width % m:
        raise WeightError(
            f"{width} columns are no multiple of the {m} in {n}:{m}; choose another sparsity, leave this matrix out, "
            f"or make it a multiple of {m} wide"
        )
    if grid is not None and grid.columns(width // m * n) % n:
        raise WeightError(f"a group of {grid.group} kept columns cuts a {n}:{m} in two; give a multiple of {n}, or 0")


class _Chosen:
    """Which columns are kept, of those that the walk over values [in, out] has entered.

    Args:
        values: What the walk changes.
        upper: [in, in], of `gptq.inverse_factor`.
        n: Kept in every group of neighbours.
        m: Neighbours in a group.
    """

    def __init__(self, values: Tensor, upper: Tensor, n: int, m: int) -> None:
        self.mask = torch.empty_like(values, dtype=torch.bool)  # [in, out]
        self._sizes, self._n, self._m = upper.diagonal()[:, None], n, m

    def pruned(self, column: int, ahead: Ahead, fixed: Tensor) -> Tensor:
        """What a column is fixed at if it is kept [out], and 0 where it is not."""
        if column % self._m == 0:
            group = slice(column, column + self._m)
            scores = (ahead(group.stop) / self._sizes[group]).square()
            self.mask[group] = _largest(scores.T, self._n, self._m).T
        return torch.where(self.mask[column], fixed, 0)


def _prune(values: Tensor, upper: Tensor, n: int, m: int, block: int) -> Tensor:
    """What `sparsify` keeps, [in, out], bool; values [in, out] become what is kept, apart from the mask."""
    chosen = _Chosen(values, upper, n, m)
    fix_columns(values, upper, block, lambda column, ahead: chosen.pruned(column, ahead, values[column]))
    return chosen.mask


def _largest(scores: Tensor, n: int, m: int) -> Tensor:
    """Where the n largest of every m neighbours stand, [out, in], bool; of equal ones the first."""
    groups = scores.reshape(len(scores), -1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, strongest(groups, n), True)
    return mask.view(scores.shape)


def _kept(values: Tensor, mask: Tensor) -> Tensor:
    """The values that a mask keeps, both [in, out], as [out, kept]."""
    return values.T[mask.T].view(values.shape[1], -1)


def _sparse(kept: Dense | LowBit, mask: Tensor, n: int, m: int) -> Sparse:
    """A node of kept values [out, kept] and their mask [in, out]."""
    return Sparse(kept, places_of_mask(mask.T.cpu(), m), n, m)
