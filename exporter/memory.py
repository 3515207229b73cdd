"""How much memory a recipe will take, told before the work: what is there at each moment of each step, in bytes.

Models lie in files; what counts is what is looked at and what is made. Every step walks the layers one by one, so the
most is the same for each layer of one shape, and the largest layer decides. The numbers are counted from shapes: which
arrays a moment holds is written here by hand, beside the maths that makes them, and held to measurement by
`bench/streaming.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter import adapters, gradients
from exporter import compress as methods
from exporter.calibrate import Samples, fast_batch
from exporter.compress.step import matrices, token_tables
from exporter.maths import rounding
from exporter.model import Model
from exporter.packing import packed_width
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, Weight

FLOAT, DOUBLE = 4, 8  # bytes
DECODING = 3 * FLOAT  # bytes a number between codes and floats: spread scales, codes as floats, their differences
ROUNDING = 4 * DOUBLE  # bytes a number while candidates for its scale are tried
BATCH = 5  # arrays as wide as the widest activations while a batch runs through a layer
LOGITS = 3  # attention matrices at once
PROGRAM = 24 * 2**20  # bytes of modules and of torch's work space
HOLES = 1 / 6  # of the arrays; measured by bench/streaming.py, with glibc
WHOLE = {"adapruner": 4, "lora": 1}  # methods that hold the whole model: floats, gradients, sums of both kinds


@dataclass(frozen=True)
class Moment:
    """What is in memory at one moment of a step, in bytes.

    Args:
        step: For people.
        name: Of the moment.
        blocks: The layer under way as it was and as it becomes.
        embeddings: Token tables, as they lie in the file, as floats, or as codes.
        activations: Of the calibration windows: in front of the layer, held inside it, of the batch under way.
        grams: Gram matrices and what is made of them: factors, and the matrix that is solved for.
        decoded: The layer as floats.
        beside: The program's own modules, and what the allocator keeps of freed arrays between others.
    """

    step: str
    name: str
    blocks: int = 0
    embeddings: int = 0
    activations: int = 0
    grams: int = 0
    decoded: int = 0
    beside: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.blocks + self.embeddings + self.activations + self.grams + self.decoded + self.beside


def plan(model: Model, steps: Sequence[tuple[str, Any]], samples: Samples | None) -> list[Moment]:
    """The moments of a recipe that may need the most, beside an interpreter that has imported torch.

    Args:
        model: The source.
        steps: Name and config of each.
        samples: What they are calibrated on, or None.
    """
    found: list[Moment] = [Moment("load", "check that all is finite", embeddings=_largest_matrix(model))]
    for name, config in steps:
        after = methods.predict(model, config)
        used = samples if methods.needs_calibration(config) else None
        found.extend(_moments(name, config, model, after, used))
        model = after
    return [replace(moment, beside=PROGRAM + int(moment.total * HOLES)) for moment in found]


def peak(moments: Sequence[Moment]) -> Moment:
    """The moment that needs the most."""
    return max(moments, key=lambda moment: moment.total)


def resting(weight: Weight) -> int:
    """Bytes of a tree in a file."""
    match weight:
        case LowBit():
            codes = weight.shape[0] * packed_width(weight.shape[1], weight.bits)
            return codes + FLOAT * (weight.scales.numel() + weight.zeros.numel())
        case Sparse():
            return resting(weight.kept) + weight.shape[0] * packed_width(weight.kept.shape[1], 4)
        case _:
            return _size(weight, resting)


def made(weight: Weight) -> int:
    """Bytes of a tree as a method returns it: a byte for every code and place."""
    match weight:
        case LowBit():
            return weight.shape[0] * weight.shape[1] + FLOAT * (weight.scales.numel() + weight.zeros.numel())
        case Sparse():
            return made(weight.kept) + weight.kept.shape[0] * weight.kept.shape[1]
        case _:
            return _size(weight, made)


def _size(weight: Weight, size: Any) -> int:
    match weight:
        case Dense():
            return weight.values.numel() * weight.values.dtype.itemsize
        case Shared():
            return int(size(weight.rows)) + DOUBLE * weight.labels.numel()
        case Product():
            return int(size(weight.left)) + int(size(weight.right))
        case Sum():
            return sum(int(size(term)) for term in weight.terms)
        case _:
            raise TypeError(f"{type(weight).__name__} has its own size")


def _moments(name: str, config: Any, before: Model, after: Model, samples: Samples | None) -> Iterator[Moment]:
    if config.kind in WHOLE:
        yield _whole(name, config, before, samples)
        return
    if samples is not None:
        yield Moment(name, "embed", embeddings=_embedding(before), activations=_activations(before, samples))
    layers = [_layer(name, config, before, after, samples, index) for index in range(len(before.architecture.layers))]
    for same in zip(*layers):  # the same moment of all layers
        yield peak(same)
    tables = [(before.weights[site], after.weights[site]) for site in token_tables(before)]
    changed = [(old, new) for old, new in tables if type(old) is not type(new)]
    if changed:
        yield Moment(name, "round token tables", embeddings=_rounded(changed))
    codes, largest = sum(made(new) for _, new in changed), max(map(resting, after.weights.values()))
    yield Moment(name, "save", embeddings=codes + largest)


def _whole(name: str, config: Any, model: Model, samples: Samples | None) -> Moment:
    """A method that looks at all layers at once."""
    floats = FLOAT * sum(weight.shape[0] * weight.shape[1] for weight in model.weights.values())
    windows = 0 if samples is None else len(samples.ids)
    kept = min(gradients.ROOM, windows * floats) if config.kind == "adapruner" else 0
    through = _held(model, samples, len(model.architecture.layers))
    return Moment(name, "all layers", activations=through, decoded=WHOLE[config.kind] * floats + kept)


def _layer(
    name: str, config: Any, before: Model, after: Model, samples: Samples | None, layer: int
) -> tuple[Moment, ...]:
    """The moments of one layer, in order."""
    old, new = ([model.weights[site] for site in matrices(model, layer)] for model in (before, after))
    blocks = sum(map(resting, old)) + sum(map(made, new))
    solving = max(_solving(config, *pair) for pair in zip(old, new))
    if samples is None:
        return (Moment(name, "work on a layer", blocks=blocks, grams=solving),)
    inputs = _inputs(before, layer)
    running = _activations(before, samples) + _held(before, samples, 1 if config.kind == "fasp" else 0)
    squares = [width * width for width in inputs]
    summed = max(squares) if config.kind == "fasp" else sum(squares)  # one by one, or all in one pass
    batch = _batch(before, samples, layer)
    return (
        Moment(name, "sum Gram matrices", sum(map(resting, old)), 0, running + batch, (FLOAT + DOUBLE) * summed,
               _decoded(old)),
        Moment(name, "solve", blocks, 0, running, DOUBLE * summed + solving),
        Moment(name, "advance", blocks, 0, running + batch, 0, _decoded(new)),
    )  # fmt: skip


def _solving(config: Any, old: Weight, new: Weight) -> int:
    """Arrays that are made while one matrix is solved for, without its Gram matrix."""
    (out, width), kept = old.shape, new.shape[1]
    if config.kind == "fasp":  # channels.restored: G[K, K], its factor, a copy; W, W[:, K], right side, copy, solution
        return DOUBLE * (3 * kept * kept + out * (width + 4 * kept))
    if config.kind == "quantize" and config.algorithm == "rtn":
        return out * width + min(out * width, rounding.AT_ONCE) * ROUNDING
    # gptq.inverse_factor: damped, factor, factor reversed, identity, inverse; W and its codes
    return DOUBLE * (5 * width * width + 2 * out * width)


def _inputs(model: Model, layer: int) -> list[int]:
    """Widths of the different inputs of a layer's matrices: of q, k and v; of o; of gate and up; of down."""
    if model.architecture.config is not None:
        return [model.weights[site].shape[1] for site in matrices(model, layer)]
    adapter = adapters.find(model.architecture.family)
    attention, mlp = adapter.attention_sites(layer), adapter.mlp_sites(layer)
    return [model.weights[site].shape[1] for site in (attention.q, attention.o, mlp.up, mlp.down)]


def _activations(model: Model, samples: Samples) -> int:
    pixels = 0 if samples.pixels is None else samples.pixels.numel()
    return FLOAT * (samples.ids.numel() * model.architecture.hidden + pixels)


def _held(model: Model, samples: Samples | None, layers: int) -> int:
    """What is held inside of `layers` layers: inputs of o and down, and, at each of them, what attention gives."""
    if samples is None or not layers:
        return 0
    widest = max(x.heads * x.value_dim + x.mlp + 2 * model.architecture.hidden for x in model.architecture.layers)
    return FLOAT * samples.ids.numel() * widest * layers


def _batch(model: Model, samples: Samples, layer: int) -> int:
    """What a batch takes on its way through a layer."""
    windows, length = samples.ids.shape
    batch, widths = min(windows, fast_batch(model, length, "cpu")), model.architecture.layers[layer]
    widest = max(widths.heads * widths.head_dim, widths.mlp, model.architecture.hidden)
    return FLOAT * batch * length * (BATCH * widest + LOGITS * widths.heads * length)


def _decoded(weights: Sequence[Weight]) -> int:
    """A layer as float32, and what is on the way to it for its largest matrix."""
    sizes = [weight.shape[0] * weight.shape[1] for weight in weights]
    on_the_way = [size * DECODING for size, weight in zip(sizes, weights) if not isinstance(weight, Dense)]
    return FLOAT * sum(sizes) + max(on_the_way, default=0)


def _embedding(model: Model) -> int:
    """The token embedding in its file and as floats."""
    weight = model.weights[token_tables(model)[0]]
    return resting(weight) + _decoded([weight])


def _rounded(tables: Sequence[tuple[Weight, Weight]]) -> int:
    """Token tables while the largest of them is rounded, all others done."""
    old = max((old for old, _ in tables), key=resting)
    size = old.shape[0] * old.shape[1]
    codes = sum(made(new) for _, new in tables)
    return codes + resting(old) + size + min(size, rounding.AT_ONCE) * ROUNDING


def _largest_matrix(model: Model) -> int:
    return max(resting(weight) for weight in model.weights.values())
