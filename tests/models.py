"""Random models and random weight trees, drawn small: what property tests and the conformance suite run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from exporter import adapters
from exporter.model import Architecture, Layer, Model, Provenance, Rope
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, Weight

LLAMA = Architecture(
    family="llama", vocab=96, hidden=64, positions=64, layers=(Layer(4, 2, 16, 16, 96),), activation="silu",
    norm_eps=1e-5, rope=Rope(10000.0), tied=True, bos=1, eos=(2,),
)  # fmt: skip
OPT = replace(LLAMA, family="opt", layers=(Layer(4, 4, 16, 16, 96),), activation="relu", rope=None)
BERT = replace(
    OPT, family="bert", layers=(Layer(4, 4, 16, 16, 96),) * 2, activation="gelu", norm_eps=1e-12, causal=False
)


def random_model(architecture: Architecture, seed: int = 0, optional: Sequence[str] = ("bias",)) -> Model:
    """A model of random dense weights; optional tensors are there where their name ends in one of `optional`.

    Weights are as large as a trained model's: every matrix keeps the size of its input.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    shapes = adapters.find(architecture.family).shapes(architecture)
    weights: dict[str, Weight] = {site: Dense(normal(*s, scale=s[1] ** -0.5)) for site, s in shapes.weights.items()}
    tensors = {name: 1 + normal(n, scale=0.1) for name, n in shapes.tensors.items() if name.endswith("weight")}
    tensors |= {name: normal(n, scale=0.1) for name, n in shapes.tensors.items() if name.endswith("bias")}
    for name, n in shapes.optional.items():
        if name.endswith(tuple(optional)):
            tensors[name] = normal(n, scale=0.1) + (1 if name.endswith("norm.weight") else 0)
    model = Model(architecture, weights, tensors, Provenance("random", "0" * 64, 0))
    return replace(model, provenance=replace(model.provenance, parameters=model.parameters))


def random_unequal(
    drawn: Sequence[tuple[int, int, int, int, int]], family: str, hidden: int, optional: Sequence[str] = ("bias",)
) -> Model:
    """A random model of drawn widths: key-value heads, query heads to each (1 in an OPT), head_dim, value_dim, MLP."""
    base = LLAMA if family == "llama" else OPT
    layers = tuple(Layer(kv * (group if family == "llama" else 1), kv, dim, value, mlp)
                   for kv, group, dim, value, mlp in drawn)  # fmt: skip
    return random_model(replace(base, hidden=hidden, layers=layers), optional=optional)


def assert_same_shapes(promised: Model, made: Model) -> None:
    """A prediction has the widths of the result, its matrices and vectors the same shapes."""
    assert promised.architecture == made.architecture
    assert {s: w.shape for s, w in promised.weights.items()} == {s: w.shape for s, w in made.weights.items()}
    assert {n: t.shape for n, t in promised.tensors.items()} == {n: t.shape for n, t in made.tensors.items()}


def low_bit(shape: tuple[int, int], bits: int, group: int, symmetric: bool = True, seed: int = 0) -> LowBit:
    """Random codes with scales that keep the size of an input, exact in float16."""
    generator = torch.Generator().manual_seed(seed)
    out, columns = shape
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    spread = max(2**bits / 12**0.5, 0.5) * columns**0.5
    scales = ((0.5 + torch.rand(out, groups, generator=generator)) / spread).half().float()
    middle = torch.full((1, 1), 2.0 ** (bits - 1))
    zeros = middle if symmetric else torch.randint(0, 2**bits, (out, groups), generator=generator).float()
    return LowBit(codes, scales, zeros, bits, group)


def sparse(shape: tuple[int, int], n: int, m: int, bits: int | None = None, group: int = 16, seed: int = 0) -> Sparse:
    """Random n of m with dense or low-bit kept values."""
    generator = torch.Generator().manual_seed(seed)
    out, columns = shape
    kept_shape = (out, columns // m * n)
    order = torch.rand(out, columns // m, m, generator=generator).argsort(-1)[..., :n].sort(-1).values
    places = order.reshape(kept_shape).to(torch.uint8)
    dense = Dense(torch.randn(kept_shape, generator=generator) * kept_shape[1] ** -0.5)
    return Sparse(dense if bits is None else low_bit(kept_shape, bits, group, seed=seed), places, n, m)


def trees(shape: tuple[int, int]) -> dict[str, Weight]:
    """One tree of every kind, for a matrix whose width is a multiple of 32."""
    out, columns = shape
    generator = torch.Generator().manual_seed(1)

    def dense(*size: int) -> Dense:
        return Dense(torch.randn(*size, generator=generator) * size[1] ** -0.5)

    rank, clusters = max(out // 4, 1), max(out // 4, 1)
    labels = torch.randint(0, clusters, (out,), generator=generator)
    product = Product(dense(out, rank), dense(rank, columns))
    return {
        "dense": dense(out, columns),
        "4-bit": low_bit(shape, 4, 32),
        "4-bit a row": low_bit(shape, 4, columns),
        "4-bit zero points": low_bit(shape, 4, 32, symmetric=False),
        "8-bit a row": low_bit(shape, 8, columns),
        "8-bit": low_bit(shape, 8, 32),
        "3-bit": low_bit(shape, 3, 32),
        "2-bit": low_bit(shape, 2, 32),
        "1-bit": replace(low_bit(shape, 1, 32), zeros=torch.full((1, 1), 0.5)),
        "2:4": sparse(shape, 2, 4),
        "2:4 of 4-bit": sparse(shape, 2, 4, bits=4),
        "4:8 of 1-bit": sparse(shape, 4, 8, bits=1),
        "low rank": product,
        "shared": Shared(dense(clusters, columns), labels),
        "shared + low rank": Sum((Shared(low_bit((clusters, columns), 4, 32), labels), product)),
    }
