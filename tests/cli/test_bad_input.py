"""Bad input: one clear line, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from exporter import pipeline, store
from tests.cli.conftest import Ran
from tests.models import LLAMA, random_model

Pocket = Callable[..., Ran]
TARGET = ("--target", "onnxruntime-mobile")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A saved random model."""
    folder = tmp_path / "model"
    folder.mkdir()
    store.save(random_model(LLAMA), folder)
    return folder


def assert_refused(ran: Ran, message: str, out: Path, code: int = 2) -> None:
    lines = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ran.err
    assert message in lines[0]
    assert ran.code == code
    assert "Traceback" not in ran.err
    assert not out.exists()


def checkpoint_copy(tmp_path: Path, change: Callable[[Path], None]) -> Path:
    """The built-in checkpoint with something wrong in it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in pipeline.BUILTIN_FOLDER.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    return folder


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def lie(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def spoil(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][5] = float("nan")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is no checkpoint: it has no config.json"),
        (truncate, "model.safetensors is damaged"),
        (lie, "model.safetensors is damaged"),
        (edit_config(model_type="mumba"), "no adapter for model type 'mumba', and transformers does"),
        (edit_config(alibi=True), "the llama adapter cannot honour alibi"),
        (edit_config(hidden_size=64), "config.json says"),
        (spoil, "tensor model.norm.weight holds NaN"),
        (edit_config(bos_token_id=10**6), "none of a vocabulary of 2048"),
        (edit_config(max_position_embeddings=1), "at least 2 are needed"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
    ],
)
def test_a_bad_checkpoint_is_refused(change: Any, message: str, pocket: Pocket, tmp_path: Path) -> None:
    folder, out = checkpoint_copy(tmp_path, change), tmp_path / "out"

    assert_refused(pocket("export", folder, *TARGET, "-o", out), message, out)


def test_no_such_path_is_refused(pocket: Pocket, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(pocket("export", tmp_path / "nowhere", *TARGET, "-o", out), "no such path", out)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("steps: [{kind: fasp, sparcity: 0.2}]", "did you mean 'sparsity'?"),
        ("stepz: []", "did you mean 'steps'?"),
        ("steps: [{kind: magic}]", "unknown kind 'magic'; kinds: "),
        ("steps: [{kind: fasp, sparsity: 1.5}]", "sparsity"),
        ("steps: [{kind: quantize, bits: 9}]", "bits"),
        ("calibration: {windws: 3}", "did you mean 'windows'?"),
        ("version: 7", "version"),
        ("{", "is not YAML"),
        ("- 1", "recipe"),
    ],
)
def test_a_bad_recipe_is_refused(recipe: str, message: str, pocket: Pocket, tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(recipe)

    assert_refused(pocket("export", "builtin", "--recipe", path, *TARGET, "-o", out), message, out)


@pytest.mark.parametrize(
    ("target", "step", "message"),
    [
        ("onnxruntime-mobile", "bits: 4, group: 24", "sizes with one: 16, 32, 64, 128, 256"),
        ("executorch-android", "bits: 4, group: 24", "groups"),
    ],
)
def test_a_width_or_group_that_a_target_cannot_take_is_refused_before_the_work(
    target: str, step: str, message: str, pocket: Pocket, tmp_path: Path
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(f"steps: [{{kind: quantize, algorithm: rtn, {step}}}]")

    ran = pocket("export", "builtin", "--recipe", path, "--target", target, "-o", out)

    assert_refused(ran, message, out)
    assert target in ran.err


def test_an_unknown_target_is_refused_with_those_installed(pocket: Pocket, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = pocket("export", "builtin", "--target", "onnxruntim", "-o", out)
    assert_refused(ran, "no target named 'onnxruntim'; installed: coreml-ios, executorch-android", out)


def test_a_folder_that_is_not_empty_is_refused_and_kept(pocket: Pocket, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")

    ran = pocket("export", model, *TARGET, "-o", out)

    assert ran.code == 2
    assert "is not empty (it holds precious)" in ran.err
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_a_context_longer_than_the_models_is_refused(pocket: Pocket, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = pocket("export", model, *TARGET, "-o", out, "--context", 99)
    assert_refused(ran, "a context of 99 tokens is not possible; this model takes 2 to 64", out)


def test_calibration_text_that_is_too_short_or_missing_is_refused(pocket: Pocket, tmp_path: Path) -> None:
    text, out = tmp_path / "short.txt", tmp_path / "out"
    recipe = Path(__file__).parents[2] / "recipes" / "fasp-int4.yaml"
    words = ("export", "builtin", "--recipe", recipe, *TARGET, "-o", out, "--calibration", text)
    assert_refused(pocket(*words), "no text file at", out)
    text.write_text("import os")
    assert_refused(pocket(*words), "tokens", out)
    text.write_bytes(b"\xff\xfe\x00")
    assert_refused(pocket(*words), "is not UTF-8 text", out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted: run as root to test a full disk")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_told_in_one_line(pocket: Pocket, small_disk: Path) -> None:
    out = small_disk / "out"
    assert_refused(pocket("export", "builtin", *TARGET, "-o", out), "no space left on the disk of", out)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "target"),
    [("onnx_ir", "onnxruntime-mobile"), ("executorch", "executorch-android"), ("coremltools", "coreml-ios")],
)
def test_a_missing_back_end_exits_with_4_and_names_its_extra(module: str, target: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps: [{kind: quantize, algorithm: rtn}]")
    code = f"import sys; sys.modules[{module!r}] = None; from exporter.cli import main; main()"
    words = ["export", "builtin", "-r", str(tmp_path / "recipe.yaml"), "-t", target, "-o", str(tmp_path / "out")]

    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env={**os.environ})

    assert ran.returncode == 4, ran.stderr
    assert f"pip install 'pocket-exporter[{target.split('-')[0]}]'" in ran.stderr
    assert "quantize" not in ran.stderr  # told before the work
    assert not (tmp_path / "out").exists()


def test_errors_are_json_where_json_is_asked_for(pocket: Pocket, tmp_path: Path) -> None:
    ran = pocket("export", tmp_path / "nowhere", *TARGET, "-o", tmp_path / "out", "--json")

    found = json.loads(ran.out)
    assert found["exit_code"] == ran.code == 2
    assert "no such path" in found["error"]


def test_wrong_words_exit_with_2(pocket: Pocket) -> None:
    for words in (("export",), ("no-such-command",), ("run", "x", "--new-tokens", "many")):
        ran = pocket(*words)
        assert ran.code == 2
        assert ran.err.startswith("error: ")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['pocket', '--help']\n"
        "from exporter.cli import main\n"
        "try: main()\n"
        "except SystemExit as left: assert not left.code\n"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules), sorted(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "export" in ran.stdout


def test_a_path_that_no_system_can_have_is_told_in_one_line(pocket: Pocket, tmp_path: Path) -> None:
    long, out = "a" * 5000, tmp_path / "out"
    for words in (
        ("export", long, *TARGET, "-o", out),
        ("export", "builtin", *TARGET, "-o", tmp_path / long),
        ("export", "builtin", "--recipe", long, *TARGET, "-o", out),
        ("verify", long),
        ("evaluate", "builtin", "--text", long),
    ):
        assert_refused(pocket(*words), "File name too long", out)


def test_absurd_numbers_are_refused_at_once(pocket: Pocket, tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("import os\n" * 1000)
    words = ("evaluate", "builtin", "--text", text)
    assert_refused(pocket(*words, "--windows", 10**12), "ask for fewer", out)
    assert_refused(pocket(*words, "--seed", 10**30), "seed", out)
    assert_refused(pocket("run", "builtin", "--new-tokens", 10**30), "do not fit the context", out)
    assert_refused(pocket("run", "builtin", "--prompt", "\udcff"), "is not Unicode", out)


def test_an_interrupted_export_says_so_with_130_and_can_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = Path(__file__).parents[2] / "recipes" / "fasp-int4.yaml"
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; from exporter.cli import main; main()"
    words = [sys.executable, "-c", code, "export", "builtin", "--recipe", str(recipe), *TARGET, "-o", str(out)]
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not list(out.glob(".pocket/making-*")):
        assert running.poll() is None
        time.sleep(0.05)

    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)

    assert running.returncode == 130
    assert said.splitlines()[-1] == "error: interrupted; the same command goes on from the last finished stage"
    assert "Traceback" not in said
    assert [path.name for path in out.iterdir()] == [".pocket"]


def test_a_terminal_without_the_models_letters_still_gets_an_answer() -> None:
    words = [sys.executable, "-c", "from exporter.cli import main; main()", "run", "builtin", "-n", "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run([*words, "--prompt", "\u65e5"], capture_output=True, text=True, env=environment)

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("\\u65e5")
