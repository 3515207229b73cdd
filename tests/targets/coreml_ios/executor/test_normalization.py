"""Normalization: against coremltools' own folding of constants, or the equation in float64, for every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from exporter.errors import ArtifactError
from targets.coreml_ios.executor.ops import OPERATIONS
from tests.targets.coreml_ios.executor.oracle import Array, computed, folded

RNG = np.random.default_rng(0)
SHAPES = [(2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 3, 4)]
GAMMA, BETA = np.float32([1, -2, 0.5]), np.float32([0, 3, -1])
AFFINE = ({}, {"gamma": GAMMA}, {"beta": BETA}, {"gamma": GAMMA, "beta": BETA})


def floats(*shape: int) -> Array:
    return (RNG.normal(size=shape) * 3 + 1).astype(np.float32)


def close(found: Array, wanted: Array) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-6)


def affine(y: Array, given: dict[str, Array]) -> Array:
    """Gamma and beta, one a channel, in float64."""
    shape = (1, 3) + (1,) * (y.ndim - 2)
    return y * given.get("gamma", np.ones(3)).reshape(shape) + given.get("beta", np.zeros(3)).reshape(shape)


@pytest.mark.parametrize("shape", [(2, 3), *SHAPES])
@pytest.mark.parametrize("given", AFFINE)
def test_batch_norm_is_its_equation(shape: tuple[int, ...], given: dict[str, Array]) -> None:
    x, mean, variance = floats(*shape), floats(3), np.float32([4, 0.25, 0])
    wide = x.astype(np.float64).swapaxes(1, -1)  # channels last
    for epsilon in (1e-5, 0.5):
        wanted = affine(((wide - mean) / np.sqrt(variance + epsilon)).swapaxes(1, -1), given)
        found = computed("batch_norm", x=x, mean=mean, variance=variance, epsilon=np.float32(epsilon), **given)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)  # of values up to 1000
    np.testing.assert_array_equal(
        computed("batch_norm", x=x, mean=mean, variance=variance),
        computed("batch_norm", x=x, mean=mean, variance=variance, epsilon=np.float32(1e-5)),
    )


def test_a_large_mean_does_not_cost_the_digits_of_what_is_left() -> None:
    x = torch.full((1, 1, 1), 10001.0)
    found = OPERATIONS["batch_norm"](x, torch.tensor([10000.0]), torch.tensor([1.0]), epsilon=torch.tensor(0.0))
    assert float(found) == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", AFFINE)
def test_instance_norm_is_its_equation(shape: tuple[int, ...], given: dict[str, Array]) -> None:
    x = floats(*shape)
    wide, axes = x.astype(np.float64), tuple(range(2, len(shape)))
    centred = wide - wide.mean(axes, keepdims=True)
    for parameters, epsilon in (({}, 1e-5), ({"epsilon": np.float32(0.5)}, 0.5)):
        wanted = centred / np.sqrt(wide.var(axes, keepdims=True) + epsilon)
        close(computed("instance_norm", x=x, **given, **parameters), affine(wanted, given))


@pytest.mark.parametrize("axes", [[-1], [1, 2], [0], [-1, 0], [2, 0, 1], [1]])
def test_layer_norm_is_coremltools(axes: list[int]) -> None:
    x = floats(2, 3, 4)
    sizes = [size for axis, size in enumerate(x.shape) if axis in [one % 3 for one in axes]]
    gamma, beta = floats(*sizes), floats(*sizes)
    given: dict[str, Any]
    for given in ({}, {"gamma": gamma}, {"gamma": gamma, "beta": beta}, {"epsilon": np.float32(0.5)}):
        parameters = {"x": x, "axes": np.int32(axes), **given}
        close(computed("layer_norm", **parameters), folded("layer_norm", **parameters))


def test_layer_norm_is_over_all_axes_where_none_are_given() -> None:
    x = floats(2, 3)
    close(computed("layer_norm", x=x), (x - x.mean()) / np.sqrt(x.var() + 1e-5))
    assert computed("layer_norm", x=np.float32([[4], [5]]), axes=np.int32([1])).tolist() == [[0], [0]]


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (2, 2, 3, 4, 5), (1, 1, 1)])
def test_l2_norm_is_coremltools(shape: tuple[int, ...]) -> None:
    x = floats(*shape)
    for given in ({}, {"epsilon": np.float32(2)}):
        close(computed("l2_norm", x=x, **given), folded("l2_norm", x=x, **given))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 11, 12])
@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 5, 3, 2), (1, 5, 2, 2, 2)])
def test_local_response_norm_is_torchs(shape: tuple[int, ...], size: int) -> None:
    x = floats(*shape)
    given = {"alpha": np.float32(0.5), "beta": np.float32(1.25), "k": np.float32(2)}
    wide = torch.from_numpy(x.astype(np.float64))
    found = computed("local_response_norm", x=x, size=np.int32(size), **given)
    close(found, F.local_response_norm(wide, size, 0.5, 1.25, 2).numpy())
    found = computed("local_response_norm", x=x, size=np.int32(size))
    close(found, F.local_response_norm(wide, size).numpy())


def test_a_neighbourhood_is_never_wider_than_twice_the_channels() -> None:
    x = floats(1, 3, 2)
    found = computed("local_response_norm", x=x, size=np.int32(2**31 - 1), alpha=np.float32(2**31), beta=np.float32(1))
    close(found, x / (1 + np.square(x).sum(1, keepdims=True)))


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_constants_that_are_not_one_a_channel_are_refused(name: str) -> None:
    x, three, one = torch.zeros(2, 3, 4), torch.ones(3), torch.ones(1)
    moments = {"mean": three, "variance": three} if name == "batch_norm" else {}
    for wrong in ({"gamma": one}, {"beta": one}, *({key: one} for key in moments)):
        with pytest.raises(ValueError, match=r"\[1\] values do not go with the channels \(axis 1\) of \[2, 3, 4\]"):
            OPERATIONS[name](x, **{**moments, **wrong})


@pytest.mark.parametrize(
    ("name", "shape", "given", "said"),
    [
        ("instance_norm", (2, 3), {}, "there are no axes to normalize"),
        ("layer_norm", (2, 3), {"axes": torch.zeros(0)}, "there are no axes to normalize"),
        ("layer_norm", (2, 3), {"axes": torch.tensor([2])}, "axis 2 is not one of the 2"),
        ("layer_norm", (2, 3), {"axes": torch.tensor([1, -1])}, "multiple times"),
        ("layer_norm", (2, 3), {"axes": torch.tensor([1]), "gamma": torch.ones(2)}, "invalid for input of size 2"),
        ("l2_norm", (2, 3), {}, r"\[2, 3\] has fewer than three axes"),
        ("local_response_norm", (2, 3, 4), {"size": torch.tensor(0)}, "a neighbourhood of 0 channels"),
        ("local_response_norm", (3,), {"size": torch.tensor(1)}, r"\[3\] has no channels"),
    ],
)
def test_what_cannot_be_normalized_is_refused(
    name: str, shape: tuple[int, ...], given: dict[str, Any], said: str
) -> None:
    with pytest.raises((ValueError, IndexError, RuntimeError), match=said):
        OPERATIONS[name](torch.zeros(shape), **given)


def test_an_enormous_neighbourhood_is_refused() -> None:
    with pytest.raises(ArtifactError, match="more than the"):
        OPERATIONS["local_response_norm"](torch.zeros(1).expand(1, 2, 2**28), torch.tensor(3))


def test_nothing_is_normalized_to_nothing() -> None:
    for name, shape in (("layer_norm", (0, 3)), ("instance_norm", (2, 3, 0)), ("l2_norm", (0, 1, 2))):
        assert OPERATIONS[name](torch.zeros(shape)).shape == shape
