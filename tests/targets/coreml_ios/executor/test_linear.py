"""Products of matrices: against coremltools' own folding of constants and numpy, for every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import ArtifactError
from targets.coreml_ios.executor.ops import OPERATIONS
from tests.targets.coreml_ios.executor.oracle import Array, computed, folded

RNG = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def whole(*shape: int) -> Array:
    return RNG.integers(-9, 9, size=shape).astype(np.int32)


def close(found: Array, wanted: Array) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("made", [floats, whole])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (1, 2, 3, 4), (0, 4)])
def test_linear_is_coremltools(shape: tuple[int, ...], made: Any) -> None:
    x, weight, bias = made(*shape), made(5, 4), made(5)
    close(computed("linear", x=x, weight=weight, bias=bias), folded("linear", x=x, weight=weight, bias=bias))
    close(computed("linear", x=x, weight=weight), x @ weight.T)


def test_linear_of_integers_wraps_and_is_exact() -> None:
    x, weight = np.array([[2**30, 16777217]], np.int32), np.array([[4, 1], [2, 0]], np.int32)
    assert computed("linear", x=x, weight=weight).tolist() == [[16777217, -(2**31)]]


def test_floats_and_integers_are_multiplied_as_floats() -> None:
    x, weight = floats(2, 4), whole(3, 4)
    close(computed("linear", x=x, weight=weight, bias=whole(3) * 0), x @ weight.T)
    close(computed("matmul", x=x, y=weight, transpose_y=True), x @ weight.T)


@pytest.mark.parametrize(("weight", "bias"), [((4,), None), ((1, 5, 4), None), ((5, 4), (1,)), ((5, 4), (2, 5))])
def test_weights_that_are_no_matrix_are_refused(weight: tuple[int, ...], bias: tuple[int, ...] | None) -> None:
    with pytest.raises(ValueError, match=r"are not \[out, in\] and \[out\]"):
        OPERATIONS["linear"](torch.zeros(2, 4), torch.zeros(weight), None if bias is None else torch.zeros(bias))


def test_linear_of_other_widths_is_refused() -> None:
    for dtype in (torch.float32, torch.int32):
        with pytest.raises(RuntimeError):
            OPERATIONS["linear"](torch.zeros(2, 3, dtype=dtype), torch.zeros(5, 4, dtype=dtype))


@pytest.mark.parametrize("made", [floats, whole])
@pytest.mark.parametrize(
    ("x", "y"),
    [((4,), (4, 5)), ((3, 4), (4, 5)), ((10, 3, 4), (2, 10, 4, 5)), ((2, 1, 3, 4), (3, 4, 5)), ((0, 4), (4, 5)),
     ((4,), (2, 4, 5))],
)  # fmt: skip
def test_matmul_is_coremltools(x: tuple[int, ...], y: tuple[int, ...], made: Any) -> None:
    a, b = made(*x), made(*y)
    close(computed("matmul", x=a, y=b), folded("matmul", x=a, y=b))
    turned = np.swapaxes(b, -1, -2).copy()
    close(computed("matmul", x=a, y=turned, transpose_y=True), a @ b)
    if a.ndim > 1:
        other = np.swapaxes(a, -1, -2).copy()
        close(computed("matmul", x=other, y=b, transpose_x=True), a @ b)
        close(computed("matmul", x=other, y=turned, transpose_x=True, transpose_y=True), a @ b)


def test_matmul_of_vectors_and_of_nothing() -> None:
    x, y = floats(2, 3, 4), floats(4)
    close(computed("matmul", x=y, y=y, transpose_x=True, transpose_y=True), np.asarray(y @ y))
    close(computed("matmul", x=x, y=y), x @ y)
    close(computed("matmul", x=floats(3, 0), y=floats(0, 2)), np.zeros((3, 2), np.float32))


def test_matmul_of_other_sizes_is_refused() -> None:
    for x, y in (((3, 4), (3, 4)), ((2, 3, 4), (3, 4, 5)), ((), (4, 5))):
        with pytest.raises(RuntimeError):
            OPERATIONS["matmul"](torch.zeros(x), torch.zeros(y))


def test_products_that_are_enormous_are_refused() -> None:
    column, row = torch.zeros(1).expand(2**16, 1), torch.zeros(1).expand(1, 2**16)
    many = torch.zeros(1).expand(2**16, 1, 1)
    refused = pytest.raises(ArtifactError, match=f"a tensor of {2**32} values is more than")
    with refused:
        OPERATIONS["matmul"](column, row)
    with refused:
        OPERATIONS["matmul"](many[:, None], many)
    with refused:
        OPERATIONS["matmul"](torch.zeros(2**16, 0), torch.zeros(0, 2**16))
    with refused:
        OPERATIONS["linear"](column, column)
    with refused:
        OPERATIONS["einsum"]([column[:, None], column[None]], "chw,whu->chu")


@pytest.mark.parametrize("equation", ["nchw,nwhu->nchu", "abcd,adce->abce", "NCHW, NWHU -> NCHU"])
@pytest.mark.parametrize("sizes", [(2, 3), (1, 3), (2, 1)])
def test_einsum_of_four_axes_is_numpys(equation: str, sizes: tuple[int, int]) -> None:
    n, h = sizes
    x, y = floats(2, 4, 3, 5), floats(n, 5, h, 6)
    wanted = np.einsum("nchw,nwhu->nchu", x, np.broadcast_to(y, (2, 5, 3, 6)))
    close(OPERATIONS["einsum"]([torch.from_numpy(x), torch.from_numpy(y)], equation).numpy(), wanted)
    turned = floats(2, 6, 3, 2)
    wanted = np.einsum("nchw,nwhu->nchu", np.broadcast_to(y, (2, 5, 3, 6)), turned)
    close(OPERATIONS["einsum"]([torch.from_numpy(y), torch.from_numpy(turned)], equation).numpy(), wanted)


def test_einsum_of_three_axes_is_numpys() -> None:
    x, y = floats(4, 3, 5), floats(5, 1, 6)
    for equation in ("chw,whu->chu", "chw,whr->chr"):
        wanted = np.einsum(equation, x, np.broadcast_to(y, (5, 3, 6)))
        close(OPERATIONS["einsum"]([torch.from_numpy(x), torch.from_numpy(y)], equation).numpy(), wanted)


@pytest.mark.parametrize(
    "equation", ["ij,jk->ik", "nchw,nwhu->nhcu", "nchw,nchw->nchw", "0123,0324->0124", "", "a" * 99]
)
def test_equations_that_core_ml_does_not_have_are_refused(equation: str) -> None:
    with pytest.raises(ValueError, match="is not nchw,nwhu->nchu or chw,whu->chu in other letters"):
        OPERATIONS["einsum"]([torch.zeros(1, 1, 1, 1)] * 2, equation)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((2, 3, 1), (4, 3, 5)), "sums 1 values of one and 4 values of the other"),
        (((2, 3, 4, 1), (1, 3, 5)), "are of 4 and 3 axes, its terms of 3"),
        (((2, 3), (3, 2)), "are of 2 and 2 axes, its terms of 3"),
    ],
)
def test_einsum_of_other_sizes_is_refused(shapes: tuple[tuple[int, ...], ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OPERATIONS["einsum"]([torch.zeros(shape) for shape in shapes], "chw,whu->chu")
