"""How fast Core ML programs run in the reference executor on this machine, and what memory they take.

    python bench/coreml_executor.py

The built-in model, and random 4-bit weights in the shape of a decoder of 15 M parameters, each in float16 arithmetic,
on one thread, in a process of its own that only loads an exported folder. The executor says what a program computes;
its speed says nothing about a phone.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from host import decode_seconds, measured, memory, processor

from exporter import adapters, pipeline
from exporter.model import Architecture, Layer, Model, Provenance, Rope
from exporter.weights import LowBit
from targets.coreml_ios import TARGET

CONTEXT, PROMPT, NEW_TOKENS, WARMUPS, ROUNDS = 256, 64, 64, 4, 3
GOALS = {"built-in model": 50, "15 M parameters, 4 bits": 5}  # decoded tokens per second
ARCHITECTURE = Architecture(
    family="llama", vocab=32_000, hidden=288, positions=CONTEXT, layers=(Layer(6, 6, 48, 48, 768),) * 6,
    activation="silu", norm_eps=1e-5, rope=Rope(10000.0), tied=True, bos=1, eos=(2,),
)  # fmt: skip


def main() -> None:
    """Export both models, measure each in turn, print the table."""
    models = dict(zip(GOALS, (pipeline.load("builtin"), four_bits())))
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: exported(model, Path(scratch) / name) for name, model in models.items()}
        results: dict[str, list[dict[str, float]]] = {name: [] for name in models}
        for _ in range(ROUNDS):  # in turn, so that a busy minute does not fall on one case alone
            for name, folder in folders.items():
                results[name].append(measured(__file__, folder))
    print_table({name: model.parameters for name, model in models.items()}, results)


def four_bits() -> Model:
    """Random codes in groups of 32, with scales that keep the size of an input."""
    generator = torch.Generator().manual_seed(0)
    shapes = adapters.find("llama").shapes(ARCHITECTURE)

    def weight(out: int, columns: int) -> LowBit:
        codes = torch.randint(1, 16, (out, columns), generator=generator, dtype=torch.uint8)  # mean: the middle
        scales = torch.full((out, columns // 32), columns**-0.5 / (16 / 12**0.5)).half().float()
        return LowBit(codes, scales, torch.tensor([[8.0]]), 4, 32)

    weights = {site: weight(*shape) for site, shape in shapes.weights.items()}
    norms = {name: torch.ones(width) for name, width in shapes.tensors.items()}
    made = Model(ARCHITECTURE, weights, norms, Provenance("random", "0" * 64, 0))
    return replace(made, provenance=replace(made.provenance, parameters=made.parameters))


def exported(model: Model, folder: Path) -> Path:
    """Write a folder."""
    folder.mkdir()
    TARGET.lower(model, TARGET.plan(model, CONTEXT), folder)
    return folder


def measure(folder: Path) -> dict[str, float]:
    """Seconds to load, of the prefill, and per decoded token (the wall's, and this thread's), and peak memory."""
    from targets.coreml_ios import runner  # noqa: F401 (imports are no part of what is measured)

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = memory("VmRSS")
    start = time.perf_counter()
    session = TARGET.session(folder)
    load = time.perf_counter() - start
    session.step([1] * PROMPT)  # decodes the constants
    session.reset()
    start = time.perf_counter()
    session.step([1] * PROMPT)
    prefill = time.perf_counter() - start
    decode = decode_seconds(session, WARMUPS, NEW_TOKENS)
    return {"load_s": load, "prefill_s": prefill, **decode, "peak_bytes": memory("VmHWM") - before}


def print_table(parameters: dict[str, int], results: dict[str, list[dict[str, float]]]) -> None:
    """One row per case: medians over the rounds, and the range of the decode speed."""
    columns = ("model", "parameters", "decode tokens/s by the wall (range)", "by CPU time", "goal",
               f"prefill of {PROMPT}, tokens/s", "load, s", "peak memory, MB")  # fmt: skip
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for name, rounds in results.items():
        speeds = sorted(1 / result["wall_s"] for result in rounds)
        keys = ("cpu_s", "prefill_s", "load_s", "peak_bytes")
        cpu, prefill, load, peak = (statistics.median(result[key] for result in rounds) for key in keys)
        speed = f"{statistics.median(speeds):.0f} ({speeds[0]:.0f}-{speeds[-1]:.0f})"
        print(
            f"| {name} | {parameters[name]:,} | {speed} "
            f"| {1 / cpu:.0f} | {GOALS[name]} | {PROMPT / prefill:.0f} | {load:.2f} | {peak / 1e6:.0f} |"
        )
    print(f"\nHost: {processor()}, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
          f"torch {torch.__version__}, one thread, {ROUNDS} processes each, {NEW_TOKENS} tokens after a prompt of "
          f"{PROMPT}, context {CONTEXT}; {TARGET.stand_in}.")  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(measure(Path(sys.argv[1]))))
    else:
        main()
