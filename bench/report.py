"""Turn the rows that `bench/methods.py` measured into docs/results.md and docs/results.svg.

python bench/report.py --cache /tmp/rows
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from host import processor
from methods import MODELS, ROOT, SEEDS, TRIALS, Row, all_rows

TITLES = {
    "stories": "stories260K, a published Llama of 0.26 M parameters (float32)",
    "llama": "The trained Llama of 3.5 M parameters (bfloat16)",
    "opt": "The trained OPT of 3.8 M parameters (bfloat16)",
    "minilm": "all-MiniLM-L6-v2, a published encoder of 22.6 M parameters (float32)",
    "pictures": "The trained LLaVA of 1.4 M parameters (float32)",
}
UNITS = {"decoder": "perplexity", "encoder": "1 - cosine", "pictures": "wrong answers"}  # smaller is better in all


@dataclass(frozen=True)
class Measured:
    """A row of a model: the results of its seeds."""

    row: Row
    runs: tuple[dict[str, Any], ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """By seed, smaller is better: perplexity, 1 - cosine or the share of wrong answers."""
        return tuple(run["quality"] for run in self.runs)

    def first(self, name: str) -> float:
        """A number of the first seed."""
        return float(self.runs[0][name])


Table = dict[str, Measured]

ORDERINGS: list[tuple[str, str, str]] = [
    *((f"fasp{p}", f"plain{p}", f"FASP: restored beats not restored at {p} %") for p in (10, 20, 30)),
    *((f"plain{p}", f"magnitude{p}", f"FASP: its score beats magnitude at {p} %") for p in (10, 20, 30)),
    *((f"plain{p}", f"random{p}", f"FASP: its score beats random channels at {p} %") for p in (10, 20, 30)),
    ("adapruner20", "default20", "AdaPruner: the search beats LLM-Pruner's default on test text"),
    ("adapruner20", "search20", "AdaPruner: TPE beats random search on test text"),
    ("swsc2", "swsc2-rtn", "SWSC beats RTN at 2 bits"),
    ("swsc2", "swsc2-search", "SWSC beats RTN with searched scales at 2 bits"),
    ("swsc3", "swsc3-rtn", "SWSC beats RTN at 3 bits"),
    ("swsc3", "swsc3-search", "SWSC beats RTN with searched scales at 3 bits"),
    ("casp2.2", "uniform2.2", "CASP beats uniform GPTQ at the bytes of 2 bits in groups of 80"),
    ("casp3", "uniform3", "CASP beats uniform GPTQ at the bytes of 3 bits in groups of 128"),
    *((f"pbs{nm}-{metric}", "binary", f"PBS2P: {nm[0]}:{nm[1]} by {metric} beats nothing pruned")
      for nm in ("68", "58", "48", "24") for metric in ("hessian", "gain")),
    *((f"pbs{nm}-gain", f"pbs{nm}-hessian", f"PBS2P: gain beats hessian at {nm[0]}:{nm[1]}")
      for nm in ("68", "58", "48", "24")),
    ("pbs68-hessian", "pbs48-hessian", "PBS2P: 6:8 beats 4:8 by hessian"),
    ("pbs68-gain", "pbs48-gain", "PBS2P: 6:8 beats 4:8 by gain"),
    ("pbs48-gain", "gptq1", "PBS2P 4:8 by gain beats GPTQ at as many bytes"),
    ("pbs48-gain", "gptq2-row", "PBS2P 4:8 by gain beats GPTQ 2 bit, which takes more bytes"),
    *((f"gptq{b}", f"rtn{b}", f"GPTQ beats RTN at {b} bits") for b in (4, 3, 2)),
]  # fmt: skip


def read(cache: Path) -> dict[str, Table]:
    """Every row that the cache has, by model and key."""
    tables: dict[str, Table] = {}
    for model in MODELS:
        for row in all_rows():
            places = [cache / f"{model}-{row.key}-{seed}.json" for seed in range(row.seeds)]
            runs = tuple(json.loads(place.read_text()) for place in places if place.is_file())
            if runs:
                tables.setdefault(model, {})[row.key] = Measured(row, runs)
    return tables


def shown(value: float) -> str:
    """Four digits or so."""
    return f"{value:.4g}" if value < 1e4 else f"{value:.1e}"


def cells(model: str, found: Measured) -> tuple[str, ...]:
    """A row of the table."""
    losses = found.losses
    spread = f" ({shown(min(losses))} to {shown(max(losses))})" if len(losses) > 1 else ""
    agreement = [shown(found.first("kl")), f"{found.first('top1'):.1%}"] if MODELS[model] == "decoder" else []
    return (
        found.row.name, f"{shown(median(losses))}{spread}", *agreement, f"{found.first('file_bytes') / 1e6:.3f}",
        f"{found.first('bits_per_weight'):.2f}", f"{found.first('decoder_bits'):.3f}",
        f"{found.first('seconds'):.1f}", f"{found.first('peak_bytes') / 1e6:.0f}",
    )  # fmt: skip


def table(model: str, rows: Table) -> Iterator[str]:
    """A model's rows as Markdown."""
    agreement = ["KL", "same top-1"] if MODELS[model] == "decoder" else []
    head = ("", UNITS[MODELS[model]], *agreement, "MB", "bits/weight", "decoder bits", "s", "peak MB")
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    for found in rows.values():
        yield f"| {' | '.join(cells(model, found))} |"


def verdict(tables: dict[str, Table], better: str, worse: str, claim: str) -> str | None:
    """Whether an ordering holds, model by model, with its numbers and seeds."""
    parts = []
    for model, rows in tables.items():
        other = worse
        if "binary8" in rows and better.startswith("pbs") and better[4] == "8":  # these leave a matrix as it is
            other = {"binary": "binary8"}.get(worse, worse)
            if not other.startswith(("pbs", "binary")):
                continue
        if better not in rows or other not in rows:
            continue
        a, b = rows[better].losses, rows[other].losses
        count = max(len(a), len(b))
        pairs = list(zip(a * count, b * count))[:count]
        holds = sum(x < y for x, y in pairs)
        word = "holds" if holds == count else "**fails**" if holds == 0 else f"**{holds} of {count} seeds**"
        parts.append(f"{model} {word} ({shown(median(a))} against {shown(median(b))})")
    return f"- {claim}: {'; '.join(parts)}." if parts else None


def picture(tables: dict[str, Table], place: Path) -> None:
    """Size against quality, a panel per model, a colour per method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "pocket", "font.size": 8})
    families = list(dict.fromkeys(row.family for row in all_rows()))
    columns = 2
    lines = math.ceil((len(tables) + 1) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(11, 4 * lines))
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    for axis, (model, rows) in zip(axes.flat, tables.items()):
        for index, family in enumerate(families):
            points = [found for found in rows.values() if found.row.family == family]
            style = {"color": pyplot.get_cmap("tab20")(index % 20), "marker": "osD^v<>Pp*X"[index % 11]}
            sizes, losses = [p.first("decoder_bits") for p in points], [median(p.losses) for p in points]
            axis.scatter(sizes, losses, label=family, s=22, **style)
        axis.set(title=TITLES[model], xlabel="bits per weight of the decoder's matrices", ylabel=UNITS[MODELS[model]])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(True, which="both", alpha=0.2)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", ncols=2)
    figure.tight_layout()
    figure.savefig(place, metadata={"Date": None})


def page(tables: dict[str, Table]) -> str:
    """docs/results.md."""
    verdicts = [line for ordering in ORDERINGS if (line := verdict(tables, *ordering))]
    body = "\n\n".join(f"### {TITLES[model]}\n\n{chr(10).join(table(model, rows))}" for model, rows in tables.items())
    return f"""# Measured quality

Written by `bench/methods.py` and `bench/report.py`; do not edit.

![Size against quality, every method](results.svg)

## How it was measured

- Calibration: 64 windows of 256 tokens (128 for the encoder, 64 with a picture in each for LLaVA). stories260K: the
  first half of the sample text, tested on the second half. Llama and OPT: the text that ships with the built-in model
  (a part of their training text), tested on 60 windows of files that neither saw. MiniLM: the validation part of
  WikiText-2, tested on its test part. LLaVA: its own calibration pictures, tested on 640 questions about others.
- Nothing was chosen by looking at test text: settings are the defaults of their configs or stand in the row's name.
  AdaPruner searches {TRIALS} trials and judges them on 8 windows cut off the calibration text.
- The first number is perplexity; for the encoder 1 - cosine of its embeddings with the uncompressed model's; for
  pictures the share of wrong answers. Smaller is better. {seeds(tables)}
- stories260K's MLPs have 172 channels, which 8 does not divide: its PBS2P rows of 8 leave `down` as it is, and are
  compared with a binarization that does so too.
- *MB*: the saved model, all files, token tables and norms included. *bits/weight*: those bytes times 8 over the
  parameters of the source. *decoder bits*: bits of codes, 16-bit scales and floats, places and labels of the decoder
  layers' matrices, over their numbers in the source; token tables are left as they are in every row.
- *s*, *peak MB*: compression alone, a process of its own with one thread, in seconds of processor time; the peak holds
  interpreter, torch and model.

## Tables

{body}

## What should hold

Each claim with every seed that was measured; a claim that fails is left standing with its numbers.

{chr(10).join(verdicts)}

Machine: {platform.machine()}, {processor()}, {platform.system()}, Python {platform.python_version()}, torch
{version("torch")}.
"""


def seeds(tables: dict[str, Table]) -> str:
    """Which seeds of the calibration windows were measured."""
    most = max(len(found.runs) for rows in tables.values() for found in rows.values())
    if most == 1:
        return f"One draw of the calibration windows (seed {SEEDS[0]}); another moves the numbers a little."
    return f"The median over seeds {', '.join(map(str, SEEDS[:most]))} of the windows, least to most in brackets."


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    given = parser.parse_args(arguments)
    tables = read(given.cache)
    picture(tables, given.out.with_suffix(".svg"))
    given.out.write_text(page(tables), encoding="utf-8")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
