"""Decode speed, peak memory and file size of the ONNX Runtime target: float32 against 4 bits in blocks of 32.

    python bench/onnxruntime_decode.py

Random weights (26.7 M parameters), one thread, each measurement in a process of its own that only loads an exported
folder. Prints a Markdown table and the machine. Host numbers: nothing here says anything about a phone.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from host import decode_seconds, measured, memory, processor

from exporter import adapters
from exporter.model import Architecture, Layer, Model, Provenance, Rope
from exporter.weights import Dense, LowBit, Weight
from targets.onnxruntime_mobile import TARGET

BITS, BLOCK = 4, 32
PROMPT, NEW_TOKENS, WARMUPS, ROUNDS = 64, 48, 4, 3
CONTEXT = 256
ARCHITECTURE = Architecture(
    family="llama", vocab=4096, hidden=512, positions=1024, layers=(Layer(8, 2, 64, 64, 1408),) * 8,
    activation="silu", norm_eps=1e-5, rope=Rope(10000.0), tied=False, bos=1, eos=(2,),
)  # fmt: skip


def main() -> None:
    """Export both models, measure each in turn, print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        cases = {"float32": random_model(low_bit=False), f"int{BITS} block {BLOCK}": random_model(low_bit=True)}
        sizes = {name: export(model, Path(scratch) / str(index)) for index, (name, model) in enumerate(cases.items())}
        results: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for _ in range(ROUNDS):  # in turn, so that a busy minute does not fall on one case alone
            for index, name in enumerate(cases):
                results[name].append(measured(__file__, Path(scratch) / str(index)))
    print_table(results, sizes)


def random_model(low_bit: bool) -> Model:
    """Random weights that keep the size of an input; codes and scales are drawn, not rounded from anything."""
    generator = torch.Generator().manual_seed(0)
    shapes = adapters.find("llama").shapes(ARCHITECTURE)

    def weight(out: int, columns: int) -> Weight:
        if not low_bit:
            return Dense(torch.randn(out, columns, generator=generator) * columns**-0.5)
        codes = torch.randint(1, 2**BITS, (out, columns), generator=generator, dtype=torch.uint8)  # mean: the middle
        scales = torch.full((out, columns // BLOCK), columns**-0.5 / (2**BITS / 12**0.5))
        return LowBit(codes, scales, torch.tensor([[2.0 ** (BITS - 1)]]), BITS, BLOCK)

    weights = {site: weight(*shape) for site, shape in shapes.weights.items()}
    norms = {name: torch.ones(width) for name, width in shapes.tensors.items()}
    parameters = sum(out * columns for out, columns in shapes.weights.values())
    return Model(ARCHITECTURE, weights, norms, Provenance("random", "0" * 64, parameters))


def export(model: Model, folder: Path) -> tuple[int, int]:
    """Write a folder; returns the bytes of its files, and those that the weights count (codes and scales)."""
    folder.mkdir()
    plan = TARGET.plan(model, CONTEXT)
    TARGET.lower(model, plan, folder)
    counted = sum(decision.bytes for decision in plan.decisions)
    return sum(path.stat().st_size for path in folder.iterdir()), counted


def measure(folder: Path) -> dict[str, float]:
    """Seconds per decoded token and of the prefill (this thread's CPU time, and the wall's), and peak memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here: imports apart
    before = memory("VmRSS")
    session = TARGET.session(folder, threads=1)
    tokens = [int(token) for token in torch.randint(0, ARCHITECTURE.vocab, (PROMPT,))]
    start = time.perf_counter()
    session.step(tokens)
    prefill = time.perf_counter() - start
    decode = decode_seconds(session, WARMUPS, NEW_TOKENS)
    return {"prefill_s": prefill, **decode, "peak_bytes": memory("VmHWM") - before}


def print_table(results: dict[str, list[dict[str, float]]], sizes: dict[str, tuple[int, int]]) -> None:
    """One row per case: medians over the rounds, and the range of the decode speed."""
    columns = ("weights", "decode tokens/s (CPU time; range)", "by the wall", f"prefill of {PROMPT}, s",
               "peak memory, MB", "files, MB", "counted weights, MB")  # fmt: skip
    print("| " + " | ".join(columns) + " |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, rounds in results.items():
        speeds = sorted(1 / result["cpu_s"] for result in rounds)
        wall, prefill, peak = (
            statistics.median(result[k] for result in rounds) for k in ("wall_s", "prefill_s", "peak_bytes")
        )
        files, counted = (size / 1e6 for size in sizes[name])
        print(f"| {name} | {statistics.median(speeds):.0f} ({speeds[0]:.0f}-{speeds[-1]:.0f}) | {1 / wall:.0f} "
              f"| {prefill:.3f} | {peak / 1e6:.0f} | {files:.1f} | {counted:.1f} |")  # fmt: skip
    floats, codes = (statistics.median(r["cpu_s"] for r in rounds) for rounds in results.values())
    files, counted = list(sizes.values())[-1]
    print(f"\nDecode of {BITS} bits is {floats / codes:.2f} times as fast as float32; its files are "
          f"{100 * files / counted - 100:.1f} % over the counted weights.")  # fmt: skip
    print(f"Host: {processor()}, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
          f"onnxruntime {onnxruntime.__version__}, one thread, {ROUNDS} processes each, {NEW_TOKENS} tokens "
          f"after a prompt of {PROMPT}.")  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(measure(Path(sys.argv[1]))))
    else:
        main()
