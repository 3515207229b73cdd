"""Beside the executor's pytest plug-in: shards and samples coremltools' tests, and writes down what became of each.

    pytest -p targets.coreml_ios.executor.pytest_plugin -p bench.coremltools_report --report FILE ...

A line of JSON a test: name, outcome, how often it predicted, what went wrong. A test that names the old backend,
neuralnetwork, is left out: its models are no ML programs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from targets.coreml_ios.executor.model import ReferenceModel

LONGEST = 300  # characters of a message
_predictions = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    """What is run, and where it is written."""
    parser.addoption("--report", help="file of JSON lines")
    parser.addoption("--shard", default="0/1", help="i/n: every n-th test, from the i-th on")
    parser.addoption("--sample", type=int, default=0, help="this many tests, drawn with a fixed seed; 0: all")


def pytest_configure(config: pytest.Config) -> None:
    """Count predictions."""
    plain = ReferenceModel.predict

    def predict(self: ReferenceModel, *args: Any, **kwargs: Any) -> Any:
        global _predictions
        _predictions += 1
        return plain(self, *args, **kwargs)

    ReferenceModel.predict = predict  # type: ignore[method-assign]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, sample, shard: in this order, the same every time."""
    kept = [item for item in items if "neuralnetwork" not in item.name]
    if config.option.sample and config.option.sample < len(kept):
        places = sorted(random.Random(0).sample(range(len(kept)), config.option.sample))
        kept = [kept[place] for place in places]
    index, count = (int(part) for part in config.option.shard.split("/"))
    kept = kept[index::count]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    """A line for the call, or for a set-up that ended otherwise."""
    global _predictions
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "setup":
        _predictions = 0 if report.passed else _predictions
    if report.when == "call" or (report.when == "setup" and not report.passed):
        _write(item, report)


def _write(item: pytest.Item, report: Any) -> None:
    file = item.config.option.report
    if not file:
        return
    root = Path(item.config.rootpath)
    line = {
        "test": f"{item.path.relative_to(root)}::{item.nodeid.partition('::')[2]}",
        "outcome": "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome,
        "predictions": _predictions, "seconds": round(report.duration, 3), "message": _message(report),
    }  # fmt: skip
    with Path(file).open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def _message(report: Any) -> str:
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return str(report.longrepr[2])[:LONGEST]
    crash = getattr(report.longrepr, "reprcrash", None)
    where = f" ({Path(crash.path).name}:{crash.lineno})" if crash else ""
    said = crash.message if crash else str(report.longrepr)
    return " ".join(said.split())[:LONGEST] + where
