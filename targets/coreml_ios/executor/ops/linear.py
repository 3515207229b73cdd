"""Products of matrices, added up in float32 or, of integers, in int32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from targets.coreml_ios.executor.values import Value, flag, require_broadcast_room, require_room


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` W^T + b; x is [..., in], W [out, in], b [out]."""
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        said = None if bias is None else list(bias.shape)
        raise ValueError(f"a weight {list(weight.shape)} and a bias {said} are not [out, in] and [out]")
    require_room(x.numel() // max(x.shape[-1], 1) * weight.shape[0])
    x, weight = _alike(x, weight)
    if x.is_floating_point():
        return F.linear(x, weight, bias if bias is None else bias.float())
    return x @ weight.T if bias is None else x @ weight.T + bias


def matmul(x: Tensor, y: Tensor, transpose_x: Value = False, transpose_y: Value = False) -> Tensor:
    """`x` `y`, or with one or both of them transposed, for all axes before the last two, which are broadcast."""
    x = x.mT if flag(transpose_x) and x.ndim > 1 else x
    y = y.mT if flag(transpose_y) and y.ndim > 1 else y
    columns = y.shape[-1:] if y.ndim > 1 else (1,)
    require_broadcast_room((*x.shape[:-1], 1), (*y.shape[:-2], 1, *columns))
    return torch.matmul(*_alike(x, y))


def einsum(values: list[Tensor], equation: str) -> Tensor:
    """z[..., c, h, u] = sum_w x[..., c, h, w] y[..., w, h, u], for one axis before or none; h of size 1 is broadcast.

    Raises:
        ValueError: another equation, which Core ML does not have, or tensors that do not go with it.
    """
    x, y = values
    rank = {_relettered("nchw,nwhu->nchu"): 4, _relettered("chw,whu->chu"): 3}.get(_relettered(equation))
    if rank is None:
        raise ValueError(f"equation {equation!r} is not nchw,nwhu->nchu or chw,whu->chu in other letters")
    if not x.ndim == y.ndim == rank:
        raise ValueError(f"the tensors of {equation!r} are of {x.ndim} and {y.ndim} axes, its terms of {rank}")
    if x.shape[-1] != y.shape[-3]:
        raise ValueError(f"{equation!r} sums {x.shape[-1]} values of one and {y.shape[-3]} values of the other")
    return matmul(x.transpose(-3, -2), y.transpose(-3, -2)).transpose(-3, -2)  # [..., h, c, w] [..., h, w, u]


def _relettered(equation: str) -> str:
    """An equation whose letters are a, b, c ... in the order in which they come: the same for the same meaning."""
    text = equation.replace(" ", "")
    letters = list(dict.fromkeys(letter for letter in text if letter.isalpha()))
    return "".join(chr(ord("a") + letters.index(letter)) if letter.isalpha() else letter for letter in text)


def _alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (x, y) if x.dtype == y.dtype else (x.float(), y.float())


OPERATIONS: dict[str, Callable[..., Any]] = {
    "einsum": einsum,
    "linear": linear,
    "matmul": matmul,
}
