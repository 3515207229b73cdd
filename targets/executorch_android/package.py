"""One .pte: `forward(tokens [1, T] int64, position [1] int64) -> logits [1, T, vocab]`, and what LLM runners ask.

Where nothing is cached it is `forward(tokens [1, T] int64)`, and every call a whole text. An encoder gives hidden
states.
"""

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


def longest_call(model: Model, context: int) -> int:
    """Tokens that one call takes at most; where nothing is cached, the whole text."""
    return min(context, LONGEST_CALL) if has_cache(model) else context


def has_cache(model: Model) -> bool:
    """Whether a call goes on from the tokens before it; if not, it takes a whole text."""
    return model.architecture.causal and model.architecture.config is None


class Network(nn.Module):
    """The traced module.

    Args:
        ops: Verbs of a model.
    """

    def __init__(self, ops: ExportOps) -> None:
        super().__init__()
        self.store = ops.store
        self._ops = ops
        self._adapter = adapters.find(ops.model.architecture.family)

    def forward(self, tokens: Tensor, position: Tensor | None = None) -> Tensor:
        """Logits after each token, or hidden states: tokens [1, T], position [1] to [1, T, outputs]."""
        self._ops.start(position, tokens.shape[1])
        return adapters.logits(self._adapter, self._ops, tokens)


def metadata(model: Model, context: int) -> dict[str, Any]:
    """Constant methods that ExecuTorch's LLM runners read."""
    architecture = model.architecture
    found: dict[str, Any] = {
        "get_max_seq_len": longest_call(model, context),
        "get_max_context_len": context,
        "get_vocab_size": architecture.vocab,
        "use_kv_cache": has_cache(model),
        "use_sdpa_with_kv_cache": has_cache(model),
        "enable_dynamic_shape": True,
    }
    if not has_cache(model):
        found["is_causal"] = architecture.causal
    if architecture.bos is not None:
        found["get_bos_id"] = architecture.bos
    if architecture.eos:
        found["get_eos_ids"] = list(architecture.eos)
    return found


def write(model: Model, plan: Plan, folder: Path) -> None:
    """Lower a model and write the .pte."""
    network = Network(ExportOps(replace(model, weights=plan.weights), plan.context, Uses(model).tied)).eval()
    with torch.no_grad(), noise.silenced():
        edge = to_edge_transform_and_lower(
            _traced(network, longest_call(model, plan.context), has_cache(model)),
            partitioner=[XnnpackPartitioner()],
            constant_methods=metadata(model, plan.context),
        )
        file = edge.to_executorch().buffer
        (folder / FILE).write_bytes(sharing.shared(file))


def _traced(network: Network, longest: int, has_cache: bool) -> torch.export.ExportedProgram:
    """The network at any number of tokens up to `longest`; with a cache, from any position."""
    tokens = torch.zeros(1, min(3, longest), dtype=torch.int64)
    example: tuple[Tensor, ...] = (tokens, torch.zeros(1, dtype=torch.int64)) if has_cache else (tokens,)
    network(*example)  # an eager call makes the buffers
    sizes: dict[str, Any] = {"tokens": {1: torch.export.Dim("tokens", min=1, max=longest)}}
    sizes |= {"position": None} if has_cache else {}
    return torch.export.export(network, example, dynamic_shapes=sizes, strict=False)
