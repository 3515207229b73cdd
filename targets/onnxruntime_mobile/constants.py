"""The data file: where every constant of a graph lies, known from shapes alone, and its bytes when they are written.

Two constants of different shapes may share one place: a tied low-bit embedding is a table for the lookup and blocks
for the product, and the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from exporter.packing import pack, packed_width
from exporter.weights import LowBit
from targets.onnxruntime_mobile.prices import padded_columns

MODEL, DATA = "model.onnx", "model.onnx.data"
ALIGNMENT = 64  # bytes: a cache line, and the widest vector load; the runtime maps from any page
ROWS_AT_A_TIME = 2**22  # numbers

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Blob:
    """Bytes in the data file.

    Args:
        offset, length: Bytes.
        arrays: Gives the content, a piece at a time.
    """

    offset: int
    length: int
    arrays: Callable[[], Iterator[Array]]


class Constants:
    """The constants of one graph, in the order in which they were asked for."""

    def __init__(self) -> None:
        self.values: dict[str, ir.Value] = {}
        self.blobs: dict[str, Blob] = {}
        self.size = 0  # bytes of the data file

    def floats(self, name: str, tensor: Tensor) -> ir.Value:
        """A float32 constant of a tensor's own shape."""
        return self._value(name, ir.DataType.FLOAT, tuple(tensor.shape), name, lambda: _floats(tensor))

    def indices(self, name: str, tensor: Tensor) -> ir.Value:
        """An int32 constant of a tensor's own shape."""
        return self._value(name, ir.DataType.INT32, tuple(tensor.shape), name, lambda: iter([_int32(tensor)]))

    def code_blocks(self, name: str, weight: LowBit) -> ir.Value:
        """Packed codes as MatMulNBits has them: uint8 [out, blocks, bytes of a block]."""
        shape = (weight.shape[0], weight.groups, packed_width(weight.group, weight.bits))
        return self._codes(f"{name}.codes", shape, name, weight)

    def code_rows(self, name: str, weight: LowBit) -> ir.Value:
        """The same bytes as GatherBlockQuantized has them: uint8 [rows, bytes of a row]."""
        shape = (weight.shape[0], packed_width(padded_columns(weight), weight.bits))
        return self._codes(f"{name}.rows", shape, name, weight)

    def scales(self, name: str, weight: LowBit) -> ir.Value:
        """Scales, float32 [out, blocks]."""
        return self.floats(f"{name}.scales", weight.scales)

    def zeros(self, name: str, weight: LowBit) -> ir.Value:
        """Whole zero points packed like codes: uint8 [out, bytes of a row]."""
        shape = (weight.shape[0], packed_width(weight.groups, weight.bits))
        return self._value(f"{name}.zeros", ir.DataType.UINT8, shape, f"{name}.zeros", lambda: _zeros(weight))

    def shifts(self, name: str, weight: LowBit) -> ir.Value:
        """What fractional zero points add to each column of a group: float32 [out, blocks]."""
        shape = (weight.shape[0], weight.groups)
        return self._value(
            f"{name}.shifts", ir.DataType.FLOAT, shape, f"{name}.shifts", lambda: _floats(shifts(weight))
        )

    def write(self, path: Path) -> None:
        """Write the data file."""
        with path.open("wb") as stream:
            for blob in self.blobs.values():
                stream.write(bytes(blob.offset - stream.tell()))
                for array in blob.arrays():
                    stream.write(np.ascontiguousarray(array).data)

    def _codes(self, value: str, shape: tuple[int, ...], name: str, weight: LowBit) -> ir.Value:
        return self._value(value, ir.DataType.UINT8, shape, f"{name}.codes", lambda: _codes(weight))

    def _value(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], key: str, arrays: Callable[[], Iterator[Array]]
    ) -> ir.Value:
        """A constant that lies at `key`'s place in the data file."""
        if name not in self.values:
            blob = self._blob(key, math.prod(shape) * int(dtype.itemsize), arrays)
            tensor = ir.ExternalTensor(DATA, blob.offset, blob.length, dtype, shape=ir.Shape(shape), name=name)
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
            self.values[name] = value
        return self.values[name]

    def _blob(self, key: str, length: int, arrays: Callable[[], Iterator[Array]]) -> Blob:
        if key not in self.blobs:
            offset = -(-self.size // ALIGNMENT) * ALIGNMENT
            self.blobs[key] = Blob(offset, length, arrays)
            self.size = offset + length
        return self.blobs[key]


def shifts(weight: LowBit) -> Tensor:
    """`scales * (middle - zeros)`, [out, groups]: the runtime takes codes around the middle; this is the rest."""
    return weight.scales.float() * (2.0 ** (weight.bits - 1) - weight.zeros.float())


def _row_slices(rows: int, width: int) -> Iterator[slice]:
    step = max(1, ROWS_AT_A_TIME // max(1, width))
    return (slice(start, start + step) for start in range(0, rows, step))


def _floats(tensor: Tensor) -> Iterator[Array]:
    rows = tensor.detach().reshape(tensor.shape[0], -1)
    for piece in _row_slices(rows.shape[0], rows.shape[1]):
        yield rows[piece].to(torch.float32).numpy()


def _int32(tensor: Tensor) -> Array:
    return tensor.to(torch.int32).numpy()


def _codes(weight: LowBit) -> Iterator[Array]:
    """Codes in whole blocks; the columns that fill the last one up meet no activation, and are 0."""
    more = padded_columns(weight) - weight.shape[1]
    for piece in _row_slices(weight.shape[0], padded_columns(weight)):
        yield pack(np.pad(weight.codes[piece].numpy(), ((0, 0), (0, more))), weight.bits)


def _zeros(weight: LowBit) -> Iterator[Array]:
    grid = weight.zeros.to(torch.uint8).expand(weight.shape[0], weight.groups)
    yield pack(grid.contiguous().numpy(), weight.bits)
