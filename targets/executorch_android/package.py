"""One .pte: `forward(tokens [1, T] int64, position [1] int64) -> logits [1, T, vocab]`, and what LLM runners ask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn

from exporter import adapters
from exporter.model import Model
from exporter.plugins import Plan
from targets.executorch_android import noise, sharing
from targets.executorch_android.ops import ExportOps
from targets.executorch_android.uses import Uses

FILE = "model.pte"
LONGEST_CALL = 128  # tokens a call takes; runners split longer prompts, and memory is planned for this many


def longest_call(context: int) -> int:
    """Tokens that one call takes at most."""
    return min(context, LONGEST_CALL)


class Decoder(nn.Module):
    """The traced module.

    Args:
        ops: Verbs of a model.
    """

    def __init__(self, ops: ExportOps) -> None:
        super().__init__()
        self.store = ops.store
        self._ops = ops
        self._adapter = adapters.find(ops.model.architecture.family)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits after each token: tokens [1, T], position [1] to [1, T, vocab]."""
        self._ops.start(position, tokens.shape[1])
        return adapters.logits(self._adapter, self._ops, tokens)


def metadata(model: Model, context: int) -> dict[str, Any]:
    """Constant methods that ExecuTorch's LLM runners read."""
    architecture = model.architecture
    found: dict[str, Any] = {
        "get_max_seq_len": longest_call(context),
        "get_max_context_len": context,
        "get_vocab_size": architecture.vocab,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    if architecture.bos is not None:
        found["get_bos_id"] = architecture.bos
    if architecture.eos:
        found["get_eos_ids"] = list(architecture.eos)
    return found


def write(model: Model, plan: Plan, folder: Path) -> None:
    """Lower a model and write the .pte."""
    decoder = Decoder(ExportOps(replace(model, weights=plan.weights), plan.context, Uses(model).tied)).eval()
    with torch.no_grad(), noise.silenced():
        edge = to_edge_transform_and_lower(
            _traced(decoder, longest_call(plan.context)),
            partitioner=[XnnpackPartitioner()],
            constant_methods=metadata(model, plan.context),
        )
        file = edge.to_executorch().buffer
        (folder / FILE).write_bytes(sharing.shared(file))


def _traced(decoder: Decoder, longest: int) -> torch.export.ExportedProgram:
    """The decoder at any number of tokens up to `longest`, from any position."""
    example = torch.zeros(1, min(3, longest), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    decoder(*example)  # an eager call makes the buffers
    sizes = {"tokens": {1: torch.export.Dim("tokens", min=1, max=longest)}, "position": None}
    return torch.export.export(decoder, example, dynamic_shapes=sizes, strict=False)
