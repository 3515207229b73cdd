"""Rounding to few bits: to nearest with searched scales, or by GPTQ; and pruning to N of M in the same walk.

GPTQ walks the decoder with inputs from the layers that are rounded already; all matrices of a layer see the same
unrounded layer. Token embedding and head are rounded to nearest and never pruned: rows that are looked up have no input
to weigh them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from exporter.calibrate import Calibration, Samples
from exporter.compress.step import Journal, StepConfig, matrices, token_tables
from exporter.compress.trees import LeafChange, placeholder_of, rounded, rounder_of
from exporter.compress.walk import walk
from exporter.errors import RecipeError, WeightError
from exporter.maths.rounding import Grid
from exporter.maths.sparsegpt import check_sparsity, quantize_sparse, sparsify, sparsify_by_size
from exporter.model import Model
from exporter.selectors import select
from exporter.weights import Dense, Sparse, Weight, describe, nodes

Leaves = tuple[LeafChange, LeafChange]  # of a plain matrix, and of what a sparse one keeps


class QuantizeConfig(StepConfig):
    """Round the dense matrices, and dense leaves of trees, of the chosen sites to `bits`.

    A `group` of columns shares a scale; 0 or null is one scale a row. `symmetric` grids need no zero points.
    `embedding_bits` is the width of token embedding and head, null for `bits`. `targets` and `ignore` are names of
    sites or `re:` patterns; position tables, norms and biases are never rounded, low-bit leaves stay as they are.
    `sparsity` `N:M` keeps N of M neighbouring columns of every row, by the inputs under `gptq`, by size under `rtn`;
    `group` then counts kept columns. Token embedding and head are never pruned. With it, `bits` may be null: what is
    kept stays as it is.
    """

    kind: Literal["quantize"] = "quantize"
    version: Literal[1] = 1
    algorithm: Literal["gptq", "rtn"] = "gptq"
    bits: Annotated[int, Field(ge=1, le=8)] | None = 4
    group: Annotated[int, Field(ge=0, le=2**20)] | None = 32
    symmetric: bool = True
    scale_search: Literal["mse", "max"] = "mse"
    embedding_bits: Annotated[int, Field(ge=1, le=8)] | None = None
    sparsity: Annotated[str, Field(pattern=r"^[0-9]{1,2}:[0-9]{1,2}$")] | None = None
    targets: tuple[str, ...] = ("re:.*",)
    ignore: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_bit_is_symmetric(self) -> QuantizeConfig:
        if not self.symmetric and 1 in (self.bits, self.embedding_bits):
            raise ValueError("1 bit without symmetric leaves 0 and one more number; give symmetric: true, or 2 bits")
        return self

    @model_validator(mode="after")
    def _sparsity_keeps_some_and_prunes_some(self) -> QuantizeConfig:
        if self.pattern is not None and not 1 <= self.pattern[0] < self.pattern[1] <= 16:
            raise ValueError(f"sparsity {self.sparsity} is not N:M with 1 <= N < M <= 16, N of M columns kept")
        if self.pattern is None and self.bits is None:
            raise ValueError("bits: null leaves matrices as they are; give bits, or a sparsity")
        return self

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M of the sparsity."""
        if self.sparsity is None:
            return None
        n, m = self.sparsity.split(":")
        return int(n), int(m)

    def grid(self, bits: int | None) -> Grid | None:
        """The grid of a matrix of that many bits; None where it is not rounded."""
        return None if bits is None else Grid(bits, self.group or 0, self.symmetric, self.scale_search)


def needs_calibration(config: QuantizeConfig) -> bool:
    """Whether the algorithm reads activations."""
    return config.algorithm == "gptq"


def run(model: Model, config: QuantizeConfig, samples: Samples | None, journal: Journal) -> Model:
    """Round the chosen sites, layer by layer, then those outside of layers."""
    predict(model, config)  # refuses what does not fit, before the work
    chosen = selected_sites(model, config)

    def block(model: Model, index: int, calibration: Calibration | None) -> Model:
        sites = [site for site in matrices(model, index) if site in chosen]
        heard = [site for site in sites if _has_dense(model, site)]  # the others stay as they are
        grams = calibration.gram(model, index, heard) if calibration is not None and heard else {}
        leaves = _leaves(config.grid(config.bits), config.pattern)
        return model.with_weights({site: _changed(model, site, grams.get(site), leaves) for site in sites})

    model = walk(model, _wanted(config, samples), block, journal)
    leaves = _leaves(config.grid(config.embedding_bits or config.bits), None)
    tables = [site for site in token_tables(model) if site in chosen]
    model = model.with_weights({site: _changed(model, site, None, leaves) for site in tables})
    return model.with_step(config.model_dump(mode="json"))


def predict(model: Model, config: QuantizeConfig) -> Model:
    """The shapes that `run` will give.

    Raises:
        RecipeError: as `selected_sites`, or the widths of a matrix do not divide into groups of the sparsity.
    """
    tables = token_tables(model)
    of_layers = _placeholders(config.grid(config.bits), config.pattern)
    of_tables = _placeholders(config.grid(config.embedding_bits or config.bits), None)
    weights = {
        site: _changed(model, site, None, of_tables if site in tables else of_layers)
        for site in selected_sites(model, config)
    }
    return model.with_weights(weights).with_step(config.model_dump(mode="json"))


def selected_sites(model: Model, config: QuantizeConfig) -> list[str]:
    """The sites to round: matrices of decoder layers, token embedding and head, as far as the config selects them.

    Raises:
        RecipeError: a selector matches nothing, nothing is left, or all that is left has few bits already.
    """
    layers = range(len(model.architecture.layers))
    sites = [site for index in layers for site in matrices(model, index)]
    chosen = select([*sites, *token_tables(model)], config.targets, config.ignore)
    if not chosen:
        raise RecipeError("quantize: ignore leaves out everything that targets chose; choose at least one site")
    if not any(_has_dense(model, site) for site in chosen):
        kind = describe(model.weights[chosen[0]])
        raise RecipeError(
            f"quantize: nothing is left to round, {chosen[0]} is {kind} already; leave out one of the steps"
        )
    return chosen


def _has_dense(model: Model, site: str) -> bool:
    return any(isinstance(node, Dense) for node in nodes(model.weights[site]))


def _changed(model: Model, site: str, gram: Tensor | None, leaves: Leaves) -> Weight:
    try:
        return rounded(model.weights[site], gram, *leaves)
    except WeightError as error:
        raise RecipeError(f"quantize: {site}: {error}") from None


def _leaves(grid: Grid | None, pattern: tuple[int, int] | None) -> Leaves:
    """What becomes of a dense leaf, and of what a sparse matrix keeps, which is not pruned again."""
    plain = _as_it_is if grid is None else rounder_of(grid)
    if pattern is None:
        return plain, plain
    n, m = pattern

    def pruned(values: Tensor, gram: Tensor | None) -> Weight:
        if gram is None:
            return sparsify_by_size(values, n, m, grid)
        return sparsify(values, gram, n, m) if grid is None else quantize_sparse(values, gram, grid, n, m)

    return pruned, plain


def _placeholders(grid: Grid | None, pattern: tuple[int, int] | None) -> Leaves:
    """What `_leaves` gives, without data."""
    plain = _as_it_is if grid is None else placeholder_of(grid)
    if pattern is None:
        return plain, plain
    n, m = pattern

    def pruned(values: Tensor, gram: Tensor | None) -> Weight:
        out, width = values.shape
        check_sparsity(width, n, m, grid)
        kept = torch.empty(out, width // m * n, dtype=values.dtype, device="meta")
        return Sparse(plain(kept, None), torch.empty(kept.shape, dtype=torch.uint8, device="meta"), n, m)

    return pruned, plain


def _as_it_is(values: Tensor, gram: Tensor | None) -> Dense:
    return Dense(values)


def _wanted(config: QuantizeConfig, samples: Samples | None) -> Samples | None:
    if not needs_calibration(config):
        return None
    if samples is None:
        raise RecipeError("quantize: gptq wants calibration text; give it, or use algorithm rtn")
    return samples
