"""Whitened low rank: what it loses, that nothing of its rank loses less, and factors of one size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exporter.errors import WeightError
from exporter.maths.lowrank import truncated
from exporter.maths.whitening import SHIFT, balanced, kept_rank, whitened, whitener


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven_inputs(batch: int, tokens: int, width: int, seed: int) -> Tensor:
    """Correlated inputs, some directions a hundred times as strong as others: [batch, tokens, width].

    Their Gram matrix has a condition around 2e4, so what follows from its Cholesky factor is good to 1e-11.
    """
    strength = torch.logspace(-1, 1, width, dtype=torch.float64)
    turn = torch.linalg.qr(drawn(batch, width, width, seed=seed + 1)).Q
    return (drawn(batch, tokens, width, seed=seed) * strength) @ turn


def gram_of(x: Tensor) -> Tensor:
    return x.mT @ x


def output_error(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """|X (W - W')^T|, by the outputs themselves: [batch]."""
    return (x @ (weight - other).mT).flatten(-2).norm(dim=-1)


# ---- rank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "width", "keep", "rank"),
    [(4096, 4096, 0.25, 512), (1024, 4096, 0.25, 204), (4096, 4096, 0.5, 1024), (64, 64, 1.0, 32), (2, 64, 0.25, 0)],
)
def test_the_rank_is_that_at_which_both_factors_hold_the_share(out: int, width: int, keep: float, rank: int) -> None:
    assert kept_rank(out, width, keep) == rank
    assert rank * (out + width) <= keep * out * width < (rank + 1) * (out + width)


# ---- what is lost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "width"), [(12, 12), (8, 20), (20, 8)])
def test_the_loss_is_that_of_the_singular_values_that_were_cut(out: int, width: int) -> None:
    x, weight = uneven_inputs(20, 60, width, 1), drawn(20, out, width, seed=7)
    lower = torch.linalg.cholesky(gram_of(x))
    values = torch.linalg.svdvals(weight @ lower)
    for rank in range(min(out, width)):
        left, right = whitened(weight, gram_of(x), rank)
        assert left.shape == (20, out, rank)
        assert right.shape == (20, rank, width)
        cut = values[:, rank:].square().sum(-1).sqrt()
        assert torch.allclose(output_error(x, weight, left @ right), cut, rtol=1e-9, atol=0)
        through_factor = ((weight - left @ right) @ lower).flatten(-2).norm(dim=-1)
        assert torch.allclose(through_factor, cut, rtol=1e-9, atol=0)


def test_full_rank_loses_nothing() -> None:
    x, weight = uneven_inputs(1, 60, 10, 3), drawn(1, 6, 10)
    left, right = whitened(weight, gram_of(x), 6)
    assert torch.allclose(left @ right, weight, rtol=1e-9, atol=1e-9)


def test_plain_truncation_never_loses_less_in_1000_random_matrices() -> None:
    x, weight = uneven_inputs(1000, 40, 10, 11), drawn(1000, 12, 10, seed=5)
    for rank in (1, 3, 7):
        left, right = whitened(weight, gram_of(x), rank)
        plain_left, plain_right, _ = truncated(weight, rank)
        ours, plain = output_error(x, weight, left @ right), output_error(x, weight, plain_left @ plain_right)
        assert bool((ours <= plain * (1 + 1e-12)).all())
        assert float((plain / ours).median()) > 1.05  # and it is no tie


def test_no_change_of_either_factor_loses_less() -> None:
    x, weight = uneven_inputs(1, 40, 10, 2)[0], drawn(12, 10, seed=5)
    left, right = whitened(weight, gram_of(x), 4)
    ours = output_error(x, weight, left @ right)
    a = left + 1e-3 * drawn(500, *left.shape, seed=1)
    b = right + 1e-3 * drawn(500, *right.shape, seed=2)
    assert bool((output_error(x, weight, a @ b) > ours).all())


def test_more_rank_never_loses_more() -> None:
    x, weight = uneven_inputs(50, 40, 10, 4), drawn(50, 12, 10, seed=8)
    errors = []
    for keep in (0.2, 0.4, 0.6, 0.8, 1.0):
        left, right = whitened(weight, gram_of(x), kept_rank(12, 10, keep))
        errors.append(output_error(x, weight, left @ right))
    assert bool((torch.stack(errors).diff(dim=0) < 0).all())


def test_the_size_of_the_gram_matrix_does_not_matter() -> None:
    x, weight = uneven_inputs(1, 40, 10, 2)[0], drawn(12, 10, seed=5)
    first = torch.matmul(*whitened(weight, gram_of(x), 4))
    for factor in (1e-12, 1 / 40, 1e12):
        assert torch.allclose(torch.matmul(*whitened(weight, gram_of(x) * factor, 4)), first, rtol=1e-9, atol=1e-9)


# ---- Gram matrices without a Cholesky factor ---------------------------------------------------------------------


def test_fewer_tokens_than_channels_still_give_the_best_of_that_rank() -> None:
    x, weight = uneven_inputs(1, 5, 10, 2)[0], drawn(12, 10, seed=5)
    best = torch.linalg.svdvals(weight @ x.T)
    for rank in (1, 3, 4):
        left, right = whitened(weight, gram_of(x), rank)
        assert bool(left.isfinite().all() and right.isfinite().all())
        lost = float(output_error(x, weight, left @ right))
        assert lost == pytest.approx(float(best[rank:].square().sum().sqrt()), rel=1e-2)


def test_a_dead_channel_is_lifted_by_the_shift_alone_and_others_of_the_batch_are_not() -> None:
    x = uneven_inputs(2, 40, 6, 2)
    x[0, :, 3] = 0
    gram = gram_of(x)
    lower = whitener(gram)
    assert torch.allclose(lower[1] @ lower[1].T, gram[1], rtol=1e-12, atol=1e-12 * float(gram[1].max()))
    lifted = lower[0] @ lower[0].T - gram[0]
    mean = gram[0].diagonal().mean()
    assert torch.allclose(lifted, SHIFT * mean * torch.eye(6, dtype=torch.float64), rtol=1e-6, atol=1e-12 * float(mean))


def test_a_negative_eigenvalue_is_lifted_until_the_smallest_is_the_shift() -> None:
    turn, values = torch.linalg.qr(drawn(6, 6)).Q, torch.tensor([-0.3, 0.1, 1, 2, 3, 4], dtype=torch.float64)
    gram = (turn * values) @ turn.T
    lower = whitener(gram)
    mean = float(values.mean())
    assert torch.allclose(torch.linalg.eigvalsh(lower @ lower.T), values + 0.3 + SHIFT * mean, rtol=1e-9, atol=1e-12)


def test_without_any_input_every_weight_counts_the_same() -> None:
    weight = drawn(12, 10, seed=5)
    left, right = whitened(weight, torch.zeros(10, 10, dtype=torch.float64), 4)
    plain_left, plain_right, _ = truncated(weight, 4)
    assert torch.allclose(left @ right, plain_left @ plain_right, rtol=1e-9, atol=1e-9)


def test_what_is_not_finite_is_refused() -> None:
    weight, gram = drawn(12, 10), torch.eye(10, dtype=torch.float64)
    with pytest.raises(WeightError, match="the Gram matrix is not finite"):
        whitened(weight, gram * float("nan"), 4)
    with pytest.raises(WeightError, match="not finite"):
        whitened(weight / 0, gram, 4)
    with pytest.raises(WeightError, match="has no rank 11; give 0 to 10"):
        whitened(weight, gram, 11)


# ---- factors of one size -----------------------------------------------------------------------------------------


def test_balancing_keeps_the_product_and_makes_the_largest_values_equal() -> None:
    left = drawn(30, 12, 4, seed=1) * torch.tensor([1e-3, 1.0, 10.0, 1e4])
    right = drawn(30, 4, 10, seed=2) * torch.tensor([10.0, 1e-4, 1.0, 3.0])[:, None]

    a, b = balanced(left, right)

    assert torch.allclose(a @ b, left @ right, rtol=1e-12, atol=1e-12 * float((left @ right).abs().max()))
    assert torch.allclose(a.abs().amax(-2), b.abs().amax(-1), rtol=1e-12, atol=0)
    one_channel_at_a_time = a[..., :, None, :] * b.mT[..., None, :, :]  # [.., out, in, rank]
    assert torch.allclose(one_channel_at_a_time, left[..., :, None, :] * right.mT[..., None, :, :], rtol=1e-12, atol=0)


def test_a_channel_of_zeros_stays() -> None:
    left, right = drawn(5, 3), drawn(3, 4)
    left[:, 0] = 0
    right[1] = 0
    a, b = balanced(left, right)
    assert torch.equal(a[:, :2], left[:, :2])
    assert torch.equal(b[:2], right[:2])
    assert torch.allclose(a @ b, left @ right, rtol=1e-12, atol=1e-15)


# ---- why queries and keys ----------------------------------------------------------------------------------------


def test_an_attention_map_moves_by_at_most_half_the_root_of_its_density_times_the_largest_change_of_logits() -> None:
    """|S' - S| <= sqrt(D) N max|delta| / 2: the Jacobian of a softmax is at most 1/2, and only what is seen counts."""
    count, tokens = 1000, 12
    logits, delta = drawn(count, tokens, tokens, seed=1) * 3, drawn(count, tokens, tokens, seed=2)
    delta *= torch.logspace(-3, 1, count, dtype=torch.float64)[:, None, None]
    share = torch.linspace(0.05, 1, count)[:, None, None]
    seen = (torch.rand(count, tokens, tokens) < share) | torch.eye(tokens, dtype=torch.bool)  # a token sees itself
    maps = [(x.masked_fill(~seen, -torch.inf)).softmax(-1) for x in (logits, logits + delta)]

    moved = (maps[1] - maps[0]).flatten(1).norm(dim=1)

    density = seen.flatten(1).double().mean(1)
    largest = delta.abs().masked_fill(~seen, 0).flatten(1).amax(1)
    assert bool((moved <= density.sqrt() * tokens * largest / 2).all())
