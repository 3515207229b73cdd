"""Reads an .mlpackage back without Apple's code: the program, its interface, its constants, bit for bit.

The files come from outside: every offset, size, type and shape is checked before it is used, and nothing is allocated
that the bytes of the files do not pay for: by a fixed factor, and 2^24 values where one stands for all.

weight.bin: a header of 64 bytes (uint32 count, uint32 version 2), then blobs. A blob is a record of 64 bytes at the
offset that the program names (uint32 sentinel, uint32 type, uint64 bytes, uint64 data offset, uint64 padding bits), its
data 64-byte aligned. Values under a byte are a little-endian bit stream: value i takes bits [i n, (i + 1) n).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifact import checked_path
from exporter.errors import ArtifactError
from targets.coreml_ios.backend import DecodeError, proto
from targets.coreml_ios.constants import BY_NUMBER, DECODERS, Array, Constant, Kind, Stored, packed_bytes, takes

HEADER, RECORD, ALIGNMENT = struct.Struct("<II56x"), struct.Struct("<IIQQQ32x"), 64
SENTINEL, VERSION = 0xDEADBEEF, 2
LARGEST_PROGRAM = 2**30  # bytes of model.mlmodel: it is parsed whole
LARGEST_MANIFEST = 2**20  # bytes
LARGEST_SPLAT = 2**24  # values of a constant whose one value stands for all
MOST_DIMENSIONS = 16
DEEPEST = 4  # constants made of constants: a table that is scaled, indexed, spread by a mask
SPECIFICATION, WEIGHTS = "model.mlmodel", "weights/weight.bin"
FOLDER = "com.apple.CoreML"
ROOT = f"Data/{FOLDER}"
FEATURE_TYPES = {65552: "fp16", 65568: "fp32", 131104: "int32"}  # of described inputs and outputs


Feature = tuple[tuple[tuple[int, int], ...], str]  # (least, most) of every dimension, type


@dataclass(frozen=True)
class Interface:
    """What a caller sees, by name."""

    inputs: Mapping[str, Feature]
    outputs: Mapping[str, Feature]
    states: Mapping[str, Feature]


class Package:
    """An .mlpackage on disk, checked.

    Args:
        path: The folder `*.mlpackage`.

    Raises:
        ArtifactError: a file is missing, truncated, or says what cannot be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specification, weights = open_package(path)
        _require_ours(path)
        if weights is None:
            raise ArtifactError(f"{path / ROOT / WEIGHTS} is missing")
        self.weights = weights
        self.block = block_of(self.specification)
        self._made_by: dict[str, tuple[int, int]] = {}  # output name -> operation, which of its outputs
        for index, operation in enumerate(self.block.operations):
            for place, output in enumerate(operation.outputs):
                if output.name in self._made_by:
                    raise ArtifactError(f"{SPECIFICATION}: two operations make {output.name!r}")
                self._made_by[output.name] = index, place

    @property
    def names(self) -> Collection[str]:
        """Names of everything that operations make."""
        return self._made_by.keys()

    def constants(self) -> Iterator[str]:
        """Names of all constants that are tensors of numbers."""
        for name, (index, _) in self._made_by.items():
            operation = self.block.operations[index]
            value = operation.attributes["val"] if operation.type == "const" else None
            if operation.type in DECODERS and (value is None or value.type.tensorType.dataType in BY_NUMBER):
                yield name

    @cached_property
    def read(self) -> Collection[str]:
        """Names of everything that operations take."""
        arguments = (argument for operation in self.block.operations for argument in operation.inputs.values())
        return {binding.name for argument in arguments for binding in argument.arguments}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a constant, as its operation declares it."""
        index, place = self._made_by[name]
        output = self.block.operations[index].outputs[place]
        return _shape(output.type.tensorType, name)

    def constant(self, name: str) -> Constant:
        """A constant by the name of its output.

        Raises:
            ArtifactError: there is none, or its parts are not in the files.
        """
        if name not in self._made_by:
            raise ArtifactError(f"{SPECIFICATION}: no constant named {name!r}")
        return self._constant(self._made_by[name][0], name)

    def interface(self) -> Interface:
        """Inputs, outputs and states as described to callers."""
        description = self.specification.description
        states = {state.name: _described(state.type.stateType.arrayType) for state in description.state}
        inputs = {feature.name: _described(feature.type.multiArrayType) for feature in description.input}
        outputs = {feature.name: _described(feature.type.multiArrayType) for feature in description.output}
        return Interface(inputs, outputs, states)

    def _constant(self, index: int, name: str, depth: int = 0) -> Constant:
        operation = self.block.operations[index]
        if operation.type not in DECODERS:
            raise ArtifactError(f"{SPECIFICATION}: {name!r} is made by {operation.type}, which is no constant")
        if operation.type == "const":
            return Constant("const", {"val": self._stored(operation.attributes["val"], name)})
        if depth == DEEPEST or not takes(operation.type, operation.inputs):
            keys = ", ".join(sorted(operation.inputs))
            raise ArtifactError(f"{SPECIFICATION}: {name!r} is a {operation.type} of {keys} at depth {depth}")
        made = {key: self._input(binding, index, f"{name}.{key}", depth) for key, binding in operation.inputs.items()}
        return Constant(operation.type, made)

    def _input(self, argument: Any, index: int, name: str, depth: int) -> Stored | tuple[Constant, int]:
        if len(argument.arguments) != 1:
            raise ArtifactError(f"{SPECIFICATION}: {name} has {len(argument.arguments)} values, not one")
        binding = argument.arguments[0]
        if binding.WhichOneof("binding") == "value":
            return self._stored(binding.value, name)
        maker, place = self._made_by.get(binding.name, (index, 0))
        if maker >= index:
            raise ArtifactError(f"{SPECIFICATION}: {name} reads {binding.name!r}, which is not made before it")
        found = self._constant(maker, binding.name, depth + 1)
        value = found.stored("val")
        return value if value is not None else (found, place)

    def _stored(self, value: Any, name: str) -> Stored:
        return read_value(value, name, self.weights)


class Weights:
    """weight.bin, mapped and checked.

    Raises:
        ArtifactError: it is missing, or no such file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ArtifactError(f"{path} is missing")
        if path.stat().st_size < HEADER.size:
            raise ArtifactError(f"weight.bin has {path.stat().st_size} bytes, less than its header")
        self.data = np.memmap(path, np.uint8, "c")  # writable, so that torch takes it; what is written stays in memory
        _, version = HEADER.unpack(self.data[: HEADER.size].tobytes())
        if version != VERSION:
            raise ArtifactError(f"weight.bin is of version {version}; version {VERSION} is read")

    def blob(self, offset: int, kind: Kind, count: int, name: str) -> Array:
        """The bytes of a blob, of a known type and number of values, as a view of the mapped file."""
        if offset % ALIGNMENT or not HEADER.size <= offset <= len(self.data) - RECORD.size:
            raise ArtifactError(f"weight.bin: {name} lies at {offset}, outside its {len(self.data)} bytes or unaligned")
        sentinel, number, size, start, padding = RECORD.unpack(self.data[offset : offset + RECORD.size].tobytes())
        if sentinel != SENTINEL:
            raise ArtifactError(f"weight.bin: {name} at {offset} begins with {sentinel:#x}, not {SENTINEL:#x}")
        if number != kind.blob:
            raise ArtifactError(f"weight.bin: {name} is of type {number}; the program says {kind.name} ({kind.blob})")
        needed = packed_bytes(kind, count)
        if size != needed or padding != needed * 8 - count * kind.bits:
            raise ArtifactError(
                f"weight.bin: {name} has {size} bytes and {padding} padding bits; {count} values of {kind.name} "
                f"take {needed} and {needed * 8 - count * kind.bits}"
            )
        if start % ALIGNMENT or start < offset + RECORD.size or start + size > len(self.data):
            raise ArtifactError(f"weight.bin: data of {name} at {start}, {size} bytes, is outside or unaligned")
        return self.data[start : start + size]


def open_package(path: Path) -> tuple[Any, Weights | None]:
    """The specification of any package, and its weight file, or None where it has none.

    Raises:
        ArtifactError: a file is missing, truncated, or says what cannot be.
    """
    try:
        model = path / "Data" / _items(path)[0]
        weights = model.parent / WEIGHTS
        for inside in (path / "Manifest.json", model, weights):
            _require_inside(inside, path)
        return _specification(model), Weights(weights) if weights.is_file() else None
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ArtifactError(f"{path} cannot be read: {error}") from None


def _require_inside(file: Path, package: Path) -> None:
    """Refuse a link on the way from a package to its file: it may lead anywhere."""
    for step in (file, *file.parents):
        if step == package:
            return
        if step.is_symlink():
            raise ArtifactError(f"{step} is a link; copy the package with what its links lead to (cp -RL)")


def _require_ours(path: Path) -> None:
    """A package of ours names exactly the two items that it has: Core ML would not find what it does not name."""
    manifest, (_, items) = path / "Manifest.json", _items(path)
    wanted = {f"{FOLDER}/{SPECIFICATION}", f"{FOLDER}/weights"}
    if items != wanted:
        raise ArtifactError(f"{manifest} names {sorted(items)}; a package of ours has {sorted(wanted)}")


def _items(path: Path) -> tuple[str, set[str]]:
    """Where the model lies inside the package, and where all items do, as the manifest says."""
    manifest = path / "Manifest.json"
    if not manifest.is_file():
        raise ArtifactError(f"{path} is no Core ML package: it has no Manifest.json")
    if manifest.stat().st_size > LARGEST_MANIFEST:
        raise ArtifactError(f"{manifest} has {manifest.stat().st_size} bytes; at most {LARGEST_MANIFEST} are read")
    try:
        value = json.loads(manifest.read_bytes())
        items = {str(key): str(item["path"]) for key, item in value["itemInfoEntries"].items()}
        root = items[value["rootModelIdentifier"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{manifest} is not a package's manifest: {error!r}") from None
    for item in items.values():
        checked_path(item)
    return root, set(items.values())


def _specification(path: Path) -> Any:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing")
    if path.stat().st_size > LARGEST_PROGRAM:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes; at most {LARGEST_PROGRAM} are read")
    specification = proto.Model_pb2.Model()
    try:
        specification.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ArtifactError(f"{path} is not a Core ML model: {error}") from None
    return specification


def block_of(specification: Any) -> Any:
    """The operations of the program's one function."""
    functions = specification.mlProgram.functions
    if specification.WhichOneof("Type") != "mlProgram" or list(functions) != ["main"]:
        raise ArtifactError(f"{SPECIFICATION}: no ML program with one function, main")
    main = functions["main"]
    if list(main.block_specializations) != [main.opset]:
        raise ArtifactError(f"{SPECIFICATION}: main has no block for its opset {main.opset!r}")
    return main.block_specializations[main.opset]


def read_value(value: Any, name: str, weights: Weights | None) -> Stored:
    """An array of numbers that stands in a program or in its weight file.

    Args:
        value: MIL's `Value`.
        name: What it is called in errors.
        weights: The weight file, or None where the package has none.

    Raises:
        ArtifactError: it is not there, or its bytes are not what its type and shape take.
    """
    tensor = value.type.tensorType
    kind, shape = BY_NUMBER.get(tensor.dataType), _shape(tensor, name)
    if kind is None:
        raise ArtifactError(f"{SPECIFICATION}: {name} has type number {tensor.dataType}, which is not read here")
    count = math.prod(shape)
    if value.WhichOneof("value") == "blobFileValue":
        blob = value.blobFileValue
        if blob.fileName != f"@model_path/{WEIGHTS}" or weights is None:
            raise ArtifactError(f"{SPECIFICATION}: {name} is in {blob.fileName!r}; only {WEIGHTS} is read")
        data = weights.blob(blob.offset, kind, count, name)
    else:
        data = _immediate(value.immediateValue.tensor, kind, count, name)
    return Stored(data, kind, shape)


def read_strings(value: Any) -> str | list[str] | list[int] | None:
    """A string, or a list, also one of whole numbers, that stand in a program; None for a tensor of numbers."""
    if value.type.WhichOneof("type") == "listType":
        tensors = [one.immediateValue.tensor for one in value.immediateValue.list.values]
        words = [str(text) for tensor in tensors for text in tensor.strings.values]
        return words or [int(number) for tensor in tensors for number in tensor.longInts.values]
    tensor = value.type.tensorType
    if tensor.dataType != proto.MIL_pb2.DataType.Value("STRING"):
        return None
    found = [str(text) for text in value.immediateValue.tensor.strings.values]
    return found if tensor.rank else "".join(found)


def _shape(tensor: Any, name: str) -> tuple[int, ...]:
    if len(tensor.dimensions) > MOST_DIMENSIONS:
        raise ArtifactError(f"{SPECIFICATION}: {name} has {len(tensor.dimensions)} dimensions")
    shape = tuple(_size(dimension, name) for dimension in tensor.dimensions)
    if 0 in shape and math.prod(size or 1 for size in shape) >= 2**48:
        raise ArtifactError(f"{SPECIFICATION}: {name} has a shape of {shape}, which no tensor has")
    return shape


def _size(dimension: Any, name: str) -> int:
    if dimension.WhichOneof("dimension") != "constant":
        raise ArtifactError(f"{SPECIFICATION}: {name} has a size that is not known")
    return int(dimension.constant.size)


def _immediate(tensor: Any, kind: Kind, count: int, name: str) -> Array:
    """The bytes of values that stand in the program itself."""
    field = tensor.WhichOneof("value")
    values = getattr(tensor, field).values if field else b""
    try:
        if field in (None, "bytes"):
            data = np.frombuffer(values, np.uint8)
        else:
            data = np.fromiter(values, np.dtype(kind.numpy), len(values)).view(np.uint8)
    except (ValueError, TypeError, OverflowError) as error:
        raise ArtifactError(f"{SPECIFICATION}: values of {name} are not of type {kind.name}: {error}") from None
    one, needed = (packed_bytes(kind, n) for n in (1, count))
    stands_for_all = len(data) == one and count <= LARGEST_SPLAT
    if len(data) != needed and not stands_for_all:
        said = f"{count} values of {kind.name} take {needed}"
        raise ArtifactError(f"{SPECIFICATION}: {name} has {len(data)} bytes; {said}")
    return data


def _described(array: Any) -> Feature:
    ranges = [(int(size.lowerBound), int(size.upperBound)) for size in array.shapeRange.sizeRanges]
    shape = tuple(ranges or [(int(size), int(size)) for size in array.shape])
    return shape, FEATURE_TYPES.get(array.dataType, f"number {array.dataType}")
