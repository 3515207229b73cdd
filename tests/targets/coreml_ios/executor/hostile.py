"""Packages that were damaged on purpose: small programs of every kind, and ways to damage their files."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from targets.coreml_ios.backend import ct, mb, proto, quiet, types
from targets.coreml_ios.executor import ReferenceModel

FILES = {
    "manifest": "Manifest.json", "program": "Data/com.apple.CoreML/model.mlmodel",
    "weights": "Data/com.apple.CoreML/weights/weight.bin",
}  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 64, 255, 2**15, 2**20, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63))


@dataclass(frozen=True)
class Base:
    """A package that runs, and what it is given.

    Args:
        files: Bytes by what they are: `manifest`, `program`, `weights`.
        inputs: For `predict`.
    """

    files: dict[str, bytes]
    inputs: dict[str, Any]


def write(files: dict[str, bytes], folder: Path) -> Path:
    """Put files where a package has them."""
    package = folder / "damaged.mlpackage"
    for kind, content in files.items():
        path = package / FILES[kind]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return package


def run(package: Path, inputs: dict[str, Any]) -> None:
    """Open a package and run it once, as a user would."""
    model = ReferenceModel(package)
    model.predict(inputs, model.make_state() if model.description.state else None)


def bases(folder: Path) -> dict[str, Base]:
    """Small programs that together have most operations and every kind of constant."""
    return {name: _base(folder / name, *program()) for name, program in PROGRAMS.items()}


def _base(folder: Path, specs: dict[str, Any], function: Callable[..., Any], target: Any = ct.target.iOS18) -> Base:
    program = mb.program(input_specs=list(specs.values()), opset_version=target)(function)
    folder.mkdir()
    package = folder / "whole.mlpackage"
    with quiet():
        made = ct.convert(program, minimum_deployment_target=target, skip_model_load=True, package_dir=str(package))
    inputs = {feature.name: _filled(feature) for feature in made.get_spec().description.input}
    files = {kind: (package / name).read_bytes() for kind, name in FILES.items() if (package / name).is_file()}
    shutil.rmtree(folder)
    return Base(files, inputs)


def _filled(feature: Any) -> Any:
    shape = tuple(feature.type.multiArrayType.shape)
    return (np.arange(np.prod(shape)).reshape(shape) % 3).astype(np.float32)


# ---- programs ----------------------------------------------------------------------------------------------------


def _typed(values: Any, name: str) -> Any:
    return np.asarray(values).astype(types.nptype_from_builtin(types.string_to_builtin(name)))


def _constants() -> Any:
    """Every chain of iOS 18 constants, each used by a linear."""
    rng = np.random.default_rng(0)
    half = partial(np.asarray, dtype=np.float16)

    def program(x: Any) -> Any:
        blocks = mb.constexpr_blockwise_shift_scale(
            data=_typed(rng.integers(-8, 8, (8, 32)), "int4"), scale=half(rng.random((8, 2))),
            offset=_typed(rng.integers(-8, 8, (8, 2)), "int4"))  # fmt: skip
        table = mb.constexpr_lut_to_dense(
            indices=_typed(rng.integers(0, 8, (8, 32)), "uint3"), lut=half(rng.random((2, 1, 8, 1)))
        )
        mask = np.tile([1, 0, 1, 0], (8, 8))
        spread, kept = mb.constexpr_lut_to_sparse(
            indices_mask=_typed(mask, "uint1"), indices_nonzero_data=_typed(rng.integers(0, 2, 128), "uint1"),
            lut=_typed(rng.integers(-1, 2, (1, 1, 2, 1)), "int8"))  # fmt: skip
        spread, kept = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=spread, nonzero_data=kept, scale=half(rng.random((8, 1)))
        )
        sparse = mb.constexpr_sparse_to_dense(nonzero_data=kept, mask=spread)
        zero = half(np.zeros(8))
        made = [mb.linear(x=x, weight=weight, bias=zero) for weight in (blocks, table, sparse)]
        return mb.add(x=mb.concat(values=made, axis=-1), y=half(rng.random((4, 24))))

    return {"x": mb.TensorSpec((4, 32), dtype=types.fp16)}, program


def _older_constants() -> Any:
    """The constants of iOS 16, whose parts are attributes."""
    rng = np.random.default_rng(0)

    def program(x: Any) -> Any:
        affine = mb.constexpr_affine_dequantize(
            quantized_data=rng.integers(0, 255, (8, 32)).astype(np.uint8), zero_point=np.uint8(3),
            scale=rng.random(8).astype(np.float16), axis=0)  # fmt: skip
        table = mb.constexpr_lut_to_dense(
            indices=rng.integers(0, 255, 128).astype(np.uint8), lut=rng.random(16).astype(np.float16),
            shape=np.array([8, 32], np.uint32))  # fmt: skip
        sparse = mb.constexpr_sparse_to_dense(
            nonzero_data=rng.random(128).astype(np.float16), mask=np.full(32, 0b01010101, np.uint8),
            shape=np.array([8, 32], np.uint32))  # fmt: skip
        zero = np.zeros(8, np.float16)
        made = [mb.linear(x=x, weight=weight, bias=zero) for weight in (affine, table, sparse)]
        return mb.concat(values=made, axis=-1)

    return {"x": mb.TensorSpec((4, 32), dtype=types.fp16)}, program, ct.target.iOS16


def _shapes() -> Any:
    """Shapes that are computed: where sizes come from, lies do most harm."""

    def program(x: Any, y: Any) -> Any:
        size = mb.slice_by_index(x=mb.shape(x=y), begin=[0], end=[1], squeeze_mask=[True])
        wide = mb.tile(x=x, reps=mb.concat(values=[2, size], axis=0))
        filled = mb.fill(shape=mb.concat(values=[size, 3], axis=0), value=1.5)
        padded = mb.pad(x=wide, pad=[0, 0, 1, 2], mode="constant", constant_val=np.float32(0))
        turned = mb.reshape(x=padded, shape=mb.concat(values=[-1, size], axis=0))
        hot = mb.one_hot(indices=mb.range_1d(start=0, end=size, step=1), one_hot_vector_size=5)
        picked = mb.gather(x=turned, indices=[0, 1], axis=0)
        best, places = mb.topk(x=filled, k=2, axis=-1)
        spread = mb.scatter_nd(data=filled, indices=[[0, 1]], updates=[2.0])
        summed = mb.cumsum(x=mb.cast(x=places, dtype="fp32"), axis=0)
        return picked, hot, best, summed, spread, mb.split(x=filled, num_splits=3, axis=1)[0]

    return {"x": mb.TensorSpec((2, 3)), "y": mb.TensorSpec((4, 3))}, program


def _pictures() -> Any:
    """Convolutions, pools and resizes."""
    rng = np.random.default_rng(0)

    def program(x: Any) -> Any:
        w = rng.random((4, 3, 3, 3)).astype(np.float32)
        y = mb.conv(x=x, weight=w, strides=[1, 1], pad_type="custom", pad=[1, 1, 1, 1], dilations=[1, 1])
        y = mb.max_pool(x=y, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid")
        y = mb.batch_norm(x=y, mean=np.zeros(4, np.float32), variance=np.ones(4, np.float32))
        up = mb.upsample_bilinear(x=y, scale_factor_height=2, scale_factor_width=2)
        back = mb.conv_transpose(x=up, weight=rng.random((4, 2, 2, 2)).astype(np.float32), strides=[2, 2])
        small = mb.resize_nearest_neighbor(x=back, target_size_height=3, target_size_width=5)
        return mb.avg_pool(x=small, kernel_sizes=[3, 3], strides=[1, 1], pad_type="same"), mb.softmax(x=up, axis=-1)

    return {"x": mb.TensorSpec((1, 3, 8, 8))}, program


def _flow() -> Any:
    """A branch, a loop, lists."""

    def program(x: Any, n: Any) -> Any:
        is_large = mb.greater(x=mb.reduce_sum(x=x), y=2.0)
        chosen = mb.cond(pred=is_large, _true_fn=lambda: mb.add(x=x, y=1.0), _false_fn=lambda: mb.mul(x=x, y=3.0))
        listed = mb.make_list(init_length=2, elem_shape=(3,), dynamic_length=True)
        listed = mb.list_write(ls=listed, index=0, value=x)
        count = mb.reduce_max(x=mb.cast(x=n, dtype="int32"))
        _, looped = mb.while_loop(
            _cond=lambda i, _: mb.less(x=i, y=4), _body=lambda i, v: (mb.add(x=i, y=1), mb.add(x=v, y=x)),
            loop_vars=(count, chosen))  # fmt: skip
        return looped, mb.list_read(ls=listed, index=0)

    return {"x": mb.TensorSpec((3,)), "n": mb.TensorSpec((2,))}, program


def _recurrent() -> Any:
    """Recurrent layers."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> Any:
        return rng.random(shape).astype(np.float32)

    def program(x: Any) -> Any:
        zero = np.zeros((1, 4), np.float32)
        y, h, c = mb.lstm(x=x, initial_h=zero, initial_c=zero, weight_ih=weights(16, 3), weight_hh=weights(16, 4),
                          bias=weights(16), output_sequence=True)  # fmt: skip
        z, _ = mb.gru(x=y, initial_h=zero, weight_ih=weights(12, 4), weight_hh=weights(12, 4), bias=weights(12))
        return z, mb.concat(values=[h, c], axis=-1), mb.l2_norm(x=mb.expand_dims(x=y, axes=[0]))

    return {"x": mb.TensorSpec((5, 1, 3))}, program


def _states() -> Any:
    """A state that is read, sliced, written and attended to."""

    def program(x: Any, cache: Any) -> Any:
        kept = mb.read_state(input=cache)
        changed = mb.slice_update(x=kept, update=x, begin=[0, 1, 0], end=[1, 3, 8])
        kept = mb.coreml_update_state(state=cache, value=changed)
        y = mb.scaled_dot_product_attention(query=x, key=kept, value=kept)
        return mb.layer_norm(x=y, axes=[-1], epsilon=np.float16(1e-3))

    specs = {"x": mb.TensorSpec((1, 2, 8), dtype=types.fp16),
             "cache": mb.StateTensorSpec((1, 4, 8), dtype=types.fp16)}  # fmt: skip
    return specs, program


PROGRAMS: dict[str, Callable[[], Any]] = {
    "constants": _constants, "older constants": _older_constants, "shapes": _shapes, "pictures": _pictures,
    "flow": _flow, "recurrent": _recurrent, "states": _states,
}  # fmt: skip


# ---- damage ------------------------------------------------------------------------------------------------------


def damaged(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """The files with one to three things wrong: in the bytes of a file, or in the meaning of the program."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.6:
            files["program"] = _with_other_meaning(files["program"], rng)
        else:
            kind = rng.choices(tuple(files), (1, 4, 4)[: len(files)])[0]
            files[kind] = _with_other_bytes(files[kind], rng)
    return files


def _with_other_bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return rng.randbytes(rng.randrange(200))
    place, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64))
    match rng.randrange(5):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        case 2:
            return data[:place] + rng.randbytes(length) + data[place + length :]
        case 3:
            return data[:place] + rng.choice((b"\xff", b"\0")) * length + data[place + length :]
        case _:
            return data[:place] + data[place + length :]


def _with_other_meaning(data: bytes, rng: random.Random) -> bytes:
    """The program with one field changed: a number, a name, a type, an element that is gone, doubled or moved."""
    specification = proto.Model_pb2.Model()
    try:
        specification.ParseFromString(data)
    except Exception:  # damaged before: damage the bytes again
        return _with_other_bytes(data, rng)
    fields = list(_fields(specification))
    names = [value for message, field, value in fields if isinstance(value, str)]
    message, field, value = rng.choice(fields)
    try:
        _change(message, field, value, names, rng)
    except (ValueError, TypeError, AttributeError):
        return _with_other_bytes(data, rng)
    return bytes(specification.SerializeToString(deterministic=True))


def _change(message: Any, field: Any, value: Any, names: list[str], rng: random.Random) -> None:
    if isinstance(field, tuple):  # an element of a repeated field
        field, index = field
        several = getattr(message, field.name)
        if rng.random() < 0.3 or not isinstance(value, int | float | str | bytes):
            _reorder(several, index, rng)
        else:
            several[index] = _other(value, names, rng)
    elif isinstance(value, int | float | str | bytes):
        setattr(message, field.name, _other(value, names, rng))
    else:
        message.ClearField(field.name)


def _reorder(several: Any, index: int, rng: random.Random) -> None:
    match rng.randrange(3):
        case 0:
            del several[index]
        case 1:
            several.append(several[index])
        case _:
            other = several[rng.randrange(len(several))]
            first = several[index]
            if hasattr(first, "CopyFrom"):
                first.CopyFrom(other)
            else:
                several[index] = other


def _other(value: Any, names: list[str], rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((*NUMBERS, value + 1, value - 1, value * 2, rng.randrange(40)))
    if isinstance(value, float):
        return rng.choice((0.0, -value, float("inf"), float("nan"), 1e38, -1e-38))
    if isinstance(value, bytes):
        return _with_other_bytes(value, rng)
    return rng.choice((*names, "", "\0", "x" * 300))


def _fields(message: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Everything that is set in a message: its message, its field (and place among several), its value."""
    for field, value in message.ListFields():
        if field.message_type and field.message_type.GetOptions().map_entry:
            for key in list(value):
                if hasattr(value[key], "ListFields"):
                    yield from _fields(value[key])
        elif hasattr(value, "append"):
            for index, one in enumerate(value):
                yield message, (field, index), one
                if hasattr(one, "ListFields"):
                    yield from _fields(one)
        else:
            yield message, field, value
            if hasattr(value, "ListFields"):
                yield from _fields(value)
