"""Attention in torch against one that is written out, in float64: every width, cache and grouping."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from exporter.model import Rope
from exporter.ops import AttentionSpec
from exporter.torch_ops import TorchOps
from tests.models import LLAMA, random_model

SPEC = AttentionSpec(heads=4, kv_heads=2, head_dim=16, value_dim=16, scale=0.25, rope=Rope(10000.0))
SPECS = {
    "as wide": SPEC,
    "narrow values": replace(SPEC, value_dim=6),
    "wide values": replace(SPEC, value_dim=24),
    "a value head of its own": replace(SPEC, kv_heads=4, value_dim=10),
    "without rotation": replace(SPEC, rope=None),
    "no head shares": replace(SPEC, kv_heads=4),
}
TOKENS = 41
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def inputs(spec: AttentionSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    widths = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.value_dim
    q, k, v = (torch.randn(2, TOKENS, width, generator=generator, dtype=torch.float64).to(dtype) for width in widths)
    return q, k, v


def rotated(x: Tensor, spec: AttentionSpec, position: int) -> Tensor:
    """One head at one position."""
    if spec.rope is None:
        return x
    cos, sin = (table[position].double() for table in spec.rope.table(spec.head_dim, TOKENS))
    first, second = x.chunk(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin))


@cache
def written_out(spec: AttentionSpec) -> Tensor:
    """Head by head, token by token."""
    q, k, v = inputs(spec, torch.float64)
    out = torch.zeros(2, TOKENS, spec.heads, spec.value_dim, dtype=torch.float64)
    for b, t, h in torch.cartesian_prod(torch.arange(2), torch.arange(TOKENS), torch.arange(spec.heads)).tolist():
        shared = h // (spec.heads // spec.kv_heads)
        seen = range(t + 1 if spec.causal else TOKENS)
        query = rotated(q[b, t].double().view(spec.heads, -1)[h], spec, t)
        keys = torch.stack([rotated(k[b, s].double().view(spec.kv_heads, -1)[shared], spec, s) for s in seen])
        values = torch.stack([v[b, s].double().view(spec.kv_heads, -1)[shared] for s in seen])
        out[b, t, h] = (keys @ query * spec.scale).softmax(0) @ values
    return out.flatten(-2)


def attended(spec: AttentionSpec, dtype: torch.dtype, pieces: list[int]) -> Tensor:
    ops, found, start = TorchOps(random_model(LLAMA), dtype), [], 0
    q, k, v = inputs(spec, dtype)
    for size in pieces:
        here = slice(start, start + size)
        ops.begin()
        found.append(ops.cached_attention(q[:, here], k[:, here], v[:, here], 0, spec))
        start += size
    return torch.cat(found, dim=1)


@EVERY
@pytest.mark.parametrize("pieces", [[TOKENS], [20, 1, 1, 19], [1] * TOKENS], ids=["at once", "in pieces", "singly"])
def test_attention_is_the_written_out_one_however_tokens_come(spec: AttentionSpec, pieces: list[int]) -> None:
    expected = written_out(spec)
    assert torch.allclose(attended(spec, torch.float64, pieces), expected, rtol=1e-10, atol=1e-12)


@EVERY
def test_float32_is_off_by_its_rounding(spec: AttentionSpec) -> None:
    expected = written_out(spec)
    assert torch.allclose(attended(spec, torch.float32, [TOKENS]).double(), expected, rtol=1e-4, atol=1e-5)


@EVERY
def test_without_a_mask_all_see_all_and_nothing_is_kept(spec: AttentionSpec) -> None:
    spec = replace(spec, causal=False)
    expected = written_out(spec)
    assert torch.allclose(attended(spec, torch.float64, [TOKENS]), expected, rtol=1e-10, atol=1e-12)


def test_layers_of_other_widths_and_rotations_do_not_share_a_table() -> None:
    ops = TorchOps(random_model(LLAMA), torch.float64)
    for rope, dim in ((Rope(10000.0), 16), (Rope(500.0), 16), (Rope(10000.0), 8), (Rope(10000.0), 16)):
        spec = replace(SPEC, rope=rope, head_dim=dim)
        x = torch.randn(1, 1, 9, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = torch.stack([rotated(x[0, 0, t], spec, t) for t in range(9)])
        assert torch.allclose(ops.rotate(x, spec)[0, 0], expected, rtol=1e-10, atol=1e-12)
