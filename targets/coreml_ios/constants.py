"""Stored types and constants: bytes to arrays, and the arithmetic of the `constexpr` operations, checked.

Two generations of these operations share names: that of iOS 16 has flat bytes and a shape beside them, that of iOS 18
types under a byte. Their parameters tell them apart. What is decoded has the bits of coremltools' own
`materialized_val_inference` in the type that the operation declares: arithmetic is float32, and where numpy would
compute in float16, each step is rounded to it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.errors import ArtifactError

DEEPEST = 8  # constants made of constants: a scaled table, indexed, scaled, spread by a mask, scaled, cast
LARGEST = 2**29  # values that a table of vectors may make of fewer indices

CACHED = 3 * 2**16  # values, or packed bytes, that are worked on at a time; a multiple of 3 for fields across bytes

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
    Kind("fp16", 10, 1, 16, "<f2"), Kind("fp32", 11, 2, 32, "<f4"), Kind("fp64", 12, None, 64, "<f8"),
    Kind("bool", 1, None, 8, "?"), Kind("int64", 24, None, 64, "<i8"), Kind("uint64", 34, None, 64, "<u8"),
    Kind("int32", 23, 14, 32, "<i4"), Kind("uint32", 33, 15, 32, "<u4"), Kind("int16", 22, 6, 16, "<i2"),
    Kind("uint16", 32, 7, 16, "<u2"), Kind("int8", 21, 4, 8, "i1"), Kind("uint8", 31, 3, 8, "u1"),
    Kind("int4", 25, 8, 4, "i1"), Kind("uint4", 35, 11, 4, "u1"), Kind("uint6", 38, 13, 6, "u1"),
    Kind("uint3", 39, 12, 3, "u1"), Kind("uint2", 36, 10, 2, "u1"), Kind("uint1", 37, 9, 1, "u1"),
)  # fmt: skip
BY_NUMBER = {kind.program: kind for kind in KINDS}
BY_NAME = {kind.name: kind for kind in KINDS}
PACKED = {2**bits: BY_NAME[f"uint{bits}"] for bits in (1, 2, 4, 6, 8)}  # entries of a table of iOS 16 -> its indices
NUMBERS = ("int8", "uint8", "float16", "float32")  # numpy's types of what is scaled


@dataclass(frozen=True)
class Stored:
    """An array in a file, unpacked when it is read: its bytes there (mapped), its type, its shape.

    Where the bytes are of one value, it stands for all.
    """

    data: Array
    kind: Kind
    shape: tuple[int, ...]

    @property
    def array(self) -> Array:
        """The values."""
        count = math.prod(self.shape)
        if self.bytes == packed_bytes(self.kind, count):
            return unpack(self.data, self.kind, count).reshape(self.shape)
        return np.broadcast_to(unpack(self.data, self.kind, 1)[0], self.shape)

    @property
    def type(self) -> str:
        """MIL's name of its type."""
        return self.kind.name

    @property
    def bytes(self) -> int:
        """Bytes that it takes in the file."""
        return len(self.data)


@dataclass(frozen=True)
class Constant:
    """A constant: an array, or an operation that decodes others when the model is loaded.

    Args:
        operation: `const`, or one of the `constexpr_*`.
        inputs: By parameter (`val`, `data`, `scale`, ...): an array, a word, or a constant and which of its outputs.

    Raises:
        ArtifactError: constants are made of constants without end.
    """

    operation: str
    inputs: Mapping[str, Stored | str | tuple[Constant, int]]

    def __post_init__(self) -> None:
        _require(self._depth <= DEEPEST, f"constants are made of constants more than {DEEPEST} deep")

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
        return self.output(-1)

    def output(self, index: int) -> Array:
        """One of the outputs: of an operation on sparse constants the mask, then the kept values.

        Raises:
            ArtifactError: the parts do not fit together, or there is no such output.
        """
        with np.errstate(all="ignore"):  # a damaged scale may be infinite: the comparison says so
            return self._output(index, {})

    @cached_property
    def bytes(self) -> int:
        """Bytes in the file of everything that it is decoded from."""
        stored = sum(value.bytes for value in self.inputs.values() if isinstance(value, Stored))
        return stored + sum(inner.bytes for inner in self._inner)

    @cached_property
    def _depth(self) -> int:
        return 1 + max((inner._depth for inner in self._inner), default=0)

    @property
    def _inner(self) -> Iterable[Constant]:
        return (value[0] for value in self.inputs.values() if isinstance(value, tuple))

    def _output(self, index: int, done: dict[int, tuple[Array, ...]]) -> Array:
        """`done`: outputs by constant, so that what is read twice is decoded once."""
        if id(self) not in done:
            given = {name: _value(value, done) for name, value in self.inputs.items()}
            done[id(self)] = _decoder(self.operation, frozenset(given))(**given)
        outputs = done[id(self)]
        _require(index < len(outputs), f"{self.operation} has {len(outputs)} outputs")
        return outputs[index]


def _value(value: Stored | str | tuple[Constant, int], done: dict[int, tuple[Array, ...]]) -> Array | str:
    if isinstance(value, tuple):
        return value[0]._output(value[1], done)
    return value if isinstance(value, str) else value.array


# ---- bytes to values -------------------------------------------------------------------------------------------


def packed_bytes(kind: Kind, count: int) -> int:
    """Bytes that `count` values take in a file."""
    return -(-count * kind.bits // 8)


def unpack(data: Array, kind: Kind, count: int) -> Array:
    """Bytes to values: a bit stream for types under a byte, sign-extended for int4; else a view."""
    if kind.name == "bool":
        return np.asarray(data != 0)
    if kind.bits >= 8:
        return data.view(np.dtype(kind.numpy))
    if kind.bits == 1:
        return np.unpackbits(data, bitorder="little", count=count)
    values = np.empty(count, kind.numpy)
    for start in range(0, len(data), CACHED):
        fields = _fields(data[start : start + CACHED], kind.bits)
        if kind.name == "int4":
            fields = (fields ^ 8).view(np.int8) - np.int8(8)
        at = start * 8 // kind.bits
        values[at : at + len(fields)] = fields[: count - at]
    return values


def _fields(data: Array, bits: int) -> Array:
    """A stream of fields of `bits`, each to a byte of its own: [bytes] to [values].

    A word holds what one byte (2 or 4 bits) or three (3 or 6 bits) become. Its upper half is moved up to the middle of
    the word, then the upper half of each half to the middle of that, until every field is alone in its byte.
    """
    unit = math.lcm(bits, 8) // 8  # bytes
    values = 8 * unit // bits
    whole = np.pad(data, (0, -len(data) % unit)) if len(data) % unit else data
    units = whole.reshape(-1, unit)  # [words, unit]
    words = units[:, 0].astype(f"<u{values}")
    for place in range(1, unit):
        words |= units[:, place].astype(words.dtype) << (8 * place)
    width, space = 8 * unit, 8 * values  # of a field, and from one field to the next
    while width > bits:
        width, space = width // 2, space // 2
        lower = sum((2**width - 1) << at for at in range(0, 8 * values, 2 * space))
        words = (words & lower) | ((words << (space - width)) & (lower << space))
    fields: Array = words.view(np.uint8)
    return fields


# ---- the operations of iOS 18 ----------------------------------------------------------------------------------


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> tuple[Array]:
    """`scale * (data - offset)`, a block at a time, in the type of `scale`."""
    _require(data.ndim >= 1, "data of no dimension")
    _require_blocks(data.shape, scale.shape, "scales")
    if offset is not None:
        _require(offset.shape == scale.shape, f"offsets are {offset.shape}, scales {scale.shape}")
        _require_numbers(offset, scale)
    _require_numbers(data, scale)
    dense = np.empty(data.shape, scale.dtype)
    for rows, places in _slices(data.shape, scale.shape):
        dense[rows] = _scaled(data[rows], scale[places], None if offset is None else offset[places])
    return (dense,)


def _scaled(data: Array, scale: Array, offset: Array | None) -> Array:
    values = _rounded(data.astype("f4", order="C"), scale.dtype, exact=data.dtype.itemsize == 1)
    if offset is not None:
        blocks = _blocks(values, scale.shape)
        blocks -= _per_block(offset)
        whole = data.dtype.itemsize == offset.dtype.itemsize == 1
        values = _rounded(values, np.result_type(scale, offset), exact=whole)
    blocks = _blocks(values, scale.shape)
    blocks *= _per_block(scale)
    return _narrow(values, scale.dtype)


def _slices(shape: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Blocks of the first axis that fit the processor's cache: where in the data, where in the grid.

    They are whole, but where one block is all of the axis.
    """
    size = shape[0] // counts[0] if counts[0] > 1 else 1
    count = shape[0] // size
    step = max(1, CACHED * count // math.prod(shape))
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield slice(start * size, stop * size), slice(start, stop) if counts[0] > 1 else slice(None)


def lut_to_dense(indices: Array, lut: Array, vector_axis: Array | None = None) -> tuple[Array]:
    """Indices through the table of their block; an entry that is a vector lies along `vector_axis`."""
    _require(lut.ndim == indices.ndim + 2 > 2, f"a table {lut.shape} for indices {indices.shape}")
    *tables, entries, width = lut.shape
    _require_blocks(indices.shape, tables, "tables")
    _require(indices.dtype == np.uint8, f"indices are {indices.dtype}")
    _require(width >= 1 and int(indices.max()) < entries, "an index is outside its table")
    _require(indices.size * width <= LARGEST, f"{indices.size} vectors of {width} are more than {LARGEST} values")
    axis = 0 if width == 1 else _axis(vector_axis, indices.ndim)
    found = np.empty((*indices.shape, width), lut.dtype)
    for rows, places in _slices(indices.shape, tables):
        found[rows] = _looked_up(indices[rows], lut[places])
    shape = [size * width if place == axis else size for place, size in enumerate(indices.shape)]
    return (np.moveaxis(found, -1, axis + 1).reshape(shape),)


def _looked_up(indices: Array, lut: Array) -> Array:
    """[...] through [tables ..., entries, width] to [..., width]."""
    *tables, entries, width = lut.shape
    places = indices.astype(np.intp, order="C")
    if math.prod(tables) > 1:
        blocks = _blocks(places, tables)
        blocks += _per_block(np.arange(0, math.prod(tables) * entries, entries).reshape(tables), np.intp)
    return np.take(lut.reshape(-1, width), places, axis=0, mode="clip")


def sparse_to_dense(nonzero_data: Array, mask: Array) -> tuple[Array]:
    """Kept values to where the mask has ones, zero elsewhere."""
    places = np.flatnonzero(mask != 0)  # [kept]
    _require(
        nonzero_data.ndim == 1 and len(places) == len(nonzero_data),
        f"{nonzero_data.shape} kept values for {len(places)} ones in the mask",
    )
    dense = np.zeros(mask.size, nonzero_data.dtype)
    dense[places] = nonzero_data
    return (dense.reshape(mask.shape),)


def lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Array | None = None
) -> tuple[Array, Array]:
    """The mask, and kept indices through the table of their block; a vector's mask is as wide as the vector."""
    (indices,) = sparse_to_dense(indices_nonzero_data, indices_mask)
    (dense,) = lut_to_dense(indices, lut, vector_axis)
    width = lut.shape[-1]
    mask = indices_mask if width == 1 else np.repeat(indices_mask, width, _axis(vector_axis, indices.ndim))
    return mask, _kept(dense, mask)


def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """The mask, and kept values scaled by the block that they stand in."""
    (data,) = sparse_to_dense(nonzero_data, data_mask)
    (dense,) = blockwise_shift_scale(data, scale, offset)
    return data_mask, _kept(dense, data_mask)


def cast(source_val: Array, output_dtype: str) -> tuple[Array]:
    """float16 as float32."""
    _require(source_val.dtype == np.float16 and output_dtype == "fp32", f"{source_val.dtype} as {output_dtype}")
    return (_wide(source_val),)


# ---- the operations of iOS 16 ----------------------------------------------------------------------------------


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> tuple[Array]:
    """`scale * (data - zero_point)` in float32, then in the type of `scale`: one for all, or one a place on `axis`."""
    _require_numbers(quantized_data, scale)
    along = _axis(axis, quantized_data.ndim)
    values = quantized_data.astype("f4", order="C")
    values -= _along(zero_point, values.shape, along, "zero points")
    values *= _along(scale, values.shape, along, "scales")
    return (_narrow(values, scale.dtype),)


def packed_lut_to_dense(indices: Array, lut: Array, shape: Array) -> tuple[Array]:
    """Packed indices through one table; their width is that which numbers its entries."""
    _require(lut.ndim == 1 and lut.size in PACKED, f"a table {lut.shape}; sizes that it may have: {list(PACKED)}")
    return (np.take(lut, _unpacked(indices, PACKED[lut.size], shape, "indices"), mode="clip"),)


def packed_sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array) -> tuple[Array]:
    """Kept values to where a packed mask has ones, zero elsewhere."""
    return sparse_to_dense(nonzero_data, _unpacked(mask, BY_NAME["uint1"], shape, "bytes of the mask"))


def _unpacked(data: Array, kind: Kind, shape: Array, what: str) -> Array:
    """Flat bytes to values of a shape that stands beside them."""
    _require(shape.ndim == 1 and shape.dtype.kind in "iu" and shape.size <= 16, f"a shape of {shape.shape}")
    sizes = [int(size) for size in shape]
    count = math.prod(sizes)
    fits = min(sizes, default=1) >= 1 and packed_bytes(kind, count) == data.size
    _require(data.ndim == 1 and data.dtype == np.uint8 and fits, f"{data.shape} {what} for a shape of {sizes}")
    spare = 8 * data.size - count * kind.bits  # bits
    _require(spare == 0 or int(data[-1]) >> (8 - spare) == 0, f"bits beyond the last of {count} {what} are set")
    return unpack(data, kind, count).reshape(sizes)


# ---- which of them ---------------------------------------------------------------------------------------------

Decoder = Callable[..., tuple[Array, ...]]
DECODERS: dict[str, Sequence[Decoder]] = {
    "const": (lambda val: (val,),),
    "constexpr_affine_dequantize": (affine_dequantize,),
    "constexpr_blockwise_shift_scale": (blockwise_shift_scale,),
    "constexpr_cast": (cast,),
    "constexpr_lut_to_dense": (lut_to_dense, packed_lut_to_dense),
    "constexpr_lut_to_sparse": (lut_to_sparse,),
    "constexpr_sparse_blockwise_shift_scale": (sparse_blockwise_shift_scale,),
    "constexpr_sparse_to_dense": (sparse_to_dense, packed_sparse_to_dense),
}


def takes(operation: str, parameters: Iterable[str]) -> bool:
    """Whether an operation has these parameters: all that it needs, and none that it does not know."""
    return any(_binds(decoder, frozenset(parameters)) for decoder in DECODERS[operation])


@cache
def _decoder(operation: str, parameters: frozenset[str]) -> Decoder:
    found = [decoder for decoder in DECODERS[operation] if _binds(decoder, parameters)]
    _require(bool(found), f"{operation} is given {', '.join(sorted(parameters))}")
    return found[0]


def _binds(decoder: Decoder, parameters: frozenset[str]) -> bool:
    try:
        inspect.signature(decoder).bind(**dict.fromkeys(parameters))
    except TypeError:
        return False
    return True


# ---- blocks and types ------------------------------------------------------------------------------------------


def _blocks(values: Array, counts: Sequence[int]) -> Array:
    """A view [count, size of a block, ...] of values [count * size, ...], which lie in one piece."""
    return values.reshape([part for size, count in zip(values.shape, counts) for part in (count, size // count)])


def _per_block(grid: Array, dtype: Any = np.float32) -> Array:
    """A value a block, [count, 1, ...], to go with `_blocks`."""
    return grid.reshape([part for count in grid.shape for part in (count, 1)]).astype(dtype)


def _along(values: Array, shape: tuple[int, ...], axis: int, what: str) -> Array:
    """One value, or one for each place on an axis, to go with an array of `shape`."""
    _require(values.shape in ((), (shape[axis],)), f"{what} are {values.shape}, data {shape} along {axis}")
    wide = values.astype(np.float32)
    return wide if values.ndim == 0 else wide.reshape([-1 if place == axis else 1 for place in range(len(shape))])


def _kept(dense: Array, mask: Array) -> Array:
    return np.take(dense, np.flatnonzero(mask != 0))


def _rounded(values: Array, dtype: Any, *, exact: bool) -> Array:
    """float32 values as numpy would have them after a step in `dtype`, in float32 again; `exact`: they are anyway."""
    return values if exact or dtype != np.float16 else _wide(_narrow(values, dtype))


def _narrow(values: Array, dtype: Any) -> Array:
    """float32 as float16, to the nearest; torch does it several times as fast as numpy."""
    return torch.from_numpy(values).half().numpy() if dtype == np.float16 else values


def _wide(values: Array) -> Array:
    return values.astype(np.float32)


def _axis(axis: Array | None, dimensions: int) -> int:
    _require(axis is not None and axis.size == 1 and axis.dtype.kind in "iu", "an axis is missing, or no whole number")
    place = int(axis.reshape(())) if axis is not None else 0
    _require(-dimensions <= place < dimensions, f"axis {place} of {dimensions} dimensions")
    return place % dimensions


def _require_blocks(shape: Sequence[int], counts: Sequence[int], what: str) -> None:
    """The number of blocks along each axis must divide it."""
    _require(len(shape) == len(counts), f"{what} are {tuple(counts)}, data {tuple(shape)}")
    for size, count in zip(shape, counts):
        fits = 1 <= count <= size and size % count == 0
        _require(fits, f"{count} {what} do not divide {size} values")


def _require_numbers(data: Array, scale: Array) -> None:
    fits = data.dtype.name in NUMBERS and scale.dtype.name in NUMBERS[2:]
    _require(fits, f"{data.dtype} values with scales of {scale.dtype}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ArtifactError(f"a constant whose parts do not fit: {message}")
