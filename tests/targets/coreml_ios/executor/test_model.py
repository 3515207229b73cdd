"""A model that stands in for coremltools' `MLModel`: predict, states, functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import ArtifactError, PocketError
from targets.coreml_ios.backend import ct, mb, proto, quiet, types
from targets.coreml_ios.executor import ReferenceModel, ReferenceState
from targets.coreml_ios.reader import block_of
from tests.targets.coreml_ios.executor.programs import converted, runnable

X = mb.TensorSpec((2,), dtype=types.fp16)
KEPT = mb.StateTensorSpec((2,), dtype=types.fp16)


def counter() -> ReferenceModel:
    """Adds what it is given to a state."""

    def program(x: Any, kept: Any) -> Any:
        return mb.coreml_update_state(state=kept, value=mb.add(x=x, y=mb.read_state(input=kept)), name="y")

    return runnable(program, [X, KEPT])


def plain() -> ReferenceModel:
    return runnable(lambda x: mb.add(x=x, y=np.float16(1), name="y"), [X])


def test_it_is_called_as_coremltools_model_is() -> None:
    own, ours = inspect.signature(ct.models.MLModel.predict), inspect.signature(ReferenceModel.predict)
    assert list(ours.parameters) == list(own.parameters)
    assert list(inspect.signature(ReferenceModel.make_state).parameters) == list(
        inspect.signature(ct.models.MLModel.make_state).parameters
    )
    for name in ("read_state", "write_state"):
        assert hasattr(ReferenceState, name)


def test_a_list_of_inputs_gives_a_list_of_outputs() -> None:
    found = plain().predict([{"x": [1, 2]}, {"x": [3, 4]}])
    assert [one["y"].tolist() for one in found] == [[2, 3], [4, 5]]


def test_a_state_is_read_written_and_its_own() -> None:
    model = counter()
    state, other = model.make_state(), model.make_state()
    assert state.read_state("kept").tolist() == [0, 0]
    for wanted in ([1, 2], [2, 4]):
        found = model.predict({"x": [1, 2]}, state)  # fmt: skip
        assert found["y"].tolist() == wanted
    assert state.read_state("kept").tolist() == [2, 4]
    assert state.read_state("kept").dtype == np.float16
    state.write_state("kept", np.float32([5, 1 + 2.0**-12]))
    assert state.values["kept"].tolist() == [5, 1]
    assert model.predict({"x": [0, 0]}, state)["y"].tolist() == [5, 1]
    assert other.read_state("kept").tolist() == [0, 0]


def test_what_is_read_of_a_state_is_a_copy() -> None:
    state = counter().make_state()
    state.read_state("kept")[0] = 9
    assert state.read_state("kept").tolist() == [0, 0]


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: plain().make_state(), "the program has no state; predict without one"),
        (lambda: counter().predict({"x": [1, 2]}), r"the program has states; give predict\(..., state="),
        (lambda: plain().predict({"x": [1, 2]}, counter().make_state()), r"the state has \{'kept'.*takes none"),
        (lambda: counter().make_state().read_state("k"), "no state named 'k'; there are kept"),
        (lambda: counter().make_state().write_state("kept", np.zeros(3)), r"kept has the shape \[2\], the value \[3\]"),
        (lambda: counter().predict([{"x": [1, 2]}], counter().make_state()), "not with a list of them"),
        (lambda: counter().make_state().write_state("kept", [[1], [1, 2]]), "state kept is given no array: "),
        (lambda: counter().make_state().write_state("kept", ["a", "b"]), "state kept is given list; it takes an array"),
        (lambda: plain().predict({1: [1, 2], "z": 3}), "no input named '1'; the program takes x"),
        (lambda: plain().predict({"z": [1, 2]}), "no input named 'z'; the program takes x"),
        (lambda: plain().predict({}), "input x is missing; the program takes x"),
        (lambda: plain().predict(np.zeros(2)), "predict is given ndarray; it takes inputs by name, or a list"),
        (lambda: plain().predict([1, 2]), "predict is given list; it takes inputs by name, or a list"),
    ],
)  # fmt: skip
def test_what_a_caller_gets_wrong_is_said(act: Callable[[], Any], said: str) -> None:
    with pytest.raises(PocketError, match=said):
        act()


def test_floats_are_kept_where_that_is_asked_for() -> None:
    made = converted(lambda x: mb.add(x=x, y=np.float16(1), name="y"), [X])
    x = {"x": np.float16([2.0**-12, 0])}
    assert ReferenceModel(made.package_path).predict(x)["y"].tolist() == [1, 1]
    kept = ReferenceModel(made.package_path, keep_float32=True).predict(x)["y"]
    assert kept.tolist() == [1 + 2.0**-12, 1]
    assert kept.dtype == np.float32


def test_every_operation_is_told_of_in_order() -> None:
    made = converted(lambda x: mb.square(x=mb.add(x=x, y=np.float16(1)), name="y"), [X])
    seen: list[tuple[str, Any]] = []
    model = ReferenceModel(made.package_path, observe=lambda operation, results: seen.append(
        (operation.type, results[0].tolist())))  # fmt: skip
    model.predict({"x": [1, 2]})
    assert seen == [("add", [2, 3]), ("square", [4, 9])]


def scaled(factor: float, weight: Any) -> Any:
    return converted(lambda x: mb.mul(x=mb.linear(x=x, weight=weight), y=factor, name="y"), [mb.TensorSpec((1, 100))])


def test_each_function_of_a_package_is_its_own(tmp_path: Path) -> None:
    functions = ct.utils.MultiFunctionDescriptor()
    weight = np.arange(1000, dtype=np.float32).reshape(10, 100)
    for name, factor in (("once", 1.0), ("twice", 2.0)):
        path = str(tmp_path / f"{name}.mlpackage")
        scaled(factor, weight).save(path)
        functions.add_function(path, "main", name)
    functions.default_function_name = "twice"
    with quiet():
        ct.utils.save_multifunction(functions, str(tmp_path / "both.mlpackage"))
    for chosen, factor in (("once", 1), ("twice", 2), (None, 2)):
        found = ReferenceModel(tmp_path / "both.mlpackage", chosen).predict({"x": np.ones((1, 100))})["y"]
        np.testing.assert_array_equal(found[0], factor * weight.sum(1))
    with pytest.raises(ArtifactError, match="the program has no function 'thrice'; it has once, twice"):
        ReferenceModel(tmp_path / "both.mlpackage", "thrice")


def changed(change: Callable[[Any], None]) -> ReferenceModel:
    def program(x: Any, kept: Any) -> Any:
        return mb.coreml_update_state(state=kept, value=x, name="y")

    specification = converted(program, [X, KEPT]).get_spec()
    change(specification)
    return ReferenceModel.of(specification, None)


def undescribed(specification: Any) -> None:
    del specification.description.input[:]


def renamed(specification: Any) -> None:
    specification.description.output[0].name = "z"


def described_elsewhere(specification: Any) -> None:
    specification.description.functions.add().name = "other"


def states_of(specification: Any) -> Any:
    function = specification.mlProgram.functions["main"]
    return next(given for given in function.inputs if given.name == "kept").type.stateType.wrappedType.tensorType


def whole_numbers(specification: Any) -> None:
    """Of a program that neither reads nor writes its state."""
    states_of(specification).dataType = proto.MIL_pb2.DataType.INT32
    block = block_of(specification)
    kept = [one for one in block.operations if one.type not in ("read_state", "write_state")]
    del block.operations[:]
    block.operations.extend(kept)
    block.outputs[0] = specification.description.output[0].name = "x"


def enormous(specification: Any) -> None:
    """Of the most that a tensor may be, several times."""
    states_of(specification).dimensions[0].constant.size = 2**29
    function, described = specification.mlProgram.functions["main"], specification.description
    for several in (function.inputs, described.state):
        (kept,) = (one for one in several if one.name == "kept")
        for name in ("second", "third"):
            several.add().CopyFrom(kept)
            several[-1].name = name


def unknown_size(specification: Any) -> None:
    states_of(specification).dimensions[0].unknown.SetInParent()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (undescribed, r"function main takes \['kept', 'x'\]; what is described is \['kept'\]"),
        (renamed, "output 'z' is described, but function main does not give it"),
        (described_elsewhere, "function main is not described"),
        (whole_numbers, r"state 'kept' is int32 of shape \(2,\), which is not held here"),
        (enormous, r"a tensor of \d+ values is more than the"),
        (unknown_size, r"state 'kept' is fp16 of shape \(None,\), which is not held here"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(change: Callable[[Any], None], said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        changed(change)
