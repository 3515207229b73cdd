"""Which matrices a model looks rows up in, and which it multiplies with: found by saying the model without numbers."""

from __future__ import annotations

from torch import Tensor

from exporter import adapters
from exporter.model import Model
from exporter.ops import AttentionSpec, Leaf, Ops


class Uses(Ops[None]):
    """Verbs that compute nothing and remember sites.

    Attributes:
        lookups: Sites whose rows are looked up.
        products: Sites that multiply; a tied head is in both.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.lookups: set[str] = set()
        self.products: set[str] = set()
        adapters.logits(adapters.find(model.architecture.family), self, None)

    @property
    def tied(self) -> set[str]:
        """Sites that are both."""
        return self.lookups & self.products

    def embedding(self, ids: None, site: str) -> None:
        self.lookups.add(site)

    def position_embedding(self, ids: None, site: str, offset: int) -> None:
        self.lookups.add(site)

    def linear(self, x: None, site: str) -> None:
        self.products.add(site)

    def leaf(self, x: None, weight: Leaf, site: str) -> None: ...

    def bias(self, x: None, name: str) -> None: ...

    def rms_norm(self, x: None, site: str, heads: int = 1) -> None: ...

    def layer_norm(self, x: None, site: str, eps: float | None = None) -> None: ...

    def activation(self, x: None, name: str) -> None: ...

    def add(self, x: None, y: None) -> None: ...

    def mul(self, x: None, y: None) -> None: ...

    def take(self, x: None, labels: Tensor) -> None: ...

    def cached_attention(self, q: None, k: None, v: None, layer: int, spec: AttentionSpec) -> None: ...
