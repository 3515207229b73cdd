"""Packing is exact both ways, and is the layout that it says it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import WeightError
from exporter.packing import pack, packed_width, unpack


@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_unpack_undoes_pack_for_every_width(bits: int, rows: int, columns: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8)

    packed = pack(values, bits)

    assert packed.shape == (rows, packed_width(columns, bits))
    assert np.array_equal(unpack(packed, bits, columns), values)


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=30))
def test_value_i_takes_bits_from_i_times_width_low_bit_first(bits: int, raw: list[int]) -> None:
    values = [value % 2**bits for value in raw]
    stream = sum(value << (index * bits) for index, value in enumerate(values))

    packed = pack(np.array(values, dtype=np.uint8), bits)

    assert packed.tobytes() == stream.to_bytes(packed_width(len(values), bits), "little")


def test_a_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(WeightError, match="value 4 does not fit 2 bits"):
        pack(np.array([4], dtype=np.uint8), 2)


def test_rows_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(WeightError, match="9 values of 4 bits take 5 bytes, not 4"):
        unpack(np.zeros((2, 4), dtype=np.uint8), 4, 9)
