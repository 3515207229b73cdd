"""One tensor, value by value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from targets.coreml_ios.executor.values import CARRIED, FLOATS, Value, number, rounded


def cast(x: Tensor, dtype: str) -> Tensor:
    """To another type; a float becomes an integer towards zero.

    What becomes a float is rounded later, to the type that the program declares, which is this one.
    """
    if dtype not in CARRIED:
        raise ValueError(f"type {dtype!r} is not one of {', '.join(CARRIED)}")
    return x.float() if dtype in FLOATS else rounded(x, dtype)


def clip(x: Tensor, alpha: Value, beta: Value) -> Tensor:
    """min(max(x, alpha), beta)."""
    return x.clamp(min=number(alpha)).clamp(max=number(beta))


def inverse(x: Tensor, epsilon: Value = 1e-4) -> Tensor:
    """1 / (x + epsilon)."""
    return (x + number(epsilon)).reciprocal()


def log(x: Tensor, epsilon: Value = 1e-45) -> Tensor:
    """ln(x + epsilon)."""
    return (x + number(epsilon)).log()


def rsqrt(x: Tensor, epsilon: Value = 1e-12) -> Tensor:
    """1 / sqrt(x + epsilon)."""
    return (x + number(epsilon)).rsqrt()


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; of NaN, NaN."""
    return torch.where(x.isnan(), x, x.sign())


OPERATIONS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: x.abs(),
    "acos": lambda x: x.acos(),
    "asin": lambda x: x.asin(),
    "atan": lambda x: x.atan(),
    "atanh": lambda x: x.atanh(),
    "cast": cast,
    "ceil": lambda x: x.ceil(),
    "clip": clip,
    "cos": lambda x: x.cos(),
    "cosh": lambda x: x.cosh(),
    "erf": lambda x: x.erf(),
    "exp": lambda x: x.exp(),
    "exp2": lambda x: x.double().exp2(),  # 2^x; of integers too, where the declared type cuts off 1/2, 1/4, ...
    "floor": lambda x: x.floor(),
    "inverse": inverse,
    "log": log,
    "logical_not": lambda x: x.logical_not(),
    "round": lambda x: x.round(),  # halves to even: 0.5 to 0, 1.5 to 2
    "rsqrt": rsqrt,
    "sign": sign,
    "sin": lambda x: x.sin(),
    "sinh": lambda x: x.sinh(),
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x * x,
    "tan": lambda x: x.tan(),
    "tanh": lambda x: x.tanh(),
    "threshold": lambda x, alpha: torch.maximum(x, alpha.reshape([]).to(x.dtype)),
}
