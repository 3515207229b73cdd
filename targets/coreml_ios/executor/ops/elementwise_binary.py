"""Two tensors, broadcast against each other, value by value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from targets.coreml_ios.executor.values import require_broadcast_room


def _broadcast(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An operation on two tensors that refuses to become enormous."""

    def operation(x: Tensor, y: Tensor) -> Tensor:
        require_broadcast_room(x.shape, y.shape)
        return function(x, y)

    return operation


def _real_div(x: Tensor, y: Tensor) -> Tensor:
    """`x` / `y`; of integers too, where the declared type cuts off what is behind the point."""
    if x.is_floating_point() or y.is_floating_point():
        return x / y
    if bool((y == 0).any()):
        raise ZeroDivisionError("an integer is divided by zero")
    return x.double() / y.double()  # exact where it matters: an int32 has 31 bits, a float64 53


def _power(x: Tensor, y: Tensor) -> Tensor:
    """`x` to the `y`; of integers, the declared type cuts off what is behind the point."""
    if x.is_floating_point() or y.is_floating_point():
        return x**y
    if bool(((x == 0) & (y < 0)).any()):
        raise ZeroDivisionError("0 is raised to a negative power")
    return x**y


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": _broadcast(torch.add),
    "sub": _broadcast(torch.sub),
    "mul": _broadcast(torch.mul),
    "real_div": _broadcast(_real_div),
    "floor_div": _broadcast(torch.floor_divide),  # rounds down: -7 // 2 = -4
    "mod": _broadcast(torch.remainder),  # has the sign of y: x - floor(x / y) y
    "pow": _broadcast(_power),
    "maximum": _broadcast(torch.maximum),
    "minimum": _broadcast(torch.minimum),
    "equal": _broadcast(torch.eq),
    "not_equal": _broadcast(torch.ne),
    "greater": _broadcast(torch.gt),
    "greater_equal": _broadcast(torch.ge),
    "less": _broadcast(torch.lt),
    "less_equal": _broadcast(torch.le),
    "logical_and": _broadcast(torch.logical_and),
    "logical_or": _broadcast(torch.logical_or),
    "logical_xor": _broadcast(torch.logical_xor),
}
