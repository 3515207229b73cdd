"""A window that moves over one, two or three spatial dimensions and gives one value at each place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from targets.coreml_ios.executor.ops.conv import edges, padded
from targets.coreml_ios.executor.values import Value, flag, wholes


@dataclass(frozen=True)
class _Windows:
    """Where the windows lie.

    Args:
        kernel: Values that a window sees along each spatial dimension.
        strides: Steps between windows.
        around: Padding before and after each spatial dimension.
        beyond: Values behind the padding that the last window reaches.
    """

    kernel: Sequence[int]
    strides: Sequence[int]
    around: Sequence[tuple[int, int]]
    beyond: Sequence[tuple[int, int]]

    @classmethod
    def of(
        cls, x: Tensor, kernel_sizes: Value, strides: Value, pad_type: str, pad: Value, ceil_mode: Value
    ) -> _Windows:
        """Windows as an operation's parameters say.

        Raises:
            ValueError: they are not one for each spatial dimension, or not positive.
        """
        sizes, kernel = list(x.shape[2:]), wholes(kernel_sizes)
        steps = wholes(strides) or [1] * len(kernel)
        if not len(sizes) == len(kernel) == len(steps) or len(sizes) not in (1, 2, 3) or min(*kernel, *steps) < 1:
            raise ValueError(f"kernel_sizes {kernel} and strides {steps} do not fit an input of sizes {sizes}")
        around = edges(pad_type, pad, sizes, kernel, steps)
        ends = map(_end, sizes, kernel, steps, around) if flag(ceil_mode) else [0] * len(sizes)
        return cls(kernel, steps, around, [(0, count) for count in ends])

    def __call__(self, x: Tensor, fill: float, fill_beyond: float) -> Tensor:
        """What every window sees: [n, channels, *places, *kernel], a view.

        Args:
            x: [n, channels, *sizes].
            fill: What the padding holds.
            fill_beyond: What is behind it.
        """
        x = padded(padded(x, self.around, fill), self.beyond, fill_beyond)
        for dimension, (size, step) in enumerate(zip(self.kernel, self.strides), 2):
            x = x.unfold(dimension, size, step)
        return x

    @property
    def inner(self) -> list[int]:
        """The dimensions of what a window sees."""
        return list(range(-len(self.kernel), 0))


def _end(size: int, kernel: int, stride: int, around: tuple[int, int]) -> int:
    """How far the last window reaches beyond the padding where ceil((size + padding - kernel) / stride) counts them.

    A window that would begin behind the input and see its padding only is not counted.
    """
    total = size + sum(around)
    count = math.ceil((total - kernel) / stride) + 1
    if sum(around) > 0 and (count - 1) * stride >= size + around[0]:
        count -= 1
    return max(0, (count - 1) * stride + kernel - total)


def avg_pool(
    x: Tensor, kernel_sizes: Value, pad_type: str, strides: Value = None, pad: Value = None,
    exclude_padding_from_average: Value = None, ceil_mode: Value = None,
) -> Tensor:  # fmt: skip
    """The mean of a window; padding is zeros that count, or that do not; what is behind it never counts."""
    windows = _Windows.of(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    ones = torch.ones([1, 1, *x.shape[2:]])
    counts = windows(ones, 0.0 if flag(exclude_padding_from_average) else 1.0, 0.0).sum(windows.inner)
    return windows(x, 0.0, 0.0).sum(windows.inner) / counts


def l2_pool(
    x: Tensor, kernel_sizes: Value, pad_type: str, strides: Value = None, pad: Value = None, ceil_mode: Value = None
) -> Tensor:
    """The root of the sum of a window's squares."""
    windows = _Windows.of(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    return windows(x.square(), 0.0, 0.0).sum(windows.inner).sqrt()


def max_pool(
    x: Tensor, kernel_sizes: Value, pad_type: str, strides: Value = None, pad: Value = None, ceil_mode: Value = None
) -> Tensor:
    """The greatest of a window; padding is never it."""
    windows = _Windows.of(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    return windows(x, -math.inf, -math.inf).amax(windows.inner)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "avg_pool": avg_pool,
    "l2_pool": l2_pool,
    "max_pool": max_pool,
}
