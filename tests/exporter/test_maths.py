"""Rounding, GPTQ, channel scores and least squares against slow oracles, in float64."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporter.errors import WeightError
from exporter.maths import gptq
from exporter.maths.channels import column_scores, restored, strongest
from exporter.maths.rounding import Grid, Search, quantize_rows
from exporter.weights import LowBit

GRIDS = st.builds(
    Grid,
    bits=st.integers(2, 8),
    group=st.integers(0, 40),
    symmetric=st.booleans(),
    search=st.sampled_from(["mse", "max"]),
) | st.builds(Grid, bits=st.just(1), group=st.integers(0, 40), search=st.sampled_from(["mse", "max"]))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens: int, width: int, seed: int = 1) -> Tensor:
    """Inputs [tokens, width] whose channels are correlated and of unequal size, as activations are."""
    mixed = normal(tokens, width, seed=seed) @ (torch.eye(width) + normal(width, width, seed=seed + 1) / 8)
    return mixed * torch.linspace(0.2, 3, width, dtype=torch.float64)


def gram(x: Tensor) -> Tensor:
    return x.T @ x


def output_error(difference: Tensor, gram: Tensor) -> float:
    """|D X|^2 from the Gram matrix of X."""
    return float(torch.einsum("oi,ij,oj->", difference, gram, difference))


def nearest(weight: Tensor, grid: Grid) -> LowBit:
    return quantize_rows(weight, grid.bits, grid.group, grid.symmetric, grid.search)


# ---- rounding ----------------------------------------------------------------------------------------------------


@given(grid=GRIDS, out=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_every_weight_becomes_the_nearest_point_of_its_groups_grid(
    grid: Grid, out: int, columns: int, seed: int
) -> None:
    weight = normal(out, columns, seed=seed)
    found = nearest(weight, grid)

    spread = torch.arange(columns) // grid.columns(columns)
    scales = found.scales.double()[:, spread]
    zeros = found.zeros.double().expand(out, found.groups)[:, spread]
    points = scales[..., None] * (torch.arange(2**grid.bits) - zeros[..., None])  # [out, columns, points]
    least = (points - weight[..., None]).abs().amin(-1)
    assert torch.allclose((found.dense(torch.float64) - weight).abs(), least, rtol=1e-12, atol=1e-15)


@given(grid=GRIDS, seed=st.integers(0, 99), size=st.floats(1e-9, 1e3))
@settings(max_examples=100, deadline=None)
def test_scales_are_positive_float16_numbers(grid: Grid, seed: int, size: float) -> None:
    scales = nearest(normal(3, 45, seed=seed) * size, grid).scales
    assert bool((scales > 0).all())
    assert torch.equal(scales.half().float(), scales)


@given(grid=GRIDS, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_searched_scales_never_lose_to_the_scale_that_clips_nothing(grid: Grid, seed: int) -> None:
    weight = normal(4, 50, seed=seed)
    by_search: dict[Search, Tensor] = {}
    for search in ("mse", "max"):
        found = nearest(weight, Grid(grid.bits, grid.group, grid.symmetric, search))
        by_search[search] = (found.dense(torch.float64) - weight).square().sum(1)
    assert bool((by_search["mse"] <= by_search["max"] * (1 + 1e-12)).all())


@pytest.mark.parametrize(("bits", "symmetric"), [*product((2, 3, 4, 8), (True, False)), (1, True)])
def test_the_max_scale_clips_nothing(bits: int, symmetric: bool) -> None:
    weight = normal(8, 96)
    found = quantize_rows(weight, bits, 32, symmetric, "max")

    steps = (found.dense(torch.float64) - weight).abs() / found.scales.double().repeat_interleave(32, dim=1)
    rounded_scale = 2**bits * 2.0**-11  # the largest code's share of the scale's rounding to float16
    assert float(steps.max()) <= 0.5 + rounded_scale


def test_a_shorter_last_group_has_scales_of_its_own() -> None:
    weight = normal(6, 172)
    whole, tail = quantize_rows(weight, 4, 32), quantize_rows(weight[:, 160:], 4, 32)

    assert whole.groups == 6
    assert torch.equal(whole.codes[:, 160:], tail.codes)
    assert torch.equal(whole.scales[:, 5:], tail.scales)


def test_a_group_of_zero_is_a_row_and_a_longer_group_too() -> None:
    weight = normal(3, 20)
    assert quantize_rows(weight, 4, 0).group == quantize_rows(weight, 4, 64).group == 20


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_empty_group_decodes_to_zero(symmetric: bool) -> None:
    weight = normal(3, 64)
    weight[1, 32:] = 0
    dense = quantize_rows(weight, 4, 32, symmetric).dense()
    assert bool((dense[1, 32:] == 0).all())


def test_one_bit_is_plus_or_minus_the_mean_size() -> None:
    weight = normal(4, 4096)
    found = quantize_rows(weight, 1, 0)

    assert torch.equal(found.dense().sign(), weight.sign().float())
    assert torch.allclose(found.scales[:, 0] / 2, weight.abs().mean(1).float(), rtol=0.05)  # the best for a bell


def test_symmetric_grids_store_no_zero_points() -> None:
    assert quantize_rows(normal(4, 64), 4, 32).is_symmetric
    assert not quantize_rows(normal(4, 64), 4, 32, symmetric=False).is_symmetric


def test_rows_do_not_depend_on_how_many_are_rounded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(9, 40)
    whole = quantize_rows(weight, 3, 16)
    monkeypatch.setattr("exporter.maths.rounding.AT_ONCE", 80)
    assert torch.equal(quantize_rows(weight, 3, 16).codes, whole.codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = normal(2, 8)
    weight[1, 3] = value
    with pytest.raises(WeightError, match="holds values that are not finite"):
        quantize_rows(weight, 4, 0)
    with pytest.raises(WeightError, match="holds values that are not finite"):
        gptq.quantize(weight, torch.eye(8), Grid(4, 0))


# ---- GPTQ --------------------------------------------------------------------------------------------------------


def slow_gptq(weight: Tensor, gram: Tensor, grid: Grid, damp: float) -> Tensor:
    """Column by column, each time with the explicit inverse over the columns that are left; decoded."""
    left, width = weight.clone(), weight.shape[1]
    hessian = gram + damp * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    group, decoded = grid.columns(width), torch.zeros_like(weight)
    for column in range(width):
        if column % group == 0:
            fitted = nearest(left[:, column : column + group], grid)
            scale, zero = fitted.scales.double()[:, 0], fitted.zeros.double()[:, 0]
        code = (left[:, column] / scale + zero).round().clamp(0, grid.top)
        decoded[:, column] = scale * (code - zero)
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = left[:, column] - decoded[:, column]
        left[:, column:] -= torch.outer(error / inverse[0, 0], inverse[0])
    return decoded


SCHEMES = [Grid(4, 32), Grid(4, 0), Grid(3, 48, symmetric=False), Grid(2, 7), Grid(4, 32, search="max"), Grid(1, 32)]


@pytest.mark.parametrize("grid", SCHEMES, ids=str)
def test_the_block_size_changes_no_code(grid: Grid) -> None:
    weight, g = normal(24, 150), gram(inputs(400, 150))
    first, *others = [gptq.quantize(weight, g, grid, block=block) for block in (1, 16, 48, 128, 1000)]
    for other in others:
        assert torch.equal(other.codes, first.codes)
        assert torch.equal(other.scales, first.scales)
        assert torch.equal(other.zeros, first.zeros)


@pytest.mark.parametrize("grid", SCHEMES, ids=str)
@pytest.mark.parametrize("width", [33, 64])
def test_gptq_is_the_slow_oracle(grid: Grid, width: int) -> None:
    weight, g = normal(5, width), gram(inputs(100, width))
    found = gptq.quantize(weight, g, grid, damp=1e-2, block=16)
    assert torch.equal(found.dense(torch.float64), slow_gptq(weight, g, grid, 1e-2))


@pytest.mark.parametrize("grid", SCHEMES, ids=str)
@pytest.mark.parametrize("size", [1.0, 0.0])
def test_inputs_that_do_not_correlate_leave_nothing_to_make_up_for(grid: Grid, size: float) -> None:
    weight = normal(8, 70)
    found, plain = gptq.quantize(weight, torch.eye(70) * size, grid), nearest(weight, grid)
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_loses_less_output_than_rounding_to_nearest(bits: int, seed: int) -> None:
    weight, g, grid = normal(32, 96, seed=seed), gram(inputs(300, 96, seed=seed + 50)), Grid(bits, 32)
    ours, plain = gptq.quantize(weight, g, grid), nearest(weight, grid)
    assert output_error(ours.dense(torch.float64) - weight, g) < output_error(plain.dense(torch.float64) - weight, g)


def test_channels_that_no_token_used_keep_their_weights() -> None:
    weight, x = normal(6, 64), inputs(200, 64)
    x[:, 32:] = 0
    found, plain = gptq.quantize(weight, gram(x), Grid(4, 32)), nearest(weight, Grid(4, 32))
    assert torch.equal(found.codes[:, 32:], plain.codes[:, 32:])


def test_a_common_scale_of_the_inputs_changes_no_code() -> None:
    weight, g = normal(8, 64), gram(inputs(200, 64))
    assert torch.equal(gptq.quantize(weight, g, Grid(4, 32)).codes, gptq.quantize(weight, g * 4**8, Grid(4, 32)).codes)


def test_gptq_does_not_touch_what_it_is_given() -> None:
    weight, g = normal(8, 64), gram(inputs(200, 64))
    before = weight.clone(), g.clone()
    gptq.quantize(weight, g, Grid(4, 32))
    assert torch.equal(weight, before[0])
    assert torch.equal(g, before[1])


def test_the_factor_is_that_of_the_inverse() -> None:
    g = gram(inputs(100, 20))
    upper = gptq.inverse_factor(g, 1e-2)
    damped = g + 1e-2 * g.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-9, atol=1e-12)
    assert torch.equal(upper, upper.triu())


@pytest.mark.parametrize("width", [1, 4, 5, 21])
def test_the_factor_is_the_same_however_it_is_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = gram(inputs(100, width))
    whole = gptq.inverse_factor(g, 1e-2)
    monkeypatch.setattr(gptq, "SOLVED", 4)
    cut = gptq.inverse_factor(g, 1e-2)
    assert torch.allclose(cut, whole, rtol=1e-10, atol=1e-14)
    assert torch.equal(cut, cut.triu())


@pytest.mark.parametrize("broken", [float("nan"), -1e6])
def test_what_is_no_gram_matrix_is_refused(broken: float) -> None:
    g = torch.eye(8, dtype=torch.float64)
    g[2, 2] = broken
    with pytest.raises(WeightError, match="not positive definite"):
        gptq.quantize(normal(2, 8), g, Grid(4, 0))


# ---- channels ----------------------------------------------------------------------------------------------------


def test_scores_are_wandas_summed_over_a_column() -> None:
    weight, x = normal(12, 20), inputs(50, 20)
    wanda = weight.abs() * x.norm(dim=0)  # |W_ij| * |X_j|, element by element
    assert torch.allclose(column_scores(weight, gram(x)), wanda.sum(0), rtol=1e-12)
    assert torch.allclose(column_scores(weight, gram(x[torch.randperm(50)])), wanda.sum(0), rtol=1e-12)
    assert torch.allclose(column_scores(weight, None), weight.abs().sum(0))


def test_the_strongest_rise_nest_and_leave_dead_channels_out_first() -> None:
    x = inputs(50, 20)
    x[:, [3, 11]] = 0
    scores = column_scores(normal(12, 20), gram(x))
    kept = [set(strongest(scores, count).tolist()) for count in range(1, 21)]

    assert all(small < large for small, large in pairwise(kept))
    assert kept[17] == set(range(20)) - {3, 11}
    assert strongest(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]


def halves(width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs, and kept channels."""
    weight, x = normal(16, width), inputs(200, width)
    return weight, x, strongest(column_scores(weight, gram(x)), width // 2)


def test_restoration_from_the_gram_matrix_is_least_squares_on_the_activations() -> None:
    weight, x, kept = halves()
    direct = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    assert torch.allclose(restored(weight, gram(x), kept, 0.0), direct, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 3.0])
@pytest.mark.parametrize("has_other_inputs", [False, True])
def test_restoration_is_its_equation(ridge: float, has_other_inputs: bool) -> None:
    weight, x, kept = halves()
    g, cross = gram(x), (x + normal(*x.shape, seed=9)).T @ x if has_other_inputs else None
    pull = ridge * g[kept, kept].mean()
    wanted = weight @ (g if cross is None else cross)[:, kept] + pull * weight[:, kept]
    expected = wanted @ torch.linalg.inv(g[kept][:, kept] + pull * torch.eye(len(kept), dtype=g.dtype))
    assert torch.allclose(restored(weight, g, kept, ridge, cross), expected, rtol=1e-9, atol=1e-12)


def test_restored_outputs_leave_no_gradient() -> None:
    weight, x, kept = halves()
    left = x[:, kept].T @ (x[:, kept] @ restored(weight, gram(x), kept, 0.0).T - x @ weight.T)
    assert float(left.norm() / (x[:, kept].T @ x @ weight.T).norm()) < 1e-12


def test_what_is_lost_is_the_schur_complement() -> None:
    weight, x, kept = halves()
    g = gram(x)
    pruned = torch.tensor([j for j in range(24) if j not in kept])
    schur = g[pruned][:, pruned] - g[pruned][:, kept] @ torch.linalg.inv(g[kept][:, kept]) @ g[kept][:, pruned]
    error = (x[:, kept] @ restored(weight, g, kept, 0.0).T - x @ weight.T).square().sum()
    assert float(error) == pytest.approx(output_error(weight[:, pruned], schur), rel=1e-9)


@given(ridge=st.floats(0, 100), keep=st.integers(1, 23), tokens=st.integers(2, 60), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_no_ridge_makes_restoration_worse_than_plain_removal(ridge: float, keep: int, tokens: int, seed: int) -> None:
    weight, x = normal(8, 24, seed=seed), inputs(tokens, 24, seed=seed)
    ridge = ridge if tokens > 40 else max(ridge, 1e-6)  # fewer tokens than channels want a ridge
    kept = strongest(column_scores(weight, gram(x)), keep)
    wanted = x @ weight.T
    plain = (x[:, kept] @ weight[:, kept].T - wanted).norm()
    ours = (x[:, kept] @ restored(weight, gram(x), kept, ridge).T - wanted).norm()
    assert float(ours) <= float(plain) * (1 + 1e-9)


def test_more_channels_never_lose_more() -> None:
    weight, x, _ = halves()
    scores = column_scores(weight, gram(x))
    errors = []
    for keep in range(1, 25):
        kept = strongest(scores, keep)
        errors.append(float((x[:, kept] @ restored(weight, gram(x), kept, 0.0).T - x @ weight.T).norm()))
    assert all(more <= less * (1 + 1e-9) for less, more in pairwise(errors))


def test_keeping_every_channel_changes_nothing() -> None:
    weight, x, _ = halves()
    assert torch.allclose(restored(weight, gram(x), torch.arange(24), 1e-2), weight, rtol=1e-9, atol=1e-12)


def test_rows_are_restored_each_on_its_own() -> None:
    weight, x, kept = halves()
    order = torch.randperm(16)
    assert torch.allclose(restored(weight[order], gram(x), kept, 1e-2), restored(weight, gram(x), kept, 1e-2)[order])


def test_without_inputs_the_kept_columns_stay() -> None:
    weight, _, kept = halves()
    assert torch.equal(restored(weight, torch.zeros(24, 24, dtype=torch.float64), kept, 1e-2), weight[:, kept])


def test_inputs_that_depend_on_each_other_want_a_ridge() -> None:
    weight, x, kept = halves()
    few = gram(x[:3])
    few[kept[0]], few[:, kept[0]] = 0, 0  # a channel without input: exactly singular
    with pytest.raises(WeightError, match="give a ridge over 0"):
        restored(weight, few, kept, 0.0)
    assert bool(restored(weight, few, kept, 1e-2).isfinite().all())
