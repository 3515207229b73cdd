"""Runs a block: operation after operation, each result rounded to its declared type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.errors import ArtifactError
from targets.coreml_ios.constants import BY_NAME, Array, Constant
from targets.coreml_ios.executor.ops import OPERATIONS
from targets.coreml_ios.executor.program import Block, Operation, Place, Strings
from targets.coreml_ios.executor.values import CARRIED, Declared, State, Value, require_shape, rounded

KEPT_BYTES = 2**28  # of constants that are kept decoded, as float32
TINY_BYTES = 2**10  # of a constant that is kept decoded in any case: an axis, a shape, an epsilon
MOST_ROUNDS = 2**17  # of all loops of one run
MOST_BYTES = 2**34  # of the values of one run that are alive at once
Observer = Callable[[Operation, Sequence[Value]], None]


class Constants:
    """Decodes constants: once where there is room, at every use where there is none.

    Beyond `room`, a constant is kept as the smaller of its stored bytes (which stay in the file, mapped) and float16.
    What is stored as float32 is used where it lies, and what is tiny is always kept.

    Args:
        room: Bytes.
    """

    def __init__(self, room: int = KEPT_BYTES) -> None:
        self._room = room
        self._kept: dict[tuple[int, int], tuple[Constant, Tensor]] = {}  # the constant itself keeps its id its own

    def __call__(self, place: Place) -> Tensor:
        """The tensor that a parameter is given.

        Raises:
            ArtifactError: the constant's parts do not fit together, or it is not what the program says of it.
        """
        key = id(place.constant), place.output
        if key in self._kept:
            value = self._kept[key][1]
            return value.float() if value.dtype == torch.float16 else value
        array = place.constant.output(place.output)
        value = carried(array)
        if place.declared is not None:
            _require_declared(array, value, place.declared)
        if place.constant.operation == "const" and value.data_ptr() == array.ctypes.data:
            self._kept[key] = place.constant, value  # in the file: it takes no memory
        elif (kept := self._to_keep(place.constant, value)) is not None:
            self._kept[key] = place.constant, kept
            self._room -= kept.nbytes
        return value

    def _to_keep(self, constant: Constant, value: Tensor) -> Tensor | None:
        if value.nbytes <= max(self._room, TINY_BYTES):
            return value
        half = value.numel() * 2
        is_exact = value.dtype == torch.float32 and half < constant.bytes and torch.equal(value.half().float(), value)
        return value.half() if is_exact else None


class Machine:
    """Runs the blocks of one function.

    Args:
        keep_float32: Leave floats unrounded: what the program would say in float32.
        observe: Called with every operation and its results.
    """

    def __init__(self, *, keep_float32: bool = False, observe: Observer | None = None) -> None:
        self._keep, self._observe = keep_float32, observe
        self._constants = Constants()
        self._rounds = 0  # of all loops of one run
        self._bytes = 0  # of the values that are alive

    def run(self, block: Block, inputs: Sequence[Value], states: MutableMapping[str, Tensor]) -> list[Value]:
        """What a function gives.

        Args:
            block: The function.
            inputs: One for each input of the block that is no state, in its order.
            states: By name; written to.

        Raises:
            ArtifactError: an operation cannot be computed; it is named.
        """
        self._rounds = self._bytes = 0
        given = iter(inputs)
        values: dict[str, Value] = {}
        for name, declared in block.inputs:
            values[name] = State(name, declared) if name in states else self._taken(next(given), declared, name)
        with torch.inference_mode():
            return self._block(block, values, states)

    def _taken(self, value: Tensor, declared: Declared, name: str) -> Tensor:
        value = rounded(value, declared.kind, keep_float32=self._keep)
        require_shape(value, declared, f"input {name}")
        return value

    def _block(self, block: Block, values: dict[str, Value], states: MutableMapping[str, Tensor]) -> list[Value]:
        before = self._bytes
        for operation in block.operations:
            results = self._operation(operation, values, states)
            self._hold(operation, results)
            if self._observe:
                self._observe(operation, results)
            values.update(zip((name for name, _ in operation.outputs), results))
            for name in operation.last_used:
                self._bytes -= _bytes(values.pop(name))
        self._bytes = before  # what is given back, the operation that has the block counts
        return [self._argument(argument, values) for argument in block.outputs]

    def _hold(self, operation: Operation, results: Sequence[Value]) -> None:
        """Count what is alive at once; a value that is a view of another is counted as if it were its own."""
        self._bytes += sum(map(_bytes, results))
        if self._bytes > MOST_BYTES:
            raise ArtifactError(f"{operation.type} {operation.name}: values of {self._bytes} bytes are alive at once; "
                                f"up to {MOST_BYTES} are held")  # fmt: skip

    def _operation(
        self, operation: Operation, values: dict[str, Value], states: MutableMapping[str, Tensor]
    ) -> list[Value]:
        try:
            inputs = {key: self._argument(argument, values) for key, argument in operation.inputs.items()}
            results = self._results(operation, inputs, values, states)
            return self._declared(operation, results)
        except ArtifactError as error:
            raise ArtifactError(f"{operation.type} {operation.name}: {error}") from None
        except (RuntimeError, IndexError, ValueError, TypeError, OverflowError, KeyError, AttributeError,
                ZeroDivisionError, NotImplementedError) as error:  # fmt: skip
            said = str(error).partition("\n")[0]
            raise ArtifactError(f"{operation.type} {operation.name} cannot be computed: {said}") from None

    def _results(
        self, operation: Operation, inputs: Mapping[str, Value], values: dict[str, Value],
        states: MutableMapping[str, Tensor],
    ) -> Sequence[Value]:  # fmt: skip
        match operation.type:
            case "cond":
                return self._block(operation.blocks[0 if bool(inputs["pred"]) else 1], dict(values), states)
            case "while_loop":
                return self._loop(operation, inputs["loop_vars"], values, states)
            case "read_state":
                return [states[_state(inputs["input"]).name]]
            case "write_state":
                state = _state(inputs["input"])
                require_shape(inputs["data"], state.declared, f"state {state.name}")
                states[state.name] = inputs["data"]
                return []
        results = OPERATIONS[operation.type](**inputs)
        return results if isinstance(results, tuple) else (results,)

    def _loop(
        self, operation: Operation, given: Sequence[Value], values: Mapping[str, Value],
        states: MutableMapping[str, Tensor],
    ) -> Sequence[Value]:  # fmt: skip
        condition, body = operation.blocks
        while True:
            if not bool(self._block(condition, {**values, **self._bound(condition, given)}, states)[0]):
                return given
            self._rounds += 1
            if self._rounds > MOST_ROUNDS:
                raise ArtifactError(f"loops that have not ended after {MOST_ROUNDS} rounds")
            given = self._block(body, {**values, **self._bound(body, given)}, states)

    def _bound(self, block: Block, given: Sequence[Value]) -> dict[str, Value]:
        """What a block is given, by its names, in the types and shapes that it declares."""
        pairs = zip(given, block.inputs, strict=True)
        return {name: self._output(value, declared, False, f"input {name}") for value, (name, declared) in pairs}

    def _declared(self, operation: Operation, results: Sequence[Value]) -> list[Value]:
        if len(results) < len(operation.outputs):
            raise ArtifactError(f"it has {len(operation.outputs)} outputs; the operation gives {len(results)}")
        is_rounded = operation.is_rounded
        return [self._output(value, declared, is_rounded) for value, (_, declared) in zip(results, operation.outputs)]

    def _output(self, value: Value, declared: Declared, is_rounded: bool, name: str = "its output") -> Value:
        if not isinstance(value, Tensor) or declared.kind not in CARRIED:
            return value
        if not is_rounded:
            value = rounded(value, declared.kind, keep_float32=self._keep)
        require_shape(value, declared, name)
        return value

    def _argument(self, argument: Any, values: Mapping[str, Value]) -> Value:
        if isinstance(argument, str):
            return values[argument]
        if isinstance(argument, Place):
            return self._constants(argument)
        if isinstance(argument, Strings):
            return argument.value
        return [self._argument(one, values) for one in argument]


def _bytes(value: Value) -> int:
    return value.nbytes if isinstance(value, Tensor) else 0


def _state(value: Value) -> State:
    if not isinstance(value, State):
        raise ArtifactError("it is given a value where a state is wanted")
    return value


def carried(array: Array) -> Tensor:
    """A numpy array as a value: float32 (the same memory, where it is that already), int32 or bool."""
    if array.dtype in (np.float16, np.float32) and array.flags.writeable:  # torch warns of what it may not write to
        return torch.from_numpy(array).float()
    kind = {"f": "f4", "b": "?"}.get(array.dtype.kind, "i4")
    with np.errstate(all="ignore"):  # fp64 beyond float32 becomes infinite
        return torch.from_numpy(array.astype(kind))


def _require_declared(array: Array, value: Tensor, declared: Declared) -> None:
    kind = BY_NAME.get(declared.kind)
    if kind is None or array.dtype != np.dtype(kind.numpy):
        raise ArtifactError(f"a constant came out as {array.dtype}; the program says {declared.kind}")
    require_shape(value, declared, "a constant")
