"""Rounding to a declared type, and the bounds that every operation is held to."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies

from exporter.errors import ArtifactError
from targets.coreml_ios.executor import values
from targets.coreml_ios.executor.values import Declared, rounded

FLOAT32 = strategies.floats(width=32, allow_nan=False)


def one(value: float, kind: str, **more: Any) -> Any:
    return rounded(torch.tensor([value], dtype=torch.float32), kind, **more).item()


@given(FLOAT32)
def test_float16_is_the_nearest_ties_to_even(value: float) -> None:
    """Python's own conversion to half precision is the oracle; it refuses what rounds to infinity."""
    try:
        wanted = struct.unpack("e", struct.pack("e", value))[0]
    except OverflowError:
        wanted = np.copysign(np.inf, value)
    assert one(value, "fp16") == wanted


@given(FLOAT32)
def test_what_is_rounded_stays(value: float) -> None:
    once = one(value, "fp16")
    assert one(once, "fp16") == once
    assert one(value, "fp16", keep_float32=True) == np.float32(value)
    assert one(value, "fp32") == np.float32(value)


@given(strategies.integers(-(2**31), 2**31 - 1))
def test_integers_keep_their_low_bits(value: int) -> None:
    given_ = torch.tensor([value], dtype=torch.int32)
    for kind in ("int8", "uint8", "int16", "uint16", "int32"):
        wanted = np.array([value], np.int64).astype(kind)
        assert rounded(given_, kind).tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(1.9, 1), (-1.9, -1), (3e9, 2**31 - 1), (-3e9, -(2**31)), (float("inf"), 2**31 - 1), (float("nan"), 0)],
)
def test_floats_become_integers_towards_zero_and_within_bounds(value: float, wanted: int) -> None:
    assert one(value, "int32") == wanted


def test_shapes_are_held_to_what_is_declared() -> None:
    for shape in (None, (2, None), (2, 3)):
        values.require_shape(torch.zeros(2, 3), Declared("fp32", shape), "y")
    for other in ((2,), (3, None), (2, 3, 1)):
        with pytest.raises(ArtifactError, match=r"y came out as \[2, 3\]; the program says \["):
            values.require_shape(torch.zeros(2, 3), Declared("fp32", other), "y")


@pytest.mark.parametrize(
    "shapes", [[(2**15, 1), (1, 2**15)], [(2**30,)], [(4, 1, 2**14), (2**14, 1)]],
)  # fmt: skip
def test_broadcasts_that_no_memory_holds_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ArtifactError, match=r"a tensor of \d+ values is more than the \d+ that are computed here"):
        values.require_broadcast_room(*shapes)


def test_broadcasts_that_only_look_large_are_not() -> None:
    values.require_broadcast_room((2**20,), (2**20,), (1,))
    values.require_broadcast_room((0, 2**30), (2**20, 1))


def test_axes_and_whole_numbers() -> None:
    assert values.axis_of(torch.tensor(-1), 3) == 2
    assert values.wholes(None) == []
    assert values.wholes([torch.tensor(1), torch.tensor(2)]) == [1, 2]
    assert values.flags(None, 2) == [False, False]
    with pytest.raises(IndexError, match="axis 3 is not one of the 3"):
        values.axis_of(3, 3)
    with pytest.raises(ValueError, match=f"{2**20 + 1} values are more than any shape, axes or counts"):
        values.wholes(torch.zeros(1).expand(2**20 + 1))
