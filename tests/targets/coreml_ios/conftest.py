"""Small models and the packages that are made of them, each written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporter import adapters, checkpoint
from exporter.model import Layer, Model
from exporter.plugins import Plan
from exporter.weights import LowBit
from targets.coreml_ios import TARGET
from targets.coreml_ios.reference import StoredOps
from tests.models import BERT, LLAMA, OPT, random_model, trees

CONTEXT = 32


@dataclass(frozen=True)
class Lowered:
    """A model, what was decided for it, and the folder that was written."""

    model: Model
    plan: Plan
    folder: Path

    @property
    def package(self) -> Path:
        return self.folder / "model.mlpackage"

    @property
    def weights(self) -> Path:
        return self.package / "Data/com.apple.CoreML/weights/weight.bin"

    @property
    def program(self) -> Path:
        return self.package / "Data/com.apple.CoreML/model.mlmodel"


def lower(model: Model, folder: Path, context: int = CONTEXT) -> Lowered:
    plan = TARGET.plan(model, context)
    TARGET.lower(model, plan, folder)
    return Lowered(model, plan, folder)


class StoredSession:
    """Torch on the numbers that a package stores: what its program must say."""

    def __init__(self, made: Lowered, dtype: torch.dtype = torch.float32) -> None:
        model = made.model.with_weights(made.plan.weights)
        self._ops, self._adapter = StoredOps(model, dtype), adapters.find(model.architecture.family)
        self.context, self.causal = made.plan.context, model.architecture.causal

    def reset(self) -> None:
        self._ops.reset()

    def step(self, tokens: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            self._ops.begin()
            return adapters.logits(self._adapter, self._ops, torch.tensor([list(tokens)]))[0]


def to_nearest(weight: Tensor, bits: int = 4, group: int = 32) -> LowBit:
    """Symmetric round to nearest, with scales that float16 holds."""
    out, columns = weight.shape
    groups, middle = -(-columns // group), 2 ** (bits - 1)
    blocks = torch.nn.functional.pad(weight.float(), (0, groups * group - columns)).view(out, groups, group)
    scales = (blocks.abs().amax(2) / (middle - 0.5)).half().float().clamp_min(2.0**-14)
    codes = (blocks / scales[..., None]).round().clamp(-middle, middle - 1) + middle
    codes = codes.view(out, -1)[:, :columns].to(torch.uint8).contiguous()
    return LowBit(codes, scales, torch.full((1, 1), float(middle)), bits, group)


def rounded(model: Model, bits: int = 4, group: int = 32) -> Model:
    return model.with_weights({site: to_nearest(w.dense(), bits, group) for site, w in model.weights.items()})


def unequal() -> Model:
    """A model of different widths in every layer, values narrower than keys, rows of no whole group."""
    layers = (Layer(4, 2, 16, 8, 44), Layer(4, 4, 16, 16, 64), Layer(2, 1, 8, 8, 20))
    return random_model(replace(LLAMA, layers=layers, positions=CONTEXT), optional=())


def forest() -> Model:
    """Every tree at a site of its own, that of values among them fractional in its zero points."""
    layer = Layer(4, 2, 16, 16, 96)
    model = random_model(replace(LLAMA, layers=(layer,) * 3, positions=CONTEXT), optional=())
    sites = [site for site in model.weights if "layers" in site]
    names = list(trees((64, 64)))
    placed = {s: trees(model.weights[s].shape)[names[i % len(names)]] for i, s in enumerate(sites)}
    return model.with_weights(placed)


def bert() -> Model:
    """An encoder of two layers, the second one pruned."""
    return random_model(replace(BERT, layers=(Layer(4, 4, 16, 16, 96), Layer(4, 4, 16, 8, 44)), positions=CONTEXT))


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lowered]:
    """A package by name, written when first asked for. Do not change it: copy it."""
    shared = Path(__file__).resolve().parents[3].parent / "shared/models/stories260K"
    done: dict[str, Lowered] = {}

    def make(name: str) -> Model:
        if name.startswith("stories"):
            if not shared.exists():
                pytest.skip(f"{shared.name} is missing: put the shared folder beside the repository to run this test")
            model = checkpoint.load(shared)
            return rounded(model) if name == "stories in 4 bits" else model
        return {"unequal": unequal, "unequal in 4 bits": lambda: rounded(unequal()), "forest": forest,
                "opt": lambda: random_model(OPT), "bert": bert,
                "bert in 4 bits": lambda: rounded(bert())}[name]()  # fmt: skip

    def get(name: str) -> Lowered:
        if name not in done:
            context = 512 if name.startswith("stories") else CONTEXT
            done[name] = lower(make(name), tmp_path_factory.mktemp(name.replace(" ", "_")), context)
        return done[name]

    return get
