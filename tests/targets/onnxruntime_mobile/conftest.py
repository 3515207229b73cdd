"""Small random decoders, a plain rounding, and folders made of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporter.model import Architecture, Layer, Model, Rope
from exporter.plugins import Plan
from exporter.weights import LowBit
from targets.onnxruntime_mobile import TARGET
from tests.models import random_model

ROPE = Rope(10000.0)
EVEN = (Layer(4, 2, 16, 16, 96), Layer(4, 2, 16, 16, 96))


def a_decoder(
    layers=EVEN, family="llama", hidden=64, vocab=80, positions=48, tied=True, rope=ROPE, activation="silu",
    extras=("norm.weight", "bias"), seed=0,
) -> Model:  # fmt: skip
    """A decoder of random weights; `extras` are the endings of optional tensors that it has."""
    rope = rope if family == "llama" else None
    architecture = Architecture(family, vocab, hidden, positions, tuple(layers), activation, 1e-5, rope, tied, 1, (2,))
    return random_model(architecture, seed, tuple(extras) or ("nothing",))


def rounded(weight: torch.Tensor, bits=4, group=32, kind="symmetric") -> LowBit:
    """Round to nearest; `kind` says which zero points: symmetric, whole, single, half, fractional."""
    out, columns = weight.shape
    groups, top = -(-columns // group), 2**bits - 1
    blocks = torch.nn.functional.pad(weight, (0, groups * group - columns)).view(out, groups, group)
    low, high = blocks.amin(2), blocks.amax(2)
    scales = ((high - low) / top).clamp_min(1e-6)
    middle = 2.0 ** (bits - 1)
    match kind:
        case "symmetric" | "single" | "half":
            zeros = torch.tensor([[middle - {"symmetric": 0.0, "single": 1.0, "half": 0.5}[kind]]])
            scales = blocks.abs().amax(2).clamp_min(1e-6) / (middle - 0.5)
        case "whole":
            zeros = (-low / scales).round().clamp(0, top)
        case _:
            zeros = -low / scales + 0.25
    spread = zeros if zeros.shape == (1, 1) else zeros.repeat_interleave(group, 1)[:, :columns]
    codes = weight / scales.repeat_interleave(group, 1)[:, :columns] + spread
    return LowBit(codes.round().clamp(0, top).to(torch.uint8), scales, zeros, bits, group)


@pytest.fixture
def decoder() -> Callable[..., Model]:
    return a_decoder


@pytest.fixture
def to_nearest() -> Callable[..., LowBit]:
    return rounded


@pytest.fixture
def all_rounded() -> Callable[..., Model]:
    """A model with every matrix rounded, the embedding included."""

    def round_all(model: Model, **settings) -> Model:
        return model.with_weights({site: rounded(w.dense(), **settings) for site, w in model.weights.items()})

    return round_all


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., tuple[Path, Plan]]:
    """Write a model's folder, as the pipeline does: the tokenizer first."""
    count = iter(range(1000))

    def export(model: Model, context: int = 48) -> tuple[Path, Plan]:
        folder = tmp_path / f"artifact{next(count)}"
        folder.mkdir()
        for name, content in model.files.items():
            (folder / name).write_bytes(content)
        plan = TARGET.plan(model, context)
        TARGET.lower(model, plan, folder)
        return folder, plan

    return export


@pytest.fixture
def distance() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """The largest relative L2 error of a position's logits."""

    def largest(found: torch.Tensor, wanted: torch.Tensor) -> float:
        assert found.shape == wanted.shape
        return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())

    return largest
