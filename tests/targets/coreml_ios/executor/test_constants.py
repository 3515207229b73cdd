"""Constants: every `constexpr` operation gives coremltools' own result, bit for bit; what lies is refused by name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import ArtifactError
from targets.coreml_ios.backend import ct, mb, types
from targets.coreml_ios.constants import (
    BY_NAME,
    CACHED,
    DEEPEST,
    Array,
    Constant,
    Stored,
    blockwise_shift_scale,
    lut_to_dense,
    unpack,
)
from targets.coreml_ios.executor.machine import Constants
from targets.coreml_ios.executor.program import Place
from targets.coreml_ios.executor.values import Declared
from tests.targets.coreml_ios.executor.programs import runnable

Function = ct.converters.mil.mil.Function
Shape = tuple[int, ...]
SCALED, SCALES, TABLES = (
    ("int4", "uint4", "int8", "uint8", "fp16", "fp32"),
    ("fp16", "fp32"),
    ("int8", "uint8", "fp16", "fp32"),
)
WIDTHS = (1, 2, 3, 4, 6, 8)
EXTREMES = (0.0, -0.0, np.inf, -np.inf, np.nan, 65504.0, 2.0**-24)


# ---- coremltools' operations, and ours of the same parts -------------------------------------------------------


def typed(values: Any, name: str) -> Array:
    """An array of a type that numpy need not know."""
    return np.asarray(values).astype(types.nptype_from_builtin(types.string_to_builtin(name)))


def numbers(rng: np.random.Generator, name: str, shape: Shape) -> Array:
    """Any values of a type; floats of many sizes, and now and then one of the extremes."""
    if name.startswith("fp"):
        plain = rng.normal(size=shape) * 2.0 ** rng.integers(-12, 6, shape)
        return typed(np.where(rng.random(shape) < 0.1, rng.choice(EXTREMES, shape), plain), name)
    bits = BY_NAME[name].bits
    low = -(2 ** (bits - 1)) if name.startswith("int") else 0
    return typed(rng.integers(low, low + 2**bits, shape), name)


def packed(values: Array, name: str) -> Stored:
    """What a file has of an array: its values one after the other, low bit first."""
    kind, flat = BY_NAME[name], np.asarray(values)
    if kind.bits >= 8:
        return Stored(np.frombuffer(flat.astype(kind.numpy).tobytes(), np.uint8), kind, flat.shape)
    stream = sum((int(value) % 2**kind.bits) << (kind.bits * at) for at, value in enumerate(flat.reshape(-1)))
    data = np.frombuffer(stream.to_bytes(-(-flat.size * kind.bits // 8), "little"), np.uint8)
    return Stored(data, kind, flat.shape)


def ours(operation: Any) -> Constant:
    """A constant of ours for an operation of coremltools, with all that it is made of."""
    made: dict[str, Any] = {}
    for name, variable in operation.inputs.items():
        if variable.op.op_type.startswith("constexpr_"):
            made[name] = ours(variable.op), variable.op.outputs.index(variable)
        elif isinstance(variable.val, str):
            made[name] = variable.val
        else:
            made[name] = packed(variable.val, types.builtin_to_string(variable.dtype))
    return Constant(operation.op_type, made)


def require_equal(operation: Any, wanted: Any = None) -> None:
    """Every output of an operation is coremltools' own, in the type that it declares."""
    wanted = operation.materialized_val_inference() if wanted is None else wanted
    for place, (variable, array) in enumerate(
        zip(operation.outputs, wanted if isinstance(wanted, tuple) else (wanted,), strict=True)
    ):
        found = ours(operation).output(place)
        kind = BY_NAME[types.builtin_to_string(variable.dtype)].numpy
        assert found.dtype == np.dtype(kind)
        assert found.shape == tuple(variable.shape)
        assert np.array_equal(found, array.astype(kind), equal_nan=True), operation
        is_signed = found.dtype.kind == "f"
        same_signs = not is_signed or np.array_equal(np.signbit(found), np.signbit(array)) or np.isnan(found).any()
        assert same_signs, operation


@pytest.fixture
def ios18() -> Iterator[None]:
    with np.errstate(all="ignore"), Function({}, opset_version=ct.target.iOS18):
        yield


@pytest.fixture
def ios16() -> Iterator[None]:
    with np.errstate(all="ignore"), Function({}, opset_version=ct.target.iOS16):
        yield


def blocks(rng: np.random.Generator, rank: int) -> tuple[Shape, Shape]:
    """A shape, and a number of blocks along each axis."""
    counts, sizes = rng.integers(1, 4, rank), rng.integers(1, 4, rank)
    return tuple(counts * sizes), tuple(counts)


def offsets(data: str) -> tuple[str | None, ...]:
    return None, *dict.fromkeys((data, "fp16", "fp32"))


@pytest.mark.usefixtures("ios18")
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_blocks_are_scaled_as_coremltools_scales_them(rank: int) -> None:
    rng = np.random.default_rng(rank)
    for data, scale in itertools.product(SCALED, SCALES):
        for offset in offsets(data):
            shape, grid = blocks(rng, rank)
            parts = {"data": numbers(rng, data, shape), "scale": numbers(rng, scale, grid)}
            parts |= {"offset": numbers(rng, offset, grid)} if offset else {}
            require_equal(mb.constexpr_blockwise_shift_scale(**parts).op)


def tables(rng: np.random.Generator, bits: int, ranks: Sequence[int]) -> Iterator[tuple[Shape, dict[str, Any]]]:
    """For every type, rank, axis and width: a shape of indices, and a table with an axis for its vectors."""
    for rank, table, width in itertools.product(ranks, TABLES, (1, 2, 3, 4, 5, 8)):
        for axis in range(rank):
            shape, grid = blocks(rng, rank)
            given = int(rng.choice([axis, axis - rank]))
            lut = numbers(rng, table, (*grid, 2**bits, width))
            yield shape, {"lut": lut, **({"vector_axis": np.int32(given)} if width > 1 or axis else {})}


@pytest.mark.usefixtures("ios18")
@pytest.mark.parametrize("bits", WIDTHS)
def test_tables_are_read_as_coremltools_reads_them(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for shape, parts in tables(rng, bits, (1, 2, 3, 4, 5)):
        require_equal(mb.constexpr_lut_to_dense(indices=numbers(rng, f"uint{bits}", shape), **parts).op)


def a_mask(rng: np.random.Generator, shape: Shape) -> tuple[Array, Shape]:
    mask = typed(rng.random(shape) < rng.choice([0, 0.3, 0.7, 1]), "uint1")
    mask.flat[0] = 1  # coremltools has no array without values
    return mask, (int(mask.sum()),)


@pytest.mark.usefixtures("ios18")
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_kept_values_are_spread_and_scaled_as_coremltools_does(rank: int) -> None:
    rng = np.random.default_rng(rank)
    for data, scale in itertools.product(SCALED, SCALES):
        for offset in offsets(data):
            shape, grid = blocks(rng, rank)
            mask, kept = a_mask(rng, shape)
            values = numbers(rng, data, kept)
            require_equal(mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask).op)
            parts = {"offset": numbers(rng, offset, grid)} if offset else {}
            require_equal(mb.constexpr_sparse_blockwise_shift_scale(
                data_mask=mask, nonzero_data=values, scale=numbers(rng, scale, grid), **parts)[0].op)  # fmt: skip


@pytest.mark.usefixtures("ios18")
@pytest.mark.parametrize("bits", WIDTHS)
def test_kept_indices_are_read_through_tables_as_coremltools_reads_them(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for shape, parts in tables(rng, bits, (1, 2, 3, 4)):
        mask, kept = a_mask(rng, shape)
        indices = numbers(rng, f"uint{bits}", kept)
        require_equal(mb.constexpr_lut_to_sparse(indices_mask=mask, indices_nonzero_data=indices, **parts)[0].op)


@pytest.mark.usefixtures("ios18")
def test_constants_of_constants_are_what_coremltools_makes_step_by_step() -> None:
    rng = np.random.default_rng(0)
    indices, mask, kept = numbers(rng, "uint4", (6, 8)), *a_mask(rng, (6, 8))
    half = {"scale": numbers(rng, "fp16", (1, 1, 1, 1)), "offset": numbers(rng, "uint8", (1, 1, 1, 1))}
    table = mb.constexpr_blockwise_shift_scale(data=numbers(rng, "uint8", (1, 1, 16, 1)), **half)
    plain = table.op.materialized_val_inference()

    through = mb.constexpr_lut_to_dense(indices=indices, lut=table)
    require_equal(through.op, mb.constexpr_lut_to_dense(indices=indices, lut=plain).op.materialized_val_inference())

    codes = {"indices_mask": mask, "indices_nonzero_data": numbers(rng, "uint4", kept)}
    spread, values = mb.constexpr_lut_to_sparse(**codes, lut=numbers(rng, "int8", (2, 1, 16, 1)))
    scale = numbers(rng, "fp16", (6, 4))
    scaled = mb.constexpr_sparse_blockwise_shift_scale(data_mask=spread, nonzero_data=values, scale=scale)
    step = mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=mask, nonzero_data=values.op.materialized_val_inference()[1], scale=scale
    )
    wanted = mb.constexpr_sparse_to_dense(nonzero_data=step[1].op.materialized_val_inference()[1], mask=mask)
    dense = mb.constexpr_sparse_to_dense(nonzero_data=scaled[1], mask=scaled[0])
    plain = wanted.op.materialized_val_inference()
    require_equal(dense.op, plain)
    again, over = ({"data": data, "scale": scale[:, :1]} for data in (dense, plain))
    wanted = mb.constexpr_blockwise_shift_scale(**over).op.materialized_val_inference()
    require_equal(mb.constexpr_blockwise_shift_scale(**again).op, wanted)


@pytest.mark.usefixtures("ios16")
@pytest.mark.parametrize("scale", SCALES)
def test_whole_axes_are_scaled_as_coremltools_scales_them(scale: str) -> None:
    rng = np.random.default_rng(0)
    for data, zero, rank, vectors in itertools.product(("int8", "uint8"), (None, "fp32"), (1, 2, 4), range(4)):
        shape = tuple(rng.integers(1, 5, rank))
        axis = int(rng.integers(-rank, rank))
        grids = [(shape[axis],) if vectors & bit else () for bit in (1, 2)]
        require_equal(mb.constexpr_affine_dequantize(
            quantized_data=numbers(rng, data, shape), zero_point=numbers(rng, zero or data, grids[0]),
            scale=numbers(rng, scale, grids[1]), axis=np.int32(axis)).op)  # fmt: skip


@pytest.mark.usefixtures("ios16")
@pytest.mark.parametrize("table", TABLES)
def test_flat_indices_and_masks_are_read_as_coremltools_reads_them(table: str) -> None:
    rng = np.random.default_rng(0)
    for bits, rank in itertools.product((1, 2, 4, 6, 8), (1, 2, 4)):
        shape = tuple(rng.integers(1, 6, rank))
        sizes = typed(shape, "uint32")
        flat = packed(numbers(rng, f"uint{bits}", shape), f"uint{bits}").data
        require_equal(mb.constexpr_lut_to_dense(indices=flat, lut=numbers(rng, table, (2**bits,)), shape=sizes).op)
        mask, kept = a_mask(rng, shape)
        require_equal(mb.constexpr_sparse_to_dense(
            nonzero_data=numbers(rng, table, kept), mask=packed(mask, "uint1").data, shape=sizes).op)  # fmt: skip


@pytest.mark.parametrize("target", [ct.target.iOS16, ct.target.iOS18])
def test_casts_are_coremltools_own(target: Any) -> None:
    with Function({}, opset_version=target):
        require_equal(
            mb.constexpr_cast(source_val=numbers(np.random.default_rng(0), "fp16", (3, 5)), output_dtype="fp32").op
        )


def spread(values: Array, shape: Shape) -> Array:
    """A value for each block as a value for each place."""
    for axis, size in enumerate(shape):
        values = np.repeat(values, size // values.shape[axis], axis)
    return values


LARGE = [((3 * CACHED // 64, 128), (CACHED // 64, 2)), ((2, CACHED), (1, 4)), ((3 * CACHED,), (1,))]


@pytest.mark.parametrize(("shape", "grid"), LARGE)
def test_large_constants_are_decoded_in_pieces_as_in_one(shape: Shape, grid: Shape) -> None:
    rng = np.random.default_rng(0)
    data, scale, offset = numbers(rng, "int4", shape), numbers(rng, "fp16", grid), numbers(rng, "int4", grid)
    with np.errstate(all="ignore"):
        plain = spread(scale, shape) * data.astype(np.float16)
        moved = spread(scale, shape) * (data - spread(offset, shape)).astype(np.float16)
        assert np.array_equal(blockwise_shift_scale(data, scale)[0], plain, equal_nan=True)
        assert np.array_equal(blockwise_shift_scale(data, scale, offset)[0], moved, equal_nan=True)


@pytest.mark.parametrize(("shape", "grid"), LARGE)
def test_large_tables_are_read_in_pieces_as_in_one(shape: Shape, grid: Shape) -> None:
    rng = np.random.default_rng(0)
    indices, table = rng.integers(0, 4, shape).astype(np.uint8), numbers(rng, "fp16", (*grid, 4, 1))
    wanted = np.choose(indices, [spread(table[..., entry, 0], shape) for entry in range(4)])
    assert np.array_equal(lut_to_dense(indices, table)[0], wanted, equal_nan=True)


def test_large_streams_of_bits_are_unpacked_as_short_ones() -> None:
    rng = np.random.default_rng(0)
    for name in ("int4", "uint1", "uint2", "uint3", "uint6"):
        kind, count = BY_NAME[name], 8 * CACHED + 5
        data = rng.integers(0, 256, -(-count * kind.bits // 8)).astype(np.uint8)
        bits = np.unpackbits(data, bitorder="little", count=count * kind.bits).reshape(count, kind.bits)
        values = np.packbits(bits, axis=1, bitorder="little")[:, 0]
        signed = values.astype(np.int8) - 16 * (values > 7) if name == "int4" else values
        assert np.array_equal(unpack(data, kind, count), signed)


# ---- through a written package ---------------------------------------------------------------------------------


def newer(rng: np.random.Generator) -> list[Any]:
    """Every operation of iOS 18, short enough to stand in the program and long enough for the weight file."""
    made: list[Any] = []
    for shape, grid in [((2, 3), (1, 3)), ((24, 8), (3, 2))]:
        mask, kept = a_mask(rng, shape)
        scale = {"scale": numbers(rng, "fp16", grid)}
        made += [mb.constexpr_blockwise_shift_scale(data=numbers(rng, data, shape), **scale) for data in SCALED]
        for bits in WIDTHS:
            name, table = f"uint{bits}", numbers(rng, "fp32", (*grid, 2**bits, 1))
            vectors = numbers(rng, "int8", (*grid, 2**bits, 2))
            made.append(mb.constexpr_lut_to_dense(indices=numbers(rng, name, shape), lut=table))
            made.append(mb.constexpr_lut_to_dense(indices=numbers(rng, name, shape), lut=vectors, vector_axis=0))
            pair = mb.constexpr_lut_to_sparse(
                indices_mask=mask, indices_nonzero_data=numbers(rng, name, kept), lut=table
            )
            made.append(mb.constexpr_sparse_to_dense(nonzero_data=pair[1], mask=pair[0]))
        pair = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask, nonzero_data=numbers(rng, "int4", kept), **scale
        )
        made.append(mb.constexpr_sparse_to_dense(nonzero_data=pair[1], mask=pair[0]))
        made.append(mb.constexpr_cast(source_val=numbers(rng, "fp16", shape), output_dtype="fp32"))
    return made


def older(rng: np.random.Generator) -> list[Any]:
    """Every operation of iOS 16."""
    made: list[Any] = []
    for shape in [(2, 3), (24, 8)]:
        mask, kept = a_mask(rng, shape)
        sizes = typed(shape, "uint32")
        made.append(mb.constexpr_affine_dequantize(
            quantized_data=numbers(rng, "uint8", shape), zero_point=np.uint8(3),
            scale=numbers(rng, "fp16", shape[1:]), axis=-1))  # fmt: skip
        for bits in (1, 2, 4, 6, 8):
            flat = packed(numbers(rng, f"uint{bits}", shape), f"uint{bits}").data
            made.append(mb.constexpr_lut_to_dense(indices=flat, lut=numbers(rng, "fp16", (2**bits,)), shape=sizes))
        flat = packed(mask, "uint1").data
        made.append(mb.constexpr_sparse_to_dense(nonzero_data=numbers(rng, "fp32", kept), mask=flat, shape=sizes))
        made.append(mb.constexpr_cast(source_val=numbers(rng, "fp16", shape), output_dtype="fp32"))
    return made


@pytest.mark.parametrize(("opset", "make"), [(18, newer), (16, older)])
def test_constants_in_a_written_package_are_coremltools_own(opset: int, make: Any) -> None:
    made: list[Any] = []

    def program(x: Any) -> Any:
        made.extend(make(np.random.default_rng(0)))
        return [mb.identity(x=x), *(mb.cast(x=one, dtype="fp32", name=f"y{at}") for at, one in enumerate(made))]

    with np.errstate(all="ignore"):
        model = runnable(program, [mb.TensorSpec((1,))], opset)
        wanted = {f"y{at}": one.op.materialized_val_inference() for at, one in enumerate(made)}
    found = model.predict({"x": np.zeros(1, np.float32)})
    for name, array in wanted.items():
        assert np.array_equal(found[name], array.astype(np.float32), equal_nan=True), name


# ---- parts that do not fit -------------------------------------------------------------------------------------

BYTES = packed(np.arange(6).reshape(2, 3) % 4, "uint8")
ONES = packed(np.ones((2, 3)), "uint1")
HALF = packed(np.ones((1, 1)), "fp16")
TABLE = packed(np.zeros((1, 1, 4, 1)), "fp16")
SIXTEEN = packed(np.zeros(16), "fp16")
VECTORS = packed(np.zeros((1, 1, 4, 2)), "fp16")
EIGHT, ZERO = packed(np.zeros(8), "uint8"), packed(0, "int32")
LIES: list[tuple[str, dict[str, Any], str]] = [
    ("blockwise_shift_scale", {"data": BYTES, "scale": BYTES}, "uint8 values with scales of uint8"),
    ("blockwise_shift_scale", {"data": packed(1, "int8"), "scale": packed(1, "fp16")}, "data of no dimension"),
    ("blockwise_shift_scale", {"data": packed([[9]], "int32"), "scale": HALF}, "int32 values with scales of float16"),
    ("blockwise_shift_scale", {"data": packed(np.ones((0, 3)), "int8"), "scale": HALF}, "1 scales do not divide 0"),
    ("blockwise_shift_scale", {"data": BYTES, "scale": HALF, "offset": packed([[True]], "bool")}, "bool values with"),
    ("lut_to_dense", {"indices": BYTES, "lut": packed(np.zeros((2, 2, 4, 1)), "fp16")}, "2 tables do not divide 3"),
    ("lut_to_dense", {"indices": packed([[-1]], "int8"), "lut": TABLE}, "indices are int8"),
    ("lut_to_dense", {"indices": BYTES, "lut": packed(np.zeros((1, 1, 3, 1)), "fp16")}, "outside its table"),
    ("lut_to_dense", {"indices": BYTES, "lut": VECTORS}, "an axis is missing"),
    ("lut_to_dense", {"indices": BYTES, "lut": VECTORS, "vector_axis": packed(2, "int32")}, "axis 2 of 2 dimensions"),
    ("lut_to_dense", {"indices": BYTES, "lut": VECTORS, "vector_axis": packed(1.0, "fp16")}, "or no whole number"),
    ("lut_to_dense", {"indices": EIGHT, "lut": packed(np.zeros(256), "fp16"), "shape": BYTES}, r"a shape of \(2, 3\)"),
    ("lut_to_dense", {"indices": EIGHT, "lut": packed(np.zeros(8), "fp16"), "shape": ZERO}, "sizes that it may have"),
    ("lut_to_dense", {"indices": EIGHT, "lut": SIXTEEN, "shape": packed([17], "uint32")},
     r"\(8,\) indices for a shape of \[17\]"),
    ("lut_to_dense", {"indices": EIGHT, "lut": SIXTEEN, "shape": packed([2**32 - 1] * 9, "int64")},
     r"\(8,\) indices for a shape of"),
    ("lut_to_dense", {"indices": packed([], "uint8"), "lut": SIXTEEN,
                      "shape": packed([0, 2**32 - 1, 2**32 - 1, 2**32 - 1], "uint32")}, r"\(0,\) indices for a shape"),
    ("sparse_to_dense", {"nonzero_data": packed(np.ones(5), "int8"), "mask": ONES}, r"\(5,\) kept values for 6 ones"),
    ("sparse_to_dense", {"nonzero_data": BYTES, "mask": ONES}, r"\(2, 3\) kept values for 6 ones"),
    ("sparse_to_dense", {"nonzero_data": packed([1], "int8"), "mask": packed([0b10000001], "uint8"),
                         "shape": packed([5], "uint32")}, "bits beyond the last of 5 bytes of the mask are set"),
    ("lut_to_sparse", {"indices_mask": ONES, "indices_nonzero_data": packed(np.ones(5), "uint2"), "lut": TABLE},
     "kept values for 6 ones"),
    ("sparse_blockwise_shift_scale", {"data_mask": ONES, "nonzero_data": packed(np.ones(6), "int4"),
                                      "scale": packed(np.ones((2, 2)), "fp16")}, "2 scales do not divide 3"),
    ("affine_dequantize", {"quantized_data": BYTES, "zero_point": packed([1, 2], "uint8"),
                           "scale": packed(1, "fp16"), "axis": packed(1, "int32")},
     r"zero points are \(2,\), data \(2, 3\) along 1"),
    ("affine_dequantize", {"quantized_data": BYTES, "zero_point": packed(1, "uint8"), "scale": packed(1, "fp16"),
                           "axis": packed(-3, "int32")}, "axis -3 of 2 dimensions"),
    ("cast", {"source_val": HALF, "output_dtype": "int8"}, "float16 as int8"),
    ("cast", {"source_val": BYTES, "output_dtype": "fp32"}, "uint8 as fp32"),
    ("cast", {"source_val": HALF}, "constexpr_cast is given source_val"),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "inputs", "message"), LIES)
def test_parts_that_do_not_fit_are_refused(operation: str, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Constant(f"constexpr_{operation}", inputs).decode()


def test_vectors_that_make_too_much_are_refused_before_they_are_made() -> None:
    indices = Stored(np.zeros(1, np.uint8), BY_NAME["uint8"], (2**20,))  # one value stands for all
    table = Stored(np.zeros(2, np.uint8), BY_NAME["fp16"], (1, 1, 2**10))
    axis = packed(0, "int32")
    with pytest.raises(ArtifactError, match="1048576 vectors of 1024 are more than 536870912 values"):
        Constant("constexpr_lut_to_dense", {"indices": indices, "lut": table, "vector_axis": axis}).decode()


def nested(depth: int) -> Constant:
    made = Constant("const", {"val": HALF})
    for _ in range(depth - 1):
        made = Constant("constexpr_blockwise_shift_scale", {"data": (made, -1), "scale": (made, -1)})
    return made


def test_constants_of_constants_end() -> None:
    with pytest.raises(ArtifactError, match=f"constants are made of constants more than {DEEPEST} deep"):
        nested(DEEPEST + 1)


def test_what_is_read_twice_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Stored, "array", property(lambda stored: calls.append(1) or np.ones((1, 1), np.float16)))
    made = nested(DEEPEST)
    made.decode()
    assert len(calls) == 1
    assert made.bytes == 2 ** (DEEPEST - 1) * HALF.bytes


# ---- what is kept ----------------------------------------------------------------------------------------------


def counted(constants: Constants, place: Place, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a constant is decoded that is used three times."""
    calls: list[int] = []
    decode = Constant.output
    with monkeypatch.context() as patch:
        patch.setattr(Constant, "output", lambda one, index: calls.append(1) or decode(one, index))
        values = [constants(place) for _ in range(3)]
    assert all(torch.equal(value, values[0]) and value.dtype == torch.float32 for value in values)
    return len(calls)


def scaled(columns: int, scales: int = 1) -> Place:
    """Bytes with float16 scales."""
    parts = {"data": packed(np.ones((1, columns)), "uint8"), "scale": packed(np.ones((1, scales)), "fp16")}
    return Place(Constant("constexpr_blockwise_shift_scale", parts))


def test_constants_are_decoded_once_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = Constants(room=1500 * 4)
    places = [scaled(1000), scaled(1000), scaled(500), scaled(256)]
    assert [counted(constants, place, monkeypatch) for place in places] == [1, 3, 1, 1]  # tiny ones always


def test_without_room_the_smaller_of_float16_and_the_files_bytes_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = Constants(room=0)
    assert counted(constants, scaled(1000), monkeypatch) == 3  # one byte a value in the file
    assert counted(constants, scaled(1000, scales=1000), monkeypatch) == 1  # three


def test_float32_in_the_file_is_used_where_it_lies() -> None:
    data = np.zeros(4000, np.uint8)
    place = Place(
        Constant("const", {"val": Stored(data, BY_NAME["fp32"], (10, 100))}), declared=Declared("fp32", (10, 100))
    )
    value = Constants(room=0)(place)
    assert value.data_ptr() == data.ctypes.data


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (Declared("fp32", (1, 4)), "a constant came out as float16; the program says fp32"),
        (Declared("fp16", (4,)), r"a constant came out as \[1, 4\]; the program says \[4\]"),
        (Declared("list", None), "a constant came out as float16; the program says list"),
    ],
)
def test_a_constant_that_is_not_what_the_program_says_is_refused(declared: Declared, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Constants()(Place(scaled(4).constant, declared=declared))
    assert Constants()(Place(scaled(4).constant, declared=Declared("fp16", (None, 4)))).shape == (1, 4)
