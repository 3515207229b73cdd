"""Packages that run here: what a session takes, refuses, and remembers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.errors import ArtifactError, PocketError, TargetError
from exporter.session import TorchSession
from targets.coreml_ios import TARGET, runner
from targets.coreml_ios.executor import NOTE
from targets.coreml_ios.package import NAME
from targets.coreml_ios.reader import ROOT, SPECIFICATION
from tests.models import LLAMA, random_model
from tests.targets.coreml_ios.conftest import CONTEXT, Lowered, lower
from tests.targets.coreml_ios.damage import edit, opened

Get = Callable[[str], Lowered]


def test_what_runs_here_is_named() -> None:
    assert TARGET.runs_here
    assert TARGET.stand_in == NOTE == "reference executor on Linux, not Apple's runtime"


def test_a_session_knows_its_context_and_forgets_on_reset(lowered: Get) -> None:
    session = TARGET.session(lowered("unequal").folder)

    first = session.step([1, 2, 3])
    session.step([4])
    session.reset()

    assert (session.context, session.causal) == (CONTEXT, True)
    assert torch.equal(session.step([1, 2, 3]), first)


def test_an_encoder_takes_one_whole_text_after_each_reset(lowered: Get) -> None:
    session = TARGET.session(lowered("bert").folder)

    assert (session.context, session.causal) == (CONTEXT, False)
    assert session.step([1, 2, 3]).shape == (3, 64)
    with pytest.raises(PocketError, match="an encoder sees a whole text at once"):
        session.step([1])


@pytest.mark.parametrize("name", ["unequal", "bert"])
@pytest.mark.parametrize("token", [96, -1])
def test_a_token_that_the_vocabulary_lacks_is_refused(name: str, token: int, lowered: Get) -> None:
    with pytest.raises(TargetError, match=f"token {token} is not in the vocabulary; its tokens are 0 to 95"):
        TARGET.session(lowered(name).folder).step([1, token])


def test_a_step_of_no_token_and_one_beyond_the_context_are_refused(lowered: Get) -> None:
    session = TARGET.session(lowered("unequal").folder)
    with pytest.raises(TargetError, match="at least one token"):
        session.step([])
    session.step([1] * CONTEXT)
    with pytest.raises(TargetError, match=f"{CONTEXT} tokens and 1 more do not fit the context of {CONTEXT}; reset"):
        session.step([1])


def test_the_mask_lets_a_token_see_itself_and_those_before_it() -> None:
    assert (runner.causal_mask(1, 2) == 0).tolist() == [[[[True, True, False], [True, True, True]]]]
    assert runner.causal_mask(1, 2).min() == -1e4


def test_threads_are_given_back(lowered: Get) -> None:
    before = torch.get_num_threads()
    TARGET.session(lowered("unequal").folder, threads=before + 1).step([1])
    assert torch.get_num_threads() == before


def test_a_vocabulary_beyond_16_bits_keeps_its_tokens(tmp_path: Path) -> None:
    """Coremltools passes tokens through 16-bit integers where it can."""
    layer = replace(LLAMA.layers[0], heads=2, kv_heads=1, mlp=32)
    made = lower(random_model(replace(LLAMA, vocab=70_000, hidden=32, layers=(layer,)), optional=()), tmp_path)
    tokens = [0, 32_768, 40_000, 65_536, 69_999]

    found, expected = TARGET.session(tmp_path).step(tokens), TorchSession(made.model).step(tokens)

    assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 0.01


def copied(made: Lowered, folder: Path) -> Path:
    shutil.copytree(made.folder, folder)
    return folder


def test_a_program_with_other_inputs_is_refused(lowered: Get, tmp_path: Path) -> None:
    folder = copied(lowered("unequal"), tmp_path / "copy")
    path = folder / NAME / ROOT / SPECIFICATION
    specification = opened(folder / NAME)
    del specification.description.input[1]
    path.write_bytes(specification.SerializeToString(deterministic=True))

    with pytest.raises(ArtifactError, match=r"takes \{'inputIds': 2\} \(axes by name\); one of ours .*'causalMask': 4"):
        TARGET.session(folder)


def without_look_ups(operations: Any) -> None:
    for operation in operations:
        if operation.type == "gather":
            operation.type = "identity"
            for name in {"axis", "batch_dims", "indices", "validate_indices"} & set(operation.inputs):
                del operation.inputs[name]


def test_a_program_that_looks_up_nothing_is_refused(lowered: Get, tmp_path: Path) -> None:
    folder = copied(lowered("unequal"), tmp_path / "copy")
    edit(folder / NAME, without_look_ups)
    with pytest.raises(ArtifactError, match="the program looks up no tokens"):
        TARGET.session(folder)
