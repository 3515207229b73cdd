"""ONNX Runtime on phones: a model as one graph that onnxruntime, and of decoders onnxruntime-genai, run unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from exporter.artifact import Budget
from exporter.model import Model
from exporter.plugins import Finding, Plan, Session
from targets.onnxruntime_mobile import package, planning, proof, readback, runner
from targets.onnxruntime_mobile.constants import MODEL


class OnnxRuntimeMobile:
    """The target `onnxruntime-mobile`; see plugins.Target for what each method promises."""

    name = "onnxruntime-mobile"
    extra = "onnxruntime"
    modules = ("onnx", "onnx_ir", "onnxruntime")
    runs_here = True
    stand_in = None

    def plan(self, model: Model, context: int) -> Plan:
        return planning.plan(model, context)

    def lower(self, model: Model, plan: Plan, folder: Path) -> Mapping[str, str]:
        package.write(model, plan, folder)
        return package.requires(model, plan)

    def budget(self, model: Model, plan: Plan) -> Budget:
        return planning.budget(model, plan)

    def inspect(self, folder: Path, model: Model, plan: Plan) -> Sequence[Finding]:
        findings = readback.inspect(folder, model, plan)
        is_as_written = all(finding.ok for finding in findings)
        return [*findings, *proof.exactness(folder, model, plan)] if is_as_written else findings

    def session(self, folder: Path, threads: int = 1) -> Session:
        return runner.open_session(folder / MODEL, threads)


TARGET = OnnxRuntimeMobile()
