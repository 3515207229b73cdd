"""Programs whose parts do not fit together are refused before they run, and what is wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from exporter.errors import ArtifactError
from targets.coreml_ios.backend import mb, proto, types
from targets.coreml_ios.executor import ReferenceModel
from targets.coreml_ios.reader import block_of
from tests.targets.coreml_ios.executor.programs import converted

INT32, BOOL = proto.MIL_pb2.DataType.INT32, proto.MIL_pb2.DataType.BOOL


@pytest.fixture(scope="module")
def written() -> bytes:
    """`y = clip(x + 1, 0, 6)`, after x was put in a state."""

    def program(x: Any, kept: Any) -> Any:
        mb.coreml_update_state(state=kept, value=x)
        half = np.float16
        return mb.clip(x=mb.add(x=x, y=half(1)), alpha=half(0), beta=half(6), name="y")

    specs = [mb.TensorSpec((2,), dtype=types.fp16), mb.StateTensorSpec((2,), dtype=types.fp16)]
    made: bytes = converted(program, specs).get_spec().SerializeToString()
    return made


def read(written: bytes, change: Callable[[Any], None]) -> ReferenceModel:
    specification = proto.Model_pb2.Model()
    specification.ParseFromString(written)
    change(specification)
    return ReferenceModel.of(specification, None)


def operation(specification: Any, kind: str) -> Any:
    return next(one for one in block_of(specification).operations if one.type == kind)


def rename(specification: Any, kind: str, other: str) -> None:
    operation(specification, kind).type = other


def forget(specification: Any, kind: str, parameter: str) -> None:
    del operation(specification, kind).inputs[parameter]


def double(specification: Any) -> None:
    block_of(specification).operations.append(operation(specification, "clip"))


def give_more(specification: Any) -> None:
    clip = operation(specification, "clip")
    clip.inputs["gamma"].CopyFrom(clip.inputs["alpha"])


def give_nothing(specification: Any) -> None:
    del operation(specification, "clip").inputs["alpha"].arguments[:]


def output(specification: Any) -> Any:
    return operation(specification, "clip").outputs[0].type.tensorType


def size(specification: Any, number: int) -> None:
    output(specification).dimensions[0].constant.size = number


def nest(specification: Any) -> None:
    """A branch in a branch in a branch ..., none of them with anything in it."""
    block = block_of(specification)
    del block.operations[:]
    for _ in range(20):
        made = block.operations.add(type="cond")
        made.inputs["pred"].arguments.add(name="x")
        block = made.blocks.add()


def turn_into(specification: Any, kind: str) -> None:
    getattr(specification, kind).SetInParent()


def name_no_opset(specification: Any) -> None:
    specification.mlProgram.functions["main"].opset = "CoreML99"


def write_whole_numbers(specification: Any) -> None:
    given = specification.mlProgram.functions["main"].inputs
    next(one for one in given if one.name == "kept").type.stateType.wrappedType.tensorType.dataType = INT32


def leave_out_the_value(specification: Any) -> None:
    del operation(specification, "const").attributes["val"]


def give_two_values(specification: Any) -> None:
    """Constants of constants of constants ... would double at each."""
    made = block_of(specification).operations.add(type="const")
    made.outputs.add().CopyFrom(operation(specification, "clip").outputs[0])
    made.outputs[0].name = "both"
    for _ in range(2):
        made.inputs["val"].arguments.add(name=operation(specification, "const").outputs[0].name)


def make_one_name_twice(specification: Any) -> None:
    made = block_of(specification).operations.add(type="split")
    made.inputs["x"].arguments.add(name="x")
    for _ in range(2):
        made.outputs.add().CopyFrom(operation(specification, "clip").outputs[0])
    for output in made.outputs:
        output.name = "a"


def read_of_nowhere(specification: Any) -> None:
    operation(specification, "clip").inputs["x"].arguments[0].name = "later"


def give_nowhere(specification: Any) -> None:
    block_of(specification).outputs[0] = "later"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: rename(one, "clip", "clipp"), r"operation 'clipp' \(clipp y\) is not among those"),
        (lambda one: forget(one, "clip", "alpha"), "clip y: missing a required argument: 'alpha'"),
        (lambda one: forget(one, "write_state", "data"), "write_state is given input; it takes input, data"),
        (give_more, "clip y: got an unexpected keyword argument 'gamma'"),
        (give_nothing, "clip y: parameter alpha is given nothing"),
        (double, "clip y: 'y' is made twice"),
        (read_of_nowhere, "clip y reads 'later', which is not made before it"),
        (give_nowhere, "the block reads 'later', which is not made before it"),
        (leave_out_the_value, "a const has one val, of its own, and one output"),
        (give_two_values, "a const has one val, of its own, and one output"),
        (make_one_name_twice, "split .*: 'a' is made twice"),
        (lambda one: setattr(output(one), "dataType", 77), "y has type number 77, which is not computed here"),
        (lambda one: size(one, 2**40), f"y is said to have a size of {2**40}"),
        (lambda one: size(one, -1 % 2**64), "y is said to have a size of"),
        (nest, "blocks more than 16 deep"),
        (name_no_opset, "function main has no block for its opset 'CoreML99'"),
        (write_whole_numbers, "write_state writes fp16 to a state of int32"),
        (lambda one: turn_into(one, "neuralNetwork"), r"of type neuralNetwork; ML programs \(mlProgram\) are run"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: Callable[[Any], None], said: str, written: bytes) -> None:
    with pytest.raises(ArtifactError, match=said):
        read(written, change)


def test_shapes_that_together_are_enormous_are_refused(written: bytes) -> None:
    def grow(specification: Any) -> None:
        declared = output(specification)
        declared.rank = 3
        for _ in range(2):
            declared.dimensions.add().constant.size = 2**20

    with pytest.raises(ArtifactError, match=r"y is said to be \[2, 1048576, 1048576\]: more than the"):
        read(written, grow)


@pytest.mark.parametrize("kind", ["unknown", "variadic"])
def test_a_size_that_is_not_known_is_whatever_comes(kind: str, written: bytes) -> None:
    def open_up(specification: Any) -> None:
        unknown = output(specification).dimensions[0].unknown
        unknown.SetInParent()
        unknown.variadic = kind == "variadic"

    model = read(written, open_up)
    assert model.predict({"x": [1, 9]}, model.make_state())["y"].tolist() == [2, 6]


def test_what_is_not_changed_runs(written: bytes) -> None:
    model = read(written, lambda specification: None)
    state = model.make_state()
    assert model.predict({"x": [1, 2]}, state)["y"].tolist() == [2, 3]
    assert state.read_state("kept").tolist() == [1, 2]
