"""Convolutions: against sums written out in float64, and the law that a transposed one is the other's adjoint."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import ArtifactError
from targets.coreml_ios.backend import ct, get_new_symbol, mb
from targets.coreml_ios.executor import values
from targets.coreml_ios.executor.ops import OPERATIONS
from tests.targets.coreml_ios.executor.oracle import Array, computed
from tests.targets.coreml_ios.executor.programs import runnable

RANDOM = np.random.default_rng(5)
Shape = Sequence[int]


def drawn(*shape: int) -> Array:
    """Whole numbers, so that sums in float32 are exact in any order."""
    return RANDOM.integers(-8, 9, shape).astype(np.float32)


def written_out(x: Array, weight: Array, strides: Shape, dilations: Shape, groups: int, around: Any) -> Array:
    """The definition, one product after the other; `around` is (before, after) for each dimension."""
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *around])
    kernel, per_group = weight.shape[2:], weight.shape[0] // groups
    sizes = [(size - (k - 1) * d - 1) // s + 1
             for size, k, s, d in zip(padded.shape[2:], kernel, strides, dilations)]  # fmt: skip
    y = np.zeros([len(x), len(weight), *sizes])
    for n, o, *place in np.ndindex(*y.shape):
        for c, *inner in np.ndindex(*weight.shape[1:]):
            at = [p * s + k * d for p, s, k, d in zip(place, strides, inner, dilations)]
            channel = o // per_group * weight.shape[1] + c
            y[(n, o, *place)] += weight[(o, c, *inner)] * padded[(n, channel, *at)]
    return y


CASES = [
    # x, weight, strides, dilations, groups, pad
    ((1, 1, 5), (1, 1, 1), (1,), (1,), 1, (0, 0)),
    ((2, 3, 7), (4, 3, 3), (2,), (2,), 1, (1, 3)),
    ((1, 4, 6), (6, 2, 2), (3,), (1,), 2, (0, 2)),
    ((1, 2, 5, 4), (2, 2, 3, 2), (1, 2), (1, 1), 1, (1, 1, 0, 1)),
    ((2, 3, 5, 6), (3, 1, 2, 3), (2, 1), (2, 1), 3, (2, 0, 1, 1)),
    ((1, 2, 3, 4, 3), (2, 1, 2, 2, 2), (1, 2, 1), (2, 1, 1), 2, (1, 0, 0, 1, 1, 1)),
]


@pytest.mark.parametrize(("x", "weight", "strides", "dilations", "groups", "pad"), CASES)
def test_conv_is_its_sum_written_out(
    x: Shape, weight: Shape, strides: Shape, dilations: Shape, groups: int, pad: Shape
) -> None:
    given, kernel, bias = drawn(*x), drawn(*weight), drawn(weight[0])
    found = computed("conv", x=given, weight=kernel, bias=bias, strides=strides, dilations=dilations, groups=groups,
                     pad=pad, pad_type="custom")  # fmt: skip
    wanted = written_out(given, kernel, strides, dilations, groups, list(zip(pad[::2], pad[1::2])))
    np.testing.assert_array_equal(found, wanted + bias.reshape([-1] + [1] * (len(x) - 2)))


@pytest.mark.parametrize("kind", ["valid", "same", "same_lower", "custom"])
@pytest.mark.parametrize(("x", "weight", "strides", "dilations", "groups", "pad"), CASES)
def test_transposed_conv_is_the_adjoint_of_conv(
    kind: str, x: Shape, weight: Shape, strides: Shape, dilations: Shape, groups: int, pad: Shape
) -> None:
    """<conv(x), y> = <x, conv_transpose(y)> for the same weight, if told the shape of x."""
    given, kernel = drawn(*x), drawn(*weight)
    same = {"weight": kernel, "strides": strides, "dilations": dilations, "groups": groups, "pad_type": kind,
            "pad": pad if kind == "custom" else [0] * len(pad)}  # fmt: skip
    forward = computed("conv", x=given, **same)
    y = drawn(*forward.shape)
    back = computed("conv_transpose", x=y, output_shape=x, **same)
    assert back.shape == tuple(x)
    assert (forward * y).sum(dtype=np.float64) == (given * back).sum(dtype=np.float64)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation"), [*itertools.product((4, 5), (2, 3), (1, 2, 4), (1, 2))]
)
def test_same_gives_the_size_divided_by_the_stride_and_lower_is_its_mirror_image(
    size: int, kernel: int, stride: int, dilation: int
) -> None:
    x, weight = drawn(1, 2, size), drawn(1, 2, kernel)
    steps = {"strides": [stride], "dilations": [dilation]}
    found = computed("conv", x=x, weight=weight, pad_type="same", **steps)
    total = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
    around = [(total // 2, total - total // 2)]
    assert found.shape[2] == -(-size // stride)
    np.testing.assert_array_equal(found, written_out(x, weight, [stride], [dilation], 1, around))
    lower = computed("conv", x=x, weight=weight, pad_type="same_lower", **steps)
    np.testing.assert_array_equal(lower, written_out(x, weight, [stride], [dilation], 1, [around[0][::-1]]))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation"), [*itertools.product((1, 3), (1, 2, 3), (1, 2), (1, 2))]
)
def test_transposed_sizes_without_a_given_shape(size: int, kernel: int, stride: int, dilation: int) -> None:
    def sizes(**more: Any) -> int:
        y = computed("conv_transpose", x=drawn(1, 1, size), weight=drawn(1, 1, kernel), strides=[stride],
                     dilations=[dilation], **more)  # fmt: skip
        return int(y.shape[2])

    full = (size - 1) * stride + (kernel - 1) * dilation + 1
    assert sizes() == sizes(pad_type="valid") == full
    assert sizes(pad_type="same") == size * stride
    if full > 1:
        assert sizes(pad_type="custom", pad=[1, 0]) == full - 1


def test_behind_what_a_transposed_window_reaches_is_bias_alone() -> None:
    found = computed("conv_transpose", x=[[[1.0, 2.0]]], weight=[[[3.0]]], bias=[0.5], strides=[3],
                     output_shape=[1, 1, 6])  # fmt: skip
    np.testing.assert_array_equal(found, [[[3.5, 0.5, 0.5, 6.5, 0.5, 0.5]]])


@pytest.mark.parametrize("stride", [65536, 2**24, 2**31 - 1])
def test_strides_that_nothing_needs_do_not_end_the_process(stride: int) -> None:
    """With torch 2.13 in float32 each of these is a segmentation fault, or a division by zero in the processor."""
    x, weight = drawn(4, 5, 1), drawn(5, 4, 3)
    found = computed("conv_transpose", x=x, weight=weight, strides=[stride])
    np.testing.assert_array_equal(found, np.einsum("bci,cok->bok", x, weight))


def test_quantized_weights_are_scaled_and_shifted_by_channel_or_all_alike() -> None:
    x, codes = drawn(1, 2, 4), RANDOM.integers(0, 256, (3, 2, 2)).astype(np.uint8)
    for scale, shift in (([0.5], [-3.0]), ([0.5, 0.25, 2.0], [1.0, -1.0, 0.0])):
        found = computed("conv_quantized", x=x, weight=codes, quantization_type="linear", nbits=8,
                         quant_scale=np.float32(scale), quant_bias=np.float32(shift),
                         bias=np.uint8([1, 2, 3]))  # fmt: skip
        weight = codes * np.reshape(scale, (-1, 1, 1)) + np.reshape(shift, (-1, 1, 1))
        wanted = written_out(x, weight, [1], [1], 1, [(0, 0)]) + np.reshape([1, 2, 3], (-1, 1))
        np.testing.assert_array_equal(found, wanted)


def test_a_table_of_weights_that_is_nowhere_given_is_refused() -> None:
    with pytest.raises(ValueError, match="quantization_type 'lut': only 'linear' has its constants in the operation"):
        computed("conv_quantized", x=drawn(1, 1, 2), weight=[[[1]]], quantization_type="lut", quant_scale=[1.0],
                 quant_bias=[0.0])  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"pad_type": "full"}, "pad_type 'full'; it is valid, same, same_lower or custom"),
        ({"pad_type": "custom", "pad": [1]}, r"pad \[1\]; it is before and after for each of 1 dimensions"),
        ({"pad_type": "custom", "pad": [-1, 0]}, r"pad \[-1, 0\]; .* none negative"),
        ({"strides": [0]}, r"steps \[0\]; they are positive, one for each of 1 dimensions"),
        ({"dilations": [1, 1]}, r"steps \[1, 1\]; they are positive, one for each of 1 dimensions"),
        ({"x": np.zeros((2, 2), np.float32)}, "x has rank 2; it is 3, 4 or 5"),
    ],
)
@pytest.mark.parametrize("operation", ["conv", "conv_transpose"])
def test_parameters_that_do_not_fit_are_refused(operation: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        computed(operation, **{"x": drawn(1, 1, 3), "weight": drawn(1, 1, 2), **more})


@pytest.mark.parametrize(
    ("operation", "more"),
    [
        ("conv", {"weight": [[[1.0]]], "groups": 3}),
        ("conv", {"weight": [[[1.0], [1.0]]]}),
        ("conv", {"weight": [[[[1.0]]]]}),
        ("conv", {"weight": [[[1.0] * 9]]}),  # longer than what is there
        ("conv_transpose", {"weight": [[[1.0]]], "output_shape": [1, 1, -1]}),
        ("conv_transpose", {"weight": [[[1.0]]], "pad_type": "custom", "pad": [3, 3]}),
    ],
)
def test_shapes_that_do_not_fit_end_in_an_error(operation: str, more: dict[str, Any]) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        computed(operation, x=drawn(1, 1, 4), **more)


@pytest.mark.parametrize(
    ("operation", "more"),
    [
        ("conv", {"pad_type": "custom", "pad": [2**30, 2**30]}),
        ("conv", {"pad_type": "custom", "pad": [2**18, 0], "weight": np.zeros((2**12, 1, 1), np.float32)}),
        ("conv_transpose", {"strides": [2**30]}),
        ("conv_transpose", {"output_shape": [1, 1, 2**30]}),
    ],
)
def test_results_that_no_memory_holds_are_refused(operation: str, more: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=f"is more than the {values.LARGEST} that are computed here"):
        computed(operation, **{"x": drawn(1, 1, 3), "weight": drawn(1, 1, 2), **more})


def test_a_program_with_a_weight_that_it_is_given_and_an_unknown_batch() -> None:
    def program(x: Any, weight: Any) -> Any:
        return mb.conv(x=x, weight=weight, groups=2, pad_type="same_lower", strides=[2], name="y")

    inputs = [ct.TensorType("x", (ct.RangeDim(1, 8), 2, 5)), ct.TensorType("weight", (4, 1, 3))]
    specs = [mb.TensorSpec((get_new_symbol(), 2, 5)), mb.TensorSpec((4, 1, 3))]
    x, weight = drawn(3, 2, 5), drawn(4, 1, 3)
    found = runnable(program, specs, 17, inputs=inputs).predict({"x": x, "weight": weight})["y"]
    np.testing.assert_array_equal(found, written_out(x, weight, [2], [1], 2, [(1, 1)]))


def test_float16_sums_are_rounded_once() -> None:
    """2048 + 1 + 1: in float16 alone each 1 is lost; the sum in float32 is a float16."""
    ones = torch.ones(1, 3, 1)
    y = OPERATIONS["conv"](torch.tensor([[[2048.0], [1.0], [1.0]]]), ones)
    assert float(values.rounded(y, "fp16")) == 2050
