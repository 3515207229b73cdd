"""One number for all values along some axes.

Of integers, what is no integer (a mean, a norm, a logarithm) is computed in float64; the declared type cuts off what is
behind the point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from targets.coreml_ios.executor.values import Value, flag, whole, wholes


def _over_axes(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    """An operation that reduces x over these axes, or over all where none are given; over an empty list, over none."""

    def operation(x: Tensor, axes: Value = None, keep_dims: Value = False) -> Tensor:
        reduced = list(range(x.ndim)) if axes is None else wholes(axes)
        return function(x, reduced, flag(keep_dims)) if reduced else function(x[..., None], [-1], False)

    return operation


def _product(x: Tensor, axes: list[int], keep_dims: bool) -> Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True)
    return x if keep_dims else x.squeeze(axes)


def _real(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.double()


def argmax(x: Tensor, axis: Value = -1, keep_dims: Value = False, output_dtype: str = "int32") -> Tensor:
    """Where the largest value along an axis is; of equals, the first."""
    return x.argmax(whole(axis), flag(keep_dims))


def argmin(x: Tensor, axis: Value = -1, keep_dims: Value = False, output_dtype: str = "int32") -> Tensor:
    """Where the smallest value along an axis is; of equals, the first."""
    return x.argmin(whole(axis), flag(keep_dims))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "reduce_argmax": argmax,
    "reduce_argmin": argmin,
    "reduce_l1_norm": _over_axes(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "reduce_l2_norm": _over_axes(lambda x, axes, keep: _real(x).square().sum(axes, keep).sqrt()),
    "reduce_log_sum": _over_axes(lambda x, axes, keep: _real(x).sum(axes, keep).log()),
    "reduce_log_sum_exp": _over_axes(lambda x, axes, keep: _real(x).logsumexp(axes, keep)),
    "reduce_max": _over_axes(lambda x, axes, keep: x.amax(axes, keep)),
    "reduce_mean": _over_axes(lambda x, axes, keep: _real(x).mean(axes, keep)),
    "reduce_min": _over_axes(lambda x, axes, keep: x.amin(axes, keep)),
    "reduce_prod": _over_axes(_product),
    "reduce_sum": _over_axes(lambda x, axes, keep: x.sum(axes, keep)),
    "reduce_sum_square": _over_axes(lambda x, axes, keep: x.square().sum(axes, keep)),
}
