"""Gram matrices against a plain product in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exporter.maths import gram
from exporter.maths.gram import Gram, cross


def batches(sizes: list[int], width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(1, size, width, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def total(found: list[Tensor]) -> Tensor:
    summed = Gram()
    for x in found:
        summed.add(x)
    return summed.total()


def oracle(found: list[Tensor]) -> Tensor:
    x = torch.cat([x.flatten(0, -2) for x in found]).double()
    return x.T @ x


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "BLOCK", 4)
    monkeypatch.setattr(gram, "AT_ONCE", 10)


SIZES = st.lists(st.integers(1, 25), min_size=1, max_size=6)


@pytest.mark.usefixtures("small_blocks")
@given(sizes=SIZES, width=st.integers(1, 13))
def test_any_batches_of_any_width_give_the_plain_product(sizes: list[int], width: int) -> None:
    found = batches(sizes, width)
    assert torch.allclose(total(found), oracle(found), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 255, 256, 257, 700])
def test_blocks_of_every_size_meet_and_the_sum_is_exactly_symmetric(width: int) -> None:
    found = batches([300, 9], width, torch.float32)
    summed = total(found)
    assert summed.dtype == torch.float64
    assert torch.equal(summed, summed.T)
    assert torch.allclose(summed, oracle(found), rtol=1e-5, atol=1e-3)


def test_sums_are_float64_where_float32_would_lose_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "AT_ONCE", 1)
    tokens = torch.ones(65, 1)
    tokens[0] = 2.0**12  # in float32, 2^24 + 1 is 2^24
    assert total([tokens]).item() == 2**24 + 64


def test_no_more_tokens_than_allowed_are_summed_in_their_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "AT_ONCE", 4)
    tokens = torch.ones(8, 1)
    tokens[0] = 2.0**12
    assert total([tokens[:1], tokens[1:4], tokens[4:]]).item() == 2**24 + 4  # 3 are lost to the first, 4 are not


def test_a_total_can_be_asked_for_between_batches() -> None:
    found, summed = batches([5, 7], 300), Gram()
    summed.add(found[0])
    assert torch.allclose(summed.total(), oracle(found[:1]), rtol=1e-12)
    summed.add(found[1])
    assert torch.allclose(summed.total(), oracle(found), rtol=1e-12, atol=1e-12)


def test_a_total_of_inference_tensors_is_an_ordinary_tensor() -> None:
    with torch.inference_mode():
        found = batches([5], 6)
        summed = total(found)
    summed.diagonal().add_(1)
    assert not summed.is_inference()


def test_cross_products_are_summed_over_batches() -> None:
    ys, xs = batches([3, 8], 5), batches([3, 8], 9)
    expected = torch.cat([y[0] for y in ys]).T @ torch.cat([x[0] for x in xs])
    assert torch.allclose(cross(zip(ys, xs)), expected, rtol=1e-12, atol=1e-12)
