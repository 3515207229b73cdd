"""The vision transformer of CLIP: a class token, patches, learned positions, layer norms before each part."""

from __future__ import annotations

from typing import TypeVar

from exporter.adapters import Shapes, layer_norm_shapes, layer_shapes
from exporter.model import Layer, Vision
from exporter.ops import AttentionSites, AttentionSpec, MlpSites, Ops

T = TypeVar("T")

TOWER = "vision_tower"
PATCHES, POSITIONS = f"{TOWER}.embeddings.patch_embedding", f"{TOWER}.embeddings.position_embedding"
CLASS = f"{TOWER}.embeddings.class_embedding"
NORM = f"{TOWER}.pre_layrnorm"  # as it is spelt in every checkpoint
NORMS = ("layer_norm1", "layer_norm2")


def look(ops: Ops[T], pixels: T, vision: Vision) -> T:
    """Pictures [batch, channels, height, width] to what the last layer that runs gives, [batch, tokens, hidden]."""
    patches = ops.linear(ops.patches(pixels, vision.patch), PATCHES)  # a convolution whose steps are its width
    x = ops.add_rows(ops.prepend(patches, CLASS), POSITIONS)
    x = ops.layer_norm(x, NORM, vision.norm_eps)
    for layer in range(vision.layers):
        x = block(ops, x, layer, vision)
    return x if vision.keeps_class else ops.skip(x, 1)


def block(ops: Ops[T], x: T, layer: int, vision: Vision) -> T:
    """One layer: x + attention(norm x), in which every token sees all, then x + mlp(norm x)."""
    before_attention, before_mlp = (f"{_prefix(layer)}.{norm}" for norm in NORMS)
    normed = ops.layer_norm(x, before_attention, vision.norm_eps)
    x = ops.add(x, ops.attention(normed, attention_sites(layer), layer, attention_spec(vision)))
    normed = ops.layer_norm(x, before_mlp, vision.norm_eps)
    return ops.add(x, ops.mlp(normed, mlp_sites(layer), vision.activation))


def attention_spec(vision: Vision) -> AttentionSpec:
    """Widths and constants of its attention, the same in every layer."""
    size = vision.hidden // vision.heads
    return AttentionSpec(vision.heads, vision.heads, size, size, size**-0.5, rope=None, causal=False)


def attention_sites(layer: int) -> AttentionSites:
    """Sites of one vision layer's attention."""
    prefix = f"{_prefix(layer)}.self_attn"
    return AttentionSites(f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj", f"{prefix}.out_proj")


def mlp_sites(layer: int) -> MlpSites:
    """Sites of one vision layer's MLP."""
    return MlpSites(None, f"{_prefix(layer)}.mlp.fc1", f"{_prefix(layer)}.mlp.fc2")


def shapes(vision: Vision) -> Shapes:
    """The matrices and vectors of such a tower."""
    hidden, size = vision.hidden, vision.hidden // vision.heads
    width = Layer(vision.heads, vision.heads, size, size, vision.mlp)
    weights = {PATCHES: (hidden, vision.patch_width), POSITIONS: (vision.patches + 1, hidden)}
    tensors = {CLASS: hidden} | layer_norm_shapes(NORM, hidden)
    for index in range(vision.layers):
        matrices, biases = layer_shapes(width, hidden, attention_sites(index), mlp_sites(index))
        weights |= matrices
        tensors |= biases
        for norm in NORMS:
            tensors |= layer_norm_shapes(f"{_prefix(index)}.{norm}", hidden)
    behind = range(vision.layers, vision.layers + vision.unread)
    return Shapes(weights, tensors, {}, tuple(f"{_prefix(layer)}." for layer in behind))


def _prefix(layer: int) -> str:
    return f"{TOWER}.encoder.layers.{layer}"
