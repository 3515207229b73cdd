"""The road of an encoder, command by command: exported, checked, run, evaluated, bundled; and where it ends."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from exporter import artifact as artifacts
from exporter import bundle, encoders, pipeline
from exporter.errors import CheckFailedError
from exporter.recipe import parse
from exporter.session import TorchSession
from targets.onnxruntime_mobile.ort_format import convert
from tests import checkpoints
from tests.cli.test_commands import ONNX, Pocket

TEXT = "the cat sat on the mat and the dog ran home to see the sun and a cat sat on the mat " * 8
EIGHT = parse({"steps": [{"kind": "quantize", "algorithm": "rtn", "bits": 8, "group": 16}]})
FOUR = parse({"steps": [{"kind": "quantize", "algorithm": "rtn", "bits": 4, "group": 16}]})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a text, and exports of it in 8 and in 4 bits."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "bert").mkdir()
    checkpoints.bert(folder / "bert")
    (folder / "text.txt").write_text(TEXT)
    for name, recipe in (("eight", EIGHT), ("four", FOUR)):
        pipeline.run(pipeline.Job(str(folder / "bert"), (ONNX,), folder / name, recipe))
    return folder


def evaluated(pocket: Pocket, place: Path, name: str, *more: object) -> dict[str, float]:
    ran = pocket(
        "evaluate", place / name, "--text", place / "text.txt", "--windows", 6, "--length", 16, "--json", *more
    )
    assert ran.code == 0, ran.err
    return dict(json.loads(ran.out))


def test_an_artifact_says_that_it_is_an_encoder_and_carries_golden_hidden_states(place: Path) -> None:
    made = artifacts.load(place / "eight" / ONNX)

    assert made.model.causal is False
    assert (made.model.bos, made.model.eos) == (checkpoints.CLS, [checkpoints.SEP])
    assert made.golden.tokens == []
    assert len(made.golden.top) == len(made.golden.prompt) == 32
    assert (made.golden.prompt[0], made.golden.prompt[-1]) == (checkpoints.CLS, checkpoints.SEP)


def test_check_compares_hidden_states_and_prints_the_cosine(pocket: Pocket, place: Path) -> None:
    ran = pocket("check", place / "eight" / ONNX)
    found = json.loads(pocket("check", place / "eight" / ONNX, "--json").out)["comparison"]

    assert ran.code == 0
    assert re.search(r"cosine of embeddings 0\.9\d+ in texts of 32, 7, 1 tokens", ran.out)
    assert found["ok"] is True
    assert found["texts"] == [32, 7, 1]
    assert 0 < found["relative_l2"] <= found["budget_l2"]


def test_run_gives_the_embedding_of_a_text(pocket: Pocket, place: Path) -> None:
    model = pipeline.load(str(place / "bert"))
    tokens = [2, *pipeline.tokenizer_of(model).encode_plain("the cat sat"), 3]
    right = encoders.embedding(TorchSession(model).step(tokens))

    found = json.loads(pocket("run", place / "bert", "--prompt", "the cat sat", "--json").out)
    people = pocket("run", place / "eight" / ONNX, "--prompt", "the cat sat").out

    assert found["prompt"] == tokens
    assert found["embedding"] == pytest.approx(right.tolist(), abs=1e-6)
    assert people.startswith("an encoder: 5 tokens, 48 channels\nembedding (mean of hidden states, of length")


def test_evaluate_gives_the_cosine_against_a_reference(pocket: Pocket, place: Path) -> None:
    same = evaluated(pocket, place, "bert", "--reference", place / "bert")
    eight = evaluated(pocket, place, "eight/" + ONNX, "--reference", place / "bert")
    four = evaluated(pocket, place, "four/" + ONNX, "--reference", place / "bert")
    people = pocket(
        "evaluate",
        place / "four" / "model",
        "--text",
        place / "text.txt",
        "--windows",
        2,
        "--reference",
        place / "bert",
    )

    assert same["cosine_worst"] == pytest.approx(1)
    assert four["cosine_mean"] < eight["cosine_mean"] < 1
    assert four["relative_l2_mean"] > eight["relative_l2_mean"] > same["relative_l2_mean"] == 0
    assert re.search(r"^cosine of embeddings 0\.\d+ mean, .*\(64 tokens, 2 windows of 32, seed 0\)$", people.out)


def test_an_encoder_has_no_perplexity(pocket: Pocket, place: Path) -> None:
    ran = pocket("evaluate", place / "bert", "--text", place / "text.txt")

    assert ran.code == 2
    assert "is an encoder, which has no perplexity; give what to compare it with by --reference" in ran.err


def test_an_encoder_is_not_evaluated_against_a_decoder(pocket: Pocket, place: Path) -> None:
    ran = pocket("evaluate", place / "bert", "--text", place / "text.txt", "--reference", "builtin")

    assert ran.code == 2
    assert "builtin and its candidate are not both encoders, or both decoders" in ran.err


def test_an_encoder_is_bundled_and_verified_and_not_probed(pocket: Pocket, place: Path, tmp_path: Path) -> None:
    made = bundle.make(place / "eight", tmp_path / "bundle")
    probed = pocket("probe", place / "eight" / ONNX)

    assert bundle.verify(tmp_path / "bundle") == made
    assert made.targets[ONNX].golden.tokens == []
    assert probed.code == 2
    assert "this artifact is an encoder; what is measured is how a decoder goes on from a prompt" in probed.err


def test_one_ort_file_is_held_to_the_golden_hidden_states(place: Path, tmp_path: Path) -> None:
    convert(place / "eight" / ONNX, tmp_path / "model.ort")
    assert (tmp_path / "model.ort").stat().st_size > 0

    folder = tmp_path / "other"
    made = artifacts.load(place / "eight" / ONNX)
    golden = made.golden.model_copy(update={"logits": [[v + 1 for v in row] for row in made.golden.logits]})
    shutil.copytree(place / "eight" / ONNX, folder)
    artifacts.save(made.model_copy(update={"golden": golden}), folder)
    with pytest.raises(CheckFailedError, match="step 0: a logit is"):
        convert(folder, tmp_path / "wrong.ort")


def test_a_decoder_is_evaluated_against_a_reference_by_divergence(pocket: Pocket, place: Path, tmp_path: Path) -> None:
    pipeline.run(pipeline.Job("builtin", (), tmp_path / "small", FOUR))
    (tmp_path / "code.txt").write_text("def add(a, b):\n    return a + b\n" * 60)

    ran = pocket(
        "evaluate", tmp_path / "small" / "model", "--text", tmp_path / "code.txt", "--windows", 2, "--length", 32,
        "--reference", "builtin",
    )  # fmt: skip
    found = json.loads(
        pocket(
            "evaluate", "builtin", "--text", tmp_path / "code.txt", "--windows", 2, "--length", 32, "--reference",
            "builtin", "--json",
        ).out
    )  # fmt: skip

    assert ran.code == 0, ran.err
    assert re.match(r"perplexity .*\nKL from the reference \S+ nats, the same likeliest token at \d", ran.out)
    assert found["reference"]["kl"] == 0
    assert found["reference"]["top1"] == 1
    assert found["perplexity"] > 1
