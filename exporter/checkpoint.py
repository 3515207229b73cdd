"""A Hugging Face folder (config.json, safetensors) to a Model of dense, memory-mapped weights.

Nothing in the folder is trusted: config.json is bounded, safetensors headers are checked by the safetensors library
before anything is mapped, and every shape is checked against the config.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter import adapters, mapped
from exporter.adapters import Adapter, generic
from exporter.artifact import checked_path, sha256_of
from exporter.errors import ArtifactError, CheckpointError
from exporter.model import Architecture, Model, Provenance
from exporter.weights import Dense

LARGEST_JSON = 64 * 2**20  # bytes
READABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "tokenizer.model", "generation_config.json", "preprocessor_config.json",
                   "processor_config.json")  # fmt: skip


def load(folder: Path) -> Model:
    """Read a checkpoint folder.

    Raises:
        CheckpointError: no such folder, not a checkpoint, damaged files, or tensors that are not what config.json says.
        ArchitectureError: a family or a config field that no adapter honours.
    """
    config = read_json(folder / "config.json", f"{folder} is no checkpoint: it has no config.json")
    adapter = adapters.find_or_generic(str(config.get("model_type")))
    architecture = adapter.read(config)
    paths = _weight_files(folder)
    tensors = _once(named for path in paths for named in _tensors(path, adapter))
    if architecture.config is not None:
        tensors = generic.tensors(architecture, folder)
    weights, vectors = _sorted_out(architecture, tensors)
    parameters = sum(tensor.numel() for tensor in (*vectors.values(), *(weight.values for weight in weights.values())))
    digest = sha256_of([folder / "config.json", *paths])
    name = folder.resolve().name.encode(errors="replace").decode()  # a folder's name need not be text
    provenance = Provenance(name, digest, parameters, _licence(folder))
    return Model(architecture, weights, vectors, provenance, _files(folder))


def read_json(path: Path, absent: str) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises:
        CheckpointError: `absent` where there is no such file; or it is too large, or no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(absent)
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {LARGEST_JSON} are read")
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=mapped.without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def open_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and memory-mapped tensor of everything in a safetensors file, each of them looked at once.

    Raises:
        CheckpointError: the file is truncated, its header lies, or a tensor holds what is no finite float32.
    """
    for name, tensor in mapped.read(path).items():
        _require_finite(path, name, tensor)
        mapped.release()
        yield name, tensor


def _require_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity before hours of work end in them; reads the tensor once and copies nothing."""
    if tensor.dtype in READABLE and tensor.numel():
        extremes = torch.stack(tensor.aminmax()).float()
        if not bool(extremes.isfinite().all()):
            raise CheckpointError(f"{path}: tensor {name} holds NaN, infinity or more than a float32 can say")


def _tensors(path: Path, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """What a file holds of a model, under the adapter's names."""
    stored = (adapter.stored(name, tensor) for name, tensor in open_tensors(path))
    for name, tensor in filter(None, stored):
        if tensor.dtype not in READABLE:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in READABLE)
            raise CheckpointError(f"{path}: tensor {name} is {tensor.dtype}; only float checkpoints are read: {kinds}")
        yield name, tensor


def _once(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in named:
        if name in tensors:
            raise CheckpointError(f"tensor {name} is there twice, in two shards or under two names")
        tensors[name] = tensor
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
        return [single]
    names = read_json(index, "").get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map")
    try:
        shards = [folder / checked_path(str(name)) for name in sorted(set(names.values()))]
    except (ArtifactError, TypeError) as error:
        raise CheckpointError(f"{index}: {error}") from None
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{index} names shards that are not there: {', '.join(missing)}")
    return shards


def _sorted_out(architecture: Architecture, tensors: dict[str, Tensor]) -> tuple[dict[str, Dense], dict[str, Tensor]]:
    """Split tensors into matrices and vectors, each checked against the config; whatever is left over is refused."""
    shapes = adapters.find(architecture.family).shapes(architecture)
    weights = {site: Dense(_take(tensors, f"{site}.weight", shape)) for site, shape in shapes.weights.items()}
    vectors = {name: _take(tensors, name, (length,)) for name, length in shapes.tensors.items()}
    optional = {name: length for name, length in shapes.optional.items() if name in tensors}
    vectors |= {name: _take(tensors, name, (length,)) for name, length in optional.items()}
    adapter = adapters.find(architecture.family)
    if architecture.tied and adapter.HEAD:
        _drop_tied_head(tensors, f"{adapter.HEAD}.weight", weights[adapter.EMBEDDING])
    if left := sorted(name for name in tensors if not name.startswith(shapes.unread)):
        raise CheckpointError(f"tensors that a {architecture.family} model does not have: {', '.join(left[:5])}")
    return weights, vectors


def _drop_tied_head(tensors: dict[str, Tensor], name: str, embedding: Dense) -> None:
    """A tied head that is stored all the same is the embedding again; one that is not would be ignored."""
    head = tensors.pop(name, None)
    if head is not None and not torch.equal(head, embedding.values):
        raise CheckpointError(f"{name} is not the embedding, though config.json says tie_word_embeddings")


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise CheckpointError(f"tensor {name} is missing; config.json asks for it")
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"tensor {name} is {list(tensor.shape)}; config.json says {list(shape)}")
    return tensor


def _files(folder: Path) -> Mapping[str, bytes]:
    present = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    too_large = [path for path in present if path.stat().st_size > LARGEST_JSON]
    if too_large:
        raise CheckpointError(
            f"{too_large[0]} has {too_large[0].stat().st_size} bytes; at most {LARGEST_JSON} are read"
        )
    return {path.name: path.read_bytes() for path in present}


def _licence(folder: Path) -> str | None:
    """The `license:` line of the checkpoint's card, if it has one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as stream:
        found = re.search(r"(?m)^license:\s*([\w.+-]{1,64})\s*$", stream.read(65536))
    return found.group(1) if found else None
