"""ExecuTorch for Android: one .pte that the stock AAR and ExecuTorch's own LLM runners load.

Importing this costs nothing; ExecuTorch, which takes seconds, is imported by the methods that need it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from exporter.artifact import Budget
from exporter.errors import BackendMissingError
from exporter.model import Model
from exporter.plugins import Finding, Plan, Session
from targets.executorch_android import noise, planning, spoken


class ExecutorchAndroid:
    """XNNPACK linears, `llama::custom_sdpa`, quantized lookups."""

    name = "executorch-android"
    extra = "executorch"
    modules = ("executorch",)
    runs_here = True
    stand_in = None

    def plan(self, model: Model, context: int) -> Plan:
        return planning.plan(model, context)

    def lower(self, model: Model, plan: Plan, folder: Path) -> Mapping[str, str]:
        _load("package").write(model, plan, folder)
        tokenizer = spoken.tokenizer(model.files) if model.architecture.causal else None
        if tokenizer is not None:
            (folder / spoken.FILE).write_bytes(tokenizer)
        return {"executorch": "1.4.1"}

    def budget(self, model: Model, plan: Plan) -> Budget:
        return planning.budget(model, plan)

    def inspect(self, folder: Path, model: Model, plan: Plan) -> Sequence[Finding]:
        findings: list[Finding] = list(_load("reading").findings(folder, model, plan))
        if all(finding.ok for finding in findings):  # a file that is not as written need not run
            proof = _load("proof")
            with noise.muted():
                findings += proof.exactness(folder, model, plan)
        return findings

    def session(self, folder: Path, threads: int = 1) -> Session:
        runner = _load("runner")
        with noise.muted():
            session: Session = runner.open_session(folder, threads)
        return session


def _load(name: str) -> ModuleType:
    """A module of this package that imports ExecuTorch.

    Raises:
        BackendMissingError: ExecuTorch is not installed.
    """
    try:
        with noise.silenced(), noise.muted():
            return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise BackendMissingError(f"target {ExecutorchAndroid.name}", error.name, ExecutorchAndroid.extra) from None


TARGET = ExecutorchAndroid()
