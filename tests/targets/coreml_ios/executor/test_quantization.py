"""Quantization of activations: coremltools' own numbers, ends of the ranges, ties, and what does not fit."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from targets.coreml_ios.backend import ct, mb
from targets.coreml_ios.executor.machine import carried
from targets.coreml_ios.executor.ops.quantization import dequantize, quantize
from targets.coreml_ios.executor.values import rounded

CASES = list(itertools.product(("int8", "uint8"), (0, -1, 1, None), (True, False)))


def given(name: str, axis: int | None, has_zero: bool) -> dict[str, Any]:
    """Scales and zero points for an array [3, 4]."""
    rng = np.random.default_rng(0)
    shape = () if axis is None else ((3, 4)[axis],)
    zero = {"zero_point": rng.integers(0, 100, shape).astype(name)} if has_zero else {}
    return {"scale": np.asarray(rng.uniform(0.01, 2, shape), np.float32), **zero} | (
        {} if axis is None else {"axis": np.int32(axis)}
    )


def tensors(parts: dict[str, Any]) -> dict[str, Tensor]:
    return {key: carried(np.array(value)) for key, value in parts.items()}


@pytest.mark.parametrize(("name", "axis", "has_zero"), CASES)
def test_both_ways_are_coremltools_own(name: str, axis: int | None, has_zero: bool) -> None:
    rng, parts = np.random.default_rng(1), given(name, axis, has_zero)
    floats = (rng.normal(size=(3, 4)) * 50).astype(np.float32)
    wholes = rng.integers(0, 128, (3, 4)).astype(name)
    with ct.converters.mil.mil.Function({}, opset_version=ct.target.iOS17):
        there = mb.quantize(input=floats, output_dtype=name, **parts).val
        back = mb.dequantize(input=wholes, **parts).op.materialized_val_inference()

    assert np.array_equal(quantize(carried(floats), output_dtype=name, **tensors(parts)).numpy(), there)
    assert np.array_equal(dequantize(carried(wholes), **tensors(parts)).numpy(), back)


def test_numbers_are_rounded_to_nearest_ties_to_even_and_held_in_range() -> None:
    values = torch.tensor([0.5, 1.5, -0.5, 2.5, 1e9, -1e9, torch.inf, -torch.inf, torch.nan])
    one = torch.tensor(1.0)
    assert quantize(values, one, "int8").tolist() == [0, 2, 0, 2, 127, -128, 127, -128, 0]
    assert quantize(values, one, "uint8", torch.tensor(3)).tolist() == [3, 5, 3, 5, 255, 0, 255, 0, 0]


@pytest.mark.parametrize("name", ["int8", "uint8"])
def test_there_and_back_is_off_by_half_a_step_at_most(name: str) -> None:
    values = torch.linspace(0, 3, 31)[None]
    step, zero = torch.tensor([0.025]), torch.tensor([5])
    codes = rounded(quantize(values, step, name, zero, torch.tensor(0)), name)
    assert codes.dtype == torch.int32
    assert (dequantize(codes, step, zero, torch.tensor(0)) - values).abs().max() <= 0.025 / 2 + 1e-6


def test_parts_that_do_not_fit_are_refused() -> None:
    values, two = torch.ones(3, 4), torch.ones(2)
    with pytest.raises(ValueError, match="2 scales or zero points, but no axis for them"):
        quantize(values, two, "int8")
    with pytest.raises(ValueError, match=r"scales or zero points are \[2\]; axis 1 has 4 places"):
        dequantize(values, two, axis=torch.tensor(1))
    with pytest.raises(KeyError, match="int4"):
        quantize(values, torch.tensor(1.0), "int4")
    with pytest.raises(IndexError):
        quantize(values, two, "int8", axis=torch.tensor(2))
