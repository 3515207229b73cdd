"""The graph of a package's function, checked and ready to run: operations in order, names resolved, constants bound."""

from __future__ import annotations

import inspect
import math
from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter.errors import ArtifactError
from targets.coreml_ios.backend import proto
from targets.coreml_ios.constants import DECODERS, Constant, Stored, takes
from targets.coreml_ios.executor import values
from targets.coreml_ios.executor.ops import OPERATIONS
from targets.coreml_ios.executor.values import CARRIED, Declared
from targets.coreml_ios.reader import Weights, read_strings, read_value

DEEPEST = 16  # blocks inside blocks: a loop in a branch in a loop ...
LISTS = frozenset({"values", "loop_vars", "elem_shape"})  # parameters that are several values, also where there is one
WITH_BLOCKS = {"cond": ("pred",), "while_loop": ("loop_vars",)}
WITH_STATES = {"read_state": ("input",), "write_state": ("input", "data")}
PASSING_ON = frozenset({
    "concat", "expand_dims", "gather", "identity", "read_state", "reshape", "slice_by_index", "slice_update", "squeeze",
    "tile", "transpose",
})  # fmt: skip
PASSED_ON = ("x", "update", "values", "input")  # parameters of these whose values are the results
NAMES = {number: name.lower().replace("float", "fp") for name, number in proto.MIL_pb2.DataType.items()}


@dataclass(frozen=True)
class Place:
    """A constant that a parameter is given: which, which of its outputs, and what the program says of it."""

    constant: Constant
    output: int = -1
    declared: Declared | None = None


@dataclass(frozen=True)
class Strings:
    """A string, several, or the whole numbers of a list, that a parameter is given."""

    value: str | list[str] | list[int]


@dataclass(frozen=True)
class Operation:
    """One operation.

    Args:
        type: MIL's name.
        inputs: By parameter: a name, a constant, strings, or a list of these.
        outputs: Name and declared type of each.
        blocks: Of control flow.
        last_used: Names that nothing reads after this operation.
        is_rounded: Whether its results are values that it is given, in the same type: rounded already.
    """

    type: str
    inputs: Mapping[str, Any]
    outputs: Sequence[tuple[str, Declared]]
    blocks: Sequence[Block] = ()
    last_used: Sequence[str] = ()
    is_rounded: bool = False

    @property
    def name(self) -> str:
        """Of its first output, or of nothing where it has none."""
        return self.outputs[0][0] if self.outputs else "no output"


@dataclass(frozen=True)
class Block:
    """Operations in order.

    Args:
        inputs: Names and declared types of what it is given.
        operations: None of them a constant.
        outputs: What it gives, as arguments.
        output_names: Their names.
    """

    inputs: Sequence[tuple[str, Declared]]
    operations: Sequence[Operation]
    outputs: Sequence[Any]
    output_names: Sequence[str]


class Reader:
    """Reads a function of a specification.

    Args:
        weights: The package's weight file, or None.
    """

    def __init__(self, weights: Weights | None) -> None:
        self._weights = weights
        self._kinds: ChainMap[str, str] = ChainMap()  # of what was read last under a name

    def function(self, specification: Any, name: str) -> Block:
        """A function as a block; its states are among its inputs.

        Raises:
            ArtifactError: there is none of that name, an operation is not known, or its parts do not fit together.
        """
        function = _function(specification, name)
        block = function.block_specializations[function.opset]
        inputs = [(given.name, declared(given.type, given.name)) for given in function.inputs]
        return self._block(block, inputs, {}, 0)

    def _block(
        self, block: Any, inputs: Sequence[tuple[str, Declared]], outer: MutableMapping[str, Any], depth: int
    ) -> Block:
        if depth == DEEPEST:
            raise ArtifactError(f"the program has blocks more than {DEEPEST} deep")
        scope = ChainMap({name: name for name, _ in inputs}, outer)
        self._kinds.update({name: said.kind for name, said in inputs})
        operations = [read for said in block.operations if (read := self._operation(said, scope, depth))]
        outputs = [_found(name, scope, "the block") for name in block.outputs]
        return Block(inputs, _with_last_uses(operations, outputs), outputs, list(block.outputs))

    def _operation(self, said: Any, scope: MutableMapping[str, Any], depth: int) -> Operation | None:
        """An operation, or None for a constant; its outputs come into scope."""
        outputs = [(output.name, declared(output.type, output.name)) for output in said.outputs]
        name = f"{said.type} {outputs[0][0] if outputs else ''}".strip()
        made = [output for output, _ in outputs]
        for place, output in enumerate(made):
            if output in scope or output in made[:place]:
                raise ArtifactError(f"{name}: {output!r} is made twice")
        inputs = {key: self._argument(key, argument, scope, name) for key, argument in said.inputs.items()}
        inputs |= {key: self._value(value, f"{name}.{key}") for key, value in said.attributes.items() if key != "name"}
        if said.type == "const" or said.type in DECODERS:
            scope.update(_constants(said.type, inputs, outputs, name))
            return None
        _require_known(said.type, inputs, name)
        if said.type == "write_state":
            self._require_one_kind(inputs, name)
        blocks = [self._nested(block, scope, depth) for block in said.blocks]
        scope.update({output: output for output, _ in outputs})
        self._kinds.update({output: said.kind for output, said in outputs})
        is_rounded = said.type in PASSING_ON and self._passed_on(inputs) == {said.kind for _, said in outputs}
        return Operation(said.type, inputs, outputs, blocks, is_rounded=is_rounded)

    def _passed_on(self, inputs: Mapping[str, Any]) -> set[str | None]:
        """Types of what an operation only passes on."""
        given = [inputs[key] for key in PASSED_ON if key in inputs]
        flat = [one for value in given for one in (value if isinstance(value, list) else [value])]
        return {self._kind(one) for one in flat}

    def _kind(self, argument: Any) -> str | None:
        return self._kinds.get(argument) if isinstance(argument, str) else _kind(argument)

    def _require_one_kind(self, inputs: Mapping[str, Any], name: str) -> None:
        """What is written to a state is of its type, so that what is read of it is rounded to it."""
        kept, written = self._kind(inputs["input"]), self._kind(inputs["data"])
        if kept != written:
            raise ArtifactError(f"{name} writes {written} to a state of {kept}")

    def _nested(self, block: Any, scope: MutableMapping[str, Any], depth: int) -> Block:
        inputs = [(given.name, declared(given.type, given.name)) for given in block.inputs]
        self._kinds = self._kinds.new_child()
        read = self._block(block, inputs, scope, depth + 1)
        self._kinds = self._kinds.parents
        return read

    def _argument(self, key: str, argument: Any, scope: Mapping[str, Any], name: str) -> Any:
        found = [_found(binding.name, scope, name) if binding.WhichOneof("binding") == "name"
                 else self._value(binding.value, f"{name}.{key}") for binding in argument.arguments]  # fmt: skip
        if key in LISTS or len(found) > 1:
            return found
        if not found:
            raise ArtifactError(f"{name}: parameter {key} is given nothing")
        return found[0]

    def _value(self, value: Any, name: str) -> Any:
        strings = read_strings(value)
        if strings is not None:
            return Strings(strings)
        return Place(Constant("const", {"val": read_value(value, name, self._weights)}))


def declared(kind: Any, name: str) -> Declared:
    """What a program says of a value.

    Raises:
        ArtifactError: a size or a type that no value has.
    """
    which = kind.WhichOneof("type")
    if which == "stateType":
        return declared(kind.stateType.wrappedType, name)
    if which != "tensorType":
        return Declared(str(which).removesuffix("Type"), None)
    tensor = kind.tensorType
    element = NAMES.get(tensor.dataType, "")
    if element not in CARRIED and element != "string":
        raise ArtifactError(f"{name} has type number {tensor.dataType}, which is not computed here")
    is_open = tensor.rank < 0 or any(one.unknown.variadic for one in tensor.dimensions)  # even how many axes
    shape = None if is_open else tuple(_size(dimension, name) for dimension in tensor.dimensions)
    if shape is not None and math.prod(size or 1 for size in shape) > values.LARGEST:
        raise ArtifactError(f"{name} is said to be {list(shape)}: more than the {values.LARGEST} values computed here")
    return Declared(element, shape)


def functions(specification: Any) -> list[str]:
    """Names of the functions of a specification, in order."""
    return sorted(specification.mlProgram.functions)


def _function(specification: Any, name: str) -> Any:
    if specification.WhichOneof("Type") != "mlProgram":
        raise ArtifactError(
            f"a Core ML model of type {specification.WhichOneof('Type')}; ML programs (mlProgram) are run here"
        )
    if name not in functions(specification):
        raise ArtifactError(f"the program has no function {name!r}; it has {', '.join(functions(specification))}")
    function = specification.mlProgram.functions[name]
    if function.opset not in function.block_specializations:
        raise ArtifactError(f"function {name} has no block for its opset {function.opset!r}")
    return function


def _found(name: str, scope: Mapping[str, Any], where: str) -> Any:
    if name not in scope:
        raise ArtifactError(f"{where} reads {name!r}, which is not made before it")
    return scope[name]


def _constants(
    kind: str, inputs: Mapping[str, Any], outputs: Sequence[tuple[str, Declared]], name: str
) -> Iterable[tuple[str, Any]]:
    """A constant's outputs by name."""
    if kind == "const":
        if list(inputs) != ["val"] or len(outputs) != 1 or not isinstance(inputs["val"], Place | Strings):
            raise ArtifactError(f"{name}: a const has one val, of its own, and one output")
        value, (output, said) = inputs["val"], outputs[0]
        return [(output, replace(value, declared=said) if isinstance(value, Place) else value)]
    kinds = {key: Strings if key == "output_dtype" else Place for key in inputs}
    if not takes(kind, inputs) or not all(isinstance(value, kinds[key]) for key, value in inputs.items()):
        raise ArtifactError(f"{name} is given {', '.join(sorted(inputs))}, which are not its constants")
    constant = Constant(kind, {key: _part(value) for key, value in inputs.items()})
    return [(output, Place(constant, place, said)) for place, (output, said) in enumerate(outputs)]


def _kind(given: Place | Strings) -> str | None:
    """What a program says of a constant's type, where it says so."""
    return given.declared.kind if isinstance(given, Place) and given.declared is not None else None


def _part(place: Place | Strings) -> Stored | str | tuple[Constant, int]:
    if isinstance(place, Strings):
        return str(place.value)
    value = place.constant.stored("val") if place.constant.operation == "const" else None
    return value if value is not None else (place.constant, place.output)


def _require_known(kind: str, inputs: Mapping[str, Any], name: str) -> None:
    special = WITH_BLOCKS.get(kind) or WITH_STATES.get(kind)
    if special is None and kind not in OPERATIONS:
        raise ArtifactError(f"operation {kind!r} ({name}) is not among those that the executor knows")
    try:
        fits = set(inputs) == set(special) if special else bool(inspect.signature(OPERATIONS[kind]).bind(**inputs))
    except TypeError as error:
        raise ArtifactError(f"{name}: {error}") from None
    if not fits:
        raise ArtifactError(f"{name} is given {', '.join(sorted(inputs))}; it takes {', '.join(special or ())}")


def _size(dimension: Any, name: str) -> int | None:
    if dimension.WhichOneof("dimension") != "constant":
        return None
    size = int(dimension.constant.size)
    if not 0 <= size <= values.LARGEST:
        raise ArtifactError(f"{name} is said to have a size of {size}")
    return size


def _with_last_uses(operations: Sequence[Operation], outputs: Sequence[Any]) -> list[Operation]:
    """Say at each operation which of this block's values nothing reads any more."""
    own = {name for operation in operations for name, _ in operation.outputs}
    kept = set(_names(outputs))
    found: list[Operation] = []
    for operation in reversed(operations):
        read = set(_reads(operation)) | {name for name, _ in operation.outputs}
        found.append(replace(operation, last_used=tuple((read & own) - kept)))
        kept |= read
    return found[::-1]


def _reads(operation: Operation) -> Iterable[str]:
    """Names that an operation reads, inside its blocks too."""
    yield from _names(operation.inputs.values())
    for block in operation.blocks:
        yield from _names(block.outputs)
        for inner in block.operations:
            yield from _reads(inner)


def _names(arguments: Iterable[Any]) -> Iterable[str]:
    for argument in arguments:
        if isinstance(argument, str):
            yield argument
        elif isinstance(argument, list):
            yield from _names(argument)
