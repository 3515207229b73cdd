"""Branches, loops, lists, and what each of them does to states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exporter.errors import ArtifactError
from targets.coreml_ios.backend import mb, proto, types
from targets.coreml_ios.executor import ReferenceModel, machine
from targets.coreml_ios.executor.ops import OPERATIONS, control_flow
from targets.coreml_ios.reader import block_of
from tests.targets.coreml_ios.executor.programs import converted, runnable

X = mb.TensorSpec((3,))
ONE, TWO = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])


def index(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


def listed(length: int = 2, *, is_dynamic: bool = True, shape: Any = (2,)) -> Any:
    return OPERATIONS["make_list"](shape, index(length), torch.tensor(is_dynamic))


# ---- operations --------------------------------------------------------------------------------------------------


def test_select_broadcasts_all_three() -> None:
    cond, a, b = torch.tensor([[True], [False]]), torch.tensor([1.0, 2.0]), torch.tensor(9.0)
    assert OPERATIONS["select"](cond, a, b).tolist() == [[1, 2], [9, 9]]


def test_what_is_not_written_is_zeros() -> None:
    made = listed(3)
    assert int(OPERATIONS["list_length"](made)) == 3
    assert OPERATIONS["list_read"](made, index(1)).tolist() == [0, 0]
    open_list = OPERATIONS["list_write"](listed(3, shape=("n",)), index(0), ONE)
    assert OPERATIONS["list_read"](open_list, index(2)).tolist() == [0, 0]


def test_writing_makes_a_new_list() -> None:
    before = listed()
    after = OPERATIONS["list_write"](before, index(1), ONE)
    assert OPERATIONS["list_read"](before, index(1)).tolist() == [0, 0]
    assert OPERATIONS["list_read"](after, index(1)).tolist() == [1, 1]


def test_a_dynamic_list_grows_and_another_does_not() -> None:
    grown = OPERATIONS["list_write"](listed(), index(4), ONE)
    assert int(OPERATIONS["list_length"](grown)) == 5
    with pytest.raises(IndexError, match="index 4 is outside a list of 2"):
        OPERATIONS["list_write"](listed(is_dynamic=False), index(4), ONE)


def test_gather_gives_what_scatter_wrote() -> None:
    rows = torch.stack([ONE, TWO])
    made = OPERATIONS["list_scatter"](listed(1), torch.tensor([3, 1]), rows)
    assert OPERATIONS["list_gather"](made, torch.tensor([1, 3, 0])).tolist() == [[2, 2], [1, 1], [0, 0]]
    assert list(OPERATIONS["list_gather"](made, torch.tensor([], dtype=torch.int32)).shape) == [0, 2]


@pytest.mark.parametrize("place", [-1, 2])
def test_reading_outside_a_list_is_refused(place: int) -> None:
    with pytest.raises(IndexError, match=f"index {place} is outside a list of 2"):
        OPERATIONS["list_read"](listed(), index(place))
    with pytest.raises(IndexError, match="is outside a list of 2"):
        OPERATIONS["list_write"](listed(), index(-1), ONE)


def test_lists_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="of unknown shape that nothing was written to"):
        OPERATIONS["list_read"](listed(shape=("n",)), index(0))
    with pytest.raises(ValueError, match=f"a list of {2**20 + 1}; lists of up to {2**20} are made here"):
        listed(control_flow.LONGEST + 1)
    with pytest.raises(ValueError, match="a list of -1"):
        listed(-1)
    with pytest.raises(ArtifactError, match="more than the"):
        listed(shape=(index(2**20), index(2**20)))
    with pytest.raises(ValueError, match="zip"):
        OPERATIONS["list_scatter"](listed(), torch.tensor([0, 1, 2]), torch.stack([ONE, TWO]))


def test_whole_numbers_of_a_list_stay_whole() -> None:
    made = OPERATIONS["make_list"]((1,), index(2), dtype="int32")
    made = OPERATIONS["list_write"](made, index(0), torch.tensor([2**24 + 1], dtype=torch.int32))
    found = OPERATIONS["list_gather"](made, torch.tensor([0, 1]))
    assert found.dtype == torch.int32
    assert found.tolist() == [[2**24 + 1], [0]]
    assert OPERATIONS["list_read"](made, index(1)).dtype == torch.int32
    with pytest.raises(ValueError, match="a list of 'words'; lists of numbers are made here"):
        OPERATIONS["make_list"]((1,), dtype="words")


def test_many_items_that_nothing_was_written_to_take_no_room() -> None:
    made, indices = listed(2**20, shape=(2**10,)), torch.zeros(2**20, dtype=torch.int32)
    with pytest.raises(ArtifactError, match=f"a tensor of {2**30} values is more than"):
        OPERATIONS["list_gather"](made, indices)


# ---- programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "wanted"), [([1, 2, 3], [2, 3, 4]), ([0, 0, 0], [-1, -1, -1])])
def test_a_branch_sees_what_was_made_before_it(x: list[float], wanted: list[float]) -> None:
    def program(x: Any) -> Any:
        total, step = mb.reduce_sum(x=x), mb.mul(x=mb.reduce_max(x=mb.abs(x=x)), y=0.0)
        step = mb.add(x=step, y=1.0)
        return mb.cond(pred=mb.greater(x=total, y=1.0), _true_fn=lambda: mb.add(x=x, y=step),
                       _false_fn=lambda: mb.sub(x=x, y=step))  # fmt: skip

    (found,) = runnable(program, [X]).predict({"x": np.float32(x)}).values()
    assert found.tolist() == wanted


def test_loops_inside_loops_count() -> None:
    """`for i < 3: for j < i: x += j` of zeros: 0 + 0 + (0 + 1) = 1."""

    def add(j: Any, x: Any) -> Any:
        return mb.add(x=j, y=1), mb.add(x=x, y=mb.cast(x=j, dtype="fp32"))

    def inner(i: Any, x: Any) -> Any:
        return mb.while_loop(_cond=lambda j, _: mb.less(x=j, y=i), _body=add, loop_vars=(0, x))[1]

    def program(x: Any) -> Any:
        return mb.while_loop(_cond=lambda i, _: mb.less(x=i, y=3), loop_vars=(0, x),
                             _body=lambda i, v: (mb.add(x=i, y=1), inner(i, v)))[1]  # fmt: skip

    (found,) = runnable(program, [X]).predict({"x": np.zeros(3, np.float32)}).values()
    assert found.tolist() == [1, 1, 1]


def test_a_loop_that_does_not_begin_gives_what_it_was_given() -> None:
    def program(x: Any) -> Any:
        return mb.while_loop(_cond=lambda v: mb.less(x=mb.reduce_sum(x=v), y=0.0), _body=lambda v: mb.add(x=v, y=1.0),
                             loop_vars=(x,))  # fmt: skip

    (found,) = runnable(program, [X]).predict({"x": np.ones(3, np.float32)}).values()
    assert found.tolist() == [1, 1, 1]


def test_a_loop_fills_a_list() -> None:
    def body(i: Any, made: Any, x: Any) -> Any:
        return mb.add(x=i, y=1), mb.list_write(ls=made, index=i, value=mb.mul(x=x, y=mb.cast(x=i, dtype="fp32")))

    def program(x: Any) -> Any:
        made = mb.make_list(init_length=1, elem_shape=(3,), dynamic_length=True)
        _, made = mb.while_loop(_cond=lambda i, _: mb.less(x=i, y=4), _body=lambda i, ls: body(i, ls, x),
                                loop_vars=(0, made))  # fmt: skip
        return mb.list_gather(ls=made, indices=[3, 1])

    (found,) = runnable(program, [X]).predict({"x": np.float32([1, 2, 3])}).values()
    assert found.tolist() == [[3, 6, 9], [1, 2, 3]]


def test_a_branch_may_give_back_what_was_made_before_it() -> None:
    def program(x: Any) -> Any:
        before, is_large = mb.add(x=x, y=5.0), mb.greater(x=mb.reduce_sum(x=x), y=1.0)
        return mb.cond(pred=is_large, _true_fn=lambda: before, _false_fn=lambda: mb.mul(x=x, y=2.0))

    model = runnable(program, [X])
    for _ in range(2):
        (found,) = model.predict({"x": np.float32([1, 2, 3])}).values()
        assert found.tolist() == [6, 7, 8]


def test_every_run_has_its_own_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MOST_ROUNDS", 3)

    def program(x: Any) -> Any:
        return mb.while_loop(_cond=lambda v: mb.less(x=mb.reduce_max(x=v), y=3.0), _body=lambda v: mb.add(x=v, y=1.0),
                             loop_vars=(x,))  # fmt: skip

    model = runnable(program, [X])
    for _ in range(2):
        (found,) = model.predict({"x": np.zeros(3, np.float32)}).values()
        assert found.tolist() == [3, 3, 3]


def test_what_a_loop_is_given_is_rounded_to_what_its_blocks_declare() -> None:
    def program(x: Any) -> Any:
        return mb.while_loop(_cond=lambda v: mb.less(x=mb.reduce_max(x=v), y=1.5), _body=lambda v: mb.mul(x=v, y=2.0),
                             loop_vars=(x,))  # fmt: skip

    specification = converted(program, [X]).get_spec()
    (loop,) = (one for one in block_of(specification).operations if one.type == "while_loop")
    for block in loop.blocks:
        block.inputs[0].type.tensorType.dataType = proto.MIL_pb2.DataType.FLOAT16
    (found,) = ReferenceModel.of(specification, None).predict({"x": [1 + 2.0**-12] * 3}).values()
    assert found.tolist() == [2, 2, 2]


def test_a_branch_writes_to_a_state() -> None:
    def program(x: Any, kept: Any) -> Any:
        def write(factor: float) -> Any:
            return mb.coreml_update_state(state=kept, value=mb.mul(x=x, y=np.float16(factor)))

        is_large = mb.greater(x=mb.reduce_sum(x=x), y=np.float16(1))
        return mb.cond(pred=is_large, _true_fn=lambda: write(2), _false_fn=lambda: write(3))

    specs = [mb.TensorSpec((2,), dtype=types.fp16), mb.StateTensorSpec((2,), dtype=types.fp16)]
    model = runnable(program, specs)
    state = model.make_state()
    for x, wanted in (([1, 1], [2, 2]), ([0, 1], [0, 3])):
        (found,) = model.predict({"x": np.float16(x)}, state).values()
        assert found.tolist() == wanted
        assert state.read_state("kept").tolist() == wanted
