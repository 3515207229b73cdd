"""CASP: queries and keys become low rank, and what that saves pays for more bits in the layers that matter.

Attention maps are sparse, so queries and keys bear a rough approximation: they are cut to a rank where it costs the
calibration outputs least. All matrices are then rounded, the layers that turn the residual stream most to more bits,
so that the decoder as a whole keeps to a budget, counted a weight of the model that came in.

Source: CASP, arXiv:2503.05936. Its low-rank part is as published. Its bit allocation is in no released code; it is
reconstructed here (`maths.allocation`). Differs: factors are balanced channel by channel before they are rounded, not
by a fixed 10 and 0.1; all matrices of a layer are rounded on inputs of that layer with low-rank queries and keys but
nothing in it rounded yet, as in `quantize`, where the released code rounds one matrix after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from exporter import adapters
from exporter.calibrate import Calibration, Samples, Unchanged, block_influence
from exporter.compress.step import Journal, StepConfig, layer_sites, plain, token_tables
from exporter.compress.trees import placeholder_of, rounded, rounder_of
from exporter.compress.walk import walk
from exporter.errors import RecipeError, WeightError
from exporter.maths.allocation import allocated, ideal_bits
from exporter.maths.rounding import Grid, finite
from exporter.maths.whitening import balanced, kept_rank, whitened
from exporter.model import Model
from exporter.weights import Dense, LowBit, Product, Weight, nodes

SCALE_BITS = 16  # scales are float16 numbers

Bits = Annotated[int, Field(ge=1, le=8)]


class CaspConfig(StepConfig):
    """Cut queries and keys to low rank, and round all matrices of the decoder layers under a budget.

    `bits` is the budget: bits a weight of the decoder layers' matrices as they come in, with scales and zero points
    counted, or codes alone where `count_scales` is off. A layer's matrices get one of `levels`, its query and key
    factors `qk_bits`; `keep` is the share of numbers that the factors hold of the matrices that they replace. `inputs`
    weigh queries and keys as the layers that are compressed already give them, or as the `original` layers would.
    `algorithm`, `group`, `symmetric` and `scale_search` are those of `quantize`. `embedding_bits` rounds token
    embedding and head to nearest, null leaves them; they are outside of the budget.
    """

    kind: Literal["casp"] = "casp"
    version: Literal[1] = 1
    bits: Annotated[float, Field(gt=0, le=16)]
    levels: Annotated[tuple[Bits, ...], Field(min_length=1)] = (2, 3, 4)
    keep: Annotated[float, Field(gt=0, le=1)] = 0.25
    qk_bits: Bits = 3
    inputs: Literal["compressed", "original"] = "compressed"
    count_scales: bool = True
    algorithm: Literal["gptq", "rtn"] = "gptq"
    group: Annotated[int, Field(ge=0, le=2**20)] | None = 32
    symmetric: bool = True
    scale_search: Literal["mse", "max"] = "mse"
    embedding_bits: Bits | None = None

    @model_validator(mode="after")
    def _levels_make_sense(self) -> CaspConfig:
        if list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels {list(self.levels)} do not rise; give each width once, the smallest first")
        if not self.symmetric and 1 in (*self.levels, self.qk_bits, self.embedding_bits):
            raise ValueError("1 bit without symmetric leaves 0 and one more number; give symmetric: true, or 2 bits")
        return self

    def grid(self, bits: int) -> Grid:
        """The grid of a matrix of that many bits."""
        return Grid(bits, self.group or 0, self.symmetric, self.scale_search)


@dataclass(frozen=True)
class Budget:
    """What there is to allocate.

    Args:
        bits: For what follows, all layers together.
        sizes: By layer, how many numbers are stored at the layer's width.
    """

    bits: int
    sizes: tuple[int, ...]

    def spent_on(self, influence: Tensor, levels: Sequence[int]) -> list[int]:
        """A width for each layer; see `maths.allocation.allocated`."""
        return [int(level) for level in allocated(influence, self.sizes, levels, self.bits)]

    def ideal(self, influence: Tensor) -> Tensor:
        """The widths if any number could be one; see `maths.allocation.ideal_bits`."""
        return ideal_bits(influence, torch.tensor(self.sizes), self.bits / sum(self.sizes))


def needs_calibration(config: CaspConfig) -> bool:
    """Always: ranks are cut, and widths given, by what activations say."""
    return True


def run(model: Model, config: CaspConfig, samples: Samples | None, journal: Journal) -> Model:
    """Allocate the bits by the model as it is, then compress layer by layer, then round the token tables."""
    budget = budget_of(model, config)
    if samples is None:
        raise RecipeError("casp: low rank and allocation want calibration text; give it")
    influence = _finite_influence(model, samples, journal.device)
    widths = budget.spent_on(influence, config.levels)
    original = Unchanged(model, samples, journal.device) if config.inputs == "original" else None

    def block(model: Model, index: int, calibration: Calibration | None) -> Model:
        here = cast(Calibration, calibration)  # there are samples
        factored = _factored(model, index)
        grams = original.gram(index, factored) if original else here.gram(model, index, factored)
        model = _with_low_rank(model, index, config, grams)
        return _with_rounding(model, index, config, widths[index], here)

    small = walk(model, samples, block, journal)
    for site, grid in _token_grids(model, config).items():
        small = _with_rounded(small, site, None, grid)
    outcome = _outcome(model, small, widths) | {
        "influence": influence.tolist(),
        "ideal_bits": budget.ideal(influence).tolist(),
    }
    return small.with_step(config.model_dump(mode="json") | {"outcome": outcome})


def predict(model: Model, config: CaspConfig) -> Model:
    """The shapes that `run` will give; which layers get more bits is guessed: the first ones and the last."""
    count = len(model.architecture.layers)
    order = [0, *([count - 1] if count > 1 else []), *range(1, count - 1)]
    guess = torch.tensor([1.0 / (1 + order.index(layer)) for layer in range(count)])
    widths = budget_of(model, config).spent_on(guess, config.levels)
    weights: dict[str, Weight] = {}
    for index, bits in enumerate(widths):
        for site in layer_sites(model, index):
            weights[site] = _in_shape(model, site, config, bits, site in _factored(model, index))
    for site, grid in _token_grids(model, config).items():
        weights[site] = rounded(model.weights[site], None, placeholder_of(grid))
    return model.with_weights(weights).with_step(config.model_dump(mode="json"))


def budget_of(model: Model, config: CaspConfig) -> Budget:
    """What a config leaves to allocate in a model, after query and key factors and, where they count, scales.

    Raises:
        RecipeError: it does not hold all layers at the lowest level, a rank comes to 0, a matrix is not dense, or which
            matrices are queries and keys is not known.
    """
    weights = spent = 0
    sizes = []
    for index in range(len(model.architecture.layers)):
        size = 0
        for site in layer_sites(model, index):
            out, width = _values(model, site).shape
            weights += out * width
            if site in _factored(model, index):
                rank = _rank(model, site, config)
                spent += sum(_cost(shape, config, config.qk_bits) for shape in ((out, rank), (rank, width)))
            else:
                size += _cost((out, width), config, 1) - _cost((out, width), config, 0)
                spent += _cost((out, width), config, 0)
        sizes.append(size)
    _refuse_too_little(config, weights, spent + config.levels[0] * sum(sizes))
    return Budget(int(Fraction(str(config.bits)) * weights) - spent, tuple(sizes))


def _finite_influence(model: Model, samples: Samples, device: str) -> Tensor:
    influence = block_influence(model, samples, device=device)
    if not bool(influence.isfinite().all()):
        layer = influence.isfinite().tolist().index(False)
        raise RecipeError(f"casp: activations of layer {layer} are not finite: the model overflows on the text")
    return influence


def _with_low_rank(model: Model, index: int, config: CaspConfig, grams: Mapping[str, Tensor]) -> Model:
    """The model with the queries and keys of a layer as products, not rounded yet."""
    for site in _factored(model, index):
        try:
            factors = whitened(finite(_values(model, site)), grams[site], _rank(model, site, config))
        except WeightError as error:
            raise RecipeError(f"casp: {site}: {error}") from None
        left, right = (Dense(factor.float().cpu()) for factor in balanced(*factors))
        model = model.with_weights({site: Product(left, right)})
    return model


def _with_rounding(model: Model, index: int, config: CaspConfig, bits: int, calibration: Calibration) -> Model:
    """The model with all matrices of a layer rounded, each on the inputs that it has before any is."""
    sites = layer_sites(model, index)
    grams = calibration.gram(model, index, sites) if config.algorithm == "gptq" else {}
    for site in sites:
        grid = config.grid(config.qk_bits if site in _factored(model, index) else bits)
        model = _with_rounded(model, site, grams.get(site), grid)
    return model


def _with_rounded(model: Model, site: str, gram: Tensor | None, grid: Grid) -> Model:
    try:
        return model.with_weights({site: rounded(model.weights[site], gram, rounder_of(grid))})
    except WeightError as error:
        raise RecipeError(f"casp: {site}: {error}") from None


def _in_shape(model: Model, site: str, config: CaspConfig, bits: int, is_factored: bool) -> Weight:
    """What becomes of a site, on the meta device."""
    weight: Weight = model.weights[site]
    if is_factored:
        rank, empty = _rank(model, site, config), partial(torch.empty, device="meta")
        weight = Product(Dense(empty(weight.shape[0], rank)), Dense(empty(rank, weight.shape[1])))
    return rounded(weight, None, placeholder_of(config.grid(config.qk_bits if is_factored else bits)))


def _factored(model: Model, index: int) -> tuple[str, str]:
    """Sites of the queries and keys of a layer."""
    attention = adapters.find(model.architecture.family).attention_sites(index)
    return attention.q, attention.k


def _rank(model: Model, site: str, config: CaspConfig) -> int:
    out, width = model.weights[site].shape
    if rank := kept_rank(out, width, config.keep):
        return rank
    least = (out + width) / (out * width)
    raise RecipeError(f"casp: keep {config.keep:g} leaves {site} of {out} x {width} no rank; give over {least:.4g}")


def _cost(shape: tuple[int, int], config: CaspConfig, bits: int) -> int:
    """Bits of a rounded matrix: codes and, where they count, scales and zero points."""
    out, width = shape
    scales = out * -(-width // config.grid(1).columns(width)) if config.count_scales else 0
    return bits * (out * width + (0 if config.symmetric else scales)) + SCALE_BITS * scales


def _refuse_too_little(config: CaspConfig, weights: int, needed: int) -> None:
    if Fraction(str(config.bits)) * weights < needed:
        least = -(-needed * 1000 // weights) / 1000
        advice = "a longer group or a lower keep" if config.count_scales else "lower levels or a lower keep"
        raise RecipeError(
            f"casp: {config.bits:g} bits a weight do not hold all layers at {config.levels[0]} bits with queries and "
            f"keys at {config.qk_bits}; give at least {least:g}, {advice}"
        )


def _token_grids(model: Model, config: CaspConfig) -> dict[str, Grid]:
    bits = config.embedding_bits
    return {} if bits is None else {site: config.grid(bits) for site in token_tables(model)}


def _values(model: Model, site: str) -> Tensor:
    return plain(site, model.weights[site], "casp compresses plain matrices: leave out one of the steps")


def _outcome(before: Model, after: Model, widths: Sequence[int]) -> dict[str, Any]:
    """What came out, for the provenance: the layers' widths, and bits counted on the trees themselves."""
    sites = [site for index in range(len(widths)) for site in layer_sites(before, index)]
    weights = sum(before.weights[site].shape[0] * before.weights[site].shape[1] for site in sites)
    leaves = [node for site in sites for node in nodes(after.weights[site]) if isinstance(node, LowBit)]
    codes = sum(leaf.shape[0] * leaf.shape[1] * leaf.bits for leaf in leaves)
    return {
        "bits_per_layer": list(widths),
        "code_bits_per_weight": codes / weights,
        "bits_per_weight": (codes + sum(_grid_bits(leaf) for leaf in leaves)) / weights,
    }


def _grid_bits(leaf: LowBit) -> int:
    zeros = 0 if leaf.zeros.numel() == 1 else leaf.zeros.numel() * leaf.bits  # one for all follows from the width
    return leaf.scales.numel() * SCALE_BITS + zeros
