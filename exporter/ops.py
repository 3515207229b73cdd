"""The verbs that a model is written in, and the recursion of `linear` over a weight tree.

An adapter says a model family in these verbs; a target is a subclass that implements the abstract ones (torch is one
of the targets). Composites have defaults made of the primitives; a target overrides one where it can fuse.

Verbs take sites, the checkpoint's own names; the instance holds the model, so that a calibrating, an eager and an
exporting implementation see the same names. Activations are [batch, tokens, channels].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, TypeVar, assert_never

from torch import Tensor

from exporter.errors import TargetError
from exporter.model import Model, Rope
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, Weight

T = TypeVar("T")

Leaf = Dense | LowBit | Sparse
HEARD = (
    "embedding", "position_embedding", "linear", "rms_norm", "layer_norm", "activation", "add", "mul",
    "cached_attention",
)  # fmt: skip


@dataclass(frozen=True)
class AttentionSpec:
    """Widths and constants of one layer's attention.

    Args:
        heads, kv_heads: Query heads; key and value heads, which divide them (grouped-query attention).
        head_dim, value_dim: Channels of a query or key head; of a value head.
        scale: Multiplies the logits.
        rope: Rotary embedding of queries and keys, or None.
        causal: A token sees itself and those before it, through the cache; False: all see all, nothing is cached.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    rope: Rope | None
    causal: bool = True


@dataclass(frozen=True)
class AttentionSites:
    """Sites of one layer's attention; `q_norm` and `k_norm` only where heads are normalised."""

    q: str
    k: str
    v: str
    o: str
    q_norm: str | None = None
    k_norm: str | None = None


@dataclass(frozen=True)
class MlpSites:
    """Sites of one layer's MLP; `gate` is None where there is no gate."""

    gate: str | None
    up: str
    down: str


class Ops(ABC, Generic[T]):
    """What a target must be able to say. `T` is its value: a torch tensor, an ONNX value, a MIL variable."""

    def __init__(self, model: Model) -> None:
        self.model = model

    # ---- primitives -------------------------------------------------------------------------------------------

    @abstractmethod
    def embedding(self, ids: T, site: str) -> T:
        """Rows of a site's matrix: ids [batch, tokens] to [batch, tokens, hidden]."""

    @abstractmethod
    def position_embedding(self, ids: T, site: str, offset: int) -> T:
        """Rows of a site's matrix at the positions of `ids`, counted on from the cache, plus `offset`."""

    @abstractmethod
    def leaf(self, x: T, weight: Leaf, site: str) -> T:
        """`x @ weight.dense().T`, without bias. `site` is for names and decisions."""

    @abstractmethod
    def bias(self, x: T, name: str) -> T:
        """`x` plus a tensor of the model, by its full name, along the channels."""

    @abstractmethod
    def rms_norm(self, x: T, site: str, heads: int = 1) -> T:
        """`x / sqrt(mean(x^2) + eps) * w`, over the channels, or over each of `heads` equal parts of them."""

    @abstractmethod
    def layer_norm(self, x: T, site: str, eps: float | None = None) -> T:
        """`(x - mean) / sqrt(var + eps) * w + b`, over the channels; without `eps`, the architecture's."""

    @abstractmethod
    def activation(self, x: T, name: str) -> T:
        """`silu`, `gelu` (exact), `gelu_tanh` or `relu`; of a vision tower `x * sigmoid(1.702 x)` too, `quick_gelu`."""

    @abstractmethod
    def add(self, x: T, y: T) -> T:
        """Sum of two values of one shape."""

    @abstractmethod
    def mul(self, x: T, y: T) -> T:
        """Product of two values of one shape."""

    @abstractmethod
    def take(self, x: T, labels: Tensor) -> T:
        """Channels of `x` by a constant index: [..., clusters] to [..., len(labels)]."""

    @abstractmethod
    def cached_attention(self, q: T, k: T, v: T, layer: int, spec: AttentionSpec) -> T:
        """Turn q and k by their positions (`spec.rope`), append k and v to the layer's cache, attend causally.

        q is [batch, tokens, heads * head_dim], k [.., kv_heads * head_dim], v [.., kv_heads * value_dim]; the result
        [batch, tokens, heads * value_dim]. Query head h reads key and value head h // (heads / kv_heads).
        """

    # ---- pictures: only an implementation that is shown any says these ------------------------------------------

    def patches(self, pixels: T, size: int) -> T:
        """Pixels [batch, channels, height, width] to patches [batch, count, channels * size^2], row by row."""
        raise _no_pictures(self)

    def prepend(self, x: T, name: str) -> T:
        """`x` with one more token before it: a tensor of the model, by its full name."""
        raise _no_pictures(self)

    def add_rows(self, x: T, site: str) -> T:
        """`x` [batch, tokens, channels] plus a site's matrix, which has a row a token."""
        raise _no_pictures(self)

    def skip(self, x: T, tokens: int) -> T:
        """`x` without its first tokens."""
        raise _no_pictures(self)

    def merge_pictures(self, x: T, ids: T, seen: T, token: int) -> T:
        """`x` with what is seen [batch, places, channels] in place of the rows where `ids` are `token`, in order."""
        raise _no_pictures(self)

    # ---- composites -------------------------------------------------------------------------------------------

    def linear(self, x: T, site: str) -> T:
        """A site's matrix, whatever its tree, and its bias where the model has one."""
        y = self.tree(x, self.model.weights[site], site)
        name = f"{site}.bias"
        return self.bias(y, name) if name in self.model.tensors else y

    def tree(self, x: T, weight: Weight, site: str) -> T:
        """`x @ weight.dense().T` by recursion: sums add, products chain, shared rows are taken, leaves are leaves."""
        match weight:
            case Sum():
                return reduce(self.add, (self.tree(x, term, site) for term in weight.terms))
            case Product():
                return self.tree(self.tree(x, weight.right, site), weight.left, site)
            case Shared():
                return self.take(self.tree(x, weight.rows, site), weight.labels)
            case Dense() | LowBit() | Sparse():
                return self.leaf(x, weight, site)
            case _:
                assert_never(weight)

    def attention(self, x: T, sites: AttentionSites, layer: int, spec: AttentionSpec) -> T:
        """Self-attention with its four matrices; a target may pack q, k and v."""
        q, k, v = self.linear(x, sites.q), self.linear(x, sites.k), self.linear(x, sites.v)
        q = self.rms_norm(q, sites.q_norm, spec.heads) if sites.q_norm else q
        k = self.rms_norm(k, sites.k_norm, spec.kv_heads) if sites.k_norm else k
        return self.linear(self.cached_attention(q, k, v, layer, spec), sites.o)

    def mlp(self, x: T, sites: MlpSites, activation: str) -> T:
        """`down(act(gate x) * up x)`, or `down(act(up x))` where there is no gate."""
        up = self.linear(x, sites.up)
        if sites.gate is None:
            return self.linear(self.activation(up, activation), sites.down)
        gate = self.activation(self.linear(x, sites.gate), activation)
        return self.linear(self.mul(gate, up), sites.down)


def listen(ops: Ops[T], heard: Callable[[str, T], None]) -> None:
    """Have every value told that a model's verbs give, with the verb and its site: `linear model.layers.0.mlp.up_proj`.

    A model says the same verbs in the same order to every implementation, so the n-th value of one is that of another.
    What a verb says in turn, to compute its value, is an implementation's own affair, and not told.

    Args:
        ops: From now on it is listened to.
        heard: Called with each verb and its value.
    """
    depth = 0

    def told(verb: str) -> Callable[..., T]:
        say = getattr(ops, verb)

        def saying(*args: Any, **options: Any) -> T:
            nonlocal depth
            depth += 1
            value: T = say(*args, **options)
            depth -= 1
            if depth == 0:
                heard(" ".join((verb, *(arg for arg in args if isinstance(arg, str)))), value)
            return value

        return saying

    for verb in HEARD:
        setattr(ops, verb, told(verb))


def _no_pictures(ops: Ops[T]) -> TargetError:
    return TargetError(f"{type(ops).__name__} shows no pictures; run the model in torch, or export one that only reads")
