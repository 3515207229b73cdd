"""The verbs as an ONNX graph, written node by node: nothing is traced.

Prefill and decode are one graph; inputs and outputs are named as onnxruntime-genai names them. `attention_mask` says
by its width how many tokens there are in all, so the position of the first new one is that minus the new ones. An
encoder has neither mask nor cache: `input_ids` are a whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_never

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporter.errors import TargetError
from exporter.model import Layer, Model, Rope
from exporter.ops import AttentionSpec, Leaf, Ops
from exporter.weights import Dense, LowBit, Sparse
from targets.onnxruntime_mobile.constants import Constants
from targets.onnxruntime_mobile.prices import padded_columns

OPSET, IR_VERSION = 21, 10
LOGITS, HIDDEN = "logits", "last_hidden_state"
CONTRIB = "com.microsoft"
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level; the 2- and 8-bit kernels of the others are 50 times slower
CACHE_MULTIPLE, ROTARY_MULTIPLE = 8, 16  # GroupQueryAttention's head size; and where it turns q and k itself


def cache_width(widths: Layer | AttentionSpec) -> int:
    """Channels of a head in the cache, of keys and of values: GroupQueryAttention has one width for both."""
    return -(-max(widths.head_dim, widths.value_dim) // CACHE_MULTIPLE) * CACHE_MULTIPLE


class GraphOps(Ops[ir.Value]):
    """The verbs, each a few nodes. Only shapes are read, so the model may live on the meta device.

    Args:
        model: With the weights that are to be stored: leaves that MatMulNBits takes.
        context: Rows of the rotary tables.
    """

    def __init__(self, model: Model, context: int) -> None:
        super().__init__(model)
        self.context = context
        self.constants = Constants()
        self.leaves: dict[str, Dense | LowBit] = {}  # by the name of its constants
        self.products: list[Leaf] = []  # leaves that activations are multiplied by, once per use
        self.nodes: list[ir.Node] = []
        self.outputs: list[ir.Value] = []
        self._inline: dict[tuple[int, ...], ir.Value] = {}
        self._rotary: dict[int, list[ir.Value]] = {}  # by head_dim
        self._sums: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # said, and not yet written
        self._names: dict[int, str] = {}  # id of a leaf to its name; the model keeps the leaf alive
        self.ids = _value("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        self.mask = _value("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        self.inputs = [self.ids]
        if model.architecture.causal:
            self.inputs.append(self.mask)
            self._lengths()
        else:
            self._start, self._end = self.integers(0), self.emit("Shape", [self.ids], start=1)

    def _lengths(self) -> None:
        """What every layer asks of the mask: tokens in all, the last one's index, the first new one's position."""
        new, total = self.emit("Shape", [self.ids], start=1), self.emit("Shape", [self.mask], start=1)  # [1]
        self._start, self._end = self.emit("Sub", [total, new]), total
        counts = self.emit("ReduceSum", [self.mask, self.integers(1)], keepdims=0)  # [batch]
        last = self.emit("Sub", [counts, self.integers(1)])
        self._last = self.emit("Cast", [last], to=ir.DataType.INT32)
        self._total = self.emit("Cast", [self.emit("Squeeze", [total])], to=ir.DataType.INT32)

    # ---- the graph --------------------------------------------------------------------------------------------

    def emit(
        self, operator: str, inputs: Sequence[ir.Value | None], domain: str = "", name: str = "", **attributes: Any
    ) -> ir.Value:
        """Append a node with one output."""
        return self._append(operator, inputs, [ir.Value()], domain, name, attributes)[0]

    def integers(self, *values: int) -> ir.Value:
        """A small int64 constant, kept in the graph itself."""
        if values not in self._inline:
            tensor = ir.tensor(np.array(values, np.int64), name="int64_" + "_".join(map(str, values)))
            shape = ir.Shape([len(values)])
            constant = ir.Value(
                name=tensor.name, type=ir.TensorType(ir.DataType.INT64), shape=shape, const_value=tensor
            )
            self._inline[values] = constant
        return self._inline[values]

    def finish(self, result: ir.Value) -> ir.Model:
        """The whole model; `result`, the logits or an encoder's hidden states, is its first output."""
        architecture = self.model.architecture
        result = self._written(result)
        result.name, result.type = LOGITS if architecture.causal else HIDDEN, ir.TensorType(ir.DataType.FLOAT)
        result.shape = ir.Shape(["batch_size", "sequence_length", architecture.outputs])
        kind = "decoder" if architecture.causal else "encoder"
        graph = ir.Graph(
            self.inputs, [result, *self.outputs], nodes=self.nodes, name=kind,
            initializers=[*self._inline.values(), *self.constants.values.values()],
            opset_imports={"": OPSET, CONTRIB: 1},
        )  # fmt: skip
        metadata = {"pocket.context": str(self.context)}
        if not architecture.causal:
            metadata["pocket.vocab"] = str(architecture.vocab)  # a decoder's is the width of its logits
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="pocket-exporter", metadata_props=metadata)

    def _append(
        self, operator: str, inputs: Sequence[ir.Value | None], outputs: list[ir.Value], domain: str, name: str,
        attributes: dict[str, Any],
    ) -> list[ir.Value]:  # fmt: skip
        written = [None if value is None else self._written(value) for value in inputs]
        name = f"{name or 'node'}/{operator}_{len(self.nodes)}"
        for index, value in enumerate(outputs):
            value.name = f"{name}:{index}" if value.name is None else value.name
        self.nodes.append(ir.node(operator, written, attributes, domain=domain, outputs=outputs, name=name))
        return outputs

    def _written(self, value: ir.Value) -> ir.Value:
        """The value itself; a sum that no norm has taken in is written first."""
        if value in self._sums:
            self._append("Add", self._sums.pop(value), [value], "", "", {})
        return value

    # ---- verbs ------------------------------------------------------------------------------------------------

    def embedding(self, ids: ir.Value, site: str) -> ir.Value:
        weight = self.model.weights[site]
        if isinstance(weight, Dense):
            return self.emit("Gather", [self._floats(weight, site), ids], name=site)
        if not isinstance(weight, LowBit):
            raise TargetError(f"{site}: an embedding is stored as floats or codes; lower with the plan of this target")
        return self._low_bit_rows(ids, weight, site)

    def position_embedding(self, ids: ir.Value, site: str, offset: int) -> ir.Value:
        ends = (self.emit("Add", [end, self.integers(offset)]) for end in (self._start, self._end))
        first, last = (self.emit("Squeeze", [end]) for end in ends)
        one = self.emit("Squeeze", [self.integers(1)])
        positions = self.emit("Range", [first, last, one])  # [tokens]
        return self.emit("Unsqueeze", [self.embedding(positions, site), self.integers(0)])  # [1, tokens, hidden]

    def leaf(self, x: ir.Value, weight: Leaf, site: str) -> ir.Value:
        self.products.append(weight)
        match weight:
            case Dense():
                return self.emit("FusedMatMul", [x, self._floats(weight, site)], CONTRIB, site, transB=1)
            case LowBit():
                return self._low_bit(x, weight, site)
            case Sparse():
                raise TargetError(f"{site}: there is no N:M operator on CPU; lower with the plan of this target")
            case _:
                assert_never(weight)

    def bias(self, x: ir.Value, name: str) -> ir.Value:
        return self.emit("Add", [x, self._tensor(name)], name=name)

    def rms_norm(self, x: ir.Value, site: str, heads: int = 1) -> ir.Value:
        if heads > 1:
            parts = self._split(x, heads)  # [batch, tokens, heads, channels / heads]
            return self._join(self._norm("SimplifiedLayerNormalization", parts, [f"{site}.weight"], site))
        return self._maybe_skip("SimplifiedLayerNormalization", x, [f"{site}.weight"], site)

    def layer_norm(self, x: ir.Value, site: str, eps: float | None = None) -> ir.Value:
        return self._maybe_skip("LayerNormalization", x, [f"{site}.weight", f"{site}.bias"], site, eps)

    def activation(self, x: ir.Value, name: str) -> ir.Value:
        match name:
            case "silu":
                return self.emit("QuickGelu", [x], CONTRIB, alpha=1.0)  # x * sigmoid(alpha x)
            case "gelu" | "gelu_tanh":
                return self.emit("Gelu", [x], approximate="tanh" if name == "gelu_tanh" else "none")
            case "relu":
                return self.emit("Relu", [x])
            case _:
                raise TargetError(f"activation {name!r} has no operator here; known: silu, gelu, gelu_tanh, relu")

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        total = ir.Value(name=f"sum_{len(self.nodes)}")
        self._sums[total] = self._written(x), self._written(y)
        return total

    def mul(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.emit("Mul", [x, y])

    def take(self, x: ir.Value, labels: Tensor) -> ir.Value:
        constant = self.constants.indices(f"labels_{len(self.nodes)}", labels)
        return self.emit("Gather", [x, constant], axis=-1)

    def cached_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, layer: int, spec: AttentionSpec) -> ir.Value:
        if not spec.causal:
            return self._attend_to_all(q, k, v, layer, spec)
        width = cache_width(spec)
        turns_inside = spec.rope is not None and spec.head_dim == width and width % ROTARY_MULTIPLE == 0
        tables = self._tables(spec.rope, spec.head_dim) if spec.rope is not None else []
        if tables and not turns_inside:
            q, k = self._turned(q, spec.heads, tables), self._turned(k, spec.kv_heads, tables)
        q, k = self._widened(q, spec.heads, spec.head_dim, width), self._widened(k, spec.kv_heads, spec.head_dim, width)
        v = self._widened(v, spec.kv_heads, spec.value_dim, width)
        pasts, presents = self._cache(layer, spec.kv_heads, width)
        inputs = [q, k, v, *pasts, self._last, self._total, *(tables if turns_inside else [])]
        attributes = {"num_heads": spec.heads, "kv_num_heads": spec.kv_heads, "scale": spec.scale,
                      "do_rotary": int(turns_inside)}  # fmt: skip
        outputs = [ir.Value(), *presents]
        y = self._append("GroupQueryAttention", inputs, outputs, CONTRIB, f"layers.{layer}", attributes)[0]
        return self._narrowed(y, spec.heads, spec.value_dim, width)

    # ---- leaves -----------------------------------------------------------------------------------------------

    def _name(self, weight: Dense | LowBit, site: str) -> str:
        """A leaf's name: its site, numbered from the second one on; one leaf has one name wherever it is used."""
        if id(weight) not in self._names:
            taken = sum(name == site or name.startswith(f"{site}.leaf") for name in self._names.values())
            self._names[id(weight)] = f"{site}.leaf{taken}" if taken else site
            self.leaves[self._names[id(weight)]] = weight
        return self._names[id(weight)]

    def _floats(self, weight: Dense, site: str) -> ir.Value:
        return self.constants.floats(f"{self._name(weight, site)}.weight", weight.values)

    def _tensor(self, name: str) -> ir.Value:
        return self.constants.floats(name, self.model.tensors[name])

    def _zeros(self, name: str, weight: LowBit) -> list[ir.Value]:
        is_stored = not weight.is_symmetric and weight.has_whole_zeros
        return [self.constants.zeros(name, weight)] if is_stored else []

    def _low_bit(self, x: ir.Value, weight: LowBit, site: str) -> ir.Value:
        name, c = self._name(weight, site), self.constants
        inputs = [x, c.code_blocks(name, weight), c.scales(name, weight), *self._zeros(name, weight)]
        out, columns = weight.shape
        y = self.emit("MatMulNBits", inputs, CONTRIB, site, bits=weight.bits, block_size=weight.group, K=columns, N=out,
                      accuracy_level=INT8_ACTIVATIONS)  # fmt: skip
        return y if weight.has_whole_zeros else self.emit("Add", [y, self._shift(x, weight, name)], name=site)

    def _shift(self, x: ir.Value, weight: LowBit, name: str) -> ir.Value:
        """The part of fractional zero points: `s (c - z) = s (c - middle) + s (middle - z)`.

        The second term is one number per group, so it meets only the sums of `x` over groups. The operator's own
        float zero points take a path that decodes the whole matrix on every call, 60 times slower.
        """
        sums = self.emit("ReduceSum", [self._grouped(x, weight), self.integers(-1)], keepdims=0)  # [.., tokens, groups]
        if weight.zeros.shape == (1, 1):
            middle = 2.0 ** (weight.bits - 1) - float(weight.zeros)
            return self.emit(
                "FusedMatMul", [sums, self.constants.scales(name, weight)], CONTRIB, transB=1, alpha=middle
            )
        return self.emit("FusedMatMul", [sums, self.constants.shifts(name, weight)], CONTRIB, transB=1)

    def _grouped(self, x: ir.Value, weight: LowBit) -> ir.Value:
        """[batch, tokens, in] to [batch, tokens, groups, group], zeros behind the last column."""
        more = padded_columns(weight) - weight.shape[1]
        if more:
            x = self.emit("Pad", [x, self.integers(0, 0, 0, 0, 0, more)])
        return self.emit("Reshape", [x, self.integers(0, 0, weight.groups, weight.group)])

    def _low_bit_rows(self, ids: ir.Value, weight: LowBit, site: str) -> ir.Value:
        name, c = self._name(weight, site), self.constants
        inputs = [c.code_rows(name, weight), ids, c.scales(name, weight), *self._zeros(name, weight)]
        rows = self.emit("GatherBlockQuantized", inputs, CONTRIB, site, bits=weight.bits, block_size=weight.group,
                         gather_axis=0, quantize_axis=1)  # fmt: skip
        columns = weight.shape[1]
        is_whole = padded_columns(weight) == columns
        return rows if is_whole else self._cut(rows, columns)

    # ---- norms ------------------------------------------------------------------------------------------------

    def _norm(self, operator: str, x: ir.Value, parameters: list[str], site: str, eps: float | None = None) -> ir.Value:
        inputs = [x, *(self._tensor(name) for name in parameters)]
        return self.emit(operator, inputs, name=site, axis=-1, epsilon=self._epsilon(eps))

    def _epsilon(self, eps: float | None) -> float:
        return self.model.architecture.norm_eps if eps is None else eps

    def _maybe_skip(
        self, operator: str, x: ir.Value, parameters: list[str], site: str, eps: float | None = None
    ) -> ir.Value:
        """A norm; of a sum that was only said, sum and norm in one node, which gives the sum as its fourth output."""
        if x not in self._sums:
            return self._norm(operator, x, parameters, site, eps)
        inputs = [*self._sums.pop(x), *(self._tensor(name) for name in parameters)]
        outputs = [ir.Value(), ir.Value(name=""), ir.Value(name=""), x]
        attributes = {"epsilon": self._epsilon(eps)}
        return self._append(f"Skip{operator}", inputs, outputs, CONTRIB, site, attributes)[0]

    # ---- attention --------------------------------------------------------------------------------------------

    def _attend_to_all(self, q: ir.Value, k: ir.Value, v: ir.Value, layer: int, spec: AttentionSpec) -> ir.Value:
        """No mask and no cache; the operator has as many heads of keys as of queries, so grouped ones are repeated."""
        if spec.rope is not None:
            tables = self._tables(spec.rope, spec.head_dim)
            q, k = self._turned(q, spec.heads, tables), self._turned(k, spec.kv_heads, tables)
        if spec.heads != spec.kv_heads:
            k, v = (self.take(x, _repeated(spec, dim)) for x, dim in ((k, spec.head_dim), (v, spec.value_dim)))
        attributes = {"num_heads": spec.heads, "scale": spec.scale}
        return self.emit("MultiHeadAttention", [q, k, v], CONTRIB, f"layers.{layer}", **attributes)

    def _cache(self, layer: int, kv_heads: int, width: int) -> tuple[list[ir.Value], list[ir.Value]]:
        def named(name: str, tokens: str) -> list[ir.Value]:
            shape = ["batch_size", kv_heads, tokens, width]
            return [_value(f"{name}.{layer}.{part}", ir.DataType.FLOAT, shape) for part in ("key", "value")]

        pasts = named("past_key_values", "past_sequence_length")
        presents = named("present", "total_sequence_length")
        self.inputs += pasts
        self.outputs += presents
        return pasts, presents

    def _tables(self, rope: Rope, head_dim: int) -> list[ir.Value]:
        """Cosines and sines, each [context, head_dim / 2]; layers of one width share them."""
        if head_dim not in self._rotary:
            tables = zip(("cos", "sin"), rope.table(head_dim, self.context))
            self._rotary[head_dim] = [self.constants.floats(f"rotary_{head_dim}.{part}", t) for part, t in tables]
        return self._rotary[head_dim]

    def _turned(self, x: ir.Value, heads: int, tables: list[ir.Value]) -> ir.Value:
        return self.emit("RotaryEmbedding", [x, self._start, *tables], CONTRIB, num_heads=heads)

    def _widened(self, x: ir.Value, heads: int, dim: int, width: int) -> ir.Value:
        """Zeros behind the channels of each head: [.., heads * dim] to [.., heads * width]; exact."""
        if dim == width:
            return x
        return self._join(self.emit("Pad", [self._split(x, heads), self.integers(*[0] * 7, width - dim)]))

    def _narrowed(self, x: ir.Value, heads: int, dim: int, width: int) -> ir.Value:
        """The inverse: [.., heads * width] to [.., heads * dim]."""
        return x if dim == width else self._join(self._cut(self._split(x, heads), dim))

    def _split(self, x: ir.Value, heads: int) -> ir.Value:
        return self.emit("Reshape", [x, self.integers(0, 0, heads, -1)])

    def _join(self, x: ir.Value) -> ir.Value:
        return self.emit("Reshape", [x, self.integers(0, 0, -1)])

    def _cut(self, x: ir.Value, channels: int) -> ir.Value:
        """The first `channels` of the last axis."""
        return self.emit("Slice", [x, self.integers(0), self.integers(channels), self.integers(-1)])


def _repeated(spec: AttentionSpec, dim: int) -> Tensor:
    """The channel that each channel of heads * dim reads, where heads share one of kv_heads: [heads * dim]."""
    channels = torch.arange(spec.kv_heads * dim).view(spec.kv_heads, dim)
    return channels.repeat_interleave(spec.heads // spec.kv_heads, dim=0).flatten()


def _value(name: str, dtype: ir.DataType, shape: Sequence[object]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
