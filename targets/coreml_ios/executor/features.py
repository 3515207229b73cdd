"""What a caller gives and gets: multi-arrays, images and dictionaries by name, against what the package describes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.errors import ArtifactError, PocketError
from targets.coreml_ios.backend import proto
from targets.coreml_ios.executor.values import FLOATS, LARGEST, Declared, Value, rounded
from targets.coreml_ios.reader import MOST_DIMENSIONS

_ARRAYS = proto.FeatureTypes_pb2.ArrayFeatureType
KINDS = {_ARRAYS.FLOAT32: "fp32", _ARRAYS.FLOAT16: "fp16", _ARRAYS.INT32: "int32", _ARRAYS.DOUBLE: "fp64",
         _ARRAYS.INT8: "int8"}  # fmt: skip
NUMPY = {"fp32": np.float32, "fp16": np.float16, "int32": np.int32, "fp64": np.float64, "int8": np.int8}
LIMITS = {"int32": (-(2**31), 2**31 - 1), "int8": (-128, 127)}
SINGLE = {"stringType": str, "int64Type": int, "doubleType": float, "dictionaryType": dict}  # what a classifier gives
_COLORS = proto.FeatureTypes_pb2.ImageFeatureType
MODES = {_COLORS.RGB: "RGB", _COLORS.BGR: "RGB", _COLORS.GRAYSCALE: "L", _COLORS.GRAYSCALE_FLOAT16: "F"}

Sizes = Sequence[tuple[int, int]]  # least and most of each; the most is below zero where there is no bound


def taken(feature: Any, given: Any, declared: Declared) -> Tensor:
    """What a caller gives as a value of the program.

    Args:
        feature: As the package describes it.
        given: An array, a list, a number, a torch tensor, or a PIL image.
        declared: What the program says of this input.

    Raises:
        PocketError: its shape or its type is not what the package takes.
    """
    kind = feature.type.WhichOneof("Type")
    if kind == "imageType":
        return _pixels(feature, given)
    if kind != "multiArrayType":
        raise ArtifactError(f"input {feature.name} is of type {kind}; an ML program takes arrays and images")
    array = array_of(f"input {feature.name}", given)
    if declared.shape == () and array.size == 1:  # described as [1]
        array = array.reshape([])
    else:
        _require_allowed(feature, array.shape)
    return _numbers(feature, array)


def given_back(feature: Any, value: Value, *, keep_float32: bool = False) -> Any:
    """A value of the program as a caller gets it: an array, a PIL image, a dictionary, a string, a number.

    Args:
        feature: As the package describes it.
        value: Of the program.
        keep_float32: Give float32 where float16 is described.

    Raises:
        ArtifactError: it is not what the package describes.
    """
    described = feature.type.WhichOneof("Type")
    if described == "imageType":
        return _image(feature, value, keep_float32)
    if described == "multiArrayType" and isinstance(value, Tensor):
        kind = _kind(feature)
        kept = "fp32" if keep_float32 and kind == "fp16" else kind
        return np.array(rounded(value, kept).numpy(), NUMPY[kept], ndmin=1)
    single = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(single, SINGLE.get(described, ())):
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ArtifactError(f"output {feature.name} is described as {described}, and came out as {found}")
    return single


def default(feature: Any) -> NDArray[Any] | None:
    """What stands for an input that is left out, or None where it may not be.

    Raises:
        ArtifactError: its shape is none.
    """
    array = feature.type.multiArrayType
    field = array.WhichOneof("defaultOptionalValue")
    if not feature.type.isOptional or field is None:
        return None
    shape = tuple(array.shape)
    if len(shape) > MOST_DIMENSIONS or min(shape, default=0) < 0 or math.prod(shape) > LARGEST:
        raise ArtifactError(f"input {feature.name} is described as {list(shape)}, which no array is")
    return np.broadcast_to(np.asarray(getattr(array, field)), shape)


def _kind(feature: Any) -> str:
    """MIL's name of the type of an array."""
    number = feature.type.multiArrayType.dataType
    if number not in KINDS:
        raise ArtifactError(f"{feature.name} is an array of type number {number}, which is not known here")
    return KINDS[number]


def array_of(name: str, given: Any) -> NDArray[Any]:
    """What a caller gives as an array of numbers.

    Raises:
        PocketError: it is none.
    """
    try:
        if isinstance(given, Tensor):
            given = given.detach().cpu()
            given = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
        array = np.asarray(given)
    except (ValueError, TypeError) as error:  # rows of unequal length; a sparse tensor
        raise PocketError(f"{name} is given no array: {error}") from None
    if array.dtype.kind not in "fiub":
        raise PocketError(f"{name} is given {type(given).__name__}; it takes an array of numbers")
    return array


def _numbers(feature: Any, array: NDArray[Any]) -> Tensor:
    """In the type that is described: floats are rounded to it, or cut off behind the point.

    What becomes an integer must fit; infinity becomes the nearest, NaN 0.
    """
    kind = _kind(feature)
    if kind in FLOATS:
        with np.errstate(over="ignore"):  # beyond float32 is infinite
            return rounded(torch.from_numpy(np.array(array, np.float32)), kind)
    lowest, highest = LIMITS[kind]
    numbers = array[np.isfinite(array)] if array.dtype.kind == "f" else array
    if numbers.size:
        least, most = int(numbers.min()), int(numbers.max())
        if least < lowest or most > highest:
            said = f"{least} to {most}; it takes {kind}, {lowest} to {highest}"
            raise PocketError(f"input {feature.name} is given numbers of {said}")
    return rounded(torch.from_numpy(np.array(array, np.float64)), kind)


def _require_allowed(feature: Any, shape: Sequence[int]) -> None:
    """Hold the shape of an array, or height and width of an image, to what is described.

    Raises:
        PocketError: it is another.
    """
    choices = _image_sizes(feature) if feature.type.WhichOneof("Type") == "imageType" else _array_shapes(feature)
    if not choices or any(_fits(shape, sizes) for sizes in choices):
        return
    raise PocketError(
        f"input {feature.name}: {_departure(shape, choices)}; it takes {' or '.join(map(_said, choices))}"
    )


def _departure(shape: Sequence[int], choices: Sequence[Sizes]) -> str:
    """What is wrong with a shape, as Core ML says it."""
    said = f"({_said(_exact(shape))})"
    if len(choices) > 1:
        return f"MultiArray Shape {said} was not in enumerated set of allowed shapes"
    for place, (size, (least, most)) in enumerate(zip(shape, choices[0])):
        if len(shape) == len(choices[0]) and not _fits([size], [(least, most)]):
            return f"Size ({size}) of dimension ({place}) is not in allowed range ({least}..{most})"
    return f"MultiArray Shape {said} does not have {len(choices[0])} dimensions"


def _fits(shape: Sequence[int], sizes: Sizes) -> bool:
    return len(shape) == len(sizes) and all(
        least <= size and (most < 0 or size <= most) for size, (least, most) in zip(shape, sizes)
    )


def _said(sizes: Sizes) -> str:
    """`1 x 3 to 8 x 2 or more`."""
    parts = (f"{a}" if a == b else f"{a} or more" if b < 0 else f"{a} to {b}" for a, b in sizes)
    return " x ".join(parts) or "a single number"


def _array_shapes(feature: Any) -> list[Sizes]:
    """Shapes that an array may have; none where the package does not say."""
    array = feature.type.multiArrayType
    match array.WhichOneof("ShapeFlexibility"):
        case "enumeratedShapes":
            return [_exact(one.shape) for one in array.enumeratedShapes.shapes]
        case "shapeRange":
            return [[_range(one) for one in array.shapeRange.sizeRanges]]
    return [_exact(array.shape)] if array.shape else []


def _image_sizes(feature: Any) -> list[Sizes]:
    """Heights and widths that an image may have."""
    image = feature.type.imageType
    exact = [_exact((image.height, image.width))]
    match image.WhichOneof("SizeFlexibility"):
        case "enumeratedSizes":
            return exact + [_exact((one.height, one.width)) for one in image.enumeratedSizes.sizes]
        case "imageSizeRange":
            return [[_range(image.imageSizeRange.heightRange), _range(image.imageSizeRange.widthRange)]]
    return exact


def _exact(shape: Sequence[int]) -> Sizes:
    return [(int(size), int(size)) for size in shape]


def _range(described: Any) -> tuple[int, int]:
    return int(described.lowerBound), int(described.upperBound)


def _mode(feature: Any) -> str:
    """PIL's name for the pixels of an image: `RGB` (for BGR too), `L` or `F`."""
    space = feature.type.imageType.colorSpace
    if space not in MODES:
        raise ArtifactError(f"{feature.name} is an image of colour space number {space}, which is not known here")
    return MODES[space]


def _pixels(feature: Any, given: Any) -> Tensor:
    """[1, channels, height, width], of 0 to 255 where they are bytes."""
    wanted, mode = _mode(feature), getattr(given, "mode", None)
    if mode != wanted:
        found = type(given).__name__ if mode is None else f"an image of mode {mode}"
        raise PocketError(f"input {feature.name} is given {found}; it takes a PIL image of mode {wanted}")
    array = np.array(given, np.float32)
    _require_allowed(feature, array.shape[:2])
    pixels = torch.from_numpy(array).reshape(*array.shape[:2], 3 if mode == "RGB" else 1).permute(2, 0, 1)[None]
    if mode == "F":
        return rounded(pixels, "fp16")
    return pixels.flip(1) if feature.type.imageType.colorSpace == _COLORS.BGR else pixels


def _image(feature: Any, value: Value, keep_float32: bool) -> Any:
    """A PIL image of [1, channels, height, width] or [channels, height, width]: RGBA, L or F.

    Floats become bytes as in Apple's vImage: the nearest of 0 to 255. Pixels of an F are half floats.
    """
    from PIL import Image

    mode = _mode(feature)
    channels = 3 if mode == "RGB" else 1
    found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if not isinstance(value, Tensor) or list(value.shape[:-2]) not in ([channels], [1, channels]):
        raise ArtifactError(f"output {feature.name} is an image of {channels} channels, and came out as {found}")
    pixels = value.reshape(value.shape[-3:])
    if mode == "F":
        return Image.fromarray(rounded(pixels[0], "fp16", keep_float32=keep_float32).numpy())
    whole = pixels.float().nan_to_num(0).add(0.5).floor().clamp(0, 255).to(torch.uint8)
    if mode == "L":
        return Image.fromarray(whole[0].numpy())
    colours = whole.flip(0) if feature.type.imageType.colorSpace == _COLORS.BGR else whole
    return Image.fromarray(colours.permute(1, 2, 0).contiguous().numpy()).convert("RGBA")
