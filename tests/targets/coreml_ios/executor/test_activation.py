"""Activations: against coremltools' own folding of constants, or their formula in float64 where it folds none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from targets.coreml_ios.executor.ops import OPERATIONS
from tests.targets.coreml_ios.executor.oracle import Array, computed, folded

X = np.array([-90, -7, -1.5, -1, -1e-3, -0.0, 0, 1e-3, 0.5, 1, 5.75, 6.5, 80], np.float32)
ALPHA, BETA = np.float32(0.375), np.float32(1.25)
WITH_CONSTANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("relu", "relu6", "sigmoid", "softplus", "softsign")},
    **{name: {"alpha": ALPHA} for name in ("elu", "leaky_relu", "thresholded_relu")},
    **{
        name: {"alpha": ALPHA, "beta": BETA}
        for name in ("clamped_relu", "linear_activation", "scaled_tanh", "sigmoid_hard")
    },
}


def close(found: Array, wanted: Array) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "constants"), WITH_CONSTANTS.items())
def test_activations_are_coremltools(name: str, constants: dict[str, Any]) -> None:
    wanted = folded(name, x=X.copy(), **constants)  # it writes to what it is given
    close(computed(name, x=X, **constants), wanted)
    close(computed(name, x=X.reshape(1, 13, 1), **constants), wanted.reshape(1, 13, 1))


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 2.0])
def test_slopes_of_any_sign_are_coremltools(alpha: float) -> None:
    for name in ("elu", "leaky_relu"):
        close(computed(name, x=X, alpha=np.float32(alpha)), folded(name, x=X, alpha=np.float32(alpha)))
    ends = {"alpha": np.float32(alpha), "beta": np.float32(0.75)}
    close(computed("clamped_relu", x=X, **ends), np.minimum(np.where(X >= 0, X, alpha * X), 0.75).astype(np.float32))


@pytest.mark.parametrize("name", [*WITH_CONSTANTS, "silu", "gelu"])
def test_what_is_no_number_stays_none(name: str) -> None:
    x = np.array([np.nan, 1], np.float32)
    assert np.isnan(computed(name, x=x, **WITH_CONSTANTS.get(name, {}))).tolist() == [True, False]


def test_silu_is_its_formula() -> None:
    x = X.astype(np.float64)
    close(computed("silu", x=X), (x / (1 + np.exp(-x))).astype(np.float32))


@pytest.mark.parametrize("mode", ["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"])
def test_gelu_is_coremltools(mode: str) -> None:
    x = X[1:-1]
    np.testing.assert_allclose(computed("gelu", x=x, mode=mode), folded("gelu", x=x, mode=mode), rtol=1e-5, atol=1e-7)


def test_gelu_is_exact_where_no_mode_is_given_and_refuses_others() -> None:
    assert computed("gelu", x=np.float32(1)) == pytest.approx(0.5 * (1 + math.erf(math.sqrt(0.5))))
    with pytest.raises(ValueError, match="mode 'FAST' is not one of EXACT, TANH_APPROXIMATION, SIGMOID_APPROXIMATION"):
        OPERATIONS["gelu"](torch.zeros(1), "FAST")


def test_softplus_neither_overflows_nor_loses_what_is_small() -> None:
    x = np.array([1000, -20], np.float32)
    close(computed("softplus", x=x), np.float32([1000, np.exp(np.float64(-20))]))
    found = computed("softplus_parametric", x=x.reshape(1, 1, 2), alpha=np.float32([2]), beta=np.float32([1]))
    close(found.reshape(2), np.float32([2000, 2 * np.exp(np.float64(-20))]))


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 2, 2), (1, 3, 1, 2, 2)])
def test_constants_of_a_channel_lie_along_axis_1(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    alpha, beta = np.float32([0.5, -1, 2]), np.float32([1, 0.25, -3])
    parametric = folded("softplus_parametric", x=x, alpha=alpha, beta=beta)
    close(computed("softplus_parametric", x=x, alpha=alpha, beta=beta), parametric)
    for channel, slope in enumerate(alpha):
        close(computed("prelu", x=x, alpha=alpha)[:, channel], np.where(x > 0, x, slope * x)[:, channel])


@pytest.mark.parametrize(("shape", "channels"), [((2, 3, 4), 1), ((2, 1, 4), 3), ((3,), 3)])
def test_constants_that_are_not_one_a_channel_are_refused(shape: tuple[int, ...], channels: int) -> None:
    constants = torch.ones(channels)
    with pytest.raises(ValueError, match=r"values do not go with the channels \(axis 1\)"):
        OPERATIONS["prelu"](torch.zeros(shape), constants)
    with pytest.raises(ValueError, match=r"values do not go with the channels \(axis 1\)"):
        OPERATIONS["softplus_parametric"](torch.zeros(shape), constants, constants)


@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_softmax_is_coremltools(axis: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32) * 30
    close(computed("softmax", x=x, axis=np.int32(axis)), folded("softmax", x=x, axis=np.int32(axis)))


def test_softmax_of_the_last_axis_where_none_is_given() -> None:
    close(computed("softmax", x=np.float32([[1e4, 1e4], [0, -1e4]])), np.float32([[0.5, 0.5], [1, 0]]))
    with pytest.raises(IndexError):
        computed("softmax", x=X, axis=np.int32(1))
