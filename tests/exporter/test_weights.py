"""The six nodes: what `.dense()` says, against the slowest possible words; and what they refuse."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import WeightError
from exporter.weights import Dense, LowBit, Packed, Product, Shared, Sparse, Sum, describe, nodes, to_meta
from tests.models import low_bit, sparse, trees


@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 20), st.integers(1, 24), st.booleans())
def test_low_bit_is_scale_times_code_minus_zero_per_group(
    bits: int, out: int, width: int, group: int, sym: bool
) -> None:
    weight = low_bit((out, width), bits, group, symmetric=sym)
    dense = weight.dense(torch.float64)
    for row in range(out):
        for column in range(width):
            g = column // group
            zero = weight.zeros[0, 0] if sym or weight.zeros.shape == (1, 1) else weight.zeros[row, g]
            expected = weight.scales[row, g].double() * (float(weight.codes[row, column]) - zero.double())
            assert dense[row, column] == expected


@given(st.sampled_from([(2, 4), (1, 2), (4, 8), (3, 4), (6, 8)]), st.integers(1, 5), st.integers(1, 4))
def test_sparse_puts_kept_values_at_their_places_and_nothing_elsewhere(
    nm: tuple[int, int], out: int, groups: int
) -> None:
    n, m = nm
    weight = sparse((out, groups * m), n, m)
    dense, kept = weight.dense(), weight.kept.dense()
    for row in range(out):
        expected = [0.0] * (groups * m)
        for index in range(groups * n):
            expected[index // n * m + int(weight.places[row, index])] = float(kept[row, index])
        assert dense[row].tolist() == expected
    assert torch.equal(weight.mask.view(out, groups, m).sum(-1), torch.full((out, groups), n))


def test_shared_product_and_sum_say_what_they_are() -> None:
    rows, labels = torch.randn(3, 5), torch.tensor([2, 0, 0, 1])
    left, right = torch.randn(4, 2), torch.randn(2, 5)
    weight = Sum((Shared(Dense(rows), labels), Product(Dense(left), Dense(right))))

    assert torch.allclose(weight.dense(), rows[labels] + left @ right)
    assert weight.shape == (4, 5)
    assert [type(node).__name__ for node in nodes(weight)] == ["Sum", "Shared", "Dense", "Product", "Dense", "Dense"]


def test_every_tree_keeps_its_shape_on_the_meta_device() -> None:
    for name, weight in trees((32, 64)).items():
        assert weight.dense().shape == weight.shape == (32, 64), name


def test_a_tree_is_described_in_a_phrase() -> None:
    assert describe(trees((32, 64))["2:4 of 4-bit"]) == "2:4 of 4-bit group 16"
    assert describe(trees((32, 64))["shared + low rank"]) == (
        "8 shared rows of 4-bit group 32 + rank 8 (float32 x float32)"
    )


def _low(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, group: int) -> LowBit:
    return LowBit(codes, scales, zeros, bits, group)


C, S, Z = torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 2), torch.zeros(1, 1)
P = torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense(torch.zeros(3)), r"has 2 dimensions, not 1"),
        (lambda: Dense(torch.zeros(3, 3, dtype=torch.int32)), r"float type, not torch.int32"),
        (lambda: _low(C, S, Z, 9, 2), r"9 bits is not a width; widths that are: 1 to 8"),
        (lambda: _low(C, S, Z, 4, 0), r"group of 0 columns"),
        (lambda: _low(C, S, Z, 4, 4), r"scales are \(2, 2\), not \(2, 1\)"),
        (lambda: _low(C, S, torch.zeros(2, 1), 4, 2), r"neither \(2, 2\) nor \(1, 1\)"),
        (lambda: _low(C + 3, S, Z, 1, 2), r"code 3 does not fit 1 bits"),
        (lambda: _low(C.int(), S, Z, 4, 2), r"codes are uint8"),
        (lambda: _low(C[0], S, Z, 4, 2), r"codes have 2 dimensions"),
        (lambda: _low(C, S.int(), Z, 4, 2), r"scales and zeros are floats"),
        (lambda: Sparse(Dense(torch.zeros(2, 2)), P, 5, 4), r"5:4 is not a sparsity"),
        (lambda: Sparse(Dense(torch.zeros(2, 4)), P, 2, 4), r"differ in shape"),
        (lambda: Sparse(Dense(torch.zeros(2, 2)), P.int(), 2, 4), r"places are uint8"),
        (lambda: Sparse(Dense(torch.zeros(2, 2)), P.flip(1), 2, 4), r"must rise"),
        (lambda: Sparse(Dense(torch.zeros(2, 2)), P + 2, 2, 4), r"stay under 4"),
        (lambda: Sparse(Dense(torch.zeros(2, 3)), torch.zeros(2, 3, dtype=torch.uint8), 2, 4), r"no multiple of 2"),
        (lambda: Shared(Dense(torch.zeros(2, 2)), torch.tensor([0, 2])), r"labels run from 0 to 2; there are 2 rows"),
        (lambda: Shared(Dense(torch.zeros(2, 2)), torch.tensor([0.0])), r"one row of int64"),
        (lambda: Product(Dense(torch.zeros(2, 3)), Dense(torch.zeros(2, 3))), r"left has rank 3, right has rank 2"),
        (lambda: Sum((Dense(torch.zeros(2, 3)), Dense(torch.zeros(3, 2)))), r"terms of one shape"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(make: object, message: str) -> None:
    with pytest.raises(WeightError, match=message):
        make()  # type: ignore[operator]


def test_shapes_and_nodes_of_packed_leaves_are_known_without_unpacking() -> None:
    def refuse(stored: torch.Tensor) -> torch.Tensor:
        raise AssertionError("unpacked")

    codes = cast(torch.Tensor, Packed(torch.zeros(8, 4, dtype=torch.uint8), (8, 8), refuse))
    weight = LowBit(codes, torch.ones(8, 2), torch.full((1, 1), 8.0), 4, 4)

    assert weight.shape == to_meta(weight).shape == (8, 8)
    assert (weight.groups, weight.is_symmetric) == (2, True)
    assert describe(weight) == "4-bit group 4"
    assert [*nodes(Sum((weight, weight)))][1:] == [weight, weight]
    with pytest.raises(AssertionError, match="unpacked"):
        weight.dense()
    with pytest.raises(WeightError, match=r"scales are \(8, 1\), not \(8, 2\)"):
        LowBit(codes, torch.ones(8, 1), weight.zeros, 4, 4)
