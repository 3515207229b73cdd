"""Files that are not what was planned, found even where a budget would cover the difference; broken ones, refused."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exporter.errors import ArtifactError
from exporter.weights import LowBit, Sum
from targets.executorch_android import TARGET, layout
from tests.targets.executorch_android.conftest import CONTEXT, Export

ATTENTION = "model.layers.0.self_attn"


@pytest.fixture
def copy(small: Export, tmp_path: Path) -> Path:
    """A program of its own to change."""
    return Path(shutil.copy(small.folder / "model.pte", tmp_path))


def wrong(path: Path, small: Export) -> dict[str, str]:
    findings = TARGET.inspect(path.parent, small.model, small.plan)
    return {found.what: found.detail for found in findings if not found.ok}


def change(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def test_torch_that_rounds_alike_agrees_to_float32s_last_bits(small: Export) -> None:
    proof = TARGET.inspect(small.folder, small.model, small.plan)[-1]

    assert proof.what == "int8 rows in torch"
    assert proof.ok
    assert float(proof.detail.split()[2]) < 1e-6


def test_two_matrices_of_one_shape_that_are_exchanged_are_found(small: Export, copy: Path) -> None:
    q, o = small.plan.weights[f"{ATTENTION}.q_proj"], small.plan.weights[f"{ATTENTION}.o_proj"]
    assert isinstance(q, LowBit)
    assert isinstance(o, Sum)
    assert isinstance(o.terms[1], LowBit)
    first, second = layout.packed_for_product(q), layout.packed_for_product(o.terms[1])
    change(copy, first, b"\xa5" * len(first))
    change(copy, second, first)
    change(copy, b"\xa5" * len(first), second)

    assert list(wrong(copy, small)) == ["int8 rows in torch"]  # every part is in the file, bit for bit


def test_another_epsilon_and_a_rotation_of_a_far_position_are_found(small: Export, copy: Path) -> None:
    rope = small.model.architecture.rope
    assert rope is not None
    cosines, _ = rope.table(16, CONTEXT)
    other = cosines.clone()
    other[150, 3] += 1e-6
    change(copy, raw(cosines), raw(other))
    assert wrong(copy, small) == {"means, epsilon, rotations": "not in the file: cosines of 16 channels"}

    epsilon = small.model.architecture.norm_eps
    change(copy, raw(other), raw(cosines))
    change(copy, raw(torch.tensor([epsilon])), raw(torch.tensor([epsilon / 2])))
    assert wrong(copy, small) == {"means, epsilon, rotations": "not in the file: epsilon"}


def test_another_scale_of_attention_is_found(small: Export, copy: Path) -> None:
    change(copy, struct.pack("<d", 0.25), struct.pack("<d", 0.2501))

    assert list(wrong(copy, small)) == ["attention"]


def test_a_file_that_is_no_program_is_refused(small: Export, copy: Path) -> None:
    copy.write_bytes(copy.read_bytes()[:-5000])
    with pytest.raises(ArtifactError, match=r"model\.pte is no program that ExecuTorch can read"):
        wrong(copy, small)

    copy.write_bytes(b"no program at all")
    with pytest.raises(ArtifactError, match=r"model\.pte does not load in ExecuTorch"):
        TARGET.session(copy.parent)

    copy.unlink()
    with pytest.raises(ArtifactError, match=r"has no model\.pte; `pocket export` makes it"):
        wrong(copy, small)


def test_a_program_that_cannot_run_is_told(copy: Path) -> None:
    def claim_more(program: Any) -> None:
        for plan in program.execution_plan:
            if plan.name == "get_max_context_len":
                plan.values[plan.outputs[0]].val.int_val = 10 * CONTEXT

    rewrite(copy, claim_more)
    session = TARGET.session(copy.parent)
    session.step([1] * CONTEXT)

    with pytest.raises(ArtifactError, match="the program does not run in ExecuTorch"):
        session.step([1])


def rewrite(path: Path, edit: Callable[[Any], None]) -> None:
    """Change a file's program; its segments stay."""
    from targets.executorch_android import sharing  # after the target, which knows what importing ExecuTorch warns of

    data = path.read_bytes()
    header = sharing._get_extended_header(data)
    assert header is not None
    program = sharing._flatbuffer_to_program(data[: header.program_size])
    edit(program)
    segments = data[header.segment_base_offset :][: header.segment_data_size]
    path.write_bytes(sharing._with_program(program, segments))
