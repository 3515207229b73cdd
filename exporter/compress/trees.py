"""Rounding of weight trees: which leaves, on which inputs, and what becomes of their shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor

from exporter.maths import gptq
from exporter.maths.rounding import Grid, quantize_rows
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, Weight

Rounder = Callable[[Tensor, Tensor | None], LowBit]  # values and, where known, the Gram matrix of their input
LeafChange = Callable[[Tensor, Tensor | None], Weight]  # likewise, to any tree of the same shape


def rounded(weight: Weight, gram: Tensor | None, rounder: LeafChange, kept: LeafChange | None = None) -> Weight:
    """A tree with its dense leaves rounded.

    Args:
        weight: The tree, [out, in].
        gram: [in, in], sum of x x^T of its input, or None.
        rounder: Rounds a leaf; gets the Gram matrix of the leaf's own input where there is one.
        kept: Rounds what a sparse matrix keeps, or None, which means as `rounder`.
    """
    match weight:
        case Dense():
            return rounder(weight.values, gram)
        case LowBit():
            return weight
        case Sparse():  # every row keeps other columns, so no one Gram matrix describes their input
            return replace(weight, kept=rounded(weight.kept, None, kept or rounder))
        case Shared():
            return replace(weight, rows=rounded(weight.rows, gram, rounder, kept))
        case Product():
            right = rounded(weight.right, gram, rounder, kept)
            return Product(rounded(weight.left, _carried(gram, right), rounder, kept), right)
        case Sum():
            return Sum(tuple(rounded(term, gram, rounder, kept) for term in weight.terms))
        case _:
            assert_never(weight)


def rounder_of(grid: Grid) -> Rounder:
    """GPTQ where the Gram matrix of a leaf's input is known, else rounding to nearest."""

    def rounder(values: Tensor, gram: Tensor | None) -> LowBit:
        if gram is not None:
            return gptq.quantize(values, gram, grid)
        return quantize_rows(values, grid.bits, grid.group, grid.symmetric, grid.search)

    return rounder


def placeholder_of(grid: Grid) -> Rounder:
    """A rounder that gives leaves without data."""

    def placeholder(values: Tensor, gram: Tensor | None) -> LowBit:
        codes = torch.empty(values.shape, dtype=torch.uint8, device="meta")
        group = grid.columns(codes.shape[1])
        scales = torch.empty(codes.shape[0], -(-codes.shape[1] // group), device="meta")
        zeros = torch.empty(1, 1, device="meta") if grid.symmetric else scales
        return LowBit(codes, scales, zeros, grid.bits, group)

    return placeholder


def _carried(gram: Tensor | None, weight: Weight) -> Tensor | None:
    """The Gram matrix of a weight's output, from that of its input."""
    if gram is None:
        return None
    values = weight.dense(torch.float64).to(gram.device)
    return values @ gram @ values.T
