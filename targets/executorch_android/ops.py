"""The verbs in torch as ExecuTorch runs them fastest: everything between two attentions is one XNNPACK delegate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401 (defines the lookup operators)
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 (defines llama::custom_sdpa and update_cache)
from torch import Tensor, nn

from exporter.model import Model
from exporter.ops import AttentionSpec, Leaf
from exporter.torch_ops import TorchOps
from exporter.weights import Dense, LowBit, Weight
from targets.executorch_android import layout

Quantized = torch.ops.quantized_decomposed
Llama = torch.ops.llama


class ExportOps(TorchOps):
    """The verbs as they are traced. Constants and caches are buffers of `store`, made when a first, eager call asks.

    Norms and rotations are said with multiplications by constant matrices (1/n, a signed permutation), because XNNPACK
    takes those at any number of tokens, where a mean, a slice or a layer norm would split the delegate.

    Args:
        model: With the weights that the plan stores.
        context: Positions in the caches.
        tied: Sites that are looked up and multiply.
    """

    def __init__(self, model: Model, context: int, tied: set[str]) -> None:
        super().__init__(model)
        self.context, self.tied, self.store = context, tied, nn.Module()
        self._names: dict[tuple[object, ...], str] = {}
        self._kept: list[object] = []  # weights whose ids are keys
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}  # cosines and sines of a call, by head_dim
        self._rows: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # values of a call, and these in int8

    def start(self, position: Tensor | None, tokens: int) -> None:
        """Begin a call.

        Args:
            position: [1], int64: position of the first token; None where every call is a whole text.
            tokens: Tokens of this call.
        """
        first: Any = 0 if position is None else position[0].item()  # a number that torch.export does not know
        if position is not None:
            torch._check(first >= 0)  # type: ignore[no-untyped-call]
            torch._check(first + tokens <= self.context)  # type: ignore[no-untyped-call]
        self._first, self._position, self._tokens = first, position, tokens
        self._tables = {}
        self._rows = {}

    def constant(self, make: Callable[[], Tensor], *key: object) -> Tensor:
        """A buffer by key, made once."""
        if key not in self._names:
            name = f"c{len(self._names)}"
            self._names[key] = name
            self.store.register_buffer(name, make().detach().clone().contiguous())
        return self.store.get_buffer(self._names[key])

    def part(self, weight: Weight | Tensor, what: str, make: Callable[[], Tensor]) -> Tensor:
        """A buffer made of a weight, or of labels."""
        self._kept.append(weight)
        return self.constant(make, id(weight), what)

    # ---- matrices ---------------------------------------------------------------------------------------------

    def embedding(self, ids: Tensor, site: str) -> Tensor:
        weight = self.model.weights[site]
        if isinstance(weight, LowBit) and site in self.tied and layout.is_shareable(weight):
            return self._shared_lookup(ids, weight)
        if isinstance(weight, LowBit):
            packed = self.part(weight, "packed", lambda: layout.packed_for_lookup(weight))
            return self._quantized_lookup(ids, weight, packed)
        return F.embedding(ids, self.part(weight, "dense", weight.dense))

    def position_embedding(self, ids: Tensor, site: str, offset: int) -> Tensor:
        counts = self.constant(lambda: torch.arange(self.context), "positions")
        positions = counts.narrow(0, 0, self._tokens) + offset
        positions = positions if self._position is None else positions + self._position
        return self.embedding(positions.view(1, -1), site)

    def _shared_lookup(self, ids: Tensor, weight: LowBit) -> Tensor:
        """Look rows up in XNNPACK's own bytes: at 4 bits, the kernel reads each pair of columns the other way round."""
        packed = self.part(weight, "packed", lambda: layout.shared_codes(weight))
        rows = self._quantized_lookup(ids, weight, packed)
        if weight.bits == 8:
            return rows
        swapped = self.constant(lambda: torch.arange(weight.shape[1]) ^ 1, "swapped", weight.shape[1])
        return rows.index_select(-1, swapped)

    def _quantized_lookup(self, ids: Tensor, weight: LowBit, packed: Tensor) -> Tensor:
        grid, around = layout.lookup_scales(weight)
        scales = self.part(weight, "lookup scales", lambda: grid)
        zeros = None if around is None else self.part(weight, "lookup zeros", lambda: around)
        operator = {2: Quantized.embedding_2bit, 4: Quantized.embedding_4bit, 8: Quantized.embedding_byte}[weight.bits]
        low, high = -(2 ** (weight.bits - 1)), 2 ** (weight.bits - 1) - 1
        rows: Tensor = operator.dtype(packed, scales, zeros, low, high, ids, dtype=torch.float32)
        return rows

    def linear(self, x: Tensor, site: str) -> Tensor:
        weight, name = self.model.weights[site], f"{site}.bias"
        if isinstance(weight, Dense) and site in self.tied:
            return self._through_embedding(x, weight)
        if name in self.model.tensors and isinstance(weight, Dense | LowBit):
            return self._leaf(x, weight, self.tensor(name))
        return super().linear(x, site)

    def _through_embedding(self, x: Tensor, weight: Dense) -> Tensor:
        """Multiply with the constant that the lookup reads. XNNPACK would copy it; matrix first, it is left alone."""
        table = self.part(weight, "dense", weight.dense)
        columns = x.view(-1, weight.shape[1]).t()  # [hidden, tokens]
        return torch.mm(table, columns).t().unsqueeze(0)

    def leaf(self, x: Tensor, weight: Leaf, site: str) -> Tensor:
        return self._leaf(x, weight, None)

    def _leaf(self, x: Tensor, weight: Leaf, bias: Tensor | None) -> Tensor:
        if isinstance(weight, LowBit):
            return self._quantized_linear(x, weight, bias)
        return F.linear(x, self.part(weight, "dense", weight.dense), bias)

    def _quantized_linear(self, x: Tensor, weight: LowBit, bias: Tensor | None) -> Tensor:
        """The pattern that XNNPACK takes as one operator: int8 rows of x, codes of the weight, float32 out."""
        missing = layout.padded_width(weight) - weight.shape[1]
        x = self._rounded(x, missing)
        codes = self.part(weight, "codes", lambda: layout.signed_codes(weight))
        scales = self.part(weight, "scales", lambda: layout.stored_scales(weight))
        low, high = -(2 ** (weight.bits - 1)), 2 ** (weight.bits - 1) - 1
        if layout.is_row_wise(weight):
            zeros = self.constant(lambda: torch.zeros(weight.shape[0], dtype=torch.int64), "zeros", weight.shape[0])
            matrix = Quantized.dequantize_per_channel(codes, scales, zeros, 0, low, high, torch.int8)
        else:
            grid = tuple(weight.scales.shape)
            zeros = self.constant(lambda: torch.zeros(grid, dtype=torch.int8), "zeros", grid)
            matrix = Quantized.dequantize_per_channel_group(
                codes, scales, zeros, low, high, torch.int8, weight.group, torch.float32
            )
        return F.linear(x, matrix, bias)

    def _rounded(self, x: Tensor, missing: int) -> Tensor:
        """Rows in int8, zeros after them; a value is rounded once for all its linears (q, k and v; gate and up)."""
        key = id(x), missing
        if key not in self._rows:
            self._rows[key] = x, quantized_rows(F.pad(x, (0, missing)) if missing else x)
        return self._rows[key][1]

    # ---- vectors ----------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        return self.constant(lambda: self.model.tensors[name].float(), name)

    def _mean(self, x: Tensor, plus: float = 0.0) -> Tensor:
        """The mean over the channels, kept as one channel, plus a constant: [..., n] to [..., 1]."""
        width = x.shape[-1]
        row = self.constant(lambda: mean_row(width), "mean", width)
        return F.linear(x, row, self.constant(lambda: torch.full((1,), plus), "plus", plus) if plus else None)

    def rms_norm(self, x: Tensor, site: str, heads: int = 1) -> Tensor:
        parts = x.view(1, -1, heads, x.shape[-1] // heads) if heads > 1 else x
        scale = torch.rsqrt(self._mean(parts * parts, self.model.architecture.norm_eps))
        normed = parts * scale * self.tensor(f"{site}.weight")
        return normed.view(1, -1, x.shape[-1]) if heads > 1 else normed

    def layer_norm(self, x: Tensor, site: str, eps: float | None = None) -> Tensor:
        centred = x - self._mean(x)
        eps = self.model.architecture.norm_eps if eps is None else eps
        scale = torch.rsqrt(self._mean(centred * centred, eps))
        return centred * scale * self.tensor(f"{site}.weight") + self.tensor(f"{site}.bias")

    def activation(self, x: Tensor, name: str) -> Tensor:
        if name == "gelu_tanh":  # XNNPACK's gelu is the exact one, and its partitioner gives it this one too
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
        return super().activation(x, name)

    def take(self, x: Tensor, labels: Tensor) -> Tensor:
        return x.index_select(-1, self.part(labels, "labels", lambda: labels.to(torch.int32)))

    # ---- attention --------------------------------------------------------------------------------------------

    def cached_attention(self, q: Tensor, k: Tensor, v: Tensor, layer: int, spec: AttentionSpec) -> Tensor:
        width = max(spec.head_dim, spec.value_dim)  # custom_sdpa wants one head size, and is wrong without it
        q = _widened(self.rotate(_heads(q, spec.heads), spec), width)
        k = _widened(self.rotate(_heads(k, spec.kv_heads), spec), width)
        v = _widened(_heads(v, spec.kv_heads), width)  # all [1, tokens, heads, width]
        attend = self._attend if spec.causal else self._attend_to_all
        attended = attend(q, k, v, layer, spec.scale)
        attended = attended[..., : spec.value_dim] if width > spec.value_dim else attended
        return attended.reshape(1, -1, spec.heads * spec.value_dim)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        keys, values = self._caches(layer, k.shape[2], k.shape[3])
        if not torch.compiler.is_exporting():
            return q  # buffers are being made: any value of this shape will do
        Llama.update_cache(k, keys, self._first)
        Llama.update_cache(v, values, self._first)
        attended: Tensor = Llama.custom_sdpa(q, keys, values, self._first, None, 0.0, True, scale)
        return attended

    def _attend_to_all(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """The same operator without mask and cache: its keys are those of this call."""
        if not torch.compiler.is_exporting():
            return q
        attended: Tensor = Llama.custom_sdpa(q, k, v, 0, None, 0.0, False, scale)
        return attended

    def _caches(self, layer: int, heads: int, width: int) -> tuple[Tensor, Tensor]:
        shape = (1, self.context, heads, width)
        keys = self.constant(lambda: torch.zeros(shape), "keys", layer)
        return keys, self.constant(lambda: torch.zeros(shape), "values", layer)

    def rotate(self, x: Tensor, spec: AttentionSpec) -> Tensor:
        """Turn each head of x [1, tokens, heads, head_dim] by its position."""
        if spec.rope is None:
            return x
        cos, sin = self._turns_now(spec)
        quarter = self.constant(lambda: quarter_turn(spec.head_dim), "quarter turn", spec.head_dim)
        return x * cos + F.linear(x, quarter) * sin

    def _turns_now(self, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Cosines and sines of this call's positions, each [tokens, 1, head_dim]."""
        width, rope = spec.head_dim, spec.rope
        assert rope is not None
        if width not in self._tables:
            cos = self.constant(lambda: rope.table(width, self.context)[0], "cos", width)
            sin = self.constant(lambda: rope.table(width, self.context)[1], "sin", width)
            self._tables[width] = self._here(cos), self._here(sin)
        return self._tables[width]

    def _here(self, table: Tensor) -> Tensor:
        """Rows of this call's positions, for both halves of a head: [context, dim / 2] to [tokens, 1, dim]."""
        rows = table.narrow(0, self._first, self._tokens)
        return torch.cat((rows, rows), dim=-1).unsqueeze(1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[1, tokens, heads * dim] to [1, tokens, heads, dim]; -1, because XNNPACK takes one unknown size, unnamed."""
    return x.view(1, -1, heads, x.shape[-1] // heads)


def _widened(x: Tensor, width: int) -> Tensor:
    """Zeros after the channels of each head: exact, for keys and queries as for values."""
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def mean_row(width: int) -> Tensor:
    """The matrix [1, width] that takes channels to their mean."""
    return torch.full((1, width), 1.0 / width)


def quarter_turn(width: int) -> Tensor:
    """The matrix [width, width] that takes (a, b) to (-b, a), by halves."""
    half = torch.eye(width // 2)
    zero = torch.zeros_like(half)
    return torch.cat((torch.cat((zero, -half), 1), torch.cat((half, zero), 1)), 0)


def quantized_rows(x: Tensor) -> Tensor:
    """Rows rounded to int8 around a zero point of their own, as XNNPACK does it at run time."""
    scales, zeros = Quantized.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = Quantized.quantize_per_token(x, scales, zeros, -128, 127, torch.int8)
    rounded: Tensor = Quantized.dequantize_per_token(codes, scales, zeros, -128, 127, torch.int8, torch.float32)
    return rounded
