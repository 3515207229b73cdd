"""Choices, and lists of tensors. What has blocks or states, `cond` and `while_loop` too, is run in `machine.py`.

A list is a value like any other: what is written to makes a new one. Items that nothing was written to are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from targets.coreml_ios.executor.values import (
    CARRIED,
    List,
    Value,
    flag,
    require_broadcast_room,
    require_room,
    whole,
    wholes,
)

LONGEST = 2**20  # items of a list


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a` where `cond` is true, `b` elsewhere; all three broadcast."""
    require_broadcast_room(cond.shape, a.shape, b.shape)
    return torch.where(cond, a, b)


def make_list(
    elem_shape: Sequence[Value],
    init_length: Tensor | int = 1,
    dynamic_length: Tensor | bool = True,
    dtype: str = "fp32",
) -> List:
    """A list of `init_length` zeros; a size in `elem_shape` that is a word is known when an item is written."""
    shape = tuple(None if isinstance(size, str) else whole(size) for size in elem_shape)
    require_room(1 if None in shape else torch.Size([size for size in shape if size is not None]).numel())
    if dtype not in CARRIED:
        raise ValueError(f"a list of {dtype!r}; lists of numbers are made here")
    return List([None] * _length(whole(init_length)), shape, flag(dynamic_length), dtype)


def list_write(ls: List, index: Tensor, value: Tensor) -> List:
    """The list with `value` at `index`; beyond its end it grows, where its length is dynamic."""
    return _written(ls, [(whole(index), value)])


def list_read(ls: List, index: Tensor) -> Tensor:
    """The item at `index`."""
    return _items(ls, [whole(index)])[0]


def list_gather(ls: List, indices: Tensor) -> Tensor:
    """The items at `indices`, stacked: [indices, ...]."""
    items = _items(ls, wholes(indices))
    return torch.stack(items) if items else _zeros(ls)[None][:0]


def list_scatter(ls: List, indices: Tensor, value: Tensor) -> List:
    """The list with row i of `value` at place i of `indices`; beyond its end it grows, where its length is dynamic."""
    return _written(ls, zip(wholes(indices), value, strict=True))


def _written(ls: List, places: Iterable[tuple[int, Tensor]]) -> List:
    items = list(ls.items)
    for index, value in places:
        if index < 0 or (index >= len(items) and not ls.is_dynamic):
            raise IndexError(f"index {index} is outside a list of {len(items)}")
        items += [None] * (_length(index + 1) - len(items))
        items[index] = value
    return List(items, ls.shape, ls.is_dynamic, ls.kind)


def _items(ls: List, indices: Sequence[int]) -> list[Tensor]:
    for index in indices:
        if not 0 <= index < len(ls.items):
            raise IndexError(f"index {index} is outside a list of {len(ls.items)}")
    zeros = _zeros(ls) if any(ls.items[index] is None for index in indices) else torch.empty(0)  # one for all
    found = [zeros if (item := ls.items[index]) is None else item for index in indices]
    require_room(sum(item.numel() for item in found))
    return found


def _zeros(ls: List) -> Tensor:
    """What stands where nothing was written."""
    return torch.zeros(_item_shape(ls), dtype=CARRIED[ls.kind])


def _item_shape(ls: List) -> Sequence[int]:
    """The shape of what was written, or that which the list was made with.

    Raises:
        ValueError: neither says it.
    """
    written = next((item.shape for item in ls.items if item is not None), None)
    if written is not None:
        return written
    shape = [size for size in ls.shape if size is not None]
    if len(shape) != len(ls.shape):
        raise ValueError("an item is read of a list of unknown shape that nothing was written to")
    return shape


def _length(length: int) -> int:
    if not 0 <= length <= LONGEST:
        raise ValueError(f"a list of {length}; lists of up to {LONGEST} are made here")
    return length


OPERATIONS: dict[str, Callable[..., Any]] = {
    "select": select,
    "make_list": make_list,
    "list_length": lambda ls: torch.tensor(len(ls.items), dtype=torch.int32),
    "list_read": list_read,
    "list_write": list_write,
    "list_gather": list_gather,
    "list_scatter": list_scatter,
}
