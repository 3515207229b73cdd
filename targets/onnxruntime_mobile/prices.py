"""What a leaf costs in ONNX Runtime's CPU operators, or why they cannot take it; and how its parts are laid out."""

from __future__ import annotations

import torch

from exporter import equivalents
from exporter.artifact import Decision
from exporter.packing import packed_width
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, Weight, describe

BLOCKS = {2: (32, 64, 128), 4: (16, 32, 64, 128, 256), 8: (16, 32, 64, 128, 256)}  # bits: block sizes with fast kernels


def padded_columns(weight: LowBit) -> int:
    """Codes stored in a row: whole blocks."""
    return weight.groups * weight.group


def price(weight: Weight) -> int | str:
    """Bits of a linear's leaf in the data file, or why it cannot be one.

    Codes are padded to whole blocks, scales are float32. A symmetric zero point takes nothing, whole ones are packed
    like codes. Fractional ones become float32 shifts, one per group; a single one is an attribute and takes nothing.
    """
    match weight:
        case Dense():
            return 32 * weight.shape[0] * weight.shape[1]
        case Sparse():
            return "ONNX Runtime has no N:M operator on CPU"
        case LowBit():
            return _refusal(weight) or weight.shape[0] * _row_bits(weight)
        case _:
            return f"{describe(weight)} is no leaf"


def embedding_price(weight: Weight) -> int | str:
    """Bits of an embedding's leaf (its head's too, where tied), or why rows cannot be looked up in it."""
    if isinstance(weight, LowBit) and not weight.has_whole_zeros:
        return "GatherBlockQuantized takes whole zero points only"
    return price(weight)


def decide(weight: Weight, site: str, is_embedding: bool) -> tuple[Weight, Decision]:
    """What is stored for a site, and why."""
    if not is_embedding:
        return equivalents.decide(weight, site, price)
    if not isinstance(weight, Sum | Product | Shared):
        return equivalents.decide(weight, site, embedding_price)
    dense, decision = equivalents.decide(Dense(weight.dense(torch.float32)), site, embedding_price)
    reason = "rows of an embedding are looked up in codes or floats, never in a product, sum or shared rows"
    told = {"tree": describe(weight), "native": False, "reason": f"stored as {describe(dense)}: {reason}"}
    return dense, decision.model_copy(update=told)


def _refusal(weight: LowBit) -> str:
    """Why MatMulNBits cannot take a weight, or the empty string."""
    blocks = BLOCKS.get(weight.bits)
    if blocks is None:
        widths = ", ".join(str(bits) for bits in BLOCKS)
        return f"{weight.bits} bits is not a width that MatMulNBits takes; widths that it does: {widths}"
    if weight.group in blocks:
        return ""
    sizes = ", ".join(str(size) for size in blocks)
    return f"MatMulNBits has no fast {weight.bits}-bit kernel for blocks of {weight.group}; sizes with one: {sizes}"


def _row_bits(weight: LowBit) -> int:
    codes, scales = padded_columns(weight) * weight.bits, 32 * weight.groups
    if weight.is_symmetric:
        return codes + scales
    if weight.has_whole_zeros:
        return codes + scales + 8 * packed_width(weight.groups, weight.bits)
    return codes + scales + (0 if weight.zeros.shape == (1, 1) else 32 * weight.groups)
