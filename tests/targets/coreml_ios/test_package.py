"""What is written: interface, constants, bytes, and that the graph says what torch says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exporter import plugins
from exporter.errors import OutputError, TargetError
from exporter.model import Layer, Rope
from exporter.plugins import Finding, Session
from exporter.session import TorchSession, greedy
from exporter.weights import Dense, to_meta
from targets.coreml_ios import TARGET, reader, runner
from targets.coreml_ios.inspection import inspect
from targets.coreml_ios.reader import Package
from tests.models import LLAMA, OPT, low_bit, random_model, sparse
from tests.targets.coreml_ios.conftest import CONTEXT, Lowered, StoredSession, lower, rounded, to_nearest, unequal

Get = Callable[[str], Lowered]
ALL = ["stories", "stories in 4 bits", "unequal", "unequal in 4 bits", "forest", "opt", "bert", "bert in 4 bits"]
PUBLISHED = "Once upon a time, there was a little girl named Lily."


def wrong(findings: Sequence[Finding]) -> list[str]:
    return [f"{finding.what}: {finding.detail}" for finding in findings if not finding.ok]


@pytest.mark.parametrize("name", ALL)
def test_everything_read_back_is_the_models(name: str, lowered: Get) -> None:
    made = lowered(name)
    findings = TARGET.inspect(made.folder, made.model, made.plan)

    assert wrong(findings) == []
    names = {finding.what for finding in findings}
    assert set(made.model.tensors) <= names
    assert all(any(what.startswith(site) for what in names) for site in made.model.weights)


@pytest.mark.parametrize("name", ALL)
def test_the_graph_says_what_torch_says_for_any_chunks(name: str, lowered: Get) -> None:
    made = lowered(name)
    tokens = torch.tensor([1, 5, 90, 7, 33, 2, 61, 18, 4, 77, 12, 50])
    expected = StoredSession(made, torch.float64).step(tokens.tolist())
    exact, half = (runner.open_session(made.folder, keep_float32=keep) for keep in (True, False))

    for chunks in ([12], [5, 1, 6], [1] * 12) if exact.causal else ([12],):
        found, rounded = (in_chunks(session, tokens, chunks) for session in (exact, half))
        assert apart(found, expected) < 1e-5
        assert 1e-5 < apart(rounded, expected) < TARGET.budget(made.model, made.plan).relative_l2 / 10


def in_chunks(session: Session, tokens: Tensor, chunks: list[int]) -> Tensor:
    session.reset()
    return torch.cat([session.step(chunk.tolist()).double() for chunk in tokens.split(chunks)])


def apart(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize("name", ["stories", "stories in 4 bits"])
def test_greedy_text_is_torchs(name: str, lowered: Get) -> None:
    from tokenizers import Tokenizer

    made = lowered(name)
    found = list(greedy(runner.open_session(made.folder), [1], 64))

    assert found == list(greedy(TorchSession(made.model), [1], 64))
    text = Tokenizer.from_str(made.model.files["tokenizer.json"].decode()).decode(found).strip()
    assert name != "stories" or text.startswith(PUBLISHED)


def test_float16_arithmetic_stays_within_the_budget(lowered: Get) -> None:
    made = lowered("stories")
    tokens = list(greedy(TorchSession(made.model), [1], 64))

    half = TorchSession(made.model, torch.float16).step(tokens).double()
    exact = TorchSession(made.model, torch.float64).step(tokens)

    error = ((half - exact).norm(dim=-1) / exact.norm(dim=-1)).max()
    assert error <= TARGET.budget(made.model, made.plan).relative_l2


def test_the_interface_is_apples(lowered: Get) -> None:
    interface = Package(lowered("unequal").package).interface()

    assert interface.inputs == {
        "inputIds": (((1, 1), (1, CONTEXT)), "int32"),
        "causalMask": (((1, 1), (1, 1), (1, CONTEXT), (1, CONTEXT)), "fp16"),
    }
    assert list(interface.outputs) == ["logits"]
    assert interface.states == {  # the widest layer's heads and channels
        "keyCache": (((3, 3), (4, 4), (CONTEXT, CONTEXT), (16, 16)), "fp16"),
        "valueCache": (((3, 3), (4, 4), (CONTEXT, CONTEXT), (16, 16)), "fp16"),
    }
    assert "as wide as the widest layer" in " ".join(lowered("unequal").plan.notes)


def test_the_interface_of_an_encoder_is_tokens_in_and_hidden_states_out(lowered: Get) -> None:
    made = lowered("bert")
    interface = Package(made.package).interface()

    assert interface.inputs == {"inputIds": (((1, 1), (1, CONTEXT)), "int32")}
    assert list(interface.outputs) == ["lastHiddenState"]
    assert interface.states == {}
    assert any(note.startswith("an encoder: inputIds are a whole text") for note in made.plan.notes)


def test_an_epsilon_that_float16_lacks_becomes_its_least_number_and_that_is_said(lowered: Get) -> None:
    made = lowered("bert")
    package = Package(made.package)
    norms = [op for op in package.block.operations if op.type == "layer_norm"]

    found = {float(package.constant(op.inputs["epsilon"].arguments[0].name).decode()) for op in norms}

    assert found == {2.0**-24}
    assert "norms add 6e-08, float16's least number, where the model adds 1e-12" in made.plan.notes


def test_nothing_in_the_files_says_when_or_by_what_they_were_made(lowered: Get) -> None:
    made = lowered("unequal")
    assert not Package(made.package).specification.description.metadata.ListFields()


def test_another_process_writes_the_same_bytes(lowered: Get, tmp_path: Path) -> None:
    made = lowered("unequal")
    code = (
        "import sys; from pathlib import Path; from tests.targets.coreml_ios.conftest import lower, unequal\n"
        "lower(unequal(), Path(sys.argv[1]))"
    )
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=root, env=environment)

    files = sorted(path.relative_to(made.folder) for path in made.folder.rglob("*") if path.is_file())
    assert len(files) == 3
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert [f for f in files if (made.folder / f).read_bytes() != (tmp_path / f).read_bytes()] == []


def test_other_weights_have_other_identifiers_in_the_manifest(lowered: Get) -> None:
    a, b = (lowered(name).package / "Manifest.json" for name in ("unequal", "unequal in 4 bits"))
    assert a.read_text() != b.read_text()


def test_a_tied_head_is_stored_once_and_4_bits_take_4_bits(lowered: Get) -> None:
    made = lowered("stories in 4 bits")
    package = Package(made.package)
    codes = package.constant("model_embed_tokens").stored("data")

    assert codes is not None
    assert (codes.type, codes.bytes) == ("int4", 512 * 64 // 2)
    assert not [name for name in package.constants() if "embed" in name and name != "model_embed_tokens"]
    # 172 columns are stored as 192: six whole groups
    down = package.constant("model_layers_0_mlp_down_proj").stored("data")
    assert down is not None
    assert (down.array.shape, down.bytes) == ((64, 192), 64 * 192 // 2)
    padded = [decision.site for decision in made.plan.decisions if "padded to a whole one" in decision.reason]
    assert padded == [f"model.layers.{layer}.mlp.down_proj" for layer in range(5)]


def test_files_are_as_large_as_the_decisions_say_where_weights_dominate(tmp_path: Path) -> None:
    layer = Layer(8, 2, 64, 64, 1400)
    model = random_model(replace(LLAMA, vocab=8192, hidden=512, layers=(layer,) * 2, positions=256), optional=())
    shapes = {site: weight.shape for site, weight in model.weights.items()}
    mixed = {
        site: sparse(shape, 2, 4, bits=4, group=32, seed=i) if "gate" in site else low_bit(shape, 4, 32, seed=i)
        for i, (site, shape) in enumerate(shapes.items())
    }
    made = lower(model.with_weights(mixed), tmp_path, 256)

    files = sum(path.stat().st_size for path in made.folder.rglob("*") if path.is_file())
    assert files == pytest.approx(sum(decision.bytes for decision in made.plan.decisions), rel=0.05)
    assert files == pytest.approx(made.plan.bytes, rel=0.01)
    assert wrong(TARGET.inspect(made.folder, made.model, made.plan)) == []


def test_a_flipped_bit_is_found_by_the_name_of_its_matrix(lowered: Get, tmp_path: Path) -> None:
    made = lowered("unequal in 4 bits")
    shutil.copytree(made.folder, tmp_path / "copy")
    copy = Lowered(made.model, made.plan, tmp_path / "copy")
    site = "model.layers.1.mlp.down_proj"
    before = copy.weights.read_bytes()
    at = before.index(packed_int4(made.plan.weights[site].codes))
    copy.weights.write_bytes(before[: at + 100] + bytes([before[at + 100] ^ 0x10]) + before[at + 101 :])

    found = wrong(TARGET.inspect(copy.folder, copy.model, copy.plan))

    assert f"{site}: codes differ; what is decoded is not the matrix rounded to float16" in found
    assert len(found) == 2
    assert found[0].startswith(f"float32 execution: linear {site} ")


@pytest.mark.parametrize("base", [LLAMA, OPT])
def test_norms_of_ones_and_biases_of_zeros_may_be_left_out_but_no_others(base: Any, tmp_path: Path) -> None:
    model = random_model(base)
    idle = {n: (torch.ones if n.endswith("weight") else torch.zeros)(t.shape) for n, t in model.tensors.items()}
    made = lower(model.with_tensors(idle), tmp_path)
    name = next(name for name in idle if name.endswith("weight"))
    doubled = made.model.with_tensors({name: idle[name] * 2})

    assert wrong(TARGET.inspect(made.folder, made.model, made.plan)) == []
    assert [line.split(":")[0] for line in wrong(inspect(made.folder, doubled, made.plan))] == [name]


def one_activation(block: Any) -> None:
    next(operation for operation in block.operations if operation.type == "silu").type = "relu"


def two_matrices(block: Any) -> None:
    linears = [operation for operation in block.operations if operation.type == "linear"]
    one, other = (operation.inputs["weight"].arguments[0] for operation in (linears[0], linears[3]))  # q and o
    one.name, other.name = other.name, one.name


def one_small_constant(block: Any) -> None:
    named = (operation for operation in block.operations if operation.outputs[0].name.endswith("epsilon_0"))
    next(named).attributes["val"].immediateValue.tensor.bytes.values = b"\x00\x3c"


@pytest.mark.parametrize("change", [one_activation, two_matrices, one_small_constant])
def test_an_operation_that_is_not_the_models_is_found(change: Any, lowered: Get, tmp_path: Path) -> None:
    made = lowered("unequal")
    shutil.copytree(made.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "model.mlpackage" / "Data" / "com.apple.CoreML" / "model.mlmodel"
    specification = reader.proto.Model_pb2.Model.FromString(path.read_bytes())
    change(reader.block_of(specification))
    path.write_bytes(specification.SerializeToString(deterministic=True))

    found = wrong(TARGET.inspect(tmp_path / "copy", made.model, made.plan))

    assert found[0].startswith("float32 execution: ")
    assert found[1].startswith("operations: the first that differs: ")


def packed_int4(codes: torch.Tensor) -> bytes:
    """Symmetric codes as a signed nibble each, the low one first."""
    nibbles = (codes.to(torch.int16) - 8) & 15
    pairs = nibbles.view(-1, 2)
    return bytes((pairs[:, 0] | pairs[:, 1] << 4).tolist())


def test_a_model_on_the_meta_device_is_planned_like_the_real_one() -> None:
    model = rounded(unequal())
    meta = model.with_weights({site: to_meta(weight) for site, weight in model.weights.items()})
    assert TARGET.plan(meta, CONTEXT).bytes == TARGET.plan(model, CONTEXT).bytes


def test_scales_that_float16_does_not_hold_are_rounded_once_and_said(tmp_path: Path) -> None:
    site = "model.layers.0.mlp.up_proj"
    model = random_model(replace(LLAMA, positions=CONTEXT), optional=())
    weight = to_nearest(model.weights[site].dense())
    weight = replace(weight, scales=weight.scales * 1.0001)
    made = lower(model.with_weights({site: weight}), tmp_path)

    decision = next(decision for decision in made.plan.decisions if decision.site == site)
    assert decision.native
    assert "scales rounded once to float16, by at most" in decision.reason
    assert torch.equal(made.plan.weights[site].scales, weight.scales.half())
    assert torch.equal(made.plan.weights[site].codes, weight.codes)
    assert wrong(TARGET.inspect(made.folder, made.model, made.plan)) == []


def test_a_value_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    site = "model.layers.0.mlp.up_proj"
    model = random_model(LLAMA, optional=())
    huge = model.with_weights({site: Dense(torch.full(model.weights[site].shape, 1e6))})
    with pytest.raises(TargetError, match=r"up_proj holds 1e\+06; float16, Core ML's own type, ends at 65504"):
        TARGET.lower(huge, TARGET.plan(huge, CONTEXT), tmp_path)


def test_a_full_disk_is_an_error_of_the_output_folder(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root: run as root to see a full disk")
    try:
        with pytest.raises(OutputError, match=r"model\.mlpackage or .*is the disk full\?"):
            lower(random_model(LLAMA, optional=()), tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_full_temporary_folder_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root: run as root to see a full disk")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path.parent / "out").mkdir(exist_ok=True)
    try:
        with pytest.raises(OutputError, match="is the disk full"):
            lower(random_model(LLAMA, optional=()), tmp_path.parent / "out")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("context", [0, 65])
def test_a_context_the_model_does_not_have_is_refused(context: int) -> None:
    with pytest.raises(TargetError, match=rf"a context of {context} tokens is not possible .* possible: 1 to 64"):
        TARGET.plan(random_model(LLAMA), context)


def test_heads_that_cannot_be_turned_are_refused() -> None:
    model = random_model(replace(LLAMA, layers=(Layer(4, 2, 15, 16, 96),), rope=Rope(10000.0)))
    with pytest.raises(TargetError, match="heads of 15 channels cannot be turned by position; their number must be"):
        TARGET.plan(model, CONTEXT)


def test_scaled_tables_need_the_system_in_which_they_were_mended(lowered: Get) -> None:
    assert "needs iOS 18.0 or macOS 15.0" in lowered("unequal in 4 bits").plan.notes[0]
    assert "needs iOS 18.2 or macOS 15.2" in lowered("forest").plan.notes[0]


def test_naming_the_target_imports_no_coremltools() -> None:
    code = "import sys; from exporter import plugins; plugins.target('coreml-ios'); print('coremltools' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"
    assert plugins.target("coreml-ios") is TARGET


def test_a_missing_back_end_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['coremltools'] = None\n"
        "from exporter.errors import BackendMissingError\n"
        "from targets.coreml_ios import TARGET\n"
        "try: TARGET.lower(None, None, None)\n"
        "except BackendMissingError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == (
        "target coreml-ios needs coremltools, which is not installed; pip install 'pocket-exporter[coreml]'"
    )
