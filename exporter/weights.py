"""A weight matrix is a tree of six node types; its only meaning is the float matrix `.dense()`.

Compressors return trees. A target runs a tree's nodes natively, or says why not and stores the smallest equivalent.
All matrices are [out, in]. Nodes also live on torch's meta device, so that sizes are known without data.

    Dense(values)                              the matrix itself
    LowBit(codes, scales, zeros, bits, group)  scales * (codes - zeros), a group of columns at a time
    Sparse(kept, places, n, m)                 n of m kept along `in`; kept is itself a weight
    Shared(rows, labels)                       row i is rows[labels[i]]
    Product(left, right)                       low rank
    Sum(terms)                                 residuals, error compensation
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from exporter.errors import WeightError


@dataclass(frozen=True, eq=False)
class Packed:
    """Small integers as a file stores them.

    Args:
        stored: uint8, of the file's own layout.
        shape: Of the integers, [out, columns].
        unpack: Makes them, uint8, of `stored`.
    """

    stored: Tensor
    shape: tuple[int, int]
    unpack: Callable[[Tensor], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of the integers."""
        return torch.uint8


class _Integers:
    """A field of uint8 integers, held as they are or packed. Packed ones are unpacked anew at every look.

    So a model that lies in a file takes no memory for what nobody looks at.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, weight: object, owner: type) -> Tensor:
        held: Tensor | Packed = weight.__dict__[self._name]
        return held.unpack(held.stored) if isinstance(held, Packed) else held

    def __set__(self, weight: object, value: Tensor | Packed) -> None:
        weight.__dict__[self._name] = value


W = TypeVar("W")


def _may_be_packed(name: str) -> Callable[[type[W]], type[W]]:
    """A class whose field of that name may be given packed."""

    def decorate(kind: type[W]) -> type[W]:
        setattr(kind, name, _Integers(name))  # after the dataclass is made: it is no default
        return kind

    return decorate


def as_held(weight: LowBit | Sparse) -> Tensor | Packed:
    """The integers of a leaf, codes or places, without unpacking them."""
    held: Tensor | Packed = weight.__dict__["codes" if isinstance(weight, LowBit) else "places"]
    return held


@dataclass(frozen=True, eq=False)
class Dense:
    """A plain matrix.

    Args:
        values: [out, in], any float type.
    """

    values: Tensor

    def __post_init__(self) -> None:
        _require(self.values.ndim == 2, f"a dense weight has 2 dimensions, not {self.values.ndim}")
        _require(self.values.is_floating_point(), f"a dense weight is of a float type, not {self.values.dtype}")

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in."""
        return self.values.shape[0], self.values.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, [out, in]."""
        return self.values.to(dtype)


@_may_be_packed("codes")
@dataclass(frozen=True, eq=False)
class LowBit:
    """Small integers with a scale and a zero point per group of columns: `scales * (codes - zeros)`.

    Args:
        codes: [out, in], uint8, each under 2**bits; may be given packed.
        scales: [out, ceil(in / group)], float.
        zeros: [out, ceil(in / group)], or [1, 1] where one value serves all; float, may be fractional.
        bits: 1..8.
        group: Columns that share a scale, >= 1; the last group of a row may be shorter.
        fractional: Of a placeholder on the meta device, whose zero points nobody can look at: they lie between codes.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int
    fractional: bool = False

    def __post_init__(self) -> None:
        codes = as_held(self)
        _require(len(codes.shape) == 2, f"codes have 2 dimensions, not {len(codes.shape)}")
        _require(codes.dtype == torch.uint8, f"codes are uint8, not {codes.dtype}")
        _require(1 <= self.bits <= 8, f"{self.bits} bits is not a width; widths that are: 1 to 8")
        _require(self.group >= 1, f"a group of {self.group} columns is not possible; at least 1")
        grid = (self.shape[0], self.groups)
        _require(tuple(self.scales.shape) == grid, f"scales are {tuple(self.scales.shape)}, not {grid}")
        zeros = tuple(self.zeros.shape)
        _require(zeros in (grid, (1, 1)), f"zeros are {zeros}, neither {grid} nor (1, 1)")
        _require(self.scales.is_floating_point() and self.zeros.is_floating_point(), "scales and zeros are floats")
        if not isinstance(codes, Packed) and not codes.is_meta and codes.numel():  # packed ones have no more bits
            top = int(codes.max())
            _require(top < 2**self.bits, f"code {top} does not fit {self.bits} bits")

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in."""
        held = as_held(self)
        return held.shape[0], held.shape[1]

    @property
    def groups(self) -> int:
        """Groups in a row, the shorter last one included."""
        return -(-self.shape[1] // self.group)

    @property
    def is_symmetric(self) -> bool:
        """Whether one zero point, the middle code, serves all: such a zero point needs no storage."""
        middle = 2 ** (self.bits - 1)
        return self.zeros.shape == (1, 1) and (self.bits > 1 if self.zeros.is_meta else float(self.zeros) == middle)

    @property
    def has_whole_zeros(self) -> bool:
        """Whether every zero point is itself a code, so that it packs like one.

        On the meta device they are what the placeholder says; that of one bit lies between the two codes.
        """
        if self.zeros.is_meta:
            return self.bits > 1 and not self.fractional
        return bool(((self.zeros % 1 == 0) & (self.zeros >= 0) & (self.zeros < 2**self.bits)).all())

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, [out, in]."""
        return self._spread(self.scales.to(dtype)) * (self.codes.to(dtype) - self._spread(self.zeros.to(dtype)))

    def _spread(self, grid: Tensor) -> Tensor:
        """A value per group to a value per column: [out, groups] to [out, in]; [1, 1] serves all as it is."""
        one_serves_all = grid.shape == (1, 1)
        columns = self.shape[1]
        return grid if one_serves_all else grid.repeat_interleave(min(self.group, columns), dim=1)[:, :columns]


@_may_be_packed("places")
@dataclass(frozen=True, eq=False)
class Sparse:
    """N of M: of every m neighbours along `in`, n are kept.

    Args:
        kept: Weight of the kept values, [out, in * n / m], in column order.
        places: [out, in * n / m], uint8: where in its group of m each kept value stands, rising within a group;
            may be given packed.
        n: Kept in a group, 1 <= n <= m.
        m: Neighbours in a group, 2..16.
    """

    kept: Weight
    places: Tensor
    n: int
    m: int

    def __post_init__(self) -> None:
        _require(2 <= self.m <= 16 and 1 <= self.n <= self.m, f"{self.n}:{self.m} is not a sparsity")
        places = self.places
        _require(tuple(places.shape) == self.kept.shape, "places and kept values differ in shape")
        _require(places.dtype == torch.uint8, f"places are uint8, not {places.dtype}")
        _require(self.kept.shape[1] % self.n == 0, f"{self.kept.shape[1]} kept columns are no multiple of {self.n}")
        if not places.is_meta and places.numel():
            groups = places.view(places.shape[0], -1, self.n).to(torch.int16)
            rising = bool((groups.diff(dim=-1) > 0).all())
            _require(rising and int(groups.max()) < self.m, f"places must rise within a group and stay under {self.m}")

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in."""
        return self.kept.shape[0], self.kept.shape[1] // self.n * self.m

    @property
    def columns(self) -> Tensor:
        """[out, kept], int64: the column of each kept value in the full matrix."""
        places = self.places
        group = torch.arange(places.shape[1], device=places.device) // self.n
        return places.long() + group * self.m

    @property
    def mask(self) -> Tensor:
        """[out, in], bool: where values are kept."""
        return torch.zeros(self.shape, dtype=torch.bool).scatter_(1, self.columns, True)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, [out, in], exactly 0 where nothing is kept."""
        kept = self.kept.dense(dtype)
        return torch.zeros(self.shape, dtype=dtype, device=kept.device).scatter_(1, self.columns, kept)


@dataclass(frozen=True, eq=False)
class Shared:
    """Rows that stand for several rows: row i is `rows[labels[i]]`.

    Args:
        rows: Weight, [clusters, in].
        labels: [out], int64, each under `clusters`.
    """

    rows: Weight
    labels: Tensor

    def __post_init__(self) -> None:
        _require(self.labels.ndim == 1 and self.labels.dtype == torch.int64, "labels are one row of int64")
        if not self.labels.is_meta and self.labels.numel():
            low, high = int(self.labels.min()), int(self.labels.max())
            fits = low >= 0 and high < self.rows.shape[0]
            _require(fits, f"labels run from {low} to {high}; there are {self.rows.shape[0]} rows")

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in."""
        return self.labels.shape[0], self.rows.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, [out, in]."""
        return self.rows.dense(dtype)[self.labels]


@dataclass(frozen=True, eq=False)
class Product:
    """Low rank: `left @ right`.

    Args:
        left: Weight, [out, rank].
        right: Weight, [rank, in].
    """

    left: Weight
    right: Weight

    def __post_init__(self) -> None:
        ranks = self.left.shape[1], self.right.shape[0]
        _require(ranks[0] == ranks[1], f"left has rank {ranks[0]}, right has rank {ranks[1]}")

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in."""
        return self.left.shape[0], self.right.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, [out, in]."""
        return self.left.dense(dtype) @ self.right.dense(dtype)


@dataclass(frozen=True, eq=False)
class Sum:
    """Matrices of one shape, added.

    Args:
        terms: One weight or more, each [out, in].
    """

    terms: tuple[Weight, ...]

    def __post_init__(self) -> None:
        shapes = {term.shape for term in self.terms}
        _require(len(shapes) == 1, f"a sum has terms of one shape, not {sorted(shapes)}")

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in."""
        return self.terms[0].shape

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, [out, in]."""
        return reduce(torch.add, (term.dense(dtype) for term in self.terms))


Weight = Dense | LowBit | Sparse | Shared | Product | Sum


def children(weight: Weight) -> tuple[Weight, ...]:
    """The weights directly under a node, in the order of its fields."""
    found: list[Weight] = []
    for field in fields(weight):
        value = weight.__dict__[field.name]  # a look at packed integers would unpack them
        found.extend([value] if isinstance(value, Weight) else value if isinstance(value, tuple) else [])
    return tuple(found)


def nodes(weight: Weight) -> Iterator[Weight]:
    """Every node of a tree, the root first."""
    yield weight
    for child in children(weight):
        yield from nodes(child)


def to_meta(weight: Weight) -> Weight:
    """The same tree without its values: on the meta device, where sizes are known and nothing is stored."""
    changed: dict[str, Any] = {}
    for field in fields(weight):
        value = weight.__dict__[field.name]
        if isinstance(value, Tensor):
            changed[field.name] = value.to("meta")
        elif isinstance(value, Packed):
            changed[field.name] = torch.empty(value.shape, dtype=torch.uint8, device="meta")
        elif isinstance(value, Weight):
            changed[field.name] = to_meta(value)
        elif isinstance(value, tuple):
            changed[field.name] = tuple(to_meta(term) for term in value)
    if isinstance(weight, LowBit):
        changed["fractional"] = not weight.has_whole_zeros
    return replace(weight, **changed)


def describe(weight: Weight) -> str:
    """A tree in one short phrase, e.g. `2:4 of 4-bit group 32`."""
    match weight:
        case Dense():
            return str(weight.values.dtype).removeprefix("torch.")
        case LowBit():
            has_zero_points = weight.zeros.shape != (1, 1)
            return f"{weight.bits}-bit group {weight.group}" + (" with zero points" if has_zero_points else "")
        case Sparse():
            return f"{weight.n}:{weight.m} of {describe(weight.kept)}"
        case Shared():
            return f"{weight.rows.shape[0]} shared rows of {describe(weight.rows)}"
        case Product():
            return f"rank {weight.left.shape[1]} ({describe(weight.left)} x {describe(weight.right)})"
        case Sum():
            return " + ".join(describe(term) for term in weight.terms)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise WeightError(message)
