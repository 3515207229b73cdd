"""SWSC: channels that are alike share one vector, and a low-rank term makes up for most of the difference.

The output channels of a matrix are clustered, and each is replaced by the mean of its cluster: `W' = Shared(means,
labels)`. The largest singular triplets of `W - W'` come on top. Neither step reads activations.

Source: SWSC, arXiv:2501.08631. Decides what it leaves open: k-means++ and Lloyd (`maths.kmeans`); rows are clustered
unless `axis` says columns; the singular values are split evenly (`maths.lowrank`); the error is taken from the means
as they are stored, so that the low-rank term makes up for their rounding too; amounts may be shares of a matrix, so
that narrow keys and values of grouped-query attention shrink as much as wide queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, StrictInt
from torch import Tensor
from torch.nn.functional import one_hot

from exporter import adapters
from exporter.calibrate import Calibration, Samples
from exporter.compress.step import Journal, StepConfig, matrices, plain
from exporter.compress.trees import placeholder_of
from exporter.compress.walk import walk
from exporter.errors import RecipeError, WeightError
from exporter.maths.kmeans import kmeans
from exporter.maths.lowrank import truncated
from exporter.maths.rounding import Grid, quantize_rows
from exporter.model import Model
from exporter.selectors import select
from exporter.weights import Dense, LowBit, Product, Shared, Sum, Weight

VALUE_BITS = 16  # of a number that is not rounded to fewer


def _amount(amount: int | float) -> int | float:
    if amount < 0 or (isinstance(amount, float) and not 0 < amount < 1):
        raise ValueError(f"{amount} is neither a whole number nor a fraction between 0 and 1")
    return amount


Amount = Annotated[StrictInt | float, AfterValidator(_amount)]
Storing = Callable[[Tensor], Dense | LowBit]  # means or a factor to what is stored of them


class SwscConfig(StepConfig):
    """Share channels within the chosen projections, and add a low-rank term.

    `clusters` and `rank` are whole numbers, or fractions: the share of a matrix's numbers that the cluster means, and
    the two factors, may hold. So a fraction costs 16 times itself in bits per weight, whatever the shape of the
    matrix: 1/16 and 1/16 are 2 bits. `rank: 0` leaves the low-rank term out. `axis` says which channels are shared:
    `rows` are outputs, `columns` inputs. `seed` starts the clustering.
    `centroid_bits` and `factor_bits` round means and factors to nearest, a `group` of columns with one scale (0 or
    null: a row); null keeps them as float16. `targets` and `ignore` are names of sites or `re:` patterns; without
    targets, queries and keys are compressed.
    """

    kind: Literal["swsc"] = "swsc"
    version: Literal[1] = 1
    clusters: Amount = 0.0625
    rank: Amount = 0.0625
    axis: Literal["rows", "columns"] = "rows"
    centroid_bits: Annotated[int, Field(ge=1, le=8)] | None = None
    factor_bits: Annotated[int, Field(ge=1, le=8)] | None = None
    group: Annotated[int, Field(ge=0, le=2**20)] | None = 32
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


def needs_calibration(config: SwscConfig) -> bool:
    """Never: only weights are read."""
    return False


def run(model: Model, config: SwscConfig, samples: Samples | None, journal: Journal) -> Model:
    """Compress the chosen sites, layer by layer."""
    chosen = set(predict_weights(model, config))

    def block(model: Model, layer: int, calibration: Calibration | None) -> Model:
        sites = [site for site in matrices(model, layer) if site in chosen]
        return model.with_weights({site: _compressed(model, site, config, journal.device) for site in sites})

    return walk(model, None, block, journal).with_step(config.model_dump(mode="json"))


def predict(model: Model, config: SwscConfig) -> Model:
    """The shapes that `run` will give."""
    return model.with_weights(predict_weights(model, config)).with_step(config.model_dump(mode="json"))


def predict_weights(model: Model, config: SwscConfig) -> dict[str, Weight]:
    """The trees that `run` will give, on the meta device, by site.

    Raises:
        RecipeError: a selector matches nothing, a matrix is not dense any more, or has fewer channels than clusters,
            or not that rank.
    """
    return {site: _promised(site, model.weights[site], config) for site in selected_sites(model, config)}


def selected_sites(model: Model, config: SwscConfig) -> list[str]:
    """The sites to compress: matrices of decoder layers, as far as the config selects them.

    Raises:
        RecipeError: a selector matches nothing, nothing is left, or there are no targets and which matrices are queries
            and keys is not known.
    """
    layers = range(len(model.architecture.layers))
    targets: Sequence[str] | None = config.targets
    if targets is None:
        attention = [adapters.find(model.architecture.family).attention_sites(layer) for layer in layers]
        targets = [site for sites in attention for site in (sites.q, sites.k)]
    chosen = select([site for layer in layers for site in matrices(model, layer)], targets, config.ignore)
    if not chosen:
        raise RecipeError("swsc: ignore leaves out everything that targets chose; choose at least one site")
    return chosen


def amounts(shape: tuple[int, int], config: SwscConfig) -> tuple[int, int]:
    """Clusters and rank for a matrix.

    A share is rounded down, so that it is never exceeded, but at least one cluster is left.

    Args:
        shape: Out and in.
        config: Absolute amounts or shares.

    Raises:
        WeightError: no or more clusters than channels, or a rank over the smaller side.
    """
    out, width = shape
    channels = out if config.axis == "rows" else width
    clusters, rank = config.clusters, config.rank
    if isinstance(clusters, float):
        clusters = max(1, _floor(clusters * channels))
    if isinstance(rank, float):
        rank = _floor(rank * out * width / (out + width))
    if not 1 <= clusters <= channels:
        raise WeightError(f"{clusters} clusters of {channels} {config.axis}; give 1 to {channels}, or a share under 1")
    if rank > min(shape):
        raise WeightError(f"rank {rank} of a {out} x {width} matrix; give 0 to {min(shape)}, or a share under 1")
    return clusters, rank


def average_bits(shape: tuple[int, int], clusters: int, rank: int, label_bits: int = VALUE_BITS) -> float:
    """Bits per weight of a matrix whose rows share vectors, in 16-bit numbers: the paper's count.

    Over one compressed matrix, not over its model. The paper counts a label as a number of 16 bits; it needs
    ceil(log2 clusters), `label_bits` of which is the honest count.

    Args:
        shape: Out and in; for shared columns, in and out.
        clusters: Vectors that are stored.
        rank: Of the low-rank term.
        label_bits: Of a row's label.
    """
    out, width = shape
    numbers = clusters * width + rank * (out + width)
    return (VALUE_BITS * numbers + label_bits * out) / (out * width)


def shared_channels(values: Tensor, clusters: int, config: SwscConfig) -> Weight:
    """A matrix whose channels are the means of their clusters.

    Args:
        values: [out, in], any float type.
        clusters: 1..channels.
        config: Axis, seed, and how means are stored.

    Returns:
        For rows Shared; for columns a Product of the means [out, clusters] and a matrix of zeros and ones that says
        which of them a column takes.

    Raises:
        WeightError: clusters are out of range, or values not finite.
    """
    storing = _storing(config.centroid_bits, config.group)
    if config.axis == "rows":
        found = kmeans(values, clusters, config.seed)
        return Shared(storing(found.centres), found.labels.cpu())
    found = kmeans(values.T.contiguous(), clusters, config.seed)
    chosen = one_hot(found.labels, clusters).T.to("cpu", torch.uint8).contiguous()
    return Product(storing(found.centres.T.contiguous()), _choice(chosen))


def with_low_rank(values: Tensor, base: Weight, rank: int, config: SwscConfig) -> Weight:
    """Add to a base the low-rank term that makes up for most of what it lacks.

    Args:
        values: What is approximated, [out, in], any float type.
        base: [out, in].
        rank: 0..min(out, in); 0 gives the base alone.
        config: How factors are stored.

    Raises:
        WeightError: the rank is out of range.
    """
    if rank == 0:
        return base
    storing = _storing(config.factor_bits, config.group)
    left, right, _ = truncated(values.double() - base.dense(torch.float64).to(values.device), rank)
    return Sum((base, Product(storing(left), storing(right))))


def _compressed(model: Model, site: str, config: SwscConfig, device: str) -> Weight:
    values = _values(site, model.weights[site]).to(device)
    try:
        clusters, rank = amounts((values.shape[0], values.shape[1]), config)
        return with_low_rank(values, shared_channels(values, clusters, config), rank, config)
    except WeightError as error:
        raise RecipeError(f"swsc: {site}: {error}") from None


def _storing(bits: int | None, group: int | None) -> Storing:
    """How means or factors are stored: rounded to nearest, or as float16."""

    def stored(values: Tensor) -> Dense | LowBit:
        if bits is not None:
            return quantize_rows(values.cpu(), bits, group or 0)
        halves = values.half().cpu()
        if not bool(halves.isfinite().all()):
            raise WeightError("means or factors are over 65504, which float16 does not hold; give them bits")
        return Dense(halves)

    return stored


def _promised(site: str, weight: Weight, config: SwscConfig) -> Weight:
    """The tree of a site, on the meta device."""
    out, width = _values(site, weight).shape
    try:
        clusters, rank = amounts((out, width), config)
    except WeightError as error:
        raise RecipeError(f"swsc: {site}: {error}") from None
    base: Weight
    if config.axis == "rows":
        base = Shared(_empty(clusters, width, config.centroid_bits, config.group), _meta(out, dtype=torch.int64))
    else:
        means = _empty(out, clusters, config.centroid_bits, config.group)
        base = Product(means, _choice(_meta(clusters, width, dtype=torch.uint8)))
    factors = [_empty(*shape, config.factor_bits, config.group) for shape in ((out, rank), (rank, width)) if rank]
    return Sum((base, Product(*factors))) if factors else base


def _choice(chosen: Tensor) -> LowBit:
    """A matrix [clusters, columns] of zeros and ones as codes: 2 and 3 around the middle, scale 1.

    One bit would do with a zero point of 0; more runtimes have a kernel for two bits around the middle code.
    """
    scales = torch.ones(len(chosen), 1, device=chosen.device)
    middle = torch.full((1, 1), 2.0, device=chosen.device)
    return LowBit(chosen + 2, scales, middle, 2, chosen.shape[1])


def _empty(rows: int, columns: int, bits: int | None, group: int | None) -> Dense | LowBit:
    """What `_storing` gives, on the meta device."""
    if bits is None:
        return Dense(_meta(rows, columns, dtype=torch.float16))
    return placeholder_of(Grid(bits, group or 0))(_meta(rows, columns), None)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _values(site: str, weight: Weight) -> Tensor:
    return plain(f"swsc: {site}", weight, "it takes plain matrices: put it before other steps")


def _floor(amount: float) -> int:
    """The whole part; what a product of fractions lacks to a whole number by rounding counts as that number."""
    return int(amount + 1e-9)
