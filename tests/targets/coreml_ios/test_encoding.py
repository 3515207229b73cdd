"""What leaves become: prices are the bits of the arrays, and the arrays decode to the matrix rounded once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from exporter.equivalents import decide
from exporter.ops import Leaf
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, to_meta
from targets.coreml_ios.constants import (
    KINDS,
    Array,
    blockwise_shift_scale,
    lut_to_dense,
    lut_to_sparse,
    sparse_blockwise_shift_scale,
    sparse_to_dense,
)
from targets.coreml_ios.encoding import Parts, labels, leaves, padded_width, parts, price, with_stored_scales
from tests.models import low_bit, sparse

BITS = {kind.name: kind.bits for kind in KINDS}
ZEROS = {"symmetric": None, "whole": 3.0, "halves": 0.5, "thirds": 1 / 3, "outside": -2.0}


@st.composite
def low_bits(draw: st.DrawFn) -> LowBit:
    bits, group = draw(st.integers(1, 8)), draw(st.sampled_from([1, 3, 8, 32, 100]))
    weight = low_bit((draw(st.integers(1, 5)), draw(st.integers(1, 70))), bits, group, seed=draw(st.integers(0, 9)))
    zero = ZEROS[draw(st.sampled_from(sorted(ZEROS)))]
    shape = draw(st.sampled_from([(1, 1), tuple(weight.scales.shape)]))
    return weight if zero is None else replace(weight, zeros=torch.full(shape, zero))


@st.composite
def sparses(draw: st.DrawFn) -> Sparse:
    n, m = draw(st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 5)]))
    bits = draw(st.sampled_from([None, 1, 2, 3, 4, 6, 8]))
    shape = (draw(st.integers(1, 4)), m * draw(st.integers(1, 9)))
    return sparse(shape, n, m, bits, draw(st.sampled_from([4, 6, 16])), draw(st.integers(0, 9)))


def stored_bits(p: Parts) -> int:
    """Bits of the arrays, each value in the width of its type."""
    bits = p.codes.size * BITS[p.codes_type]
    if p.table is not None:
        bits += p.table.size * BITS[p.table_type]
    multiplied = p.table_type if p.table is not None else p.codes_type
    if p.zeros is not None:
        bits += p.zeros.size * (16 if p.zeros.dtype == "float16" else BITS[multiplied])
    return bits + (16 * p.scale.size if p.scale is not None else 0) + (p.mask.size if p.mask is not None else 0)


def decoded(p: Parts) -> Array:
    """The arrays through the operations that Core ML has for them."""
    table = p.table
    if table is not None and p.scale is not None:
        offset = None if p.zeros is None else p.zeros[..., None, None]
        (table,) = blockwise_shift_scale(table, p.scale[..., None, None], offset)
    if p.mask is None:
        if table is not None:
            return lut_to_dense(p.codes, table)[0]
        return p.codes if p.scale is None else blockwise_shift_scale(p.codes, p.scale, p.zeros)[0]
    kept = p.codes
    if table is not None:
        kept = lut_to_sparse(p.mask, p.codes, table)[1]
    elif p.scale is not None:
        kept = sparse_blockwise_shift_scale(p.mask, p.codes, p.scale, p.zeros)[1]
    return sparse_to_dense(kept, p.mask)[0]


@settings(max_examples=200, deadline=None)
@given(st.one_of(low_bits(), sparses()))
def test_a_leaf_that_has_a_price_is_stored_in_that_many_bits_and_decodes_exactly(leaf: Leaf) -> None:
    bits = price(leaf)
    assume(isinstance(bits, int))
    made = parts(leaf, "it")

    assert stored_bits(made) == bits
    matrix = decoded(made)
    assert matrix.shape == (leaf.shape[0], padded_width(leaf))
    assert (matrix[:, : leaf.shape[1]] == leaf.dense().half().numpy()).all()


@settings(max_examples=200, deadline=None)
@given(st.one_of(low_bits(), sparses()))
def test_whatever_is_decided_has_the_models_values_and_a_price(leaf: Leaf) -> None:
    stored, decision = decide(leaf, "site", price)

    assert torch.equal(stored.dense(), leaf.dense())
    bits = price(stored)
    assert isinstance(bits, int)
    assert decision.bytes == -(-bits // 8)
    assert bits <= 16 * leaf.shape[0] * leaf.shape[1]


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        (low_bit((4, 64), 5, 32), "Core ML has no codes of 5 bits"),
        (low_bit((4, 64), 3, 32), "a table of 8 values per group is more than codes of 4 bits"),
        (
            replace(low_bit((4, 64), 8, 32), zeros=torch.full((1, 1), 1 / 3)),
            "its codes with a table per group are more than float16 values",
        ),
        (low_bit((4, 64), 4, 1), "its codes with a scale per group are more than float16 values"),
        (sparse((4, 60), 3, 5, bits=4, group=16), "groups of 16 kept columns cross the groups of 3:5"),
        (
            Sparse(Sum((low_bit((4, 32), 4, 32),)), sparse((4, 64), 2, 4).places, 2, 4),
            "Core ML has no constant that nests so",
        ),
    ],
)
def test_what_core_ml_cannot_store_has_a_reason(leaf: Leaf, reason: str) -> None:
    assert price(leaf) == reason
    assert reason in decide(leaf, "site", price)[1].reason


def test_a_group_of_4_bits_costs_4_bits_a_code_and_a_float16_scale() -> None:
    assert price(low_bit((8, 64), 4, 32)) == 8 * 64 * 4 + 8 * 2 * 16
    assert price(low_bit((8, 64), 4, 32, symmetric=False)) == 8 * 64 * 4 + 8 * 2 * (16 + 4)
    assert price(low_bit((8, 43), 4, 32)) == 8 * 64 * 4 + 8 * 2 * 16  # padded to two whole groups
    assert price(sparse((8, 64), 2, 4, bits=4, group=16)) == 8 * 64 + 8 * 32 * 4 + 8 * 2 * 16  # the mask is paid


def test_prices_need_no_values() -> None:
    for leaf in (
        low_bit((8, 43), 4, 32),
        low_bit((8, 64), 2, 32),
        sparse((8, 64), 2, 4, bits=4),
        sparse((8, 64), 2, 4),
    ):
        assert price(to_meta(leaf)) == price(leaf)


def test_scales_are_rounded_in_every_kind_of_tree_and_the_change_is_known() -> None:
    fine = low_bit((4, 32), 4, 32)
    coarse = replace(fine, scales=fine.scales * 1.0003)
    labels_ = torch.arange(4)
    for tree in (coarse, Shared(coarse, labels_), Sum((fine, coarse)), Product(coarse, low_bit((32, 8), 4, 8))):
        stored, change = with_stored_scales(tree)
        assert 0 < change <= 2**-11
        assert all(torch.equal(leaf.scales, leaf.scales.half()) for _, leaf in leaves("w", stored) if leaf is not fine)
    kept = Sparse(replace(coarse, group=16, scales=coarse.scales.repeat(1, 2)), sparse((4, 64), 2, 4).places, 2, 4)
    assert with_stored_scales(kept)[1] > 0
    assert with_stored_scales(fine) == (fine, 0.0)
    dense = Dense(torch.ones(2, 2))
    assert with_stored_scales(dense) == (dense, 0.0)


def test_names_tell_the_way_down_a_tree() -> None:
    dense = Dense(torch.ones(4, 4))
    tree = Sum((Shared(dense, torch.arange(4)), Product(dense, dense)))
    assert [name for name, _ in leaves("q", tree)] == ["q.term0.rows", "q.term1.left", "q.term1.right"]
    assert [name for name, _ in labels("q", tree)] == ["q.term0.labels"]
