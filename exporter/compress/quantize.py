"""Rounding to few bits: to nearest with searched scales, or by GPTQ.

GPTQ walks the decoder with inputs from the layers that are rounded already; all matrices of a layer see the same
unrounded layer. Token embedding and head are rounded to nearest: rows that are looked up have no input to weigh them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from exporter.calibrate import Calibration, Samples
from exporter.compress.step import Journal, StepConfig, layer_sites, token_tables
from exporter.compress.trees import placeholder_of, rounded, rounder_of
from exporter.compress.walk import walk
from exporter.errors import RecipeError, WeightError
from exporter.maths.rounding import Grid
from exporter.model import Model
from exporter.selectors import select
from exporter.weights import Weight


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


def run(model: Model, config: QuantizeConfig, samples: Samples | None, journal: Journal) -> Model:
    """Round the chosen sites, layer by layer, then those outside of layers."""
    chosen = selected_sites(model, config)

    def block(model: Model, index: int, calibration: Calibration | None) -> Model:
        sites = [site for site in layer_sites(model, index) if site in chosen]
        grams = calibration.gram(model, index, sites) if calibration is not None and sites else {}
        return model.with_weights(
            {site: _rounded_site(model, site, grams.get(site), config.grid(config.bits)) for site in sites}
        )

    model = walk(model, _wanted(config, samples), block, journal)
    grid = config.grid(config.embedding_bits or config.bits)
    tables = [site for site in token_tables(model) if site in chosen]
    model = model.with_weights({site: _rounded_site(model, site, None, grid) for site in tables})
    return model.with_step(config.model_dump(mode="json"))


def predict(model: Model, config: QuantizeConfig) -> Model:
    """The shapes that `run` will give."""
    tables = token_tables(model)
    weights = {}
    for site in selected_sites(model, config):
        grid = config.grid((config.embedding_bits or config.bits) if site in tables else config.bits)
        weights[site] = rounded(model.weights[site], None, placeholder_of(grid))
    return model.with_weights(weights).with_step(config.model_dump(mode="json"))


def selected_sites(model: Model, config: QuantizeConfig) -> list[str]:
    """The sites to round: matrices of decoder layers, token embedding and head, as far as the config selects them.

    Raises:
        RecipeError: a selector matches nothing, or nothing is left.
    """
    layers = range(len(model.architecture.layers))
    sites = [site for index in layers for site in layer_sites(model, index)]
    chosen = select([*sites, *token_tables(model)], config.targets, config.ignore)
    if not chosen:
        raise RecipeError("quantize: ignore leaves out everything that targets chose; choose at least one site")
    return chosen


def _rounded_site(model: Model, site: str, gram: Tensor | None, grid: Grid) -> Weight:
    try:
        return rounded(model.weights[site], gram, rounder_of(grid))
    except WeightError as error:
        raise RecipeError(f"quantize: {site}: {error}") from None


def _wanted(config: QuantizeConfig, samples: Samples | None) -> Samples | None:
    if not needs_calibration(config):
        return None
    if samples is None:
        raise RecipeError("quantize: gptq wants calibration text; give it, or use algorithm rtn")
    return samples
