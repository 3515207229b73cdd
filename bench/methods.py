"""Every method on every reference model, a process per row, so that time and peak memory are the row's own.

    OMP_NUM_THREADS=1 python bench/methods.py --reference reference --cache /tmp/rows [--models llama] [--rows fasp]

A row that the cache holds is not measured again; `bench/report.py` turns the cache into docs/results.md and a picture.
Reference models are built by `scripts/train_reference.py` and `scripts/train_pictures.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"stories": "decoder", "llama": "decoder", "opt": "decoder", "minilm": "encoder", "pictures": "pictures"}
EVERY = ("decoder", "encoder", "pictures")
SEEDS = (0, 1, 2)  # of the calibration windows, or of the method where it reads none
GROUP = 32  # columns that share a scale, unless a row says otherwise
DECODER = r"re:(?!.*vision).*\blayers?\.\d+\."  # matrices of the decoder layers: token tables stay as they are
TRIALS = 40  # of a search

Step = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A way to compress.

    Args:
        key: For orderings and file names.
        name: For the reader.
        family: What it is drawn as.
        steps: Of a recipe.
        kinds: Of models that it is for.
        seeds: How often it is measured.
    """

    key: str
    name: str
    family: str
    steps: tuple[Step, ...] = ()
    kinds: tuple[str, ...] = EVERY
    seeds: int = len(SEEDS)


def quantize(bits: int, algorithm: str = "gptq", group: int = GROUP, **fields: Any) -> Step:
    """A step that rounds the decoder's matrices."""
    step = {"kind": "quantize", "algorithm": algorithm, "bits": bits, "group": group, "targets": [DECODER]}
    return {**step, **fields}


def pbs2p(n: int, m: int, metric: str = "hessian") -> Step:
    """A binarization; `gain` takes signs anew, as its measure asks for."""
    return {"kind": "pbs2p", "n": n, "m": m, "metric": metric, "sign_rounds": 3 if metric == "gain" else 0}


def fasp() -> list[Row]:
    """FASP restored, not restored, and the same widths chosen by magnitude and at random."""
    rows = []
    for percent in (10, 20, 30):
        step: Step = {"kind": "fasp", "sparsity": percent / 100}
        plain = {**step, "restore": False}
        large, drawn = {**plain, "scores": "magnitude"}, {**plain, "scores": "random"}
        rows += [
            Row(f"fasp{percent}", f"FASP {percent} %", "FASP", (step,)),
            Row(f"plain{percent}", f"FASP {percent} %, not restored", "FASP, not restored", (plain,)),
            Row(f"magnitude{percent}", f"magnitude {percent} %", "magnitude", (large,), EVERY, 1),
            Row(f"random{percent}", f"random channels {percent} %", "random channels", (drawn,)),
        ]  # fmt: skip
    dense = {"kind": "fasp", "sparsity": 0.2, "target": "dense"}
    return [*rows, Row("fasp20-dense", "FASP 20 %, target dense", "FASP", (dense,))]


def adapruner() -> list[Row]:
    """AdaPruner's search, its control, and LLM-Pruner's measure, which is trial 0 of both."""
    step: Step = {"kind": "adapruner", "sparsity": 0.2}
    ways = {
        "adapruner20": ("AdaPruner 20 %, TPE", {"trials": TRIALS}),
        "search20": ("AdaPruner 20 %, random search", {"trials": TRIALS, "sampler": "random"}),
        "default20": ("LLM-Pruner 20 % (trial 0)", {"trials": 1}),
    }
    return [Row(key, name, "AdaPruner", ({**step, **more},), ("decoder",)) for key, (name, more) in ways.items()]


def swsc() -> list[Row]:
    """SWSC on queries and keys, and the same matrices rounded to nearest: at the same bits, and a scale a row."""
    both = [r"re:(?!.*vision).*\.(q_proj|k_proj|query|key)$"]
    rows = []
    for bits, share in ((2, 1 / 16), (3, 1.5 / 16)):
        step = {"kind": "swsc", "clusters": 1 / 16 if bits == 2 else share, "rank": 1 / 16 if bits == 2 else share}
        plain = quantize(bits, "rtn", 0, targets=both, scale_search="max")
        rows += [
            Row(f"swsc{bits}", f"SWSC {bits} bit on Q and K", "SWSC", (step,)),
            Row(f"swsc{bits}-rtn", f"RTN {bits} bit on Q and K", "RTN on Q and K", (plain,), EVERY, 1),
            Row(f"swsc{bits}-search", f"RTN {bits} bit on Q and K, scales searched", "RTN on Q and K",
                ({**plain, "scale_search": "mse"},), EVERY, 1),
        ]  # fmt: skip
    return rows


def budgeted(bits: int, group: int, levels: tuple[int, ...]) -> Step:
    """CASP under the budget that GPTQ with this grid takes, scales included; the worker counts it."""
    return {"kind": "casp", "bits": {"of": bits}, "levels": list(levels), "group": group}


def casp() -> list[Row]:
    """CASP, and uniform GPTQ of exactly the bits that are its budget."""
    return [
        Row("casp2.2", "CASP, the bytes of GPTQ 2 bit, groups of 80", "CASP", (budgeted(2, 80, (2, 3)),)),
        Row("uniform2.2", "GPTQ 2 bit, groups of 80", "GPTQ", (quantize(2, group=80),)),
        Row("casp3", "CASP, the bytes of GPTQ 3 bit, groups of 128", "CASP", (budgeted(3, 128, (2, 3, 4)),)),
        Row("uniform3", "GPTQ 3 bit, groups of 128", "GPTQ", (quantize(3, group=128),)),
    ]


def binarized() -> list[Row]:
    """PBS2P by both measures, binarization without pruning, and rounding at as many bytes."""
    rows = [
        Row("binary", "binary, nothing pruned", "PBS2P, nothing pruned", (pbs2p(4, 4),)),
        Row("binary8", "binary, nothing pruned, without `down`", "PBS2P, nothing pruned", (pbs2p(8, 8),), ("decoder",)),
    ]
    for n, m in ((6, 8), (5, 8), (4, 8), (2, 4)):
        for metric in ("hessian", "gain"):
            rows.append(
                Row(f"pbs{n}{m}-{metric}", f"PBS2P {n}:{m}, {metric}", f"PBS2P, {metric}", (pbs2p(n, m, metric),))
            )
    return [
        *rows,
        Row("gptq1", "GPTQ 1 bit, as many bytes", "GPTQ", (quantize(1, group=26),)),
        Row("gptq2-row", "GPTQ 2 bit, a scale a row", "GPTQ", (quantize(2, group=0),)),
        Row("rtn2-row", "RTN 2 bit, a scale a row", "RTN", (quantize(2, "rtn", 0),), EVERY, 1),
    ]


def rounded() -> list[Row]:
    """GPTQ and rounding to nearest with one grid."""
    names = {"gptq": ("GPTQ", 3), "rtn": ("RTN", 1)}
    return [
        Row(f"{how}{bits}", f"{name} {bits} bit", name, (quantize(bits, how),), EVERY, seeds)
        for bits in (4, 3, 2)
        for how, (name, seeds) in names.items()
    ]


def chains() -> list[Row]:
    """Methods one after another."""
    pruned: Step = {"kind": "fasp", "sparsity": 0.2}
    searched: Step = {"kind": "adapruner", "sparsity": 0.2, "trials": TRIALS}
    return [
        Row("chain-casp", "FASP 20 %, then CASP 3 bit", "chain", (pruned, budgeted(3, 128, (2, 3, 4)))),
        Row("chain-pbs", "AdaPruner 20 %, then PBS2P 2:4", "chain", (searched, pbs2p(2, 4, "gain")), ("decoder",), 1),
        Row("chain-sparse", "FASP 20 %, then 2:4 and 4 bit", "chain", (pruned, quantize(4, sparsity="2:4"))),
        Row("sparse", "2:4 and 4 bit", "2:4 and 4 bit", (quantize(4, sparsity="2:4"),)),
    ]


def all_rows() -> list[Row]:
    """Every row of the table, in order."""
    dense = Row("dense", "uncompressed", "uncompressed", (), EVERY, 1)
    return [dense, *fasp(), *adapruner(), *swsc(), *rounded(), *casp(), *binarized(), *chains()]


@dataclass(frozen=True)
class Job:
    """One process: a row of a model with one seed."""

    model: str
    row: Row
    seed: int

    def place(self, cache: Path) -> Path:
        """Where its result lies."""
        return cache / f"{self.model}-{self.row.key}-{self.seed}.json"


def fitted(job: Job) -> tuple[Step, ...] | None:
    """The row's steps for this model; None where it has no such row.

    stories260K's MLPs have 172 channels, which 8 does not divide: its rows with m = 8 leave `down` as it is.
    """
    odd, of_8 = job.model == "stories", any(step.get("m") == 8 for step in job.row.steps)
    if job.row.key == "binary8" and not odd:
        return None
    if not (odd and of_8):
        return job.row.steps
    return tuple({**step, "ignore": [r"re:.*down_proj$"]} for step in job.row.steps)


def measured(job: Job, reference: Path, cache: Path) -> str:
    """Measure a job in a process of its own, unless the cache has it; returns a line for the screen."""
    place = job.place(cache)
    if not place.exists():
        asked = {"model": job.model, "steps": fitted(job), "seed": SEEDS[job.seed], "reference": str(reference)}
        worker = [sys.executable, str(Path(__file__).with_name("methods_worker.py")), str(place), json.dumps(asked)]
        done = subprocess.run(worker, capture_output=True, text=True)
        if done.returncode:
            return f"{place.stem}: FAILED: {done.stderr.strip().splitlines()[-1:]}"
    found = json.loads(place.read_text())
    return f"{place.stem}: {found['quality']:.4f}, {found['bits_per_weight']:.2f} bits, {found['seconds']:.1f} s"


def main() -> None:
    """Measure what is asked for and is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, default=ROOT / "reference")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rows", default="", help="regular expression of keys")
    parser.add_argument("--workers", type=int, default=1, help="processes at once; over 1, times are worse")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    jobs = [
        job
        for seed in range(given.seeds)
        for model in given.models.split(",")
        for row in all_rows()
        if MODELS[model] in row.kinds and seed < row.seeds and re.search(given.rows, row.key)
        if fitted(job := Job(model, row, seed)) is not None
    ]
    with ThreadPoolExecutor(given.workers) as pool:
        for index, line in enumerate(pool.map(lambda job: measured(job, given.reference, given.cache), jobs)):
            print(f"[{index + 1}/{len(jobs)}] {line}", flush=True)


if __name__ == "__main__":
    main()
