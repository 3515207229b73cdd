"""Stored types and constants: bytes to arrays, and the arithmetic of the `constexpr` operations, checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import ArtifactError

Array = NDArray[Any]


@dataclass(frozen=True)
class Kind:
    """A stored type: MIL's name, its number in a program and in weight.bin (None: never there), bits, numpy's type."""

    name: str
    program: int
    blob: int | None
    bits: int
    numpy: str


KINDS = (
    Kind("fp16", 10, 1, 16, "<f2"), Kind("fp32", 11, 2, 32, "<f4"), Kind("bool", 1, None, 8, "?"),
    Kind("int32", 23, 14, 32, "<i4"), Kind("uint32", 33, 15, 32, "<u4"), Kind("int16", 22, 6, 16, "<i2"),
    Kind("uint16", 32, 7, 16, "<u2"), Kind("int8", 21, 4, 8, "i1"), Kind("uint8", 31, 3, 8, "u1"),
    Kind("int4", 25, 8, 4, "i1"), Kind("uint4", 35, 11, 4, "u1"), Kind("uint6", 38, 13, 6, "u1"),
    Kind("uint3", 39, 12, 3, "u1"), Kind("uint2", 36, 10, 2, "u1"), Kind("uint1", 37, 9, 1, "u1"),
)  # fmt: skip
BY_NUMBER = {kind.program: kind for kind in KINDS}
NAMES = {kind.program: kind.name for kind in KINDS}


@dataclass(frozen=True)
class Stored:
    """An array in a file: its values, its type's name, and the bytes that it takes there."""

    array: Array
    type: str
    bytes: int


@dataclass(frozen=True)
class Constant:
    """A constant: an array, or an operation that decodes others when the model is loaded.

    Args:
        operation: `const`, or one of the `constexpr_*`.
        inputs: By parameter (`val`, `data`, `scale`, ...): an array, or a constant and which of its outputs.
    """

    operation: str
    inputs: Mapping[str, Stored | tuple[Constant, int]]

    def stored(self, name: str) -> Stored | None:
        """An input that is an array, or None where there is none of that name."""
        found = self.inputs.get(name)
        return found if isinstance(found, Stored) else None

    def inner(self, name: str) -> Constant | None:
        """An input that is itself a constant to decode, or None."""
        found = self.inputs.get(name)
        return found[0] if isinstance(found, tuple) else None

    def decode(self) -> Array:
        """The values that the model computes with.

        Raises:
            ArtifactError: the parts do not fit together.
        """
        with np.errstate(all="ignore"):  # a damaged scale may be infinite: the comparison says so
            return self._outputs()[-1]

    def _outputs(self) -> tuple[Array, ...]:
        return DECODERS[self.operation](**{name: self._array(name) for name in self.inputs})

    def _array(self, name: str) -> Array:
        found = self.inputs[name]
        if isinstance(found, Stored):
            return found.array
        outputs = found[0]._outputs()
        _require(found[1] < len(outputs), f"{found[0].operation} has {len(outputs)} outputs")
        return outputs[found[1]]


def unpack(data: Array, kind: Kind, count: int) -> Array:
    """Bytes to values: a bit stream for types under a byte, sign-extended for int4."""
    if kind.bits >= 8:
        return data.view(np.dtype(kind.numpy))
    bits = np.unpackbits(data, bitorder="little", count=count * kind.bits).reshape(count, kind.bits)
    values = np.packbits(bits, axis=1, bitorder="little").reshape(count)
    is_negative = kind.name == "int4"
    return (values ^ 8).astype(np.int8) - np.int8(8) if is_negative else values


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> tuple[Array]:
    """`scale * (data - offset)`, a block at a time, in the type of `scale`."""
    values = data.astype(scale.dtype)
    if offset is not None:
        _require(offset.shape == scale.shape, f"offsets are {offset.shape}, scales {scale.shape}")
        values = values - _spread(offset, data.shape, "offsets").astype(scale.dtype)
    return (_spread(scale, data.shape, "scales") * values,)


def lut_to_dense(indices: Array, lut: Array, vector_axis: Array | None = None) -> tuple[Array]:
    """Indices through the table of their block."""
    _require(vector_axis is None and lut.shape[-1:] == (1,), "tables of vectors are not read here")
    _require(lut.ndim == indices.ndim + 2 and indices.ndim == 2, f"a table {lut.shape} for indices {indices.shape}")
    _require(bool(indices.size == 0 or int(indices.max()) < lut.shape[2]), "an index is outside its table")
    rows, columns = (np.arange(size) // (size // _parts(size, count, "tables"))
                     for size, count in zip(indices.shape, lut.shape))  # fmt: skip
    return (lut[rows[:, None], columns[None, :], indices, 0],)


def sparse_to_dense(nonzero_data: Array, mask: Array) -> tuple[Array]:
    """Kept values to where the mask has ones, zero elsewhere."""
    places = mask.astype(bool)
    _require(
        nonzero_data.ndim == 1 and int(places.sum()) == len(nonzero_data),
        f"{nonzero_data.shape} kept values for {int(places.sum())} ones in the mask",
    )
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[places] = nonzero_data
    return (dense,)


def lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Array | None = None
) -> tuple[Array, Array]:
    """The mask, and kept indices through the table of their block."""
    (indices,) = sparse_to_dense(indices_nonzero_data, indices_mask)
    (dense,) = lut_to_dense(indices, lut, vector_axis)
    return indices_mask, dense[indices_mask.astype(bool)]


def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """The mask, and kept values scaled by the block that they stand in."""
    (data,) = sparse_to_dense(nonzero_data, data_mask)
    (dense,) = blockwise_shift_scale(data, scale, offset)
    return data_mask, dense[data_mask.astype(bool)]


DECODERS: dict[str, Callable[..., tuple[Array, ...]]] = {
    "const": lambda val: (val,),
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_sparse_to_dense": sparse_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
}


def takes(operation: str, parameters: Mapping[str, object]) -> bool:
    """Whether an operation has these parameters: all that it needs, and none that it does not know."""
    try:
        inspect.signature(DECODERS[operation]).bind(**parameters)
    except TypeError:
        return False
    return True


def _spread(grid: Array, shape: tuple[int, ...], what: str) -> Array:
    """A value per block to a value per place."""
    _require(grid.ndim == len(shape), f"{what} are {grid.shape}, data {shape}")
    for axis, (size, count) in enumerate(zip(shape, grid.shape)):
        grid = np.repeat(grid, size // _parts(size, count, what), axis=axis)
    return grid


def _parts(size: int, count: int, what: str) -> int:
    """The number of blocks along an axis, which must divide it."""
    _require(count >= 1 and size % count == 0 and size >= count, f"{count} {what} do not divide {size} values")
    return count


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ArtifactError(f"a constant whose parts do not fit: {message}")
