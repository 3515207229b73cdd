"""A model is pure data: its architecture, its weight trees, its other tensors, and where it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from exporter.errors import ArchitectureError
from exporter.weights import Weight

LARGEST = 2**24  # of any width, vocabulary or context: far over what any phone runs


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, halves convention: channel i turns with channel i + head_dim / 2.

    Args:
        theta: Base of the frequencies.
        kind: `default`; `linear` divides every frequency by `factor`; `llama3` divides the slow ones.
        factor: Stretch of the context, >= 1.
        low, high: `llama3`: wavelengths over original / low are stretched, under original / high are kept.
        original: `llama3`: context of the training, in tokens.

    Source: RoFormer, arXiv:2104.09864; `llama3` as in the Llama 3.1 release.
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        numbers = (self.theta, self.factor, self.low, self.high, self.original)
        _require(all(0 < number < math.inf for number in numbers), f"rotary settings {numbers} are not all over 0")
        _require(self.factor >= 1, f"rotary factor {self.factor:g} is under 1")
        needs_order = self.kind == "llama3"
        _require(not needs_order or self.low < self.high, f"rotary: low {self.low:g} is not under high {self.high:g}")

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians per position, [head_dim / 2], float32."""
        plain = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return plain / self.factor
        turns = self.original * plain / (2 * math.pi)  # turns within the original context
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return plain * (keep + (1 - keep) / self.factor)

    def table(self, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the first `positions` positions, each [positions, head_dim / 2], float32."""
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), self.frequencies(head_dim))
        return angles.cos(), angles.sin()


@dataclass(frozen=True)
class Layer:
    """Widths of one decoder layer; pruned layers differ.

    Args:
        heads: Query heads.
        kv_heads: Key and value heads; divides `heads` (grouped-query attention).
        head_dim: Channels of a query or key head.
        value_dim: Channels of a value head; under `head_dim` where values were pruned.
        mlp: Channels between the MLP's matrices.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    mlp: int

    def __post_init__(self) -> None:
        widths = (self.heads, self.kv_heads, self.head_dim, self.value_dim, self.mlp)
        _require(all(1 <= width <= LARGEST for width in widths), f"layer widths {widths} are not from 1 to {LARGEST}")
        _require(self.heads % self.kv_heads == 0, f"{self.heads} heads are no multiple of {self.kv_heads} of keys")


@dataclass(frozen=True)
class Vision:
    """What looks at the pictures of a multimodal model: a vision transformer over patches, then two matrices.

    Args:
        size: Pixels of a picture's side; pictures are square.
        channels: Of a pixel.
        patch: Pixels of a patch's side; divides `size`.
        hidden: Channels of the vision transformer.
        layers: Its layers, up to the one whose output is projected.
        heads: Of its attention; divides `hidden`.
        mlp: Channels between its MLP's matrices.
        activation: Of its MLP: `quick_gelu` or any of a decoder's.
        norm_eps: Of its norms.
        projector: The activation between the projecting matrices.
        keeps_class: The class token, which stands before the patches, is projected too.
        token: The token that stands for a piece of a picture in a text.
        unread: Layers of the checkpoint behind these, which nothing reads.
    """

    size: int
    channels: int
    patch: int
    hidden: int
    layers: int
    heads: int
    mlp: int
    activation: str
    norm_eps: float
    projector: str
    keeps_class: bool
    token: int
    unread: int = 0

    def __post_init__(self) -> None:
        widths = (self.size, self.channels, self.patch, self.hidden, self.heads, self.mlp)
        _require(all(1 <= width <= LARGEST for width in widths), f"vision widths {widths} are not from 1 to {LARGEST}")
        _require(self.size % self.patch == 0, f"pictures of {self.size} pixels are no whole patches of {self.patch}")
        _require(self.hidden % self.heads == 0, f"{self.hidden} vision channels are no multiple of {self.heads} heads")
        _require(self.patches <= LARGEST, f"a picture of {self.patches} patches has more than {LARGEST}")
        counts = (self.layers, self.unread)
        _require(all(0 <= count <= 4096 for count in counts), f"vision layers {counts} are not from 0 to 4096")
        _require(0 < self.norm_eps < math.inf, f"vision norm epsilon {self.norm_eps:g} is not a number over 0")

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.size // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Places that a picture takes in a text."""
        return self.patches + self.keeps_class

    @property
    def patch_width(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.patch**2

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a picture: channels, height, width."""
        return self.channels, self.size, self.size


@dataclass(frozen=True)
class Architecture:
    """What a model is, apart from its numbers.

    Args:
        family: The adapter that writes it in verbs (`llama`, `opt`, `bert`, `llava`).
        vocab: Tokens.
        hidden: Channels of the residual stream.
        positions: Longest context, in tokens.
        layers: Widths per layer.
        activation: Of the MLP: `silu`, `gelu`, `gelu_tanh` or `relu`.
        norm_eps: Added to the variance in norms.
        rope: Rotary embedding, or None where positions are learned.
        tied: The embedding is the head too.
        bos: First token of a text, or None.
        eos: Tokens that end a text.
        causal: A decoder, which gives logits and goes on token after token; False: an encoder, which sees a whole text
            and gives hidden states.
        vision: What looks at pictures, or None where the model only reads.
        config: The checkpoint's config.json, where only transformers knows the family; then nothing is cached.
    """

    family: str
    vocab: int
    hidden: int
    positions: int
    layers: tuple[Layer, ...]
    activation: str
    norm_eps: float
    rope: Rope | None
    tied: bool
    bos: int | None = None
    eos: tuple[int, ...] = ()
    causal: bool = True
    vision: Vision | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        widths = (self.vocab, self.hidden, self.positions)
        named = f"vocabulary, hidden channels and positions {widths}"
        _require(all(1 <= width <= LARGEST for width in widths), f"{named} are not from 1 to {LARGEST}")
        _require(0 < self.norm_eps < math.inf, f"norm epsilon {self.norm_eps:g} is not a number over 0")
        special = (*self.eos, *(() if self.bos is None else (self.bos,)))
        wrong = [token for token in special if not 0 <= token < self.vocab]
        _require(not wrong, f"BOS or EOS token {wrong[:1]} is none of a vocabulary of {self.vocab}")
        token = 0 if self.vision is None else self.vision.token
        _require(0 <= token < self.vocab, f"image token {token} is none of a vocabulary of {self.vocab}")

    @property
    def outputs(self) -> int:
        """Numbers that the model gives at every position: logits of a decoder, channels of an encoder."""
        return self.vocab if self.causal else self.hidden


@dataclass(frozen=True)
class Provenance:
    """Where a model came from and what was done to it.

    Args:
        source: Name of the checkpoint, never a path of this machine.
        digest: sha256 over its config and weights.
        parameters: Numbers in the source, before any step.
        licence: As the checkpoint's own card says, or None where it says nothing.
        steps: The compression steps so far, each as its config.
    """

    source: str
    digest: str
    parameters: int
    licence: str | None = None
    steps: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder as data.

    Args:
        architecture: What it is.
        weights: Matrices by site, the checkpoint's own name without `.weight`.
        tensors: Norms and biases by the checkpoint's own full name.
        provenance: Where it came from.
        files: Tokenizer and configs by file name, passed on untouched.
    """

    architecture: Architecture
    weights: Mapping[str, Weight]
    tensors: Mapping[str, Tensor]
    provenance: Provenance
    files: Mapping[str, bytes] = field(default_factory=dict)

    def with_weights(self, weights: Mapping[str, Weight]) -> Model:
        """The same model with some weights replaced."""
        return replace(self, weights={**self.weights, **weights})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Model:
        """The same model with some tensors replaced or added."""
        return replace(self, tensors={**self.tensors, **tensors})

    def with_layer(self, index: int, layer: Layer) -> Model:
        """The same model with the widths of one layer replaced."""
        layers = self.architecture.layers
        changed = (*layers[:index], layer, *layers[index + 1 :])
        return replace(self, architecture=replace(self.architecture, layers=changed))

    def with_step(self, step: Mapping[str, Any]) -> Model:
        """The same model with one more step in its provenance."""
        return replace(self, provenance=replace(self.provenance, steps=(*self.provenance.steps, step)))

    @property
    def parameters(self) -> int:
        """Numbers in all matrices (by their dense shape), norms and biases; a tied head counts once."""
        matrices = sum(out * width for out, width in (weight.shape for weight in self.weights.values()))
        return matrices + sum(tensor.numel() for tensor in self.tensors.values())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ArchitectureError(message)
