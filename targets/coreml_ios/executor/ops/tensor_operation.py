"""Tensors made, joined, cut up, padded, counted and sorted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from targets.coreml_ios.executor.ops.suppression import non_maximum_suppression
from targets.coreml_ios.executor.values import Value, axis_of, flag, number, require_room, whole, wholes


def concat(values: Sequence[Tensor], axis: Value, interleave: Value = False) -> Tensor:
    """The tensors one after another along an axis; interleaved, by turns: y[i n + k] = values[k][i]."""
    require_room(sum(value.numel() for value in values))
    if values[0].ndim == 0:
        return torch.stack(list(values), whole(axis))
    if not flag(interleave):
        return torch.cat(list(values), whole(axis))
    along = axis_of(axis, values[0].ndim)
    return torch.stack(list(values), along + 1).flatten(along, along + 1)


def stack(values: Sequence[Tensor], axis: Value) -> Tensor:
    """y[..., k, ...] = values[k], k on a new axis."""
    require_room(sum(value.numel() for value in values))
    return torch.stack(list(values), whole(axis))


def split(x: Tensor, axis: Value, num_splits: Value = None, split_sizes: Value = None) -> tuple[Tensor, ...]:
    """`x` in pieces along an axis: of these sizes, or that many of one size."""
    along = whole(axis)
    sizes = _equal_parts(x.shape[along], whole(num_splits)) if split_sizes is None else wholes(split_sizes)
    if num_splits is not None and len(sizes) != whole(num_splits):
        raise ValueError(f"{len(sizes)} sizes are given for {whole(num_splits)} pieces")
    return torch.split(x, sizes, along)


def _equal_parts(size: int, count: int) -> list[int]:
    if not 0 < count <= max(size, 1) or size % count:
        raise ValueError(f"an axis of {size} has no {count} equal pieces")
    return [size // count] * count


def tile(x: Tensor, reps: Value) -> Tensor:
    """x, that many times along each axis."""
    counts = wholes(reps)
    if len(counts) != x.ndim:
        raise ValueError(f"{len(counts)} repetitions are given for {x.ndim} axes")
    require_room(math.prod(size * count for size, count in zip(x.shape, counts)))
    return x.repeat(counts)


def pad(x: Tensor, pad: Value, mode: str = "constant", constant_val: Value = 0.0) -> Tensor:
    """`x` with pad[2 i] entries before and pad[2 i + 1] after on the last axes: a constant, x mirrored, or its edge."""
    counts = wholes(pad)
    if len(counts) % 2 or len(counts) > 2 * x.ndim or min(counts, default=0) < 0:
        raise ValueError(f"pad {counts} is not a count before and after of at most {x.ndim} axes")
    pairs = list(zip(counts[::2], counts[1::2]))
    axes = range(x.ndim - len(pairs), x.ndim)
    added = {axis: before + after for axis, (before, after) in zip(axes, pairs)}
    require_room(math.prod(size + added.get(axis, 0) for axis, size in enumerate(x.shape)))
    if mode not in ("constant", *_EDGES):
        raise ValueError(f"pad has no mode {mode!r}; it has constant, {', '.join(_EDGES)}")
    if mode == "constant":
        return F.pad(x, [count for pair in reversed(pairs) for count in pair], value=number(constant_val))
    for axis, (before, after) in zip(axes, pairs):
        x = x.index_select(axis, _EDGES[mode](torch.arange(-before, x.shape[axis] + after), x.shape[axis]))
    return x


def _mirrored(places: Tensor, size: int) -> Tensor:
    """... 2 1 0 1 2 ... n-2 n-1 n-2 ...: the edge itself is there once."""
    if len(places) and (places[0] <= -size or places[-1] > 2 * (size - 1)):
        raise ValueError(f"reflection reaches at most {size - 1} entries beyond an axis of {size}")
    return (size - 1) - ((size - 1) - places.abs()).abs()


_EDGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "reflect": _mirrored,
    "replicate": lambda places, size: places.clamp(0, size - 1),
}


def fill(shape: Value, value: Value = 0.0) -> Tensor:
    """A tensor of this shape that has one value everywhere."""
    sizes = wholes(shape)
    require_room(math.prod(sizes))
    return torch.full(sizes, value) if isinstance(value, float) else value.reshape([]).expand(sizes)


def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """start, start + step, start + 2 step, ... up to, but without, end."""
    if any(one.is_floating_point() for one in (start, end, step)):
        count = math.ceil(((end - start) / step).item())  # in float32, as the shape that the program states
    else:
        count = -((whole(start) - whole(end)) // whole(step))
    require_room(count)
    return start + torch.arange(max(count, 0), dtype=torch.int32) * step


def non_zero(x: Tensor) -> Tensor:
    """Where x is not zero: an index of every axis in each row, the last axis running fastest."""
    require_room(int(x.count_nonzero()) * x.ndim)
    return x.nonzero()


def one_hot(
    indices: Tensor, one_hot_vector_size: Value, axis: Value = -1, on_value: Value = 1, off_value: Value = 0
) -> Tensor:
    """On a new axis, on_value at the place that the index says and off_value elsewhere."""
    size = whole(one_hot_vector_size)
    require_room(max(indices.numel(), 1) * size)
    on, off = (torch.as_tensor(value) for value in (on_value, off_value))
    return torch.where(indices[..., None] == torch.arange(size), on, off).movedim(-1, whole(axis))


def band_part(x: Tensor, lower: Value = -1, upper: Value = -1) -> Tensor:
    """x[..., m, n] where m - n <= lower and n - m <= upper, else 0; a negative bound is none."""
    below, above = whole(lower), whole(upper)
    x = x if above < 0 else x.tril(above)
    return x if below < 0 else x.triu(-below)


def cumsum(x: Tensor, axis: Value = 0, exclusive: Value = False, reverse: Value = False) -> Tensor:
    """y[i] = x[0] + ... + x[i]; exclusive: without x[i]; reverse: from the other end."""
    along = whole(axis)
    x = x.flip(along) if flag(reverse) else x
    if flag(exclusive) and x.shape[along]:
        x = torch.cat([torch.zeros_like(x.narrow(along, 0, 1)), x.narrow(along, 0, x.shape[along] - 1)], along)
    y = x.cumsum(along, dtype=x.dtype)
    return y.flip(along) if flag(reverse) else y


def argsort(x: Tensor, axis: Value = -1, ascending: Value = False) -> Tensor:
    """Where the largest value is, the second largest, ... (ascending: the smallest ...); the first of equals first."""
    return x.sort(dim=whole(axis), descending=not flag(ascending), stable=True).indices


def topk(
    x: Tensor, k: Value = 1, axis: Value = -1, ascending: Value = False, sort: Value = True,
    return_indices: Value = True, output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:  # fmt: skip
    """The k largest values (ascending: smallest), in order, and where they are; a k of -1 is all.

    Where `sort` is false the program promises to take any order, so in order will do.
    """
    along, count = whole(axis), whole(k)
    values, places = x.sort(dim=along, descending=not flag(ascending), stable=True)
    count = x.shape[along] if count == -1 else count
    found = values.narrow(along, 0, count), places.narrow(along, 0, count)
    return found if flag(return_indices, True) else found[:1]


def flatten2d(x: Tensor, axis: Value = 1) -> Tensor:
    """A matrix: the axes before `axis` in one, the others in the other."""
    at = whole(axis)
    if not -x.ndim <= at <= x.ndim:
        raise ValueError(f"axis {at} is not within rank {x.ndim}")
    at += x.ndim if at < 0 else 0
    return x.reshape(math.prod(x.shape[:at]), math.prod(x.shape[at:]))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "argsort": argsort,
    "band_part": band_part,
    "concat": concat,
    "cumsum": cumsum,
    "fill": fill,
    "fill_like": lambda ref_tensor, value=0.0: fill(list(ref_tensor.shape), value),
    "flatten2d": flatten2d,
    "identity": lambda x: x,
    "non_maximum_suppression": non_maximum_suppression,
    "non_zero": non_zero,
    "one_hot": one_hot,
    "pad": pad,
    "range_1d": range_1d,
    "shape": lambda x: torch.tensor(x.shape, dtype=torch.int32),
    "split": split,
    "stack": stack,
    "tile": tile,
    "topk": topk,
}
