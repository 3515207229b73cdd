"""ExecuTorch: decoding of one random Llama in float32 and in 4 bits, one thread, a process each.

    python bench/executorch_decode.py [--layers 8] [--tokens 64] [--repeats 5]

Prints a table: bytes of the file against those that the plan counts, milliseconds a token (median of the repeats'
means, and their range), peak memory (VmHWM, and what loading and running added to it).
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
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from host import processor

from exporter import adapters
from exporter.model import Architecture, Layer, Model, Provenance, Rope
from exporter.weights import Dense, LowBit, Weight

CONTEXT, GROUP, ROUNDS = 256, 32, 3
KINDS = ("float32", "8da4w", "8da4w, 4-bit embedding")


def random_model(layers: int) -> Model:
    """Hidden 512, MLP 1408, 8 heads of 64 over 2 key-value heads, 4,096 tokens, untied."""
    architecture = Architecture(
        family="llama", vocab=4096, hidden=512, positions=CONTEXT, layers=(Layer(8, 2, 64, 64, 1408),) * layers,
        activation="silu", norm_eps=1e-5, rope=Rope(10000.0), tied=False, bos=1, eos=(2,),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = adapters.find("llama").shapes(architecture)
    weights = {s: Dense(torch.randn(o, i, generator=generator) * i**-0.5) for s, (o, i) in shapes.weights.items()}
    tensors = {name: torch.ones(n) for name, n in shapes.tensors.items()}
    return Model(architecture, weights, tensors, Provenance("random", "0" * 64, 0))


def rounded(weight: Weight) -> LowBit:
    """Round to nearest: 4 bits, groups of 32, the largest value of a group at code 15."""
    values = weight.dense()
    groups = values.view(values.shape[0], -1, GROUP)
    scales = (groups.abs().amax(-1) / 7).to(torch.bfloat16).float()
    codes = (groups / scales[..., None]).round().clamp(-8, 7) + 8
    return LowBit(codes.view_as(values).to(torch.uint8), scales, torch.full((1, 1), 8.0), 4, GROUP)


def model_of(kind: str, layers: int) -> Model:
    """The random model in one of KINDS."""
    model = random_model(layers)
    if kind == "float32":
        return model
    kept = () if "embedding" in kind else ("model.embed_tokens",)
    return replace(model, weights={s: w if s in kept else rounded(w) for s, w in model.weights.items()})


def export(kind: str, layers: int, folder: Path) -> dict[str, float]:
    """Lower into a folder; returns the bytes that the plan counts and those of the file."""
    from targets.executorch_android import TARGET

    model, start = model_of(kind, layers), time.process_time()
    plan = TARGET.plan(model, CONTEXT)
    TARGET.lower(model, plan, folder)
    written = sum(path.stat().st_size for path in folder.iterdir())
    weights = sum(decision.bytes for decision in plan.decisions)
    return {"planned": plan.bytes, "weights": weights, "file": written, "lower_s": time.process_time() - start}


def measure(folder: Path, tokens: int, repeats: int) -> dict[str, object]:
    """Seconds a token per repeat (after one untimed), and peak memory before and after, in this process."""
    from targets.executorch_android import (
        TARGET,
        runner,  # noqa: F401 (its libraries are in the memory before)
    )

    before, start = _peak(), time.perf_counter()
    session = TARGET.session(folder, threads=1)
    load = time.perf_counter() - start
    means = []
    for _ in range(repeats + 1):
        session.reset()
        logits = session.step([1])
        start = time.perf_counter()
        for _ in range(tokens):
            logits = session.step([int(logits[-1].argmax())])
        means.append((time.perf_counter() - start) / tokens)
    return {"means": means[1:], "load_s": load, "before": before, "peak": _peak()}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_process(*arguments: str) -> dict[str, Any]:
    """This script in a process of its own; its last line is JSON."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(layers: int, tokens: int, repeats: int) -> None:
    """Export and measure every kind, and print the table."""
    print(machine())
    print(f"hidden 512, MLP 1408, 8/2 heads, {layers} layers, 4,096 tokens, context {CONTEXT}; {tokens} tokens"
          f" x {repeats} in each of {ROUNDS} processes, one thread\n")  # fmt: skip
    print("| weights | file bytes | planned | file / counted weights | ms a token | tokens/s | load s | VmHWM MB |"
          " added MB | speed |")  # fmt: skip
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {kind: Path(scratch) / str(index) for index, kind in enumerate(KINDS)}
        sizes = {kind: _export(kind, layers, folder) for kind, folder in folders.items()}
        ran: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for _ in range(ROUNDS):  # in turn, so that a busy minute does not fall on one kind alone
            for kind, folder in folders.items():
                ran[kind].append(
                    _in_process("--folder", str(folder), "--tokens", str(tokens), "--repeats", str(repeats))
                )
    baseline = _milliseconds(ran[KINDS[0]])
    for kind in KINDS:
        print(_row(kind, sizes[kind], ran[kind], statistics.median(baseline)))


def _export(kind: str, layers: int, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    return _in_process("--export", kind, "--folder", str(folder), "--layers", str(layers))


def _milliseconds(ran: list[dict[str, Any]]) -> list[float]:
    return [1e3 * mean for process in ran for mean in process["means"]]


def _row(kind: str, sizes: dict[str, Any], ran: list[dict[str, Any]], baseline: float) -> str:
    ms = _milliseconds(ran)
    middle, load = statistics.median(ms), statistics.median(process["load_s"] for process in ran)
    peak = max(process["peak"] for process in ran) / 1e6
    added = max(process["peak"] - process["before"] for process in ran) / 1e6
    return (f"| {kind} | {sizes['file']:,} | {sizes['planned']:,} | {sizes['file'] / sizes['weights']:.3f} |"
            f" {middle:.2f} ({min(ms):.2f} to {max(ms):.2f}) | {1e3 / middle:.0f} | {load:.2f} | {peak:.0f} |"
            f" {added:.0f} | {baseline / middle:.1f}x |")  # fmt: skip


def machine() -> str:
    """Where this ran."""
    system = f"{os.cpu_count()} cores, {platform.system()} {platform.release()}"
    return f"host: {processor()}, {system}, executorch {version('executorch')}, load {os.getloadavg()[0]:.1f}"


def main() -> None:
    """Words to functions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--export", choices=KINDS)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.export:
        print(json.dumps(export(given.export, given.layers, given.folder)))
    elif given.folder:
        print(json.dumps(measure(given.folder, given.tokens, given.repeats)))
    else:
        table(given.layers, given.tokens, given.repeats)


if __name__ == "__main__":
    main()
