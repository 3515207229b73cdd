"""PBS2P: binarization with N of every M weights kept, and the two levels refitted to what is kept.

Layer after layer, with the inputs that the binarized layers before give; all matrices of a layer see that layer whole.
The mathematics is in `exporter.maths.binary` and `exporter.maths.pruning`.

Source: PBS2P, arXiv:2502.01705, after its description. Differs, or decides what it leaves open: see those two.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from exporter.calibrate import Calibration, Samples, block_influence
from exporter.compress.step import Journal, StepConfig, layer_sites, plain
from exporter.compress.walk import walk
from exporter.errors import RecipeError, WeightError
from exporter.maths.binary import Form, Metric, Plan, Salience, binarize
from exporter.maths.pruning import kept_per_layer
from exporter.model import Model
from exporter.selectors import select
from exporter.weights import LowBit, Sparse, Sum, Weight


class Pbs2pConfig(StepConfig):
    """Binarize the matrices of decoder layers, keeping `n` of every `m` neighbours along a row; n = m prunes nothing.

    `form` A leaves pruned places 0 (a sparse matrix of 1-bit codes), B at the offset of the levels (2-bit codes);
    `symmetric` has no offset (sparse, half the scales, exact in plain 2-bit codes). `metric` says what dropping a
    weight costs: `hessian` as in the paper, `gain`, `magnitude` or `wanda`. `sign_rounds` is how often signs are taken
    anew after each step. `salient` of every m kept weights are binarized twice: the same columns in all rows as far as
    these keep them (`salience` column), or each row's own (`weight`). `block` columns share two levels. With `coarse`,
    layers keep from `low` to `high` of m, n on the mean, by their influence times `spread`; without `low` and `high`,
    n - 1 to n + 1. `damp` is a fraction of the mean squared input. `targets` and `ignore` are names of sites or `re:`
    patterns.
    """

    kind: Literal["pbs2p"] = "pbs2p"
    version: Literal[1] = 1
    n: Annotated[int, Field(ge=1, le=16)] = 4
    m: Annotated[int, Field(ge=2, le=16)] = 8
    form: Form = "A"
    metric: Metric = "hessian"
    sign_rounds: Annotated[int, Field(ge=0, le=20)] = 0
    salient: Annotated[int, Field(ge=0, le=16)] = 0
    salience: Salience = "column"
    block: Annotated[int, Field(ge=2, le=2**20)] = 128
    coarse: bool = False
    low: Annotated[int, Field(ge=1, le=16)] | None = None
    high: Annotated[int, Field(ge=1, le=16)] | None = None
    spread: Annotated[float, Field(ge=0, le=16)] = 1.0
    damp: Annotated[float, Field(gt=0, le=1)] = 1e-2
    targets: tuple[str, ...] = ("re:.*",)
    ignore: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Pbs2pConfig:
        low, high = self.bounds
        if not low <= self.n <= high <= self.m:
            raise ValueError(f"not so: low {low} <= n {self.n} <= high {high} <= m {self.m}")
        if not self.coarse and (self.low, self.high) != (None, None):
            raise ValueError("low and high are bounds of coarse; give coarse: true, or leave them out")
        if self.salient > low:
            raise ValueError(f"{self.salient} salient of every {self.m} are more than the {low} that are kept")
        if self.block % self.m:
            near = self.block // self.m * self.m
            raise ValueError(f"block {self.block} is no multiple of m = {self.m}; {near or near + self.m} is")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and most that a layer keeps of every m."""
        if not self.coarse:
            return self.n, self.n
        low, high = max(self.n - 1, 1), min(self.n + 1, self.m)
        return low if self.low is None else self.low, high if self.high is None else self.high

    def plan(self, n: int) -> Plan:
        """How the matrices of a layer that keeps n of m are binarized."""
        shared = ("m", "form", "metric", "sign_rounds", "salient", "salience", "block", "damp")
        return Plan(n, **self.model_dump(include=set(shared)))


def needs_calibration(config: Pbs2pConfig) -> bool:
    """Always: levels, and what makes up for errors, are fitted to outputs."""
    return True


def run(model: Model, config: Pbs2pConfig, samples: Samples | None, journal: Journal) -> Model:
    """Binarize layer after layer."""
    sites = selected_sites(model, config)
    if samples is None:
        raise RecipeError("pbs2p: levels are fitted to the outputs on calibration text; give some")
    kept = layer_counts(model, config, sites, samples, journal)

    def block(model: Model, index: int, calibration: Calibration | None) -> Model:
        if calibration is None or not sites[index]:
            return model
        grams = calibration.gram(model, index, sites[index])
        plan = config.plan(kept[index])
        return model.with_weights({site: _binarized(model, site, grams[site], plan) for site in sites[index]})

    return walk(model, samples, block, journal).with_step(config.model_dump(mode="json"))


def predict(model: Model, config: Pbs2pConfig) -> Model:
    """The shapes that `run` will give; with `coarse`, as if every layer kept n, which is the budget that it meets."""
    sites = [site for layer in selected_sites(model, config) for site in layer]
    weights = {site: placeholder(model.weights[site].shape, config.plan(config.n)) for site in sites}
    return model.with_weights(weights).with_step(config.model_dump(mode="json"))


def selected_sites(model: Model, config: Pbs2pConfig) -> list[list[str]]:
    """The sites to binarize, by layer.

    Raises:
        RecipeError: a selector matches nothing, nothing is left, or a matrix is not dense or not of whole groups.
    """
    layers = [layer_sites(model, index) for index in range(len(model.architecture.layers))]
    chosen = select([site for layer in layers for site in layer], config.targets, config.ignore)
    if not chosen:
        raise RecipeError("pbs2p: ignore leaves out everything that targets chose; choose at least one site")
    for site in chosen:
        _check(site, model.weights[site], config)
    return [[site for site in layer if site in chosen] for layer in layers]


def layer_counts(
    model: Model, config: Pbs2pConfig, sites: list[list[str]], samples: Samples, journal: Journal
) -> list[int]:
    """How many of m each layer keeps."""
    if not config.coarse:
        return [config.n] * len(sites)
    influence = block_influence(model, samples, device=journal.device).tolist()
    shapes = [[model.weights[site].shape for site in layer] for layer in sites]
    sizes = [sum(out * width for out, width in layer) for layer in shapes]
    return kept_per_layer(influence, sizes, config.n, *config.bounds, config.spread)


def placeholder(shape: tuple[int, int], plan: Plan) -> Weight:
    """The tree that `binarize` gives for a matrix of that shape, on the meta device."""
    has_middle = plan.form == "B" and plan.n < plan.m
    first = _two_bits(shape, plan) if has_middle else _one_bit(shape, plan.n, plan)
    return Sum((first, _one_bit(shape, plan.salient, plan))) if plan.salient else first


def _one_bit(shape: tuple[int, int], n: int, plan: Plan) -> Weight:
    out, kept, group = shape[0], shape[1] * n // plan.m, min(plan.block, shape[1]) * n // plan.m
    codes = _codes((out, kept), 1, group, plan.form)
    return codes if n == plan.m else Sparse(codes, torch.empty(out, kept, dtype=torch.uint8, device="meta"), n, plan.m)


def _two_bits(shape: tuple[int, int], plan: Plan) -> LowBit:
    return _codes(shape, 2, min(plan.block, shape[1]), plan.form)


def _codes(shape: tuple[int, int], bits: int, group: int, form: Form) -> LowBit:
    grid = torch.empty(shape[0], -(-shape[1] // group), device="meta")
    zeros = torch.empty(1, 1, device="meta") if form == "symmetric" else grid
    codes = torch.empty(shape, dtype=torch.uint8, device="meta")
    return LowBit(codes, grid, zeros, bits, group, fractional=True)


def _binarized(model: Model, site: str, gram: Tensor, plan: Plan) -> Weight:
    try:
        return binarize(model.weights[site].dense(torch.float64), gram, plan)
    except WeightError as error:
        raise RecipeError(f"pbs2p: {site}: {error}") from None


def _check(site: str, weight: Weight, config: Pbs2pConfig) -> None:
    plain(site, weight, "pbs2p binarizes plain matrices: name the site in ignore")
    width, is_grouped = weight.shape[1], config.bounds[0] < config.m or config.salient > 0
    if is_grouped and width % config.m:
        fitting = ", ".join(str(size) for size in range(2, 17) if width % size == 0)
        raise RecipeError(
            f"{site} has {width} columns, no multiple of m = {config.m}; "
            f"{f'give an m that divides them ({fitting}), or' if fitting else 'no m does:'} name the site in ignore"
        )
