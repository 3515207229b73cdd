"""One or two tensors, value by value: against coremltools' own folding of constants, and at the edges of the types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import ArtifactError
from targets.coreml_ios.backend import mb, types
from targets.coreml_ios.executor.model import ReferenceModel
from targets.coreml_ios.executor.ops import OPERATIONS
from targets.coreml_ios.executor.values import rounded
from tests.targets.coreml_ios.executor.oracle import Array, computed, folded
from tests.targets.coreml_ios.executor.programs import converted

NAN, INF = float("nan"), float("inf")
LEAST, MOST = -(2**31), 2**31 - 1
FLOATS = np.array([[-2.5, -1.5, -1, -0.5, -1e-3, -0.0], [0, 1e-3, 0.5, 1, 1.5, 3.75]], np.float32)
ENDS = np.array([-INF, INF, NAN, 1e30, -1e30], np.float32)
INTS = np.array([[-7, -1, 0], [1, 2, 46341], [MOST, LEAST, 12]], np.int32)
ON_FLOATS = (
    "abs", "acos", "asin", "atan", "atanh", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor", "round", "sign",
    "sin", "sinh", "sqrt", "square", "tan", "tanh",
)  # fmt: skip
ARITHMETIC = ("add", "sub", "mul", "real_div", "floor_div", "mod", "pow", "maximum", "minimum")
COMPARISONS = ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")


def close(found: Array, wanted: Array) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-7)  # NaN is equal to NaN here


@pytest.mark.parametrize("name", ON_FLOATS)
def test_functions_of_floats_are_coremltools(name: str) -> None:
    for x in (FLOATS, ENDS, np.array(0.25, np.float32)):
        close(computed(name, x=x), folded(name, x=x))
    assert computed(name, x=FLOATS[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("name", ["abs", "sign", "square"])
def test_functions_of_integers_are_coremltools_and_wrap(name: str) -> None:
    np.testing.assert_array_equal(computed(name, x=INTS), folded(name, x=INTS))


def test_exp2_of_integers_is_cut_off() -> None:
    x = np.array([-1, 0, 1, 10, 30], np.int32)
    found = rounded(torch.from_numpy(computed("exp2", x=x)), "int32")
    assert found.tolist() == [0, 1, 2, 1024, 2**30]


@pytest.mark.parametrize("given", [{}, {"epsilon": np.float32(0.25)}])
@pytest.mark.parametrize("name", ["inverse", "log", "rsqrt"])
def test_epsilon_and_its_default_are_coremltools(name: str, given: dict[str, Any]) -> None:
    x = np.array([0, 1e-4, 0.5, 4, INF, NAN, -1], np.float32)
    close(computed(name, x=x, **given), folded(name, x=x, **given))


def test_the_logarithm_of_zero_is_that_of_the_least_float32() -> None:
    assert computed("log", x=np.float32(0)) == pytest.approx(np.log(1e-45, dtype=np.float64), rel=0.01)


def test_clip_and_threshold_are_coremltools() -> None:
    ends = {"alpha": np.float32(-0.75), "beta": np.float32(1)}
    for x in (FLOATS, ENDS):
        close(computed("clip", x=x, **ends), folded("clip", x=x, **ends))
        close(computed("threshold", x=x, alpha=ends["alpha"]), folded("threshold", x=x, alpha=ends["alpha"]))
    crossed = {"alpha": np.float32(1), "beta": np.float32(-1)}
    close(computed("clip", x=FLOATS, **crossed), folded("clip", x=FLOATS, **crossed))
    alpha = np.int32(2**24 + 1)  # no float32
    np.testing.assert_array_equal(computed("threshold", x=INTS, alpha=alpha), np.maximum(INTS, alpha))


@pytest.mark.parametrize("name", ["clip", "threshold", "inverse"])
def test_a_bound_for_each_value_is_refused(name: str) -> None:
    two = torch.zeros(2)
    bounds = {"clip": (two, two), "threshold": (two,), "inverse": (two,)}[name]
    with pytest.raises((RuntimeError, ValueError), match=r"one element|invalid for input of size 2"):
        OPERATIONS[name](torch.zeros(2), *bounds)


@pytest.mark.parametrize("dtype", ["int32", "bool", "fp32"])
def test_cast_is_coremltools(dtype: str) -> None:
    for x in (FLOATS, FLOATS > 0, np.array([-3, 0, 7], np.int32)):
        np.testing.assert_array_equal(computed("cast", x=x, dtype=dtype), folded("cast", x=x, dtype=dtype))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_cast_to_narrow_integers_keeps_the_low_bits(dtype: str) -> None:
    np.testing.assert_array_equal(computed("cast", x=INTS, dtype=dtype), INTS.astype(dtype))
    x = np.array([-1.9, 254.9, 70000.5], np.float32)
    np.testing.assert_array_equal(computed("cast", x=x, dtype=dtype), x.astype(np.int32).astype(dtype))


def test_a_float_that_is_no_int32_becomes_the_nearest_and_nan_zero() -> None:
    x = np.array([NAN, INF, -INF, 3e9, -3e9, 2147483648.0, -2147483648.0, 2147483520.0], np.float32)
    assert computed("cast", x=x, dtype="int32").tolist() == [0, MOST, LEAST, MOST, LEAST, MOST, LEAST, 2147483520]


def test_cast_to_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="type 'complex64' is not one of fp16, fp32"):
        OPERATIONS["cast"](torch.zeros(1), "complex64")


@pytest.mark.parametrize("name", ARITHMETIC + COMPARISONS)
def test_two_tensors_of_floats_are_coremltools(name: str) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=shape).astype(np.float32) * 3 for shape in ((2, 1, 4), (3, 1)))
    x[0, 0], y[0] = [NAN, INF, 0, 1], 1
    if name == "pow":
        x = np.abs(x)
    close(computed(name, x=x, y=y), folded(name, x=x, y=y))
    close(computed(name, x=x, y=np.float32(-2.5)), folded(name, x=x, y=np.float32(-2.5)))
    close(computed(name, x=y[:, :0], y=y), folded(name, x=y[:, :0], y=y))


@pytest.mark.parametrize("name", [name for name in ARITHMETIC if name not in ("real_div", "pow")] + list(COMPARISONS))
def test_two_tensors_of_integers_are_coremltools_and_wrap(name: str) -> None:
    y = np.array([3, -2, 5], np.int32)
    np.testing.assert_array_equal(computed(name, x=INTS, y=y), folded(name, x=INTS, y=y))


def test_integers_to_a_power_wrap() -> None:
    x, y = np.array([-3, 2, 0, 46341], np.int32), np.array([3, 30, 0, 2], np.int32)
    np.testing.assert_array_equal(computed("pow", x=x, y=y), folded("pow", x=x, y=y))


def test_a_quotient_of_integers_is_cut_off_and_exact() -> None:
    x, y = np.array([-7, 7, MOST, MOST - 1, 16777217], np.int32), np.array([2, -2, 1, MOST, 1], np.int32)
    found = rounded(torch.from_numpy(computed("real_div", x=x, y=y)), "int32")
    assert found.tolist() == [-3, -3, MOST, 0, 16777217]


@pytest.mark.parametrize("name", ["floor_div", "mod", "real_div"])
def test_the_least_integer_through_minus_one_ends_no_process(name: str) -> None:
    for count in (1, 33):
        x = np.full(count, LEAST, np.int32)
        assert computed(name, x=x, y=np.int32(-1)).shape == (count,)  # a trap of x86 processors


@pytest.mark.parametrize("name", ["floor_div", "mod", "real_div"])
def test_an_integer_through_zero_is_refused(name: str) -> None:
    with pytest.raises((ZeroDivisionError, RuntimeError), match=r"(?i)zero"):
        computed(name, x=INTS, y=np.int32(0))


def test_zero_to_a_negative_power_is_refused_of_integers() -> None:
    with pytest.raises(ZeroDivisionError, match="0 is raised to a negative power"):
        computed("pow", x=INTS, y=np.int32(-1))
    assert computed("pow", x=np.float32(0), y=np.float32(-1)) == INF


@pytest.mark.parametrize("name", ["logical_and", "logical_or", "logical_xor"])
def test_truth_tables_are_coremltools(name: str) -> None:
    x, y = np.array([[False], [True]]), np.array([False, True])
    np.testing.assert_array_equal(computed(name, x=x, y=y), folded(name, x=x, y=y))


def test_logical_not_is_coremltools() -> None:
    x = np.array([False, True])
    np.testing.assert_array_equal(computed("logical_not", x=x), folded("logical_not", x=x))


def test_shapes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        OPERATIONS["add"](torch.zeros(2, 3), torch.zeros(2))
    row, column = torch.zeros(1).expand(2**16), torch.zeros(1).expand(2**16, 1)
    for name in ("add", "greater"):
        with pytest.raises(ArtifactError, match=f"a tensor of {2**32} values is more than"):
            OPERATIONS[name](row, column)


def test_a_program_rounds_after_each_operation() -> None:
    def program(x: Any) -> Any:
        square = mb.square(x=x)
        return mb.cast(x=square, dtype="fp32"), mb.sub(x=mb.add(x=x, y=np.float16(1)), y=np.float16(1))

    made = converted(program, [mb.TensorSpec((3,), dtype=types.fp16)], 17)
    x = np.array([256, 255, 2**-12], np.float16)
    square, back = ReferenceModel(made.package_path).predict({"x": x}).values()
    np.testing.assert_array_equal(square, np.float32([INF, 65024, 2**-24]))  # 255^2 = 65025 has no float16
    np.testing.assert_array_equal(back, np.float16([256, 255, 0]))
    square, back = ReferenceModel(made.package_path, keep_float32=True).predict({"x": x}).values()
    np.testing.assert_array_equal(square, np.float32([65536, 65025, 2**-24]))
    np.testing.assert_array_equal(back, np.float16([256, 255, 2**-12]))
