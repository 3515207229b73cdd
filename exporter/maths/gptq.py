"""GPTQ: column after column is rounded, and the columns still to come make up for the error.

Source: GPTQ, arXiv:2210.17323, with the Cholesky form of its section 3.3. Differs: float64 throughout; the scales of a
group are fitted when it is entered, on weights that are up to date whatever the block size; channels that no
calibration token used keep their weights and are rounded to nearest (the published code sets them to 0).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from exporter.errors import WeightError
from exporter.maths.rounding import Grid, encode, finite, fit, low_bit
from exporter.weights import LowBit

SOLVED = 256  # rows of a triangular matrix that is inverted at once

Ahead = Callable[[int], Tensor]  # up to which column, to the columns from here to there as they are now [columns, out]
Fix = Callable[[int, Ahead], Tensor]  # a column's index, to the values that it is fixed at [out]


def quantize(weight: Tensor, gram: Tensor, grid: Grid, damp: float = 1e-2, block: int = 128) -> LowBit:
    """Round a weight so that its outputs on the calibration inputs, not its values, stay close.

    Args:
        weight: [out, in], any float type; computed in float64.
        gram: [in, in], sum of x x^T over tokens.
        grid: Bits, group and scale search.
        damp: Added to the diagonal, as a fraction of its mean, > 0.
        block: Columns between two updates of all later columns: speed only, no code depends on it.

    Raises:
        WeightError: a weight is not finite, or gram is no Gram matrix.
    """
    values, upper = prepared(weight, gram, damp)
    width, group = values.shape[0], grid.columns(values.shape[0])
    codes, fitted = torch.empty_like(values), Fitted(grid)

    def rounded(column: int, ahead: Ahead) -> Tensor:
        if column % group == 0:
            fitted.add(ahead(min(column + group, width)).T)
        return fitted.decode(fitted.encode(values[column], out=codes[column]))

    fix_columns(values, upper, block, rounded)
    return fitted.node(codes.T)


def damped(gram: Tensor, damp: float) -> Tensor:
    """A Gram matrix with `damp` times its mean diagonal added to its diagonal (1 where it is 0), [in, in], float64."""
    matrix = gram.double().clone()
    mean = float(matrix.diagonal().mean())
    matrix.diagonal().add_(damp * mean if mean > 0 else 1.0)  # without any input every weight counts the same
    return matrix


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper U with U^T U = inverse(gram + damping), [in, in], float64.

    Taken without forming the inverse: where gram = R R^T with R upper, U is the inverse of R; and R is the Cholesky
    factor of gram with rows and columns in reverse order, reversed back.

    Raises:
        WeightError: gram is not finite, or not positive semidefinite.
    """
    matrix = damped(gram, damp)
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(failed) or not bool(lower.isfinite().all()):
        raise WeightError("the Gram matrix is not positive definite; the calibration inputs are not finite")
    return _inverted(lower.flip(0, 1), torch.zeros_like(matrix))


def _inverted(upper: Tensor, inverse: Tensor) -> Tensor:
    """Fill zeros with the inverse of an upper triangular matrix, half by half.

    Most of it is then matrix products: 2/3 n^3 operations, and n^3 slower ones where it is solved for the identity.
    """
    size = len(upper)
    if size <= SOLVED:
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        return inverse.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
    first, second = slice(0, size // 2), slice(size // 2, size)
    _inverted(upper[first, first], inverse[first, first])
    _inverted(upper[second, second], inverse[second, second])
    between = inverse[first, first] @ upper[first, second] @ inverse[second, second]
    inverse[first, second] = between.neg_()
    return inverse


class Fitted:
    """Scales and zero points of the groups of columns that were entered so far."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._scales: list[Tensor] = []  # each [out, 1]
        self._zeros: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Fit the next group: its values, [out, columns]."""
        scales, zeros = fit(values, self._grid)
        self._scales.append(scales)
        self._zeros.append(zeros)

    def encode(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """Codes of a column of the latest group, [out], maybe put into a tensor that is there."""
        return encode(values, self._scales[-1][:, 0], self._zeros[-1][:, 0], self._grid, out)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of such codes."""
        return (codes - self._zeros[-1][:, 0]).mul_(self._scales[-1][:, 0])

    def node(self, codes: Tensor) -> LowBit:
        """All codes [out, columns] with their grid."""
        scales, zeros = (torch.cat(part, dim=1).cpu() for part in (self._scales, self._zeros))
        return low_bit(codes.cpu().contiguous(), scales, zeros, self._grid)


def prepared(weight: Tensor, gram: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """The weight [in, out], so that a column lies together, and the factor of the inverse, where gram lies."""
    return finite(weight).to(gram.device, torch.float64).T.contiguous(), inverse_factor(gram, damp)


def fix_columns(values: Tensor, upper: Tensor, block: int, fix: Fix) -> None:
    """Fix column after column; those still to come are changed in place to make up for it.

    Args:
        values: [in, out], float64. A column that is fixed keeps the values that it had just before.
        upper: [in, in], of `inverse_factor`.
        block: Columns between two updates of all later columns: speed only.
        fix: What becomes of a column.
    """
    width, sizes = values.shape[0], upper.diagonal().cpu().tolist()
    for start in range(0, width, block):
        end = min(start + block, width)
        errors = torch.zeros_like(values[start:end])
        for column in range(start, end):
            fixed = fix(column, partial(_up_to_date, values, errors, upper, (start, column, end)))
            error = torch.sub(values[column], fixed, out=errors[column - start]).div_(sizes[column])
            values[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
        values[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)


def _up_to_date(values: Tensor, errors: Tensor, upper: Tensor, block: tuple[int, int, int], stop: int) -> Tensor:
    """Columns from where the block stands up to `stop`, those behind the block's end with its errors so far."""
    start, column, end = block
    inside, behind = values[column : min(stop, end)], values[end:stop]
    return torch.cat((inside, behind - upper[start:column, end:stop].T @ errors[: column - start]))
