"""Writes an .mlpackage: the program from the verbs, and files that are the same bytes every time."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exporter import adapters
from exporter.artifact import sha256_of
from exporter.errors import OutputError
from exporter.model import Model
from exporter.ops import listen
from exporter.plugins import Plan
from targets.coreml_ios.backend import ct, get_new_symbol, mb, quiet, types
from targets.coreml_ios.ops import Cache, CoreMLOps, Past, state_shapes
from targets.coreml_ios.reader import FOLDER, ROOT, SPECIFICATION, WEIGHTS

Heard = Callable[[str, str], None]
NAME = "model.mlpackage"
LOGITS, HIDDEN = "logits", "lastHiddenState"


def write(model: Model, plan: Plan, path: Path, heard: Heard = lambda verb, value: None) -> None:
    """Write `model`, with the trees of `plan`, as the package `path`, which must not exist.

    Args:
        model: The model.
        plan: What is stored for it.
        path: The folder `*.mlpackage`.
        heard: Told the value of every verb, under its name; passes may lengthen it, or merge it with another.

    Raises:
        TargetError: a value does not fit float16.
        OutputError: the disk is full: constants pass through the temporary folder (TMPDIR) first.
    """
    program = _program(model.with_weights(plan.weights), plan.context, heard)
    converted = _converted(program, plan.context, model.architecture.causal, path)
    specification = converted.get_spec()
    specification.description.metadata.Clear()  # the date of the conversion is in there
    (path / ROOT / SPECIFICATION).write_bytes(specification.SerializeToString(deterministic=True))
    (path / "Manifest.json").write_text(_manifest(path))


def _program(model: Model, context: int, heard: Heard) -> Any:
    adapter, architecture = adapters.find(model.architecture.family), model.architecture
    tokens, end = get_new_symbol(), get_new_symbol()
    keys, values = state_shapes(architecture, context)
    specs = [
        mb.TensorSpec((1, tokens), dtype=types.int32), mb.TensorSpec((1, 1, tokens, end), dtype=types.fp16),
        mb.StateTensorSpec(keys, dtype=types.fp16), mb.StateTensorSpec(values, dtype=types.fp16),
    ]  # fmt: skip

    def decoder(inputIds: Any, causalMask: Any, keyCache: Any, valueCache: Any) -> Any:  # noqa: N803 (Apple's names)
        return said(inputIds, LOGITS, Past(causalMask, Cache(keyCache), Cache(valueCache)))

    def encoder(inputIds: Any) -> Any:  # noqa: N803
        return said(inputIds, HIDDEN)

    def said(ids: Any, output: str, past: Past | None = None) -> Any:
        ops = CoreMLOps(model, ids, context, past)
        listen(ops, lambda verb, value: heard(verb, value.name))
        return mb.identity(x=adapters.logits(adapter, ops, ids), name=output)

    mb.name_count.clear()  # names would go on from what this process built before
    written = mb.program(input_specs=specs if architecture.causal else specs[:1], opset_version=ct.target.iOS18)
    return written(decoder if architecture.causal else encoder)


def _converted(program: Any, context: int, is_decoder: bool, path: Path) -> Any:
    trouble = ""
    with quiet():
        try:
            return _convert(program, context, is_decoder, path)
        except RuntimeError as error:  # how coremltools' C++ writer says that a file could not be written
            if not any(words in str(error) for words in ("filesystem error", "MIL FileWriter")):
                raise
            trouble = str(error)  # the error itself would keep a temporary folder alive, and that would warn
    raise OutputError(f"{path} or {tempfile.gettempdir()}: {trouble}; is the disk full?")


def _convert(program: Any, context: int, is_decoder: bool, path: Path) -> Any:
    tokens, end = ct.RangeDim(1, context, default=1), ct.RangeDim(1, context, default=1)
    inputs = [ct.TensorType("inputIds", (1, tokens), dtype=np.int32)]
    if is_decoder:
        inputs.append(ct.TensorType("causalMask", (1, 1, tokens, end), dtype=np.float16))
    outputs = [ct.TensorType(LOGITS if is_decoder else HIDDEN, dtype=np.float16)]
    return ct.convert(
        program, inputs=inputs, outputs=outputs, package_dir=str(path),
        minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
    )  # fmt: skip


def _manifest(path: Path) -> str:
    """Manifest.json with identifiers that follow from the files' content."""
    model = {"author": FOLDER, "description": "CoreML Model Specification", "name": SPECIFICATION,
             "path": f"{FOLDER}/{SPECIFICATION}"}  # fmt: skip
    weights = {"author": FOLDER, "description": "CoreML Model Weights", "name": "weights", "path": f"{FOLDER}/weights"}
    root = _identifier(path / ROOT / SPECIFICATION)
    entries = {root: model, _identifier(path / ROOT / WEIGHTS): weights}
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}
    return json.dumps(manifest, indent=4, sort_keys=True) + "\n"


def _identifier(path: Path) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, sha256_of([path]))).upper()
