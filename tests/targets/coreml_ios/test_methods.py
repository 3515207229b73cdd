"""What every compression method makes of real models: run in float32 against torch, in float16 within its budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exporter import checkpoint, pipeline
from exporter.model import Model
from exporter.plugins import Session
from exporter.recipe import parse
from exporter.session import greedy
from targets.coreml_ios import TARGET, runner
from targets.coreml_ios.reader import Package
from tests.targets.coreml_ios.conftest import Lowered, StoredSession, lower

CONTEXT, NEW_TOKENS = 128, 48
Steps = list[dict[str, Any]]
METHODS: dict[str, tuple[Steps, set[str]]] = {  # and the operations that decode their constants
    "dense": ([], set()),
    "4 bits": ([{"kind": "quantize", "algorithm": "rtn", "bits": 4, "group": 32}], {"blockwise_shift_scale"}),
    "2:4 of 4 bits": (
        [{"kind": "quantize", "algorithm": "gptq", "bits": 4, "group": 32, "sparsity": "2:4"}],
        {"sparse_blockwise_shift_scale", "sparse_to_dense", "blockwise_shift_scale"},
    ),
    "2:4 of 1 bit": (
        [{"kind": "pbs2p", "n": 2, "m": 4, "metric": "gain", "form": "symmetric"}],
        {"lut_to_sparse", "sparse_to_dense"},
    ),
    "2:4 of 1 bit, form B": ([{"kind": "pbs2p", "n": 2, "m": 4, "metric": "gain", "form": "B"}], {"lut_to_dense"}),
    "SWSC": ([{"kind": "swsc"}], set()),
    "SWSC in 4 bits": ([{"kind": "swsc", "centroid_bits": 4, "factor_bits": 4}], {"blockwise_shift_scale"}),
    "CASP": (
        [{"kind": "casp", "bits": 3.1, "levels": [2, 3, 4], "embedding_bits": 4}],
        {"blockwise_shift_scale", "lut_to_dense"},
    ),
}
CASES = [pytest.param(model, method, marks=pytest.mark.slow if model == "builtin" and method != "dense" else ())
         for model in ("stories", "builtin") for method in METHODS]  # fmt: skip


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_real_model_says_what_torch_says(
    name: str, method: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made = lower(compressed(name, method, request), tmp_path, CONTEXT)
    stored = StoredSession(made)
    text = [0 if made.model.architecture.bos is None else made.model.architecture.bos]
    text += greedy(stored, text, NEW_TOKENS)
    expected = whole(StoredSession(made, torch.float64), text)
    exact, half = runner.open_session(made.folder, keep_float32=True), TARGET.session(made.folder)

    for run in (whole, prefill_and_decode):
        assert apart(run(exact, text), expected) < 1e-5
        assert apart(run(half, text), expected) < TARGET.budget(made.model, made.plan).relative_l2
    assert [text[0], *greedy(exact, text[:1], NEW_TOKENS)] == text
    assert constants(made) == METHODS[method][1]


def compressed(name: str, method: str, request: pytest.FixtureRequest) -> Model:
    """A model through a method, calibrated on a little of its own kind of text."""
    calibration: dict[str, Any] = {"windows": 8, "length": 64, "seed": 0}
    if name == "stories":
        calibration["text"] = str(request.getfixturevalue("stories_text"))
        model = checkpoint.load(request.getfixturevalue("stories"))
    else:
        model = pipeline.load("builtin")
    return pipeline.compress(model, parse({"calibration": calibration, "steps": METHODS[method][0]}))


def constants(made: Lowered) -> set[str]:
    """The operations that decode constants."""
    types = {operation.type for operation in Package(made.package).block.operations}
    return {kind.removeprefix("constexpr_") for kind in types if kind.startswith("constexpr_")}


def whole(session: Session, text: Sequence[int]) -> Tensor:
    session.reset()
    return session.step(text).double()


def prefill_and_decode(session: Session, text: Sequence[int]) -> Tensor:
    session.reset()
    return torch.cat([session.step(text[:9]), *(session.step([token]) for token in text[9:])]).double()


def apart(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
