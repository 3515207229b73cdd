"""Reading a written .pte back: what is delegated, which constants it holds, what its constant methods say."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack import serialization
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.schema import KernelCall
from torch import Tensor

from exporter.errors import ArtifactError
from exporter.model import Model
from exporter.plugins import Finding, Plan
from exporter.weights import Dense, LowBit, Shared, Weight, nodes
from targets.executorch_android import layout
from targets.executorch_android.ops import mean_row, quarter_turn
from targets.executorch_android.package import FILE, has_cache, metadata
from targets.executorch_android.uses import Uses

KINDS = {(4, False): "qbint4", (4, True): "qcint4", (8, True): "qcint8"}  # bits, one scale a row -> XNNPACK's type
CONSTANT_ALIGNMENT = 16  # bytes
PREFIX = "xnn_datatype_"
FIELDS = {"Int": "int_val", "Bool": "bool_val", "Double": "double_val"}  # values of constant methods


@dataclass(frozen=True)
class Contents:
    """A .pte as far as it is checked.

    Args:
        file: All of it.
        named: sha256 of each blob that delegates read.
        constants: sha256 of each constant of the program.
        methods: Value of each constant method.
        inputs: Type and shape of each input of `forward`; the outputs likewise.
        linears: Input type and weight type of each linear in a delegate, counted.
        attention: Arguments of each `custom_sdpa` that are constants, in order.
        kept: Number of cache updates.
    """

    file: bytes
    named: frozenset[str]
    constants: frozenset[str]
    methods: dict[str, Any]
    inputs: list[tuple[str, list[int]]]
    outputs: list[tuple[str, list[int]]]
    linears: Counter[tuple[str, str]]
    attention: list[dict[str, Any]]
    kept: int

    def holds(self, where: str, data: bytes) -> bool:
        """Whether some bytes are a blob of a delegate (`named`) or a constant of the program (`constants`)."""
        return _digest(data) in self.named if where == "named" else _digest(_padded(data)) in self.constants


def read(path: Path) -> Contents:
    """Read a .pte.

    Raises:
        ArtifactError: it is missing, or no such file.
    """
    if not path.is_file():
        raise ArtifactError(f"{path.parent} has no {path.name}; `pocket export` makes it")
    try:
        return _contents(path.read_bytes())
    except Exception as error:  # a damaged file is whatever ExecuTorch's readers stumble over
        raise ArtifactError(f"{path} is no program that ExecuTorch can read: {error or type(error).__name__}") from None


def _contents(data: bytes) -> Contents:
    file = deserialize_pte_binary(data)
    plans = {plan.name: plan for plan in file.program.execution_plan}
    forward = plans.pop("forward")
    graphs = [_graph(file.program.backend_delegate_data[d.processed.index].data) for d in forward.delegates]
    return Contents(
        file=data,
        named=frozenset(_digest(bytes(blob)) for blob in _blobs(file.named_data)),
        constants=frozenset(_digest(_padded(bytes(buffer.storage))) for buffer in file.program.constant_buffer),
        methods={name: _constant(plan) for name, plan in plans.items()},
        inputs=[_tensor(forward.values[i]) for i in forward.inputs],
        outputs=[_tensor(forward.values[i]) for i in forward.outputs],
        linears=Counter(pair for graph in graphs for pair in _linears(graph)),
        attention=[_constants(forward, call) for call in _calls(forward, "llama::custom_sdpa")],
        kept=sum(1 for _ in _calls(forward, "llama::update_cache")),
    )


def findings(folder: Path, model: Model, plan: Plan) -> Iterator[Finding]:
    """Compare a written folder with its plan."""
    contents = read(folder / FILE)
    uses = Uses(model)
    yield from _interface(contents, model, plan)
    yield _delegated(contents, plan, uses)
    for site, weight in plan.weights.items():
        yield _weight(contents, site, weight, uses)
    yield _tensors(contents, "norms and biases", {name: tensor.float() for name, tensor in model.tensors.items()})
    if model.architecture.config is None:
        yield _tensors(contents, "means, epsilon, rotations", dict(_tables(model, plan.context)))


def _interface(contents: Contents, model: Model, plan: Plan) -> Iterator[Finding]:
    expected = metadata(model, plan.context)
    wrong = sorted(name for name, value in expected.items() if contents.methods.get(name) != value)
    yield Finding("constant methods", not wrong, f"wrong or missing: {', '.join(wrong)}" if wrong else "as stated")
    longest, outputs, cached = expected["get_max_seq_len"], model.architecture.outputs, has_cache(model)
    wanted = [("LONG", [1, longest]), ("LONG", [1])][: 2 if cached else 1], [("FLOAT", [1, longest, outputs])]
    found = contents.inputs, contents.outputs
    takes = "tokens [1, T], position [1]" if cached else "tokens [1, T]"
    gives = "logits [1, T, vocab]" if model.architecture.causal else "[1, T, hidden]"
    yield Finding(f"forward({takes}) -> {gives}", found == wanted, f"{found}")
    if model.architecture.config is None:  # else transformers decides how it attends
        yield _attention(contents, model)


def _attention(contents: Contents, model: Model) -> Finding:
    """One attention a layer, with its scale; a decoder's is causal, over caches that are both written."""
    layers, causal = model.architecture.layers, model.architecture.causal
    wanted = [{"bool_val": [causal], "double_val": [0.0, layer.head_dim**-0.5]} for layer in layers]
    is_same = contents.attention == wanted and contents.kept == (2 * len(layers) if causal else 0)
    detail = f"{len(contents.attention)} llama::custom_sdpa, {contents.kept} llama::update_cache"
    return Finding("attention", is_same, detail if is_same else f"{detail}: {contents.attention}, not {wanted}")


def _delegated(contents: Contents, plan: Plan, uses: Uses) -> Finding:
    """Every leaf with codes is one XNNPACK linear with int8 rows and that weight type; nothing is weight-only."""
    leaves = [leaf for site in uses.products for leaf in nodes(plan.weights[site]) if isinstance(leaf, LowBit)]
    expected = Counter(("qdint8", KINDS[leaf.bits, layout.is_row_wise(leaf)]) for leaf in leaves)
    found = Counter({pair: count for pair, count in contents.linears.items() if pair != ("fp32", "fp32")})
    words = ", ".join(f"{count} of {pair[1]} on {pair[0]} rows" for pair, count in sorted(found.items())) or "none"
    return Finding("linears with codes in XNNPACK", found == expected, f"{words}, planned {sum(expected.values())}")


def _weight(contents: Contents, site: str, weight: Weight, uses: Uses) -> Finding:
    parts = list(_parts(site, weight, uses))
    lacking = sorted({what for what, where, data in parts if not contents.holds(where, data)})
    if lacking:
        return Finding(site, False, f"not in the file: {', '.join(lacking)}")
    is_twice = site in uses.tied and any(contents.file.count(data) > 1 for data in _once(weight))
    return Finding(site, not is_twice, "stored twice" if is_twice else "bit for bit")


def _once(weight: Weight) -> Iterator[bytes]:
    """What a tied matrix keeps once in the file."""
    if isinstance(weight, Dense):
        yield _bytes(weight.dense())
    if isinstance(weight, LowBit) and layout.is_shareable(weight):
        yield layout.packed_for_product(weight)


def _parts(site: str, weight: Weight, uses: Uses) -> Iterator[tuple[str, str, bytes]]:
    """Each part of a tree: its name, where it lies in the file, its bytes."""
    is_tied = site in uses.tied
    for node in nodes(weight):
        if isinstance(node, Dense):
            yield "values", "constants" if site in uses.lookups else "named", _bytes(node.dense())
        if isinstance(node, Shared):
            yield "labels", "constants", _bytes(node.labels.to(torch.int32))
        if isinstance(node, LowBit) and site in uses.lookups:
            yield from _lookup_parts(node, is_tied)
        if isinstance(node, LowBit) and (is_tied or site not in uses.lookups):
            yield "codes", "named", layout.packed_for_product(node)
            scales = layout.stored_scales(node)
            yield "scales", "named", _bytes(scales if layout.is_row_wise(node) else scales.to(torch.bfloat16))


def _lookup_parts(weight: LowBit, is_tied: bool) -> Iterator[tuple[str, str, bytes]]:
    scales, zeros = layout.lookup_scales(weight)
    is_shared = is_tied and layout.is_shareable(weight)
    codes = layout.shared_codes(weight) if is_shared else layout.packed_for_lookup(weight)
    yield "codes of the lookup", "constants", _bytes(codes)
    yield "scales of the lookup", "constants", _bytes(scales)
    if zeros is not None:
        yield "zero points of the lookup", "constants", _bytes(zeros)


def _tensors(contents: Contents, what: str, tensors: Mapping[str, Tensor]) -> Finding:
    data = {name: _bytes(tensor) for name, tensor in tensors.items()}
    lacking = sorted(
        name for name, v in data.items() if not (contents.holds("named", v) or contents.holds("constants", v))
    )
    return Finding(what, not lacking, f"not in the file: {', '.join(lacking)}" if lacking else "bit for bit")


def _tables(model: Model, context: int) -> Iterator[tuple[str, Tensor]]:
    """Constants that no checkpoint holds: each norm's row of 1/n, their epsilon, rotations by position."""
    architecture = model.architecture
    yield "epsilon", torch.full((1,), architecture.norm_eps)
    for width in {len(tensor) for name, tensor in model.tensors.items() if name.endswith(".weight")}:
        yield f"mean of {width} channels", mean_row(width)
    for width in {layer.head_dim for layer in architecture.layers} if architecture.rope else ():
        assert architecture.rope is not None
        cos, sin = architecture.rope.table(width, context)
        yield from ((f"cosines of {width} channels", cos), (f"sines of {width} channels", sin))
        yield f"quarter turn of {width} channels", quarter_turn(width)


def _blobs(named: Any) -> Iterator[bytes]:
    for entry in named.pte_data.values():
        yield named.buffers[entry.buffer_index]


def _bytes(tensor: Tensor) -> bytes:
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _padded(data: bytes) -> bytes:
    """Constants are read back with the padding after them."""
    return data + bytes(-len(data) % CONSTANT_ALIGNMENT)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _constant(plan: Any) -> Any:
    """What a constant method returns: a list where it is one of token ids, else one number."""
    values = [getattr(plan.values[i].val, FIELDS[type(plan.values[i].val).__name__]) for i in plan.outputs]
    return values if plan.name == "get_eos_ids" else values[0]


def _calls(plan: Any, operator: str) -> Iterator[Any]:
    """Calls of an operator, in the order of the program."""
    for instruction in (i.instr_args for chain in plan.chains for i in chain.instructions):
        if isinstance(instruction, KernelCall) and plan.operators[instruction.op_index].name == operator:
            yield instruction


def _constants(plan: Any, call: Any) -> dict[str, Any]:
    """Truth values and fractions among the arguments of a call, by type, in order."""
    found: dict[str, Any] = {"bool_val": [], "double_val": []}
    for value in (plan.values[i].val for i in call.args):
        for field in found:
            if hasattr(value, field):
                found[field].append(getattr(value, field))
    return found


def _tensor(value: Any) -> tuple[str, list[int]]:
    return value.val.scalar_type.name, list(value.val.sizes)


def _graph(data: bytes) -> dict[str, Any]:
    """An XNNPACK delegate's graph, as its schema names things."""
    data = bytes(data)
    header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "graph.bin").write_bytes(data[header.flatbuffer_offset :][: header.flatbuffer_size])
        schema = place / "schema.fbs"
        schema.write_bytes(resources.files(serialization).joinpath("schema.fbs").read_bytes())
        _flatc_decompile(scratch, str(schema), str(place / "graph.bin"), ["--raw-binary"])
        text = re.sub(
            r":\s*(-?)inf\b", r": \1Infinity", (place / "graph.json").read_text()
        )  # flatc's JSON is not quite
        graph: dict[str, Any] = json.loads(text)
        return graph


def _linears(graph: dict[str, Any]) -> Iterator[tuple[str, str]]:
    types: dict[int, str] = {}
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        types[tensor["id_out"]] = tensor["datatype"].removeprefix(PREFIX)
    for node in graph["xnodes"]:
        if node["xnode_union_type"] == "XNNFullyConnected":
            union = node["xnode_union"]
            yield types[union["input1_id"]], types[union["filter_id"]]
