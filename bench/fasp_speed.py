"""How fast FASP prunes a model of the shape of OPT-125M, beside the work that it needs and what the machine can do.

    python bench/fasp_speed.py                                     three runs; writes docs/performance.md
    python bench/fasp_speed.py --layers 2 --windows 16 --print     a smaller model; only prints

A run is a process of its own: the machine's rate of matrix products, FASP, the rate again, then GPTQ of two matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter import adapters, calibrate
from exporter.calibrate import CalibratingOps, Samples
from exporter.compress import fasp, find
from exporter.compress.step import Unkept
from exporter.maths import gptq
from exporter.maths.gram import Gram
from exporter.maths.rounding import Grid
from exporter.model import Architecture, Layer, Model, Provenance
from exporter.torch_ops import TorchOps, fitting_threads
from exporter.weights import Dense

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
SPARSITY, LENGTH, RUNS, GOAL = 0.2, 512, 3, 0.6
REPEATS = 10  # of a matrix product; the best counts
GPTQ_SHAPES = ((768, 3072), (2048, 5632))
STAGES = ("forward matrices", "attention", "Gram matrices", "scores and solves", "everything else")


def random_model(layers: int) -> Model:
    """The shape of OPT-125M: hidden 768, MLP 3072, 12 heads, 50,272 tokens, context 2,048; tied, with biases."""
    architecture = Architecture(
        family="opt", vocab=50272, hidden=768, positions=2048, layers=(Layer(12, 12, 64, 64, 3072),) * layers,
        activation="relu", norm_eps=1e-5, rope=None, tied=True, bos=2, eos=(2,),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = adapters.find("opt").shapes(architecture)
    weights = {s: Dense(torch.randn(o, i, generator=generator) * i**-0.5) for s, (o, i) in shapes.weights.items()}
    lengths = shapes.tensors | shapes.optional
    tensors = {name: torch.ones(n) if name.endswith("weight") else torch.zeros(n) for name, n in lengths.items()}
    return Model(architecture, weights, tensors, Provenance("random", "0" * 64, 0))


# ---- what is needed, what the machine can do ---------------------------------------------------------------------


def work(model: Model, small: Model, tokens: int) -> dict[str, float]:
    """Floating-point operations that FASP cannot do without, by stage; a multiplication and an addition are two.

    Each matrix is multiplied once, o and the MLP's last one as they are when pruned; a token attends to those up to
    itself; one triangle of each Gram matrix; the solves as `maths.channels.restored` does them.
    """
    hidden, needed = model.architecture.hidden, Counter[str]()
    for before, after in zip(model.architecture.layers, small.architecture.layers):
        values = (before.heads * before.value_dim, after.heads * after.value_dim)
        whole = before.heads * before.head_dim + before.kv_heads * (before.head_dim + before.value_dim) + before.mlp
        needed["forward matrices"] += 2 * tokens * hidden * (whole + values[1] + after.mlp)
        pairs = tokens * (LENGTH + 1) / 2
        needed["attention"] += 2 * pairs * before.heads * (before.head_dim + before.value_dim)
        for width, kept in (values, (before.mlp, after.mlp)):
            needed["Gram matrices"] += tokens * width * (width + 1)
            needed["scores and solves"] += kept**3 / 3 + 2 * hidden * kept * (width - kept) + 2 * hidden * kept**2
    return dict(needed)


def rate(device: str, tokens: int) -> float:
    """Operations a second of the best product of activations and a matrix of the MLP, float32."""
    best = 0.0
    for inside, out in ((768, 3072), (3072, 768)):
        x, weight = torch.randn(tokens, inside, device=device), torch.randn(inside, out, device=device)
        result = torch.empty(tokens, out, device=device)
        for _ in range(REPEATS):
            start = _now(device)
            torch.mm(x, weight, out=result)
            best = max(best, 2 * tokens * inside * out / (_now(device) - start))
    return best


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- stages ------------------------------------------------------------------------------------------------------


class Stages:
    """Seconds of each stage, without those of stages inside it."""

    def __init__(self, device: str) -> None:
        self.seconds, self._inside, self._device = Counter[str](), [0.0], device

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Count the time of a function or method, from now on, in this process."""
        plain = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            start = _now(self._device)
            self._inside.append(0.0)
            try:
                return plain(*arguments, **named)
            finally:
                took = _now(self._device) - start
                self.seconds[stage] += took - self._inside.pop()
                self._inside[-1] += took

        setattr(owner, name, watched)


def watched_stages(device: str) -> Stages:
    """FASP's stages, watched."""
    stages = Stages(device)
    stages.watch(CalibratingOps, "linear", STAGES[0])
    stages.watch(TorchOps, "cached_attention", STAGES[1])
    stages.watch(Gram, "add", STAGES[2])
    stages.watch(Gram, "total", STAGES[2])
    stages.watch(fasp, "restored", STAGES[3])
    stages.watch(fasp, "column_scores", STAGES[3])
    return stages


# ---- one run -----------------------------------------------------------------------------------------------------


def run(layers: int, windows: int, device: str) -> dict[str, Any]:
    """Rate, FASP, rate, GPTQ; in this process."""
    model = random_model(layers)
    ids = torch.randint(0, model.architecture.vocab, (windows, LENGTH), generator=torch.Generator().manual_seed(1))
    with fitting_threads(model.parameters):
        tokens = min(windows, calibrate.fast_batch(model, LENGTH, device)) * LENGTH
        rates = [rate(device, tokens)]
        stages, before = watched_stages(device), _memory(device)
        start = _now(device)
        small = find("fasp").run(model, fasp.FaspConfig(sparsity=SPARSITY), Samples(ids), Unkept(device=device))
        seconds = _now(device) - start
        peak, took = _memory(device) - before, dict(stages.seconds)
        rates.append(rate(device, tokens))
        rounded = [gptq_seconds(*shape, device) for shape in GPTQ_SHAPES]
        threads = torch.get_num_threads()
    took["everything else"] = seconds - sum(took.values())
    needed = work(model, small, windows * LENGTH)
    kept = sum(weight.shape[0] * weight.shape[1] for site, weight in small.weights.items() if ".layers." in site)
    whole = sum(weight.shape[0] * weight.shape[1] for site, weight in model.weights.items() if ".layers." in site)
    return {"seconds": seconds, "rates": rates, "needed": needed, "stages": took, "peak": peak,
            "left": kept / whole, "threads": threads, "batch": tokens, "load": os.getloadavg()[0],
            "gptq": rounded}  # fmt: skip


def gptq_seconds(out: int, width: int, device: str) -> dict[str, float]:
    """Seconds of 4-bit GPTQ of a random matrix, and what of it the factor of the inverse and the scales take."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, width, generator=generator) for n in (out, 2 * width))
    gram = Gram()
    gram.add((x * torch.linspace(0.2, 3, width)).to(device))
    stages = Stages(device)
    plain = {(module, name): getattr(module, name) for module, name in ((gptq, "inverse_factor"), (gptq, "fit"))}
    for (module, name), stage in zip(plain, ("factor", "scales")):
        stages.watch(module, name, stage)
    total, start = gram.total(), _now(device)
    gptq.quantize(weight, total, Grid(4, 32))
    seconds = _now(device) - start
    for (module, name), function in plain.items():
        setattr(module, name, function)
    return {"seconds": seconds, **stages.seconds}


def _memory(device: str) -> int:
    """The most bytes resident so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- the page ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A run, worked out."""

    raw: dict[str, Any]

    @property
    def best(self) -> float:
        """Operations a second that the machine reached."""
        return float(max(self.raw["rates"]))

    @property
    def achieved(self) -> float:
        """Operations a second of the whole run."""
        return float(sum(self.raw["needed"].values()) / self.raw["seconds"])

    @property
    def share(self) -> float:
        """Of the best."""
        return self.achieved / self.best


def page(ran: list[dict[str, Any]], layers: int, windows: int, device: str) -> str:
    """All that is printed."""
    rows = sorted((Row(raw) for raw in ran), key=lambda row: row.share)
    middle = rows[len(rows) // 2]
    return "\n".join([*_head(middle.raw, layers, windows, device), *_runs(rows), *_stages(middle), *_gptq(ran)])


def _head(raw: dict[str, Any], layers: int, windows: int, device: str) -> list[str]:
    return [
        "# Speed of compression",
        "",
        "Written by `python bench/fasp_speed.py`; do not edit.",
        "",
        f"Machine: {machine(device)}; {raw['threads']} threads, float32, torch {torch.__version__}.",
        "",
        f"## FASP, {SPARSITY:.0%}, on the shape of OPT-125M",
        "",
        f"Random weights: {layers} layers, hidden 768, MLP 3072, 12 heads; {windows} windows of {LENGTH} tokens.",
        f"{1 - raw['left']:.1%} of the decoder's weights are pruned. *Work* is what cannot be left out, counted from",
        "shapes: every matrix times every token once, attention to earlier tokens, one triangle of each Gram matrix,",
        f"the solves. *Rate* is the best of {REPEATS} float32 products of {raw['batch']} tokens and each matrix of the",
        "MLP, right before and right after. *Memory* is the highest resident size, less that with the model loaded.",
        "",
    ]


def _runs(rows: list[Row]) -> list[str]:
    names = "run", "time s", "work TFLOP", "GFLOP/s", "rate before, after", "share", "memory MB", "load"
    lines = [f"| {' | '.join(names)} |", f"| --- |{' ---: |' * (len(names) - 1)}"]
    for index, row in enumerate(rows):
        raw, rates = row.raw, ", ".join(f"{one / 1e9:.0f}" for one in row.raw["rates"])
        needed = sum(raw["needed"].values()) / 1e12
        lines.append(
            f"| {index + 1} | {raw['seconds']:.1f} | {needed:.2f} | {row.achieved / 1e9:.0f} |"
            f" {rates} | **{row.share:.0%}** | {raw['peak'] / 1e6:.0f} | {raw['load']:.1f} |"
        )
    middle = statistics.median(row.share for row in rows)
    verdict = "reached" if middle >= GOAL else "not reached"
    return [*lines, "", f"Goal: {GOAL:.0%} of the rate over the whole run: {verdict} ({middle:.0%}, the median).", ""]


def _stages(row: Row) -> list[str]:
    lines = ["The median run by stage:", "", "| stage | time s | share | work TFLOP | of the rate |",
             "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for stage in STAGES:
        seconds, needed = row.raw["stages"][stage], row.raw["needed"].get(stage, 0.0)
        reached = f"{needed / seconds / row.best:.0%}" if needed else "-"
        lines.append(
            f"| {stage} | {seconds:.1f} | {seconds / row.raw['seconds']:.0%} | {needed / 1e12:.2f} | {reached} |"
        )
    return [*lines, "", *NOTES, ""]


NOTES = (
    "- *Forward matrices* run once each: what attention gives and what the MLP's last matrix reads is held between",
    "  the passes, and pruned channels are left out of it when it is read. Bias and product are one operation,",
    "  activations change in place, and batches are small enough that their memory is used again, not asked of the",
    "  system anew.",
    "- *Attention* is torch's fused kernel, which forms no matrix of attention weights; heads of values that were",
    "  pruned are filled up with zeros for it. Softmax is not counted as work.",
    "- *Gram matrices* are worked out on and over the diagonal, in blocks of 256 columns; 4,096 tokens are added up in",
    "  float32, their sums in float64. Their rate counts the triangle only.",
    "- *Solves* are in float64, half as fast: the inputs of a layer may nearly depend on each other.",
    "- *Everything else* is norms, residuals, and copies of what is held.",
    '- With `device="cuda"` the same code keeps activations, Gram matrices and solves on the GPU and the weights where',
    "  they are. No GPU was at hand: its time is not known. A test runs all of it on a device that stands in for",
    "  one, and refuses to mix it with the CPU.",
)


def _gptq(ran: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## GPTQ, 4 bits in groups of 32, searched scales",
        "",
        "| matrix | time s, of each run | factor of the inverse | scales | columns |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for index, (out, width) in enumerate(GPTQ_SHAPES):
        runs = sorted((raw["gptq"][index] for raw in ran), key=lambda one: one["seconds"])
        one, seconds = runs[len(runs) // 2], ", ".join(f"{run['seconds']:.2f}" for run in runs)
        parts = [one[name] / one["seconds"] for name in ("factor", "scales")]
        lines.append(f"| {out} x {width} | {seconds} | {parts[0]:.0%} | {parts[1]:.0%} | {1 - sum(parts):.0%} |")
    return [
        *lines,
        "",
        "All in float64, so that codes do not depend on the block size. Scales try 41 sizes a group.",
        "",
    ]


def machine(device: str) -> str:
    """Which processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{platform.machine()}, {names[0]}, {len(names)} cores"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--print", action="store_true", help="do not write the page")
    parser.add_argument("--one", action="store_true", help="one run in this process; prints JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(run(given.layers, given.windows, given.device)))
        return
    command = [sys.executable, __file__, "--one", "--layers", str(given.layers), "--windows", str(given.windows),
               "--device", given.device]  # fmt: skip
    ran = []
    for _ in range(given.runs):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        ran.append(json.loads(done.stdout.splitlines()[-1]))
    text = page(ran, given.layers, given.windows, given.device)
    print(text)
    if not given.print:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
