"""What benchmarks share: the machine that they ran on, a process of its own, the seconds of a decoded token."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.plugins import Session


def processor() -> str:
    """The processor's name as Linux has it; elsewhere its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory(field: str) -> int:
    """A field of this process's status (`VmRSS`, `VmHWM`), in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured(script: str, folder: Path) -> dict[str, float]:
    """What a script prints as JSON of a folder, in a process of its own."""
    child = subprocess.run([sys.executable, script, str(folder)], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(child.stdout)
    return result


def decode_seconds(session: Session, warmups: int, tokens: int) -> dict[str, float]:
    """Medians of a decoded token: of this thread's CPU time (`cpu_s`) and the wall's (`wall_s`)."""
    for _ in range(warmups):
        session.step([1])
    cpu, wall = [], []
    for _ in range(tokens):
        starts = time.thread_time(), time.perf_counter()
        session.step([1])
        cpu.append(time.thread_time() - starts[0])
        wall.append(time.perf_counter() - starts[1])
    return {"cpu_s": statistics.median(cpu), "wall_s": statistics.median(wall)}
