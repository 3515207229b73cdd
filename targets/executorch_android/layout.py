"""What ExecuTorch stores for a weight: its prices in bits, and the codes and scales as its kernels read them.

Linears run in XNNPACK, with int8 activations (a scale and a zero point per row, found at run time):

    4 bits, groups of a multiple of 32 columns   codes two a byte, bfloat16 scales   (qb4w)
    4 bits, one scale a row                      codes two a byte, float32 scales    (qc4w)
    8 bits, one scale a row                      int8 codes, float32 scales          (qc8w)

All are symmetric: XNNPACK's file format has no place for a weight's zero point. Lookups run in ExecuTorch's quantized
embedding kernels: 2, 4 or 8 bits, equal groups, float32 scales and, where they are not the middle, float32 zero points.
Everything else is float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, Weight

BLOCK = 32  # XNNPACK's groups are multiples of this many columns
DENSE_BITS, BLOCK_SCALE_BITS, ROW_SCALE_BITS = 32, 16, 32


def is_row_wise(weight: LowBit) -> bool:
    """Whether one scale serves a whole row."""
    return weight.groups == 1


def padded_width(weight: LowBit) -> int:
    """Columns that XNNPACK stores: whole groups, or whole bytes where a row has one scale."""
    step = (2 if weight.bits == 4 else 1) if is_row_wise(weight) else weight.group
    return -(-weight.shape[1] // step) * step


def price_product(weight: Weight) -> int | str:
    """Bits of a leaf that multiplies, or why XNNPACK has no kernel for it."""
    match weight:
        case Dense():
            return DENSE_BITS * weight.values.numel()
        case LowBit():
            return _price_codes(weight)
        case Sparse():
            return "XNNPACK has no n:m kernel"
        case _:
            return "not a leaf"


def _price_codes(weight: LowBit) -> int | str:
    if weight.bits not in (4, 8):
        return f"XNNPACK has no {weight.bits}-bit weights; widths that it does: 4, 8"
    if not weight.is_symmetric:
        return "XNNPACK has no zero points of weights"
    if is_row_wise(weight):
        scale_bits = ROW_SCALE_BITS
    elif weight.bits == 8:
        return "XNNPACK takes 8 bits with one scale a row only"
    elif weight.group % BLOCK:
        return f"XNNPACK takes groups of a multiple of {BLOCK} columns only, not {weight.group}"
    else:
        scale_bits = BLOCK_SCALE_BITS
    return weight.bits * weight.shape[0] * padded_width(weight) + scale_bits * weight.scales.numel()


def price_lookup(weight: Weight) -> int | str:
    """Bits of a leaf whose rows are looked up, or why there is no kernel for it."""
    match weight:
        case Dense():
            return DENSE_BITS * weight.values.numel()
        case LowBit():
            if weight.bits not in (2, 4, 8):
                return f"there is no {weight.bits}-bit lookup; widths that there are: 2, 4, 8"
            if not is_row_wise(weight) and weight.shape[1] % weight.group:
                return f"a lookup takes equal groups only, not {weight.group} of {weight.shape[1]} columns"
            if weight.shape[1] * weight.bits % 8:
                return f"a lookup takes whole bytes only, not {weight.shape[1]} columns of {weight.bits} bits"
            grids = 1 if weight.is_symmetric else 2
            return weight.bits * weight.codes.numel() + 32 * grids * weight.scales.numel()
        case Sparse():
            return "there is no n:m lookup"
        case _:
            return "not a leaf"


def price_tied(weight: Weight) -> int | str:
    """Bits of a leaf that is looked up and multiplies.

    A dense one is stored once: both operators read one constant. Codes are stored once too (`sharing`), unless XNNPACK
    needs padding that a lookup has no place for. Block scales are stored in both types.
    """
    if isinstance(weight, Dense):
        return DENSE_BITS * weight.values.numel()
    bits = price_product(weight), price_lookup(weight)
    refusals = [reason for reason in bits if isinstance(reason, str)]
    if refusals:
        return "; ".join(refusals)
    total = sum(int(part) for part in bits)
    return total - _shared_bits(weight) if isinstance(weight, LowBit) and is_shareable(weight) else total


def is_shareable(weight: LowBit) -> bool:
    """Whether a lookup can read the codes as XNNPACK keeps them."""
    return padded_width(weight) == weight.shape[1]


def shared_codes(weight: LowBit) -> Tensor:
    """A shareable weight's codes as XNNPACK keeps them: int8 [out, in], or uint8 [out, in / 2]."""
    packed = torch.frombuffer(bytearray(packed_for_product(weight)), dtype=torch.uint8).view(weight.shape[0], -1)
    return packed.view(torch.int8) if weight.bits == 8 else packed


def _shared_bits(weight: LowBit) -> int:
    scales = ROW_SCALE_BITS * weight.scales.numel() if is_row_wise(weight) else 0
    return weight.bits * weight.codes.numel() + scales


def in_digits(weight: Weight) -> Weight:
    """A tree whose leaves that XNNPACK lacks are sums of two that it has, where that is exact.

    Codes of more than 4 bits, or with whole zero points, are whole numbers v = c - z. A v from -136 to 119 is
    16 * high + low with both digits from -8 to 7: two 4-bit matrices with scales 16 s and s. That is 9 bits a weight at
    groups of 32, where the dense fold is 32.
    """
    match weight:
        case LowBit():
            return _digits(weight)
        case Sum():
            return Sum(tuple(in_digits(term) for term in weight.terms))
        case Product():
            return Product(in_digits(weight.left), in_digits(weight.right))
        case Shared():
            return Shared(in_digits(weight.rows), weight.labels)
        case _:
            return weight


def _digits(weight: LowBit) -> Weight:
    is_grouped = not is_row_wise(weight) and weight.group % BLOCK == 0
    is_narrow = weight.is_symmetric and weight.bits <= 4
    if not is_grouped or is_narrow:
        return weight
    values = whole_values(weight)
    if values is None:
        return weight
    low = (values + 8) % 16 - 8
    high = (values - low) // 16
    if not values.is_meta and (int(high.min()) < -8 or int(high.max()) > 7):
        return weight
    return Sum((_four_bits(high, weight.scales * 16, weight.group), _four_bits(low, weight.scales, weight.group)))


def whole_values(weight: LowBit) -> Tensor | None:
    """Codes minus zero points, [out, in], int16, or None where a zero point is not a whole number."""
    zeros = weight.zeros
    if not weight.has_whole_zeros if zeros.is_meta else bool((zeros != zeros.round()).any()):
        return None
    if zeros.shape != (1, 1):
        zeros = zeros.repeat_interleave(weight.group, dim=1)[:, : weight.shape[1]]
    return weight.codes.to(torch.int16) - zeros.to(torch.int16)


def _four_bits(values: Tensor, scales: Tensor, group: int) -> LowBit:
    return LowBit((values + 8).to(torch.uint8), scales, torch.full((1, 1), 8.0, device=values.device), 4, group)


def signed_codes(weight: LowBit) -> Tensor:
    """[out, padded width], int8: codes around 0, columns beyond the matrix 0, as XNNPACK's exporter takes them."""
    codes = weight.codes.to(torch.int16) - 2 ** (weight.bits - 1)
    return F.pad(codes, (0, padded_width(weight) - weight.shape[1])).to(torch.int8)


def stored_scales(weight: LowBit) -> Tensor:
    """Scales as XNNPACK keeps them: float32 [out], or [out, groups] rounded to bfloat16 (given as float32)."""
    if is_row_wise(weight):
        return weight.scales.float()[:, 0].contiguous()
    return weight.scales.float().to(torch.bfloat16).float()


def rounds_scales(weight: Weight) -> bool:
    """Whether a leaf's scales lose bits on the way; never known on the meta device."""
    if not isinstance(weight, LowBit) or is_row_wise(weight) or weight.scales.is_meta:
        return False
    return not torch.equal(stored_scales(weight), weight.scales.float())


def packed_for_product(weight: LowBit) -> bytes:
    """The codes as they lie in the file for XNNPACK: int8, or two a byte, the even column in the low nibble."""
    codes = signed_codes(weight)
    if weight.bits == 8:
        return codes.numpy().tobytes()
    unsigned = (codes + 8).to(torch.uint8)
    return (unsigned[:, ::2] | unsigned[:, 1::2] << 4).numpy().tobytes()


def packed_for_lookup(weight: LowBit) -> Tensor:
    """The codes as the embedding kernels read them.

    8 bits: int8 around 0. 4 bits: uint8, the even column in the high nibble. 2 bits: uint8, the first column lowest.
    """
    if weight.bits == 8:
        return (weight.codes.to(torch.int16) - 128).to(torch.int8)
    per_byte = 8 // weight.bits
    shifts = [4, 0] if weight.bits == 4 else [0, 2, 4, 6]
    columns = weight.codes.view(weight.shape[0], -1, per_byte)
    packed = torch.zeros(columns.shape[:2], dtype=torch.uint8)
    for place, shift in enumerate(shifts):
        packed |= columns[:, :, place] << shift
    return packed


def lookup_scales(weight: LowBit) -> tuple[Tensor, Tensor | None]:
    """Scales [out, groups], float32, and zero points around 0 of the same shape, or None where they are the middle."""
    scales = weight.scales.float().contiguous()
    if weight.is_symmetric:
        return scales, None
    return scales, (weight.zeros.float() - 2 ** (weight.bits - 1)).expand_as(scales).contiguous()
