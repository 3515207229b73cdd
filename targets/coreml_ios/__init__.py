"""Core ML: an iOS 18 ML program, a decoder's with its keys and values as states, written with the MIL builder.

There is no Core ML on Linux: programs run in a reference executor (`executor/`), and what is said of them says so.
coremltools takes seconds to import; it is imported by the methods that need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from exporter.artifact import Budget
from exporter.model import Model
from exporter.plugins import Finding, Plan, Session
from targets.coreml_ios import planning


class CoreMLTarget:
    """The `coreml-ios` target."""

    name = "coreml-ios"
    extra = "coreml"
    modules = ("coremltools",)
    runs_here = True
    stand_in = "reference executor on Linux, not Apple's runtime"

    def plan(self, model: Model, context: int) -> Plan:
        return planning.plan(model, context)

    def lower(self, model: Model, plan: Plan, folder: Path) -> Mapping[str, str]:
        from targets.coreml_ios import package

        package.write(model, plan, folder / package.NAME)
        return planning.requires(plan.weights)

    def budget(self, model: Model, plan: Plan) -> Budget:
        return planning.budget(model, plan)

    def inspect(self, folder: Path, model: Model, plan: Plan) -> Sequence[Finding]:
        from targets.coreml_ios import inspection, proof

        found = inspection.inspect(folder, model, plan)  # first: it refuses a folder that is no package
        return [*proof.prove(folder, model, plan), *found]

    def session(self, folder: Path, threads: int = 1) -> Session:
        from targets.coreml_ios import runner

        return runner.open_session(folder, threads)


TARGET = CoreMLTarget()
