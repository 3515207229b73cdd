"""How much memory a compression takes that streams, and whether it survives being killed.

    python bench/streaming.py SCRATCH --size large

Writes a Llama of random bf16 weights in shards, compresses it by FASP 20 % and 4-bit GPTQ (16 windows of 256 tokens),
samples the resident memory of that process from /proc every 50 ms (file pages that it has mapped included, those of
shared libraries not), then runs the same job again, kills it with -9 at random moments, and compares the two result
folders byte by byte. A moment is a number of finished layers and some seconds more, so that a machine which others use
too does not move it.
The memory that `pocket compress --memory-plan` predicts is printed beside what was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from exporter import adapters, mapped
from exporter.pipeline import BUILTIN_FOLDER

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
SAMPLE_S = 0.05
LIBRARY = re.compile(r"\.so(\.[\d.]+)?$")
SIZES = {  # hidden, layers, MLP, heads, key-value heads, vocabulary
    "tall": (256, 60, 1024, 4, 2, 2048),  # 60 M parameters, little of them in any one layer
    "short": (2048, 2, 5632, 32, 4, 32000),  # 219 M: the matrices of the large one, so its memory too
    "large": (2048, 24, 5632, 32, 4, 32000),  # 1.19 B
}
RECIPE = """\
version: 1
calibration: {windows: 16, length: 256}
steps:
  - {kind: fasp, sparsity: 0.2}
  - {kind: quantize, algorithm: gptq, bits: 4, group: 32}
"""
STEPS = 2
COMMAND = [sys.executable, "-c", "from exporter.cli import main; main()", "compress"]
IDLE = [sys.executable, "-c", "import time, torch; print('ready', flush=True); time.sleep(60)"]


def make_checkpoint(folder: Path, size: str) -> int:
    """Write a checkpoint a shard a layer, one matrix in memory at a time; returns its parameters."""
    hidden, layers, mlp, heads, kv_heads, vocab = SIZES[size]
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(BUILTIN_FOLDER / "tokenizer.json", folder)
    shapes = adapters.find("llama").shapes(adapters.find("llama").read(config))
    named = {f"{site}.weight": shape for site, shape in shapes.weights.items()}
    named |= {name: (length,) for name, length in shapes.tensors.items()}
    places = {name: f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors" for name in named}
    for shard in sorted(set(places.values())):
        leaves = {name: mapped.Leaf(torch.bfloat16, named[name], partial(_values, name, named[name]))
                  for name in named if places[name] == shard}  # fmt: skip
        mapped.write(folder / shard, leaves)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(leaf.numel() for leaf in (torch.empty(shape, device="meta") for shape in named.values()))


def _values(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random values that keep the size of an input; of norms, ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values * shape[1] ** -0.5).to(torch.bfloat16)


@dataclass
class Sampled:
    """A run: its seconds, the largest resident memory seen at each stage (bytes), and whether it was killed."""

    seconds: float = 0.0
    peaks: dict[str, int] = field(default_factory=dict)
    high_water: int = 0  # what the kernel itself says of the most that was resident
    was_killed: bool = False
    stage: str = "begin"  # the latest that began
    said: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(self.peaks.values())


def resident(pid: int) -> tuple[int, int]:
    """Bytes of a process in memory now, and at most so far as the kernel says; 0 where the process is gone.

    Pages of shared libraries are left out of the first: how many of them are in memory follows the page cache, not the
    program, and moved one and the same interpreter between 218 and 271 MiB within an hour.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        maps = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return 0, 0
    most = next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), 0)
    return _counted(maps), most


def _counted(maps: Sequence[str]) -> int:
    """Resident bytes of the mappings in smaps that are no shared library."""
    total, is_library = 0, False
    for line in maps:
        name, *rest = line.split()
        if not name.endswith(":"):  # the first line of a mapping: addresses, rights, ..., path
            is_library = bool(LIBRARY.search(rest[-1]))
        elif name == "Rss:" and not is_library:
            total += int(rest[0]) * 1024
    return total


@dataclass(frozen=True)
class Moment:
    """When to kill: so many layers are finished, those of earlier steps too, and so many seconds have gone since."""

    out: Path
    layers: int  # of the model
    finished: int
    then_s: float

    def is_reached(self) -> bool:
        """Whether the layers are finished."""
        work = self.out / ".pocket"
        in_step = len(list(work.glob("journal-*/[0-9]*.json")))
        return len(list(work.glob("step*"))) * self.layers + in_step >= self.finished


def sampled(words: list[str], kill: Moment | None = None) -> Sampled:
    """Run a command, look at its memory all the time, and kill it when its time has come."""
    found, begun = Sampled(), time.monotonic()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        ears = threading.Thread(target=listen, args=(process, found))
        ears.start()
        watch(process, found, kill)
        ears.join()
    found.seconds = time.monotonic() - begun
    if process.returncode != 0 and not found.was_killed:
        raise SystemExit("\n".join(found.said))
    return found


def listen(process: subprocess.Popen[str], found: Sampled) -> None:
    """Write down what a run says; a line without a colon begins a stage."""
    assert process.stderr is not None
    for line in process.stderr:
        found.said.append(line.rstrip())
        if ":" not in line:
            found.stage = line.strip()


def watch(process: subprocess.Popen[str], found: Sampled, kill: Moment | None) -> None:
    """Sample a run's memory until it ends, by itself or killed."""
    reached = None
    while process.poll() is None:
        now, most = resident(process.pid)
        found.peaks[found.stage] = max(found.peaks.get(found.stage, 0), now)
        found.high_water = max(found.high_water, most)
        if kill is not None and reached is None and kill.is_reached():
            reached = time.monotonic()
        if kill is not None and reached is not None and time.monotonic() - reached > kill.then_s:
            process.send_signal(signal.SIGKILL)
            found.was_killed = process.wait() == -signal.SIGKILL
        time.sleep(SAMPLE_S)


def interpreter() -> int:
    """Resident bytes of an interpreter that has imported torch."""
    with subprocess.Popen(IDLE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        now, _ = resident(process.pid)
        process.kill()
    return now


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def kill_moments(out: Path, layers: int, steps: int, seconds: float, kills: int, seed: int) -> list[Moment]:
    """Random moments of a run, in order: each with other layers finished, and at most as long behind as a layer takes.

    Args:
        out: The run's output folder.
        layers: Of the model.
        steps: Of the recipe, each of which walks all layers.
        seconds: That an undisturbed run takes.
        kills: Moments, fewer than `layers * steps`.
        seed: Of the draw.
    """
    drawn, whole = random.Random(seed), layers * steps
    finished = sorted(drawn.sample(range(1, whole), kills))
    return [Moment(out, layers, count, drawn.uniform(0, seconds / whole)) for count in finished]


def planned(words: list[str]) -> dict[str, int]:
    """Bytes that the program itself predicts, by step."""
    command = [*words, "--memory-plan", "--json"]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    steps: dict[str, int] = {}
    for moment in said["moments"]:
        steps[moment["step"]] = max(steps.get(moment["step"], 0), moment["total"])
    return steps


def show(name: str, run: Sampled, base: int, expected: Mapping[str, int]) -> None:
    """A line for people about one run, and one per step: measured beside what was predicted."""
    seen, most, foretold = ((n / MIB) for n in (run.peak - base, run.high_water - base, max(expected.values())))
    print(f"{name}: {run.seconds:.0f} s, peak {seen:.0f} MiB above the interpreter (high water {most:.0f}), "
          f"predicted {foretold:.0f}")  # fmt: skip
    for stage, peak in run.peaks.items():
        of_stage = f", predicted {expected[stage] / MIB:.0f}" if stage in expected else ""
        print(f"    {stage}: {(peak - base) / MIB:.0f} MiB{of_stage}")


def main() -> None:
    """Make, run, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="tall")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    scratch = asked.scratch.resolve()
    model, recipe = scratch / f"llama-{asked.size}", scratch / "recipe.yaml"
    recipe.write_text(RECIPE)
    if not model.exists():
        print(f"{make_checkpoint(model, asked.size):,} parameters in {len(list(model.glob('*.safetensors')))} shards")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    base = interpreter()
    print(f"an interpreter with torch: {base / MIB:.0f} MiB")
    words = [*COMMAND, str(model), "--recipe", str(recipe), "-o"]
    expected = planned([*words, str(scratch / "unwritten")])
    whole = sampled([*words, str(scratch / "undisturbed")])
    show("undisturbed", whole, base, expected)
    out = scratch / "killed"
    moments = kill_moments(out, SIZES[asked.size][1], STEPS, whole.seconds, asked.kills, asked.seed)
    for moment in moments:
        print(f"to be killed {moment.then_s:.1f} s after {moment.finished} of {STEPS * moment.layers} layers")
    runs = [sampled([*words, str(out)], moment) for moment in (*moments, None)]
    for index, run in enumerate(runs):
        show(f"run {index}{', killed' if run.was_killed else ''}", run, base, expected)
    same = digests(scratch / "undisturbed") == digests(scratch / "killed")
    print(f"killed {sum(run.was_killed for run in runs)} times; byte-identical: {same}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
