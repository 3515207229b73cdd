"""What a benchmark says of the machine that it ran on."""

import platform
from pathlib import Path


def processor() -> str:
    """The processor's name as Linux has it; elsewhere its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory(field: str) -> int:
    """A field of this process's status (`VmRSS`, `VmHWM`), in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
