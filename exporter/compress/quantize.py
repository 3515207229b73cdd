"""Rounding to few bits: to nearest with searched scales, or by GPTQ.

GPTQ walks the decoder with inputs from the layers that are rounded already; all matrices of a layer see the same
unrounded layer. Token embedding and head are rounded to nearest: rows that are looked up have no input to weigh them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal, assert_never

import torch
from pydantic import Field, model_validator
from torch import Tensor

from exporter import adapters
from exporter.calibrate import Calibration
from exporter.compress.step import Report, StepConfig, layer_sites
from exporter.errors import RecipeError, WeightError
from exporter.maths import gptq
from exporter.maths.rounding import Grid, quantize_rows
from exporter.model import Model
from exporter.selectors import select
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, Weight

Rounder = Callable[[Tensor, Tensor | None], LowBit]  # values and, where known, the Gram matrix of their input


class QuantizeConfig(StepConfig):
    """Round the dense matrices, and dense leaves of trees, of the chosen sites to `bits`.

    A `group` of columns shares a scale; 0 or null is one scale a row. `symmetric` grids need no zero points.
    `embedding_bits` is the width of token embedding and head, null for `bits`. `targets` and `ignore` are names of
    sites or `re:` patterns; position tables, norms and biases are never rounded, low-bit leaves stay as they are.
    """

    kind: Literal["quantize"] = "quantize"
    version: Literal[1] = 1
    algorithm: Literal["gptq", "rtn"] = "gptq"
    bits: Annotated[int, Field(ge=1, le=8)] = 4
    group: Annotated[int, Field(ge=0, le=2**20)] | None = 32
    symmetric: bool = True
    scale_search: Literal["mse", "max"] = "mse"
    embedding_bits: Annotated[int, Field(ge=1, le=8)] | None = None
    targets: tuple[str, ...] = ("re:.*",)
    ignore: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_bit_is_symmetric(self) -> QuantizeConfig:
        if not self.symmetric and 1 in (self.bits, self.embedding_bits):
            raise ValueError("1 bit without symmetric leaves 0 and one more number; give symmetric: true, or 2 bits")
        return self

    def grid(self, bits: int) -> Grid:
        """The grid of a matrix of that many bits."""
        return Grid(bits, self.group or 0, self.symmetric, self.scale_search)


def needs_calibration(config: QuantizeConfig) -> bool:
    """Whether the algorithm reads activations."""
    return config.algorithm == "gptq"


def run(model: Model, config: QuantizeConfig, windows: Tensor | None, report: Report) -> Model:
    """Round the chosen sites, layer by layer, then those outside of layers."""
    chosen = selected_sites(model, config)
    calibration = _calibration(model, config, windows)
    count = len(model.architecture.layers)
    for index in range(count):
        sites = [site for site in layer_sites(model, index) if site in chosen]
        grams = calibration.gram(model, index, sites) if calibration is not None and sites else {}
        model = model.with_weights(
            {site: _rounded_site(model, site, grams.get(site), config.grid(config.bits)) for site in sites}
        )
        if calibration is not None:
            calibration.advance(model, index)
        report((index + 1) / (count + 1))
    grid = config.grid(config.embedding_bits or config.bits)
    tables = [site for site in _token_tables(model) if site in chosen]
    model = model.with_weights({site: _rounded_site(model, site, None, grid) for site in tables})
    report(1.0)
    return model.with_step(config.model_dump(mode="json"))


def predict(model: Model, config: QuantizeConfig) -> Model:
    """The shapes that `run` will give."""
    tables = _token_tables(model)
    weights = {}
    for site in selected_sites(model, config):
        grid = config.grid((config.embedding_bits or config.bits) if site in tables else config.bits)
        weights[site] = rounded(model.weights[site], None, _placeholder_of(grid))
    return model.with_weights(weights).with_step(config.model_dump(mode="json"))


def selected_sites(model: Model, config: QuantizeConfig) -> list[str]:
    """The sites to round: matrices of decoder layers, token embedding and head, as far as the config selects them.

    Raises:
        RecipeError: a selector matches nothing, or nothing is left.
    """
    layers = range(len(model.architecture.layers))
    sites = [site for index in layers for site in layer_sites(model, index)]
    chosen = select([*sites, *_token_tables(model)], config.targets, config.ignore)
    if not chosen:
        raise RecipeError("quantize: ignore leaves out everything that targets chose; choose at least one site")
    return chosen


def rounded(weight: Weight, gram: Tensor | None, rounder: Rounder) -> Weight:
    """A tree with its dense leaves rounded.

    Args:
        weight: The tree, [out, in].
        gram: [in, in], sum of x x^T of its input, or None.
        rounder: Rounds a leaf; gets the Gram matrix of the leaf's own input where there is one.
    """
    match weight:
        case Dense():
            return rounder(weight.values, gram)
        case LowBit():
            return weight
        case Sparse():  # every row keeps other columns, so no one Gram matrix describes their input
            return replace(weight, kept=rounded(weight.kept, None, rounder))
        case Shared():
            return replace(weight, rows=rounded(weight.rows, gram, rounder))
        case Product():
            right = rounded(weight.right, gram, rounder)
            return Product(rounded(weight.left, _carried(gram, right), rounder), right)
        case Sum():
            return Sum(tuple(rounded(term, gram, rounder) for term in weight.terms))
        case _:
            assert_never(weight)


def _carried(gram: Tensor | None, weight: Weight) -> Tensor | None:
    """The Gram matrix of a weight's output, from that of its input."""
    if gram is None:
        return None
    values = weight.dense(torch.float64)
    return values @ gram @ values.T


def _rounded_site(model: Model, site: str, gram: Tensor | None, grid: Grid) -> Weight:
    def rounder(values: Tensor, own: Tensor | None) -> LowBit:
        if own is not None:
            return gptq.quantize(values, own, grid)
        return quantize_rows(values, grid.bits, grid.group, grid.symmetric, grid.search)

    try:
        return rounded(model.weights[site], gram, rounder)
    except WeightError as error:
        raise RecipeError(f"quantize: {site}: {error}") from None


def _placeholder_of(grid: Grid) -> Rounder:
    """A rounder that gives leaves without data."""

    def placeholder(values: Tensor, own: Tensor | None) -> LowBit:
        codes = torch.empty(values.shape, dtype=torch.uint8, device="meta")
        group = grid.columns(codes.shape[1])
        scales = torch.empty(codes.shape[0], -(-codes.shape[1] // group), device="meta")
        zeros = torch.empty(1, 1, device="meta") if grid.symmetric else scales
        return LowBit(codes, scales, zeros, grid.bits, group)

    return placeholder


def _token_tables(model: Model) -> list[str]:
    """Token embedding and, where it is not tied, head."""
    adapter = adapters.find(model.architecture.family)
    return [adapter.EMBEDDING] if model.architecture.tied else [adapter.EMBEDDING, adapter.HEAD]


def _calibration(model: Model, config: QuantizeConfig, windows: Tensor | None) -> Calibration | None:
    if not needs_calibration(config):
        return None
    if windows is None:
        raise RecipeError("quantize: gptq wants calibration text; give it, or use algorithm rtn")
    return Calibration(model, windows)
