"""What a target stores for a tree: always the same matrix, never larger than need be, with the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import equivalents
from exporter.equivalents import decide
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, Weight, children, nodes, to_meta
from tests.models import low_bit, sparse, trees


def pricing(widths=(2, 4, 8), groups=(16, 32, 64, 128, 256), pads=True, takes_sparse=False):
    """A target that takes these widths and groups, pads the last group, and stores float32 scales."""

    def price(weight: Weight) -> int | str:
        match weight:
            case Dense():
                return 32 * weight.shape[0] * weight.shape[1]
            case LowBit():
                if weight.bits not in widths or weight.group not in groups:
                    return f"no {weight.bits}-bit group {weight.group}"
                columns = weight.groups * weight.group if pads else weight.shape[1]
                return weight.shape[0] * (columns * weight.bits + weight.groups * 32)
            case Sparse() if takes_sparse:
                kept = price(weight.kept)
                return kept if isinstance(kept, str) else kept + weight.shape[0] * weight.shape[1]
            case _:
                return "no N:M operator"

    return price


def leaves(weight: Weight) -> list[Weight]:
    return [node for node in nodes(weight) if not children(node) or isinstance(node, Sparse)]


@st.composite
def low_bits(draw) -> LowBit:
    bits, columns = draw(st.integers(1, 8)), draw(st.sampled_from([16, 40, 64, 172]))
    weight = low_bit((draw(st.integers(1, 6)), columns), bits, draw(st.sampled_from([8, 16, 24, 32, 48, 96, 256])))
    kind, grid = draw(st.sampled_from(["middle", "single", "whole", "half", "mixed"])), tuple(weight.scales.shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    zeros = {
        "middle": weight.zeros,
        "single": torch.tensor([[float(draw(st.integers(0, 2**bits - 1)))]]),
        "whole": torch.randint(0, 2**bits, grid, generator=generator).float(),
        "half": torch.randint(0, 2**bits, grid, generator=generator) - 0.5,
        "mixed": torch.randint(0, 2 ** (bits + 1) - 1, grid, generator=generator) / 2,
    }
    return replace(weight, zeros=zeros[kind])


@st.composite
def sparse_low_bits(draw) -> Sparse:
    n, m = draw(st.sampled_from([(2, 4), (4, 8), (1, 4), (3, 4)]))
    weight = sparse((draw(st.integers(1, 4)), 96), n, m, draw(st.integers(1, 8)), draw(st.sampled_from([12, 16, 24])))
    assert isinstance(weight.kept, LowBit)
    zeros = draw(st.sampled_from([weight.kept.zeros, weight.kept.zeros - 0.5]))
    return replace(weight, kept=replace(weight.kept, zeros=zeros))


@settings(deadline=None)
@given(
    weight=st.one_of(low_bits(), sparse_low_bits()),
    widths=st.sets(st.integers(1, 8)), groups=st.sets(st.sampled_from([16, 32, 64, 128, 256])),
)  # fmt: skip
def test_what_is_stored_is_the_same_matrix_bit_for_bit_and_the_target_takes_it(weight, widths, groups):
    price = pricing(widths, groups)
    stored, decision = decide(weight, "site", price)
    assert torch.equal(stored.dense(), weight.dense())
    bits = price(stored)
    assert isinstance(bits, int)
    assert decision.bytes == -(-bits // 8)
    assert decision.native == (stored is weight)


@pytest.mark.parametrize("name", sorted(trees((64, 64))))
@pytest.mark.parametrize("takes_sparse", [False, True])
def test_every_tree_is_stored_in_leaves_that_the_target_takes_and_says_the_same(name, takes_sparse):
    weight, price = trees((64, 64))[name], pricing(takes_sparse=takes_sparse)
    stored, decision = decide(weight, "site", price)
    assert all(isinstance(price(leaf), int) for leaf in leaves(stored))
    torch.testing.assert_close(stored.dense(torch.float64), weight.dense(torch.float64), rtol=1e-5, atol=1e-6)
    assert decision.bytes <= 64 * 64 * 4


@pytest.mark.parametrize("name", sorted(set(trees((64, 64))) - {"4:8 of 1-bit"}))  # its zero point is 1, no method's
def test_shapes_alone_lead_to_the_same_decision(name):
    weight = trees((64, 64))[name]
    assert decide(to_meta(weight), "site", pricing())[1] == decide(weight, "site", pricing())[1]


@pytest.mark.parametrize(("bits", "stored_bits"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_codes_are_stored_in_the_next_width_that_there_is(bits, stored_bits):
    stored, decision = decide(low_bit((8, 64), bits, 32), "site", pricing())
    assert isinstance(stored, LowBit)
    assert (stored.bits, stored.group, stored.is_symmetric) == (stored_bits, 32, True)
    assert decision.native == (bits == stored_bits)


def test_one_bit_around_a_half_becomes_two_bits_around_the_middle():
    weight = replace(low_bit((8, 64), 1, 32), zeros=torch.full((1, 1), 0.5))
    stored, _ = decide(weight, "site", pricing())
    assert isinstance(stored, LowBit)
    assert stored.is_symmetric
    assert set(stored.codes.unique().tolist()) == {1, 3}


def test_a_scale_per_row_is_repeated_for_the_group_that_pads_least():
    stored, decision = decide(low_bit((8, 172), 4, 172), "site", pricing())
    assert isinstance(stored, LowBit)
    assert stored.group == 64  # 172 columns: 256 codes and 1 scale, 256 and 2, 192 and 3, 192 and 6, 176 and 11
    assert decision.reason == "4-bit group 172 stored as 4-bit group 64: no 4-bit group 172"


def test_a_padded_group_gives_way_to_a_shorter_one_that_takes_less():
    stored, decision = decide(low_bit((8, 40), 8, 256), "site", pricing())
    assert isinstance(stored, LowBit)
    assert stored.group == 16  # 256 codes and a scale take 2080 bits a row, 64 and one 544, 48 and three 480
    assert decision.reason == "8-bit group 256 stored as 8-bit group 16: whole groups of 256 would take 2080 bytes"
    assert decide(low_bit((8, 40), 8, 256), "site", pricing(pads=False))[1].native


def test_sparse_codes_are_filled_with_the_zero_point_also_where_it_is_a_half():
    for zeros in (2.0, 1.5):
        weight = sparse((8, 64), 2, 4, bits=2, group=16)
        weight = replace(weight, kept=replace(weight.kept, zeros=torch.full((1, 1), zeros)))
        stored, decision = decide(weight, "site", pricing())
        assert isinstance(stored, LowBit)
        assert stored.bits == (2 if zeros == 2.0 else 4)
        assert torch.equal(stored.dense(), weight.dense())
        assert decision.reason.endswith("no N:M operator")


def test_zero_points_that_are_no_code_at_any_width_leave_a_sparse_weight_dense():
    weight = sparse((8, 64), 2, 4, bits=2, group=16)
    weight = replace(weight, kept=replace(weight.kept, zeros=torch.full((1, 1), 0.3)))
    stored, decision = decide(weight, "site", pricing())
    assert isinstance(stored, Dense)
    assert torch.equal(stored.values, weight.dense())
    assert decision.reason == "2:4 of 2-bit group 16 stored as float32: no N:M operator"


def test_structure_is_kept_only_where_it_is_smaller_than_its_fold():
    thin = Product(Dense(torch.randn(64, 8)), Dense(torch.randn(8, 64)))
    thick = Product(Dense(torch.randn(64, 48)), Dense(torch.randn(48, 64)))
    assert decide(thin, "site", pricing())[0].shape == (64, 64)
    assert decide(thin, "site", pricing())[1].native
    stored, decision = decide(thick, "site", pricing())
    assert isinstance(stored, Dense)
    assert decision.reason == "rank 48 (float32 x float32) stored as float32: its structure would take 24576 bytes"


def test_labels_of_shared_rows_count():
    rows = Dense(torch.randn(8, 64))
    _, decision = decide(Shared(rows, torch.arange(64) % 8), "site", pricing())
    assert decision.native
    assert decision.bytes == 8 * 64 * 4 + 64 * 4


def test_a_fold_deep_inside_a_kept_tree_is_told_once():
    term = low_bit((64, 64), 3, 32)
    stored, decision = decide(Sum((term, term)), "site", pricing())
    assert isinstance(stored, Sum)
    assert not decision.native
    assert decision.reason == "3-bit group 32 stored as 4-bit group 32: no 3-bit group 32"


def test_of_two_equal_prices_the_one_with_more_structure_is_kept():
    product = Product(Dense(torch.randn(8, 4)), Dense(torch.randn(4, 8)))  # as many numbers as its fold
    assert equivalents.smallest(product, pricing()).weight.shape == (8, 8)
    assert isinstance(equivalents.smallest(product, pricing()).weight, Product)
