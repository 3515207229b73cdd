"""Model families, a file each: config -> Architecture, its blocks in verbs, its coupled widths."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor

from exporter.errors import ArchitectureError
from exporter.model import Architecture, Layer
from exporter.ops import AttentionSites, AttentionSpec, MlpSites, Ops

T = TypeVar("T")

FAMILIES = {  # model_type of config.json -> adapter
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "opt": "opt",
    "bert": "bert",
    "llava": "llava",
}


GENERIC = "generic"  # the adapter of whatever transformers knows and these do not


@dataclass(frozen=True)
class Shapes:
    """What a checkpoint must hold.

    Args:
        weights: [out, in] by site.
        tensors: Length by full name, of norms and learned biases that must be there.
        optional: Length by full name, of biases and norms that may be there.
        unread: How names begin that may be there and that nothing reads.
    """

    weights: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, int]
    optional: Mapping[str, int]
    unread: tuple[str, ...] = ()


class Adapter(Protocol):
    """A model family. Adapters are modules; these are their names and functions.

    Attributes:
        EMBEDDING: Site of the token embedding.
        HEAD: Site of the head, where it is not tied.
    """

    EMBEDDING: str
    HEAD: str

    def read(self, config: Mapping[str, Any]) -> Architecture:
        """The architecture that a config.json describes; a field that it cannot honour is refused by name."""

    def shapes(self, architecture: Architecture) -> Shapes:
        """The matrices and vectors of such a model."""

    def stored(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """A checkpoint's tensor under the name, and in the form, that `shapes` asks for.

        None where it is no part of what is computed. Names that are not known stay, and are refused by the loader.
        """

    def attention_sites(self, layer: int) -> AttentionSites:
        """Sites of one layer's attention (with `q_norm`, `k_norm` named whether or not a model has them)."""

    def mlp_sites(self, layer: int) -> MlpSites:
        """Sites of one layer's MLP."""

    def embed(self, ops: Ops[T], ids: T) -> T:
        """Token ids to the residual stream."""

    def block(self, ops: Ops[T], x: T, layer: int) -> T:
        """One decoder layer."""

    def head(self, ops: Ops[T], x: T) -> T:
        """The residual stream to logits; of an encoder, to its last hidden state."""


class SeeingAdapter(Adapter, Protocol):
    """A model family that looks at pictures: its architecture has `vision`."""

    def see(self, ops: Ops[T], pixels: T) -> T:
        """Pictures [batch, channels, height, width] to what takes their places in a text [batch, places, hidden]."""


def find(family: str) -> Adapter:
    """The adapter of a family or of a config's `model_type`.

    Raises:
        ArchitectureError: no adapter knows it.
    """
    name = GENERIC if family == GENERIC else FAMILIES.get(family)
    if name is None:
        raise ArchitectureError(f"no adapter for model type {family!r}; known: {', '.join(sorted(FAMILIES))}")
    module: ModuleType = importlib.import_module(f"exporter.adapters.{name}")
    return cast(Adapter, module)


def find_or_generic(kind: str) -> Adapter:
    """The adapter of a config's `model_type`, or the one of everything that transformers knows.

    Raises:
        ArchitectureError: no adapter knows it, and transformers is not installed.
    """
    if kind in FAMILIES:
        return find(kind)
    if find_spec("transformers") is None:
        known = ", ".join(sorted(FAMILIES))
        hint = "pip install 'pocket-exporter[generic]' to have others run by transformers, without pruning"
        raise ArchitectureError(f"no adapter for model type {kind!r}; known: {known}; {hint}")
    return find(GENERIC)


def see(adapter: Adapter, ops: Ops[T], pixels: T) -> T:
    """What a picture gives in place of a text's image tokens: see `SeeingAdapter.see`.

    Raises:
        ArchitectureError: the family looks at no pictures, whatever the architecture says.
    """
    if not hasattr(adapter, "see"):
        raise ArchitectureError(f"a {ops.model.architecture.family} model looks at no pictures; llava models do")
    return cast(SeeingAdapter, adapter).see(ops, pixels)


def embed(adapter: Adapter, ops: Ops[T], ids: T, seen: T | None = None) -> T:
    """Token ids to the residual stream, with what is seen, a picture a text, in place of the image tokens."""
    x, vision = adapter.embed(ops, ids), ops.model.architecture.vision
    return x if seen is None or vision is None else ops.merge_pictures(x, ids, seen, vision.token)


def logits(adapter: Adapter, ops: Ops[T], ids: T, seen: T | None = None) -> T:
    """A whole model in verbs: ids [batch, tokens] to logits, or hidden states, [batch, tokens, outputs]."""
    x = embed(adapter, ops, ids, seen)
    for layer in range(len(ops.model.architecture.layers)):
        x = adapter.block(ops, x, layer)
    return adapter.head(ops, x)


def attention_spec(architecture: Architecture, layer: int) -> AttentionSpec:
    """Widths and constants of one layer's attention, logits scaled by 1 / sqrt(head_dim)."""
    w = architecture.layers[layer]
    scale, rope, causal = w.head_dim**-0.5, architecture.rope, architecture.causal
    return AttentionSpec(w.heads, w.kv_heads, w.head_dim, w.value_dim, scale, rope, causal)


def layer_shapes(
    width: Layer, hidden: int, attention: AttentionSites, mlp: MlpSites
) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """The matrices of one layer, [out, in] by site, and the length of the bias that each may have, by full name."""
    gate = {} if mlp.gate is None else {mlp.gate: (width.mlp, hidden)}
    weights = {
        attention.q: (width.heads * width.head_dim, hidden),
        attention.k: (width.kv_heads * width.head_dim, hidden),
        attention.v: (width.kv_heads * width.value_dim, hidden),
        attention.o: (hidden, width.heads * width.value_dim),
        **gate,
        mlp.up: (width.mlp, hidden),
        mlp.down: (hidden, width.mlp),
    }
    return weights, {f"{site}.bias": shape[0] for site, shape in weights.items()}


def layer_norm_shapes(site: str, width: int) -> dict[str, int]:
    """The two vectors of a layer norm: their length by full name."""
    return {f"{site}.weight": width, f"{site}.bias": width}


def equal_layers(count: int, layer: Layer) -> tuple[Layer, ...]:
    """Layers of one width, as every unpruned checkpoint has them."""
    return (layer,) * count
