"""A program that is right is proved by running it; one that is wrong gets the name of its first wrong operation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.plugins import Finding
from targets.coreml_ios import proof
from tests.models import LLAMA, low_bit, random_model, sparse
from tests.targets.coreml_ios.conftest import CONTEXT, Lowered, lower
from tests.targets.coreml_ios.damage import another_place, damage, edit, last_bit, maker, one_more

DEPARTS = "the first operation whose value departs: "
EMBEDDING, K, V, GATE = (f"model.{name}" for name in (
    "embed_tokens", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj", "layers.0.mlp.gate_proj"))  # fmt: skip
ROW = 2001  # of a token that is not in the text that is run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """One layer, dense and 4-bit and sparse."""
    model = random_model(replace(LLAMA, vocab=3000, positions=CONTEXT, tied=False), optional=())
    shapes = {site: weight.shape for site, weight in model.weights.items()}
    small = {site: low_bit(shapes[site], 4, 32) for site in (EMBEDDING, GATE)}
    return lower(model.with_weights({**small, V: sparse(shapes[V], 2, 4)}), tmp_path_factory.mktemp("whole"))


@pytest.fixture
def made(whole: Lowered, tmp_path: Path) -> Lowered:
    """A copy that may be damaged."""
    shutil.copytree(whole.folder, tmp_path / "copy")
    return Lowered(whole.model, whole.plan, tmp_path / "copy")


def execution(made: Lowered) -> Finding:
    """What was found by running the program."""
    findings = proof.prove(made.folder, made.model, made.plan)
    return next(finding for finding in findings if finding.what == proof.EXECUTION)


def test_a_program_that_is_right_is_torchs_but_for_the_last_bits_of_float32(whole: Lowered) -> None:
    found = execution(whole)

    assert found.ok, found.detail
    assert "from torch at most, bound 1e-05; rounding to float16 moves the last by " in found.detail


def test_the_last_bit_of_a_scale_is_found_by_the_operation_that_uses_it(made: Lowered) -> None:
    damage(made.package, GATE, "scale", last_bit)
    found = execution(made)

    assert not found.ok
    assert found.detail.endswith(f"{DEPARTS}linear linear_5, on the way to linear {GATE}")


@pytest.mark.parametrize(
    ("how", "says"), [(another_place, "is a relative L2 of"), (one_more, "kept values for 1025 ones in the mask")]
)
def test_a_bit_of_a_mask_is_found_by_the_operation_that_uses_it(
    how: Callable[[bytearray], None], says: str, made: Lowered
) -> None:
    damage(made.package, V, "mask", how)
    found = execution(made)

    assert not found.ok
    assert says in found.detail
    assert found.detail.endswith(f"{DEPARTS}linear linear_2, on the way to linear {V}")


def test_a_row_that_the_text_does_not_read_is_read_where_it_is_wrong(made: Lowered) -> None:
    def of_the_row(part: bytearray) -> None:
        part[2 * 2 * ROW] ^= 1  # two scales a row

    damage(made.package, EMBEDDING, "scale", of_the_row)
    found = execution(made)

    assert ROW not in [index * 3000 // CONTEXT for index in range(CONTEXT)]
    assert not found.ok
    assert found.detail.endswith(f", on the way to embedding {EMBEDDING}")


def one_activation(operations: Any) -> None:
    maker(operations, "silu_0").type = "relu"


def one_number(operations: Any) -> None:
    maker(operations, "real_div_1_x_0").attributes["val"].immediateValue.tensor.bytes.values = b"\x00\x3c"


def one_axis(operations: Any) -> None:
    maker(operations, "reduce_mean_1_axes_0").attributes["val"].immediateValue.tensor.ints.values[0] = 1


def one_flag(operations: Any) -> None:
    maker(operations, "slice_by_index_2_end_mask_0").attributes["val"].immediateValue.tensor.bools.values[3] = True


@pytest.mark.parametrize(
    ("how", "operation", "verb"),
    [
        (one_activation, "relu silu_0", "activation silu"),
        (one_number, "real_div real_div_1", "rms_norm model.layers.0.input_layernorm"),
        (one_axis, "reduce_mean reduce_mean_1", "rms_norm model.layers.0.post_attention_layernorm"),
        (one_flag, "slice_by_index slice_by_index_2", "cached_attention"),
    ],
)
def test_an_attribute_is_found_by_its_operation(
    how: Callable[[Any], None], operation: str, verb: str, made: Lowered
) -> None:
    edit(made.package, how)
    found = execution(made)

    assert not found.ok
    assert found.detail.endswith(f"{DEPARTS}{operation}, on the way to {verb}")


def test_a_program_that_cannot_be_opened_says_why(made: Lowered) -> None:
    def misspelt(operations: Any) -> None:
        maker(operations, "silu_0").type = "sile"

    edit(made.package, misspelt)
    found = execution(made)

    assert not found.ok
    assert found.detail == "operation 'sile' (sile silu_0) is not among those that the executor knows"
