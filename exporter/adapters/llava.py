"""LLaVA: a CLIP vision tower looks at a picture, two matrices project it, a Llama reads it in place of image tokens.

Layers of the tower behind the one that is projected are never read, and left out.

Source: LLaVA 1.5, arXiv:2310.03744.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from exporter.adapters import Shapes, llama, vision
from exporter.adapters.config import ACTIVATIONS, Fields
from exporter.errors import ArchitectureError
from exporter.model import Architecture, Vision
from exporter.ops import AttentionSites, MlpSites, Ops

T = TypeVar("T")

ROOT = "language_model."
EMBEDDING, HEAD = ROOT + llama.EMBEDDING, ROOT + llama.HEAD
PROJECTOR = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
UNREAD = f"{vision.TOWER}.post_layernorm."  # of the class token alone, for contrastive training

# What a config.json leaves out where it is the published default of its part.
TEXT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION_ACTIVATIONS = {**ACTIVATIONS, "quick_gelu": "quick_gelu"}


def see(ops: Ops[T], pixels: T) -> T:
    """Pictures [batch, channels, height, width] to what takes their places in a text [batch, places, hidden]."""
    seen = ops.model.architecture.vision
    assert seen is not None  # `read` always gives one
    first, second = PROJECTOR
    hidden = ops.activation(ops.linear(vision.look(ops, pixels, seen), first), seen.projector)
    return ops.linear(hidden, second)


def embed(ops: Ops[T], ids: T) -> T:
    """Token ids to the residual stream."""
    return llama.embed(ops, ids, ROOT)


def block(ops: Ops[T], x: T, layer: int) -> T:
    """One decoder layer."""
    return llama.block(ops, x, layer, ROOT)


def head(ops: Ops[T], x: T) -> T:
    """The residual stream to logits."""
    return llama.head(ops, x, ROOT)


def attention_sites(layer: int) -> AttentionSites:
    """Sites of one decoder layer's attention."""
    return llama.attention_sites(layer, ROOT)


def mlp_sites(layer: int) -> MlpSites:
    """Sites of one decoder layer's MLP."""
    return llama.mlp_sites(layer, ROOT)


def shapes(architecture: Architecture) -> Shapes:
    """The matrices and vectors of such a model."""
    text, seen = llama.shapes(architecture, ROOT), architecture.vision
    if seen is None:
        raise ArchitectureError("a llava model has a vision tower, and this one says nothing of any")
    tower, (first, second) = vision.shapes(seen), PROJECTOR
    projector = {first: (architecture.hidden, seen.hidden), second: (architecture.hidden, architecture.hidden)}
    biases = {f"{site}.bias": architecture.hidden for site in PROJECTOR}
    return Shapes(
        weights={**text.weights, **tower.weights, **projector},
        tensors={**text.tensors, **tower.tensors},
        optional={**text.optional, **biases},
        unread=tower.unread,
    )


def stored(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """A checkpoint's tensor under the names that transformers saves; it has had two other ways to say them.

    The patches' convolution [hidden, channels, patch, patch] becomes the matrix that it is.
    """
    name = re.sub(r"^(vision_tower\.|model\.vision_tower\.)(vision_model\.)?", f"{vision.TOWER}.", name)
    name = re.sub(r"^model\.multi_modal_projector\.", "multi_modal_projector.", name)
    name = re.sub(r"^model\.language_model\.", f"{ROOT}model.", name)
    name = f"{ROOT}{name}" if name.startswith("lm_head.") else name
    if name.startswith(UNREAD) or name.endswith((".position_ids", "rotary_emb.inv_freq")):
        return None
    is_convolution = name == f"{vision.PATCHES}.weight" and tensor.ndim == 4 and tensor.shape[2] == tensor.shape[3]
    return name, (tensor.flatten(1) if is_convolution else tensor)


def read(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes."""
    fields = Fields(config)
    text = _text(fields)
    fields.get("image_seq_length")  # of the processor; the tower says it
    fields.get("ignore_index")  # of the training's loss
    fields.only("vocab_size", text.vocab)
    fields.only("multimodal_projector_bias", True, False)  # said by the tensors themselves
    tied = fields.flag("tie_word_embeddings", False) or text.tied
    architecture = replace(text, family="llava", tied=tied, vision=_vision(fields))
    fields.finish()
    return architecture


def _text(fields: Fields) -> Architecture:
    said = {name: value for name, value in fields.object("text_config").items() if value is not None}
    if said.get("model_type", "llama") != "llama":
        raise ArchitectureError(f"config.json: text_config is a {said['model_type']!r}; only 'llama' can be exported")
    return llama.read({**TEXT_DEFAULTS, **said})


def _vision(fields: Fields) -> Vision:
    said = fields.object("vision_config")
    if said.get("model_type", "clip_vision_model") != "clip_vision_model":
        kind = said["model_type"]
        raise ArchitectureError(f"config.json: vision_config is a {kind!r}; only 'clip_vision_model' can be exported")
    tower = Fields(said)
    layers = tower.integer("num_hidden_layers", 24, top=4096)
    read = _layers_read(fields.get("vision_feature_layer", -2), layers)
    fields.only("vision_feature_select_strategy", "default", "full")
    for silent in ("initializer_factor", "projection_dim", "vocab_size"):
        tower.get(silent)
    found = Vision(
        size=tower.integer("image_size", 336),
        channels=tower.integer("num_channels", 3),
        patch=tower.integer("patch_size", 14),
        hidden=tower.integer("hidden_size", 1024),
        layers=read,
        heads=tower.integer("num_attention_heads", 16),
        mlp=tower.integer("intermediate_size", 4096),
        activation=_activation(tower, "hidden_act", "quick_gelu"),
        norm_eps=tower.number("layer_norm_eps", 1e-5),
        projector=_activation(fields, "projector_hidden_act", "gelu"),
        keeps_class=fields.get("vision_feature_select_strategy", "default") == "full",
        token=_image_token(fields),
        unread=layers - read,
    )
    tower.finish()
    return found


def _layers_read(chosen: Any, layers: int) -> int:
    """How many layers run, where hidden state 0 is what goes into the first; negative ones count from the end."""
    if type(chosen) is not int or not -layers - 1 <= chosen <= layers:
        raise ArchitectureError(
            f"config.json: vision_feature_layer is {chosen!r}; one of a tower of {layers} layers can be exported, from "
            f"{-layers - 1} to {layers}"
        )
    return chosen if chosen >= 0 else layers + 1 + chosen


def _image_token(fields: Fields) -> int:
    """Where transformers 5 may keep it, or where all checkpoints do."""
    tokens = {*fields.tokens("image_token_index"), *fields.tokens("image_token_id")} or {32000}
    if len(tokens) > 1:
        raise ArchitectureError(f"config.json: image tokens are {sorted(tokens)}; a picture is said by one token")
    return next(iter(tokens))


def _activation(fields: Fields, name: str, default: str) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str) or value not in VISION_ACTIVATIONS:
        raise ArchitectureError(f"config.json: {name} is {value!r}; known: {', '.join(sorted(VISION_ACTIVATIONS))}")
    return VISION_ACTIVATIONS[value]
