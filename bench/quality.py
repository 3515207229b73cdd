"""What compression costs a real model: perplexity by method, written to docs/results.md.

    python bench/quality.py [--model ../shared/models/stories260K] [--text ../shared/data/tinystories-sample.txt]

Calibrated on the first half of the text, measured on the second.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from exporter import calibrate, checkpoint, compress
from exporter.calibrate import Samples
from exporter.compress.fasp import FaspConfig
from exporter.compress.quantize import QuantizeConfig
from exporter.compress.step import UNKEPT, StepConfig, layer_sites
from exporter.evaluate import agreement, perplexity
from exporter.model import Model
from exporter.session import TorchSession
from exporter.tokenizer import Tokenizer
from exporter.weights import Dense, LowBit, Weight, nodes

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
LENGTH = 256  # tokens of a window, BOS first
SEEDS = (0, 1, 2)  # of the calibration windows
COUNT = 64  # calibration windows
SCALE_BITS = 16  # scales are float16 numbers
FLOAT_BITS = 32  # as the checkpoint has them


@dataclass(frozen=True)
class Way:
    """A way to compress.

    Args:
        key: For the orderings.
        name: For the reader.
        steps: What is done.
    """

    key: str
    name: str
    steps: tuple[StepConfig, ...] = ()


@dataclass(frozen=True)
class Row:
    """What a way gave: one perplexity per seed of the calibration windows, the other numbers of the first seed."""

    way: Way
    perplexities: tuple[float, ...]
    kl: float
    top1: float
    decoder: float
    bits: float


def pruning(percent: int) -> list[Way]:
    """The same kept widths chosen by three scores."""
    sparsity = percent / 100
    plain = FaspConfig(sparsity=sparsity, restore=False)
    return [
        Way(f"fasp{percent}", f"FASP {percent} %", (FaspConfig(sparsity=sparsity),)),
        Way(f"plain{percent}", f"FASP {percent} % without restoration", (plain,)),
        Way(f"magnitude{percent}", f"magnitude {percent} %", (plain.model_copy(update={"scores": "magnitude"}),)),
    ]


def rounding(bits: int) -> list[Way]:
    """GPTQ and rounding to nearest with the same grid."""
    names = (("gptq", "GPTQ"), ("rtn", "RTN"))
    return [
        Way(f"{a}{bits}", f"int{bits} {name}", (QuantizeConfig.model_validate({"algorithm": a, "bits": bits}),))
        for a, name in names
    ]


def ways() -> list[Way]:
    """The rows of the table."""
    four = QuantizeConfig(bits=4)
    both = Way("both", "FASP 20 %, then int4 GPTQ (`recipes/fasp-int4.yaml`)", (FaspConfig(sparsity=0.2), four))
    prunings = [way for percent in (10, 20, 30) for way in pruning(percent)]
    return [Way("dense", "dense"), *prunings, *(way for bits in (4, 3, 2) for way in rounding(bits)), both]


ORDERINGS = [
    *((f"fasp{p}", f"plain{p}", f"restoration helps at {p} %") for p in (10, 20, 30)),
    *((f"plain{p}", f"magnitude{p}", f"weighing by the inputs beats magnitude at {p} %") for p in (10, 20, 30)),
    *((f"gptq{b}", f"rtn{b}", f"GPTQ beats rounding to nearest at {b} bits") for b in (4, 3, 2)),
]


class Bench:
    """A model, the calibration windows of each seed, and the held-out windows."""

    def __init__(self, model_folder: Path, text: Path) -> None:
        self.model = checkpoint.load(model_folder)
        bos = self.model.architecture.bos
        tokenizer = Tokenizer(self.model.files, bos)
        characters = text.read_text(encoding="utf-8")
        half = len(characters) // 2
        self.seen, unseen = (tokenizer.encode_plain(part) for part in (characters[:half], characters[half:]))
        self.calibration = [calibrate.windows(self.seen, COUNT, LENGTH, seed, bos) for seed in SEEDS]
        self.held_out = consecutive(unseen, bos)
        self.unseen = len(unseen)

    def measure(self, way: Way) -> Row:
        """One way, calibrated with every seed."""
        wants_text = any(compress.needs_calibration(step) for step in way.steps)
        models = [self._compressed(way, windows) for windows in self.calibration[: None if wants_text else 1]]
        found = tuple(perplexity(TorchSession(model), self.held_out).perplexity for model in models)
        close = agreement(TorchSession(self.model), TorchSession(models[0]), self.held_out)
        decoder = decoder_weights(models[0]) / decoder_weights(self.model)
        return Row(way, found, close.kl, close.top1, decoder, bits_per_weight(models[0], self.model))

    def _compressed(self, way: Way, windows: Tensor) -> Model:
        model = self.model
        for step in way.steps:
            model = compress.run(model, step, Samples(windows), UNKEPT)
        return model


def consecutive(tokens: Sequence[int], bos: int | None) -> Tensor:
    """Windows that follow one another, BOS first in each; the rest that fills none is left out."""
    body = LENGTH if bos is None else LENGTH - 1
    pieces = torch.tensor(tokens[: len(tokens) // body * body]).view(-1, body)
    return pieces if bos is None else torch.cat((torch.full((len(pieces), 1), bos), pieces), dim=1)


def decoder_weights(model: Model) -> int:
    """Numbers in the matrices of the decoder layers."""
    sites = [site for index in range(len(model.architecture.layers)) for site in layer_sites(model, index)]
    return sum(model.weights[site].shape[0] * model.weights[site].shape[1] for site in sites)


def bits_per_weight(model: Model, source: Model) -> float:
    """Bits of codes, scales and floats, counted, over the parameters of the source; vectors are floats."""
    bits = FLOAT_BITS * sum(tensor.numel() for tensor in model.tensors.values())
    return (bits + sum(tree_bits(weight) for weight in model.weights.values())) / source.parameters


def tree_bits(weight: Weight) -> int:
    """Bits of the leaves of a tree."""
    total = 0
    for node in nodes(weight):
        if isinstance(node, LowBit):
            total += node.codes.numel() * node.bits + node.scales.numel() * SCALE_BITS
        elif isinstance(node, Dense):
            total += node.values.numel() * FLOAT_BITS
    return total


def page(bench: Bench, rows: list[Row], command: str) -> str:
    """docs/results.md."""
    windows, length = bench.held_out.shape
    heads = ("", "perplexity", "other seeds", "KL to dense", "same top-1", "decoder weights", "bits/weight")
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    verdicts = [verdict({row.way.key: row for row in rows}, *ordering) for ordering in ORDERINGS]
    widths = " ".join(f"{row.way.name}: {widths_of(bench, row.way)}." for row in rows if row.way.key == "fasp20")
    return f"""# Measured quality

Written by `{command}`; do not edit.

Model: {bench.model.provenance.source} ({bench.model.parameters:,} parameters, sha256 of config and weights
`{bench.model.provenance.digest[:16]}`). Calibrated on the first half of the text by characters ({len(bench.seen):,}
tokens; {COUNT} windows of {LENGTH} at random places, seeds {", ".join(map(str, SEEDS))}), measured on the second half
({bench.unseen:,} tokens; {windows} consecutive windows of {length}, BOS first, {windows * (length - 1):,} predicted
tokens). Nothing was chosen by looking at the second half: every setting is the default of its config.

{chr(10).join(lines)}

- *perplexity*: calibration seed {SEEDS[0]}; *other seeds*: the same with the other seeds, to show what the draw of the
  windows is worth. Ways that read no calibration text have none.
- *decoder weights*: numbers in the matrices of the decoder layers, of the dense model's. {widths}
- *bits/weight*: codes, 16-bit scales and 32-bit floats, counted, over the parameters of the dense model. Embedding and
  head are rounded too (to nearest, also under GPTQ). Groups of 32, symmetric, scales searched for the least error.
- Magnitude keeps the same widths as FASP, and value channels the same number per head: only the score differs.

## What should hold

{chr(10).join(verdicts)}

Machine: {platform.machine()}, {processor()}, {platform.system()}, Python {platform.python_version()}, torch
{version("torch")}, one thread, float32. Perplexities are the same on every run of one machine; another
processor may round the last digit elsewhere.
"""


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    others = ", ".join(f"{value:.3f}" for value in row.perplexities[1:]) or "-"
    first = f"{row.perplexities[0]:.3f}"
    return row.way.name, first, others, f"{row.kl:.4f}", f"{row.top1:.1%}", f"{row.decoder:.1%}", f"{row.bits:.2f}"


def verdict(rows: dict[str, Row], better: str, worse: str, claim: str) -> str:
    """Whether an ordering holds, with its numbers; where it fails, how the seeds and the loss compare."""
    a, b = rows[better].perplexities, rows[worse].perplexities
    pairs = list(zip(a, b if len(b) == len(a) else b * len(a)))
    holds = sum(x < y for x, y in pairs)
    numbers = f"{a[0]:.3f} against {b[0]:.3f}"
    if holds == len(pairs):
        return f"- {claim}: **holds** with every seed ({numbers})."
    gap = sum(math.log(x / y) for x, y in pairs) / len(pairs)
    return (
        f"- {claim}: **fails** with {len(pairs) - holds} of {len(pairs)} seeds ({numbers}). The mean loss differs by "
        f"{gap:+.4f} nats; seeds alone move it by {spread(a):.4f}, so the difference is "
        f"{'within' if abs(gap) <= spread(a) else 'beyond'} what the draw of the calibration windows does."
    )


def spread(perplexities: Sequence[float]) -> float:
    """Largest difference in loss between seeds, nats."""
    return math.log(max(perplexities) / min(perplexities))


def widths_of(bench: Bench, way: Way) -> str:
    """The widths that a pruning keeps, in words."""
    model = bench.model
    for step in way.steps:
        model = compress.predict(model, step)
    before, after = bench.model.architecture.layers[0], model.architecture.layers[0]
    return f"MLP {before.mlp} to {after.mlp} channels, values {before.value_dim} to {after.value_dim} per head"


def processor() -> str:
    """The processor's name as Linux has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def main() -> None:
    """Measure every way and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "stories260K")
    parser.add_argument("--text", type=Path, default=SHARED / "data" / "tinystories-sample.txt")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench, rows = Bench(given.model, given.text), []
    for way in ways():
        rows.append(bench.measure(way))
        print(" | ".join(cells(rows[-1])), flush=True)
    given.out.write_text(page(bench, rows, "python bench/quality.py"), encoding="utf-8")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
