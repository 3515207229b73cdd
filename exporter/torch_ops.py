"""Eager torch: the oracle, and the base of every implementation that runs in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.errors import PocketError
from exporter.model import Model, Rope
from exporter.ops import AttentionSpec, Leaf, Ops
from exporter.weights import Weight

SMALL_MODEL = 50_000_000  # parameters; below, a token's work does not pay for a second thread

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class TorchOps(Ops[Tensor]):
    """The verbs in eager torch, in any float type, with a growing cache of keys and values.

    Args:
        model: Its weights are decoded when first used, and kept decoded.
        dtype: Of every value; float64 makes it the slow oracle.
        device: Where it runs.
    """

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__(model)
        self.dtype, self.device = dtype, device
        self._decoded: dict[int, tuple[Weight, Tensor]] = {}  # the weight is kept so that its id stays its own
        self._rotations: dict[tuple[Rope, int], tuple[Tensor, Tensor]] = {}  # cosines and sines by head_dim
        self.reset()

    def reset(self) -> None:
        """Forget the cache: the next token is the first."""
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._start = 0  # position of the first token of the call under way

    def begin(self) -> None:
        """Start a call: its tokens follow those that the cache holds."""
        self._start = next(iter(self._cache.values()))[0].shape[2] if self._cache else 0

    def matrix(self, weight: Weight) -> Tensor:
        """A weight as floats, decoded once."""
        if id(weight) not in self._decoded:
            self._decoded[id(weight)] = weight, weight.dense(self.dtype).to(self.device)
        return self._decoded[id(weight)][1]

    def tensor(self, name: str) -> Tensor:
        """A norm or bias by its full name, in this type, on this device."""
        return self.model.tensors[name].to(self.device, self.dtype)

    def embedding(self, ids: Tensor, site: str) -> Tensor:
        return F.embedding(ids, self.matrix(self.model.weights[site]))

    def position_embedding(self, ids: Tensor, site: str, offset: int) -> Tensor:
        positions = torch.arange(ids.shape[1], device=self.device) + self._start + offset
        return self.embedding(positions.expand_as(ids), site)

    def leaf(self, x: Tensor, weight: Leaf, site: str) -> Tensor:
        return F.linear(x, self.matrix(weight))

    def bias(self, x: Tensor, name: str) -> Tensor:
        return x + self.tensor(name)

    def rms_norm(self, x: Tensor, site: str, heads: int = 1) -> Tensor:
        parts = split_heads(x, heads)  # [batch, tokens, heads, channels / heads]
        scale = torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + self.model.architecture.norm_eps)
        return (parts * scale * self.tensor(f"{site}.weight")).flatten(-2)

    def layer_norm(self, x: Tensor, site: str, eps: float | None = None) -> Tensor:
        weight, bias = self.tensor(f"{site}.weight"), self.tensor(f"{site}.bias")
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self.model.architecture.norm_eps if eps is None else eps)

    def activation(self, x: Tensor, name: str) -> Tensor:
        return ACTIVATIONS[name](x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def take(self, x: Tensor, labels: Tensor) -> Tensor:
        return x.index_select(-1, labels.to(self.device))

    def cached_attention(self, q: Tensor, k: Tensor, v: Tensor, layer: int, spec: AttentionSpec) -> Tensor:
        q, k = self.rotate(heads_first(q, spec.heads), spec), self.rotate(heads_first(k, spec.kv_heads), spec)
        v = heads_first(v, spec.kv_heads)
        if spec.causal:
            k, v = self._append(layer, k, v)  # [batch, kv_heads, past + tokens, dim]
        width = max(spec.head_dim, spec.value_dim)  # of other widths, torch would form all attention weights
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self._visible(q.shape[2]) if spec.causal and self._start else None,
            is_causal=spec.causal and not self._start,
            scale=spec.scale,
            enable_gqa=spec.heads > spec.kv_heads,
        )  # [batch, heads, tokens, width]
        return attended[..., : spec.value_dim].transpose(1, 2).flatten(-2)

    def rotate(self, x: Tensor, spec: AttentionSpec) -> Tensor:
        """Turn each head of x [batch, heads, tokens, head_dim] by its position."""
        if spec.rope is None:
            return x
        cos, sin = self._turns(spec.rope, spec.head_dim, self._start + x.shape[2])
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def _turns(self, rope: Rope, head_dim: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines from the first position of the call up to `stop`, each [tokens, head_dim]."""
        key = rope, head_dim
        if key not in self._rotations or len(self._rotations[key][0]) < stop:
            table = rope.table(head_dim, 1 << (stop - 1).bit_length())  # float32 whatever the type; seldom made anew
            cos, sin = (part.to(self.device, self.dtype).repeat(1, 2) for part in table)
            self._rotations[key] = cos, sin
        cos, sin = self._rotations[key]
        return cos[self._start : stop], sin[self._start : stop]

    def _visible(self, tokens: int) -> Tensor | None:
        """Which positions the tokens of a call see behind a cache, [tokens, past + tokens]; None where all."""
        if tokens == 1:
            return None
        everything = torch.ones(tokens, self._start + tokens, dtype=torch.bool, device=self.device)
        return everything.tril(self._start)

    def patches(self, pixels: Tensor, size: int) -> Tensor:
        return F.unfold(pixels.to(self.device, self.dtype), size, stride=size).transpose(1, 2)

    def prepend(self, x: Tensor, name: str) -> Tensor:
        return torch.cat((self.tensor(name).expand(x.shape[0], 1, -1), x), dim=1)

    def add_rows(self, x: Tensor, site: str) -> Tensor:
        return x + self.matrix(self.model.weights[site])

    def skip(self, x: Tensor, tokens: int) -> Tensor:
        return x[:, tokens:]

    def merge_pictures(self, x: Tensor, ids: Tensor, seen: Tensor, token: int) -> Tensor:
        places = ids == token
        wrong = places.sum(1)[places.sum(1) != seen.shape[1]]  # texts whose picture has another number of places
        if len(wrong):
            raise PocketError(f"a text has {int(wrong[0])} image tokens; its picture takes {seen.shape[1]}")
        return x.masked_scatter(places.unsqueeze(-1), seen)

    def _append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past = self._cache.get(layer)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        self._cache[layer] = k, v
        return k, v


@contextmanager
def fitting_threads(parameters: int) -> Iterator[None]:
    """One thread for a small model: where cores are shared, starting more costs each tiny operation milliseconds.

    Seen on two busy cores: 64 tokens of a 260 K model took 0.12 s with one thread and 12 s with two.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if parameters < SMALL_MODEL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads * dim] to [batch, heads, tokens, dim]."""
    return split_heads(x, heads).transpose(1, 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads * dim] to [batch, tokens, heads, dim]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
