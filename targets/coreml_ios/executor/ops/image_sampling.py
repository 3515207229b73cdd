"""Images read at coordinates that lie between pixels and beyond the edge."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from targets.coreml_ios.executor.ops.image_resizing import between, grid
from targets.coreml_ios.executor.values import Value, flag, number, require_room, whole

_BOXES = ("CORNERS_HEIGHT_FIRST", "CORNERS_WIDTH_FIRST", "CENTER_SIZE_HEIGHT_FIRST", "CENTER_SIZE_WIDTH_FIRST")
_WORK = 24  # values that are held for each place while it is read: coordinates, neighbours, weights


class _Image:
    """Pixels of a batch, and a value for those outside.

    Args:
        x: [batch, channels, height, width].
        images: [n], which of the batch each result reads.
        outside: What pixels outside hold.
    """

    def __init__(self, x: Tensor, images: Tensor, outside: float) -> None:
        if images.numel() and not 0 <= int(images.min()) <= int(images.max()) < len(x):
            raise ValueError(f"images {int(images.min())} to {int(images.max())} of a batch of {len(x)}")
        self._x, self._images, self._outside = x, images.reshape(-1, 1, 1), outside

    def __call__(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The pixels at whole rows and columns, both [n, height, width]: [n, channels, height, width]."""
        height, width = self._x.shape[2:]
        inside = (rows >= 0) & (rows <= height - 1) & (columns >= 0) & (columns <= width - 1)
        rows, columns = (at.nan_to_num(0).clamp(0, size - 1).long() for at, size in ((rows, height), (columns, width)))
        found = self._x[self._images, :, rows, columns].permute(0, 3, 1, 2)
        return torch.where(inside[:, None], found, self._outside)

    def bilinear(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Between the four pixels around, by how near each is."""
        top, bottom, left, right = rows.floor(), rows.ceil(), columns.floor(), columns.ceil()
        across, down = (columns - left)[:, None].float(), (rows - top)[:, None].float()
        above = between(self(top, left), self(top, right), across)
        below = between(self(bottom, left), self(bottom, right), across)
        return between(above, below, down)

    def nearest(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The nearest pixel; the even one of two that are equally near."""
        return self(rows.round(), columns.round())


def _mirrored(at: Tensor, low: float, high: float) -> Tensor:
    """Coordinates that turn round at low and at high."""
    span = high - low
    if span <= 0:
        return torch.full_like(at, low)
    away = (at - low).abs() % (2 * span)
    return low + torch.minimum(away, 2 * span - away)


def _within(at: Tensor, size: int, padding_mode: str) -> Tensor:
    """Coordinates of a dimension, where those outside read what `padding_mode` says.

    - constant: outside, which has a value of its own
    - border: the pixel at the edge
    - reflection: mirrored at the centre of the pixel at the edge, which is not repeated
    - symmetric: mirrored at the edge itself, so that the pixel there is repeated
    """
    match padding_mode.lower():
        case "constant":
            return at
        case "border":
            return at.clamp(0, size - 1)
        case "reflection":
            return _mirrored(at, 0, size - 1)
        case "symmetric":
            return _mirrored(at, -0.5, size - 0.5).clamp(0, size - 1)
    raise ValueError(f"padding_mode {padding_mode!r}; it is constant, border, reflection or symmetric")


def _pixels(at: Tensor, size: int, coordinates_mode: str, align_corners: bool) -> Tensor:
    """Coordinates as pixels: 0 is the centre of the first, size - 1 that of the last.

    Where the ends of a normalized range are the centres of the pixels at the edge, corners are aligned; otherwise these
    are the outer edges.
    """
    match coordinates_mode.lower():
        case "unnormalized":
            return at
        case "normalized_minus_one_to_one":
            return (at + 1) / 2 * (size - 1) if align_corners else ((at + 1) * size - 1) / 2
        case "normalized_zero_to_one":
            return at * (size - 1) if align_corners else at * size - 0.5
    raise ValueError(f"coordinates_mode {coordinates_mode!r}; it is unnormalized, normalized_minus_one_to_one or "
                     "normalized_zero_to_one")  # fmt: skip


def resample(
    x: Tensor, coordinates: Tensor, sampling_mode: str, padding_mode: str, padding_value: Value,
    coordinates_mode: str, align_corners: Value,
) -> Tensor:  # fmt: skip
    """y[b, c, i, j] = x[b, c] at coordinates[b, i, j] = (column, row).

    Raises:
        ValueError: a mode that there is not, or shapes that do not fit each other.
    """
    ways = {"bilinear": _Image.bilinear, "nearest": _Image.nearest}
    if sampling_mode.lower() not in ways:
        raise ValueError(f"sampling_mode {sampling_mode!r}; it is bilinear or nearest")
    if coordinates.ndim != 4 or x.ndim != 4 or len(coordinates) != len(x) or coordinates.shape[-1] != 2:
        raise ValueError(f"coordinates of shape {list(coordinates.shape)} for images of shape {list(x.shape)}")
    require_room(coordinates[..., 0].numel() * (x.shape[1] + _WORK))
    aligned = flag(align_corners)
    columns, rows = (
        _within(_pixels(at, size, coordinates_mode, aligned), size, padding_mode)
        for at, size in zip(coordinates.float().unbind(-1), (x.shape[3], x.shape[2]))
    )
    image = _Image(x, torch.arange(len(x)), number(padding_value))
    return ways[sampling_mode.lower()](image, rows, columns)


def _spread(count: int, align_corners: bool) -> Tensor:
    """`count` coordinates of -1 to 1: from end to end, or the centres of as many cells; 0 where there is one."""
    require_room(count)
    if align_corners and count > 1:
        return torch.linspace(-1, 1, count)
    return (2 * torch.arange(count) + 1) / count - 1


def affine(
    x: Tensor, transform_matrix: Tensor, output_height: Value, output_width: Value, sampling_mode: str,
    padding_mode: str, padding_value: Value, coordinates_mode: str, align_corners: Value,
) -> Tensor:  # fmt: skip
    """y[v, u] = x at (column, row) = (a0 u + a1 v + a2, b0 u + b1 v + b2), u and v from -1 to 1.

    transform_matrix is [batch or 1, 6]: a0, a1, a2, b0, b1, b2.

    Raises:
        ValueError: coordinates of another range, or shapes that do not fit each other.
    """
    if coordinates_mode.lower() != "normalized_minus_one_to_one":
        raise ValueError(f"coordinates_mode {coordinates_mode!r}; it is normalized_minus_one_to_one")
    height, width, aligned = whole(output_height), whole(output_width), flag(align_corners)
    require_room(x.shape[0] * height * width * _WORK)
    v, u = torch.meshgrid(_spread(height, aligned), _spread(width, aligned), indexing="ij")
    at = torch.stack([u, v, torch.ones_like(u)], -1)  # [height, width, 3]
    matrix = transform_matrix.reshape(-1, 1, 2, 3)
    coordinates = at @ matrix.transpose(-1, -2)  # [batch or 1, height, width, 2]
    coordinates = coordinates.expand(len(x), -1, -1, -1)
    return resample(x, coordinates, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners)


def crop_resize(
    x: Tensor, roi: Tensor | None = None, boxes: Tensor | None = None, box_indices: Tensor | None = None,
    target_height: Value = None, target_width: Value = None, normalized_coordinates: Value = None,
    spatial_scale: Value = None, box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST", sampling_mode: str = "DEFAULT",
    pad_value: Value = None,
) -> Tensor:  # fmt: skip
    """Boxes of images, resized at the places of `grid`; a place outside of the image holds `pad_value`.

    Of iOS 15 and 16: roi [n, 1, 4, 1, 1] of every image, giving [n, batch, channels, height, width]; or [n, 1, 5, 1, 1]
    with the image in front, giving [n, 1, channels, height, width]. Of iOS 17: boxes [n, 4] of the images box_indices
    [n], or 0, 1, 2 ..., giving [n, channels, height, width].

    Raises:
        ValueError: a mode that there is not, or shapes that do not fit.
    """
    cells, images, leading = _cells(x, roi, boxes, box_indices)
    sizes = [1 if size is None else whole(size) for size in (target_height, target_width)]
    require_room(len(cells) * sizes[0] * sizes[1] * (x.shape[1] + _WORK))
    starts, ends = _corners(cells, box_coordinate_mode)
    scales = [number(spatial_scale, 1.0) * (size - 1 if flag(normalized_coordinates) else 1) for size in x.shape[2:]]
    rows, columns = (
        _along(starts[:, axis : axis + 1] * scale, ends[:, axis : axis + 1] * scale, size, count, sampling_mode)
        for axis, (scale, size, count) in enumerate(zip(scales, x.shape[2:], sizes))
    )
    image = _Image(x, images, number(pad_value))
    rows, columns = rows[:, :, None].expand(-1, -1, sizes[1]), columns[:, None, :].expand(-1, sizes[0], -1)
    inside = (rows >= 0) & (rows <= x.shape[2] - 1) & (columns >= 0) & (columns <= x.shape[3] - 1)
    y = torch.where(inside[:, None], image.bilinear(rows, columns), number(pad_value))
    return y.reshape([*leading, *y.shape[1:]])


def _cells(
    x: Tensor, roi: Tensor | None, boxes: Tensor | None, box_indices: Tensor | None
) -> tuple[Tensor, Tensor, list[int]]:
    """Boxes [n, 4] in float64, the image of each, and the first sizes of the result."""
    if boxes is not None and roi is None:
        images = torch.arange(len(boxes)) if box_indices is None else box_indices
        if boxes.ndim != 2 or boxes.shape[1] != 4 or images.shape != boxes.shape[:1]:
            raise ValueError(f"boxes of shape {list(boxes.shape)} and box_indices of shape {list(images.shape)}")
        return boxes.double(), images.long(), [len(boxes)]
    if roi is None or boxes is not None or roi.shape[1:] not in ((1, 4, 1, 1), (1, 5, 1, 1)):
        raise ValueError("either roi of shape [n, 1, 4 or 5, 1, 1] is given, or boxes of shape [n, 4]")
    cells = roi[:, 0, :, 0, 0].double()
    if cells.shape[1] == 5:
        return cells[:, 1:], cells[:, 0].long(), [len(cells), 1]
    require_room(len(cells) * len(x) * _WORK)
    images = torch.arange(len(x)).repeat(len(cells))
    return cells.repeat_interleave(len(x), 0), images, [len(cells), len(x)]


def _corners(cells: Tensor, box_coordinate_mode: str) -> tuple[Tensor, Tensor]:
    """Start and end of boxes, both [n, 2]: height, width."""
    if box_coordinate_mode not in _BOXES:
        raise ValueError(f"box_coordinate_mode {box_coordinate_mode!r}; it is {', '.join(_BOXES)}")
    first, second = cells[:, :2], cells[:, 2:]
    if box_coordinate_mode.startswith("CENTER"):
        first, second = first - second / 2, first + second / 2
    return (first, second) if "HEIGHT" in box_coordinate_mode else (first.flip(1), second.flip(1))


def _along(start: Tensor, end: Tensor, size: int, count: int, sampling_mode: str) -> Tensor:
    """Where the `count` values of boxes lie along a dimension of an image, from start to end; [n, count].

    A box has the values from its start to its end, both included. With UNALIGN_CORNERS one that leaves the image is
    mirrored into it: the only statement of this is coremltools' test of a box from 2 to 1 in normalized coordinates.
    """
    places = start + (end - start).sign() * grid(sampling_mode, (end - start).abs() + 1, count)
    return _mirrored(places, 0, size - 1) if sampling_mode == "UNALIGN_CORNERS" else places


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "affine": affine,
    "crop_resize": crop_resize,
    "resample": resample,
}
