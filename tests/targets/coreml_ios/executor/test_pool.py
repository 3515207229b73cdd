"""Pools: against windows written out, torch's own, and what they do at the edge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from exporter.errors import ArtifactError
from targets.coreml_ios.executor.values import LARGEST
from tests.targets.coreml_ios.executor.oracle import Array, computed

RANDOM = np.random.default_rng(6)
Shape = Sequence[int]


def windows(x: Array, kernel: Shape, strides: Shape, around: Any) -> Any:
    """What each window sees of the input, and how many values it and its padding have there."""
    ranges = [range(-before, size + after - k + 1, s)
              for size, k, s, (before, after) in zip(x.shape[2:], kernel, strides, around)]  # fmt: skip
    for place in itertools.product(*(enumerate(starts) for starts in ranges)):
        cut = tuple(slice(max(0, at), at + k) for (_, at), k in zip(place, kernel))
        yield tuple(p for p, _ in place), x[(..., *cut)], math.prod(kernel)


def written_out(kind: str, x: Array, kernel: Shape, strides: Shape, around: Any, exclude: bool = False) -> Array:
    found = {}
    for place, seen, count in windows(x.astype(np.float64), kernel, strides, around):
        axes = tuple(range(2, x.ndim))
        if kind == "max_pool":
            found[place] = seen.max(axes)
        elif kind == "l2_pool":
            found[place] = np.sqrt((seen**2).sum(axes))
        else:
            found[place] = seen.sum(axes) / (math.prod(seen.shape[2:]) if exclude else count)
    sizes = [1 + max(place[d] for place in found) for d in range(len(kernel))]
    return np.stack(list(found.values()), -1).reshape([*x.shape[:2], *sizes])


CASES = [
    ((1, 2, 6), (2,), (1,), (0, 0)),
    ((2, 1, 7), (3,), (2,), (1, 2)),
    ((1, 2, 5, 4), (2, 3), (2, 1), (1, 0, 2, 1)),
    ((1, 1, 4, 3, 5), (2, 1, 3), (1, 2, 2), (1, 1, 0, 0, 0, 2)),
]


@pytest.mark.parametrize(("shape", "kernel", "strides", "pad"), CASES)
@pytest.mark.parametrize("operation", ["avg_pool", "max_pool", "l2_pool"])
def test_pool_is_its_windows_written_out(
    operation: str, shape: Shape, kernel: Shape, strides: Shape, pad: Shape
) -> None:
    x = RANDOM.integers(-9, 10, shape).astype(np.float32)
    found = computed(operation, x=x, kernel_sizes=kernel, strides=strides, pad_type="custom", pad=pad)
    wanted = written_out(operation, x, kernel, strides, list(zip(pad[::2], pad[1::2])))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(("shape", "kernel", "strides", "pad"), CASES)
def test_padding_does_not_count_where_it_is_excluded(shape: Shape, kernel: Shape, strides: Shape, pad: Shape) -> None:
    found = computed("avg_pool", x=np.ones(shape, np.float32), kernel_sizes=kernel, strides=strides, pad_type="custom",
                     pad=pad, exclude_padding_from_average=True)  # fmt: skip
    np.testing.assert_array_equal(found, np.ones(found.shape))


@pytest.mark.parametrize(("size", "kernel", "stride"), [*itertools.product((1, 4, 5), (1, 2, 3), (1, 2, 3))])
def test_same_pads_behind_first_and_lower_before(size: int, kernel: int, stride: int) -> None:
    x = RANDOM.integers(-9, 10, (1, 1, size)).astype(np.float32)
    total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    less, more = total // 2, total - total // 2
    for pad_type, around in (("same", (less, more)), ("same_lower", (more, less))):
        found = computed("max_pool", x=x, kernel_sizes=[kernel], strides=[stride], pad_type=pad_type)
        assert found.shape[2] == -(-size // stride)
        np.testing.assert_array_equal(found, written_out("max_pool", x, [kernel], [stride], [around]))


EDGES = [(size, kernel, stride, pad) for size, kernel, stride, pad in
         itertools.product(range(1, 8), (1, 2, 3, 4), (1, 2, 3), (0, 1, 2))
         if pad <= kernel // 2 and size + 2 * pad >= kernel]  # fmt: skip


@pytest.mark.parametrize("include", [True, False])
def test_ceil_mode_is_that_of_torch(include: bool) -> None:
    seen = 0
    for size, kernel, stride, pad in EDGES:
        x = RANDOM.normal(size=(1, 2, size)).astype(np.float32)
        beyond = (math.ceil((size + 2 * pad - kernel) / stride)) * stride >= size + pad
        if pad == 0 and beyond:
            continue  # the next test
        same = {"x": x, "kernel_sizes": [kernel], "strides": [stride], "pad_type": "custom", "pad": [pad, pad],
                "ceil_mode": True}  # fmt: skip
        wanted = F.avg_pool1d(torch.from_numpy(x), kernel, stride, pad, ceil_mode=True, count_include_pad=include)
        found = computed("avg_pool", exclude_padding_from_average=not include, **same)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)
        wanted = F.max_pool1d(torch.from_numpy(x), kernel, stride, pad, ceil_mode=True)
        np.testing.assert_array_equal(computed("max_pool", **same), wanted.numpy())
        seen += 1
    assert seen > 100


def test_ceil_mode_without_padding_counts_a_window_behind_the_end_which_has_no_mean() -> None:
    """As coremltools counts them: it takes the last one away only where there is padding."""
    found = computed("avg_pool", x=[[[1.0, 2.0, 3.0]]], kernel_sizes=[1], strides=[3], pad_type="valid", ceil_mode=True)
    np.testing.assert_array_equal(found, [[[1.0, np.nan]]])


def test_padding_is_never_the_greatest_and_nothing_hides_nan() -> None:
    same = {"kernel_sizes": [2], "pad_type": "custom", "pad": [1, 1]}
    np.testing.assert_array_equal(computed("max_pool", x=[[[-3.0, -2.0]]], **same), [[[-3.0, -2.0, -2.0]]])
    found = computed("max_pool", x=[[[-3.0, np.nan]]], **same)
    np.testing.assert_array_equal(found, [[[-3.0, np.nan, np.nan]]])


def test_parameters_that_may_be_left_out() -> None:
    x = RANDOM.normal(size=(1, 1, 4)).astype(np.float32)
    for operation in ("avg_pool", "max_pool", "l2_pool"):
        short = computed(operation, x=x, kernel_sizes=[2], pad_type="valid")
        long = computed(operation, x=x, kernel_sizes=[2], pad_type="valid", strides=[1], pad=[5, 5], ceil_mode=False)
        np.testing.assert_array_equal(short, long)  # valid has no padding, whatever pad says
        assert short.shape == (1, 1, 3)


@pytest.mark.parametrize(
    "more",
    [{"kernel_sizes": [2, 2]}, {"kernel_sizes": [0]}, {"strides": [0]}, {"strides": [1, 1]}, {"x": [[1.0, 2.0]]}],
)
def test_windows_that_do_not_fit_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"kernel_sizes \[.*\] and strides \[.*\] do not fit an input of sizes \[.*\]"):
        computed("max_pool", **{"x": [[[1.0, 2.0]]], "kernel_sizes": [1], "pad_type": "valid", **more})


def test_window_that_is_greater_than_its_input_is_refused() -> None:
    with pytest.raises(RuntimeError):
        computed("avg_pool", x=[[[1.0, 2.0]]], kernel_sizes=[3], pad_type="valid")


def test_padding_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(ArtifactError, match=f"is more than the {LARGEST} that are computed here"):
        computed("max_pool", x=[[[1.0]]], kernel_sizes=[1], pad_type="custom", pad=[2**30, 0])
