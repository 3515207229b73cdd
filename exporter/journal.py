"""What an unfinished step has finished: a file per layer, in a folder that outlives a kill.

    00000.safetensors              the leaves, norms and biases that the step changed in layer 0
    00000.json                     their trees, the layer's widths, digests: where it lies, the layer is finished
    activations-00000.safetensors  of the calibration windows behind layer 0; only those of the latest layer are kept
    scratch/                       the method's own

The model goes on with these files instead of the matrices that were written to them, so memory does not grow with the
layers, and a resumed run sees the numbers that an undisturbed one does. Later walks of a step lie in `walk1/` and so
on. Whoever names the folder says by its name what it depends on: other work has another.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from exporter import mapped, store
from exporter.artifact import sha256_of
from exporter.checkpoint import read_json
from exporter.errors import CheckpointError, PocketError
from exporter.model import Layer, Model

Write = Callable[[Path], None]


class FolderJournal:
    """A journal in a folder.

    Args:
        folder: Is there; empty, or left by a killed run of the same step on the same model and text.
        report: Told the fraction done.
        device: Where the work is done.
    """

    def __init__(self, folder: Path, report: Callable[[float], None], device: str = "cpu") -> None:
        self.report, self.device = report, device
        self.scratch: Path | None = folder / "scratch"
        self.scratch.mkdir(exist_ok=True)
        self._root = self._folder = folder
        self._walks = 0

    def resume(self, model: Model) -> tuple[Model, int, Sequence[Tensor]]:
        """See `step.Journal`.

        Raises:
            CheckpointError: a file is not as it was written.
        """
        self._folder = self._root / f"walk{self._walks}" if self._walks else self._root
        self._folder.mkdir(exist_ok=True)
        self._walks += 1
        done = 0
        while self._path(done, ".json").is_file():
            record = read_json(self._path(done, ".json"), "")
            if record.get("digest") != sha256_of([self._path(done, ".safetensors")]):
                raise self._damaged(done, "its file is not the one that was written")
            model = self._taken_up(model, record, done)
            done += 1
        return model, done, self._activations(record, done - 1) if done else ()

    def keep(self, before: Model, after: Model, layer: int, activations: Sequence[Tensor]) -> Model:
        """See `step.Journal`."""
        record, leaves = _change(before, after, layer)
        _put(self._path(layer, ".safetensors"), lambda path: mapped.write(path, leaves))
        held = {f"{index:05}": mapped.leaf(tensor) for index, tensor in enumerate(activations)}
        _put(self._activations_path(layer), lambda path: mapped.write(path, held))
        record["digest"] = sha256_of([self._path(layer, ".safetensors")])
        record["activations"] = sha256_of([self._activations_path(layer)])
        _put(self._path(layer, ".json"), lambda path: _write_text(path, json.dumps(record, sort_keys=True)))
        if layer:
            self._activations_path(layer - 1).unlink(missing_ok=True)
        _trim()
        return self._taken_up(before, record, layer)

    def _path(self, layer: int, suffix: str) -> Path:
        return self._folder / f"{layer:05}{suffix}"

    def _activations_path(self, layer: int) -> Path:
        return self._folder / f"activations-{layer:05}.safetensors"

    def _activations(self, record: Any, layer: int) -> Sequence[Tensor]:
        """In memory of their own, as in a run that made them: where they lie could change how they are summed."""
        path = self._activations_path(layer)
        if not path.is_file() or record.get("activations") != sha256_of([path]):
            raise self._damaged(layer, "its activations are not those that were written")
        tensors = mapped.read(path)
        return [tensors[name].clone() for name in sorted(tensors)]

    def _taken_up(self, model: Model, record: Any, layer: int) -> Model:
        """A model with what a finished layer changed, in its file."""
        try:
            tensors = mapped.read(self._path(layer, ".safetensors"))
            weights, vectors = store.put_together(record["trees"], tensors)
            widths = TypeAdapter(Layer).validate_python(record["widths"])
            removed = set(record["removed"])
        except (ValidationError, PocketError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._damaged(layer, " ".join(str(error).split())[:300]) from None
        kept = {name: tensor for name, tensor in model.tensors.items() if name not in removed}
        return replace(model, tensors=kept).with_layer(layer, widths).with_weights(weights).with_tensors(vectors)

    def _damaged(self, layer: int, why: str) -> CheckpointError:
        return CheckpointError(f"{self._path(layer, '.json')}: layer {layer} cannot be taken up: {why}; run it again")


def _change(before: Model, after: Model, layer: int) -> tuple[dict[str, Any], dict[str, mapped.Leaf]]:
    """What a layer's compression changed: a record and the leaves that it names."""
    widths = after.architecture.layers[layer]
    if before.with_layer(layer, widths).architecture != after.architecture or set(before.weights) != set(after.weights):
        raise ValueError(f"the compression of layer {layer} changed more of the architecture than its layer")
    weights = {site: weight for site, weight in after.weights.items() if before.weights[site] is not weight}
    tensors = {name: tensor for name, tensor in after.tensors.items() if before.tensors.get(name) is not tensor}
    trees, leaves = store.taken_apart(weights, tensors)
    removed = sorted(set(before.tensors) - set(after.tensors))
    return {"trees": trees, "widths": asdict(widths), "removed": removed}, leaves


def _trim() -> None:
    """Give back to the system what the allocator keeps of freed arrays, where it is glibc's.

    Arrays that outlive a layer lie between its temporary ones: without this the holes grow, by 19 MB a layer in a Llama
    of 1.2 B parameters.
    """
    with suppress(AttributeError, OSError, TypeError):  # another allocator, another system
        ctypes.CDLL(None).malloc_trim(0)


def _put(path: Path, write: Write) -> None:
    """Write a file, whole or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    write(fresh)
    with fresh.open("rb") as stream:
        os.fsync(stream.fileno())
    fresh.rename(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
