"""What a leaf becomes in Core ML (iOS 18 constants): its form, its price in bits, its arrays as they are stored.

    Dense           float16 values
    4, 8 bits       codes, a float16 scale per block, zero points      constexpr_blockwise_shift_scale
    1, 2, 3, 6 bits codes, a table per block: small integers x scale   constexpr_lut_to_dense over the above
    odd zero points codes, a table per block of float16 values         constexpr_lut_to_dense
    Sparse          one of these for the kept values, and a bit mask   constexpr_*_sparse, constexpr_sparse_to_dense

Core ML has no integers of 1, 2, 3 or 6 bits outside tables, no n:m layout, and wants blocks that divide the width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.errors import TargetError
from exporter.ops import Leaf
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, Weight

Array = NDArray[Any]
Style = Literal["blocks", "scaled table", "table"]

BLOCK_BITS = (4, 8)
TABLE_BITS = (1, 2, 3, 4, 6, 8)
FLOAT16 = 16  # bits
EXACT = 2**11  # float16 holds every whole number up to here


@dataclass(frozen=True)
class Form:
    """How low-bit codes are stored.

    Args:
        style: See the top of this file.
        bits: Of a code.
        integers: Bits of the whole numbers that scales multiply: the codes themselves, or the entries of a table.
        zeros: Zero points: left out (symmetric), integers as wide as the scaled ones, or float16.
    """

    style: Style
    bits: int
    integers: int
    zeros: Literal["none", "integer", "float16"] = "none"

    def group_bits(self) -> int:
        """Bits per group beside the codes: scale, zero point, table."""
        entries = 1 << self.bits
        if self.style == "table":
            return FLOAT16 * entries
        zero = {"none": 0, "integer": self.integers, "float16": FLOAT16}[self.zeros]
        return FLOAT16 + zero + (self.integers * entries if self.style == "scaled table" else 0)


@dataclass(frozen=True)
class Parts:
    """A leaf's arrays as Core ML stores them; W is the padded width, G the groups in a row.

    Args:
        codes: [out, W], or [kept] where there is a mask; float16 values or integers.
        codes_type: MIL's name of their type.
        table: [out, G, 2**bits, 1], or None.
        table_type: MIL's name of its type.
        scale: [out, G], float16, or None.
        zeros: [out, G], float16 or of the type that `scale` multiplies, or None.
        mask: [out, W], 0 or 1, or None.
    """

    codes: Array
    codes_type: str
    table: Array | None = None
    table_type: str = "fp16"
    scale: Array | None = None
    zeros: Array | None = None
    mask: Array | None = None


def price(weight: Weight) -> int | str:
    """Bits that Core ML stores for a leaf, or why it cannot."""
    match weight:
        case Dense():
            return FLOAT16 * weight.values.numel()
        case LowBit():
            return _low_bit_price(weight, weight.codes.shape[0] * padded_width(weight))
        case Sparse(kept=Dense() as kept):
            return FLOAT16 * kept.values.numel() + weight.shape[0] * weight.shape[1]
        case Sparse(kept=LowBit() as kept):
            if kept.groups > 1 and kept.group % weight.n:
                return f"groups of {kept.group} kept columns cross the groups of {weight.n}:{weight.m}"
            bits = _low_bit_price(kept, kept.codes.numel())
            return bits if isinstance(bits, str) else bits + weight.shape[0] * padded_width(weight)
        case _:
            return "Core ML has no constant that nests so"


def form(weight: LowBit) -> Form | str:
    """The smallest form that holds these codes exactly, or why there is none."""
    if weight.bits not in TABLE_BITS:
        return f"Core ML has no codes of {weight.bits} bits"
    is_block = weight.bits in BLOCK_BITS
    integers = weight.bits if is_block else 4 if weight.bits < 4 else 8
    baked, zeros = Form("table", weight.bits, FLOAT16), _zeros(weight)
    if zeros is None:
        return baked
    scaled = Form("blocks" if is_block else "scaled table", weight.bits, integers, zeros)
    return baked if baked.group_bits() < scaled.group_bits() else scaled


def padded_width(weight: Leaf) -> int:
    """Columns that are stored: enough to make the last group of a row a whole one."""
    match weight:
        case LowBit() if weight.groups > 1:
            return weight.groups * weight.group
        case Sparse(kept=LowBit() as kept) if kept.groups > 1:
            return kept.groups * kept.group * weight.m // weight.n
        case _:
            return weight.shape[1]


def parts(leaf: Leaf, site: str) -> Parts:
    """A leaf's arrays as they are stored.

    Raises:
        TargetError: a value does not fit float16.
    """
    match leaf:
        case Dense():
            return Parts(float16(leaf.values, site), "fp16")
        case LowBit():
            return _low_bit_parts(leaf, padded_width(leaf), site)
        case Sparse():
            assert isinstance(leaf.kept, Dense | LowBit)  # price() takes no other
            kept = parts(leaf.kept, site) if isinstance(leaf.kept, Dense) else _low_bit_parts(leaf.kept, 0, site)
            mask = _padded(leaf.mask.to(torch.uint8), padded_width(leaf))
            return replace(kept, codes=kept.codes.reshape(-1), mask=mask)


def float16(values: Tensor, site: str) -> Array:
    """Rounded once to float16.

    Raises:
        TargetError: a value is not finite there.
    """
    rounded = values.to(torch.float16)
    if not bool(rounded.isfinite().all()):
        largest = float(values.abs().max())
        raise TargetError(f"{site} holds {largest:g}; float16, Core ML's own type, ends at 65504: scale the model down")
    return np.ascontiguousarray(rounded.numpy())


def with_stored_scales(weight: Weight) -> tuple[Weight, float]:
    """A tree whose scales are float16 numbers, and the largest relative change of a scale (0: none was rounded).

    Baked tables need no rounding of the scale: their values are rounded, once.
    """
    match weight:
        case Dense():
            return weight, 0.0
        case LowBit():
            stored = form(weight)
            is_baked = isinstance(stored, Form) and stored.style == "table"
            return (weight, 0.0) if is_baked or weight.scales.is_meta else _rounded_scales(weight)
        case Sparse():
            kept, change = with_stored_scales(weight.kept)
            return replace(weight, kept=kept), change
        case Shared():
            rows, change = with_stored_scales(weight.rows)
            return replace(weight, rows=rows), change
        case Product():
            (left, first), (right, second) = with_stored_scales(weight.left), with_stored_scales(weight.right)
            return Product(left, right), max(first, second)
        case Sum():
            terms = [with_stored_scales(term) for term in weight.terms]
            return Sum(tuple(term for term, _ in terms)), max(change for _, change in terms)


def walk(site: str, weight: Weight) -> Iterator[tuple[str, Weight]]:
    """Every node of a tree down to its leaves, with its name: the site, then the way down."""
    yield site, weight
    match weight:
        case Sum():
            for index, term in enumerate(weight.terms):
                yield from walk(f"{site}.term{index}", term)
        case Product():
            yield from walk(f"{site}.left", weight.left)
            yield from walk(f"{site}.right", weight.right)
        case Shared():
            yield from walk(f"{site}.rows", weight.rows)


def leaves(site: str, weight: Weight) -> Iterator[tuple[str, Leaf]]:
    """The leaves of a tree with their names."""
    return ((name, node) for name, node in walk(site, weight) if isinstance(node, Dense | LowBit | Sparse))


def labels(site: str, weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """The labels of the shared rows in a tree, with their names."""
    return ((f"{name}.labels", node.labels) for name, node in walk(site, weight) if isinstance(node, Shared))


def _zeros(weight: LowBit) -> Literal["none", "integer", "float16"] | None:
    """How zero points can be stored so that `code - zero` is exact, or None where it cannot be."""
    if weight.is_symmetric:
        return "none"
    zeros = weight.zeros
    if weight.has_whole_zeros:
        return "integer"
    if zeros.is_meta:  # fractions of unknown fineness, as binarization gives them
        return None
    finest = next((step for step in (1, 2, 4, 8, 16, 32, 64) if bool((zeros * step % 1 == 0).all())), None)
    reach = float(zeros.abs().max()) + 2**weight.bits
    return "float16" if finest is not None and reach * finest <= EXACT else None


def _low_bit_price(weight: LowBit, codes: int) -> int | str:
    """Bits of `codes` codes and of the groups; refuses what is larger in wider codes, or in float16."""
    stored = form(weight)
    if isinstance(stored, str):
        return stored
    groups = weight.shape[0] * weight.groups
    bits = stored.bits * codes + stored.group_bits() * groups
    if bits >= FLOAT16 * weight.codes.numel():
        return (
            f"its codes with a {'table' if 'table' in stored.style else 'scale'} per group are more than float16 values"
        )
    wider = next((width for width in BLOCK_BITS if width > weight.bits), None)
    if stored.style == "scaled table" and wider:
        as_blocks = wider * codes + replace(stored, style="blocks", bits=wider, integers=wider).group_bits() * groups
        if bits >= as_blocks:
            return f"a table of {2**weight.bits} values per group is more than codes of {wider} bits"
    return bits


def _low_bit_parts(weight: LowBit, width: int, site: str) -> Parts:
    """Arrays of codes padded to `width` columns (0: as they are)."""
    stored = form(weight)
    assert isinstance(stored, Form)  # price() took it
    codes = _padded(weight.codes, width)
    if stored.style == "table":
        return Parts(codes, f"uint{stored.bits}", float16(_table_values(weight), site)[..., None])
    scale = float16(weight.scales, site)
    zeros = None if stored.zeros == "none" else _stored_zeros(weight, stored)
    middle = 2 ** (stored.bits - 1) if stored.zeros == "none" else 0
    integers = f"{'int' if middle else 'uint'}{stored.integers}"
    if stored.style == "blocks":
        signed = codes.astype(np.int16) - middle
        return Parts(signed.astype(np.int8 if middle else np.uint8), integers, scale=scale, zeros=zeros)
    entries = (np.arange(2**stored.bits) - middle).astype(np.int8 if middle else np.uint8)
    table = np.broadcast_to(entries[:, None], (*scale.shape, len(entries), 1))
    return Parts(codes, f"uint{stored.bits}", np.ascontiguousarray(table), integers, scale, zeros)


def _table_values(weight: LowBit) -> Tensor:
    """[out, groups, 2**bits]: what each code means in each group, in the arithmetic of `.dense()`."""
    codes = torch.arange(2**weight.bits, dtype=torch.float32)
    return weight.scales.float()[..., None] * (codes - weight.zeros.float()[..., None])


def _stored_zeros(weight: LowBit, stored: Form) -> Array:
    kind = torch.uint8 if stored.zeros == "integer" else torch.float16
    return np.ascontiguousarray(weight.zeros.to(kind).expand(weight.scales.shape).numpy())


def _rounded_scales(weight: LowBit) -> tuple[LowBit, float]:
    exact = weight.scales.double()
    rounded = exact.to(torch.float16)
    change = (rounded.double() - exact).abs() / exact.abs().clamp_min(1e-300)
    largest = float(change.max()) if change.numel() else 0.0
    return (replace(weight, scales=rounded), largest) if largest > 0 else (weight, 0.0)


def _padded(matrix: Tensor, width: int) -> Array:
    return np.ascontiguousarray(torch.nn.functional.pad(matrix, (0, max(width - matrix.shape[1], 0))).numpy())
