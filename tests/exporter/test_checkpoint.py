"""Checkpoints are hostile until checked."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter import checkpoint, pipeline
from exporter.errors import CheckpointError, OutputError

CONFIG = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
          "num_hidden_layers": 2, "vocab_size": 20, "hidden_act": "silu", "tie_word_embeddings": True}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small, good checkpoint."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shapes = checkpoint.adapters.find("llama").shapes(checkpoint.adapters.find("llama").read(CONFIG))
    tensors = {f"{site}.weight": torch.randn(shape) for site, shape in shapes.weights.items()}
    tensors |= {name: torch.ones(length) for name, length in shapes.tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_good_checkpoint_is_read_and_named(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    model = pipeline.load(str(folder))

    assert model.provenance.source == folder.name
    assert model.provenance.licence == "mit"
    assert model.provenance.parameters == model.parameters > 0


def test_shards_are_read_as_one(folder: Path) -> None:
    whole = checkpoint.load(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for index, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part{index}.safetensors")
    places = {name: f"part{index % 2}.safetensors" for index, name in enumerate(names)}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    again = checkpoint.load(folder)

    assert all(torch.equal(again.weights[site].dense(), weight.dense()) for site, weight in whole.weights.items())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../../etc/passwd"}}, r"path '../../etc/passwd' leaves its folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, r"shards that are not there: gone.safetensors"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"a": 3, "b": "x"}}, "index.json: "),
    ],
)
def test_an_index_that_lies_is_refused(index: Any, message: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda t: t.update(extra=torch.ones(3)), "tensors that a llama model does not have: extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model.norm.weight is \[3\]; config.json says \[16\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int32)}), "only float checkpoints"),
    ],
)
def test_tensors_that_are_not_what_the_config_says_are_refused(change: Any, message: str, folder: Path) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def long_header(content: bytes) -> bytes:
    return struct.pack("<Q", 2**60) + content[8:]


def lying_offsets(content: bytes) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = [0, 2**40]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize("damage", [truncate, long_header, lying_offsets, lambda _: b"", lambda _: b"\0" * 100])
def test_a_damaged_safetensors_file_is_refused(damage: Any, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        checkpoint.load(folder)


def test_a_config_that_is_no_json_object_is_refused(folder: Path) -> None:
    for content, message in (("{", "is not JSON"), ("[1]", "holds no JSON object"), ("[" * 100_000, "is not JSON")):
        (folder / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(folder)


def test_a_huge_config_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LARGEST_JSON", 10)
    with pytest.raises(CheckpointError, match="at most 10 are read"):
        checkpoint.load(folder)


def test_a_huge_tokenizer_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.json").write_text(" " * 2000)
    monkeypatch.setattr(checkpoint, "LARGEST_JSON", 1000)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        checkpoint.load(folder)


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(CONFIG))
    for name, message in (
        ("nowhere", "no such path: .*nowhere; give a checkpoint folder, a saved model or 'builtin'"),
        ("file", "is a file; give the folder"),
        (".", "is no checkpoint: it has no config.json"),
        ("bare", "has neither model.safetensors nor"),
    ):
        with pytest.raises(CheckpointError, match=message):
            pipeline.load(str(tmp_path / name))


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize(
    ("value", "kind"),
    [(float("nan"), torch.float32), (float("-inf"), torch.float16), (1e300, torch.float64)],
)
def test_a_tensor_that_is_not_finite_is_named(name: str, value: float, kind: torch.dtype, folder: Path) -> None:
    def spoil(tensors: Any) -> None:
        tensors[name] = tensors[name].to(kind)
        tensors[name].view(-1)[5] = value

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN, infinity"):
        checkpoint.load(folder)


def test_a_name_that_stands_twice_is_refused(folder: Path) -> None:
    path, config = folder / "model.safetensors", folder / "config.json"
    good, text = path.read_bytes(), config.read_text()
    length = struct.unpack("<Q", good[:8])[0]
    header = good[8 : 8 + length].rstrip()
    again = json.dumps(json.loads(header)["model.norm.weight"])
    header = header[:-1] + f',"model.norm.weight":{again}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + good[8 + length :])
    with pytest.raises(CheckpointError, match=r"key 'model.norm.weight' is given twice"):
        checkpoint.load(folder)

    path.write_bytes(good)
    config.write_text(text[:-1] + ', "vocab_size": 20}')
    with pytest.raises(CheckpointError, match="key 'vocab_size' is given twice"):
        checkpoint.load(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for index in range(2):
        save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / f"part{index}.safetensors")
    places = {f"tensor{index}": f"part{index}.safetensors" for index in range(2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"tensor model.norm.weight is there twice"):
        checkpoint.load(folder)


def test_a_tied_head_is_the_embedding_or_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head" not in checkpoint.load(folder).weights

    rewrite(folder, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not the embedding"):
        checkpoint.load(folder)


def test_eight_bit_floats_are_refused_by_name(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=r"float8_e4m3fn; only float checkpoints are read: float64, float32"):
        checkpoint.load(folder)


def test_a_damaged_tokenizer_is_told_before_the_work(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        pipeline.load(str(folder))


def test_a_context_of_one_token_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 1}))
    with pytest.raises(OutputError, match="continues no text; at least 2 are needed"):
        pipeline.context_of(pipeline.load(str(folder)), None)
