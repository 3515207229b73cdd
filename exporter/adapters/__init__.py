"""Model families, a file each: config -> Architecture, its blocks in verbs, its coupled widths."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

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
}


@dataclass(frozen=True)
class Shapes:
    """What a checkpoint must hold.

    Args:
        weights: [out, in] by site.
        tensors: Length by full name, of norms and learned biases that must be there.
        optional: Length by full name, of biases and norms that may be there.
    """

    weights: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, int]
    optional: Mapping[str, int]


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

    def attention_sites(self, layer: int) -> AttentionSites:
        """Sites of one layer's attention (with `q_norm`, `k_norm` named whether or not a model has them)."""

    def mlp_sites(self, layer: int) -> MlpSites:
        """Sites of one layer's MLP."""

    def embed(self, ops: Ops[T], ids: T) -> T:
        """Token ids to the residual stream."""

    def block(self, ops: Ops[T], x: T, layer: int) -> T:
        """One decoder layer."""

    def head(self, ops: Ops[T], x: T) -> T:
        """The residual stream to logits."""


def find(family: str) -> Adapter:
    """The adapter of a family or of a config's `model_type`.

    Raises:
        ArchitectureError: no adapter knows it.
    """
    name = FAMILIES.get(family)
    if name is None:
        raise ArchitectureError(f"no adapter for model type {family!r}; known: {', '.join(sorted(FAMILIES))}")
    module: ModuleType = importlib.import_module(f"exporter.adapters.{name}")
    return cast(Adapter, module)


def logits(adapter: Adapter, ops: Ops[T], ids: T) -> T:
    """A whole model in verbs: ids [batch, tokens] to logits [batch, tokens, vocab]."""
    x = adapter.embed(ops, ids)
    for layer in range(len(ops.model.architecture.layers)):
        x = adapter.block(ops, x, layer)
    return adapter.head(ops, x)


def attention_spec(architecture: Architecture, layer: int) -> AttentionSpec:
    """Widths and constants of one layer's attention, logits scaled by 1 / sqrt(head_dim)."""
    w = architecture.layers[layer]
    return AttentionSpec(w.heads, w.kv_heads, w.head_dim, w.value_dim, w.head_dim**-0.5, architecture.rope)


def equal_layers(count: int, layer: Layer) -> tuple[Layer, ...]:
    """Layers of one width, as every unpruned checkpoint has them."""
    return (layer,) * count
