"""Torch on exactly the numbers that a package stores: what its program must say, but for the last bits of float32."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from exporter.model import Model, Rope
from exporter.ops import Leaf
from exporter.torch_ops import TorchOps
from exporter.weights import Dense, Product, Shared, Sum, Weight
from targets.coreml_ios.ops import stored_epsilon, stored_root


class StoredOps(TorchOps):
    """The verbs in torch with each constant rounded to float16, as the package holds it, and nothing else rounded.

    Args:
        model: With the weights that the plan stores.
        dtype: Of every value.
        noise: Relative deviation of what each matrix is given, to see what becomes of last bits.
    """

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32, noise: float = 0.0) -> None:
        self._eps = model.architecture.norm_eps
        self._noise, self._random = noise, torch.Generator().manual_seed(0)
        root = float(stored_root(self._eps)[0])
        architecture = replace(model.architecture, norm_eps=root * root)
        weights = {site: _stored(weight) for site, weight in model.weights.items()}
        tensors = {name: tensor.half() for name, tensor in model.tensors.items()}
        super().__init__(replace(model, architecture=architecture, weights=weights, tensors=tensors), dtype)

    def leaf(self, x: Tensor, weight: Leaf, site: str) -> Tensor:
        if self._noise:
            x = x * (1 + self._noise * torch.randn(x.shape, dtype=x.dtype, generator=self._random))
        return super().leaf(x, weight, site)

    def layer_norm(self, x: Tensor, site: str, eps: float | None = None) -> Tensor:
        return super().layer_norm(x, site, float(stored_epsilon(self._eps if eps is None else eps)))

    def _turns(self, rope: Rope, head_dim: int, stop: int) -> tuple[Tensor, Tensor]:
        cos, sin = super()._turns(rope, head_dim, stop)
        return cos.half().to(self.dtype), sin.half().to(self.dtype)


def _stored(weight: Weight) -> Weight:
    """The tree with each leaf decoded, and rounded once."""
    match weight:
        case Sum():
            return Sum(tuple(_stored(term) for term in weight.terms))
        case Product():
            return Product(_stored(weight.left), _stored(weight.right))
        case Shared():
            return replace(weight, rows=_stored(weight.rows))
        case _:
            return Dense(weight.dense().half())
