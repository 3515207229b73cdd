"""Values while a program runs, and the rounding of a result to the type that the program declares for it.

Tensors are carried in three types, whatever they are declared as: float32 for every float, int32 for every integer
(Core ML computes with none that is wider), bool. So an operation computes in float32, and what it gives is rounded
once, to its declared type:

- fp16: to the nearest float16, ties to even; what is beyond 65504 becomes infinite,
- int8, uint8, int16, uint16: the low bits, as a conversion in C does,
- fp32, int32, bool: as they are,
- a float that becomes an integer: towards zero, first to the nearest int32 (as ARM's processors convert), and NaN to 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from exporter.errors import ArtifactError

LARGEST = 2**29  # values of one tensor: 2 GiB as float32
LONGEST = 2**20  # values of a parameter that is a list of numbers


@dataclass
class List:
    """A list of tensors, which control flow passes on and writes to.

    Args:
        items: The tensors; None where none was written yet.
        shape: Of an element, as far as it is known.
        is_dynamic: It grows where an item is written beyond its end.
        kind: MIL's name of the type of its elements' values.
    """

    items: list[Tensor | None] = field(default_factory=list)
    shape: tuple[int | None, ...] = ()
    is_dynamic: bool = True
    kind: str = "fp32"


Value = Any  # Tensor | str | list[str] | dict[str | int, float] | List | State | list[Value]


@dataclass(frozen=True)
class Declared:
    """What a program says of a value.

    Args:
        kind: MIL's name of the type of its elements (`fp16`, `int32`, ...), or `list`, `dictionary`, `state`.
        shape: Sizes; None for one that is known when the program runs.
    """

    kind: str
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True)
class State:
    """A state as an operation is given it: not its value, but which it is, and what the program says of it."""

    name: str
    declared: Declared


FLOATS = ("fp16", "fp32", "fp64")
CARRIED = {
    **dict.fromkeys(FLOATS, torch.float32), "bool": torch.bool,
    **dict.fromkeys(("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"), torch.int32),
    **dict.fromkeys(("int4", "uint1", "uint2", "uint3", "uint4", "uint6"), torch.int32),
}  # fmt: skip
_NARROW = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16}


def rounded(value: Tensor, kind: str, *, keep_float32: bool = False) -> Tensor:
    """A result in the type that is declared for it.

    Args:
        value: Any tensor.
        kind: MIL's name of a type.
        keep_float32: Leave floats unrounded.
    """
    if kind == "fp16":
        value = value.float()
        return value if keep_float32 else value.half().float()
    if kind in _NARROW:
        return _int32(value).to(_NARROW[kind]).to(torch.int32)
    if kind == "uint16":
        return _int32(value) & 0xFFFF
    carried = CARRIED.get(kind, value.dtype)
    return _int32(value) if carried == torch.int32 else value.to(carried)


def _int32(value: Tensor) -> Tensor:
    """Of a float: towards zero, to the nearest int32 where it is none, and of NaN 0: on every processor the same."""
    if value.is_floating_point():
        value = value.double().nan_to_num(0.0).clamp(-(2**31), 2**31 - 1)
    return value.to(torch.int32)


def require_shape(value: Tensor, declared: Declared, name: str) -> None:
    """Hold a result to the sizes that the program states.

    Raises:
        ArtifactError: they differ.
    """
    shape = declared.shape
    if shape is None or (len(shape) == value.ndim and all(a is None or a == b for a, b in zip(shape, value.shape))):
        return
    said = [size if size is not None else "?" for size in shape]
    raise ArtifactError(f"{name} came out as {list(value.shape)}; the program says {said}")


def require_room(count: int) -> None:
    """Refuse to make a tensor that no model needs: called by what can give more than it takes.

    Args:
        count: Values of the tensor to be made.

    Raises:
        ArtifactError: too many.
    """
    if count > LARGEST:
        raise ArtifactError(f"a tensor of {count} values is more than the {LARGEST} that are computed here")


def require_broadcast_room(*shapes: Sequence[int]) -> None:
    """Refuse to broadcast tensors against each other where what comes out is enormous.

    Args:
        shapes: Of the tensors. Whether they go together is for the operation to say.

    Raises:
        ArtifactError: too many values.
    """
    if math.prod(math.prod(shape) for shape in shapes) > LARGEST:  # more than what comes out, and quicker
        require_room(math.prod(max(sizes) for sizes in zip_longest(*map(reversed, shapes), fillvalue=1)))


def whole(value: Value) -> int:
    """A whole number: axis, size, group count."""
    return int(value)


def axis_of(value: Value, rank: int) -> int:
    """An axis counted from the first; one below zero is given counted from the last.

    Raises:
        IndexError: there is no such axis.
    """
    axis = int(value)
    if not -rank <= axis < rank:
        raise IndexError(f"axis {axis} is not one of the {rank} that there are")
    return axis % rank


def wholes(value: Value) -> list[int]:
    """Whole numbers: shape, axes, strides. None gives none."""
    if value is None:
        return []
    if isinstance(value, list):  # one variable for each
        return [int(one) for one in value]
    return [int(one) for one in _listed(value)]


def flag(value: Value, default: bool = False) -> bool:
    """A truth value; `default` where the program gives none."""
    return default if value is None else bool(value)


def flags(value: Value, count: int) -> list[bool]:
    """`count` truth values; all false where the program gives none."""
    return [False] * count if value is None else [bool(one) for one in _listed(value)]


def _listed(value: Tensor) -> list[Any]:
    if value.numel() > LONGEST:
        raise ValueError(f"{value.numel()} values are more than any shape, axes or counts")
    return value.reshape(-1).tolist()


def number(value: Value, default: float = 0.0) -> float:
    """A float: epsilon, alpha; `default` where the program gives none."""
    return default if value is None else float(value)
