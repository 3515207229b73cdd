"""The same graph with float activations against torch: proves that every code, scale and zero point is in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from exporter import adapters
from exporter.model import Model
from exporter.plugins import Finding, Plan
from exporter.torch_ops import TorchOps
from exporter.weights import LowBit
from targets.onnxruntime_mobile import package, planning, runner

TOKENS = 8  # enough for every matrix and the cache; the exact kernels are slow
WHAT = "float32 activations"


def exactness(folder: Path, model: Model, plan: Plan) -> list[Finding]:
    """Compare logits, prefill and one decode step, with rounding of activations off; nothing where none are rounded.

    An encoder's hidden states are those of the whole text at once.
    """
    products = package.build(model, plan)[0].products
    if not any(isinstance(leaf, LowBit) for leaf in products):
        return []
    tokens = _spread(model.architecture.vocab, min(TOKENS, plan.context))
    session = runner.exact_session(folder)
    cut = len(tokens) - 1 if model.architecture.causal else 0
    pieces = [piece for piece in (tokens[:cut], tokens[cut:]) if piece]
    found = torch.cat([session.step(piece) for piece in pieces])
    wanted = _logits(model, tokens)
    error, bound = float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()), planning.float_error(products)
    return [Finding(WHAT, error <= bound, f"relative L2 {error:.1e} from torch, at most {bound:.1e}")]


def _spread(vocab: int, count: int) -> list[int]:
    """Token ids all over the vocabulary."""
    return [index * vocab // count for index in range(count)]


def _logits(model: Model, tokens: Sequence[int]) -> torch.Tensor:
    adapter = adapters.find(model.architecture.family)
    with torch.inference_mode():
        return adapters.logits(adapter, TorchOps(model), torch.tensor([list(tokens)]))[0]
