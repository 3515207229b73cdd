"""N:M pruning by the inputs, with and without rounding, against a slow oracle, in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from exporter.errors import WeightError
from exporter.maths import gptq
from exporter.maths.rounding import Grid, quantize_rows
from exporter.maths.sparsegpt import quantize_sparse, sparsify, sparsify_by_size
from exporter.weights import Dense, LowBit, Sparse

PATTERNS = [(2, 4), (1, 2), (4, 8), (3, 4), (1, 16)]
GRIDS = [Grid(4, 12), Grid(4, 0), Grid(3, 24, symmetric=False), Grid(2, 12, search="max"), Grid(1, 12)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(tokens: int, width: int, seed: int = 1) -> Tensor:
    """Of inputs whose channels are correlated and of unequal size, as activations are."""
    x = normal(tokens, width, seed=seed) @ (torch.eye(width) + normal(width, width, seed=seed + 1) / width**0.5)
    x = x * torch.linspace(0.3, 3, width, dtype=torch.float64)
    return x.T @ x


def row_errors(weight: Tensor, found: Sparse, gram: Tensor) -> Tensor:
    """|(W - W') X|^2 of each row, from the Gram matrix of X."""
    difference = found.dense(torch.float64) - weight
    return torch.einsum("oi,ij,oj->o", difference, gram, difference)


def output_error(weight: Tensor, found: Sparse, gram: Tensor) -> float:
    return float(row_errors(weight, found, gram).sum())


def largest(scores: Tensor, n: int) -> Tensor:
    """Where the n largest of a group [out, m] stand, found one by one."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, kept in zip(scores.tolist(), mask):
        for index in sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:n]:  # type: ignore[misc]
            kept[index] = True
    return mask


def slow(
    weight: Tensor, hessian: Tensor, n: int, m: int, stop: int, start: int = 0, grid: Grid | None = None
) -> Tensor:
    """Columns start..stop fixed one by one, each with the explicit inverse over the columns that are left; others kept.

    Scales are fitted on what a run over the columns under them, without a grid, leaves.
    """
    left, out, width = weight.clone(), len(weight), weight.shape[1]
    span = grid.columns(width // m * n) // n * m if grid else 1
    for column in range(start, stop):
        inverse = torch.linalg.inv(hessian[column:, column:])
        if grid and column % span == 0:
            end = min(column + span, width)
            trial = slow(left, hessian, n, m, end, column)[:, column:end]
            fitted = quantize_rows(trial[trial != 0].view(out, -1), grid.bits, 0, grid.symmetric, grid.search)
            scale, zero = fitted.scales.double()[:, 0], fitted.zeros.double()[:, 0]
        if column % m == 0:
            sizes = torch.tensor([float(torch.linalg.inv(hessian[c:, c:])[0, 0]) for c in range(column, column + m)])
            mask = largest(left[:, column : column + m].square() / sizes, n)
        fixed = left[:, column].clone()
        if grid:
            fixed = scale * ((fixed / scale + zero).round().clamp(0, grid.top) - zero)
        fixed[~mask[:, column % m]] = 0
        error = (left[:, column] - fixed) / inverse[0, 0]
        left[:, column:] -= torch.outer(error, inverse[0])
        left[:, column] = fixed
    return left


def damped(gram: Tensor) -> Tensor:
    return gram + 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


# ---- what it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pruning_is_the_slow_oracle(pattern: tuple[int, int]) -> None:
    weight, g = normal(5, 48), gram(100, 48)
    found = sparsify(weight, g, *pattern, block=16)
    assert torch.allclose(found.dense(torch.float64), slow(weight, damped(g), *pattern, 48), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("pattern", "grid"), [*product([(2, 4), (3, 4), (4, 8)], GRIDS)], ids=str)
def test_pruning_and_rounding_is_the_slow_oracle(pattern: tuple[int, int], grid: Grid) -> None:
    weight, g = normal(5, 48), gram(100, 48)
    found = quantize_sparse(weight, g, grid, *pattern, block=20)
    oracle = slow(weight, damped(g), *pattern, 48, grid=grid)
    assert torch.allclose(found.dense(torch.float64), oracle, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grid", [None, *GRIDS], ids=str)
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)], ids=str)
def test_the_block_size_changes_nothing(pattern: tuple[int, int], grid: Grid | None) -> None:
    weight, g = normal(24, 152), gram(400, 152)

    def found(block: int) -> Sparse:
        return (
            quantize_sparse(weight, g, grid, *pattern, block=block)
            if grid
            else sparsify(weight, g, *pattern, block=block)
        )

    first, *others = [found(block) for block in (1, 16, 50, 128, 1000)]
    for other in others:
        assert torch.equal(other.places, first.places)
        if isinstance(first.kept, LowBit) and isinstance(other.kept, LowBit):
            assert torch.equal(other.kept.codes, first.kept.codes)
            assert torch.equal(other.kept.scales, first.kept.scales)
        else:
            assert torch.allclose(
                other.kept.dense(torch.float64), first.kept.dense(torch.float64), rtol=1e-9, atol=1e-12
            )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("grid", [None, Grid(4, 48), Grid(1, 0)], ids=str)
def test_exactly_n_of_m_are_kept_and_the_others_are_zero(pattern: tuple[int, int], grid: Grid | None) -> None:
    n, m = pattern
    weight, g = normal(9, 96), gram(200, 96)
    by_inputs = quantize_sparse(weight, g, grid, n, m) if grid else sparsify(weight, g, n, m)
    for found in (by_inputs, sparsify_by_size(weight, n, m, grid)):
        groups = found.mask.view(9, -1, m)
        assert (found.n, found.m, found.shape) == (n, m, (9, 96))
        assert torch.equal(groups.sum(-1), torch.full((9, 96 // m), n))
        assert bool((found.dense()[~found.mask] == 0).all())


@pytest.mark.parametrize("grid", [None, *GRIDS], ids=str)
@pytest.mark.parametrize("size", [1.0, 0.0])
def test_inputs_that_do_not_correlate_leave_what_is_pruned_by_size(grid: Grid | None, size: float) -> None:
    weight, g = normal(8, 72), torch.eye(72) * size
    found = quantize_sparse(weight, g, grid, 2, 4) if grid else sparsify(weight, g, 2, 4)
    plain = sparsify_by_size(weight, 2, 4, grid)
    assert torch.equal(found.places, plain.places)
    assert torch.equal(found.dense(torch.float64), plain.dense(torch.float64))


def test_pruning_by_size_keeps_the_largest_and_of_equal_ones_the_first() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 1.0, 1.0, -1.0, 1.0]])
    found = sparsify_by_size(weight, 2, 4)
    assert found.dense().tolist() == [[0, -3, 2, 0, 1, 1, 0, 0]]


def test_scales_cover_kept_columns() -> None:
    weight, g = normal(6, 88), gram(200, 88)
    for found in (quantize_sparse(weight, g, Grid(4, 16), 2, 4), sparsify_by_size(weight, 2, 4, Grid(4, 16))):
        assert isinstance(found.kept, LowBit)
        assert found.kept.codes.shape == (6, 44)
        assert found.kept.scales.shape == (6, 3)  # 16, 16 and 12 kept columns
        assert torch.equal(found.kept.scales.half().float(), found.kept.scales)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_kept_as_floats_has_the_type_that_it_had(dtype: torch.dtype) -> None:
    weight, g = normal(6, 32).to(dtype), gram(200, 32)
    for found in (sparsify(weight, g, 2, 4), sparsify_by_size(weight, 2, 4)):
        assert isinstance(found.kept, Dense)
        assert found.kept.values.dtype == dtype


def test_channels_that_no_token_used_go_first() -> None:
    weight, g = normal(6, 32), gram(200, 32)
    dead = torch.arange(0, 32, 4)
    g[dead], g[:, dead] = 0, 0
    assert not bool(sparsify(weight, g, 3, 4, damp=1e-9).mask[:, dead].any())


def test_it_does_not_touch_what_it_is_given() -> None:
    weight, g = normal(8, 64), gram(200, 64)
    before = weight.clone(), g.clone()
    quantize_sparse(weight, g, Grid(4, 32), 2, 4)
    sparsify(weight, g, 2, 4)
    sparsify_by_size(weight, 2, 4)
    assert torch.equal(weight, before[0])
    assert torch.equal(g, before[1])


# ---- what it gains -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "grid"), [((2, 4), Grid(4, 16)), ((4, 8), Grid(3, 0)), ((2, 4), None)], ids=str)
def test_it_loses_less_output_than_pruning_by_size_on_a_thousand_instances(
    pattern: tuple[int, int], grid: Grid | None
) -> None:
    ratios = []
    for seed in range(100):  # ten rows each: rows do not see each other
        weight, g = normal(10, 32, seed=seed), gram(96, 32, seed=seed + 1000)
        ours = quantize_sparse(weight, g, grid, *pattern) if grid else sparsify(weight, g, *pattern)
        plain = sparsify_by_size(weight, *pattern, grid)
        ratios.append(row_errors(weight, ours, g) / row_errors(weight, plain, g))
    ratio = torch.cat(ratios)
    assert len(ratio) == 1000
    assert float(ratio.mean()) < 0.9
    assert float((ratio < 1).double().mean()) > 0.75  # no promise for every row: masks are chosen one group at a time


@pytest.mark.parametrize("seed", range(4))
def test_pruning_and_rounding_in_one_walk_lose_less_than_one_after_the_other(seed: int) -> None:
    weight, g, grid = normal(32, 96, seed=seed), gram(300, 96, seed=seed + 50), Grid(3, 16)
    pruned = sparsify(weight, g, 2, 4)
    after = Sparse(quantize_rows(pruned.kept.dense(torch.float64), 3, 16), pruned.places, 2, 4)
    together = output_error(weight, quantize_sparse(weight, g, grid, 2, 4), g)
    assert output_error(weight, pruned, g) < together < output_error(weight, after, g)


def test_keeping_more_loses_less() -> None:
    weight, g = normal(16, 64), gram(200, 64)
    lost = [output_error(weight, sparsify(weight, g, n, 8), g) for n in range(1, 8)]
    assert lost == sorted(lost, reverse=True)


def test_the_same_mask_without_making_up_for_it_loses_more() -> None:
    weight, g = normal(16, 32), gram(200, 32)
    found = sparsify(weight, g, 2, 4)
    masked = Sparse(Dense(weight[found.mask].view(16, -1)), found.places, 2, 4)
    assert output_error(weight, found, g) < output_error(weight, masked, g)


def test_where_only_unused_channels_are_pruned_it_is_gptq_on_the_others() -> None:
    weight, g = normal(6, 64), gram(300, 64)
    unused = torch.arange(15, 64, 16)
    used = torch.tensor([c for c in range(64) if c % 16 != 15])
    g[unused], g[:, unused] = 0, 0
    found = quantize_sparse(weight, g, Grid(4, 15), 15, 16, damp=1e-9)
    alone = gptq.quantize(weight[:, used], g[used][:, used], Grid(4, 60), damp=1e-9 * 60 / 64)
    assert not bool(found.mask[:, unused].any())
    assert isinstance(found.kept, LowBit)
    assert found.kept.groups == 4
    one_scale = quantize_sparse(weight, g, Grid(4, 0), 15, 16, damp=1e-9)
    assert torch.equal(one_scale.kept.dense(), alone.dense())


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_widths_that_do_not_divide_are_refused() -> None:
    weight, g, message = normal(4, 30), torch.eye(30), "30 columns are no multiple of the 4 in 2:4; choose another"
    for attempt in (
        lambda: sparsify(weight, g, 2, 4),
        lambda: quantize_sparse(weight, g, Grid(4, 0), 2, 4),
        lambda: sparsify_by_size(weight, 2, 4),
    ):
        with pytest.raises(WeightError, match=message):
            attempt()


def test_scales_that_would_cut_a_group_in_two_are_refused() -> None:
    weight, g, message = normal(4, 64), torch.eye(64), "32 kept columns cuts a 3:4 in two; give a multiple of 3, or 0"
    for attempt in (
        lambda: quantize_sparse(weight, g, Grid(4, 32), 3, 4),
        lambda: sparsify_by_size(weight, 3, 4, Grid(4, 32)),
    ):
        with pytest.raises(WeightError, match=message):
            attempt()
    assert sparsify_by_size(weight[:, :32], 3, 4, Grid(4, 32)).shape == (4, 32)  # one group covers all 24


def test_weights_and_inputs_that_are_not_finite_are_refused() -> None:
    weight, g = normal(4, 8), torch.eye(8, dtype=torch.float64)
    broken = weight.clone()
    broken[1, 2] = float("nan")
    for attempt in (lambda: sparsify(broken, g, 2, 4), lambda: sparsify_by_size(broken, 2, 4)):
        with pytest.raises(WeightError, match="not finite"):
            attempt()
    with pytest.raises(WeightError, match="not positive definite"):
        quantize_sparse(weight, -g, Grid(4, 0), 2, 4)
