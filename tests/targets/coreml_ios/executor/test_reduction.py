"""One number for many: against coremltools' own folding of constants, for floats and for integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from targets.coreml_ios.executor.ops import OPERATIONS
from targets.coreml_ios.executor.values import rounded
from tests.targets.coreml_ios.executor.oracle import computed, folded

NAMES = (
    "reduce_l1_norm", "reduce_l2_norm", "reduce_log_sum", "reduce_log_sum_exp", "reduce_max", "reduce_mean",
    "reduce_min", "reduce_prod", "reduce_sum", "reduce_sum_square",
)  # fmt: skip
AXES = ([0], [-1], [0, 2], [-1, -3], [2, 1, 0], None)


def given(axes: list[int] | None, keep: bool) -> dict[str, Any]:
    return {"keep_dims": keep} | ({} if axes is None else {"axes": np.array(axes, np.int32)})


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_reductions_are_coremltools(name: str, keep: bool) -> None:
    x = np.random.default_rng(0).uniform(0.25, 2, size=(2, 3, 4)).astype(np.float32)
    for axes in AXES:
        found, wanted = (by(name, x=x, **given(axes, keep)) for by in (computed, folded))
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=3e-6)


@pytest.mark.parametrize("name", NAMES)
def test_reductions_of_integers_are_coremltools(name: str) -> None:
    x = np.array([[3, 7, 1, 9], [2, 5, 30, 4]], np.int32)
    for axes in ([0], [1], None):
        found = rounded(torch.from_numpy(computed(name, x=x, **given(axes, False))), "int32")
        np.testing.assert_array_equal(found.numpy(), folded(name, x=x, **given(axes, False)))


@pytest.mark.parametrize(("name", "wanted"), [("reduce_sum", 0), ("reduce_prod", 0), ("reduce_sum_square", 0)])
def test_integers_wrap(name: str, wanted: int) -> None:
    x = torch.full((4,), 2**30, dtype=torch.int32)
    assert int(rounded(OPERATIONS[name](x), "int32")) == wanted


def test_the_mean_of_large_integers_does_not_wrap() -> None:
    x = torch.tensor([2**31 - 1, 2**31 - 3], dtype=torch.int32)
    assert int(rounded(OPERATIONS["reduce_mean"](x), "int32")) == 2**31 - 2


@pytest.mark.parametrize("name", NAMES)
def test_no_axes_leave_the_shape_and_a_scalar_is_a_scalar(name: str) -> None:
    x = np.float32([[2, 3]])
    once = computed(name, x=x[..., None], axes=np.int32([-1]))
    np.testing.assert_array_equal(computed(name, x=x, axes=np.zeros(0, np.int32)), once)
    assert computed(name, x=np.float32(2)).shape == ()


def test_extremes_do_not_overflow_a_sum_of_exponentials() -> None:
    x = np.float32([1000, 1000, -np.inf])
    assert computed("reduce_log_sum_exp", x=x) == pytest.approx(1000 + np.log(2))
    assert computed("reduce_log_sum_exp", x=np.float32([-np.inf, -np.inf])) == -np.inf


def test_nothing_has_a_sum_but_no_largest() -> None:
    x = torch.zeros(2, 0)
    axes = torch.tensor([1])
    assert OPERATIONS["reduce_sum"](x, axes).tolist() == [0, 0]
    assert OPERATIONS["reduce_prod"](x, axes).tolist() == [1, 1]
    for name in ("reduce_max", "reduce_min"):
        with pytest.raises((RuntimeError, IndexError)):
            OPERATIONS[name](x, axes)


@pytest.mark.parametrize("name", NAMES)
def test_axes_that_are_not_there_or_twice_are_refused(name: str) -> None:
    with pytest.raises(IndexError):
        OPERATIONS[name](torch.ones(2, 3), torch.tensor([2]))
    with pytest.raises(RuntimeError):
        OPERATIONS[name](torch.ones(2, 3), torch.tensor([0, -2]))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["reduce_argmax", "reduce_argmin"])
def test_places_of_extremes_are_coremltools_and_of_equals_the_first(name: str, keep: bool) -> None:
    x = np.random.default_rng(0).integers(0, 3, size=(3, 4, 5))
    for values in (x.astype(np.float32), x.astype(np.int32)):
        for axis in (0, 1, -1):
            parameters = {"x": values, "axis": np.int32(axis), "keep_dims": keep}
            np.testing.assert_array_equal(computed(name, **parameters), folded(name, **parameters))
        np.testing.assert_array_equal(computed(name, x=values), folded(name, x=values))


def test_place_of_the_largest_takes_any_declared_type_and_refuses_other_axes() -> None:
    assert int(OPERATIONS["reduce_argmax"](torch.tensor([1.0, 5.0]), output_dtype="uint16")) == 1
    with pytest.raises(IndexError):
        OPERATIONS["reduce_argmax"](torch.zeros(2), torch.tensor(1))
    with pytest.raises(IndexError):
        OPERATIONS["reduce_argmin"](torch.zeros(2, 0))


def test_more_axes_than_any_tensor_has_are_refused() -> None:
    with pytest.raises(ValueError, match="values are more than any shape, axes or counts"):
        OPERATIONS["reduce_sum"](torch.ones(2), torch.zeros(1).expand(2**28))
