"""Pictures in files to pixels, as a multimodal model was trained to see them.

Nothing in a file is trusted: its size, its format and the size of the picture are checked before it is unpacked.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exporter.errors import BackendMissingError, CheckpointError, RecipeError
from exporter.model import Model, Vision

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG")
LARGEST_FILE = 64 * 2**20  # bytes
LARGEST_SIDE = 2**14  # pixels
LARGEST_SEEN = 2**11  # pixels, of a model's own side
LARGEST_AREA = 2**25  # pixels: 96 MiB unpacked
MOST_OBLONG = 16  # times as many pixels one way as the other; a model sees the middle square
CONFIGS = ("preprocessor_config.json", "processor_config.json")
BYTE = 1 / 255
BICUBIC = 3


@dataclass(frozen=True)
class Scaling:
    """How pixels become numbers: (byte / 255 - mean) / std, a channel each.

    Args:
        mean, std: [channels].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


def vision_of(model: Model) -> Vision:
    """What looks at a model's pictures.

    Raises:
        RecipeError: nothing does.
    """
    if model.architecture.vision is None:
        raise RecipeError(f"a {model.architecture.family} model sees no pictures; give text, or a multimodal model")
    return model.architecture.vision


def scaling_of(model: Model) -> Scaling:
    """How a model's own preprocessor_config.json scales pixels.

    Raises:
        CheckpointError: there is none, or it does what is not done here.
    """
    vision, said = vision_of(model), _preprocessor(model.files)
    crop = {"height": vision.size, "width": vision.size}
    wanted = {
        "size": ({"shortest_edge": vision.size}, vision.size), "crop_size": (crop, vision.size), "resample": (BICUBIC,),
        "do_resize": (True,), "do_center_crop": (True,), "do_rescale": (True,), "do_normalize": (True,),
    }  # fmt: skip
    for name, allowed in wanted.items():
        if said.get(name, allowed[0]) not in allowed:
            raise CheckpointError(f"{CONFIGS[0]}: {name} is {said[name]!r}; only {allowed[0]!r} can be done here")
    factor = _numbers(said, "rescale_factor", [BYTE])[0]
    if abs(factor - BYTE) > 1e-9:
        raise CheckpointError(f"{CONFIGS[0]}: rescale_factor is {factor!r}; only 1/255 can be done here")
    mean, std = (_numbers(said, name) for name in ("image_mean", "image_std"))
    if not len(mean) == len(std) == vision.channels or min(std) <= 0:
        raise CheckpointError(f"{CONFIGS[0]}: image_mean and image_std are not {vision.channels} numbers, std over 0")
    return Scaling(mean, std)


def pixels_of(path: Path, vision: Vision, scaling: Scaling) -> Tensor:
    """A picture as a model sees it: its shorter side scaled to the model's, its middle cut out, its bytes scaled.

    Returns:
        [3, size, size], float32.

    Raises:
        CheckpointError: no PNG or JPEG, damaged, or too large.
        BackendMissingError: Pillow is not installed.

    Source: CLIP's preprocessing, arXiv:2103.00020, as the image processor of transformers does it.
    """
    if vision.channels != 3 or vision.size > LARGEST_SEEN:
        raise CheckpointError(
            f"the model sees {vision.channels} channels and {vision.size} pixels a side; pictures in files can be "
            f"shown to one that sees 3 channels and at most {LARGEST_SEEN} pixels"
        )
    image = _opened(path)
    size = vision.size
    width, height = (max(size, size * side // min(image.size)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (scaling.mean, scaling.std))
    return (values.float() * BYTE - mean) / std


def _opened(path: Path) -> Image:
    """A picture in RGB, its size checked before it is unpacked; what shows through is white, as in transformers."""
    try:
        import PIL.Image
    except ModuleNotFoundError as error:
        raise BackendMissingError("reading pictures", error.name, "pictures") from None
    if path.stat().st_size > LARGEST_FILE:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {LARGEST_FILE} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path, formats=FORMATS) as image:
                _require_size(path, *image.size)
                if not image.has_transparency_data:
                    return image.convert("RGB")
                white = PIL.Image.new("RGBA", image.size, "white")
                return PIL.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except CheckpointError:
        raise
    except Exception as error:  # the library raises a dozen kinds for damaged files
        raise CheckpointError(f"{path} is no picture that can be read ({', '.join(FORMATS)}): {error}") from None


def _require_size(path: Path, width: int, height: int) -> None:
    short, long = sorted((width, height))
    if short < 1 or long > LARGEST_SIDE or short * long > LARGEST_AREA or long > MOST_OBLONG * short:
        raise CheckpointError(
            f"{path} is a picture of {width} x {height} pixels; at most {LARGEST_SIDE} a side and {LARGEST_AREA:,} in "
            f"all are read, and at most {MOST_OBLONG} times as many one way as the other"
        )


def _preprocessor(files: Mapping[str, bytes]) -> Mapping[str, Any]:
    """What a model's files say of pixels: a config of their own, or a part of the processor's."""
    name = next((name for name in CONFIGS if name in files), None)
    if name is None:
        raise CheckpointError(f"the model has no {CONFIGS[0]}, which scales pixels; put it beside config.json")
    try:
        said = json.loads(files[name])
        said = said if name == CONFIGS[0] else said["image_processor"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{name} cannot be read: {error!r}") from None
    if not isinstance(said, dict):
        raise CheckpointError(f"{name} says nothing of pixels")
    return said


def _numbers(said: Mapping[str, Any], name: str, default: Sequence[float] = ()) -> tuple[float, ...]:
    value = said.get(name, list(default))
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(number, int | float) and abs(number) < 1e6 for number in found) or not found:
        raise CheckpointError(f"{CONFIGS[0]}: {name} is {str(value)[:60]!r}; it must be numbers")
    return tuple(float(number) for number in found)
