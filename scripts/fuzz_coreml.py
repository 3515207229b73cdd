"""Damage Core ML packages and run them: nothing but a clear error may come of it.

    python scripts/fuzz_coreml.py --count 100000 --seed 0

Every damaged package is opened and run as a user would. It may run, or end in one of our errors. Anything else (another
exception, a process that dies, seconds of work, gigabytes of memory) is printed with its seed, which brings it back.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exporter.errors import PocketError
from targets.coreml_ios.executor import machine, values
from tests.targets.coreml_ios.executor import hostile

SECONDS, MEGABYTES = 10, 1024  # of one package
LARGEST = 2**22  # values of a tensor: small, so that what forgets to ask for room is seen
MOST_ROUNDS = 2**10  # of loops


def attempt(base: hostile.Base, seed: str, folder: Path) -> str:
    """What became of one damaged package: `ran`, `refused`, or what should not be."""
    files = hostile.damaged(base.files, random.Random(seed))
    package = hostile.write(files, folder)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    signal.alarm(SECONDS)
    try:
        hostile.run(package, dict(base.inputs))
        outcome = "ran"
    except PocketError:
        outcome = "refused"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    finally:
        signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    if grown > MEGABYTES:
        return f"took {grown} MiB"
    return outcome if time.monotonic() - began < SECONDS else f"took {time.monotonic() - began:.0f} s"


def work(name: str, base: hostile.Base, seeds: range, results: Any) -> None:
    """Try many, in a process of its own, which a crash may end."""
    signal.signal(signal.SIGALRM, _too_long)
    values.LARGEST, machine.MOST_ROUNDS = LARGEST, MOST_ROUNDS
    place = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for seed in seeds:
            results.put((name, seed, "died"))
            results.put((name, seed, attempt(base, f"{name} {seed}", Path(folder))))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> int:
    """Run, print what should not be, return 1 if there was any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first package")
    parser.add_argument("--only", help="one base program")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bases = hostile.bases(Path(folder))
    names = [options.only] if options.only else list(bases)
    each = -(-options.count // len(names))
    outcomes: dict[tuple[str, int], str] = {}
    for name in names:
        seeds = range(options.seed, options.seed + each)
        while seeds:
            outcomes |= _tried(name, bases[name], seeds)
            last = max(seed for known, seed in outcomes if known == name)
            seeds = range(last + 1, seeds.stop)
        counts = collections.Counter("ran" if o == "ran" else "refused" if o == "refused" else "wrong"
                                     for (known, _), o in outcomes.items() if known == name)  # fmt: skip
        print(f"{name}: {dict(counts)}", flush=True)
    wrong = {key: outcome for key, outcome in outcomes.items() if outcome not in ("ran", "refused")}
    for (name, seed), outcome in list(wrong.items())[:50]:
        print(f"  {name} {seed}: {outcome}")
    print(f"{len(outcomes)} damaged packages, {len(wrong)} that ended in anything but a clear error")
    return 1 if wrong else 0


def _tried(name: str, base: hostile.Base, seeds: range) -> dict[tuple[str, int], str]:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    worker = context.Process(target=work, args=(name, base, seeds, results))
    worker.start()
    found: dict[tuple[str, int], str] = {}
    while worker.is_alive() or not results.empty():
        if results.empty():
            worker.join(0.05)
            continue
        known, seed, outcome = results.get()
        found[known, seed] = outcome
    return found


if __name__ == "__main__":
    sys.exit(main())
