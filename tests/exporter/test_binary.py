"""SPBO and N:M pruning against slow oracles, in float64; what is never worse; what a file holds."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporter.errors import WeightError
from exporter.maths import binary
from exporter.maths.binary import Block, Fit, Form, Metric, Plan, binarize, cost, file_bits, fitted, paper_bits
from exporter.maths.gptq import damped, inverse_factor
from exporter.maths.pruning import (
    index_bits,
    kept_per_layer,
    pattern_numbers,
    pattern_places,
    patterns_of,
    places_of_mask,
    without_cheapest,
)
from exporter.weights import LowBit, Sparse, Sum, describe

FORMS: tuple[Form, ...] = ("A", "B", "symmetric")
METRICS: tuple[Metric, ...] = ("hessian", "gain", "magnitude", "wanda")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(width: int, tokens: int = 512, seed: int = 1) -> Tensor:
    """Of inputs whose channels are correlated and of unequal size, as activations are."""
    x = normal(tokens, width, seed=seed) @ (torch.eye(width) + normal(width, width, seed=seed + 1) / 8)
    x = x * torch.linspace(0.2, 3, width, dtype=torch.float64)
    return x.T @ x


def weights(out: int, width: int, seed: int = 0) -> Tensor:
    """Heavy-tailed rows around a mean of their own, as trained ones are: Student's t of 4 degrees."""
    heavy = normal(out, width, seed=seed) / (normal(4, out, width, seed=seed + 50).square().sum(0) / 4).sqrt()
    return heavy + normal(out, 1, seed=seed + 51) / 4


def block(out: int = 16, width: int = 32, seed: int = 0) -> Block:
    inputs = gram(width, seed=seed + 7)
    return Block(weights(out, width, seed), damped(inputs, 1e-2), inverse_factor(inputs, 1e-2).diagonal())


def random_fit(on: Block, n: int, m: int, form: Form, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random n:m mask and random signs."""
    mask = torch.ones_like(on.weight, dtype=torch.bool)
    for step in range(m - n):
        mask = without_cheapest(mask, normal(*on.weight.shape, seed=seed + step), m)
    return mask, binary.signs(normal(*on.weight.shape, seed=seed + 99))


def output_error(difference: Tensor, gram: Tensor) -> float:
    return float(((difference @ gram) * difference).sum())


# ---- alpha and mu --------------------------------------------------------------------------------------------------


def slow_levels(w: Tensor, mask: Tensor, signs: Tensor, gram: Tensor, form: Form) -> Tensor:
    """Alpha and mu of one row by least squares on L^T w, where S = L L^T."""
    root = torch.linalg.cholesky(gram).T
    columns = {"A": [mask * signs, mask.double()], "B": [mask * signs, torch.ones_like(w)], "symmetric": [mask * signs]}
    found = torch.linalg.lstsq(root @ torch.stack(columns[form], dim=1), root @ w[:, None]).solution[:, 0]
    return found if len(found) == 2 else torch.cat((found, torch.zeros(1).double()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "m"), [(8, 8), (6, 8), (4, 8), (2, 4), (1, 2), (3, 16)])
def test_levels_are_those_of_least_squares_row_by_row(form: Form, n: int, m: int) -> None:
    if form == "B" and n == m:
        return  # mask and ones are one: form A
    on = block(width=48)
    mask, signs = random_fit(on, n, m, form)
    fit = fitted(on, mask, signs, form)
    for row in range(len(on.weight)):
        wanted = slow_levels(on.weight[row], mask[row], signs[row], on.gram, form)
        assert torch.allclose(torch.cat((fit.alpha[row], fit.mu[row])), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_levels_are_stationary(form: Form) -> None:
    on = block(64, 128)
    mask, signs = random_fit(on, 4, 8, form)
    fit = fitted(on, mask, signs, form)
    lost = (on.weight - fit.dense()) @ on.gram
    free = {"A": [mask.double()], "B": [torch.ones_like(signs)], "symmetric": []}[form]
    for direction in (mask * signs, *free):
        gradient = (lost * direction).sum(1)
        scale = ((on.weight @ on.gram) * direction).abs().sum(1)
        assert float((gradient.abs() / scale).max()) < 1e-10


def test_the_error_falls_with_every_alternation_towards_the_levels_that_are_solved_for() -> None:
    """The paper's updates: mu for the alpha at hand, then alpha for that mu."""
    on = block(64, 128)
    mask, b = random_fit(on, 4, 8, "A")
    p, q = mask * b, mask.double()
    fit = Fit(mask, b, torch.ones(64, 1, dtype=torch.float64), torch.zeros(64, 1, dtype=torch.float64), "A")
    errors = [on.error(fit.dense())]
    for _ in range(30):
        rest = ((on.weight - fit.alpha * p) @ on.gram * q).sum(1, keepdim=True)
        fit = replace(fit, mu=rest / ((q @ on.gram) * q).sum(1, keepdim=True))
        rest = ((on.weight - fit.mu * q) @ on.gram * p).sum(1, keepdim=True)
        fit = replace(fit, alpha=rest / ((p @ on.gram) * p).sum(1, keepdim=True))
        errors.append(on.error(fit.dense()))
    assert all(bool((after <= before * (1 + 1e-12)).all()) for before, after in pairwise(errors))
    assert torch.allclose(errors[-1], on.error(fitted(on, mask, b, "A").dense()), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_refitting_never_raises_the_error(form: Form) -> None:
    """1,000 rows, each with levels, mask and signs of its own."""
    on = block(1000, 64)
    mask, signs = random_fit(on, 4, 8, form)
    before = Fit(mask, signs, normal(1000, 1, seed=5), normal(1000, 1, seed=6) * (form != "symmetric"), form)
    after = fitted(on, mask, signs, form)
    assert bool((on.error(after.dense()) <= on.error(before.dense()) * (1 + 1e-12)).all())
    nudged = replace(after, alpha=after.alpha * 1.01)
    assert bool((on.error(after.dense()) < on.error(nudged.dense())).all())


def test_without_correlations_alpha_is_the_mean_distance_from_mu() -> None:
    on = replace(block(200), gram=torch.eye(32, dtype=torch.float64))
    mask, start = random_fit(on, 4, 8, "A")
    fit = binary.resigned(on, fitted(on, mask, start, "A"), 50)
    settled = ((fit.signs == binary.signs(on.weight - fit.mu)) | ~mask).all(1)  # alpha > 0, no sign moves any more
    distance = ((on.weight - fit.mu).abs() * mask).sum(1) / mask.sum(1)
    assert int(settled.sum()) > 100
    assert torch.allclose(fit.alpha[settled, 0], distance[settled], rtol=1e-9)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_rows_whose_kept_signs_are_equal_have_no_offset(sign: float) -> None:
    on = block()
    mask, _ = random_fit(on, 4, 8, "A")
    fit = fitted(on, mask, torch.full_like(on.weight, sign), "A")
    assert bool((fit.mu == 0).all())
    p = sign * mask.double()
    least = ((on.weight @ on.gram) * p).sum(1) / ((p @ on.gram) * p).sum(1)
    assert torch.allclose(fit.alpha[:, 0], least)


# ---- steps ---------------------------------------------------------------------------------------------------------


def slow_mask(price: Tensor, n: int, m: int) -> Tensor:
    """The n dearest of every m; of equal ones the later."""
    mask = torch.zeros_like(price, dtype=torch.bool)
    for row, start in product(range(len(price)), range(0, price.shape[1], m)):
        order = sorted(range(start, start + m), key=lambda column: (float(price[row, column]), column))
        mask[row, order[m - n :]] = True
    return mask


@given(st.integers(2, 16), st.data(), st.integers(0, 99))
@settings(max_examples=60)
def test_masks_are_n_of_m_nested_and_keep_the_dearest(m: int, data: st.DataObject, seed: int) -> None:
    price = normal(3, 2 * m, seed=seed).mul(2).round()  # with ties
    mask = torch.ones_like(price, dtype=torch.bool)
    for n in range(m - 1, data.draw(st.integers(1, m)) - 1, -1):
        smaller = without_cheapest(mask, price, m)
        assert bool((smaller <= mask).all())
        assert torch.equal(smaller, slow_mask(price, n, m))
        mask = smaller


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", ["hessian", "magnitude", "wanda"])
@pytest.mark.parametrize(("n", "m"), [(6, 8), (4, 8), (2, 4), (5, 16)])
def test_without_sign_rounds_the_steps_are_one_solution(form: Form, metric: Metric, n: int, m: int) -> None:
    on = block(width=48)
    last = binary.stepwise(on, Plan(n, m, form, metric))
    start = on.weight - on.weight.mean(1, keepdim=True) * (form != "symmetric")
    mask = slow_mask(cost(on, last, metric), n, m)
    once = fitted(on, mask, binary.signs(start), form)

    assert torch.equal(last.mask, mask)
    assert torch.equal(last.dense(), once.dense())


def test_costs_are_what_they_say_weight_by_weight() -> None:
    on = block(4, 8)
    norms = on.gram.diagonal().sqrt()
    for form in FORMS:
        fit = fitted(on, *random_fit(on, 8, 8, form), form)
        for row, column in product(range(4), range(8)):
            w, pivot = float(on.weight[row, column]), float(on.pivots[column])
            pruned = float(fit.mu[row]) if form == "B" else 0.0
            level = float(fit.mu[row] + fit.alpha[row] * fit.signs[row, column])
            wanted = {
                "hessian": w**2 / pivot**2,
                "magnitude": abs(w),
                "wanda": abs(w) * float(norms[column]),
                "gain": ((w - pruned) ** 2 - (w - level) ** 2) / pivot**2,
            }
            for metric in METRICS:
                assert float(cost(on, fit, metric)[row, column]) == pytest.approx(wanted[metric], rel=1e-9)


def test_gain_drops_one_at_a_time_with_levels_solved_for_in_between() -> None:
    on = block()
    mean = on.weight.mean(1, keepdim=True)
    centred = on.weight - mean
    signs, mask = binary.signs(centred), torch.ones_like(on.weight, dtype=torch.bool)
    alpha, mu = centred.abs().mean(1, keepdim=True), mean
    for n in range(7, 3, -1):
        lost = (on.weight - mu - alpha * signs).square()
        price = ((on.weight.square() - lost) / on.pivots**2).masked_fill(~mask, -torch.inf)
        mask = slow_mask(price, n, 8)
        solved = fitted(on, mask, signs, "A")
        alpha, mu = solved.alpha, solved.mu
    found = binary.stepwise(on, Plan(4, 8, metric="gain"))
    assert torch.equal(found.mask, mask)
    assert torch.allclose(found.dense(), solved.dense())


def test_taking_signs_anew_never_raises_the_error_of_a_row() -> None:
    """1,000 rows; and it changes something."""
    on = block(1000, 64)
    for form in FORMS:
        fit = fitted(on, *random_fit(on, 4, 8, form), form)
        errors = [on.error(binary.resigned(on, fit, rounds).dense()) for rounds in range(4)]
        assert all(bool((after <= before).all()) for before, after in pairwise(errors))
        assert float(errors[-1].sum()) < 0.9 * float(errors[0].sum())


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_pruned_and_refitted_beats_not_pruned_and_gain_beats_hessian(seed: int) -> None:
    """The orderings that were measured on weights like these, 64 x 128."""
    on = block(64, 128, seed)

    def error(plan: Plan) -> float:
        return float(on.error(binary.stepwise(on, plan).dense()).sum())

    whole = error(Plan(8, 8))
    for n in (6, 5, 4):
        hessian, gain = error(Plan(n, 8)), error(Plan(n, 8, metric="gain"))
        assert gain < hessian < whole
        assert error(Plan(n, 8, sign_rounds=3)) < hessian
        assert error(Plan(n, 8, metric="gain", sign_rounds=3)) < gain
        naive = binary.stepwise(on, Plan(8, 8))  # the mask on the levels of the whole row
        masked = replace(naive, mask=binary.stepwise(on, Plan(n, 8)).mask)
        assert hessian < float(on.error(masked.dense()).sum())


# ---- blocks --------------------------------------------------------------------------------------------------------


def slow_binarize(weight: Tensor, gram: Tensor, plan: Plan) -> Tensor:
    """Block after block; the columns behind are solved for by the normal equations of tr(E H E^T)."""
    values, hessian = weight.clone(), damped(gram, plan.damp)
    result = torch.zeros_like(values)
    for start in range(0, values.shape[1], plan.block):
        end = min(start + plan.block, values.shape[1])
        here, behind = slice(start, end), slice(end, None)
        inverse = torch.linalg.inv(hessian[start:, start:])
        pivots = torch.linalg.cholesky(inverse, upper=True).diagonal()[: end - start]
        on = Block(values[:, here], hessian[here, here], pivots)
        result[:, here] = sum(layer.dense() for layer in binary.binarize_block(on, plan))
        lost = values[:, here] - result[:, here]
        # with E = [lost, x]: x H_RR = -lost H_bR, and the columns behind become values - x
        x = -torch.linalg.solve(hessian[behind, behind], (lost @ hessian[here, behind]).T).T
        values[:, behind] = values[:, behind] - x
    return result


@pytest.mark.parametrize("plan", [Plan(4, 8, block=16), Plan(3, 4, "B", "wanda", 1, block=16),
                                  Plan(2, 4, salient=1, block=32), Plan(8, 8, block=16)], ids=str)  # fmt: skip
def test_blocks_and_what_makes_up_for_them_are_those_of_the_normal_equations(plan: Plan) -> None:
    weight, inputs = weights(6, 56), gram(56)  # the last block is narrower
    found = binarize(weight, inputs, plan).dense(torch.float64)
    assert torch.allclose(found, slow_binarize(weight, inputs, plan), rtol=1e-9, atol=1e-9)


def test_the_columns_behind_make_up_for_a_block_as_well_as_they_can() -> None:
    inputs = gram(48)
    hessian, upper = damped(inputs, 1e-2), inverse_factor(inputs, 1e-2)
    lost = normal(6, 16, seed=3)
    change = -torch.linalg.solve_triangular(upper[:16, :16], lost, upper=True, left=False) @ upper[:16, 16:]
    whole = torch.cat((lost, -change), dim=1)  # E = W - W'
    without = torch.cat((lost, torch.zeros(6, 32)), dim=1)
    assert output_error(whole, hessian) < output_error(without, hessian)
    assert float(((whole @ hessian)[:, 16:]).abs().max()) < 1e-9 * float((lost @ hessian[:16, 16:]).abs().max())


def test_making_up_for_blocks_lowers_the_error_of_the_whole() -> None:
    weight, inputs = weights(32, 128), gram(128)
    alone = torch.zeros_like(weight)
    for start in range(0, 128, 32):
        here = slice(start, start + 32)
        alone[:, here] = binarize(weight[:, here], inputs[here, here], Plan(4, 8)).dense(torch.float64)
    together = binarize(weight, inputs, Plan(4, 8, block=32)).dense(torch.float64)
    assert output_error(weight - together, inputs) < output_error(weight - alone, inputs)


# ---- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "tree"),
    [
        (Plan(4, 8), "4:8 of 1-bit group 64 with zero points"),
        (Plan(6, 8, block=64), "6:8 of 1-bit group 48 with zero points"),
        (Plan(2, 4, "B"), "2-bit group 128 with zero points"),
        (Plan(8, 8), "1-bit group 128 with zero points"),
        (Plan(8, 8, "B"), "1-bit group 128 with zero points"),
        (Plan(4, 8, salient=1), "4:8 of 1-bit group 64 with zero points + 1:8 of 1-bit group 16 with zero points"),
        (Plan(4, 8, "B", salient=2), "2-bit group 128 with zero points + 2:8 of 1-bit group 32 with zero points"),
        (Plan(8, 8, salient=8), "1-bit group 128 with zero points + 1-bit group 128 with zero points"),
        (Plan(4, 8, "symmetric", salient=1), "4:8 of 1-bit group 64 + 1:8 of 1-bit group 16"),
        (Plan(8, 8, "symmetric"), "1-bit group 128"),
    ],
    ids=str,
)
def test_trees_are_the_smallest_that_hold_the_levels(plan: Plan, tree: str) -> None:
    assert describe(binarize(weights(4, 144), gram(144), plan)) == tree


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_scales_and_zero_points_are_float16_numbers_and_float32_decodes_them_exactly(form: Form, size: float) -> None:
    weight = weights(32, 144) * size
    tree = binarize(weight, gram(144), Plan(4, 8, form))
    leaf = tree.kept if isinstance(tree, Sparse) else tree
    assert isinstance(leaf, LowBit)
    assert bool((leaf.scales > 0).all())
    assert torch.equal(leaf.scales.half().float(), leaf.scales)
    assert torch.equal(leaf.zeros.half().float(), leaf.zeros)
    assert torch.equal(tree.dense(torch.float32).double(), tree.dense(torch.float64))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_is_what_was_fitted_but_for_the_rounding_of_float16(form: Form) -> None:
    on = block(1000, 64)
    fit = binary.stepwise(on, Plan(4, 8, form))
    step = (1.0 if form == "B" else 2.0) * fit.alpha.abs() + fit.mu.abs()
    assert bool(((binary.stored(fit).dense() - fit.dense()).abs() <= 2.0**-10 * step).all())


def fit_of(alpha: float, mu: float, form: Form) -> Fit:
    mask = torch.tensor([[True, False, True, False]])
    signs = torch.tensor([[1.0, 1.0, -1.0, 1.0]]).double()
    return Fit(mask, signs, torch.tensor([[alpha]]).double(), torch.tensor([[mu]]).double(), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("alpha", "mu"),
    [(0.5, 0.25), (-0.5, 0.25), (0.5, 0.0), (0.0, 0.75), (0.0, -0.75), (0.0, 0.0), (1e-9, 0.5), (1e-9, -0.5), (1, 99)],
)  # fmt: skip
def test_every_pair_of_levels_can_be_stored(form: Form, alpha: float, mu: float) -> None:
    """Negative scales, no scale, one that is lost beside the offset."""
    fit = fit_of(alpha, 0.0 if form == "symmetric" else mu, form)
    kept = binary.stored(fit)
    assert bool((kept.steps > 0).all())
    assert bool(kept.zeros.isfinite().all())
    assert int(kept.codes.max()) <= (2 if form == "B" else 1)
    assert torch.allclose(kept.dense(), fit.dense(), rtol=1e-3, atol=2.0**-25)
    if alpha == mu == 0 and form != "symmetric":
        assert bool((kept.dense() == 0).all())


def test_levels_beyond_float16_become_its_largest() -> None:
    kept = binary.stored(fit_of(1e6, 0.0, "A"))
    assert float(kept.dense().abs().max()) == 65504 / 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("salient", [0, 1])
def test_a_matrix_of_zeros_stays_zero_and_one_without_inputs_is_binarized_by_its_values(
    form: Form, salient: int
) -> None:
    plan = Plan(4, 8, form, salient=salient)
    assert float(binarize(torch.zeros(3, 16), gram(16), plan).dense().abs().max()) <= (form == "symmetric") * 2.0**-24
    weight = weights(8, 16)
    found = binarize(weight, torch.zeros(16, 16), plan).dense(torch.float64)
    assert float((weight - found).square().sum()) < 0.6 * float(weight.square().sum())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("salient", [0, 2])
def test_exactly_n_of_every_m_are_kept_after_all_blocks(metric: Metric, salient: int) -> None:
    tree = binarize(weights(16, 144), gram(144), Plan(4, 8, metric=metric, salient=salient))
    first = tree.terms[0] if isinstance(tree, Sum) else tree
    assert isinstance(first, Sparse)
    assert bool((first.mask.view(16, -1, 8).sum(-1) == 4).all())
    dense = tree.dense()
    assert bool((dense[~first.mask] == 0).all())
    assert bool((dense[first.mask] != 0).all())


def test_channels_that_no_token_used_are_pruned_first() -> None:
    weight, inputs = weights(16, 32), gram(32)
    inputs[:, ::8] = inputs[::8] = 0
    metrics: tuple[Metric, ...] = ("hessian", "wanda")  # by gain, a weight near 0 may be better pruned than binarized
    for metric in metrics:
        tree = binarize(weight, inputs, Plan(7, 8, metric=metric, damp=1e-6))
        assert isinstance(tree, Sparse)
        assert float(tree.mask[:, ::8].float().mean()) < 0.05


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("salience", ["column", "weight"])
def test_binarizing_salient_weights_twice_never_raises_the_error_of_a_block(form: Form, salience: str) -> None:
    """1,000 rows, same mask; the slack is what rounding to float16 may add."""
    on = block(1000, 64)
    plan = Plan(4, 8, form, salient=1, salience=salience)  # type: ignore[arg-type]
    first, second = binary.binarize_block(on, plan)
    before, after = on.error(first.dense()), on.error(first.dense() + second.dense())
    assert bool((second.mask <= first.mask).all())
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum()) < 0.95 * float(before.sum())


def test_salient_columns_are_the_same_in_every_row_that_keeps_them() -> None:
    on = block(200, 16)
    _, second = binary.binarize_block(on, Plan(8, 8, salient=1))
    salience = (on.weight.square().sum(0) / on.pivots**2).view(2, 8)
    wanted = torch.zeros(2, 8).scatter(1, salience.argmax(1, keepdim=True), 1).bool().flatten()
    assert torch.equal(second.mask, wanted.expand(200, 16))


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(WeightError, match="not finite"):
        binarize(torch.full((2, 8), torch.nan), gram(8), Plan(4, 8))


# ---- patterns and bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", range(2, 17))
def test_every_pattern_has_its_own_number_from_zero_without_gaps(m: int) -> None:
    for n in range(1, m + 1):
        every = torch.tensor(list(combinations(range(m), n)), dtype=torch.uint8)
        numbers = pattern_numbers(every, n)
        assert sorted(numbers.flatten().tolist()) == list(range(math.comb(m, n)))
        assert torch.equal(pattern_places(numbers, n, m), every)
        assert 2 ** (index_bits(n, m) - 1) < math.comb(m, n) <= 2 ** index_bits(n, m) or math.comb(m, n) == 1


def test_places_come_from_masks_in_order() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1, 1, 0, 0], [1, 0, 0, 1, 0, 0, 1, 1]]).bool()
    assert places_of_mask(mask, 4).tolist() == [[1, 3, 0, 1], [0, 3, 2, 3]]


def test_patterns_that_are_none_are_refused() -> None:
    with pytest.raises(WeightError, match="there is no pattern 70 of 4:8; there are 70"):
        pattern_places(torch.tensor([[70]]), 4, 8)
    with pytest.raises(WeightError, match="3:17 is not a sparsity of rows that keep 6 columns"):
        patterns_of(3, 17, 6)
    with pytest.raises(WeightError, match="4:8 is not a sparsity of rows that keep 6 columns"):
        patterns_of(4, 8, 6)


@pytest.mark.parametrize(
    ("n", "m", "file", "paper"), [(6, 8, 1.625, 0.825), (5, 8, 1.625, 0.6875), (4, 8, 1.625, 0.55), (2, 4, 1.5, 0.55)]
)
def test_bits_of_files_and_of_papers(n: int, m: int, file: float, paper: float) -> None:
    assert file_bits(n, m) == file
    assert paper_bits(n, m) == pytest.approx(paper, rel=1e-12)


def test_bits_of_other_forms() -> None:
    assert file_bits(8, 8) == file_bits(8, 8, form="B") == 1.25
    assert file_bits(4, 8, form="B") == 2.25
    assert file_bits(4, 8, salient=1) == 1.625 + 1 / 8 + 3 / 8 + 0.25
    assert file_bits(4, 8, form="symmetric") == 1.5
    assert file_bits(4, 8, form="symmetric", salient=1) == 1.5 + 1 / 8 + 3 / 8 + 0.125
    assert file_bits(4, 8, form="B", salient=1) == 2.25 + 1 / 8 + 3 / 8 + 0.25
    assert file_bits(4, 8, block=64, grid_bits=32) == 0.5 + 7 / 8 + 1.0


# ---- layers --------------------------------------------------------------------------------------------------------

LAYERS = st.lists(st.tuples(st.floats(0, 2), st.integers(1, 1000)), min_size=1, max_size=12)


@given(LAYERS, st.integers(1, 8), st.integers(0, 3), st.integers(0, 3), st.floats(0, 4))
def test_layers_keep_what_the_budget_gives_the_more_the_more_they_matter(
    layers: list[tuple[float, int]], n: int, below: int, above: int, spread: float
) -> None:
    influence, sizes = [layer[0] for layer in layers], [layer[1] for layer in layers]
    low, high = max(n - below, 1), min(n + above, 8)
    kept = kept_per_layer(influence, sizes, n, low, high, spread)
    spent = sum(count * size for count, size in zip(kept, sizes, strict=True))
    left = n * sum(sizes) - spent

    assert all(low <= count <= high for count in kept)
    assert left >= 0
    ordered = [count for _, count in sorted(zip(influence, kept, strict=True))]
    assert ordered == sorted(ordered)
    alone = [layer for layer, count in enumerate(kept) if count < high and kept.count(count) == 1]
    assert all(sizes[layer] > left for layer in alone)  # no step more fits


@pytest.mark.parametrize("influence", [[1.0] * 5, [0.0] * 5])
def test_layers_that_matter_alike_keep_alike(influence: list[float]) -> None:
    assert kept_per_layer(influence, [10] * 5, 6, 5, 7, 1.0) == [6] * 5
    assert kept_per_layer([3.0, 0.5, 0.5, 0.5, 0.5], [10] * 5, 6, 5, 7, 0.0) == [6] * 5


def test_first_and_last_layers_that_matter_most_keep_most() -> None:
    bars = [2.85, 1.7, 0.9, 0.5, 0.3, 0.3, 0.3, 2.75]
    kept = kept_per_layer(bars, [10] * 8, 6, 5, 7, 1.0)
    assert kept[0] == kept[-1] == 7
    assert min(kept) == kept[4] == 5
    assert sum(kept) == 48


@pytest.mark.parametrize(
    ("influence", "kept"),
    [
        (
            [1.5, 0.5],
            [7, 5],
        ),  # 6.5 and 5.5 are rounded half up; of two that were rounded up alike, the lower gives back
        ([1.7, 1.5, 0.53, 0.27], [7, 6, 6, 5]),  # of 7, 7, 6, 5 the second was rounded up most
        ([4.0, 0.25, 0.25, 0.25, 0.25], [7, 5, 6, 6, 6]),  # what the first cannot take goes to the others
        ([3.0, 1.4, 0.2, 0.2, 0.2], [7, 7, 5, 5, 6]),  # first where it is missed most: 6.4 that was rounded to 6
    ],
)
def test_rounding_is_repaired_where_it_went_furthest(influence: list[float], kept: list[int]) -> None:
    assert kept_per_layer(influence, [10] * len(kept), 6, 5, 7, 1.0) == kept
