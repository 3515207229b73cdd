"""Attention: against a sum that is written out in float64, and torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from exporter.errors import ArtifactError
from targets.coreml_ios.executor.ops import OPERATIONS

attend = OPERATIONS["scaled_dot_product_attention"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, *shape)).normal(size=shape)).float()


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Row after row: `softmax(q . k / sqrt(E) + mask) V`."""
    flat = [
        one.double().reshape(-1, *one.shape[-2:]) for one in (query, key, value, mask.expand(*query.shape[:-1], -1))
    ]
    found = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=torch.float64).reshape(
        -1, *flat[0].shape[1:2], value.shape[-1]
    )
    for batch, (q, k, v, m) in enumerate(zip(*flat)):
        for row in range(len(q)):
            weights = torch.exp(k @ q[row] / np.sqrt(len(q[row])) + m[row])
            found[batch, row] = (weights[:, None] * v).sum(0) / weights.sum()
    return found.reshape(*query.shape[:-1], value.shape[-1])


@pytest.mark.parametrize("batch", [(2,), (2, 3), (1, 2, 2)])
def test_attention_is_what_is_written_out(batch: tuple[int, ...]) -> None:
    query, key, value, mask = drawn(*batch, 4, 8), drawn(*batch, 5, 8), drawn(*batch, 5, 6), drawn(4, 5)
    found = attend(query, key, value, mask)
    np.testing.assert_allclose(found, written_out(query, key, value, mask), rtol=1e-5, atol=1e-6)
    plain = attend(query, key, value)
    np.testing.assert_allclose(plain, written_out(query, key, value, torch.zeros(4, 5)), rtol=1e-5, atol=1e-6)


def test_a_mask_of_truth_values_is_torchs() -> None:
    query, key, value = drawn(2, 4, 8), drawn(2, 5, 8), drawn(2, 5, 6)
    mask = torch.ones(4, 5).tril().bool()
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    np.testing.assert_allclose(attend(query, key, value, mask), wanted, rtol=1e-5, atol=1e-6)


def test_a_row_that_sees_nothing_is_nan_as_the_equation_has_it() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    found = attend(drawn(1, 2, 4), drawn(1, 2, 4), drawn(1, 2, 4), mask)
    assert not found[0, 0].isnan().any()
    assert found[0, 1].isnan().all()


def test_batches_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of batches \[2\], .*3"):
        attend(drawn(2, 4, 8), drawn(3, 4, 8), drawn(3, 4, 8))


def test_scores_that_no_memory_holds_are_refused() -> None:
    long = torch.zeros(1).expand(1, 2**16, 1)
    with pytest.raises(ArtifactError, match="more than the"):
        attend(long, long, long)
