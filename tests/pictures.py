"""Small multimodal models, and sets of pictures on disk for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import tokenizers
import torch
from PIL import Image
from tokenizers import models, pre_tokenizers

from exporter.adapters import vision
from exporter.model import Layer, Model, Vision
from tests.models import LLAMA, random_model

WORDS = ("<unk>", "<s>", "</s>", "<image>", *(f"w{index}" for index in range(92)))  # vocab of LLAMA
IMAGE = WORDS.index("<image>")
VISION = Vision(
    size=16, channels=3, patch=4, hidden=32, layers=2, heads=2, mlp=48, activation="quick_gelu", norm_eps=1e-5,
    projector="gelu", keeps_class=False, token=IMAGE, unread=1,
)  # fmt: skip
LLAVA = replace(LLAMA, family="llava", layers=(Layer(4, 2, 16, 16, 96), Layer(4, 2, 16, 16, 96)), vision=VISION)
PREPROCESSOR = {
    "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "resample": 3, "do_resize": True,
    "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
}  # fmt: skip


def seeing_model(seed: int = 0, settings: Mapping[str, object] | None = None) -> Model:
    """A random LLaVA with a tokenizer of whole words, and what scales its pixels (PREPROCESSOR with changes)."""
    model = random_model(LLAVA, seed)
    files = {"tokenizer.json": word_tokenizer().to_str().encode(),
             "preprocessor_config.json": json.dumps({**PREPROCESSOR, **(settings or {})}).encode()}  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return replace(model.with_tensors({vision.CLASS: torch.randn(VISION.hidden, generator=generator)}), files=files)


def word_tokenizer() -> tokenizers.Tokenizer:
    """WORDS, split at spaces."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "<image>"])
    return tokenizer


def random_picture(path: Path, size: tuple[int, int] = (16, 16), mode: str = "RGB", seed: int = 0) -> Path:
    """Noise, written in the format of the path's suffix."""
    generator = torch.Generator().manual_seed(seed)
    bands = torch.randint(0, 256, (size[1], size[0], 4), dtype=torch.uint8, generator=generator)
    image = Image.frombytes("RGBA", size, bytes(bands.flatten().tolist()))
    (image if mode == "RGBA" else image.convert("RGB").convert(mode)).save(path)
    return path


def write_set(folder: Path, fields: Sequence[Mapping[str, object]], name: str = "set.jsonl") -> Path:
    """A line for each of `fields`, about a picture of its own unless it names one."""
    lines = []
    for index, given in enumerate(fields):
        if "image" not in given:
            random_picture(folder / f"{index}.png", seed=index)
        lines.append(json.dumps({"image": f"{index}.png", **given}))
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name
