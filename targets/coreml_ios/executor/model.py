"""A Core ML program that runs on this machine: `predict` and `make_state` as coremltools' `MLModel` has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.errors import ArtifactError, PocketError
from targets.coreml_ios.executor import features
from targets.coreml_ios.executor.machine import Machine, Observer
from targets.coreml_ios.executor.program import Block, Reader
from targets.coreml_ios.executor.values import Declared, require_room, rounded
from targets.coreml_ios.reader import Weights, open_package

NOTE = "reference executor on Linux, not Apple's runtime"
STATE_KINDS = ("fp16", "fp32")


class ReferenceState:
    """The states of a program.

    Args:
        values: By name; the executor writes to them.
        kinds: MIL's name of the type of each.
    """

    def __init__(self, values: dict[str, Tensor], kinds: Mapping[str, str]) -> None:
        self.values, self._kinds = values, kinds

    def read_state(self, name: str) -> NDArray[Any]:
        """A copy of a state's value, in its type.

        Raises:
            PocketError: there is none of that name.
        """
        return np.array(self._known(name).numpy(), features.NUMPY[self._kinds[name]])

    def write_state(self, name: str, value: NDArray[Any]) -> None:
        """Give a state a value.

        Raises:
            PocketError: there is none of that name, it is no array of numbers, or its shape is another.
        """
        array = features.array_of(f"state {name}", value)
        shape, given = list(self._known(name).shape), list(array.shape)
        if shape != given:
            raise PocketError(f"state {name} has the shape {shape}, the value {given}")
        self.values[name] = rounded(torch.from_numpy(np.array(array, np.float32)), self._kinds[name])

    def _known(self, name: str) -> Tensor:
        if name not in self.values:
            raise PocketError(f"no state named {name!r}; there are {', '.join(self.values) or 'none'}")
        return self.values[name]


class ReferenceModel:
    """An ML program, run by torch on the CPU: each operation in float32, its result rounded to its declared type.

    This is a reference executor, not Apple's runtime: Apple's processors add up in other orders and widths.

    Args:
        path: An `.mlpackage`.
        function_name: Of a package with several functions; the default function where it is not given.
        keep_float32: Leave floats unrounded, to see how much of an error is float16's.
        observe: Called with every operation and its results, in order.

    Raises:
        ArtifactError: the package is damaged, or has an operation that is not known here; it is named.
    """

    def __init__(
        self, path: str | Path, function_name: str | None = None, *, keep_float32: bool = False,
        observe: Observer | None = None,
    ) -> None:  # fmt: skip
        specification, weights = open_package(Path(path))
        self._open(specification, weights, function_name, keep_float32, observe)

    @classmethod
    def of(
        cls, specification: Any, weights: Weights | None, function_name: str | None = None, *,
        keep_float32: bool = False, observe: Observer | None = None,
    ) -> ReferenceModel:  # fmt: skip
        """Run a specification that is in memory, with its weight file."""
        made = cls.__new__(cls)
        made._open(specification, weights, function_name, keep_float32, observe)
        return made

    def _open(self, specification: Any, weights: Weights | None, function_name: str | None, keep_float32: bool,
              observe: Observer | None) -> None:  # fmt: skip
        name = function_name or specification.description.defaultFunctionName or "main"
        self._block = Reader(weights).function(specification, name)
        self.description = _described(specification.description, name, self._block)
        self._keep, self._machine = keep_float32, Machine(keep_float32=keep_float32, observe=observe)
        self._states = _states(self.description, self._block)

    def make_state(self) -> ReferenceState:
        """New states, all zero.

        Raises:
            PocketError: the program has none.
        """
        if not self._states:
            raise PocketError("the program has no state; predict without one")
        kinds = {name: declared.kind for name, declared in self._states.items()}
        return ReferenceState({name: torch.zeros(shape) for name, shape in self._state_shapes().items()}, kinds)

    def predict(
        self, data: Mapping[str, Any] | Sequence[Mapping[str, Any]], state: ReferenceState | None = None
    ) -> Any:
        """Outputs by name, for inputs by name; a list of these for a list.

        Args:
            data: Arrays, lists, numbers, torch tensors or PIL images.
            state: What `make_state` gave; written to.

        Raises:
            PocketError: an input is missing or unknown, or its shape is not one that the package takes.
            ArtifactError: an operation cannot be computed; it is named.
        """
        if not isinstance(data, Mapping):
            return self._predict_each(data, state)
        self._require_own(state)
        given = self._taken(data)
        results = self._machine.run(self._block, given, {} if state is None else state.values)
        named = dict(zip(self._block.output_names, results))
        back = partial(features.given_back, keep_float32=self._keep)
        return {feature.name: back(feature, named[feature.name]) for feature in self.description.output}

    def _predict_each(self, rows: Sequence[Mapping[str, Any]], state: ReferenceState | None) -> list[Any]:
        if not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
            raise PocketError(f"predict is given {type(rows).__name__}; it takes inputs by name, or a list of these")
        if state is not None:
            raise PocketError("a state goes with one prediction at a time, not with a list of them")
        return [self.predict(row) for row in rows]

    def _require_own(self, state: ReferenceState | None) -> None:
        if self._states and state is None:
            raise PocketError("the program has states; give predict(..., state=model.make_state())")
        found = {} if state is None else {name: tuple(value.shape) for name, value in state.values.items()}
        wanted = self._state_shapes()
        if found != wanted:
            raise PocketError(f"the state has {found or 'nothing'}; the program takes {wanted or 'none'}")

    def _taken(self, data: Mapping[str, Any]) -> list[Any]:
        known = {feature.name: feature for feature in self.description.input}
        if strange := sorted(map(str, set(data) - set(known))):
            raise PocketError(f"no input named {strange[0]!r}; the program takes {', '.join(known)}")
        values = []
        for name, declared in self._block.inputs:
            if name in self._states:
                continue
            given = data[name] if name in data else features.default(known[name])
            if given is None:
                raise PocketError(f"input {name} is missing; the program takes {', '.join(known)}")
            values.append(features.taken(known[name], given, declared))
        return values

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: said.shape or () for name, said in self._states.items()}
        return {name: tuple(size for size in shape if size is not None) for name, shape in shapes.items()}


def _described(description: Any, name: str, block: Block) -> Any:
    """What the package says of a function: its inputs, outputs and states.

    Raises:
        ArtifactError: it says nothing of it, or what the function does not have.
    """
    found = [one for one in description.functions if one.name == name] if description.functions else [description]
    if not found:
        raise ArtifactError(f"function {name} is not described")
    said = {feature.name for feature in (*found[0].input, *found[0].state)}
    taken = {given for given, _ in block.inputs}
    if said != taken:
        raise ArtifactError(f"function {name} takes {sorted(taken)}; what is described is {sorted(said)}")
    if strange := {feature.name for feature in found[0].output} - set(block.output_names):
        raise ArtifactError(f"output {min(strange)!r} is described, but function {name} does not give it")
    return found[0]


def _states(description: Any, block: Block) -> dict[str, Declared]:
    """States by name.

    Raises:
        ArtifactError: one is of unknown shape, or of a type that is no state's, or they are enormous.
    """
    declared = dict(block.inputs)
    states = {state.name: declared[state.name] for state in description.state}
    for name, said in states.items():
        if said.shape is None or None in said.shape or said.kind not in STATE_KINDS:
            raise ArtifactError(f"state {name!r} is {said.kind} of shape {said.shape}, which is not held here")
    require_room(sum(math.prod(size or 0 for size in said.shape or ()) for said in states.values()))
    return states
