"""The same values in another shape or order: reshape, transpose, slices, blocks moved between axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from targets.coreml_ios.executor.values import Value, axis_of, flags, require_room, whole, wholes


def reshape(x: Tensor, shape: Value) -> Tensor:
    """`x` in another shape; -1 is what is left, and 0 is the size of x on that axis, counted from the last one.

    Counted from the first or from the last axis is the same for iOS 15 and 16, which want as many axes as x has.
    Where x has no such axis, 0 stands for 1.
    """
    sizes = wholes(shape)
    own = [1] * (len(sizes) - x.ndim) + list(x.shape)[max(x.ndim - len(sizes), 0) :]
    return x.reshape([size or same for size, same in zip(sizes, own)])


def reshape_like(x: Tensor, ref_tensors: Value, begins: Value, ends: Value, end_masks: Value) -> Tensor:
    """`x` in the shape ref[0].shape[begin[0] : end[0]] + ref[1].shape[begin[1] : end[1]] + ..."""
    parts = zip(*(_several(one) for one in (ref_tensors, begins, ends, end_masks)), strict=True)
    shapes = (ref.shape[whole(a) : None if bool(to_end) else whole(b)] for ref, a, b, to_end in parts)
    return x.reshape([size for shape in shapes for size in shape])


def _several(value: Value) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


def expand_dims(x: Tensor, axes: Value) -> Tensor:
    """`x` with new axes of size 1, at these places of the result."""
    places = wholes(axes)
    rank = x.ndim + len(places)
    if not all(-rank <= axis < rank for axis in places):
        raise ValueError(f"axes {places} are not all within a result of rank {rank}")
    shape = list(x.shape)
    for axis in sorted(axis % rank for axis in places):
        shape.insert(axis, 1)
    return x.reshape(shape)


def squeeze(x: Tensor, axes: Value = None) -> Tensor:
    """`x` without axes of size 1; of those that are named, one of another size stays."""
    return x.squeeze() if axes is None else x.squeeze(wholes(axes))


def transpose(x: Tensor, perm: Value) -> Tensor:
    """y[i] = x[j] where j[perm[k]] = i[k]."""
    return x.permute(wholes(perm))


def reverse(x: Tensor, axes: Value = None) -> Tensor:
    """`x` backwards along these axes, or along all."""
    return x.flip(list(range(x.ndim)) if axes is None else wholes(axes))


def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: Value = 0, batch_axis: Value = 0) -> Tensor:
    """The first lengths[b] entries of row b backwards, the others as they are."""
    along, batch = whole(seq_axis), whole(batch_axis)
    rows = x.movedim((batch, along), (0, 1))  # [B, L, ...]
    if lengths.shape != rows.shape[:1] or bool(((lengths < 0) | (lengths > rows.shape[1])).any()):
        raise ValueError(f"lengths {lengths.tolist()} are not {len(rows)} numbers from 0 to {rows.shape[1]}")
    place, length = torch.arange(rows.shape[1]), lengths[:, None].long()  # [L], [B, 1]
    taken = torch.where(place < length, length - 1 - place, place)  # [B, L]
    return rows[torch.arange(len(rows))[:, None], taken].movedim((0, 1), (batch, along))


def slice_by_index(
    x: Tensor, begin: Value, end: Value, stride: Value = None, begin_mask: Value = None, end_mask: Value = None,
    squeeze_mask: Value = None,
) -> Tensor:  # fmt: skip
    """x[begin : end : stride] as numpy means it; masks leave an end open, or take the one entry at begin."""
    return _part(x, *_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask))


def slice_update(
    x: Tensor, update: Tensor, begin: Value, end: Value, stride: Value = None, begin_mask: Value = None,
    end_mask: Value = None, squeeze_mask: Value = None,
) -> Tensor:  # fmt: skip
    """x, with x[begin : end : stride] = update."""
    y = x.clone()
    places, backwards, squeezed = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    shape = _part(x, places, backwards, squeezed).shape
    if update.shape != shape:
        raise ValueError(f"the update is {list(update.shape)}, the slice {list(shape)}")
    part = y[places]
    part.copy_(update.reshape(part.shape).flip(backwards))
    return y


def _part(x: Tensor, places: tuple[slice, ...], backwards: list[int], squeezed: list[int]) -> Tensor:
    return x[places].flip(backwards).squeeze(squeezed)


def _slices(
    x: Tensor, begin: Value, end: Value, stride: Value, begin_mask: Value, end_mask: Value, squeeze_mask: Value
) -> tuple[tuple[slice, ...], list[int], list[int]]:
    """Slices that all go forwards, which axes to turn round after, and which to drop then."""
    rank = x.ndim
    steps = [1] * rank if stride is None else wholes(stride)
    masks = [flags(mask, rank) for mask in (begin_mask, end_mask, squeeze_mask)]
    places = [_place(*one) for one in zip(x.shape, wholes(begin), wholes(end), steps, *masks, strict=True)]
    backwards = [axis for axis, (step, one) in enumerate(zip(steps, masks[2])) if step < 0 and not one]
    return tuple(places), backwards, [axis for axis, one in enumerate(masks[2]) if one]


def _place(size: int, begin: int, end: int, step: int, from_first: bool, to_last: bool, is_one: bool) -> slice:
    """The slice of one axis that takes these entries, in whichever order, with a positive step."""
    if is_one:
        return _one(0 if from_first else begin, size)
    taken = range(*slice(None if from_first else begin, None if to_last else end, step).indices(size))
    return slice(min(taken[0], taken[-1]), max(taken[0], taken[-1]) + 1, abs(step)) if taken else slice(0, 0)


def _one(place: int, size: int) -> slice:
    if not -size <= place < size:
        raise IndexError(f"index {place} is outside an axis of {size}")
    return slice(place % size, place % size + 1)


def slice_by_size(x: Tensor, begin: Value, size: Value) -> Tensor:
    """x[begin : begin + size]; a size of -1 takes all that is left."""
    every = list(zip(x.shape, wholes(begin), wholes(size), strict=True))
    for axis, (length, start, count) in enumerate(every):
        start += length if start < 0 else 0
        if start < 0:  # torch would count from the end again
            raise IndexError(f"index {start - length} is outside an axis of {length}")
        x = x.narrow(axis, start, length - start if count == -1 else count)
    return x


def sliding_windows(x: Tensor, axis: Value, size: Value, stride: Value = 1) -> Tensor:
    """y[..., w, k, ...] = x[..., w stride + k, ...], 0 <= k < size."""
    along = axis_of(axis, x.ndim)
    windows = x.unfold(along, whole(size), whole(stride))
    require_room(windows.numel())
    return windows.movedim(-1, along + 1)


def depth_to_space(x: Tensor, block_size: Value) -> Tensor:
    """y[n, c, h b + i, w b + j] = x[n, (i b + j) C + c, h, w]."""
    n, c, h, w = x.shape
    b = whole(block_size)
    blocks = x.reshape(n, b, b, c // b**2, h, w)  # [n, i, j, c, h, w]
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


def space_to_depth(x: Tensor, block_size: Value) -> Tensor:
    """y[n, (i b + j) C + c, h, w] = x[n, c, h b + i, w b + j]."""
    n, c, h, w = x.shape
    b = whole(block_size)
    blocks = x.reshape(n, c, h // b, b, w // b, b)  # [n, c, h, i, w, j]
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, b**2 * c, h // b, w // b)


def space_to_batch(x: Tensor, block_shape: Value, paddings: Value) -> Tensor:
    """y[(i B_w + j) N + n, c, h, w] = p[n, c, h B_h + i, w B_w + j], where p is x with zeros around."""
    (bh, bw), (top, bottom, left, right) = wholes(block_shape), wholes(paddings)
    _require_positive(top, bottom, left, right)
    n, c, h, w = x.shape[0], x.shape[1], x.shape[2] + top + bottom, x.shape[3] + left + right
    require_room(n * c * h * w)
    blocks = F.pad(x, (left, right, top, bottom)).reshape(n, c, h // bh, bh, w // bw, bw)
    return blocks.permute(3, 5, 0, 1, 2, 4).reshape(bh * bw * n, c, h // bh, w // bw)


def batch_to_space(x: Tensor, block_shape: Value, crops: Value) -> Tensor:
    """y[n, c, h B_h + i - top, w B_w + j - left] = x[(i B_w + j) N + n, c, h, w]."""
    (bh, bw), (top, bottom, left, right) = wholes(block_shape), wholes(crops)
    _require_positive(top, bottom, left, right)
    n, c, h, w = x.shape
    blocks = x.reshape(bh, bw, n // (bh * bw), c, h, w)  # [i, j, n, c, h, w]
    whole_space = blocks.permute(2, 3, 4, 0, 5, 1).reshape(n // (bh * bw), c, h * bh, w * bw)
    return whole_space.narrow(2, top, h * bh - top - bottom).narrow(3, left, w * bw - left - right)


def _require_positive(*counts: int) -> None:
    if min(counts) < 0:
        raise ValueError(f"{list(counts)} are not all zero or more")


OPERATIONS: dict[str, Callable[..., Any]] = {
    "reshape": reshape,
    "reshape_like": reshape_like,
    "expand_dims": expand_dims,
    "squeeze": squeeze,
    "transpose": transpose,
    "reverse": reverse,
    "reverse_sequence": reverse_sequence,
    "slice_by_index": slice_by_index,
    "slice_update": slice_update,
    "slice_by_size": slice_by_size,
    "sliding_windows": sliding_windows,
    "depth_to_space": depth_to_space,
    "space_to_depth": space_to_depth,
    "space_to_batch": space_to_batch,
    "batch_to_space": batch_to_space,
    "pixel_shuffle": lambda x, upscale_factor: F.pixel_shuffle(x, whole(upscale_factor)),
    "pixel_unshuffle": lambda x, downscale_factor: F.pixel_unshuffle(x, whole(downscale_factor)),
}
