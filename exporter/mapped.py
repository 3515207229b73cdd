"""Safetensors files: read as views of the file, so that what is not in use takes no memory; written leaf by leaf.

Reading maps a file privately. Its pages come into memory when they are looked at, and `release` lets go of them:
nobody writes to these tensors, so they come back from the file as they were.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.errors import CheckpointError

# Every type that a file may hold. Those that are written come first, in the order in which the library puts them.
TYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {kind: name for name, kind in TYPES.items()}
ORDER = list(TYPES.values())

_UNRESERVED = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # files larger than memory
_open: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


@dataclass(frozen=True)
class Leaf:
    """A tensor that is to be written, made only then.

    Args:
        dtype: Of the tensor.
        shape: Of the tensor.
        make: Makes it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def leaf(tensor: Tensor) -> Leaf:
    """A tensor that is there already."""
    return Leaf(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, none of them in memory yet. They are not to be written to.

    Raises:
        CheckpointError: the file is truncated, or its header lies.
    """
    try:
        with safe_open(path, framework="numpy"):  # the library checks lengths, types, shapes and offsets
            view = _view(path)
        length = int.from_bytes(view[:8], "little")
        header = json.loads(view[8 : 8 + length], object_pairs_hook=without_duplicates)
        header.pop("__metadata__", None)
        return {name: _tensor(view, 8 + length, entry) for name, entry in header.items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose every key stands there once: of two, one would be ignored."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def release() -> None:
    """Let go of the memory of every open file; whoever looks again reads again."""
    for view in list(_open):
        if hasattr(view, "madvise"):  # not on Windows
            view.madvise(mmap.MADV_DONTNEED)


def write(path: Path, leaves: Mapping[str, Leaf]) -> None:
    """Write a file, one leaf in memory at a time: the bytes that the safetensors library would write."""
    ordered = sorted(leaves.items(), key=lambda item: (ORDER.index(item[1].dtype), item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, one in ordered:
        begin, end = end, end + one.nbytes
        header[name] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, one in ordered:
            stream.write(_bytes(one.make()).numpy().data)
            release()


def _view(path: Path) -> mmap.mmap:
    """A private map: torch wants to be able to write, which would reach this process alone."""
    with path.open("rb") as stream:
        flags, protection = mmap.MAP_PRIVATE | _UNRESERVED, mmap.PROT_READ | mmap.PROT_WRITE
        view = mmap.mmap(stream.fileno(), 0, flags=flags, prot=protection)
    _open.add(view)
    return view


def _tensor(view: mmap.mmap, base: int, entry: Mapping[str, Any]) -> Tensor:
    kind, shape, (begin, end) = TYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if kind is None:
        raise ValueError(f"type {entry['dtype']!r} is not read here; types that are: {', '.join(TYPES)}")
    if not 0 <= begin <= end <= len(view) - base or end - begin != math.prod(shape) * kind.itemsize:
        raise ValueError(f"bytes {begin} to {end} are no {entry['dtype']} of shape {shape} inside the file")
    if begin == end:
        return torch.empty(shape, dtype=kind)
    raw = torch.frombuffer(view, dtype=torch.uint8, count=end - begin, offset=base + begin)
    aligned = raw if (base + begin) % kind.itemsize == 0 else raw.clone()
    return aligned.view(kind).reshape(shape)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
