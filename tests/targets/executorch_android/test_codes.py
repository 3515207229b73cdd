"""Codes and scales: what crosses bit for bit, what runs, what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporter import adapters
from exporter.errors import TargetError
from exporter.ops import Leaf
from exporter.session import TorchSession
from exporter.torch_ops import TorchOps
from exporter.weights import Dense, LowBit, Sum
from targets.executorch_android import TARGET, layout
from tests.models import LLAMA, low_bit, random_model, sparse
from tests.targets.executorch_android.conftest import CONTEXT, Export

TOKENS = torch.randint(0, 96, (140,), generator=torch.Generator().manual_seed(3)).tolist()
ROUNDING_FLIPS = 2e-3  # a value that lies on the border of two int8 steps may fall on either side


class RoundedRows(TorchOps):
    """A slow oracle: float32 torch that rounds each linear's input to int8 as XNNPACK does, and block scales."""

    def leaf(self, x: Tensor, weight: Leaf, site: str) -> Tensor:
        if not isinstance(weight, LowBit):
            return super().leaf(x, weight, site)
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        step = ((high - low) / 255).clamp(min=1e-12)
        zero = (-128 - low / step).round()
        rows = ((x / step).round() + zero).clamp(-128, 127).sub(zero) * step
        scales = weight.scales if layout.is_row_wise(weight) else weight.scales.to(torch.bfloat16).float()
        return F.linear(rows, replace(weight, scales=scales).dense())


def relative(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def test_codes_run_within_the_budget_at_every_step_however_tokens_come(small: Export) -> None:
    expected = TorchSession(small.model, torch.float64).step(TOKENS)
    budget = TARGET.budget(small.model, small.plan).relative_l2
    session = TARGET.session(small.folder)
    for chunks in ([140], [1] * 140, [100, 3, 37]):
        session.reset()
        pieces = torch.tensor(TOKENS).split(chunks)
        found = torch.cat([session.step(piece.tolist()).double() for piece in pieces])
        assert float(relative(found, expected).max()) <= budget


def test_the_only_difference_is_int8_rows_and_bfloat16_scales(small: Export) -> None:
    stored = replace(small.model, weights=small.plan.weights)
    ops = RoundedRows(stored)
    with torch.inference_mode():
        expected = adapters.logits(adapters.find("llama"), ops, torch.tensor([TOKENS]))[0]

    found = TARGET.session(small.folder).step(TOKENS)

    assert float(relative(found, expected).median()) < ROUNDING_FLIPS


def test_a_session_begins_anew_after_reset_though_its_caches_stay(small: Export) -> None:
    session = TARGET.session(small.folder)
    first = session.step(TOKENS[:5])
    session.step(TOKENS[5:120])
    session.reset()

    assert torch.equal(session.step(TOKENS[:5]), first)


def test_tokens_beyond_the_context_are_refused(small: Export) -> None:
    session = TARGET.session(small.folder)
    session.step(TOKENS)

    with pytest.raises(TargetError, match="180 tokens do not fit the context of 160"):
        session.step(TOKENS[:40])


def test_a_folder_without_a_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"has no model\.pte"):
        TARGET.session(tmp_path)


def test_every_part_is_found_in_the_file_and_the_table_once(small: Export) -> None:
    found = TARGET.inspect(small.folder, small.model, small.plan)

    assert [f"{f.what}: {f.detail}" for f in found if not f.ok] == []
    table = small.plan.weights["model.embed_tokens"]
    assert isinstance(table, LowBit)
    assert (small.folder / "model.pte").read_bytes().count(layout.packed_for_product(table)) == 1


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_one_changed_part_is_found_and_named(small: Export, part: str) -> None:
    site = "model.layers.0.self_attn.q_proj"
    weight = small.model.weights[site]
    assert isinstance(weight, LowBit)
    changed = getattr(weight, part).clone()
    changed[3, 1] = changed[3, 1] / 2 if part == "scales" else 15 - changed[3, 1]
    other = small.model.with_weights({site: replace(weight, **{part: changed})})

    wrong = [f for f in TARGET.inspect(small.folder, other, TARGET.plan(other, CONTEXT)) if not f.ok]

    assert [(f.what, f.detail) for f in wrong] == [(site, f"not in the file: {part}")]


def test_another_eos_token_is_found(small: Export) -> None:
    other = replace(small.model, architecture=replace(small.model.architecture, eos=(2, 7)))

    wrong = [f for f in TARGET.inspect(small.folder, other, small.plan) if not f.ok]

    assert [(f.what, f.detail) for f in wrong] == [("constant methods", "wrong or missing: get_eos_ids")]


def test_a_planned_linear_that_is_not_delegated_with_int8_rows_is_found(small: Export) -> None:
    site = "model.layers.0.mlp.up_proj"  # float32 in the file
    other = small.model.with_weights({site: low_bit((80, 64), 4, 32, seed=9)})

    wrong = {f.what for f in TARGET.inspect(small.folder, other, TARGET.plan(other, CONTEXT)) if not f.ok}

    assert wrong == {site, "linears with codes in XNNPACK"}


def test_a_damaged_file_is_found(small: Export, tmp_path: Path) -> None:
    shutil.copytree(small.folder, tmp_path / "out")
    weight = small.plan.weights["model.layers.0.self_attn.q_proj"]
    assert isinstance(weight, LowBit)
    data = bytearray((tmp_path / "out/model.pte").read_bytes())
    data[data.find(layout.packed_for_product(weight)) + 7] ^= 1
    (tmp_path / "out/model.pte").write_bytes(data)

    wrong = [f.what for f in TARGET.inspect(tmp_path / "out", small.model, small.plan) if not f.ok]

    assert wrong == ["model.layers.0.self_attn.q_proj"]


def test_decisions_say_what_is_done_and_why(small: Export) -> None:
    said = {decision.site.removeprefix("model.layers.0."): decision for decision in small.plan.decisions}

    assert said["self_attn.o_proj"].reason.startswith("XNNPACK has these codes only in groups of 4 bits")
    assert not said["self_attn.o_proj"].native
    assert said["self_attn.o_proj"].bytes == 64 * 64 + 2 * 2 * 64 * 2  # two digits, two block scales each
    assert "codes are stored once" in said["model.embed_tokens"].reason
    assert said["mlp.down_proj"].bytes == 64 * 96 // 2 + 64 * 3 * 2  # 80 columns padded to three groups of 32


def test_scales_that_bfloat16_holds_cross_bit_for_bit() -> None:
    exact = low_bit((32, 64), 4, 32)
    exact = replace(exact, scales=exact.scales.to(torch.bfloat16).float())
    model = random_model(replace(LLAMA, tied=False), optional=())
    site = "model.layers.0.self_attn.k_proj"

    reasons = {}
    for name, weight in (("exact", exact), ("rounded", low_bit((32, 64), 4, 32))):
        plan = TARGET.plan(model.with_weights({site: weight}), 32)
        reasons[name] = next(decision.reason for decision in plan.decisions if decision.site == site)

    assert reasons["exact"] == "runs as it is"
    assert "rounded to bfloat16" in reasons["rounded"]


@given(bits=st.integers(1, 8), group=st.sampled_from([16, 32, 64, 96]), whole=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_digits_are_the_same_matrix(bits: int, group: int, whole: bool, seed: int) -> None:
    weight = low_bit((8, 96), bits, group, symmetric=not whole, seed=seed)

    digits = layout.in_digits(weight)

    assert torch.equal(digits.dense(torch.float64), weight.dense(torch.float64))
    if digits is not weight:
        assert isinstance(digits, Sum)
        assert all(not isinstance(layout.price_product(term), str) for term in digits.terms)


@given(bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_lookup_packing_loses_nothing(bits: int, seed: int) -> None:
    weight = low_bit((5, 16), bits, 16, seed=seed)
    packed = layout.packed_for_lookup(weight).to(torch.int16)

    if bits == 8:
        codes = packed + 128
    else:
        shifts = [4, 0] if bits == 4 else [0, 2, 4, 6]
        codes = torch.stack([packed >> shift & 2**bits - 1 for shift in shifts], dim=-1).flatten(1)
    assert torch.equal(codes.to(torch.uint8), weight.codes)


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (low_bit((8, 64), 3, 32), "XNNPACK has no 3-bit weights; widths that it does: 4, 8"),
        (low_bit((8, 64), 4, 32, symmetric=False), "XNNPACK has no zero points of weights"),
        (low_bit((8, 64), 8, 32), "XNNPACK takes 8 bits with one scale a row only"),
        (low_bit((8, 64), 4, 16), "XNNPACK takes groups of a multiple of 32 columns only, not 16"),
        (sparse((8, 64), 2, 4), "XNNPACK has no n:m kernel"),
        (Sum((Dense(torch.ones(2, 2)),)), "not a leaf"),
    ],
)
def test_a_leaf_that_xnnpack_lacks_is_refused_with_choices(weight: LowBit, why: str) -> None:
    assert layout.price_product(weight) == why


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (low_bit((8, 64), 3, 32), "there is no 3-bit lookup; widths that there are: 2, 4, 8"),
        (low_bit((8, 48), 4, 32), "a lookup takes equal groups only, not 32 of 48 columns"),
        (low_bit((8, 63), 4, 63), "a lookup takes whole bytes only, not 63 columns of 4 bits"),
        (sparse((8, 64), 2, 4), "there is no n:m lookup"),
        (Sum((Dense(torch.ones(2, 2)),)), "not a leaf"),
    ],
)
def test_a_lookup_that_does_not_exist_is_refused_with_choices(weight: LowBit, why: str) -> None:
    assert layout.price_lookup(weight) == why


@pytest.mark.parametrize("context", [1, 65])
def test_a_context_that_the_model_does_not_have_is_refused(context: int) -> None:
    with pytest.raises(TargetError, match=rf"a context of {context} tokens is not possible; this model takes 2 to 64"):
        TARGET.plan(random_model(LLAMA), context)
