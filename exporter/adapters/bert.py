"""BERT: an encoder. Learned positions, a layer norm after each sum, biases everywhere, an MLP without a gate.

Every token sees the whole text. What comes out is the last hidden state; the embedding of a text is its mean.
Texts are of one segment, so only the first row of the segment table is ever added: it is kept as a bias.
"""

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

EMBEDDING, POSITIONS = "embeddings.word_embeddings", "embeddings.position_embeddings"
SEGMENT, NORM = "embeddings.token_type_embeddings.weight", "embeddings.LayerNorm"
HEAD = ""  # there is none: `tied` is true, so nobody asks
OLD_NAMES = {"gamma": "weight", "beta": "bias"}  # of layer norms, in checkpoints that were once TensorFlow's


def embed(ops: Ops[T], ids: T) -> T:
    """Token ids to the residual stream."""
    x = ops.bias(ops.embedding(ids, EMBEDDING), SEGMENT)
    return ops.layer_norm(ops.add(x, ops.position_embedding(ids, POSITIONS, 0)), NORM)


def block(ops: Ops[T], x: T, layer: int) -> T:
    """One layer: norm(x + attention x), then norm(x + mlp x)."""
    prefix = f"encoder.layer.{layer}"
    sites, spec = attention_sites(layer), attention_spec(ops.model.architecture, layer)
    x = ops.layer_norm(ops.add(x, ops.attention(x, sites, layer, spec)), f"{prefix}.attention.output.LayerNorm")
    made = ops.mlp(x, mlp_sites(layer), ops.model.architecture.activation)
    return ops.layer_norm(ops.add(x, made), f"{prefix}.output.LayerNorm")


def head(ops: Ops[T], x: T) -> T:
    """The residual stream is the last hidden state."""
    return x


def attention_sites(layer: int) -> AttentionSites:
    """Sites of one layer's attention."""
    prefix = f"encoder.layer.{layer}.attention"
    q, k, v = (f"{prefix}.self.{name}" for name in ("query", "key", "value"))
    return AttentionSites(q, k, v, f"{prefix}.output.dense")


def mlp_sites(layer: int) -> MlpSites:
    """Sites of one layer's MLP."""
    prefix = f"encoder.layer.{layer}"
    return MlpSites(None, f"{prefix}.intermediate.dense", f"{prefix}.output.dense")


def shapes(architecture: Architecture) -> Shapes:
    """The matrices and vectors of such a model."""
    hidden = architecture.hidden
    weights = {EMBEDDING: (architecture.vocab, hidden), POSITIONS: (architecture.positions, hidden)}
    tensors = {SEGMENT: hidden, **layer_norm_shapes(NORM, hidden)}
    optional: dict[str, int] = {}
    for index, w in enumerate(architecture.layers):
        matrices, biases = layer_shapes(w, hidden, attention_sites(index), mlp_sites(index))
        weights |= matrices
        optional |= biases
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            tensors |= layer_norm_shapes(f"encoder.layer.{index}.{norm}", hidden)
    return Shapes(weights, tensors, optional)


def stored(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """A checkpoint's tensor; the pooler is left out, because it comes after the last hidden state.

    Raises:
        ArchitectureError: it is the head of a task, which would be silently lost.
    """
    name = name.removeprefix("bert.")
    if name.startswith("pooler.") or name == "embeddings.position_ids":  # the ids are 0, 1, 2, ...
        return None
    if name.startswith(("cls.", "classifier.", "qa_outputs.")):
        raise ArchitectureError(
            f"tensor {name} is the head of a task; an encoder is exported up to its last hidden state: "
            "save the checkpoint as a BertModel first"
        )
    if name == SEGMENT and tensor.ndim == 2:
        return name, tensor[0]
    front, _, last = name.rpartition(".")
    return (f"{front}.{OLD_NAMES[last]}" if last in OLD_NAMES else name), tensor


def read(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes."""
    fields = Fields(config)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden % heads:
        raise ArchitectureError(f"config.json: hidden size {hidden} is no multiple of {heads} attention heads")
    fields.only("position_embedding_type", "absolute")
    fields.only("is_decoder", False)
    fields.only("add_cross_attention", False)
    for silent in ("attention_probs_dropout_prob", "hidden_dropout_prob", "type_vocab_size"):
        fields.get(silent)
    layer = Layer(heads, heads, hidden // heads, hidden // heads, fields.integer("intermediate_size"))
    architecture = Architecture(
        family="bert",
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        positions=fields.integer("max_position_embeddings"),
        layers=equal_layers(fields.integer("num_hidden_layers", top=4096), layer),
        activation=fields.activation("hidden_act"),
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        rope=None,
        tied=True,
        bos=next(iter(fields.tokens("bos_token_id")), None),
        eos=fields.tokens("eos_token_id"),
        causal=False,
    )
    fields.finish()
    return architecture
