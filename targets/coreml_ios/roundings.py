"""How often a value is rounded to float16 on the longest way to it: the verbs once more, over whole numbers."""

from __future__ import annotations

from functools import reduce

from torch import Tensor

from exporter import adapters
from exporter.model import Model
from exporter.ops import AttentionSpec, Leaf, Ops
from exporter.weights import Product, Shared, Sum, Weight

PRODUCT = 2  # its constant was rounded, and its result is
NORM = 6 + PRODUCT  # x / m, its square, the mean, the sum with epsilon, the root, x / m times that; then the weights
TURN = 1 + PRODUCT  # by a cosine, and the sum with what is turned by a sine


def count(model: Model) -> int:
    """Roundings on the longest way from tokens to the result.

    Args:
        model: With the weights that are stored.
    """
    return adapters.logits(adapters.find(model.architecture.family), Roundings(model), 0)


class Roundings(Ops[int]):
    """Verbs whose values are numbers of roundings; what an operation does inside is not rounded."""

    def embedding(self, ids: int, site: str) -> int:
        return ids + self.rows(self.model.weights[site])

    def position_embedding(self, ids: int, site: str, offset: int) -> int:
        return self.embedding(ids, site)

    def rows(self, weight: Weight) -> int:
        """A tree's rows: a leaf's were rounded when they were stored."""
        match weight:
            case Sum():
                return reduce(self.add, (self.rows(term) for term in weight.terms))
            case Product():
                return self.rows(weight.left) + self.rows(weight.right) + 1
            case Shared():
                return self.rows(weight.rows)
            case _:
                return 1

    def linear(self, x: int, site: str) -> int:
        weight = self.model.weights[site]
        return super().linear(x, site) if isinstance(weight, Sum | Product | Shared) else self.leaf(x, weight, site)

    def leaf(self, x: int, weight: Leaf, site: str) -> int:
        return x + PRODUCT

    def bias(self, x: int, name: str) -> int:
        return x + 1

    def rms_norm(self, x: int, site: str, heads: int = 1) -> int:
        return x + NORM

    def layer_norm(self, x: int, site: str, eps: float | None = None) -> int:
        return x + PRODUCT

    def activation(self, x: int, name: str) -> int:
        return x if name == "relu" else x + 1

    def add(self, x: int, y: int) -> int:
        return max(x, y) + 1

    def mul(self, x: int, y: int) -> int:
        return max(x, y) + 1

    def take(self, x: int, labels: Tensor) -> int:
        return x

    def cached_attention(self, q: int, k: int, v: int, layer: int, spec: AttentionSpec) -> int:
        return max(max(q, k) + (TURN if spec.rope else 0), v) + 1
