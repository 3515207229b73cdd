"""Convolutions over one, two or three spatial dimensions, and how far a window reaches over the edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional

from targets.coreml_ios.executor.values import Value, require_room, whole, wholes

_FORWARD = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
_BACKWARD = {3: functional.conv_transpose1d, 4: functional.conv_transpose2d, 5: functional.conv_transpose3d}


def edges(
    pad_type: str, pad: Value, sizes: Sequence[int], reaches: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """How many values are added before and after each spatial dimension.

    `same` adds what makes ceil(size / stride) windows fit, half before and half after; where it is odd, the one more
    comes after, with `same_lower` before.

    Args:
        pad_type: `valid`, `same`, `same_lower` or `custom`.
        pad: Of `custom`: before and after the first dimension, before and after the second, ... None is none.
        sizes: Of the spatial dimensions.
        reaches: Values from a window's first to its last, dilation included.
        strides: Steps between windows.

    Raises:
        ValueError: `pad_type` is none of these, or `pad` is negative or not two for each dimension.
    """
    match pad_type.lower():
        case "valid":
            return [(0, 0)] * len(sizes)
        case "custom":
            return _custom(pad, len(sizes))
        case "same" | "same_lower" as kind:
            totals = [max(0, (math.ceil(size / stride) - 1) * stride + reach - size)
                      for size, reach, stride in zip(sizes, reaches, strides, strict=True)]  # fmt: skip
            return [halves(total, more_before=kind == "same_lower") for total in totals]
    raise ValueError(f"pad_type {pad_type!r}; it is valid, same, same_lower or custom")


def _custom(pad: Value, dimensions: int) -> list[tuple[int, int]]:
    counts = wholes(pad) or [0, 0] * dimensions
    if len(counts) != 2 * dimensions or min(counts) < 0:
        raise ValueError(f"pad {counts}; it is before and after for each of {dimensions} dimensions, none negative")
    return list(zip(counts[::2], counts[1::2]))


def halves(total: int, *, more_before: bool) -> tuple[int, int]:
    """A number of values, half before and half after; one more before, or after, where it is odd."""
    fewer = total // 2
    return (total - fewer, fewer) if more_before else (fewer, total - fewer)


def padded(x: Tensor, around: Sequence[tuple[int, int]], fill: float = 0.0) -> Tensor:
    """Values added around the last dimensions; a negative number takes values away.

    Args:
        x: Any tensor.
        around: Before and after, for each of the last dimensions in their order.
        fill: What is added.
    """
    if not any(before or after for before, after in around):
        return x
    leading = x.shape[: x.ndim - len(around)]
    inner = [max(0, size + sum(pair)) for size, pair in zip(x.shape[len(leading) :], around)]
    require_room(math.prod([*leading, *inner]))
    return functional.pad(x, [count for pair in reversed(around) for count in pair], value=fill)


def _steps(value: Value, x: Tensor) -> list[int]:
    """Strides or dilations; one each where the program leaves them out."""
    dimensions = x.ndim - 2
    if dimensions not in (1, 2, 3):
        raise ValueError(f"x has rank {x.ndim}; it is 3, 4 or 5")
    steps = wholes(value) or [1] * dimensions
    if len(steps) != dimensions or min(steps) < 1:
        raise ValueError(f"steps {steps}; they are positive, one for each of {dimensions} dimensions")
    return steps


def _reaches(weight: Tensor, dilations: Sequence[int]) -> list[int]:
    return [(size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations, strict=True)]


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, strides: Value = None, pad_type: str = "valid",
    pad: Value = None, dilations: Value = None, groups: Value = None,
) -> Tensor:  # fmt: skip
    """y[n, o, p] = bias[o] + sum over c, k of weight[o, c, k] x[n, c, p stride + k dilation - before].

    x is [n, channels, *sizes], weight [out channels, channels / groups, *kernel].
    """
    steps, dilated = _steps(strides, x), _steps(dilations, x)
    around = edges(pad_type, pad, x.shape[2:], _reaches(weight, dilated), steps)
    inner = [size + sum(pair) for size, pair in zip(x.shape[2:], around)]
    require_room(x.shape[0] * weight.shape[0] * math.prod(inner))
    return _FORWARD[x.ndim](padded(x, around), weight, bias, steps, 0, dilated, 1 if groups is None else whole(groups))


def conv_quantized(
    x: Tensor, weight: Tensor, quantization_type: str, quant_scale: Tensor, quant_bias: Tensor,
    bias: Tensor | None = None, nbits: Value = None, strides: Value = None, pad_type: str = "valid",
    pad: Value = None, dilations: Value = None, groups: Value = None,
) -> Tensor:  # fmt: skip
    """A conv whose weight is weight[o] quant_scale[o] + quant_bias[o]; a single scale and bias are for all channels.

    `nbits` says how many values a weight takes, not what they mean.
    """
    if quantization_type != "linear":
        raise ValueError(f"quantization_type {quantization_type!r}: only 'linear' has its constants in the operation")
    column = [-1] + [1] * (weight.ndim - 1)
    weight = weight.float() * quant_scale.reshape(column) + quant_bias.reshape(column)
    return conv(x, weight, bias if bias is None else bias.float(), strides, pad_type, pad, dilations, groups)


def conv_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, pad: Value = None, output_shape: Value = None,
    pad_type: str = "valid", strides: Value = None, dilations: Value = None, groups: Value = None,
) -> Tensor:  # fmt: skip
    """y[n, o, p stride + k dilation - before] += weight[c, o, k] x[n, c, p], plus bias[o]: the gradient of a conv.

    x is [n, channels, *sizes], weight [channels, out channels / groups, *kernel]. Where `output_shape` asks for more
    than the windows reach, what is behind them is bias alone.
    """
    steps, dilated = _steps(strides, x), _steps(dilations, x)
    reaches = _reaches(weight, dilated)
    full = [(size - 1) * step + reach for size, step, reach in zip(x.shape[2:], steps, reaches)]
    split = 1 if groups is None else whole(groups)
    require_room(x.shape[0] * weight.shape[1] * split * math.prod(full))
    around = _cuts(pad_type, pad, x, full, steps, wholes(output_shape)[2:])
    # oneDNN, which torch takes for float32, reads beyond its memory where strides are some ten thousands
    y = _BACKWARD[x.ndim](x.double(), weight.double(), None, steps, 0, 0, split, dilated).float()
    y = padded(y, [(-before, -after) for before, after in around])
    return y if bias is None else y + bias.reshape([-1] + [1] * (x.ndim - 2))


def _cuts(
    pad_type: str, pad: Value, x: Tensor, full: Sequence[int], steps: Sequence[int], asked: Sequence[int]
) -> list[tuple[int, int]]:
    """What is cut off the full result before and after each dimension; negative is added."""
    kind = pad_type.lower()
    if kind in ("same", "same_lower"):
        sizes = asked or [size * step for size, step in zip(x.shape[2:], steps)]
        befores = [halves(max(0, total - size), more_before=kind == "same_lower")[0]
                   for total, size in zip(full, sizes, strict=True)]  # fmt: skip
        return [(before, total - before - size) for before, total, size in zip(befores, full, sizes)]
    around = edges(pad_type, pad, full, full, steps)
    if not asked:
        return around
    return [(before, total - before - size) for (before, _), total, size in zip(around, full, asked, strict=True)]


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "conv": conv,
    "conv_quantized": conv_quantized,
    "conv_transpose": conv_transpose,
}
