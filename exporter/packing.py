"""Named byte layouts: exact pack/unpack pairs.

Little-endian bit stream: value i takes bits [i * bits, (i + 1) * bits) of its row, low bit first, crossing bytes where
`bits` does not divide 8. Rows start at a byte border. This is the order of ONNX Runtime's MatMulNBits blobs (2, 4, 8
bits) and of Core ML's weight.bin (1, 2, 3, 4, 6, 8 bits), so one pair serves both.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from exporter.errors import WeightError

Bytes = npt.NDArray[np.uint8]


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of `columns` values of `bits` bits takes."""
    return -(-columns * bits // 8)


def check_width(width: int, bits: int, columns: int) -> None:
    """Refuse a packed row of another width than `columns` values take.

    Raises:
        WeightError: says how many bytes they take.
    """
    if width != packed_width(columns, bits):
        raise WeightError(f"{columns} values of {bits} bits take {packed_width(columns, bits)} bytes, not {width}")


def pack(values: Bytes, bits: int) -> Bytes:
    """Pack small integers, each row into whole bytes.

    Args:
        values: [..., columns], uint8, each under 2**bits.
        bits: 1..8.

    Returns:
        [..., packed_width(columns, bits)], uint8; unused high bits of a row's last byte are 0.

    Raises:
        WeightError: a value does not fit.
    """
    if values.size and int(values.max()) >> bits:
        raise WeightError(f"value {int(values.max())} does not fit {bits} bits")
    planes = np.unpackbits(values[..., None], axis=-1, count=bits, bitorder="little")  # [..., columns, bits]
    stream = planes.reshape(*values.shape[:-1], values.shape[-1] * bits)
    return np.packbits(stream, axis=-1, bitorder="little")


def unpack(packed: Bytes, bits: int, columns: int) -> Bytes:
    """The exact inverse of `pack`.

    Args:
        packed: [..., packed_width(columns, bits)], uint8.
        bits: 1..8.
        columns: Values in a row.

    Returns:
        [..., columns], uint8.

    Raises:
        WeightError: the rows have not the bytes that `columns` values take.
    """
    check_width(packed.shape[-1], bits, columns)
    stream = np.unpackbits(packed, axis=-1, count=columns * bits, bitorder="little")
    planes = stream.reshape(*packed.shape[:-1], columns, bits)
    return np.packbits(planes, axis=-1, bitorder="little")[..., 0]
