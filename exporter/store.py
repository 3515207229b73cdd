"""A compressed model on disk: weight trees and widths as JSON, leaves as safetensors, tokenizer files untouched.

    model/
      pocket.json          format version, architecture, trees (which leaf is where), provenance
      weights.safetensors  leaves; codes, and patterns of what is kept, packed in as few bits as they need
      files/               tokenizer.json and the like

No pickle. Reading checks the JSON against the tensors before anything is unpacked. A model that was read lies in its
file: a matrix takes memory while it is looked at, codes and places stay packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from exporter import adapters, mapped, packing
from exporter.checkpoint import LARGEST_JSON, open_tensors, read_json
from exporter.errors import CheckpointError, PocketError, WeightError
from exporter.mapped import Leaf, leaf
from exporter.maths.pruning import pattern_numbers, pattern_places, patterns_of
from exporter.model import Architecture, Model, Provenance
from exporter.weights import Dense, LowBit, Packed, Product, Shared, Sparse, Sum, Weight, as_held

MANIFEST, WEIGHTS, FILES = "pocket.json", "weights.safetensors", "files"
FORMAT_VERSION = 1
DEEPEST = 16  # levels of a weight tree
AT_ONCE = 2**22  # codes that are packed or unpacked together

Tree = dict[str, Any]


def is_stored(folder: Path) -> bool:
    """Whether a folder holds a model that `save` wrote."""
    return (folder / MANIFEST).is_file()


def save(model: Model, folder: Path) -> None:
    """Write a model into an existing empty folder, leaf by leaf: the same model gives the same bytes."""
    trees, leaves = taken_apart(model.weights, model.tensors)
    mapped.write(folder / WEIGHTS, leaves)
    manifest = {
        "format_version": FORMAT_VERSION,
        "architecture": asdict(model.architecture),
        "provenance": asdict(model.provenance),
        "trees": trees,
    }
    (folder / FILES).mkdir()
    for name, content in model.files.items():
        (folder / FILES / name).write_bytes(content)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n")


def load(folder: Path) -> Model:
    """Read a model that `save` wrote.

    Raises:
        CheckpointError: not such a folder, of another format version, or parts that do not fit together.
    """
    manifest = read_json(folder / MANIFEST, f"{folder} is no saved model: it has no {MANIFEST}")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder / MANIFEST}: format version {version!r}; this program reads {FORMAT_VERSION}")
    tensors = dict(open_tensors(folder / WEIGHTS))
    try:
        architecture = TypeAdapter(Architecture).validate_python(manifest.get("architecture"))
        provenance = TypeAdapter(Provenance).validate_python(manifest.get("provenance"))
        weights, vectors = put_together(_trees(manifest), tensors)
    except (ValidationError, PocketError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} does not fit {WEIGHTS}: {_one_line(error)}") from None
    if provenance.parameters < 1:
        raise CheckpointError(f"{folder / MANIFEST}: a source of {provenance.parameters} parameters is none")
    model = Model(architecture, weights, vectors, provenance, _files(folder))
    _check_shapes(model, folder)
    return model


def taken_apart(
    weights: Mapping[str, Weight], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tree], dict[str, Leaf]]:
    """Trees by site, which name their leaves, and what a file is to hold: these leaves, norms and biases."""
    leaves = {f"tensor/{name}": leaf(tensor) for name, tensor in tensors.items()}
    return {site: _write(weight, f"weight/{site}", leaves) for site, weight in sorted(weights.items())}, leaves


def put_together(
    trees: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """The exact inverse of `taken_apart`; every matrix stays where the tensors are.

    Raises:
        WeightError, KeyError, TypeError, ValueError, RuntimeError: trees and tensors do not fit together.
    """
    weights = {site: _read(tree, tensors, 0) for site, tree in trees.items()}
    mapped.release()
    prefix = "tensor/"
    return weights, {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


def _write(weight: Weight, name: str, leaves: dict[str, Leaf]) -> Tree:
    """Put a tree's leaves into `leaves`; returns the tree with leaf names in place of leaves."""
    match weight:
        case Dense():
            leaves[name] = leaf(weight.values)
            return {"kind": "dense", "values": name}
        case LowBit():
            leaves[f"{name}.codes"] = _packed(as_held(weight), weight.bits)
            leaves[f"{name}.scales"], leaves[f"{name}.zeros"] = _halved(weight.scales), _halved(weight.zeros)
            return {"kind": "low_bit", "name": name, "bits": weight.bits, "group": weight.group, "in": weight.shape[1]}
        case Sparse():
            leaves[f"{name}.patterns"] = _packed_places(as_held(weight), weight.n, weight.m)
            kept = _write(weight.kept, f"{name}.kept", leaves)
            return {"kind": "sparse", "name": name, "n": weight.n, "m": weight.m, "kept": kept}
        case Shared():
            leaves[f"{name}.labels"] = leaf(weight.labels.to(torch.int32))
            return {"kind": "shared", "name": name, "rows": _write(weight.rows, f"{name}.rows", leaves)}
        case Product():
            left, right = _write(weight.left, f"{name}.left", leaves), _write(weight.right, f"{name}.right", leaves)
            return {"kind": "product", "left": left, "right": right}
        case Sum():
            terms = [_write(term, f"{name}.{index}", leaves) for index, term in enumerate(weight.terms)]
            return {"kind": "sum", "terms": terms}


def _halved(grid: Tensor) -> Leaf:
    """Scales or zero points in 16 bits, where that says the same."""
    half = grid.half()
    return leaf(half if grid.dtype == torch.float32 and torch.equal(half.float(), grid) else grid)


def _whole_floats(grid: Tensor) -> Tensor:
    return grid.float() if grid.dtype == torch.float16 else grid


def _read(tree: Any, tensors: Mapping[str, Tensor], depth: int) -> Weight:
    """The exact inverse of `_write`."""
    if not isinstance(tree, dict) or tree.get("kind") not in _READERS:
        raise WeightError(f"{str(tree)[:60]!r} is no weight tree; kinds: {', '.join(_READERS)}")
    if depth > DEEPEST:
        raise WeightError(f"a weight tree is deeper than {DEEPEST} levels")
    return _READERS[tree["kind"]](tree, tensors, depth + 1)


def _low_bit(tree: Tree, tensors: Mapping[str, Tensor], depth: int) -> Weight:
    name, bits = tree["name"], _whole(tree, "bits")
    codes = _codes(tensors[f"{name}.codes"], bits, _whole(tree, "in"))
    scales, zeros = (tensors[f"{name}.{part}"] for part in ("scales", "zeros"))
    return LowBit(codes, _whole_floats(scales), _whole_floats(zeros), bits, _whole(tree, "group"))


def _sparse(tree: Tree, tensors: Mapping[str, Tensor], depth: int) -> Weight:
    kept, n, m = _read(tree["kept"], tensors, depth), _whole(tree, "n"), _whole(tree, "m")
    return Sparse(kept, _places(tensors[f"{tree['name']}.patterns"], n, m, kept.shape[1]), n, m)


def _whole(tree: Tree, name: str) -> int:
    value = tree[name]
    if type(value) is not int:  # a bool is an int too
        raise WeightError(f"{name} is {str(value)[:60]!r}, no whole number")
    return value


_READERS: dict[str, Callable[[Tree, Mapping[str, Tensor], int], Weight]] = {
    "dense": lambda tree, tensors, depth: Dense(tensors[tree["values"]]),
    "low_bit": _low_bit,
    "sparse": _sparse,
    "shared": lambda tree, tensors, depth: Shared(
        _read(tree["rows"], tensors, depth), tensors[f"{tree['name']}.labels"].long()
    ),
    "product": lambda tree, tensors, depth: Product(
        _read(tree["left"], tensors, depth), _read(tree["right"], tensors, depth)
    ),
    "sum": lambda tree, tensors, depth: Sum(tuple(_read(term, tensors, depth) for term in tree["terms"])),
}


def _packed(integers: Tensor | Packed, bits: int) -> Leaf:
    """Integers [out, columns] as the file holds them; packed ones came from a file and go back as they are."""
    if isinstance(integers, Packed):
        return leaf(integers.stored)
    rows, columns = integers.shape
    shape = rows, packing.packed_width(columns, bits)
    return Leaf(torch.uint8, shape, lambda: _by_rows(lambda part: _pack(part, bits), integers.cpu(), columns))


def _packed_places(places: Tensor | Packed, n: int, m: int) -> Leaf:
    """The pattern of every group by its number, each in ceil(log2 C(m, n)) bits."""
    if isinstance(places, Packed):
        return leaf(places.stored)
    bits, groups = patterns_of(n, m, places.shape[1])

    def pack(part: Tensor) -> Tensor:
        digits = pattern_numbers(part, n)[..., None] >> torch.arange(bits) & 1  # [out, groups, bits], low bit first
        return _pack(digits.flatten(1).to(torch.uint8), 1)

    shape = len(places), packing.packed_width(groups * bits, 1)
    return Leaf(torch.uint8, shape, lambda: _by_rows(pack, places.cpu(), places.shape[1]))


def _codes(stored: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `_packed`: codes that are unpacked when they are looked at."""
    _require_packed(stored, bits, columns)
    return _unpacked_later(stored, columns, lambda part: _unpack(part, bits, columns))


def _places(stored: Tensor, n: int, m: int, columns: int) -> Tensor:
    """The inverse of `_packed_places`."""
    bits, groups = patterns_of(n, m, columns)
    _require_packed(stored, 1, groups * bits)

    def unpack(part: Tensor) -> Tensor:
        digits = _unpack(part, 1, groups * bits).view(len(part), groups, bits).long()
        return pattern_places((digits << torch.arange(bits)).sum(-1), n, m)

    return _unpacked_later(stored, columns, unpack)


def _unpacked_later(stored: Tensor, columns: int, unpack: Callable[[Tensor], Tensor]) -> Tensor:
    shape = len(stored), columns
    packed = Packed(stored, shape, lambda stored: _by_rows(unpack, stored, columns))
    return cast(Tensor, packed)  # no other than a tensor to those who look


def _require_packed(stored: Tensor, bits: int, columns: int) -> None:
    if stored.dtype != torch.uint8 or stored.ndim != 2 or not 1 <= bits <= 8:
        raise WeightError(f"packed codes are {stored.dtype} {list(stored.shape)} of {bits} bits")
    packing.check_width(stored.shape[1], bits, columns)


def _by_rows(change: Callable[[Tensor], Tensor], rows: Tensor, columns: int) -> Tensor:
    """A function of rows, on some of them at a time: between its input and output it takes many times their memory."""
    return torch.cat([change(part) for part in torch.split(rows, max(1, AT_ONCE // max(1, columns)))])


def _pack(codes: Tensor, bits: int) -> Tensor:
    return torch.from_numpy(packing.pack(codes.numpy(), bits))


def _unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(packing.unpack(packed.numpy(), bits, columns)))


def _trees(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    trees = manifest.get("trees")
    if not isinstance(trees, dict):
        raise WeightError("there are no trees")
    return trees


def _check_shapes(model: Model, folder: Path) -> None:
    """Every matrix and vector that the architecture asks for is there, in its shape, and finite widths agree."""
    shapes = adapters.find(model.architecture.family).shapes(model.architecture)
    found = {site: weight.shape for site, weight in model.weights.items()}
    wrong = [site for site, shape in shapes.weights.items() if found.get(site) != shape]
    lengths = {name: tuple(tensor.shape) for name, tensor in model.tensors.items()}
    wrong += [name for name, length in shapes.tensors.items() if lengths.get(name) != (length,)]
    known = {**shapes.tensors, **shapes.optional}
    wrong += [name for name, shape in lengths.items() if shape != (known.get(name, -1),)]
    wrong += [site for site in found if site not in shapes.weights]
    if wrong:
        raise CheckpointError(f"{folder}: {wrong[0]} is missing, unknown, or not of the shape that {MANIFEST} says")


def _files(folder: Path) -> dict[str, bytes]:
    present = [path for path in sorted((folder / FILES).glob("*")) if path.is_file()]
    for path in present:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {LARGEST_JSON} are read")
    return {path.name: path.read_bytes() for path in present}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
