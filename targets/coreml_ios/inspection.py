"""Compares the files that were written with what should be in them, part by part, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporter.errors import ArtifactError
from exporter.model import Model
from exporter.ops import Leaf
from exporter.plugins import Finding, Plan
from exporter.weights import LowBit, Sparse
from targets.coreml_ios.constants import Array, Constant, Stored
from targets.coreml_ios.encoding import Form, form, labels, leaves, padded_width
from targets.coreml_ios.ops import ZEROS, rope_tables, state_shapes
from targets.coreml_ios.package import HIDDEN, LOGITS, NAME
from targets.coreml_ios.reader import Interface, Package

ROLES = {  # parameter of a constexpr operation -> what it is of a leaf
    "val": "codes", "data": "codes", "nonzero_data": "codes", "indices": "codes", "indices_nonzero_data": "codes",
    "mask": "mask", "data_mask": "mask", "indices_mask": "mask", "scale": "scales", "offset": "zeros", "lut": "table",
}  # fmt: skip
Problems = Iterator[str]


def inspect(folder: Path, model: Model, plan: Plan) -> Sequence[Finding]:
    """One finding for the interface, every leaf, every norm and bias, and the size.

    Raises:
        ArtifactError: there is no package, or its files cannot be read at all.
    """
    package = Package(folder / NAME)
    found = list(_interface(package, model, plan))
    for site, weight in plan.weights.items():
        found += [_constant(package, name, partial(_leaf, leaf=leaf), (leaf.shape[0], padded_width(leaf)), _words(leaf))
                  for name, leaf in leaves(site, weight)]  # fmt: skip
        found += [_constant(package, name, partial(_labels, labels=wanted), tuple(wanted.shape), "labels")
                  for name, wanted in labels(site, weight)]  # fmt: skip
    for name, tensor in _tensors(package, model, plan).items():
        compare, shape = partial(_vector, tensor=tensor), tuple(tensor.shape)
        found.append(_left_out(package, name, tensor) or _constant(package, name, compare, shape, "float16 values"))
    return [*found, _size(package, plan)]


def _tensors(package: Package, model: Model, plan: Plan) -> dict[str, Tensor]:
    """Everything else that is stored: norms and biases, the biases that do nothing, the rotary tables."""
    zeros = [name for name in package.names if name.startswith(f"{ZEROS}_")]
    tensors = {**model.tensors, **{name: torch.zeros(package.shape(name)) for name in zeros}}
    rope = model.architecture.rope
    for head_dim in {layer.head_dim for layer in model.architecture.layers} if rope else ():
        assert rope is not None
        tensors |= rope_tables(rope, head_dim, plan.context)
    return tensors


def _interface(package: Package, model: Model, plan: Plan) -> Iterator[Finding]:
    """Inputs, outputs and states: their names, shapes and types."""
    one, flexible = (1, 1), (1, plan.context)
    keys, values = (tuple((n, n) for n in shape) for shape in state_shapes(model.architecture, plan.context))
    said, wanted = package.interface(), Interface(
        inputs={"inputIds": ((one, flexible), "int32"), "causalMask": ((one, one, flexible, flexible), "fp16")},
        outputs={LOGITS: ((), "fp16")},
        states={"keyCache": (keys, "fp16"), "valueCache": (values, "fp16")},
    )  # fmt: skip
    if not model.architecture.causal:
        ids = {"inputIds": wanted.inputs["inputIds"]}
        wanted = Interface(inputs=ids, outputs={HIDDEN: ((), "fp16")}, states={})
    for kind, is_, should_be in [("inputs", said.inputs, wanted.inputs), ("outputs", said.outputs, wanted.outputs),
                                 ("states", said.states, wanted.states)]:  # fmt: skip
        yield Finding(kind, is_ == should_be, f"{is_}" + ("" if is_ == should_be else f", not {should_be}"))


def _constant(
    package: Package, name: str, compare: Callable[[Constant], Problems], shape: tuple[int, ...], words: str
) -> Finding:
    """A constant by its name; where coremltools merged it with an equal one, any that is equal."""
    plain = name.replace(".", "_")
    own = next((known for known in (plain, f"{plain}_to_uint16", f"{plain}_to_int16") if known in package.names), None)
    try:
        if own:
            problems = list(compare(package.constant(own)))
            problems += [] if own in package.read else ["nothing in the program reads it"]
            return Finding(name, not problems, "; ".join(problems) or words)
    except ArtifactError as error:
        return Finding(name, ok=False, detail=str(error))
    for other, constant in _alike(package, shape):
        if not list(compare(constant)):
            return Finding(name, ok=True, detail=f"{words}; stored once, as {other}")
    return Finding(name, ok=False, detail="no constant of that name, and none that is equal")


def _left_out(package: Package, name: str, tensor: Tensor) -> Finding | None:
    """A factor of ones, or a term of zeros, that coremltools removed with its operation."""
    is_there = name.replace(".", "_") in package.names
    does_nothing = bool((tensor.half() == (1 if name.endswith(".weight") else 0)).all())
    return None if is_there or not does_nothing else Finding(name, ok=True, detail="does nothing, and was left out")


def _alike(package: Package, shape: tuple[int, ...]) -> Iterator[tuple[str, Constant]]:
    """Constants of one shape; one that is damaged is the finding of its own name, and left out here."""
    for name in package.constants():
        with contextlib.suppress(ArtifactError):
            if package.shape(name) == shape:
                yield name, package.constant(name)


def _leaf(constant: Constant, leaf: Leaf) -> Problems:
    """What differs between a constant and a leaf."""
    found, decoded = _collect(constant), constant.decode()
    kept = leaf.kept if isinstance(leaf, Sparse) else leaf
    mask, is_matrix = found.get("mask"), decoded.ndim == 2 and "codes" in found
    if (mask is not None) != isinstance(leaf, Sparse) or not is_matrix or (mask and mask.shape != decoded.shape):
        yield f"a {constant.operation} of {decoded.shape} is no such matrix"
        return
    if isinstance(leaf, Sparse):
        yield from _mask(found, leaf)
    if isinstance(kept, LowBit):
        yield from _low_bit(found, kept)
    elif not _same(_columns(found["codes"].array, kept.shape), _half(kept.dense(torch.float32))):
        yield "values differ"
    if not _same(decoded[:, : leaf.shape[1]], _half(leaf.dense(torch.float32))):
        yield "what is decoded is not the matrix rounded to float16"


def _collect(constant: Constant, *, inside_table: bool = False) -> dict[str, Stored]:
    """The stored arrays of a chain of constants by their role."""
    found: dict[str, Stored] = {}
    for parameter, value in constant.inputs.items():
        if isinstance(value, Stored):
            role = ROLES.get(parameter, parameter)
            found["table" if inside_table and role == "codes" else role] = value
        elif isinstance(value, tuple):
            found |= _collect(value[0], inside_table=inside_table or parameter == "lut")
    return found


def _low_bit(found: dict[str, Stored], weight: LowBit) -> Problems:
    codes = found["codes"]
    is_signed = codes.type.startswith("int")
    plain = codes.array.astype(np.int16) + (2 ** (weight.bits - 1) if is_signed else 0)
    if codes.type.lstrip("uint") != str(weight.bits):
        yield f"codes are {codes.type}, not of {weight.bits} bits"
    if codes.bytes != -(-codes.array.size * weight.bits // 8):
        yield f"{codes.array.size} codes take {codes.bytes} bytes"
    if not _same(_columns(plain, weight.shape), weight.codes.numpy()):
        yield "codes differ"
    stored = form(weight)
    if not isinstance(stored, Form) or stored.style == "table":
        return  # scales and zeros are in the table, which decides what is decoded
    grid = weight.scales.shape
    if "scales" not in found or not _same(_grid(found["scales"]), _half(weight.scales)):
        yield "scales differ"
    if weight.is_symmetric:
        if "zeros" in found:
            yield "there are zeros, where the middle code serves all"
    elif "zeros" not in found or not _same(_grid(found["zeros"]), weight.zeros.expand(grid).numpy()):
        yield "zeros differ"


def _mask(found: dict[str, Stored], leaf: Sparse) -> Problems:
    mask, width = found["mask"].array, leaf.shape[1]
    if not _same(mask[:, :width].astype(bool), leaf.mask.numpy()) or mask[:, width:].any():
        yield "the mask differs"
    if found["mask"].type != "uint1":
        yield f"the mask is {found['mask'].type}, not uint1"


def _vector(constant: Constant, tensor: Tensor) -> Problems:
    if constant.operation != "const" or not _same(constant.decode(), _half(tensor)):
        yield "values differ"


def _labels(constant: Constant, labels: Tensor) -> Problems:
    if not _same(constant.decode(), labels.numpy()):
        yield "labels differ"


def _size(package: Package, plan: Plan) -> Finding:
    """The files against the plan: a matrix that is stored twice, or wider than it says, shows here."""
    files = sum(path.stat().st_size for path in package.path.rglob("*") if path.is_file())
    detail = f"{files} bytes of files, {plan.bytes} predicted"
    return Finding("bytes of the files", files <= plan.bytes * 1.05, detail)


def _words(leaf: Leaf) -> str:
    match leaf:
        case LowBit():
            return f"{leaf.bits}-bit codes, scales, zero points and decoded values, bit for bit"
        case Sparse():
            return f"mask and {_words(leaf.kept)}" if isinstance(leaf.kept, LowBit) else "mask and float16 values"
        case _:
            return "float16 values, rounded once"


def _columns(array: Array, shape: tuple[int, int]) -> Array:
    """[out, padded] without the padding; kept values [n] as [out, kept]."""
    if array.ndim == 1 and array.size == shape[0] * shape[1]:
        return array.reshape(shape)
    return array[:, : shape[1]] if array.ndim == 2 else array


def _grid(stored: Stored) -> Array:
    """[out, groups], or a table's [out, groups, 1, 1], as [out, groups]."""
    return stored.array[..., 0, 0] if stored.array.ndim == 4 else stored.array


def _half(tensor: Tensor) -> Array:
    values: Array = tensor.to(torch.float16).numpy()
    return values


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool((a == b).all())
