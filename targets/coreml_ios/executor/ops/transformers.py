"""Attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from targets.coreml_ios.executor.values import require_room


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """`softmax(Q K^T / sqrt(E) + mask) V`; a mask of truth values is 0 where true, -inf elsewhere.

    A row that is masked throughout is NaN, as the equation has it (torch gives zeros).

    Args:
        query: [..., L, E].
        key: [..., S, E].
        value: [..., S, EV].
        attn_mask: Broadcasts to [..., L, S]; of truth values or floats.
    """
    *batch, length, width = query.shape
    if list(key.shape[:-2]) != batch or list(value.shape[:-2]) != batch:
        raise ValueError(f"queries, keys and values of batches {batch}, {key.shape[:-2]} and {value.shape[:-2]}")
    require_room(math.prod(batch) * length * max(key.shape[-2], value.shape[-1]))
    scores = torch.matmul(query / math.sqrt(width), key.transpose(-2, -1))  # [..., L, S]
    if attn_mask is not None:
        mask = attn_mask.expand(scores.shape)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1), value)


OPERATIONS: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": scaled_dot_product_attention}
