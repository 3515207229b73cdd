"""Activations: one tensor, value by value, with constants for the whole tensor or for each channel (axis 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from targets.coreml_ios.executor.values import Value, number, whole


def leaky_relu(x: Tensor, alpha: Value) -> Tensor:
    """`x` where x >= 0, alpha x elsewhere."""
    return torch.where(x < 0, number(alpha) * x, x)


def clamped_relu(x: Tensor, alpha: Value, beta: Value) -> Tensor:
    """min(x, beta) where x >= 0, min(alpha x, beta) elsewhere."""
    return leaky_relu(x, alpha).clamp(max=number(beta))


def elu(x: Tensor, alpha: Value) -> Tensor:
    """`x` where x > 0, alpha (e^x - 1) elsewhere."""
    return torch.where(x > 0, x, number(alpha) * x.expm1())


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """x[:, c] where x >= 0, alpha[c] x[:, c] elsewhere."""
    return torch.where(x < 0, per_channel(alpha, x) * x, x)


def softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """alpha[c] ln(1 + e^(beta[c] x[:, c]))."""
    return per_channel(alpha, x) * softplus(per_channel(beta, x) * x)


def thresholded_relu(x: Tensor, alpha: Value) -> Tensor:
    """`x` where x >= alpha, 0 elsewhere."""
    return torch.where(x < number(alpha), 0.0, x)


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """`x` P(N < x) for N of the normal distribution, or one of two approximations of it."""
    if mode not in _GELU:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(_GELU)}")
    return _GELU[mode](x)


_GELU: dict[str, Callable[[Tensor], Tensor]] = {
    "EXACT": F.gelu,  # x (1 + erf(x / sqrt(2))) / 2
    "TANH_APPROXIMATION": lambda x: F.gelu(x, approximate="tanh"),  # x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2
    "SIGMOID_APPROXIMATION": lambda x: x * (1.702 * x).sigmoid(),
}


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """One value for each place on axis 1, to go with x.

    Raises:
        ValueError: there are more or fewer.
    """
    if x.ndim < 2 or values.shape != x.shape[1:2]:
        raise ValueError(f"{list(values.shape)} values do not go with the channels (axis 1) of {list(x.shape)}")
    return values.reshape([-1] + [1] * (x.ndim - 2))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "clamped_relu": clamped_relu,
    "elu": elu,
    "gelu": gelu,
    "leaky_relu": leaky_relu,
    "linear_activation": lambda x, alpha, beta: number(alpha) * x + number(beta),
    "prelu": prelu,
    "relu": lambda x: x.clamp(min=0),
    "relu6": lambda x: x.clamp(0, 6),
    "scaled_tanh": lambda x, alpha, beta: number(alpha) * (number(beta) * x).tanh(),
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid_hard": lambda x, alpha, beta: (number(alpha) * x + number(beta)).clamp(0, 1),
    "silu": lambda x: F.silu(x),
    "softmax": lambda x, axis=-1: x.softmax(whole(axis)),
    "softplus": softplus,
    "softplus_parametric": softplus_parametric,
    "softsign": lambda x: x / (1 + x.abs()),
    "thresholded_relu": thresholded_relu,
}
