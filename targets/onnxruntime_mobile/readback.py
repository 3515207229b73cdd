"""Reading written files back, believing nothing: references are checked before anything is mapped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from torch import Tensor

from exporter.errors import ArtifactError
from exporter.model import Model
from exporter.packing import packed_width, unpack
from exporter.plugins import Finding, Plan
from exporter.weights import Dense, LowBit
from targets.onnxruntime_mobile import package
from targets.onnxruntime_mobile.constants import DATA, MODEL, shifts
from targets.onnxruntime_mobile.ops import INT8_ACTIVATIONS, GraphOps
from targets.onnxruntime_mobile.prices import padded_columns

LARGEST_GRAPH = 256 * 2**20  # bytes; the weights lie apart
TYPES = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.UINT8: np.uint8, onnx.TensorProto.INT32: np.int32}
PARTS = ("weight", "codes", "rows", "scales", "zeros", "shifts")  # constants of a leaf, after its name

Array = npt.NDArray[np.generic]


def read_model(folder: Path) -> onnx.ModelProto:
    """model.onnx, parsed, with every reference into the data file checked.

    Raises:
        ArtifactError: missing, too large, no ONNX file, or a reference that leaves the data file.
    """
    path = folder / MODEL
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {MODEL}; `pocket export` makes it")
    if path.stat().st_size > LARGEST_GRAPH:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes; a graph has at most {LARGEST_GRAPH}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ArtifactError(f"{path} is no ONNX file: {error}") from None
    references(model, folder)
    return model


def references(model: onnx.ModelProto, folder: Path) -> dict[str, Array]:
    """Every constant in the data file by name, mapped, not read.

    Raises:
        ArtifactError: a constant lies elsewhere, beyond the file's end, or has a length that is not its shape's.
    """
    data = folder / DATA
    size = data.stat().st_size if data.is_file() else 0
    whole = np.memmap(data, np.uint8, "r") if size else np.zeros(0, np.uint8)
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    return {tensor.name: _mapped(tensor, whole) for tensor in external}


def inspect(folder: Path, model: Model, plan: Plan) -> list[Finding]:
    """Compare written files with what they were written from; runs nothing."""
    written = read_model(folder)
    arrays = references(written, folder)
    ops, expected = package.build(model, plan)
    findings = [_interface(written, expected), _products(written, expected), _rest(written, expected)]
    findings.append(_places(written))
    if model.architecture.causal:
        findings.append(_settings(folder, model, plan))
    for name, leaf in ops.leaves.items():
        findings.append(_dense(name, leaf, arrays) if isinstance(leaf, Dense) else _low_bit(name, leaf, arrays))
    parameters = ((name, tensor) for name, tensor in ops.model.tensors.items() if name in ops.constants.values)
    findings += [_same(name, arrays.get(name), tensor.float()) for name, tensor in parameters]
    return [*findings, *_tables(ops, arrays)]


def _mapped(tensor: onnx.TensorProto, whole: Array) -> Array:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if entries.get("location") != DATA:
        raise ArtifactError(f"{MODEL}: {tensor.name} lies in {entries.get('location')!r}; only {DATA} may be named")
    offset, length = (_number(tensor.name, entries.get(key, "")) for key in ("offset", "length"))
    if offset + length > whole.size:
        raise ArtifactError(f"{MODEL}: {tensor.name} ends at byte {offset + length}; {DATA} has {whole.size}")
    dtype = TYPES.get(tensor.data_type)
    if dtype is None or min(tensor.dims, default=0) < 0:
        raise ArtifactError(f"{MODEL}: {tensor.name} has a type or shape that this target does not write")
    if math.prod(tensor.dims) * np.dtype(dtype).itemsize != length:
        raise ArtifactError(f"{MODEL}: {tensor.name} has {length} bytes, which is not its shape {list(tensor.dims)}")
    return whole[offset : offset + length].view(dtype).reshape(tuple(tensor.dims))


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ArtifactError(f"{MODEL}: {name} has the place {text!r}; it must be a whole number")
    return int(text)


def _interface(written: onnx.ModelProto, expected: ir.Model) -> Finding:
    """Names, types and shapes of inputs and outputs."""
    wanted = ir.to_proto(expected).graph
    is_same = list(written.graph.input) == list(wanted.input) and list(written.graph.output) == list(wanted.output)
    caches = sum(value.name.startswith("past_key_values") for value in wanted.input)
    plain = [value.name for value in (*wanted.input, *wanted.output) if not value.name.startswith(("past", "present"))]
    said = ", ".join(plain) + (f", caches of {caches // 2} layers" if caches else "")
    return Finding("inputs and outputs", is_same, said)


def _products(written: onnx.ModelProto, expected: ir.Model) -> Finding:
    """Nodes as written, low-bit products with int8 activations among them."""
    is_same = list(written.graph.node) == list(ir.to_proto(expected).graph.node)
    low_bit = [node for node in written.graph.node if node.op_type == "MatMulNBits"]
    levels = {a.i for node in low_bit for a in node.attribute if a.name == "accuracy_level"}
    detail = f"{len(written.graph.node)} nodes, {len(low_bit)} MatMulNBits"
    return Finding("nodes", is_same and levels <= {INT8_ACTIVATIONS}, detail)


def _rest(written: onnx.ModelProto, expected: ir.Model) -> Finding:
    """Whatever else is in the graph file: small constants, places of large ones, versions, the context."""
    found, wanted = onnx.ModelProto(), ir.to_proto(expected)
    found.CopyFrom(written)
    for graph in (found.graph, wanted.graph):
        del graph.node[:], graph.input[:], graph.output[:]  # have findings of their own
    is_same = found.SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)
    return Finding("rest of the graph", is_same, "small constants, places, versions, context")


def _settings(folder: Path, model: Model, plan: Plan) -> Finding:
    path, wanted = folder / package.GENAI, package.genai_config(model.architecture, plan.context)
    is_same = path.is_file() and path.read_bytes() == wanted.encode()
    return Finding(package.GENAI, is_same, "byte for byte" if is_same else "differs")


def _tables(ops: GraphOps, arrays: dict[str, Array]) -> Iterator[Finding]:
    """Constants that are neither the model's leaves nor its vectors: rotary tables, labels of shared rows."""
    known = {*ops.model.tensors, *(f"{name}.{part}" for name in ops.leaves for part in PARTS)}
    for name in sorted(set(ops.constants.values) - known):
        wanted = b"".join(piece.tobytes() for piece in ops.constants.blobs[name].arrays())
        is_same = name in arrays and arrays[name].tobytes() == wanted
        yield Finding(name, is_same, "bit for bit" if is_same else "differs")


def _places(written: onnx.ModelProto) -> Finding:
    """No two constants overlap, save those that are one matrix in two shapes."""
    external = (t for t in written.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    places = ({entry.key: entry.value for entry in tensor.external_data} for tensor in external)
    spans = sorted({(int(place["offset"]), int(place["length"])) for place in places})
    is_apart = all(start + length <= after for (start, length), (after, _) in pairwise(spans))
    return Finding("places in the data file", is_apart, f"{len(spans)} places, {sum(n for _, n in spans)} bytes")


def _dense(name: str, leaf: Dense, arrays: dict[str, Array]) -> Finding:
    return _same(name, arrays.get(f"{name}.weight"), leaf.values.float())


def _low_bit(name: str, leaf: LowBit, arrays: dict[str, Array]) -> Finding:
    """Codes, scales and zero points, unpacked, against the plan's."""
    wrong = [part for part, is_same in _parts(name, leaf, arrays) if not is_same]
    detail = f"differs in {', '.join(wrong)}" if wrong else f"{leaf.bits} bits, blocks of {leaf.group}: bit for bit"
    return Finding(name, not wrong, detail)


def _parts(name: str, leaf: LowBit, arrays: dict[str, Array]) -> Iterator[tuple[str, bool]]:
    for form in ("codes", "rows"):  # of a product, of a lookup
        if f"{name}.{form}" in arrays:
            yield form, _is_packed(arrays[f"{name}.{form}"], leaf.codes, padded_columns(leaf), leaf.bits)
    yield "codes or rows", any(f"{name}.{form}" in arrays for form in ("codes", "rows"))
    yield "scales", _is_equal(arrays.get(f"{name}.scales"), leaf.scales.float())
    if leaf.is_symmetric:
        return
    if leaf.has_whole_zeros:
        zeros = leaf.zeros.to(torch.uint8).expand(leaf.shape[0], leaf.groups)
        yield "zeros", f"{name}.zeros" in arrays and _is_packed(arrays[f"{name}.zeros"], zeros, leaf.groups, leaf.bits)
    elif leaf.zeros.shape != (1, 1):
        yield "shifts", _is_equal(arrays.get(f"{name}.shifts"), shifts(leaf))


def _is_packed(packed: Array, codes: Tensor, columns: int, bits: int) -> bool:
    """Whether packed rows hold these codes, and zeros behind them."""
    rows = packed.reshape(codes.shape[0], -1)
    if rows.shape[1] != packed_width(columns, bits):
        return False
    found = unpack(rows.astype(np.uint8, copy=False), bits, columns)
    is_same = bool((found[:, : codes.shape[1]] == codes.numpy()).all())
    return is_same and not found[:, codes.shape[1] :].any()


def _same(name: str, array: Array | None, tensor: Tensor) -> Finding:
    is_same = _is_equal(array, tensor)
    return Finding(name, is_same, "bit for bit" if is_same else "differs")


def _is_equal(array: Array | None, tensor: Tensor) -> bool:
    return (
        array is not None
        and array.tobytes() == tensor.contiguous().numpy().tobytes()
        and array.shape == tuple(tensor.shape)
    )
