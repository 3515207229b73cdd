"""Images of another size: the last dimensions are sampled at places of a grid, one dimension after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from targets.coreml_ios.executor.values import Value, flag, require_room, whole, wholes


def grid(sampling_mode: str, size: int | Tensor, count: int) -> Tensor:
    """Where, in 0 ... size - 1, the values i = 0 ... count - 1 of a resized dimension lie.

    - STRICT_ALIGN_CORNERS: i (size - 1) / (count - 1), from the first value to the last; the first where count is 1
    - ALIGN_CORNERS: the same; the middle where count is 1
    - DEFAULT: i size / count
    - OFFSET_CORNERS: (i + 0.5) max(1, size - 1) / count, the centres of RoI Align's cells
    - UNALIGN_CORNERS: (i + 0.5) size / count - 0.5, the centres of pixels that have an area

    Args:
        sampling_mode: One of these.
        size: Of the dimension before; or several of them, [n, 1] in float64.
        count: Its size afterwards.

    Returns:
        [count], or [n, count]; float64, so that a place that should be whole is whole.

    Raises:
        ValueError: the mode is none of these.
    """
    size = torch.as_tensor(size, dtype=torch.float64)
    require_room(size.numel() * count)
    i = torch.arange(count, dtype=torch.float64)
    match sampling_mode:
        case "STRICT_ALIGN_CORNERS":
            places = i * (size - 1) / max(count - 1, 1)
        case "ALIGN_CORNERS":
            places = i * (size - 1) / (count - 1) if count > 1 else (i + 0.5) * (size - 1)
        case "DEFAULT":
            places = i * size / count
        case "OFFSET_CORNERS":
            places = (i + 0.5) * (size - 1).clamp(min=1) / count
        case "UNALIGN_CORNERS":
            places = (i + 0.5) * size / count - 0.5
        case _:
            raise ValueError(f"sampling_mode {sampling_mode!r}; it is STRICT_ALIGN_CORNERS, ALIGN_CORNERS, DEFAULT, "
                             "OFFSET_CORNERS or UNALIGN_CORNERS")  # fmt: skip
    return torch.minimum(places.clamp(min=0), size - 1)


def between(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """(1 - weight) first + weight second; equal values stay as they are, also infinite ones."""
    return torch.where(first == second, first, (1 - weight) * first + weight * second)


def _picked(x: Tensor, dimension: int, places: Tensor) -> Tensor:
    """The values at whole places of a dimension."""
    require_room(x.numel() // max(x.shape[dimension], 1) * len(places))
    return x.index_select(dimension, places.long())


def _linear(x: Tensor, dimension: int, places: Tensor) -> Tensor:
    """The values at places of a dimension, between their two neighbours where they are not whole."""
    first, second = _picked(x, dimension, places.floor()), _picked(x, dimension, places.ceil())
    weight = (places - places.floor()).to(x.dtype if x.is_floating_point() else torch.float64)
    return between(first, second, weight.reshape([-1] + [1] * (-1 - dimension)))


def _bilinear(x: Tensor, sizes: Sequence[int], sampling_mode: str) -> Tensor:
    """The last dimensions of other sizes, linear between neighbours."""
    for dimension, count in zip(range(-len(sizes), 0), sizes):
        x = _linear(x, dimension, grid(sampling_mode, x.shape[dimension], count))
    return x


def _nearest(x: Tensor, sizes: Sequence[int], sampling_mode: str) -> Tensor:
    """The last dimensions of other sizes: the value nearest to each place, the later one of two that are equally near.

    With DEFAULT a value of the result is an area whose centre counts, as with UNALIGN_CORNERS: coremltools turns
    TensorFlow's half_pixel_centers into it, and its tests expect [a, b] to become [a, b, b].
    """
    mode = "UNALIGN_CORNERS" if sampling_mode == "DEFAULT" else sampling_mode
    for dimension, count in zip(range(-len(sizes), 0), sizes):
        x = _picked(x, dimension, (grid(mode, x.shape[dimension], count) + 0.5).floor())
    return x


def _scaled(size: int, factor: Tensor | None) -> int:
    """floor(size factor), in float32 as coremltools counts it."""
    if factor is None:
        return size
    return int((factor * size).floor()) if factor.is_floating_point() else int(factor) * size


def upsample_nearest_neighbor(x: Tensor, scale_factor_height: Value = None, scale_factor_width: Value = None) -> Tensor:
    """y[i] = x[floor(i size / count)], where count = floor(size factor): the factor is that of the sizes."""
    for dimension, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        size = x.shape[dimension]
        x = _picked(x, dimension, grid("DEFAULT", size, _scaled(size, factor)).floor())
    return x


def upsample_bilinear(
    x: Tensor, scale_factor_height: Value = None, scale_factor_width: Value = None, align_corners: Value = None,
    half_pixel_centers: Value = None,
) -> Tensor:  # fmt: skip
    """Linear between neighbours; the factor is that of the sizes. Half a pixel is where corners are not aligned.

    Raises:
        ValueError: corners are to be aligned, and half a pixel to be added.
    """
    aligned = flag(align_corners, True)
    half = flag(half_pixel_centers, not aligned)
    if aligned and half:
        raise ValueError("align_corners and half_pixel_centers are both true; one of them may be")
    mode = "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS" if half else "DEFAULT"
    sizes = [_scaled(x.shape[-2], scale_factor_height), _scaled(x.shape[-1], scale_factor_width)]
    return _bilinear(x, sizes, mode)


def resize_bilinear(
    x: Tensor, target_size_height: Value = None, target_size_width: Value = None, sampling_mode: str = "DEFAULT"
) -> Tensor:
    """Linear between neighbours, at the places of `grid`."""
    sizes = [1 if size is None else whole(size) for size in (target_size_height, target_size_width)]
    return _bilinear(x, sizes, sampling_mode)


def resize(
    x: Tensor, shape: Tensor, resized_dims: Value, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT"
) -> Tensor:
    """The last `resized_dims` dimensions as the last of `shape` say; one that is 0 stays as it is.

    Integers between neighbours are cut off behind the point.

    Raises:
        ValueError: more dimensions than there are, or another mode.
    """
    count, sizes = whole(resized_dims), wholes(shape)
    if not 0 <= count <= min(len(sizes), x.ndim):
        raise ValueError(f"resized_dims {count}; shape has {len(sizes)} sizes and x has rank {x.ndim}")
    ways = {"LINEAR": _bilinear, "NEAREST_NEIGHBOR": _nearest}
    if interpolation_mode not in ways:
        raise ValueError(f"interpolation_mode {interpolation_mode!r}; it is LINEAR or NEAREST_NEIGHBOR")
    own = x.shape[x.ndim - count :]
    asked = [size or kept for size, kept in zip(sizes[len(sizes) - count :], own, strict=True)]
    return ways[interpolation_mode](x, asked, sampling_mode)


def crop(x: Tensor, crop_height: Value, crop_width: Value) -> Tensor:
    """The input without values at the ends of its last two dimensions.

    Raises:
        ValueError: less than 0 or more than there are.
    """
    for dimension, (before, after) in ((-2, wholes(crop_height)), (-1, wholes(crop_width))):
        left = x.shape[dimension] - before - after
        if min(before, after, left) < 0:
            raise ValueError(f"crop of {before} and {after} from {x.shape[dimension]}")
        x = x.narrow(dimension, before, left)
    return x


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "crop": crop,
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": lambda x, target_size_height, target_size_width: _nearest(
        x, [whole(target_size_height), whole(target_size_width)], "DEFAULT"
    ),
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
