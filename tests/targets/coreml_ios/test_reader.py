"""The reader: what coremltools writes is read equal; what lies is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.errors import ArtifactError
from exporter.ops import Leaf
from exporter.weights import Dense
from targets.coreml_ios import inspection
from targets.coreml_ios.backend import ct, mb, quiet, types
from targets.coreml_ios.constants import KINDS, Constant, Kind, Stored, unpack
from targets.coreml_ios.encoding import Form, form, padded_width, parts, price
from targets.coreml_ios.ops import _constexpr
from targets.coreml_ios.reader import HEADER, RECORD, Package, Weights
from tests.models import low_bit, sparse
from tests.targets.coreml_ios.conftest import Lowered

Get = Callable[[str], Lowered]
STORED = [kind for kind in KINDS if kind.blob is not None]
UNDER_A_BYTE = [kind for kind in KINDS if kind.bits < 8]


# ---- what coremltools writes -----------------------------------------------------------------------------------


@given(st.sampled_from(UNDER_A_BYTE), st.lists(st.integers(0, 63), max_size=50))
def test_a_stream_of_bits_is_read_low_bit_first(kind: Kind, numbers: list[int]) -> None:
    codes = [number % 2**kind.bits for number in numbers]
    stream = sum(code << (kind.bits * i) for i, code in enumerate(codes))
    data = np.frombuffer(stream.to_bytes(-(-len(codes) * kind.bits // 8), "little"), np.uint8)

    signed = [code - 16 if kind.name == "int4" and code > 7 else code for code in codes]
    assert unpack(data, kind, len(codes)).tolist() == signed


@pytest.mark.parametrize("kind", STORED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("count", [1, 7, 64, 129])
def test_blobs_that_coremltools_writes_are_read_equal(kind: Kind, count: int, tmp_path: Path) -> None:
    from coremltools.libmilstoragepython import _BlobStorageWriter

    generator = np.random.default_rng(count)
    low = -8 if kind.name == "int4" else 0
    values = generator.integers(low, low + 2 ** min(kind.bits, 7), count).astype(kind.numpy)
    names = {"fp16": "fp16", "fp32": "float"}
    writer = _BlobStorageWriter(str(tmp_path / "weight.bin"))
    write = getattr(writer, f"write_{names.get(kind.name, kind.name)}_data")
    if kind.name in ("int4", "uint1", "uint2", "uint3", "uint4", "uint6"):
        values = values.astype(types.nptype_from_builtin(types.string_to_builtin(kind.name)))
    offset = write(values.view(np.uint16) if kind.name == "fp16" else values)
    del writer

    data = Weights(tmp_path / "weight.bin").blob(offset, kind, count, "it")
    assert np.array_equal(unpack(data, kind, count), values)


LEAVES: dict[str, Leaf] = {
    "float16": Dense(torch.randn(12, 40)),
    "4 bits": low_bit((12, 64), 4, 32),
    "4 bits, padded": low_bit((12, 43), 4, 16),
    "4 bits, zero points": low_bit((12, 64), 4, 32, symmetric=False),
    "8 bits a row": low_bit((12, 43), 8, 43),
    "1 bit": low_bit((12, 64), 1, 32),
    "2 bits, zero points": low_bit((12, 64), 2, 32, symmetric=False),
    "3 bits a row": low_bit((12, 172), 3, 172),
    "6 bits a row": low_bit((3, 4096), 6, 4096),
    "2:4": sparse((12, 40), 2, 4),
    "2:4 of 4 bits": sparse((12, 128), 2, 4, bits=4, group=32),
    "2:4 of 4 bits, padded": sparse((12, 88), 2, 4, bits=4, group=16),
    "4:8 of 2 bits": sparse((12, 64), 4, 8, bits=2),
    "1 bit, halves": replace(low_bit((12, 64), 1, 32), zeros=torch.full((1, 1), 0.5)),
    "4 bits, thirds": replace(low_bit((2, 512), 4, 512), zeros=torch.full((2, 1), 22 / 3)),
    "8 bits, quarters": replace(low_bit((4, 64), 8, 32), zeros=torch.full((4, 2), 128.25)),
}


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_decodes_to_its_matrix_rounded_once(name: str, tmp_path: Path) -> None:
    leaf = LEAVES[name]
    assert isinstance(price(leaf), int)
    made: list[Any] = []

    @mb.program(input_specs=[mb.TensorSpec((1, leaf.shape[0]), dtype=types.fp16)], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        made.append(_constexpr(parts(leaf, "w"), "w"))
        return mb.matmul(x=x, y=made[0], name="y")

    theirs = _decoded_by_coremltools(made[0])
    with quiet():
        ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
                   package_dir=str(tmp_path / "p.mlpackage"))  # fmt: skip
    ours = Package(tmp_path / "p.mlpackage").constant("w").decode()

    assert ours.shape == (leaf.shape[0], padded_width(leaf))
    assert np.array_equal(ours[:, : leaf.shape[1]], leaf.dense().half().numpy())
    assert theirs is None or np.array_equal(theirs, ours)


def _decoded_by_coremltools(var: Any) -> Any:
    """What coremltools' own inference says; it has none for a table that is itself decoded."""
    if var.op.op_type == "const":
        return var.val
    inner = [found.op for found in var.op.inputs.values() if found.op.op_type.startswith("constexpr")]
    is_scaled_table = any("lut" in op.op_type and op.lut.val is None for op in [var.op, *inner] if "lut" in op.op_type)
    return None if is_scaled_table else var.op.materialized_val_inference()


# ---- damage ----------------------------------------------------------------------------------------------------


def blobs(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(offset of the record, of the data, bytes) of every blob, by walking the file."""
    count, version = HEADER.unpack(data[: HEADER.size])
    assert version == 2
    offset = HEADER.size
    for _ in range(count):
        _, _, size, start, _ = RECORD.unpack(data[offset : offset + RECORD.size])
        yield offset, start, size
        offset = -(-(start + size) // 64) * 64
    assert offset - len(data) in range(64)


@pytest.fixture
def damaged(lowered: Get, tmp_path: Path) -> Callable[[], Lowered]:
    made = lowered("forest")
    shutil.copytree(made.folder, tmp_path / "copy")
    return lambda: Lowered(made.model, made.plan, tmp_path / "copy")


def test_a_flipped_bit_is_found_in_every_blob(damaged: Callable[[], Lowered]) -> None:
    made = damaged()
    whole = made.weights.read_bytes()
    for record, start, size in blobs(whole):
        for at in (record, record + 4, record + 8, record + 16, start, start + size - 1):
            made.weights.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert not all(finding.ok for finding in inspection.inspect(made.folder, made.model, made.plan)), (
                record,
                at,
            )


def test_a_matrix_whose_record_is_damaged_is_named(damaged: Callable[[], Lowered]) -> None:
    made = damaged()
    whole = made.weights.read_bytes()
    record = next(record for record, _, size in blobs(whole) if size == 96 * 64 * 2)
    made.weights.write_bytes(whole[:record] + b"\0" + whole[record + 1 :])
    wrong = [finding for finding in inspection.inspect(made.folder, made.model, made.plan) if not finding.ok]
    assert [finding.what for finding in wrong] == ["model.embed_tokens"]
    assert "begins with 0xdeadbe00, not 0xdeadbeef" in wrong[0].detail


@settings(max_examples=30, deadline=None)
@given(cut=st.floats(0, 0.999))
def test_a_truncated_weight_file_never_passes(cut: float, lowered: Get, tmp_path_factory: Any) -> None:
    made = lowered("forest")
    copy = Lowered(made.model, made.plan, tmp_path_factory.mktemp("cut"))
    shutil.copytree(made.folder, copy.folder, dirs_exist_ok=True)
    whole = copy.weights.read_bytes()
    copy.weights.write_bytes(whole[: int(len(whole) * cut)])
    try:
        findings = inspection.inspect(copy.folder, copy.model, copy.plan)
    except ArtifactError:
        return
    assert not all(finding.ok for finding in findings)


def a_blob(tmp_path: Path, record: bytes = b"", header: bytes = HEADER.pack(1, 2), data: bytes = bytes(64)) -> Weights:
    record = record or RECORD.pack(0xDEADBEEF, 3, 20, 128, 0)
    (tmp_path / "weight.bin").write_bytes(header + record + data)
    return Weights(tmp_path / "weight.bin")


UINT8, UINT3 = (next(kind for kind in KINDS if kind.name == name) for name in ("uint8", "uint3"))


def test_an_honest_blob_is_read(tmp_path: Path) -> None:
    assert a_blob(tmp_path).blob(64, UINT8, 20, "it").tolist() == [0] * 20


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (RECORD.pack(0xDEADBEEE, 3, 20, 128, 0), "it at 64 begins with 0xdeadbeee, not 0xdeadbeef"),
        (RECORD.pack(0xDEADBEEF, 4, 20, 128, 0), r"it is of type 4; the program says uint8 \(3\)"),
        (
            RECORD.pack(0xDEADBEEF, 3, 21, 128, 0),
            "it has 21 bytes and 0 padding bits; 20 values of uint8 take 20",
        ),
        (RECORD.pack(0xDEADBEEF, 3, 20, 128, 8), "it has 20 bytes and 8 padding bits"),
        (RECORD.pack(0xDEADBEEF, 3, 20, 192, 0), "data of it at 192, 20 bytes, is outside or unaligned"),
        (RECORD.pack(0xDEADBEEF, 3, 20, 130, 0), "data of it at 130, 20 bytes, is outside or unaligned"),
        (RECORD.pack(0xDEADBEEF, 3, 20, 64, 0), "data of it at 64, 20 bytes, is outside or unaligned"),
        (RECORD.pack(0xDEADBEEF, 3, 20, 2**64 - 64, 0), "is outside or unaligned"),
    ],
)
def test_a_lying_record_is_refused(record: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        a_blob(tmp_path, record).blob(64, UINT8, 20, "it")


@pytest.mark.parametrize("offset", [0, 65, 192, 2**63])
def test_an_offset_outside_the_file_is_refused(offset: int, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"it lies at {offset}, outside its 192 bytes or unaligned"):
        a_blob(tmp_path).blob(offset, UINT8, 20, "it")


def test_a_huge_count_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="values of uint3 take"):
        a_blob(tmp_path, RECORD.pack(0xDEADBEEF, 12, 20, 128, 0)).blob(64, UINT3, 2**60, "it")


def test_a_weight_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"weight\.bin is missing"):
        Weights(tmp_path / "weight.bin")
    with pytest.raises(ArtifactError, match="of version 3; version 2 is read"):
        a_blob(tmp_path, header=HEADER.pack(1, 3))
    (tmp_path / "weight.bin").write_bytes(b"12")
    with pytest.raises(ArtifactError, match="has 2 bytes, less than its header"):
        Weights(tmp_path / "weight.bin")


# ---- parts that do not fit -------------------------------------------------------------------------------------


def stored(*values: int, shape: tuple[int, ...]) -> Stored:
    return Stored(np.array(values, np.uint8), UINT8, shape)


ONES = stored(1, 0, 1, 0, shape=(2, 2))
TABLE = stored(5, 6, shape=(1, 1, 2, 1))


@pytest.mark.parametrize(
    ("operation", "inputs", "message"),
    [
        ("blockwise_shift_scale", {"data": ONES, "scale": stored(1, 1, 1, shape=(3, 1))}, "3 scales do not divide 2"),
        ("blockwise_shift_scale", {"data": ONES, "scale": stored(1, shape=(1,))}, r"scales are \(1,\), data \(2, 2\)"),
        (
            "blockwise_shift_scale",
            {"data": ONES, "scale": stored(1, shape=(1, 1)), "offset": stored(1, 1, shape=(2, 1))},
            r"offsets are \(2, 1\), scales \(1, 1\)",
        ),
        (
            "lut_to_dense",
            {"indices": ONES, "lut": stored(5, 6, shape=(2, 1))},
            r"a table \(2, 1\) for indices \(2, 2\)",
        ),
        ("lut_to_dense", {"indices": stored(0, 2, shape=(1, 2)), "lut": TABLE}, "an index is outside its table"),
        (
            "sparse_to_dense",
            {"nonzero_data": stored(7, shape=(1,)), "mask": ONES},
            "kept values for 2 ones in the mask",
        ),
        (
            "sparse_to_dense",
            {"nonzero_data": (Constant("const", {"val": ONES}), 1), "mask": ONES},
            "const has 1 outputs",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(operation: str, inputs: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Constant(f"constexpr_{operation}", inputs).decode()


# ---- lying programs --------------------------------------------------------------------------------------------


def edited(made: Lowered, change: Callable[[Any, Any], None]) -> Package:
    """The package with `change(specification, block)` applied to its program."""
    package = Package(made.package)
    change(package.specification, package.block)
    made.program.write_bytes(package.specification.SerializeToString())
    return Package(made.package)


def operation(block: Any, name: str) -> Any:
    return next(found for found in block.operations if found.outputs and found.outputs[0].name == name)


def _first(block: Any) -> tuple[Any, str]:
    """An operation that scales blocks, and the name of its output."""
    found = next(op for op in block.operations if op.type == "constexpr_blockwise_shift_scale")
    return found, found.outputs[0].name


PROGRAM_LIES: dict[str, tuple[Callable[[Any, str], None], str]] = {
    "another file": (
        lambda op, name: setattr(op.inputs["data"].arguments[0].value.blobFileValue, "fileName", "/etc/passwd"),
        "is in '/etc/passwd'; only weights/weight.bin is read",
    ),
    "a type that is none": (
        lambda op, name: setattr(op.inputs["data"].arguments[0].value.type.tensorType, "dataType", 40),
        "has type number 40, which is not read here",
    ),
    "a size that is not known": (
        lambda op, name: op.inputs["data"].arguments[0].value.type.tensorType.dimensions[0].unknown.SetInParent(),
        "has a size that is not known",
    ),
    "a larger size": (
        lambda op, name: setattr(
            op.inputs["data"].arguments[0].value.type.tensorType.dimensions[0].constant, "size", 2**50
        ),
        "values of int4 take",
    ),
    "no size at all": (
        lambda op, name: (
            [
                setattr(op.inputs["data"].arguments[0].value.type.tensorType.dimensions[i].constant, "size", size)
                for i, size in enumerate((0, 2**62))
            ]
            and None
        ),
        "values of int4 take|has a shape of",
    ),
    "two values": (
        lambda op, name: op.inputs["data"].arguments.append(op.inputs["data"].arguments[0]),
        "has 2 values, not one",
    ),
    "no value": (lambda op, name: op.inputs["data"].ClearField("arguments"), "has 0 values, not one"),
    "itself": (
        lambda op, name: setattr(op.inputs["data"].arguments[0], "name", name),
        "which is not made before it",
    ),
    "nothing": (
        lambda op, name: setattr(op.inputs["data"].arguments[0], "name", "nowhere"),
        "reads 'nowhere', which is not made before it",
    ),
    "no constant": (
        lambda op, name: setattr(op, "type", "linear"),
        "is made by linear, which is no constant",
    ),
    "a parameter that is not known": (
        lambda op, name: op.inputs["axis"].CopyFrom(op.inputs["data"]),
        "is a constexpr_blockwise_shift_scale of axis, data, scale at depth 0",
    ),
    "a parameter too few": (
        lambda op, name: op.inputs.pop("scale") and None,
        "is a constexpr_blockwise_shift_scale of data at depth 0",
    ),
}


@pytest.mark.parametrize("name", PROGRAM_LIES)
def test_a_lying_program_is_refused(name: str, lowered: Get, tmp_path: Path) -> None:
    change, message = PROGRAM_LIES[name]
    made = copied(lowered("unequal in 4 bits"), tmp_path)
    _, output = _first(Package(made.package).block)
    package = edited(made, lambda _, block: change(*_first(block)))
    with pytest.raises(ArtifactError, match=message):
        package.constant(output).decode()
    assert not all(finding.ok for finding in inspection.inspect(made.folder, made.model, made.plan))


def copied(made: Lowered, to: Path) -> Lowered:
    shutil.copytree(made.folder, to / "copy")
    return Lowered(made.model, made.plan, to / "copy")


def test_a_constant_of_another_name_is_refused(lowered: Get) -> None:
    with pytest.raises(ArtifactError, match="no constant named 'lm_head'"):
        Package(lowered("unequal").package).constant("lm_head")


def test_a_name_that_is_made_twice_is_refused(lowered: Get, tmp_path: Path) -> None:
    made = copied(lowered("unequal"), tmp_path)
    with pytest.raises(ArtifactError, match="two operations make 'model_embed_tokens'"):
        edited(made, lambda _, block: block.operations.append(operation(block, "model_embed_tokens")))


def test_a_value_in_the_program_of_another_size_is_refused(lowered: Get, tmp_path: Path) -> None:
    made = copied(lowered("unequal"), tmp_path)

    def change(_: Any, block: Any) -> None:
        value = operation(block, "model_embed_tokens").attributes["val"]
        value.immediateValue.tensor.bytes.values = b"123"

    with pytest.raises(ArtifactError, match="model_embed_tokens has 3 bytes; 6144 values of fp16 take 12288"):
        edited(made, change).constant("model_embed_tokens")


def test_a_value_in_the_program_of_another_type_is_refused(lowered: Get, tmp_path: Path) -> None:
    made = copied(lowered("unequal"), tmp_path)

    def change(_: Any, block: Any) -> None:
        operation(block, "model_embed_tokens").attributes["val"].immediateValue.tensor.strings.values.append("x")

    with pytest.raises(ArtifactError, match="values of model_embed_tokens are not of type fp16"):
        edited(made, change).constant("model_embed_tokens")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec, _: spec.ClearField("mlProgram"), "no ML program with one function, main"),
        (lambda spec, _: spec.mlProgram.functions["other"].SetInParent(), "no ML program with one function, main"),
        (lambda spec, _: setattr(spec.mlProgram.functions["main"], "opset", "CoreML9"), "no block for its opset"),
    ],
)
def test_a_program_without_its_function_is_refused(
    change: Callable[[Any, Any], None], message: str, lowered: Get, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message):
        edited(copied(lowered("unequal"), tmp_path), change)


def test_another_interface_is_found(lowered: Get, tmp_path: Path) -> None:
    made = copied(lowered("unequal"), tmp_path)
    edited(made, lambda spec, _: setattr(spec.description.state[0], "name", "keys"))
    wrong = [finding for finding in inspection.inspect(made.folder, made.model, made.plan) if not finding.ok]
    assert [finding.what for finding in wrong] == ["states"]


def test_a_constant_that_nothing_reads_is_found(lowered: Get, tmp_path: Path) -> None:
    made = copied(lowered("unequal"), tmp_path)
    name = "model_layers_0_mlp_up_proj"

    def change(_: Any, block: Any) -> None:
        reader = next(
            op for op in block.operations if op.type == "linear" and op.inputs["weight"].arguments[0].name == name
        )
        reader.inputs["weight"].arguments[0].name = "model_layers_0_mlp_gate_proj"

    edited(made, change)
    wrong = [finding for finding in inspection.inspect(made.folder, made.model, made.plan) if not finding.ok]
    assert [(finding.what, finding.detail) for finding in wrong] == [
        ("model.layers.0.mlp.up_proj", "nothing in the program reads it")
    ]


# ---- lying folders ---------------------------------------------------------------------------------------------


def test_a_folder_without_a_package_is_refused(lowered: Get, tmp_path: Path) -> None:
    made = lowered("unequal")
    with pytest.raises(ArtifactError, match=r"is no Core ML package: it has no Manifest\.json"):
        inspection.inspect(tmp_path, made.model, made.plan)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"itemInfoEntries": {}, "rootModelIdentifier": "x"}', "[" * 9999])
def test_a_manifest_that_is_none_is_refused(text: str, lowered: Get, tmp_path: Path) -> None:
    made = copied(lowered("unequal"), tmp_path)
    (made.package / "Manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="is not a package's manifest"):
        Package(made.package)


@pytest.mark.parametrize(
    ("path", "message"), [("../../etc/passwd", "leaves its folder"), ("com.apple.CoreML/more", "a package of ours has")]
)
def test_a_manifest_of_other_files_is_refused(path: str, message: str, lowered: Get, tmp_path: Path) -> None:
    made = copied(lowered("unequal"), tmp_path)
    manifest = json.loads((made.package / "Manifest.json").read_text())
    next(iter(manifest["itemInfoEntries"].values()))["path"] = path
    (made.package / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=message):
        Package(made.package)


def test_a_manifest_that_is_too_large_is_refused(lowered: Get, tmp_path: Path) -> None:
    made = copied(lowered("unequal"), tmp_path)
    (made.package / "Manifest.json").write_bytes(bytes(2**20 + 1))
    with pytest.raises(ArtifactError, match="has 1048577 bytes; at most 1048576 are read"):
        Package(made.package)


def test_a_program_that_is_none_is_refused(lowered: Get, tmp_path: Path) -> None:
    made = copied(lowered("unequal"), tmp_path)
    made.program.write_bytes(b"\xff" * 100)
    with pytest.raises(ArtifactError, match=r"model.mlmodel is not a Core ML model"):
        Package(made.package)
    made.program.unlink()
    with pytest.raises(ArtifactError, match=r"model.mlmodel is missing"):
        Package(made.package)


def test_the_forms_that_are_tested_are_all_forms() -> None:
    forms = {form(leaf) for leaf in LEAVES.values() if hasattr(leaf, "codes")}
    assert {found.style for found in forms if isinstance(found, Form)} == {"blocks", "scaled table", "table"}
    assert {found.zeros for found in forms if isinstance(found, Form)} == {"none", "integer", "float16"}
