"""Bits for each layer: the closed form, the greedy choice out of a few widths, and the counts of the released lists."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporter.maths.allocation import allocated, ideal_bits

INFLUENCES = st.lists(st.floats(0, 2), min_size=1, max_size=8)
LEVELS = st.sampled_from([(2,), (2, 3), (2, 3, 4), (4, 8), (1, 2, 8), (3, 4, 5, 6)])


def lost(influence: Tensor, sizes: Tensor, bits: Tensor) -> Tensor:
    """What allocation minimises; [..., layers] to [...]."""
    return (influence * sizes * 4.0**-bits).sum(-1)


def drawn(layers: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    influence = torch.rand(layers, generator=generator, dtype=torch.float64) ** 3 + 1e-3
    return influence, torch.randint(1, 100, (layers,), generator=generator)


# ---- the closed form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_closed_form_keeps_the_average_and_makes_a_bit_worth_the_same_everywhere(seed: int) -> None:
    influence, sizes = drawn(12, seed)

    bits = ideal_bits(influence, sizes, 3.2)

    assert float((bits * sizes).sum() / sizes.sum()) == pytest.approx(3.2, rel=1e-12)
    worth = influence * 4.0**-bits
    assert torch.allclose(worth, worth[:1], rtol=1e-9, atol=0)


def test_the_closed_form_loses_least_of_1000_ways_to_spend_the_same_bits() -> None:
    influence, sizes = drawn(8, 0)
    best = ideal_bits(influence, sizes, 3.0)

    moved = torch.randn(1000, 8, dtype=torch.float64)
    moved -= (moved * sizes).sum(1, keepdim=True) / sizes.sum()  # spends nothing

    assert bool((lost(influence, sizes, best + moved) > lost(influence, sizes, best)).all())


def test_four_times_the_influence_is_a_bit_more() -> None:
    bits = ideal_bits(torch.tensor([4.0, 1.0]), torch.tensor([10, 10]), 3.0)
    assert bits.tolist() == pytest.approx([3.5, 2.5])


def test_a_layer_without_influence_still_has_a_number_of_bits() -> None:
    for influence in ([0.0, 1.0], [0.0, 0.0], [-1e-17, 1.0]):
        assert bool(ideal_bits(torch.tensor(influence), torch.tensor([10, 10]), 3.0).isfinite().all())
        assert allocated(torch.tensor(influence), [10, 10], (2, 3), 50) in ([2, 3], [3, 2])


def test_many_narrow_levels_come_to_the_closed_form() -> None:
    influence, sizes = drawn(6, 4)
    levels = [step / 64 for step in range(16 * 64)]
    average = 6.0

    bits = torch.tensor(allocated(influence, sizes.tolist(), levels, average * float(sizes.sum())))

    assert float((bits - ideal_bits(influence, sizes, average)).abs().max()) < 0.1  # a few steps of 1/64


# ---- out of a few widths -----------------------------------------------------------------------------------------


@given(INFLUENCES, LEVELS, st.floats(0, 1), st.integers(0, 9))
@settings(max_examples=200)
def test_the_budget_holds_and_more_influence_never_means_fewer_bits(
    influences: list[float], levels: tuple[int, ...], share: float, seed: int
) -> None:
    influence = torch.tensor(influences, dtype=torch.float64)
    sizes = drawn(len(influences), seed)[1].tolist()
    least, most = (sum(sizes) * level for level in (levels[0], levels[-1]))
    budget = least + share * (most - least)

    bits = allocated(influence, sizes, levels, budget)

    assert set(bits) <= set(levels)
    assert sum(b * size for b, size in zip(bits, sizes)) <= budget
    order = sorted(range(len(bits)), key=lambda layer: influences[layer])
    by_influence = [bits[layer] for layer in order]
    distinct = [i for i in range(len(order) - 1) if influences[order[i]] < influences[order[i + 1]]]
    floor = 1e-9 * max(influences)  # under it all influences count the same
    assert all(by_influence[i] <= by_influence[i + 1] for i in distinct if influences[order[i + 1]] > floor)


@pytest.mark.parametrize("levels", [(2, 3), (2, 3, 4)])
@pytest.mark.parametrize("seed", range(10))
def test_layers_of_one_size_get_the_best_of_all_allocations(levels: tuple[int, ...], seed: int) -> None:
    influence, _ = drawn(5, seed)
    every = torch.tensor(list(product(levels, repeat=5)), dtype=torch.float64)
    for spare in range(5 * (levels[-1] - levels[0]) + 1):
        budget = 7 * (5 * levels[0] + spare)
        affordable = every[every.sum(1) * 7 <= budget]
        best = lost(influence, torch.full((5,), 7), affordable).min()

        bits = torch.tensor(allocated(influence, [7] * 5, levels, budget), dtype=torch.float64)

        assert float(lost(influence, torch.full((5,), 7), bits)) == pytest.approx(float(best), rel=1e-12)


def test_what_one_layer_cannot_pay_no_lesser_layer_gets() -> None:
    assert allocated(torch.tensor([2.0, 1.0]), [100, 10], (2, 3), 2 * 110 + 50) == [2, 2]
    assert allocated(torch.tensor([1.0, 2.0]), [100, 10], (2, 3), 2 * 110 + 50) == [2, 3]


def test_a_rise_counts_by_what_it_gains_a_bit() -> None:
    """From 3 to 8 bits gains the first layer 0.156, from 2 to 3 each of the others 0.047, for a fifth of the bits."""
    influence = torch.tensor([10.0, 1, 1, 1, 1, 1])
    assert allocated(influence, [10] * 6, (2, 3, 8), 2 * 60 + 10 + 50) == [3] * 6
    assert allocated(influence, [10] * 6, (2, 3, 8), 2 * 60 + 10 + 100) == [8] + [3] * 5


def test_when_a_long_rise_does_not_fit_shorter_ones_still_do() -> None:
    assert allocated(torch.tensor([100.0, 1.0]), [10, 10], (2, 3, 8), 2 * 20 + 10 + 30) == [3, 3]
    assert allocated(torch.tensor([100.0, 1.0]), [10, 10], (2, 3, 8), 2 * 20 + 10 + 50) == [8, 2]


def test_of_equal_gains_the_earlier_layer_takes_the_bits() -> None:
    assert allocated(torch.ones(4), [10] * 4, (2, 3), 2.5 * 40) == [3, 3, 2, 2]


def test_a_large_budget_gives_every_layer_the_highest_level_and_a_bare_one_the_lowest() -> None:
    assert allocated(torch.tensor([1.0, 3.0]), [10, 20], (2, 3, 4), 1000) == [4, 4]
    assert allocated(torch.tensor([1.0, 3.0]), [10, 20], (2, 3, 4), 60) == [2, 2]
    assert allocated(torch.tensor([1.0, 3.0]), [10, 20], (4,), 1000) == [4, 4]


def test_a_budget_under_the_lowest_level_is_refused() -> None:
    with pytest.raises(ValueError, match="59 bits do not hold 30 numbers of 2 bits"):
        allocated(torch.tensor([1.0, 3.0]), [10, 20], (2, 3), 59)


# ---- the counts that the released lists of layers come to --------------------------------------------------------


LLAMA_7B, LLAMA_13B = (4096, 11008, 32), (5120, 13824, 40)  # hidden, MLP, layers


@pytest.mark.parametrize(
    ("shape", "keep", "low", "high", "qk", "target", "count"),
    [
        (LLAMA_7B, 0.25, 2.0, 3.0, 3.0, 2.0, 7.95),  # AQLM
        (LLAMA_13B, 0.25, 2.0, 3.0, 3.0, 2.0, 9.90),
        (LLAMA_7B, 0.25, 2.2, 3.0, 3.0, 2.2, 11.53),  # GPTQ
        (LLAMA_13B, 0.25, 2.2, 3.0, 3.0, 2.2, 14.36),
        (LLAMA_7B, 0.50, 2.0, 3.0, 2.0, 2.0, 6.36),  # QuIP#
    ],
)
def test_what_queries_and_keys_save_pays_for_the_released_number_of_layers(
    shape: tuple[int, int, int], keep: float, low: float, high: float, qk: float, target: float, count: float
) -> None:
    hidden, mlp, layers = shape
    whole = 4 * hidden**2 + 3 * hidden * mlp
    low_rank, rest = 2 * (2 * hidden) * int(hidden * keep / 2), whole - 2 * hidden**2
    budget = layers * (whole * target - low_rank * qk)
    assert (budget - layers * rest * low) / (rest * (high - low)) == pytest.approx(count, abs=0.005)
    influence = torch.linspace(1, 2, layers)

    bits = allocated(influence, [rest] * layers, (low, high), budget)

    assert bits == [low] * (layers - int(count)) + [high] * int(count)
