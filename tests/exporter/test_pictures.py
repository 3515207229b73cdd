"""Pictures from files: scaled as transformers scales them, calibration windows, question accuracy, hostile files."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from exporter import pipeline, recipe, store
from exporter.checkpoint import load
from exporter.errors import BackendMissingError, CheckpointError, PocketError, RecipeError
from exporter.pictures import lines_of, read
from exporter.pixels import Scaling, pixels_of, scaling_of
from exporter.questions import accuracy
from exporter.questions import read as read_questions
from exporter.session import TorchSession, greedy
from exporter.weights import LowBit
from tests.cli.conftest import Ran, pocket  # noqa: F401 (a fixture)
from tests.models import LLAMA, random_model
from tests.pictures import IMAGE, PREPROCESSOR, VISION, random_picture, seeing_model, word_tokenizer, write_set

PLAIN = Scaling((0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
TEXT = "<image> " + " ".join(f"w{index}" for index in range(30))


# ---- pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (16, 41), (33, 70), (5, 9), (200, 13)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_pixels_are_those_of_transformers(size: tuple[int, int], mode: str, tmp_path: Path) -> None:
    model, path = seeing_model(), random_picture(tmp_path / "a.png", size, mode)
    expected = CLIPImageProcessorPil(**PREPROCESSOR)(Image.open(path), return_tensors="pt")["pixel_values"][0]
    found = pixels_of(path, VISION, scaling_of(model))
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_jpeg_is_read_too(tmp_path: Path) -> None:
    path = random_picture(tmp_path / "a.jpg", (16, 16))
    with Image.open(path) as image:
        expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    assert torch.allclose(pixels_of(path, VISION, Scaling((0, 0, 0), (1, 1, 1))), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"shortest_edge": 32}}, r"size is \{'shortest_edge': 32\}; only \{'shortest_edge': 16\}"),
        ({"size": {"height": 16, "width": 16}}, "size is"),  # which would press an oblong picture into a square
        ({"crop_size": 8}, "crop_size is 8"),
        ({"resample": 2}, "resample is 2; only 3"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"do_normalize": None}, "do_normalize is None"),
        ({"rescale_factor": 1 / 127.5}, "only 1/255"),
        ({"image_mean": [0.5]}, "not 3 numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "std over 0"),
        ({"image_std": "half"}, "image_std is 'half'; it must be numbers"),
        ({"image_mean": [float("nan")] * 3}, "must be numbers"),
        ({"image_mean": []}, "must be numbers"),
    ],
)
def test_another_way_of_scaling_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        scaling_of(seeing_model(settings=settings))


def test_scaling_may_be_a_part_of_the_processors_config() -> None:
    model = seeing_model()
    own = json.loads(model.files["preprocessor_config.json"])
    assert scaling_of(with_files(model, {"processor_config.json": {"image_processor": own}})) == scaling_of(model)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the model has no preprocessor_config.json"),
        ({"preprocessor_config.json": [1]}, "says nothing of pixels"),
        ({"processor_config.json": {"chat_template": ""}}, "processor_config.json cannot be read: KeyError"),
    ],
)
def test_a_model_that_does_not_say_how_is_refused(files: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        scaling_of(with_files(seeing_model(), files))


def with_files(model: Any, files: dict[str, Any]) -> Any:
    return replace(model, files={name: json.dumps(content).encode() for name, content in files.items()})


# ---- calibration windows ------------------------------------------------------------------------------------------


def test_a_window_is_a_picture_and_what_is_said_of_it(tmp_path: Path) -> None:
    model = seeing_model()
    path = write_set(tmp_path, [{"text": f"w0 <image> {' '.join(['w1', f'w{i}'] * 12)}"} for i in range(5)])
    samples = read(path, model, windows=5, length=30, seed=0)
    words = word_tokenizer().get_vocab()
    for index, (ids, pixels) in enumerate(zip(samples.ids.tolist(), samples.pixels)):
        said = ["w1", f"w{index}"] * 12
        assert ids == [1, words["w0"], *[IMAGE] * VISION.tokens, *(words[word] for word in said[: 30 - 18])]
        assert torch.equal(pixels, pixels_of(tmp_path / f"{index}.png", VISION, scaling_of(model)))
    assert samples.validation is None


def test_the_seed_draws_the_windows_and_no_text_twice(tmp_path: Path) -> None:
    model = seeing_model()
    path = write_set(tmp_path, [{"text": TEXT.replace("w0", f"w{i + 40}")} for i in range(20)])
    first, again, other = (read(path, model, 8, 24, seed).ids for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 8


def test_texts_that_are_too_short_are_passed_over_and_too_few_refused(tmp_path: Path) -> None:
    model = seeing_model()
    path = write_set(tmp_path, [{"text": TEXT}, {"text": "<image> w1"}, {"text": TEXT}])
    assert read(path, model, 2, 40, 0).ids.shape == (2, 40)
    with pytest.raises(RecipeError, match=r"2 of 3 texts have 40 tokens; 3 windows of that length are asked for"):
        read(path, model, 3, 40, 0)


@pytest.mark.parametrize(
    ("windows", "length", "message"),
    [(0, 30, "0 windows"), (1, 17, "at least 1 window of 18"), (10**7, 30, "do not fit 2 GiB; ask for fewer")],
)
def test_windows_that_are_not_possible_are_refused(windows: int, length: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        read(write_set(tmp_path, [{"text": TEXT}]), seeing_model(), windows, length, 0)


def test_a_model_that_only_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a llama model sees no pictures"):
        read(write_set(tmp_path, [{"text": TEXT}]), random_model(LLAMA), 1, 30, 0)


@pytest.mark.parametrize(("text", "count"), [("w1 w2", 0), ("<image> w1 <image>", 2)])
def test_a_text_without_its_one_image_token_is_refused(text: str, count: int, tmp_path: Path) -> None:
    path = write_set(tmp_path, [{"text": TEXT}, {"text": text}])
    with pytest.raises(RecipeError, match=f"line 2: the text holds {count} image tokens; put '<image>' once"):
        read(path, seeing_model(), 1, 30, 0)


# ---- hostile files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 holds no JSON object"),
        ('{"text": "<image>"}', "'image' is 'None'; it must be text"),
        ('{"image": "0.png", "text": 5}', "'text' is '5'; it must be text"),
        ('{"image": "../0.png", "text": ""}', "path '../0.png' leaves its folder"),
        ('{"image": "/etc/passwd", "text": ""}', "leaves its folder"),
        ('{"image": "a\\\\b.png", "text": ""}', "leaves its folder"),
        ('{"image": "none.png", "text": ""}', "line 2: there is no picture 'none.png'"),
        ('{"image": "' + "a" * 5000 + '", "text": ""}', "line 2: there is no picture 'aaa"),
        ('{"image": "\\ud800", "text": ""}', "line 2: there is no picture"),
        ('{"image": "folder", "text": ""}', "line 2: there is no picture 'folder'"),
        ('{"image": "link.png", "text": ""}', "a link that leaves its folder"),
        ('{"image": "loop.png", "text": ""}', "there is no picture 'loop.png'"),
    ],
)
def test_a_hostile_line_is_one_clear_error(line: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "folder").mkdir(parents=True)
    (folder / "link.png").symlink_to(random_picture(tmp_path / "outside.png"))
    (folder / "loop.png").symlink_to(folder / "loop.png")
    path = write_set(folder, [{"text": TEXT}])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(CheckpointError, match=message):
        lines_of(path, ("text",))


def test_files_that_are_no_sets_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    with pytest.raises(CheckpointError, match="no file at"):
        lines_of(path, ())
    path.write_bytes(b"\n \n")
    with pytest.raises(CheckpointError, match="has no lines"):
        lines_of(path, ())
    path.write_bytes(b'{"image": "\xff"}')
    with pytest.raises(CheckpointError, match="not UTF-8 text"):
        lines_of(path, ())
    path.write_bytes(b"\n" * (2**20 + 1))
    with pytest.raises(CheckpointError, match="lines; at most 1048576 are read"):
        lines_of(path, ())
    with path.open("wb") as stream:
        stream.truncate(2**30)
    with pytest.raises(CheckpointError, match="bytes; at most 67108864 are read"):
        lines_of(path, ())


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that claims to be so large, with whatever follows its header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IEND", b"")


BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no picture that can be read"),
        (b"hello", "is no picture that can be read"),
        (png(16, 16), "is no picture that can be read"),
        (png(16, 16, chunk(b"IDAT", b"nothing")), "is no picture that can be read"),
        (png(16, 16, BOMB, chunk(b"IDAT", zlib.compress(bytes(16 * 49)))), "is no picture that can be read"),
        (png(60_000, 60_000), "is no picture that can be read"),
        (png(12_000, 12_000), "is no picture that can be read"),
        (png(8_000, 8_000), "8000 x 8000 pixels; at most 16384 a side and 33,554,432 in all"),
        (png(20_000, 1_000), "20000 x 1000 pixels; at most 16384 a side"),
        (png(1_000, 10), "at most 16 times as many one way as the other"),
        (png(0, 10), "is no picture that can be read|0 x 10 pixels"),
    ],
)
def test_a_hostile_picture_is_one_clear_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        pixels_of(tmp_path / "a.png", VISION, PLAIN)


@pytest.mark.parametrize("change", [{"channels": 1}, {"size": 4096}])
def test_a_model_that_sees_other_pictures_than_files_hold_is_refused(change: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="to one that sees 3 channels and at most 2048"):
        pixels_of(random_picture(tmp_path / "a.png"), replace(VISION, **change), PLAIN)


def test_a_picture_of_another_format_is_refused(tmp_path: Path) -> None:
    random_picture(tmp_path / "a.gif")
    with pytest.raises(CheckpointError, match=r"no picture that can be read \(PNG, JPEG\)"):
        pixels_of(tmp_path / "a.gif", VISION, PLAIN)


def test_a_file_that_is_too_large_is_not_opened(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as stream:
        stream.truncate(2**30)
    with pytest.raises(CheckpointError, match="bytes; at most 67108864 are read"):
        pixels_of(tmp_path / "a.png", VISION, PLAIN)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["png", "jpg"]), st.integers(0, 700), st.integers(0, 255), st.booleans())
def test_a_damaged_picture_is_pixels_or_one_clear_error(
    tmp_path: Path, suffix: str, place: int, byte: int, is_cut: bool
) -> None:
    path = random_picture(tmp_path / f"a.{suffix}")
    whole = bytearray(path.read_bytes())
    place %= len(whole)
    whole[place] = byte
    path.write_bytes(bytes(whole[:place] if is_cut else whole))
    try:
        found = pixels_of(path, VISION, PLAIN)
    except CheckpointError:
        return
    assert found.shape == (3, 16, 16)


def test_pictures_without_pillow_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = random_picture(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(BackendMissingError, match=r"reading pictures needs PIL.Image.*pocket-exporter\[pictures\]"):
        pixels_of(path, VISION, PLAIN)


# ---- recipes ------------------------------------------------------------------------------------------------------


def test_a_recipe_may_be_calibrated_on_pictures(tmp_path: Path) -> None:
    model = seeing_model()
    write_set(tmp_path, [{"text": TEXT.replace("w0", f"w{i + 40}")} for i in range(6)])
    (tmp_path / "recipe.yaml").write_text(
        "calibration: {text: set.jsonl, windows: 4, length: 30}\nsteps: [{kind: quantize, bits: 4, group: 16}]\n"
    )
    asked = recipe.load(tmp_path / "recipe.yaml")
    small = pipeline.compress(model, asked)
    assert isinstance(small.weights["language_model.model.layers.0.mlp.up_proj"], LowBit)
    samples = pipeline.calibration_samples(model, asked)
    assert samples is not None
    assert samples.pixels is not None
    assert samples.ids.shape == (4, 30)


def test_validation_windows_of_pictures_are_refused(tmp_path: Path) -> None:
    path = write_set(tmp_path, [{"text": TEXT}])
    asked = recipe.parse({"calibration": {"text": str(path), "windows": 1, "length": 30, "validation": 2},
                          "steps": [{"kind": "quantize"}]})  # fmt: skip
    with pytest.raises(RecipeError, match="validation windows are cut off a text, and these are pictures"):
        pipeline.calibration_samples(seeing_model(), asked)


# ---- question accuracy --------------------------------------------------------------------------------------------


def rigged(folder: Path, model: Any, right: int, wrong: int) -> Path:
    """Questions of which the model answers so many right: their answers are its own, or not quite."""
    session, tokenizer, scaling = TorchSession(model), word_tokenizer(), scaling_of(model)
    fields = []
    for index in range(right + wrong):
        session.show(pixels_of(random_picture(folder / f"{index}.png", seed=index), VISION, scaling))
        asked = [1, *[IMAGE] * VISION.tokens, *tokenizer.encode(f"w{index} w9").ids]
        answer = tokenizer.decode(list(greedy(session, asked, 16, model.architecture.eos)))
        answer = answer if index < right else f"{answer} more"
        kind = "odd" if index % 2 else "even"
        fields.append({"question": f"<image> w{index} w9", "answer": f" {answer} ", "kind": kind})
    return write_set(folder, fields)


def test_accuracy_counts_exact_answers(tmp_path: Path) -> None:
    model = seeing_model()
    found = accuracy(model, read_questions(rigged(tmp_path, model, right=3, wrong=4), model))
    assert (found.questions, found.right, found.accuracy) == (7, 3, 3 / 7)
    counts = {kind: (share.right, share.questions) for kind, share in found.kinds.items()}
    assert counts == {"even": (2, 4), "odd": (1, 3)}


def test_accuracy_looks_at_each_questions_own_picture(tmp_path: Path) -> None:
    model = seeing_model()
    path = rigged(tmp_path, model, right=6, wrong=0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    swapped = [{**line, "image": other["image"]} for line, other in zip(lines, [*lines[1:], lines[0]])]
    path.write_text("\n".join(map(json.dumps, swapped)))
    assert accuracy(model, read_questions(path, model)).right < 6


def test_a_question_that_does_not_fit_the_context_is_refused(tmp_path: Path) -> None:
    model = seeing_model()
    path = write_set(tmp_path, [{"question": f"<image> {'w1 ' * 40}", "answer": "w2"}])
    with pytest.raises(PocketError, match="do not fit the context of 64"):
        accuracy(model, read_questions(path, model))


def test_pocket_evaluate_prints_the_share_and_its_counts(tmp_path: Path, pocket: Callable[..., Ran]) -> None:  # noqa: F811
    model = seeing_model()
    (tmp_path / "model").mkdir()
    store.save(model, tmp_path / "model")
    path = rigged(tmp_path, model, right=1, wrong=1)
    ran = pocket("evaluate", tmp_path / "model", "--questions", path)
    assert (ran.code, ran.out) == (0, "right answers 50.00% (1 of 2)\n  even: 1 of 1\n  odd: 0 of 1\n")
    found = json.loads(pocket("evaluate", tmp_path / "model", "--questions", path, "--json").out)
    assert found == {"accuracy": 0.5, "questions": 2, "right": 1,
                     "kinds": {"even": {"questions": 1, "right": 1}, "odd": {"questions": 1, "right": 0}}}  # fmt: skip


@pytest.mark.parametrize("words", [(), ("--text", "a.txt", "--questions", "b.jsonl")])
def test_pocket_evaluate_wants_a_text_or_questions(words: tuple[str, ...], pocket: Callable[..., Ran]) -> None:  # noqa: F811
    ran = pocket("evaluate", "builtin", *words)
    assert ran.code == 2
    assert "give one of --text and --questions" in ran.err


def test_pocket_evaluate_of_a_model_that_only_reads_is_refused(tmp_path: Path, pocket: Callable[..., Ran]) -> None:  # noqa: F811
    ran = pocket("evaluate", "builtin", "--questions", write_set(tmp_path, [{"question": "", "answer": ""}]))
    assert ran.code == 2
    assert "a llama model sees no pictures" in ran.err


def test_the_files_that_scale_pixels_come_with_a_checkpoint(tmp_path: Path) -> None:
    from tests.exporter.test_llava import theirs

    theirs({}, {}).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    assert scaling_of(load(tmp_path)).std == tuple(PREPROCESSOR["image_std"])
