"""Quantization of activations: to integers of eight bits and back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from targets.coreml_ios.executor.values import Value, whole

RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: Value = None
) -> Tensor:
    """Give clip(round(input / scale) + zero_point), to nearest and ties to even; NaN becomes 0.

    The quotient is a float32, as in every operation here; coremltools folds constants of float16 with one of float16,
    which at ties and near them gives a neighbour.
    """
    least, most = RANGES[output_dtype]
    steps = (input / _along(scale, input, axis)).round()
    if zero_point is not None:
        steps = steps + _along(zero_point, input, axis)
    return steps.clamp(least, most).nan_to_num()


def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: Value = None) -> Tensor:
    """Give scale * (input - zero_point)."""
    values = input.float()
    if zero_point is not None:
        values = values - _along(zero_point, input, axis)
    return values * _along(scale, input, axis)


def _along(values: Tensor, input: Tensor, axis: Value) -> Tensor:
    """One value for all, or one for each place of an axis, in a shape that goes with the input."""
    if values.ndim == 0:
        return values.float()
    if axis is None:
        raise ValueError(f"{values.numel()} scales or zero points, but no axis for them")
    size = input.shape[whole(axis)]
    if values.shape != (size,):
        raise ValueError(f"scales or zero points are {list(values.shape)}; axis {whole(axis)} has {size} places")
    shape = [1] * input.ndim
    shape[whole(axis)] = size
    return values.float().reshape(shape)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "quantize": quantize,
    "dequantize": dequantize,
}
