"""What runs a program: how long values live, which constants are kept, and what an operation may not give."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import ArtifactError
from targets.coreml_ios.backend import mb, proto, types
from targets.coreml_ios.constants import Constant
from targets.coreml_ios.executor import ReferenceModel, machine
from targets.coreml_ios.executor.machine import Constants
from targets.coreml_ios.executor.ops import OPERATIONS
from targets.coreml_ios.executor.program import Block, Place, Reader
from targets.coreml_ios.executor.values import Declared
from targets.coreml_ios.reader import Weights, block_of
from tests.targets.coreml_ios.executor.programs import converted, runnable

X = mb.TensorSpec((2,))


# ---- values ------------------------------------------------------------------------------------------------------


def test_a_value_lives_until_it_was_read_last(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    made: list[Any] = []

    def square(x: torch.Tensor) -> torch.Tensor:
        alive.append(sum(one() is not None for one in made))
        result = x * x
        made.append(weakref.ref(result))
        return result

    def program(x: Any) -> Any:
        for _ in range(5):
            x = mb.square(x=x)
        return x

    model = runnable(program, [X])
    monkeypatch.setitem(OPERATIONS, "square", square)
    model.predict({"x": [1, 1]})
    assert alive == [0, 1, 1, 1, 1]


def test_what_is_alive_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(x: Any) -> Any:
        kept = [mb.mul(x=x, y=factor) for factor in (2.0, 3.0, 4.0)]
        total = mb.add(x=kept[0], y=kept[1])
        for _ in range(9):  # of these, one is alive at a time
            total = mb.square(x=total)
        return mb.add(x=total, y=kept[2])

    model = runnable(program, [mb.TensorSpec((2**10,))])
    monkeypatch.setattr(machine, "MOST_BYTES", 4 * 2**12)
    model.predict({"x": np.zeros(2**10)})
    monkeypatch.setattr(machine, "MOST_BYTES", 3 * 2**12)
    with pytest.raises(ArtifactError, match=rf"add .*: values of {2**14} bytes are alive at once; up to {3 * 2**12}"):
        model.predict({"x": np.zeros(2**10)})


def test_an_input_is_rounded_to_what_the_program_declares() -> None:
    def declare(specification: Any) -> None:
        specification.mlProgram.functions["main"].inputs[0].type.tensorType.dataType = proto.MIL_pb2.DataType.FLOAT16

    assert changed(declare).predict({"x": [1 + 2.0**-12, 1e5]})["y"].tolist() == [1, np.inf]


def test_what_is_written_to_a_state_has_its_shape() -> None:
    specs = [mb.TensorSpec((2,), dtype=types.fp16), mb.StateTensorSpec((2,), dtype=types.fp16)]
    specification = converted(lambda x, kept: mb.coreml_update_state(state=kept, value=x, name="y"), specs).get_spec()
    function = specification.mlProgram.functions["main"]
    next(one for one in function.inputs if one.name == "x").type.tensorType.dimensions[0].unknown.SetInParent()
    del specification.description.input[0].type.multiArrayType.shape[:]
    model = ReferenceModel.of(specification, None)
    with pytest.raises(ArtifactError, match=r"state kept came out as \[3\]; the program says \[2\]"):
        model.predict({"x": [1, 2, 3]}, model.make_state())


def test_a_state_keeps_what_was_written_also_when_the_input_changes() -> None:
    specs = [mb.TensorSpec((2,), dtype=types.fp16), mb.StateTensorSpec((2,), dtype=types.fp16)]
    model = runnable(lambda x, kept: mb.coreml_update_state(state=kept, value=x, name="y"), specs)
    state, given = model.make_state(), np.float16([1, 2])
    model.predict({"x": given}, state)
    given[0] = 9
    assert state.read_state("kept").tolist() == [1, 2]


def changed(change: Callable[[Any], None], function: Any = None) -> ReferenceModel:
    specification = converted(function or (lambda x: mb.square(x=x, name="y")), [X]).get_spec()
    change(specification)
    return ReferenceModel.of(specification, None)


def square_of(specification: Any) -> Any:
    return next(one for one in block_of(specification).operations if one.type == "square")


def one_more_output(specification: Any) -> None:
    operation = square_of(specification)
    operation.outputs.add().CopyFrom(operation.outputs[0])
    operation.outputs[1].name = "z"


def another_size(specification: Any) -> None:
    square_of(specification).outputs[0].type.tensorType.dimensions[0].constant.size = 3


def a_word_for_a_number(specification: Any) -> None:
    given = square_of(specification).inputs["x"].arguments[0].value
    given.type.tensorType.dataType = proto.MIL_pb2.DataType.STRING
    given.immediateValue.tensor.strings.values.append("two")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (one_more_output, "square y: it has 2 outputs; the operation gives 1"),
        (another_size, r"square y: its output came out as \[2\]; the program says \[3\]"),
        (a_word_for_a_number, "square y cannot be computed: "),
    ],
)
def test_what_an_operation_cannot_give_is_named(change: Callable[[Any], None], said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        changed(change).predict({"x": [1, 2]})


def test_an_input_of_another_shape_than_the_program_says_is_named() -> None:
    def describe(specification: Any) -> None:
        specification.description.input[0].type.multiArrayType.shape[0] = 3

    with pytest.raises(ArtifactError, match=r"input x came out as \[3\]; the program says \[2\]"):
        changed(describe).predict({"x": [1, 2, 3]})


def test_a_value_where_a_state_is_wanted_is_refused() -> None:
    specs = [mb.TensorSpec((2,), dtype=types.fp16), mb.StateTensorSpec((2,), dtype=types.fp16)]
    specification = converted(lambda x, kept: mb.coreml_update_state(state=kept, value=x, name="y"), specs).get_spec()
    for operation in block_of(specification).operations:
        if operation.type == "read_state":
            operation.inputs["input"].arguments[0].name = "x"
    model = ReferenceModel.of(specification, None)
    with pytest.raises(ArtifactError, match=r"read_state .*: it is given a value where a state is wanted"):
        model.predict({"x": [1, 2]}, model.make_state())


# ---- constants ---------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> tuple[Any, Weights]:
    """Three linears: float32, float32 that are all halves, and 4 bits."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (32, 64)).astype(types.nptype_from_builtin(types.int4))
    scale = np.float32(2.0 ** rng.integers(-3, 3, (32, 1)))

    def program(x: Any) -> Any:
        low = mb.constexpr_blockwise_shift_scale(data=codes, scale=scale)
        x = mb.linear(x=mb.linear(x=x, weight=rng.random((64, 64)).astype(np.float32)), weight=low)
        return mb.linear(x=x, weight=rng.random((64, 32)).astype(np.float16).astype(np.float32), name="y")

    made = converted(program, [mb.TensorSpec((1, 64))])
    made.save(str(tmp_path / "it.mlpackage"))
    return made.get_spec(), Weights(tmp_path / "it.mlpackage/Data/com.apple.CoreML/weights/weight.bin")


def weights_of(block: Block) -> list[Place]:
    return [one.inputs["weight"] for one in block.operations if one.type == "linear"]


def test_constants_are_decoded_once_while_there_is_room(
    package: tuple[Any, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    plain = Constant.output
    monkeypatch.setattr(Constant, "output", lambda self, *given: counted.append(1) or plain(self, *given))
    places = weights_of(Reader(package[1]).function(package[0], "main"))
    for room, wanted in ((2**20, 3), (0, 4)):  # without room the 4 bits are decoded every time: they are smaller
        counted.clear()
        constants = Constants(room)
        once, again = ([constants(place) for place in places] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again))
        assert len(counted) == wanted


def test_floats_of_the_file_are_used_where_they_lie(package: tuple[Any, Weights]) -> None:
    place = weights_of(Reader(package[1]).function(package[0], "main"))[0]
    constants = Constants(0)
    assert constants(place).data_ptr() == constants(place).data_ptr()
    start = package[1].data.ctypes.data
    assert start < constants(place).data_ptr() < start + len(package[1].data)


def test_a_constant_is_what_the_program_says_of_it() -> None:
    function = lambda x: mb.add(x=x, y=np.float32([1, 2]), name="y")  # noqa: E731
    constant = Reader(None).function(converted(function, [X]).get_spec(), "main").operations[-1].inputs["y"]
    with pytest.raises(ArtifactError, match="a constant came out as float32; the program says int32"):
        Constants()(Place(constant.constant, declared=Declared("int32", (2,))))
    with pytest.raises(ArtifactError, match=r"a constant came out as \[2\]; the program says \[3\]"):
        Constants()(Place(constant.constant, declared=Declared("fp32", (3,))))
