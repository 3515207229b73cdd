"""Exports that several tests look at: lowering costs more than everything else here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from exporter import checkpoint
from exporter.model import Layer, Model
from exporter.plugins import Plan
from targets.executorch_android import TARGET
from tests.models import LLAMA, low_bit, random_model

CONTEXT = 160  # longer than one call takes


@dataclass(frozen=True)
class Export:
    """A lowered model."""

    model: Model
    plan: Plan
    folder: Path


def export(model: Model, folder: Path, context: int) -> Export:
    """Lower a model into a new folder, its tokenizer beside it, as the pipeline does."""
    folder.mkdir()
    for name, content in model.files.items():
        (folder / name).write_bytes(content)
    plan = TARGET.plan(model, context)
    TARGET.lower(model, plan, folder)
    return Export(model, plan, folder)


@pytest.fixture(scope="session")
def tales(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """stories260K as it was published."""
    return export(checkpoint.load(stories), tmp_path_factory.mktemp("tales") / "out", 512)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """One layer with every kind of stored codes: 4-bit groups, 4 and 8 bits a row, two digits, a tied 4-bit table."""
    model = random_model(replace(LLAMA, positions=CONTEXT, layers=(Layer(4, 2, 16, 16, 80),)), optional=())
    prefix = "model.layers.0"
    codes = {
        "model.embed_tokens": low_bit((96, 64), 4, 32, seed=0),
        f"{prefix}.self_attn.q_proj": low_bit((64, 64), 4, 32, seed=1),
        f"{prefix}.self_attn.k_proj": low_bit((32, 64), 8, 64, seed=2),
        f"{prefix}.self_attn.v_proj": low_bit((32, 64), 4, 64, seed=3),
        f"{prefix}.self_attn.o_proj": low_bit((64, 64), 7, 32, seed=4),
        f"{prefix}.mlp.down_proj": low_bit((64, 80), 4, 32, seed=5),  # the last group has 16 columns
    }
    return export(model.with_weights(codes), tmp_path_factory.mktemp("small") / "out", CONTEXT)
