"""Rounding to few bits: the scale of every group of columns, then its codes.

Scales are numbers that float16 holds, chosen before the codes, so that a runtime which stores them in 16 bits decodes
the very numbers that were measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exporter.errors import WeightError
from exporter.weights import LowBit

Search = Literal["mse", "max"]

SHRINKS = tuple(1 - step / 50 for step in range(41))  # 1, 0.98, ... 0.2: 0.2 suits one bit in a long row
SMALLEST, LARGEST = 2.0**-24, 65504.0  # positive float16: nobody divides by a scale of 0
AT_ONCE = 2**22  # weights whose candidates are in memory together


@dataclass(frozen=True)
class Grid:
    """The numbers that a weight may become.

    Args:
        bits: Width of a code, 1..8.
        group: Columns that share a scale, or 0 where a row does.
        symmetric: One zero point for all, the middle code (for 1 bit, half way between the two codes); else a whole
            zero point per group.
        search: `mse` tries smaller and smaller scales for the least squared error; `max` takes the least that clips
            nothing.
    """

    bits: int
    group: int
    symmetric: bool = True
    search: Search = "mse"

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> float:
        """The zero point of a symmetric grid."""
        return 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))

    def columns(self, width: int) -> int:
        """Columns in a group of a row of `width`."""
        return min(self.group, width) if self.group else width


def quantize_rows(weight: Tensor, bits: int, group: int, symmetric: bool = True, search: Search = "mse") -> LowBit:
    """Round every weight to the nearest point of its group's grid.

    Args:
        weight: [out, in], any float type; computed in float64.
        bits: 1..8.
        group: Columns that share a scale (the last group of a row may be shorter), or 0 for a row.
        symmetric: As in `Grid`.
        search: As in `Grid`.

    Raises:
        WeightError: a weight is not finite.
    """
    grid = Grid(bits, group, symmetric, search)
    rows = max(1, AT_ONCE // weight.shape[1])
    parts = [_quantized(part, grid) for part in torch.split(finite(weight), rows)]
    codes, scales, zeros = (torch.cat(part) for part in zip(*parts))
    return low_bit(codes, scales, zeros, grid)


def finite(weight: Tensor) -> Tensor:
    """A weight as it is.

    Raises:
        WeightError: a value is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise WeightError("the weight holds values that are not finite; they cannot be rounded to codes")
    return weight


def fit(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group.

    Args:
        values: [..., columns of a group], float64.
        grid: What to fit.

    Returns:
        Scales, each a float16 number over 0, and zeros, both [..., 1], float64.
    """
    low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    best = _scale_and_zero(low, high, grid)
    if grid.search == "max":
        return best
    room = torch.empty_like(values)
    least = _squared_error(values, *best, grid, room)
    for shrink in SHRINKS[1:]:
        tried = _scale_and_zero(low * shrink, high * shrink, grid)
        error = _squared_error(values, *tried, grid, room)
        is_better = error < least  # a tie keeps the larger scale, so runs repeat
        best = torch.where(is_better, tried[0], best[0]), torch.where(is_better, tried[1], best[1])
        least = torch.minimum(error, least)
    return best


def encode(values: Tensor, scales: Tensor, zeros: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
    """The nearest codes, as floats, of values that scales and zeros broadcast to; maybe put into `out`."""
    return torch.div(values, scales, out=out).add_(zeros).round_().clamp_(0, grid.top)


def low_bit(codes: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> LowBit:
    """A node from float codes [out, in] and its grid [out, groups]; a symmetric grid keeps one zero point."""
    kept = torch.tensor([[grid.middle]]) if grid.symmetric else zeros.float()
    return LowBit(codes.to(torch.uint8), scales.float(), kept, grid.bits, grid.columns(codes.shape[1]))


def _quantized(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], scales and zeros [out, groups] of some rows."""
    group = grid.columns(weight.shape[1])
    whole = weight.shape[1] // group * group
    pieces = (weight[:, :whole].reshape(len(weight), -1, group), weight[:, None, whole:])  # [out, groups, columns]
    parts = [_grouped(piece.double(), grid) for piece in pieces if piece.shape[-1]]
    codes, scales, zeros = (torch.cat(part, dim=1) for part in zip(*parts))
    return codes, scales, zeros


def _grouped(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    scales, zeros = fit(values, grid)
    return encode(values, scales, zeros, grid).to(torch.uint8).flatten(1), scales[..., 0], zeros[..., 0]


def _scale_and_zero(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The least scale with which codes reach from low <= 0 to high >= 0, and its zero point."""
    if grid.symmetric:
        scales = _as_half(torch.maximum(high / (grid.top - grid.middle), -low / grid.middle))
        return scales, torch.full_like(scales, grid.middle)
    scales = _as_half((high - low) / grid.top)
    return scales, (-low / scales).round().clamp(0, grid.top)


def _as_half(scales: Tensor) -> Tensor:
    """The nearest float16 over 0; the zero scale of an empty group becomes the smallest, its codes decode to 0."""
    return scales.clamp(SMALLEST, LARGEST).half().to(scales.dtype)


def _squared_error(values: Tensor, scales: Tensor, zeros: Tensor, grid: Grid, room: Tensor) -> Tensor:
    """Of each group [..., 1]; worked out in `room`, which is as large as the values."""
    decoded = encode(values, scales, zeros, grid, room).sub_(zeros).mul_(scales)
    return decoded.sub_(values).square_().sum(-1, keepdim=True)
