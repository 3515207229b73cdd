"""Gathering and scattering: against loops over every index, as the definitions state them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.errors import ArtifactError
from targets.coreml_ios.executor.ops import OPERATIONS

JOINED: dict[str, Callable[[Any, Any], Any]] = {
    "update": lambda old, new: new, "add": lambda old, new: old + new, "sub": lambda old, new: old - new,
    "mul": lambda old, new: old * new, "div": lambda old, new: old / new, "max": max, "min": min,
}  # fmt: skip


def random_floats(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.5


def indices(size: int, *shape: int, least: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(size + sum(shape))
    return torch.randint(least, size, shape, dtype=torch.int32, generator=generator)


def same(found: Tensor, wanted: NDArray[Any]) -> None:
    np.testing.assert_array_equal(found.numpy(), wanted)
    assert found.shape == wanted.shape


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather_is_numpys_take(shape: tuple[int, ...], axis: int) -> None:
    x = random_floats(3, 4, 5)
    places = indices(x.shape[axis], *shape, least=-x.shape[axis])
    same(OPERATIONS["gather"](x, places, axis), np.take(x.numpy(), places.numpy(), axis))


@pytest.mark.parametrize(
    ("batch", "axis", "shape"),
    [(1, 1, (2, 5)), (1, 2, (2,)), (2, 2, (2, 3, 5, 2)), (1, 3, (2, 4, 1)), (2, -1, (2, 3))],
)
def test_gather_of_each_batch_is_that_of_its_part(batch: int, axis: int, shape: tuple[int, ...]) -> None:
    x = random_floats(2, 3, 4, 5)
    places = indices(x.shape[axis], *shape)
    found = OPERATIONS["gather"](x, places, axis, batch)
    for at in itertools.product(*(range(size) for size in x.shape[:batch])):
        same(found[at], np.take(x[at].numpy(), places[at].numpy(), axis % x.ndim - batch))


@pytest.mark.parametrize(
    ("batch", "shape"),
    [(0, (4, 2)), (0, (2, 3, 3)), (1, (2, 5, 1)), (1, (2, 2)), (2, (2, 3, 2)), (0, (5, 0)), (0, (3,))],
)
def test_gather_nd_takes_a_coordinate_from_the_last_axis(batch: int, shape: tuple[int, ...]) -> None:
    x = random_floats(2, 3, 4, 2)
    places = indices(2, *shape)
    found = OPERATIONS["gather_nd"](x, places, batch)
    assert found.shape == (*shape[:-1], *x.shape[batch + shape[-1] :])
    for at in itertools.product(*(range(size) for size in shape[:-1])):
        same(found[at], x.numpy()[(*at[:batch], *places[at].tolist())])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather_along_axis_is_numpys(axis: int) -> None:
    x = random_floats(2, 3, 4)
    shape = [5 if at == axis % 3 else size for at, size in enumerate(x.shape)]
    places = indices(x.shape[axis], *shape, least=-x.shape[axis])
    wanted = np.take_along_axis(x.numpy(), places.numpy().astype(np.int64), axis)
    same(OPERATIONS["gather_along_axis"](x, places, axis), wanted)


@pytest.mark.parametrize("mode", JOINED)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scatter_joins_one_update_after_another(mode: str, axis: int) -> None:
    data, at = random_floats(3, 4, 2), axis % 3
    places = indices(data.shape[axis], 6, least=-data.shape[axis])  # six in at most four places: some meet
    updates = random_floats(*(6 if place == at else size for place, size in enumerate(data.shape)))
    wanted = data.numpy().copy()
    for i, place in enumerate(places.tolist()):
        for p in itertools.product(*(range(size) for k, size in enumerate(data.shape) if k != at)):
            goal, source = (*p[:at], place, *p[at:]), (*p[:at], i, *p[at:])
            wanted[goal] = JOINED[mode](wanted[goal], updates.numpy()[source])
    same(OPERATIONS["scatter"](data, places, updates, axis, mode), wanted)
    same(data, random_floats(3, 4, 2).numpy())  # the tensor that is written to stays as it was


@pytest.mark.parametrize("mode", JOINED)
@pytest.mark.parametrize("axis", [0, -1])
def test_scatter_along_axis_joins_one_update_after_another(mode: str, axis: int) -> None:
    data, at = random_floats(3, 2, 3), axis % 3
    shape = [5 if place == at else size for place, size in enumerate(data.shape)]
    places, updates = indices(3, *shape, least=-3), random_floats(*shape)
    wanted = data.numpy().copy()
    for source in itertools.product(*(range(size) for size in shape)):
        goal = (*source[:at], int(places[source]), *source[at + 1 :])
        wanted[goal] = JOINED[mode](wanted[goal], updates.numpy()[source])
    same(OPERATIONS["scatter_along_axis"](data, places, updates, axis, mode), wanted)


@pytest.mark.parametrize("mode", JOINED)
@pytest.mark.parametrize("shape", [(5, 1), (2, 4, 2), (3,)])
def test_scatter_nd_joins_one_update_after_another(mode: str, shape: tuple[int, ...]) -> None:
    data, places = random_floats(3, 2, 2), indices(2, *shape, least=-2)
    updates = random_floats(*shape[:-1], *data.shape[shape[-1] :])
    wanted = data.numpy().copy()
    for at in itertools.product(*(range(size) for size in shape[:-1])):
        goal = tuple(places[at].tolist())
        old, new = np.array(wanted[goal]), updates.numpy()[at]
        wanted[goal] = np.array([JOINED[mode](a, b) for a, b in zip(old.flat, np.ravel(new))]).reshape(old.shape)
    same(OPERATIONS["scatter_nd"](data, places, updates, mode), wanted)


def test_mode_that_is_left_out_is_add() -> None:
    data, places = torch.zeros(2), torch.tensor([1, 1], dtype=torch.int32)
    assert OPERATIONS["scatter"](data, places, torch.ones(2)).tolist() == [0, 2]
    assert OPERATIONS["scatter_along_axis"](data, places, torch.ones(2)).tolist() == [0, 2]
    assert OPERATIONS["scatter_nd"](data, places[:, None], torch.ones(2)).tolist() == [0, 2]


def test_integers_wrap_and_are_divided_towards_zero() -> None:
    data = torch.tensor([2**31 - 1, -7, 7], dtype=torch.int32)
    places, updates = torch.arange(3, dtype=torch.int32), torch.tensor([1, 2, -2], dtype=torch.int32)
    assert OPERATIONS["scatter"](data, places, updates).tolist() == [-(2**31), -5, 5]
    assert OPERATIONS["scatter"](data, places, updates, 0, "div").tolist() == [2**31 - 1, -3, -3]
    with pytest.raises(ZeroDivisionError, match="an integer is divided by zero"):
        OPERATIONS["scatter"](data, places, torch.zeros(3, dtype=torch.int32), 0, "div")


def test_division_by_zero_of_floats_is_infinite_and_no_warning() -> None:
    divided = OPERATIONS["scatter"](torch.ones(1), torch.tensor([0]), torch.zeros(1), 0, "div")
    assert divided.tolist() == [float("inf")]


def test_mode_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="no mode 'xor'; it has update, add, sub, mul, div, max, min"):
        OPERATIONS["scatter"](torch.ones(1), torch.tensor([0]), torch.ones(1), 0, "xor")


@pytest.mark.parametrize("validate", [None, True, False])
@pytest.mark.parametrize("place", [-4, 3])
def test_reading_outside_is_an_error_in_every_version(validate: bool | None, place: int) -> None:
    x, places = random_floats(3), torch.tensor([0, place], dtype=torch.int32)
    for name, shape in (("gather", [2]), ("gather_along_axis", [2]), ("gather_nd", [2, 1])):
        with pytest.raises(IndexError, match=f"index .*{place}.* is outside axes of .3"):
            OPERATIONS[name](x, places.reshape(shape), validate_indices=validate)


@pytest.mark.parametrize("validate", [True, False])
def test_index_below_zero_is_outside_from_ios17_on(validate: bool) -> None:
    x, places = random_floats(3), torch.tensor([-1], dtype=torch.int32)
    assert OPERATIONS["gather"](x, places).tolist() == [x[-1]]
    with pytest.raises(IndexError, match="outside"):
        OPERATIONS["gather"](x, places, validate_indices=validate)


@pytest.mark.parametrize("place", [-1, 3])
def test_write_outside_is_left_out_where_nothing_is_validated(place: int) -> None:
    data, places, updates = torch.zeros(3), torch.tensor([place, 1], dtype=torch.int32), torch.tensor([5.0, 7.0])
    for name, shape in (("scatter", [2]), ("scatter_along_axis", [2]), ("scatter_nd", [2, 1])):
        given = {"data": data, "indices": places.reshape(shape), "updates": updates}
        assert OPERATIONS[name](**given, validate_indices=False).tolist() == [0, 7, 0]
        with pytest.raises(IndexError, match=r"outside axes of \[3\]"):
            OPERATIONS[name](**given, validate_indices=True)


@pytest.mark.parametrize("place", [-4, 3])
def test_write_outside_is_an_error_before_ios17(place: int) -> None:
    with pytest.raises(IndexError, match=r"outside axes of \[3\]"):
        OPERATIONS["scatter"](torch.zeros(3), torch.tensor([place]), torch.ones(1))


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, places = random_floats(2, 3), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="no 2 batch axes in common"):
        OPERATIONS["gather"](x, places, 1, 2)
    with pytest.raises(ValueError, match="no -1 batch axes in common"):
        OPERATIONS["gather"](x, places, 1, -1)
    with pytest.raises(ValueError, match="no 1 batch axes in common"):
        OPERATIONS["gather_nd"](x, places, 1)
    with pytest.raises(ValueError, match="no 0 batch axes in common"):
        OPERATIONS["gather_nd"](x, torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="differ on another axis than 0"):
        OPERATIONS["gather_along_axis"](x, places)
    with pytest.raises(ValueError, match=r"updates are \[2, 3\]; they should be \[2, 2, 3\]"):
        OPERATIONS["scatter"](x, places, x)
    with pytest.raises(IndexError, match="axis 2 is not one of the 2"):
        OPERATIONS["gather"](x, places, 2)


def test_gather_that_would_be_enormous_is_refused() -> None:
    x, places = torch.zeros(1, 2**20), torch.zeros(1, dtype=torch.int32).expand(2**20)
    with pytest.raises(ArtifactError, match="more than the"):
        OPERATIONS["gather"](x, places)
    with pytest.raises(ArtifactError, match="more than the"):
        OPERATIONS["gather_nd"](x, places[:, None])
    grid = torch.zeros(1, 1, dtype=torch.int32).expand(2**14, 2**15)
    with pytest.raises(ArtifactError, match="more than the"):
        OPERATIONS["scatter_along_axis"](torch.zeros(1, 1).expand(2**14, 1), grid, grid, 1)
