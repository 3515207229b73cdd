"""Values read from, and written to, places that are computed.

What an index outside an axis means depends on the version. Up to iOS 16 a negative index counts from the end, and any
other outside is an error. From iOS 17 on a program carries `validate_indices` and a negative index is outside; where
nothing is validated Apple leaves open what happens. Here a read outside is an error always, and then a write outside
is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from targets.coreml_ios.executor.values import Value, axis_of, flag, require_room, whole


def _places(indices: Tensor, sizes: Sequence[int], validate: Value) -> tuple[Tensor, Tensor]:
    """Where indices [..., d] lead in axes of these sizes taken as one, and which of them are outside."""
    places = torch.zeros(indices.shape[:-1], dtype=torch.long)
    outside = torch.zeros(indices.shape[:-1], dtype=torch.bool)
    for index, size in zip(indices.long().unbind(-1), sizes, strict=True):
        index = torch.where(index < 0, index + size, index) if validate is None else index
        outside |= (index < 0) | (index >= size)
        places = places * size + index
    return places, outside


def _inside(indices: Tensor, sizes: Sequence[int], validate: Value) -> Tensor:
    """Where indices [..., d] lead in axes of these sizes taken as one.

    Raises:
        IndexError: one leads outside.
    """
    places, outside = _places(indices, sizes, validate)
    if bool(outside.any()):
        raise IndexError(f"index {indices[outside][0].tolist()} is outside axes of {list(sizes)}")
    return places


def gather(
    x: Tensor, indices: Tensor, axis: Value = 0, batch_dims: Value = 0, validate_indices: Value = None
) -> Tensor:
    """y[b, p, i, q] = x[b, p, indices[b, i], q]: b are the batch axes, p those before the axis."""
    along, batch = axis_of(axis, x.ndim), whole(batch_dims)
    _require_batch(x, indices, batch, min(along, indices.ndim))
    shape = [*x.shape[:along], *indices.shape[batch:], *x.shape[along + 1 :]]
    require_room(math.prod(shape))
    places = _inside(indices[..., None], [x.shape[along]], validate_indices)
    if not batch:
        return x.index_select(along, places.reshape(-1)).reshape(shape)
    before = list(range(batch, along))
    taken = _rows(x.movedim(along, batch), places, batch, 1)  # [b, i, p, q]
    return taken.movedim([axis + indices.ndim - batch for axis in before], before)


def gather_nd(x: Tensor, indices: Tensor, batch_dims: Value = 0, validate_indices: Value = None) -> Tensor:
    """y[b, i, q] = x[b, indices[b, i, 0], indices[b, i, 1], ..., q]."""
    batch, depth = whole(batch_dims), indices.shape[-1]
    _require_batch(x, indices, batch, min(x.ndim - depth, indices.ndim - 1))
    require_room(math.prod([*indices.shape[:-1], *x.shape[batch + depth :]]))
    return _rows(x, _inside(indices, x.shape[batch : batch + depth], validate_indices), batch, depth)


def _require_batch(x: Tensor, indices: Tensor, batch: int, most: int) -> None:
    if not 0 <= batch <= most or x.shape[:batch] != indices.shape[:batch]:
        raise ValueError(f"x {list(x.shape)} and indices {list(indices.shape)} have no {batch} batch axes in common")


def _rows(x: Tensor, places: Tensor, batch: int, depth: int) -> Tensor:
    """y[b, i, q] = x[b, places[b, i], q], where the `depth` axes of x after the batch axes count as one."""
    rest = x.shape[batch + depth :]
    count, size = math.prod(x.shape[:batch]), math.prod(x.shape[batch : batch + depth])
    rows = x.reshape(count, size, *rest)
    flat = places.reshape(count, math.prod(places.shape[batch:]))
    return rows[torch.arange(count)[:, None], flat].reshape(*places.shape, *rest)


def gather_along_axis(x: Tensor, indices: Tensor, axis: Value = 0, validate_indices: Value = None) -> Tensor:
    """y[p, i, q] = x[p, indices[p, i, q], q]."""
    along = axis_of(axis, x.ndim)
    _require_alike(x, indices, along)
    return x.gather(along, _inside(indices[..., None], [x.shape[along]], validate_indices))


def _require_alike(x: Tensor, indices: Tensor, along: int) -> None:
    """Refuse what torch would take: fewer indices than there are rows."""
    if x.ndim != indices.ndim or any(
        a != b for axis, (a, b) in enumerate(zip(x.shape, indices.shape)) if axis != along
    ):
        raise ValueError(f"{list(x.shape)} and indices {list(indices.shape)} differ on another axis than {along}")


def scatter(
    data: Tensor, indices: Tensor, updates: Tensor, axis: Value = 0, mode: str = "add", validate_indices: Value = None
) -> Tensor:
    """`data`, then y[p, indices[i], q] is joined with updates[p, i, q], one i after another."""
    along = axis_of(axis, data.ndim)
    shape = [*data.shape[:along], *indices.shape, *data.shape[along + 1 :]]
    _require_updates(updates, shape)
    flat = updates.reshape(*shape[:along], indices.numel(), *data.shape[along + 1 :])
    rows = data.movedim(along, 0)
    return _written(rows, indices.reshape(-1, 1), [len(rows)], flat.movedim(along, 0), mode, validate_indices).movedim(
        0, along
    )


def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: Value = None
) -> Tensor:
    """`data`, then y[indices[i, 0], indices[i, 1], ..., q] is joined with updates[i, q], one i after another."""
    depth = indices.shape[-1]
    sizes, rest = data.shape[:depth], data.shape[depth:]
    _require_updates(updates, [*indices.shape[:-1], *rest])
    count = math.prod(indices.shape[:-1])
    rows, flat = data.reshape(math.prod(sizes), *rest), updates.reshape(count, *rest)
    return _written(rows, indices.reshape(count, depth), sizes, flat, mode, validate_indices).reshape(data.shape)


def scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: Value = 0, mode: str = "add", validate_indices: Value = None
) -> Tensor:
    """`data`, then y[p, indices[p, i, q], q] is joined with updates[p, i, q], one i after another."""
    along = axis_of(axis, data.ndim)
    _require_alike(data, indices, along)
    _require_updates(updates, list(indices.shape))
    require_room(indices.numel() * indices.ndim)
    grid = torch.meshgrid(*(torch.arange(size) for size in indices.shape), indexing="ij")
    every = torch.stack([indices.long() if axis == along else place for axis, place in enumerate(grid)], -1)
    return scatter_nd(data, every, updates, mode, validate_indices)


def _require_updates(updates: Tensor, shape: list[int]) -> None:
    if list(updates.shape) != shape:
        raise ValueError(f"the updates are {list(updates.shape)}; they should be {shape}")


def _written(
    rows: Tensor, indices: Tensor, sizes: Sequence[int], updates: Tensor, mode: str, validate: Value
) -> Tensor:
    """`rows` [n, ...], then rows[indices[i]] joined with updates[i] [...], one i after another."""
    if flag(validate, True):
        places = _inside(indices, sizes, validate)
    else:
        places, outside = _places(indices, sizes, validate)
        places, updates = places[~outside], updates[~outside]
    if mode not in _MODES:
        raise ValueError(f"scatter has no mode {mode!r}; it has {', '.join(_MODES)}")
    y = rows.clone(memory_format=torch.contiguous_format).numpy()
    with np.errstate(all="ignore"):
        _MODES[mode](y, places.numpy(), updates.numpy())
    return torch.from_numpy(y)


def _update(y: NDArray[Any], places: NDArray[Any], updates: NDArray[Any]) -> None:
    y[places] = updates  # of several for one place the last one stays


def _divide(y: NDArray[Any], places: NDArray[Any], updates: NDArray[Any]) -> None:
    if y.dtype.kind == "f":
        return np.divide.at(y, places, updates)
    if not updates.all():
        raise ZeroDivisionError("an integer is divided by zero")
    exact = y.astype(np.float64)
    np.divide.at(exact, places, updates)
    y[...] = np.trunc(exact)


_MODES: dict[str, Callable[..., None]] = {
    "update": _update,
    "add": np.add.at,
    "sub": np.subtract.at,
    "mul": np.multiply.at,
    "div": _divide,
    "max": np.maximum.at,
    "min": np.minimum.at,
}

OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
}
