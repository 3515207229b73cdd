"""OPT: learned positions, layer norms before each part, biases everywhere, an MLP without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from exporter.adapters import Shapes, attention_spec, equal_layers, layer_norm_shapes, layer_shapes
from exporter.adapters.config import Fields
from exporter.errors import ArchitectureError
from exporter.model import Architecture, Layer
from exporter.ops import AttentionSites, MlpSites, Ops

T = TypeVar("T")

ROOT = "model.decoder"
EMBEDDING, POSITIONS = f"{ROOT}.embed_tokens", f"{ROOT}.embed_positions"
NORM, HEAD = f"{ROOT}.final_layer_norm", "lm_head"
POSITION_OFFSET = 2  # the first two rows of the position table are never used (a habit of its training code)


def embed(ops: Ops[T], ids: T) -> T:
    """Token ids to the residual stream."""
    return ops.add(ops.embedding(ids, EMBEDDING), ops.position_embedding(ids, POSITIONS, POSITION_OFFSET))


def block(ops: Ops[T], x: T, layer: int) -> T:
    """One decoder layer: x + attention(norm x), then x + mlp(norm x)."""
    prefix = f"{ROOT}.layers.{layer}"
    sites, spec = attention_sites(layer), attention_spec(ops.model.architecture, layer)
    attended = ops.attention(ops.layer_norm(x, f"{prefix}.self_attn_layer_norm"), sites, layer, spec)
    x = ops.add(x, attended)
    normed = ops.layer_norm(x, f"{prefix}.final_layer_norm")
    return ops.add(x, ops.mlp(normed, mlp_sites(layer), ops.model.architecture.activation))


def head(ops: Ops[T], x: T) -> T:
    """The residual stream to logits, through the embedding where it is tied."""
    return ops.linear(ops.layer_norm(x, NORM), EMBEDDING if ops.model.architecture.tied else HEAD)


def attention_sites(layer: int) -> AttentionSites:
    """Sites of one layer's attention."""
    prefix = f"{ROOT}.layers.{layer}.self_attn"
    return AttentionSites(f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj", f"{prefix}.out_proj")


def mlp_sites(layer: int) -> MlpSites:
    """Sites of one layer's MLP."""
    return MlpSites(None, f"{ROOT}.layers.{layer}.fc1", f"{ROOT}.layers.{layer}.fc2")


def shapes(architecture: Architecture) -> Shapes:
    """The matrices and vectors of such a model."""
    hidden = architecture.hidden
    weights = {EMBEDDING: (architecture.vocab, hidden), POSITIONS: (architecture.positions + POSITION_OFFSET, hidden)}
    if not architecture.tied:
        weights[HEAD] = (architecture.vocab, hidden)
    tensors = layer_norm_shapes(NORM, hidden)
    optional: dict[str, int] = {}
    for index, w in enumerate(architecture.layers):
        matrices, biases = layer_shapes(w, hidden, attention_sites(index), mlp_sites(index))
        weights |= matrices
        optional |= biases
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            tensors |= layer_norm_shapes(f"{ROOT}.layers.{index}.{norm}", hidden)
    return Shapes(weights, tensors, optional)


def stored(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """A checkpoint's tensor; some leave out the leading `model.` of their names."""
    return (f"model.{name}" if name.startswith("decoder.") else name), tensor


def read(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes."""
    fields = Fields(config)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden % heads:
        raise ArchitectureError(f"config.json: hidden size {hidden} is no multiple of {heads} attention heads")
    fields.only("word_embed_proj_dim", hidden)
    fields.only("do_layer_norm_before", True)
    fields.only("_remove_final_layer_norm", False)
    fields.only("layer_norm_elementwise_affine", True)
    fields.only("enable_bias", True, False)  # said by the tensors themselves
    layer = Layer(heads, heads, hidden // heads, hidden // heads, fields.integer("ffn_dim"))
    architecture = Architecture(
        family="opt",
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        positions=fields.integer("max_position_embeddings", 2048),
        layers=equal_layers(fields.integer("num_hidden_layers", top=4096), layer),
        activation=fields.activation("activation_function"),
        norm_eps=1e-5,
        rope=None,
        tied=fields.flag("tie_word_embeddings", True),
        bos=next(iter(fields.tokens("bos_token_id")), None),
        eos=fields.tokens("eos_token_id"),
    )
    fields.finish()
    return architecture
