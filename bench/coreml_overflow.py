"""What float16 makes of a loud model: with an RMS norm that squares its input, and with the one that is written.

    python bench/coreml_overflow.py

The built-in model with its residual stream multiplied by a factor: embedding, attention and MLP give so much more, and
every norm takes the factor out again, so that in float32 it says what it said before. Beyond |x| = 255 a square is
infinite in float16; beyond 65504 so is the residual itself, which no norm mends. Prints a Markdown table: the largest
residual, and for each norm how far the logits are from torch's, and how many greedy tokens are torch's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from exporter import adapters, pipeline
from exporter.evaluate import relative_l2
from exporter.model import Model
from exporter.ops import listen
from exporter.session import TorchSession, greedy
from exporter.torch_ops import TorchOps
from exporter.weights import Dense
from targets.coreml_ios import TARGET
from targets.coreml_ios.backend import mb
from targets.coreml_ios.ops import CoreMLOps

FACTORS = (1, 4, 64, 256, 512)
CONTEXT, NEW_TOKENS = 64, 32
EMBEDDING, HEAD, LOUD = "model.embed_tokens", "lm_head", ("embed_tokens", "o_proj", "down_proj")


def main() -> None:
    """Print the table."""
    print("| residuals times | largest | squared: relative L2, same tokens | as written: relative L2, same tokens |")
    print("| --- | --- | --- | --- |")
    for factor in FACTORS:
        model = loud(pipeline.load("builtin"), factor)
        text = [0, *greedy(TorchSession(model), [0], NEW_TOKENS)]
        plain, written = found(model, text, plain_rms_norm), found(model, text, CoreMLOps.rms_norm)
        cells = " | ".join(f"{error:.1e}, {same} of {NEW_TOKENS}" for error, same in (plain, written))
        print(f"| {factor} | {largest_residual(model, text):,.0f} | {cells} |")


def loud(model: Model, factor: float) -> Model:
    """A model of the llama family whose residual stream is multiplied by a factor: it says the same."""
    head = model.weights.get(HEAD, model.weights[EMBEDDING])
    louder = {site: Dense(w.dense() * factor) for site, w in model.weights.items() if site.endswith(LOUD)}
    untied = replace(model.architecture, tied=False)
    return replace(model, architecture=untied, weights={**model.weights, **louder, HEAD: head})


def plain_rms_norm(self: CoreMLOps, x: Any, site: str, heads: int = 1) -> Any:
    """`x / sqrt(mean(x^2) + eps) * w` as it stands; for one head."""
    mean = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[-1], keep_dims=True)
    scale = mb.rsqrt(x=mean, epsilon=np.float16(self.model.architecture.norm_eps))
    return mb.mul(x=mb.mul(x=x, y=scale), y=self.tensor(f"{site}.weight"))


def found(model: Model, text: list[int], rms_norm: Callable[..., Any]) -> tuple[float, int]:
    """Relative L2 of the logits at the worst position (infinite: no numbers), and how many tokens are the text's."""
    right = TorchSession(model, torch.float64).step(text)
    with tempfile.TemporaryDirectory() as folder, patch.object(CoreMLOps, "rms_norm", rms_norm):
        TARGET.lower(model, TARGET.plan(model, CONTEXT), Path(folder))
        candidate = TARGET.session(Path(folder))
    error = float(relative_l2(right, candidate.step(text).double()).nan_to_num(torch.inf).max())
    same = [own == token for own, token in zip(greedy(candidate, text[:1], NEW_TOKENS), text[1:])]
    return error, [*same, False].index(False)


def largest_residual(model: Model, text: list[int]) -> float:
    """The largest number that a block gives, over a text."""
    ops, sizes = TorchOps(model), [0.0]
    listen(ops, lambda verb, value: sizes.append(float(value.abs().max()) if verb == "add" else 0.0))
    with torch.inference_mode():
        adapters.logits(adapters.find(model.architecture.family), ops, torch.tensor([text]))
    return max(sizes)


if __name__ == "__main__":
    main()
