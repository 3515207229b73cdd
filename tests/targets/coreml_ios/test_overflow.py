"""Residuals whose squares float16 does not hold, with and without the norm that is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.coreml_overflow import largest_residual, loud, plain_rms_norm
from exporter.model import Layer, Model
from exporter.session import TorchSession
from exporter.weights import Dense
from targets.coreml_ios import TARGET
from targets.coreml_ios.ops import CoreMLOps
from tests.models import LLAMA, random_model
from tests.targets.coreml_ios.conftest import CONTEXT

TOKENS = [1, 5, 90, 7, 33, 2, 61, 18]
EMBEDDING = "model.embed_tokens"


def model(factor: float, **fields: Any) -> Model:
    layers = (Layer(4, 2, 16, 16, 96),) * 2
    return loud(random_model(replace(LLAMA, layers=layers, positions=CONTEXT, **fields), optional=()), factor)


def share_of_budget(made: Model, folder: Path) -> float:
    """Relative L2 of the worst position, in budgets."""
    plan = TARGET.plan(made, CONTEXT)
    TARGET.lower(made, plan, folder)
    found, right = TARGET.session(folder).step(TOKENS).double(), TorchSession(made, torch.float64).step(TOKENS)
    error = ((found - right).norm(dim=-1) / right.norm(dim=-1)).nan_to_num(torch.inf).max()
    return float(error) / TARGET.budget(made, plan).relative_l2


def test_a_loud_model_says_the_same() -> None:
    quiet, louder = (TorchSession(model(factor, norm_eps=1e-15), torch.float64).step(TOKENS) for factor in (1, 4096))
    assert torch.allclose(quiet, louder, rtol=1e-6)


@pytest.mark.parametrize("factor", [2.0**-10, 1, 256, 8192])
def test_residuals_of_any_size_that_float16_holds_stay_within_the_budget(factor: float, tmp_path: Path) -> None:
    made = model(factor)
    assert largest_residual(made, TOKENS) < 65504
    assert share_of_budget(made, tmp_path) < 0.25


def test_squares_of_residuals_beyond_255_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(256)
    assert largest_residual(made, TOKENS) > 255
    monkeypatch.setattr(CoreMLOps, "rms_norm", plain_rms_norm)
    assert share_of_budget(made, tmp_path) > 1


@pytest.mark.parametrize("eps", [1e-15, 1e-6, 1e-2])
def test_a_token_of_zeros_gives_numbers(eps: float, tmp_path: Path) -> None:
    made = model(1, norm_eps=eps)
    rows = made.weights[EMBEDDING].dense().clone()
    rows[5] = 0
    made = made.with_weights({EMBEDDING: Dense(rows)})
    TARGET.lower(made, TARGET.plan(made, CONTEXT), tmp_path)

    assert TARGET.session(tmp_path).step([5]).isfinite().all()
