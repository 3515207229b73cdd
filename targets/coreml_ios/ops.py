"""The verbs over the MIL builder (iOS 18): every call adds operations to the program under way.

Everything is float16. Keys and values live in two states that all layers share, [layers, kv_heads, context, channels];
narrower layers use the first of their heads and channels. There is no position input: the new tokens are the last
columns of the mask. An encoder has neither states nor mask: its tokens are a whole text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.model import Architecture, Model, Rope
from exporter.ops import AttentionSpec, Leaf, Ops
from exporter.weights import Product, Shared, Sum, Weight
from targets.coreml_ios.backend import mb, types
from targets.coreml_ios.encoding import Array, Parts, float16, labels, leaves, padded_width, parts
from targets.coreml_ios.planning import LEAST

ZEROS = "zeros"  # prefix of the names of biases that do nothing
Var = Any  # coremltools' own Var, which has no types for mypy


@dataclass
class Cache:
    """One state and its value as the operations so far have left it.

    Args:
        state: The program's state input, [layers, kv_heads, context, channels].
        value: What was read from it last.
    """

    state: Var
    value: Var = field(init=False)

    def __post_init__(self) -> None:
        self.value = mb.read_state(input=self.state)

    def append(self, layer: int, new: Var, heads: int, channels: int, start: Var, end: Var) -> Var:
        """Write [1, heads, tokens, channels] at start to end; returns all up to end, [heads, end, channels]."""
        first = mb.concat(values=[layer, 0, start, 0], axis=0)
        last = mb.concat(values=[layer + 1, heads, end, channels], axis=0)
        updated = mb.slice_update(x=self.value, update=new, begin=first, end=last)
        self.value = mb.coreml_update_state(state=self.state, value=updated)
        is_one_layer, all_of_it = [True, False, False, False], [False, True, False, True]
        filled = mb.slice_by_index(
            x=self.value, begin=[layer, 0, 0, 0], end=last, begin_mask=[False, True, True, True],
            end_mask=all_of_it, squeeze_mask=is_one_layer,
        )  # fmt: skip
        if (heads, channels) == (self.state.shape[1], self.state.shape[3]):
            return filled
        return mb.slice_by_index(
            x=filled, begin=[0, 0, 0], end=[heads, 0, channels], end_mask=[False, True, False]
        )  # a layer narrower than the widest


@dataclass
class Past:
    """What a decoder is given beside its tokens.

    Args:
        mask: [1, 1, tokens, end], float16: 0 where a token may look, -1e4 where not.
        keys, values: The caches.
    """

    mask: Var
    keys: Cache
    values: Cache


class CoreMLOps(Ops[Var]):
    """The verbs as MIL operations.

    Args:
        model: Its weights are the trees that are stored.
        ids: [1, tokens], int32.
        context: Longest end.
        past: What a decoder has and an encoder has not.
    """

    def __init__(self, model: Model, ids: Var, context: int, past: Past | None = None) -> None:
        super().__init__(model)
        self.context, self.past = context, past
        self.end = _length(ids, 1) if past is None else _length(past.mask, 3)
        self.start = 0 if past is None else mb.sub(x=self.end, y=_length(ids, 1))
        trees = model.weights.items()
        self._names = {id(part): name for tree in trees for name, part in (*leaves(*tree), *labels(*tree))}
        self._constants: dict[str, Var] = {}
        self._padded: dict[tuple[str, int], Var] = {}

    # ---- constants --------------------------------------------------------------------------------------------

    def constant(self, name: str, array: Array) -> Var:
        """A named constant, once."""
        if name not in self._constants:
            self._constants[name] = mb.const(val=array, name=name)
        return self._constants[name]

    def tensor(self, name: str) -> Var:
        """A norm or bias by its full name."""
        return self.constant(name, float16(self.model.tensors[name], name))

    def matrix(self, leaf: Leaf) -> Var:
        """A leaf as a constant that is decoded when the model is loaded, [out, padded in], once."""
        name = self._names[id(leaf)]
        if name not in self._constants:
            self._constants[name] = _constexpr(parts(leaf, name), name)
        return self._constants[name]

    def labels(self, labels: Tensor) -> Var:
        """Labels as a constant, [out]; coremltools narrows their type, and says so in their name."""
        return self.constant(self._names[id(labels)], labels.to(torch.int32).numpy())

    def tree_matrix(self, weight: Weight) -> Var:
        """Any tree as one matrix, [out, in]: for the few places that need it the other way round."""
        match weight:
            case Sum():
                return reduce(self.add, (self.tree_matrix(term) for term in weight.terms))
            case Product():
                return mb.matmul(x=self.tree_matrix(weight.left), y=self.tree_matrix(weight.right))
            case Shared():
                return mb.gather(x=self.tree_matrix(weight.rows), indices=self.labels(weight.labels), axis=0)
            case _:
                return _cut(self.matrix(weight), weight.shape[1])

    # ---- verbs ------------------------------------------------------------------------------------------------

    def embedding(self, ids: Var, site: str) -> Var:
        return self.rows(ids, self.model.weights[site])

    def position_embedding(self, ids: Var, site: str, offset: int) -> Var:
        return self.rows(mb.expand_dims(x=self.positions(offset), axes=[0]), self.model.weights[site])

    def positions(self, offset: int = 0) -> Var:
        """Positions of the new tokens plus `offset`, [tokens]."""
        first = offset if self.past is None else mb.add(x=self.start, y=offset)
        last = mb.add(x=self.end, y=offset)
        return mb.range_1d(start=first, end=last, step=1)

    def rows(self, ids: Var, weight: Weight) -> Var:
        """Rows of a tree: ids [1, tokens] to [1, tokens, in]."""
        match weight:
            case Sum():
                return reduce(self.add, (self.rows(ids, term) for term in weight.terms))
            case Product():
                return mb.matmul(x=self.rows(ids, weight.left), y=self.tree_matrix(weight.right))
            case Shared():
                return self.rows(mb.gather(x=self.labels(weight.labels), indices=ids, axis=0), weight.rows)
            case _:
                return _cut(mb.gather(x=self.matrix(weight), indices=ids, axis=0), weight.shape[1])

    def linear(self, x: Var, site: str) -> Var:
        weight, name = self.model.weights[site], f"{site}.bias"
        if isinstance(weight, Sum | Product | Shared) or name not in self.model.tensors:
            return super().linear(x, site)
        return self._linear(x, weight, self.tensor(name))  # one operation with its bias

    def leaf(self, x: Var, weight: Leaf, site: str) -> Var:
        return self._linear(x, weight, None)

    def _linear(self, x: Var, weight: Leaf, bias: Var | None) -> Var:
        """Zero channels are added to x where the last group was padded: they meet codes, and change nothing."""
        more = padded_width(weight) - weight.shape[1]
        x = self._pad(x, more) if more else x
        out = weight.shape[0]
        if bias is None:  # the operation wants one: its own default would be as large, and without a name
            bias = self.constant(f"{ZEROS}.{out}", np.zeros(out, np.float16))
        return mb.linear(x=x, weight=self.matrix(weight), bias=bias)

    def _pad(self, x: Var, more: int) -> Var:
        key = x.name, more
        if key not in self._padded:
            ends = [0, 0] * (x.rank - 1) + [0, more]
            self._padded[key] = mb.pad(x=x, pad=ends, mode="constant", constant_val=np.float16(0))
        return self._padded[key]

    def bias(self, x: Var, name: str) -> Var:
        return mb.add(x=x, y=self.tensor(name))

    def rms_norm(self, x: Var, site: str, heads: int = 1) -> Var:
        """With m = max |x|: (x / m) / sqrt(mean((x / m)^2) + eps / m^2) * w, which no x that float16 holds overflows.

        Without it a square overflows beyond |x| = 255, and loses its digits below 0.008.
        """
        weight, channels = self.tensor(f"{site}.weight"), x.shape[-1]
        root, least = stored_root(self.model.architecture.norm_eps)
        split = x if heads == 1 else mb.reshape(x=x, shape=[1, -1, heads, channels // heads])
        m = mb.maximum(x=mb.reduce_max(x=mb.abs(x=split), axes=[-1], keep_dims=True), y=least)
        scaled, added = mb.real_div(x=split, y=m), mb.real_div(x=root, y=m)
        mean = mb.reduce_mean(x=mb.mul(x=scaled, y=scaled), axes=[-1], keep_dims=True)
        scale = mb.rsqrt(x=mb.add(x=mean, y=mb.mul(x=added, y=added)), epsilon=np.float16(0))
        normed = mb.mul(x=mb.mul(x=scaled, y=scale), y=weight)
        return normed if heads == 1 else mb.reshape(x=normed, shape=[1, -1, channels])

    def layer_norm(self, x: Var, site: str, eps: float | None = None) -> Var:
        weight, bias = self.tensor(f"{site}.weight"), self.tensor(f"{site}.bias")
        epsilon = stored_epsilon(self.model.architecture.norm_eps if eps is None else eps)
        return mb.layer_norm(x=x, axes=[-1], gamma=weight, beta=bias, epsilon=epsilon)

    def activation(self, x: Var, name: str) -> Var:
        match name:
            case "silu":
                return mb.silu(x=x)
            case "relu":
                return mb.relu(x=x)
            case _:
                return mb.gelu(x=x, mode="EXACT" if name == "gelu" else "TANH_APPROXIMATION")

    def add(self, x: Var, y: Var) -> Var:
        return mb.add(x=x, y=y)

    def mul(self, x: Var, y: Var) -> Var:
        return mb.mul(x=x, y=y)

    def take(self, x: Var, labels: Tensor) -> Var:
        return mb.gather(x=x, indices=self.labels(labels), axis=-1)

    # ---- attention --------------------------------------------------------------------------------------------

    def cached_attention(self, q: Var, k: Var, v: Var, layer: int, spec: AttentionSpec) -> Var:
        q = self.rotate(_heads_first(q, spec.heads), spec)
        k = self.rotate(_heads_first(k, spec.kv_heads), spec)
        v = _heads_first(v, spec.kv_heads)
        groups = spec.heads // spec.kv_heads
        k, v, mask = self._remembered(k, v, layer, spec) if spec.causal else (_squeezed(k), _squeezed(v), {})
        k, v = _repeat_heads(k, groups, spec.head_dim), _repeat_heads(v, groups, spec.value_dim)
        own_scale = spec.scale * math.sqrt(spec.head_dim)  # the operation itself divides by sqrt(head_dim)
        q = q if math.isclose(own_scale, 1, rel_tol=1e-6) else mb.mul(x=q, y=np.float16(own_scale))
        y = mb.scaled_dot_product_attention(query=q, key=k, value=v, **mask)  # a narrower v may be
        return mb.reshape(x=mb.transpose(x=y, perm=[0, 2, 1, 3]), shape=[1, -1, spec.heads * spec.value_dim])

    def _remembered(self, k: Var, v: Var, layer: int, spec: AttentionSpec) -> tuple[Var, Var, dict[str, Var]]:
        """Keys and values of the whole text so far, [kv_heads, end, channels], and the mask that goes with them."""
        assert self.past is not None
        k = self.past.keys.append(layer, k, spec.kv_heads, spec.head_dim, self.start, self.end)
        v = self.past.values.append(layer, v, spec.kv_heads, spec.value_dim, self.start, self.end)
        return k, v, {"attn_mask": self.past.mask}

    def rotate(self, x: Var, spec: AttentionSpec) -> Var:
        """Turn each head of x [1, heads, tokens, head_dim] by its position."""
        if spec.rope is None:
            return x
        half = spec.head_dim // 2
        cos, sin = self._turns(spec)  # [tokens, half]
        a = _cut(x, half)
        b = mb.slice_by_index(x=x, begin=[0, 0, 0, half], end=[0, 0, 0, 0], begin_mask=[True] * 3 + [False],
                              end_mask=[True] * 4)  # fmt: skip
        first = mb.sub(x=mb.mul(x=a, y=cos), y=mb.mul(x=b, y=sin))
        second = mb.add(x=mb.mul(x=b, y=cos), y=mb.mul(x=a, y=sin))
        return mb.concat(values=[first, second], axis=-1)

    def _turns(self, spec: AttentionSpec) -> tuple[Var, Var]:
        """Cosines and sines of the new positions, gathered once for all layers of one head size."""
        assert spec.rope is not None
        gathered = [f"rope.{kind}.{spec.head_dim}.rows" for kind in ("cos", "sin")]
        if gathered[0] not in self._constants:
            tables = rope_tables(spec.rope, spec.head_dim, self.context)
            for (name, table), rows in zip(tables.items(), gathered):
                whole = self.constant(name, float16(table, name))
                self._constants[rows] = mb.gather(x=whole, indices=self.positions(), axis=0)
        return self._constants[gathered[0]], self._constants[gathered[1]]


def rope_tables(rope: Rope, head_dim: int, context: int) -> dict[str, Tensor]:
    """Cosines and sines by the names of their constants, each [context, head_dim / 2], float32."""
    cos, sin = rope.table(head_dim, context)
    return {f"rope.cos.{head_dim}": cos, f"rope.sin.{head_dim}": sin}


def stored_epsilon(eps: float) -> Any:
    """An epsilon in float16, where the least number over 0 stands for what would be 0: a row of zeros stays finite."""
    return max(np.float16(eps), np.float16(LEAST))


def stored_root(eps: float) -> tuple[Any, Any]:
    """The root of an epsilon in float16, and the least m that it is divided by: (root / m)^2 stays finite there.

    m is no subnormal number, which a processor may take for 0.
    """
    root = np.float16(math.sqrt(max(eps, LEAST)))
    return root, max(np.float16(2.0**-14), root / np.float16(128))


def state_shapes(architecture: Architecture, context: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the key and the value state: the widest layer's, for all layers."""
    layers = architecture.layers
    rows = len(layers), max(layer.kv_heads for layer in layers), context
    return (*rows, max(layer.head_dim for layer in layers)), (*rows, max(layer.value_dim for layer in layers))


def _constexpr(p: Parts, name: str) -> Var:
    """The chain of constants that decodes a leaf's parts; its last output has the leaf's name."""
    codes = _typed(p.codes, p.codes_type)
    scale, zeros = p.scale, None if p.zeros is None else _typed(p.zeros, _zeros_type(p))
    if p.table is not None:
        table: Any = _typed(p.table, p.table_type)
        if scale is not None:
            offset = None if zeros is None else zeros[..., None, None]
            table = mb.constexpr_blockwise_shift_scale(
                data=table, scale=scale[..., None, None], offset=offset, name=f"{name}.table"
            )
        if p.mask is None:
            return mb.constexpr_lut_to_dense(indices=codes, lut=table, name=name)
        mask, kept = mb.constexpr_lut_to_sparse(
            indices_mask=_typed(p.mask, "uint1"), indices_nonzero_data=codes, lut=table, name=f"{name}.kept"
        )
    elif p.mask is None:
        if scale is None:
            return mb.const(val=codes, name=name)
        return mb.constexpr_blockwise_shift_scale(data=codes, scale=scale, offset=zeros, name=name)
    elif scale is None:
        mask, kept = _typed(p.mask, "uint1"), codes
    else:
        mask, kept = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=_typed(p.mask, "uint1"), nonzero_data=codes, scale=scale, offset=zeros, name=f"{name}.kept"
        )
    return mb.constexpr_sparse_to_dense(nonzero_data=kept, mask=mask, name=name)


def _zeros_type(p: Parts) -> str:
    assert p.zeros is not None
    return "fp16" if p.zeros.dtype == np.float16 else p.table_type if p.table is not None else p.codes_type


def _typed(array: Array, name: str) -> Array:
    """An array whose dtype tells coremltools a type that numpy does not have."""
    return array.astype(types.nptype_from_builtin(types.string_to_builtin(name)))


def _length(x: Var, axis: int) -> Var:
    return mb.slice_by_index(x=mb.shape(x=x), begin=[axis], end=[axis + 1], squeeze_mask=[True])


def _cut(x: Var, width: int) -> Var:
    """The first `width` channels."""
    if x.shape[-1] == width:
        return x
    ends = [0] * (x.rank - 1) + [width]
    masks = [True] * (x.rank - 1) + [False]
    return mb.slice_by_index(x=x, begin=[0] * x.rank, end=ends, begin_mask=[True] * x.rank, end_mask=masks)


def _squeezed(x: Var) -> Var:
    """[1, heads, tokens, dim] to [heads, tokens, dim]."""
    return mb.squeeze(x=x, axes=[0])


def _heads_first(x: Var, heads: int) -> Var:
    """[1, tokens, heads * dim] to [1, heads, tokens, dim]."""
    return mb.transpose(x=mb.reshape(x=x, shape=[1, -1, heads, x.shape[-1] // heads]), perm=[0, 2, 1, 3])


def _repeat_heads(x: Var, groups: int, channels: int) -> Var:
    """[kv_heads, end, channels] to [1, kv_heads * groups, end, channels], each head `groups` times in a row."""
    heads = x.shape[0]
    if groups == 1:
        return mb.expand_dims(x=x, axes=[0])
    tiled = mb.tile(x=mb.expand_dims(x=x, axes=[0, 2]), reps=[1, 1, groups, 1, 1])
    return mb.reshape(x=tiled, shape=[1, heads * groups, -1, channels])
