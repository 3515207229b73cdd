"""Values brought to a common scale: over a batch, a picture, some axes, or the channels near by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from targets.coreml_ios.executor.ops.activation import per_channel
from targets.coreml_ios.executor.values import Value, axis_of, number, require_room, whole, wholes


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None,
    epsilon: Value = 1e-5,
) -> Tensor:  # fmt: skip
    """gamma[c] (x[:, c] - mean[c]) / sqrt(variance[c] + epsilon) + beta[c]."""
    y = (x - per_channel(mean, x)) / (per_channel(variance, x) + number(epsilon)).sqrt()
    return _scaled(y, *(one if one is None else per_channel(one, x) for one in (gamma, beta)))


def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Value = 1e-5) -> Tensor:
    """gamma[c] (x[n, c] - mean) / sqrt(variance + epsilon) + beta[c], with mean and variance of each x[n, c]."""
    y = _standardized(x, range(2, x.ndim), number(epsilon))
    return _scaled(y, *(one if one is None else per_channel(one, x) for one in (gamma, beta)))


def layer_norm(
    x: Tensor, axes: Value = None, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Value = 1e-5
) -> Tensor:
    """`gamma` (x - mean) / sqrt(variance + epsilon) + beta, over these axes; gamma and beta have the axes' sizes."""
    over = range(x.ndim) if axes is None else sorted(axis_of(axis, x.ndim) for axis in wholes(axes))
    shape = [x.shape[axis] if axis in over else 1 for axis in range(x.ndim)]
    y = _standardized(x, over, number(epsilon))
    return _scaled(y, *(one if one is None else one.reshape(shape) for one in (gamma, beta)))


def l2_norm(x: Tensor, epsilon: Value = 1e-6) -> Tensor:
    """`x` / sqrt(sum of x^2 + epsilon), summed over the last three axes."""
    if x.ndim < 3:
        raise ValueError(f"{list(x.shape)} has fewer than three axes")
    return x / (x.square().sum((-3, -2, -1), keepdim=True) + number(epsilon)).sqrt()


def local_response_norm(x: Tensor, size: Value, alpha: Value = 1e-4, beta: Value = 0.75, k: Value = 1.0) -> Tensor:
    """x[:, c] / (k + alpha / size * sum of x[:, j]^2)^beta, for the `size` channels j around c.

    Of an even number, one more is before c than after it.
    """
    count = whole(size)
    if x.ndim < 2:
        raise ValueError(f"{list(x.shape)} has no channels (axis 1)")
    if count < 1:
        raise ValueError(f"a neighbourhood of {count} channels")
    before, after = (min(side, x.shape[1]) for side in (count // 2, (count - 1) // 2))
    require_room(x.numel() * 3)
    squares = F.pad(x.square().movedim(1, -1), (before, after))
    near = squares.unfold(-1, before + after + 1, 1).sum(-1).movedim(-1, 1)
    return x / (number(k) + number(alpha) / count * near) ** number(beta)


def _standardized(x: Tensor, axes: Sequence[int], epsilon: float) -> Tensor:
    """Mean 0 and, but for epsilon, variance 1 over these axes."""
    if not axes:
        raise ValueError(f"there are no axes to normalize {list(x.shape)} over")
    centred = x - x.mean(list(axes), keepdim=True)
    return centred / (centred.square().mean(list(axes), keepdim=True) + epsilon).sqrt()


def _scaled(y: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    y = y if gamma is None else gamma * y
    return y if beta is None else y + beta


OPERATIONS: dict[str, Callable[..., Any]] = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "local_response_norm": local_response_norm,
}
