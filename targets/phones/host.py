"""This machine as a phone: the artifact's runtime in a process of its own. Its times are never a phone's."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from exporter import errors
from exporter.artifact import Golden, checked_path
from exporter.errors import ArtifactError, PhoneError, PocketError
from exporter.plugins import Answers, Job, Timings

WORKER = "targets.phones.host_worker"
RUNTIMES = ("torch", "onnxruntime", "executorch", "coremltools")  # distributions whose versions a record names
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
R = TypeVar("R", Answers, Timings)
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@dataclass(frozen=True)
class HostPhone:
    """This machine.

    Args:
        timeout_s: Seconds that one process may take.
    """

    timeout_s: float = 3600.0
    kind: str = "host"

    def facts(self) -> Mapping[str, Any]:
        """What this machine is, and how busy it was when asked."""
        return {
            "cpu": _field(CPUINFO, "model name") or platform.processor() or platform.machine(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "usable_cores": _usable_cores(),
            "memory_bytes": _memory_bytes(),
            "os": _system(),
            "kernel": platform.release(),
            "governor": GOVERNOR.read_text().strip() if GOVERNOR.is_file() else None,
            "load_average_before": list(os.getloadavg()),
            "runtimes": {"python": platform.python_version(), **_versions()},
        }

    def push(self, folder: Path) -> str:
        """The folder where it lies: a copy would cost gigabytes, and time another file's pages than the user's."""
        return str(folder.resolve())

    def answers(self, place: str, golden: Golden, threads: int) -> Answers:
        request = {"place": place, "golden": golden.model_dump(mode="json"), "threads": threads}
        return _parse(Answers, self._ask(request, threads).get("answers"))

    def run(self, place: str, job: Job) -> Timings:
        return _parse(Timings, self._ask({"place": place, "job": asdict(job)}, job.threads).get("timings"))

    def pull(self, place: str, name: str, to: Path) -> None:
        source = Path(place) / checked_path(name)
        if source.is_symlink() or not source.is_file():
            raise ArtifactError(f"{place} has no file {name!r}")
        shutil.copyfile(source, to)

    def _ask(self, request: Mapping[str, Any], threads: int) -> dict[str, Any]:
        """Start a worker, send it a request, and wait for its reply.

        `-P` keeps the current folder, which may hold anything, out of the worker's import path.
        """
        environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", WORKER],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                errors="replace",
                env=environment,
                timeout=self.timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise PhoneError(f"no answer within {self.timeout_s:g} s; ask for fewer tokens or repeats") from None
        if done.returncode != 0:
            raise PhoneError(f"the process that ran the artifact {_end(done.returncode)}; {_last_words(done.stderr)}")
        return _checked(done.stdout)


PHONE = HostPhone()


def _checked(output: str) -> dict[str, Any]:
    """A worker's reply; an error of ours in it is raised here again."""
    try:
        reply = json.loads(output)
    except ValueError:
        raise PhoneError(f"the process that ran the artifact answered no JSON but {output[:80]!r}") from None
    if "error" not in reply:
        return dict(reply)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PocketError)]
    raise {kind.__name__: kind for kind in kinds}[reply["error"]](reply["message"])


def _parse(kind: type[R], content: Any) -> R:
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise PhoneError(f"the process that ran the artifact answered {error.errors()[0]['msg']}") from None


def _end(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _last_words(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return f"its last words: {lines[-1]}" if lines else "it said nothing"


def _field(path: Path, name: str) -> str | None:
    """The first `name: value` of a file under /proc, or None."""
    if not path.is_file():
        return None
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)


def _memory_bytes() -> int | None:
    total = _field(MEMINFO, "MemTotal")  # as in "16384 kB"
    return None if total is None else int(total.split()[0]) * 1024


def _usable_cores() -> int | None:
    """Cores that this process may run on; containers give fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform(terse=True)


def _versions() -> dict[str, str]:
    found = {}
    for name in RUNTIMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
