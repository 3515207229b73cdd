"""Random numbers: of the distribution that is asked for, the same for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exporter.errors import ArtifactError
from targets.coreml_ios.executor.ops import OPERATIONS

COUNT = 20000
SHAPE = torch.tensor([COUNT // 4, 4], dtype=torch.int32)
SEED = torch.tensor(7, dtype=torch.int32)
OF_A_SHAPE = ("random_bernoulli", "random_normal", "random_uniform")
STEP = 5 / np.sqrt(COUNT)  # five standard errors of a mean of values whose deviation is 1


def drawn(name: str, **parameters: Any) -> Tensor:
    found = OPERATIONS[f"random_{name}"](shape=SHAPE, seed=SEED, **parameters)
    assert list(found.shape) == SHAPE.tolist()
    return found


def test_bernoulli_is_one_as_often_as_it_says() -> None:
    for prob in (0.0, 0.125, 1.0):
        found = drawn("bernoulli", prob=torch.tensor(prob))
        assert set(found.unique().tolist()) <= {0.0, 1.0}
        assert float(found.mean()) == pytest.approx(prob, abs=STEP)
    assert float(drawn("bernoulli").mean()) == pytest.approx(0.5, abs=STEP)


def test_normal_has_its_moments() -> None:
    found = (drawn("normal", mean=torch.tensor(-3.0), stddev=torch.tensor(0.5)) + 3) / 0.5
    for power, moment in enumerate((1, 0, 1, 0, 3)):
        assert float((found**power).mean()) == pytest.approx(moment, abs=10 * STEP)
    assert float(drawn("normal").mean()) == pytest.approx(0, abs=STEP)


def test_uniform_fills_its_interval_evenly() -> None:
    found = drawn("uniform", low=torch.tensor(-2.0), high=torch.tensor(6.0))
    shares = torch.histc(found, 8, -2, 6) / COUNT
    assert float(found.min()) >= -2
    assert float(found.max()) < 6
    assert shares.tolist() == pytest.approx([1 / 8] * 8, abs=STEP)
    assert float(drawn("uniform").max()) < 1


@pytest.mark.parametrize("mode", ["logits", "probs"])
def test_categorical_draws_places_as_often_as_they_weigh(mode: str) -> None:
    shares = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.125, 0.875]])
    x = shares if mode == "probs" else shares.log() + 3
    found = OPERATIONS["random_categorical"](x, mode, torch.tensor(COUNT), SEED)
    assert list(found.shape) == [2, COUNT]
    for row, wanted in zip(found, shares.tolist()):
        assert (row.bincount(minlength=3) / COUNT).tolist() == pytest.approx(wanted, abs=STEP)


def test_categorical_takes_any_rank_and_draws_one_where_no_count_is_given() -> None:
    x = torch.full((2, 2, 3), -torch.inf)
    x[..., 1] = 0
    assert OPERATIONS["random_categorical"](x).tolist() == [[[1], [1]], [[1], [1]]]
    assert OPERATIONS["random_categorical"](x[0, 0], size=torch.tensor(2)).tolist() == [1, 1]


@pytest.mark.parametrize("name", OF_A_SHAPE)
def test_the_same_seed_gives_the_same_and_no_seed_others(name: str) -> None:
    draw = OPERATIONS[name]
    again, other = torch.tensor(7, dtype=torch.int32), torch.tensor(8, dtype=torch.int32)
    assert torch.equal(draw(SHAPE, seed=SEED), draw(SHAPE, seed=again))
    assert not torch.equal(draw(SHAPE, seed=SEED), draw(SHAPE, seed=other))
    assert not torch.equal(draw(SHAPE), draw(SHAPE))
    assert not torch.equal(draw(SHAPE, seed=torch.tensor(-1)), draw(SHAPE, seed=torch.tensor(-1)))


def test_drawing_does_not_touch_torchs_own_generator() -> None:
    before = torch.get_rng_state()
    for name in OF_A_SHAPE:
        OPERATIONS[name](SHAPE, seed=SEED)
        OPERATIONS[name](SHAPE)
    OPERATIONS["random_categorical"](torch.zeros(3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", OF_A_SHAPE)
def test_enormous_and_impossible_shapes_are_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="more than the"):
        OPERATIONS[name](torch.tensor([2**20, 2**20], dtype=torch.int32))
    with pytest.raises(RuntimeError):
        OPERATIONS[name](torch.tensor([-1], dtype=torch.int32))


@pytest.mark.parametrize(
    ("x", "mode", "size", "said"),
    [
        ([1.0], "odds", 1, "mode 'odds' is not one of logits, probs"),
        ([1.0, 1.0], "probs", 2**30, "more than the"),
        ([-1.0, 1.0], "probs", 1, "probability"),
        ([0.0, 0.0], "probs", 1, "prob"),
        ([float("nan")], "logits", 1, "probability"),
        ([1.0], "logits", 0, "samples"),
        ([], "logits", 1, "0 elements"),
    ],
)
def test_what_has_no_distribution_is_refused(x: list[float], mode: str, size: int, said: str) -> None:
    with pytest.raises((ValueError, RuntimeError, ArtifactError), match=said):
        OPERATIONS["random_categorical"](torch.tensor(x), mode, torch.tensor(size))


def test_a_probability_beyond_one_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"p >= 0 && p <= 1|p_in"):
        OPERATIONS["random_bernoulli"](SHAPE, torch.tensor(1.5))
