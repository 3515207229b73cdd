"""A compressed model on disk: weight trees and widths as JSON, leaves as safetensors, tokenizer files untouched.

    model/
      pocket.json          format version, architecture, trees (which leaf is where), provenance
      weights.safetensors  leaves; codes and places packed in as few bits as they need
      files/               tokenizer.json and the like

No pickle. Reading checks the JSON against the tensors before anything is unpacked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from exporter import adapters, packing
from exporter.checkpoint import LARGEST_JSON, open_tensors, read_json
from exporter.errors import CheckpointError, PocketError, WeightError
from exporter.model import Architecture, Model, Provenance
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, Weight

MANIFEST, WEIGHTS, FILES = "pocket.json", "weights.safetensors", "files"
FORMAT_VERSION = 1
DEEPEST = 16  # levels of a weight tree

Tree = dict[str, Any]


def is_stored(folder: Path) -> bool:
    """Whether a folder holds a model that `save` wrote."""
    return (folder / MANIFEST).is_file()


def save(model: Model, folder: Path) -> None:
    """Write a model into an existing empty folder: the same model gives the same bytes."""
    tensors: dict[str, Tensor] = {f"tensor/{name}": tensor.contiguous() for name, tensor in model.tensors.items()}
    trees = {site: _write(weight, f"weight/{site}", tensors) for site, weight in sorted(model.weights.items())}
    save_file(_apart(tensors), folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # the library writes for its owner alone
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
        weights = {site: _read(tree, tensors, 0) for site, tree in _trees(manifest).items()}
    except (ValidationError, PocketError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} does not fit {WEIGHTS}: {_one_line(error)}") from None
    vectors = {name.removeprefix("tensor/"): tensor for name, tensor in tensors.items() if name.startswith("tensor/")}
    if provenance.parameters < 1:
        raise CheckpointError(f"{folder / MANIFEST}: a source of {provenance.parameters} parameters is none")
    model = Model(architecture, weights, vectors, provenance, _files(folder))
    _check_shapes(model, folder)
    return model


def _write(weight: Weight, name: str, tensors: dict[str, Tensor]) -> Tree:
    """Put a tree's leaves into `tensors`; returns the tree with leaf names in place of leaves."""
    match weight:
        case Dense():
            tensors[name] = weight.values.contiguous()
            return {"kind": "dense", "values": name}
        case LowBit():
            tensors[f"{name}.codes"] = _packed(weight.codes, weight.bits)
            tensors[f"{name}.scales"], tensors[f"{name}.zeros"] = weight.scales.contiguous(), weight.zeros.contiguous()
            return {"kind": "low_bit", "name": name, "bits": weight.bits, "group": weight.group, "in": weight.shape[1]}
        case Sparse():
            tensors[f"{name}.places"] = _packed(weight.places, 4)
            kept = _write(weight.kept, f"{name}.kept", tensors)
            return {"kind": "sparse", "name": name, "n": weight.n, "m": weight.m, "kept": kept}
        case Shared():
            tensors[f"{name}.labels"] = weight.labels.to(torch.int32)
            return {"kind": "shared", "name": name, "rows": _write(weight.rows, f"{name}.rows", tensors)}
        case Product():
            left, right = _write(weight.left, f"{name}.left", tensors), _write(weight.right, f"{name}.right", tensors)
            return {"kind": "product", "left": left, "right": right}
        case Sum():
            terms = [_write(term, f"{name}.{index}", tensors) for index, term in enumerate(weight.terms)]
            return {"kind": "sum", "terms": terms}


def _read(tree: Any, tensors: Mapping[str, Tensor], depth: int) -> Weight:
    """The exact inverse of `_write`."""
    if not isinstance(tree, dict) or tree.get("kind") not in _READERS:
        raise WeightError(f"{str(tree)[:60]!r} is no weight tree; kinds: {', '.join(_READERS)}")
    if depth > DEEPEST:
        raise WeightError(f"a weight tree is deeper than {DEEPEST} levels")
    return _READERS[tree["kind"]](tree, tensors, depth + 1)


def _low_bit(tree: Tree, tensors: Mapping[str, Tensor], depth: int) -> Weight:
    name, bits = tree["name"], _whole(tree, "bits")
    codes = _unpacked(tensors[f"{name}.codes"], bits, _whole(tree, "in"))
    return LowBit(codes, tensors[f"{name}.scales"], tensors[f"{name}.zeros"], bits, _whole(tree, "group"))


def _sparse(tree: Tree, tensors: Mapping[str, Tensor], depth: int) -> Weight:
    kept = _read(tree["kept"], tensors, depth)
    places = _unpacked(tensors[f"{tree['name']}.places"], 4, kept.shape[1])
    return Sparse(kept, places, _whole(tree, "n"), _whole(tree, "m"))


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


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none in another's memory, which safetensors refuses; sorted by name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(tensors.items()):
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def _packed(codes: Tensor, bits: int) -> Tensor:
    return torch.from_numpy(packing.pack(codes.numpy(), bits))


def _unpacked(packed: Tensor, bits: int, columns: int) -> Tensor:
    if packed.dtype != torch.uint8 or packed.ndim != 2 or not 1 <= bits <= 8:
        raise WeightError(f"packed codes are {packed.dtype} {list(packed.shape)} of {bits} bits")
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
