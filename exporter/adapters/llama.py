"""Llama 1, 2, 3, Mistral, Qwen 2 and 3: rotary attention with grouped queries, RMS norms, a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from exporter.adapters import Shapes, attention_spec, equal_layers, layer_shapes
from exporter.adapters.config import Fields
from exporter.errors import ArchitectureError
from exporter.model import Architecture, Layer, Rope
from exporter.ops import AttentionSites, MlpSites, Ops

T = TypeVar("T")

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


def embed(ops: Ops[T], ids: T, root: str = "") -> T:
    """Token ids to the residual stream; here and below, `root` stands before every name."""
    return ops.embedding(ids, root + EMBEDDING)


def block(ops: Ops[T], x: T, layer: int, root: str = "") -> T:
    """One decoder layer: x + attention(norm x), then x + mlp(norm x)."""
    prefix = f"{root}model.layers.{layer}"
    sites, spec = _present(ops, attention_sites(layer, root)), attention_spec(ops.model.architecture, layer)
    x = ops.add(x, ops.attention(ops.rms_norm(x, f"{prefix}.input_layernorm"), sites, layer, spec))
    normed = ops.rms_norm(x, f"{prefix}.post_attention_layernorm")
    return ops.add(x, ops.mlp(normed, mlp_sites(layer, root), ops.model.architecture.activation))


def head(ops: Ops[T], x: T, root: str = "") -> T:
    """The residual stream to logits, through the embedding where it is tied."""
    return ops.linear(ops.rms_norm(x, root + NORM), root + (EMBEDDING if ops.model.architecture.tied else HEAD))


def attention_sites(layer: int, root: str = "") -> AttentionSites:
    """Sites of one layer's attention."""
    prefix = f"{root}model.layers.{layer}.self_attn"
    q, k, v, o = (f"{prefix}.{name}_proj" for name in "qkvo")
    return AttentionSites(q, k, v, o, f"{prefix}.q_norm", f"{prefix}.k_norm")


def mlp_sites(layer: int, root: str = "") -> MlpSites:
    """Sites of one layer's MLP."""
    prefix = f"{root}model.layers.{layer}.mlp"
    return MlpSites(f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj")


def shapes(architecture: Architecture, root: str = "") -> Shapes:
    """The matrices and vectors of such a model."""
    hidden = architecture.hidden
    weights = {root + EMBEDDING: (architecture.vocab, hidden)}
    if not architecture.tied:
        weights[root + HEAD] = (architecture.vocab, hidden)
    tensors: dict[str, int] = {f"{root}{NORM}.weight": hidden}
    optional: dict[str, int] = {}
    for index, w in enumerate(architecture.layers):
        attention = attention_sites(index, root)
        matrices, biases = layer_shapes(w, hidden, attention, mlp_sites(index, root))
        weights |= matrices
        optional |= biases
        optional |= {f"{site}.weight": w.head_dim for site in (attention.q_norm, attention.k_norm)}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{root}model.layers.{index}.{norm}.weight": hidden for norm in norms}
    return Shapes(weights, tensors, optional)


def stored(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """A checkpoint's tensor as it is; old ones hold the rotary frequencies too, which config.json gives."""
    return None if name.endswith("rotary_emb.inv_freq") else (name, tensor)


def read(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes."""
    fields = Fields(config)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    head_dim = fields.integer("head_dim", hidden // heads)
    if heads % kv_heads:
        raise ArchitectureError(f"config.json: {heads} attention heads are no multiple of {kv_heads} key-value heads")
    if head_dim % 2:
        raise ArchitectureError(f"config.json: heads of {head_dim} channels cannot be rotated; head_dim must be even")
    layer = Layer(heads, kv_heads, head_dim, head_dim, fields.integer("intermediate_size"))
    architecture = Architecture(
        family="llama",
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        positions=_positions(fields),
        layers=equal_layers(fields.integer("num_hidden_layers", top=4096), layer),
        activation=fields.activation("hidden_act"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields),
        tied=fields.flag("tie_word_embeddings", False),
        bos=next(iter(fields.tokens("bos_token_id")), None),
        eos=fields.tokens("eos_token_id"),
    )
    for said_by_tensors in ("attention_bias", "mlp_bias"):
        fields.only(said_by_tensors, True, False)
    fields.finish()
    return architecture


def _present(ops: Ops[T], sites: AttentionSites) -> AttentionSites:
    """The sites without the head norms, where the model has none."""
    has_norms = f"{sites.q_norm}.weight" in ops.model.tensors
    return sites if has_norms else AttentionSites(sites.q, sites.k, sites.v, sites.o)


def _positions(fields: Fields) -> int:
    """The longest context; never beyond a sliding window, within which full attention is the same thing."""
    positions = fields.integer("max_position_embeddings", 2048)
    window = fields.get("sliding_window")
    is_used = fields.flag("use_sliding_window", True)
    layer_types = fields.strings("layer_types")
    if layer_types - {"full_attention", "sliding_attention"}:
        kinds = ", ".join(sorted(layer_types))
        raise ArchitectureError(f"config.json: layer_types are {kinds}; known: full_attention, sliding_attention")
    return min(positions, fields.integer("sliding_window")) if window is not None and is_used else positions


def _rope(fields: Fields) -> Rope:
    """Rotary settings, where transformers 5 keeps them (`rope_parameters`) or where 4 did (`rope_scaling`)."""
    theta = fields.number("rope_theta", 10000.0)
    fields.only("partial_rotary_factor", 1.0)
    now, before = fields.object("rope_parameters"), fields.object("rope_scaling")
    if now and before and now != before:
        raise ArchitectureError("config.json: rope_parameters and rope_scaling say different things; leave one out")
    settings = Fields(now or before)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    settings.get("type")
    theta = settings.number("rope_theta", theta)
    settings.only("partial_rotary_factor", 1.0)
    match kind:
        case "default":
            rope = Rope(theta)
            settings.get("factor")
        case "linear":
            rope = Rope(theta, "linear", settings.number("factor"))
        case "llama3":
            low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
            original = settings.integer("original_max_position_embeddings")
            rope = Rope(theta, "llama3", settings.number("factor"), low, high, original)
        case _:
            raise ArchitectureError(f"config.json: rope type is {kind!r}; known: default, linear, llama3")
    settings.finish()
    return rope
