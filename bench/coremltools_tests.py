"""Run coremltools' own tests on our executor, and say what became of them, a table a directory.

    python bench/coremltools_tests.py OUT                 # everything: hours
    python bench/coremltools_tests.py OUT --sample 60     # at most 60 tests a file, the same ones every time
    python bench/coremltools_tests.py OUT --again Nms     # tests whose names have this, once more
    python bench/coremltools_tests.py OUT --table         # the table of what OUT holds

Every test file is one process a shard, so that a crash costs one file; a file that is finished is not run again.
coremltools 9.0's torch front end needs numpy < 2.4. The classes of failures are in `CLASSES`, each with its reason.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {  # directories and files, inside coremltools
    "torch front end": ["converters/mil/frontend/torch/test"],
    "operations, iOS 14": ["converters/mil/mil/ops/tests/iOS14"],
    "operations, iOS 15": ["converters/mil/mil/ops/tests/iOS15"],
    "operations, iOS 16": ["converters/mil/mil/ops/tests/iOS16"],
    "operations, iOS 17": ["converters/mil/mil/ops/tests/iOS17"],
    "operations, iOS 18": ["converters/mil/mil/ops/tests/iOS18"],
    "passes, programs, loading": ["converters/mil/mil/tests", "converters/mil/mil/passes/tests",
                                  "converters/mil/backend/mil", "converters/mil/frontend/milproto"],
    "flexible shapes": ["converters/mil/test_inputs_outputs_shape.py"],
    "optimize": ["test/optimize"],
    "packages and the API": ["test/ml_program", "test/modelpackage", "test/api"],
}  # fmt: skip
MOVED = {  # files that have a row of their own
    "states": "test_states|stateful", "compression": "test_constexpr_ops|test_compression",
}  # fmt: skip
SHARDS = {  # a shard is what a kill may lose
    "test_torch_ops.py": 24, "test_post_training_quantization.py": 4, "test_passes.py": 2, "test_compression.py": 4,
}  # fmt: skip
TIMEOUT_S = 120  # of one test


@dataclass(frozen=True)
class Class:
    """Why tests fail that are not ours to mend.

    Args:
        kind: `needs macOS`, or `upstream`: coremltools, torch or numpy themselves.
        reason: In a sentence.
        pattern: Of the message, or of the test's name.
    """

    kind: str
    reason: str
    pattern: str


CLASSES: tuple[Class, ...] = (
    Class("upstream", "torch 2.13 refuses 8-bit signed activations in its own quantized operators (qnnpack): the "
          "test's own expectation cannot be computed", r"qnnpack\): Expected (activation|input) data type QUInt8"),
    Class("upstream", "torch 2.13 refuses a batch norm with one of two running statistics before anything is converted",
          "running_mean and running_var must either both be None"),
    Class("upstream", "the converter begins a packed LSTM with states for as many texts as the first text is long: "
          "[10, 6] for a batch of 3, which MIL's own definition does not allow and Core ML lets pass",
          r"TestLSTMWithPackedSequence.*(states of \[\[10, 6\]|size of tensor a \(3\) must match)"),
    Class("upstream", "training in torch, without a prediction, that had not ended after two minutes on two busy cores",
          r"test/optimize/torch.*Timeout \(>120"),
    Class("upstream", "torch 2.13 has no export_for_training any more: the file cannot be collected",
          "cannot import name 'export_for_training'"),
    Class("upstream", "coremltools' own clustering in seconds, on two busy cores", "test_k_means_perf"),
    Class("needs macOS", "Core ML's compiler refuses a program whose default sizes do not go together; those that are "
          "given do, and the executor runs it", "test_stack_dynamic_range_dim.*DID NOT RAISE"),
    Class("needs macOS", "the models of these tests are no ML programs, and a test before them is skipped where it "
          "predicts, before it undoes its renaming", "modelpackage.*renamed_feature"),
)  # fmt: skip


def main() -> int:
    """Run, or print the table; returns 1 where a failure has no class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the results")
    parser.add_argument("--sample", type=int, default=0, help="tests a file, at most; 0: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="part of a file's path")
    parser.add_argument("--again", default="", help="run these tests once more, by pytest's -k; with --only")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.table:
        run = partial(_run, out=options.out, sample=options.sample, again=options.again)
        with ThreadPoolExecutor(options.jobs) as pool:
            for said in pool.map(run, _shards(options.only, is_whole=bool(options.sample or options.again))):
                print(said, flush=True)
    rows = list(read(options.out))
    print(table(rows))
    return 1 if any(is_ours(row) for row in rows) else 0


def _package() -> Path:
    found = find_spec("coremltools")
    if found is None or found.origin is None:
        sys.exit("coremltools is not installed; pip install 'pocket-exporter[coreml]'")
    return Path(found.origin).parent


def _shards(only: str, *, is_whole: bool) -> list[tuple[Path, int, int]]:
    """Files with tests, the largest first: path, which part of how many."""
    files = {file for places in GROUPS.values() for place in places for file in _files(_package() / place)}
    chosen = sorted((file for file in files if only in str(file)), key=lambda file: -file.stat().st_size)
    counts = {file: 1 if is_whole else SHARDS.get(file.name, 1) for file in chosen}
    return [(file, index, counts[file]) for file in chosen for index in range(counts[file])]


def _files(place: Path) -> Iterable[Path]:
    return [place] if place.suffix == ".py" else place.rglob("test_*.py")


def _run(shard: tuple[Path, int, int], out: Path, sample: int, again: str) -> str:
    """Run a part of a file, unless it was run before."""
    file, index, count = shard
    name = str(file.relative_to(_package())).replace("/", ".").removesuffix(".py")
    report = out / f"{name}.{again or f'{index}-{count}'}.jsonl"
    if report.exists() and not again:
        return f"{report.stem}: done before"
    part = report.with_suffix(".part")
    part.unlink(missing_ok=True)
    plug_ins = ("bench.torchvision_operators", "targets.coreml_ios.executor.pytest_plugin", "bench.coremltools_report")
    command = [
        sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={_package()}", "-p", "no:cacheprovider",
        "-p", "no:warnings", *(word for name in plug_ins for word in ("-p", name)), f"--report={part.resolve()}",
        f"--shard={index}/{count}", f"--sample={sample}", f"--timeout={TIMEOUT_S}", "--tb=short", "-k", again,
        str(file),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(ROOT)}  # fmt: skip
    ran = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)  # some write beside them
    if ran.returncode not in (0, 1, 5):  # tests failed, or there were none
        last = (ran.stdout.strip().splitlines() or ["nothing"])[-1]
        said = f"pytest ended with {ran.returncode}: {_reason(ran.stdout + ran.stderr) or last}"
        row = {"test": f"{file.relative_to(_package())}::", "outcome": "failed", "predictions": 0, "seconds": 0,
               "message": said}  # fmt: skip
        with part.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
    part.touch()
    part.rename(report)
    return f"{report.stem}: {(ran.stdout.strip().splitlines() or ['nothing'])[-1]}"


def _reason(text: str) -> str:
    """The error of a file that cannot be collected."""
    return " ".join(line[2:].strip() for line in text.splitlines() if line.startswith("E "))[:300]


def read(out: Path) -> Iterable[dict[str, object]]:
    """A row a test, as the newest report has it."""
    reports = sorted(out.glob("*.jsonl"), key=lambda report: report.stat().st_mtime_ns)
    rows = (json.loads(line) for report in reports for line in report.read_text().splitlines())
    return {row["test"]: row for row in rows}.values()


def group_of(test: str) -> str:
    """The row of the table that a test belongs to."""
    moved = next((name for name, pattern in MOVED.items() if re.search(pattern, test.partition("::")[0])), None)
    return moved or next(name for name, places in GROUPS.items() if any(test.startswith(place) for place in places))


def class_of(row: dict[str, object]) -> Class | None:
    """Why a test failed, where that is known."""
    said = f"{row['test']} {row['message']}"
    return next((one for one in CLASSES if re.search(one.pattern, said)), None)


def is_ours(row: dict[str, object]) -> bool:
    """Whether a test failed for no reason beside our own code."""
    return row["outcome"] == "failed" and class_of(row) is None


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: a row a group, then every class of failures, what the plug-in skips, and every failure without a class.

    The rate is of the tests that compare predictions: those that passed, whatever the reason of the others.
    """
    by_group: dict[str, list[dict[str, object]]] = collections.defaultdict(list)
    for row in rows:
        by_group[group_of(str(row["test"]))].append(row)
    columns = ["tests", "run", "compare predictions", "pass", "needs macOS", "upstream", "ours", "rate"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * 7]
    lines += [_line(name, by_group[name]) for name in (*GROUPS, *MOVED) if by_group[name]]
    lines += [_line("all", rows), ""]
    counts = collections.Counter(found for row in rows if row["outcome"] == "failed" and (found := class_of(row)))
    lines += [f"- {one.kind}, {count}: {one.reason}" for one, count in counts.most_common()]
    left = collections.Counter(_left_out(row) for row in rows if row["outcome"] == "skipped")
    lines += [f"- skipped here, {count}: {reason}" for reason, count in left.most_common() if reason]
    ours = [f"- ours: `{row['test']}`: {row['message']}" for row in rows if is_ours(row)]
    return "\n".join(lines + ours)


def _left_out(row: dict[str, object]) -> str:
    """Why the plug-in skipped a test, or nothing where coremltools did."""
    said = str(row["message"]).removeprefix("Skipped: ")
    return said if "needs macOS" in said or "executor runs ML programs only" in said else ""


def _line(name: str, rows: list[dict[str, object]]) -> str:
    ran = [row for row in rows if row["outcome"] in ("passed", "failed")]
    predicted = [row for row in ran if row["predictions"]]
    kinds = collections.Counter(
        "pass" if row["outcome"] == "passed" else found.kind if (found := class_of(row)) else "ours"
        for row in ran)  # fmt: skip
    good = sum(row["outcome"] == "passed" for row in predicted)
    rate = f"{100 * good / len(predicted):.2f} %" if predicted else "-"
    counts = [kinds[kind] for kind in ("pass", "needs macOS", "upstream", "ours")]
    cells = [name, len(ran), len(predicted), *counts, rate]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
