"""GPTQ: column after column is rounded, and the columns still to come make up for the error.

Source: GPTQ, arXiv:2210.17323, with the Cholesky form of its section 3.3. Differs: float64 throughout; the scales of a
group are fitted when it is entered, on weights that are up to date whatever the block size; channels that no
calibration token used keep their weights and are rounded to nearest (the published code sets them to 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.errors import WeightError
from exporter.maths.rounding import Grid, encode, finite, fit, low_bit
from exporter.weights import LowBit


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
    values = finite(weight).double().T.contiguous()  # [in, out]: a column of the weight lies together
    upper = inverse_factor(gram, damp)
    width, group = values.shape[0], grid.columns(values.shape[0])
    codes = torch.empty_like(values)
    fitted: list[tuple[Tensor, Tensor]] = []  # scales and zeros of a group, each [1, out]
    for start in range(0, width, block):
        end = min(start + block, width)
        errors = torch.zeros_like(values[start:end])
        for column in range(start, end):
            if column % group == 0:
                ahead = _up_to_date(values, errors, upper, (start, column, end), min(column + group, width))
                scales, zeros = fit(ahead.T, grid)  # [out, 1]
                fitted.append((scales.T, zeros.T))
            scales, zeros = fitted[-1]
            codes[column] = encode(values[column], scales[0], zeros[0], grid)
            decoded = (codes[column] - zeros[0]) * scales[0]
            errors[column - start] = (values[column] - decoded) / upper[column, column]
            values[column + 1 : end].addr_(upper[column, column + 1 : end], errors[column - start], alpha=-1)
        values[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    scales, zeros = (torch.cat(part).T.contiguous() for part in zip(*fitted))  # [out, groups]
    return low_bit(codes.T.contiguous(), scales, zeros, grid)


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper U with U^T U = inverse(gram + damping), [in, in], float64.

    Taken without forming the inverse: where gram = R R^T with R upper, U is the inverse of R; and R is the Cholesky
    factor of gram with rows and columns in reverse order, reversed back.

    Raises:
        WeightError: gram is not finite, or not positive semidefinite.
    """
    damped = gram.double().clone()
    mean = float(damped.diagonal().mean())
    damped.diagonal().add_(damp * mean if mean > 0 else 1.0)  # without any input every weight counts the same
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed) or not bool(lower.isfinite().all()):
        raise WeightError("the Gram matrix is not positive definite; the calibration inputs are not finite")
    eye = torch.eye(damped.shape[0], dtype=damped.dtype, device=damped.device)
    upper: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    return upper


def _up_to_date(values: Tensor, errors: Tensor, upper: Tensor, block: tuple[int, int, int], stop: int) -> Tensor:
    """Columns from where the block stands up to `stop`, those behind the block's end with its errors so far."""
    start, column, end = block
    inside, behind = values[column : min(stop, end)], values[end:stop]
    return torch.cat((inside, behind - upper[start:column, end:stop].T @ errors[: column - start]))
