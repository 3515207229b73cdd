"""The files of an exported folder: model.onnx, model.onnx.data, and of a decoder genai_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter import adapters
from exporter.model import Architecture, Model
from exporter.plugins import Plan
from exporter.weights import LowBit, nodes
from targets.onnxruntime_mobile.constants import DATA, MODEL
from targets.onnxruntime_mobile.ops import IR_VERSION, OPSET, GraphOps, cache_width

GENAI = "genai_config.json"
LEAST = {4: "1.22.0", 8: "1.24.3", 2: "1.29.0"}  # bits: first release with right and fast kernels on x86 and ARM
LEAST_DENSE = "1.22.0"  # the oldest release that any graph of ours was run in
LEAST_TABLE = "1.23.2"  # GatherBlockQuantized takes uint8 codes; 1.22.0 refuses them
LEAST_TABLE_ZEROS = "1.27.0"  # and reads zero points right; 1.25.0 and before shift them where a row has odd groups


def build(model: Model, plan: Plan) -> tuple[GraphOps, ir.Model]:
    """Write a model down as a graph; reads shapes only."""
    ops = GraphOps(model.with_weights(plan.weights), plan.context)
    adapter = adapters.find(model.architecture.family)
    return ops, ops.finish(adapters.logits(adapter, ops, ops.ids))


def write(model: Model, plan: Plan, folder: Path) -> None:
    """Write a folder's model files."""
    ops, graph = build(model, plan)
    ops.constants.write(folder / DATA)
    (folder / MODEL).write_bytes(serialized(graph))
    if model.architecture.causal:
        (folder / GENAI).write_text(genai_config(model.architecture, plan.context))


def serialized(graph: ir.Model) -> bytes:
    """model.onnx: equal graphs are equal bytes."""
    return bytes(ir.to_proto(graph).SerializeToString(deterministic=True))


def looked_up(model: Model) -> frozenset[str]:
    """Sites whose rows are looked up by token or position."""
    lookups = _Lookups(model, 1)
    adapters.find(model.architecture.family).embed(lookups, lookups.ids)
    return frozenset(lookups.sites)


class _Lookups(GraphOps):
    """Notes which sites an adapter looks rows up in."""

    def __init__(self, model: Model, context: int) -> None:
        super().__init__(model, context)
        self.sites: set[str] = set()

    def embedding(self, ids: ir.Value, site: str) -> ir.Value:
        self.sites.add(site)
        return ids


def requires(model: Model, plan: Plan) -> dict[str, str]:
    """Least versions for a folder of this plan."""
    tables = looked_up(model)
    versions = {LEAST_DENSE}
    for site, weight in plan.weights.items():
        low_bit = [node for node in nodes(weight) if isinstance(node, LowBit)]
        versions |= {LEAST[node.bits] for node in low_bit}
        if site in tables:
            versions |= {LEAST_TABLE if node.is_symmetric else LEAST_TABLE_ZEROS for node in low_bit}
    least = max(versions, key=lambda version: tuple(int(part) for part in version.split(".")))
    return {"onnxruntime": least, "onnx opset": str(OPSET), "onnx ir": str(IR_VERSION)}


def genai_config(architecture: Architecture, context: int) -> str:
    """What onnxruntime-genai reads beside the tokenizer.

    Its type `llama` stands for any decoder with these names. Head counts and size are the first layer's; where layers
    differ it takes each cache's shape from the graph.
    """
    layer, eos = architecture.layers[0], list(architecture.eos)
    decoder: dict[str, Any] = {
        "filename": MODEL, "head_size": cache_width(layer), "hidden_size": architecture.hidden,
        "num_attention_heads": layer.heads, "num_key_value_heads": layer.kv_heads,
        "num_hidden_layers": len(architecture.layers), "session_options": {"provider_options": []},
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask",
                   "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value"},
    }  # fmt: skip
    model = {"type": "llama", "vocab_size": architecture.vocab, "context_length": context, "decoder": decoder,
             "pad_token_id": eos[0] if eos else 0}  # fmt: skip
    if architecture.bos is not None:
        model["bos_token_id"] = architecture.bos
    model["eos_token_id"] = eos
    search = {"max_length": context, "min_length": 0, "do_sample": False, "num_beams": 1,
              "past_present_share_buffer": True}  # fmt: skip
    return json.dumps({"model": model, "search": search}, indent=1, sort_keys=True) + "\n"
