"""Artifacts against their model: what is written in artifact.json, and what a check finds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from exporter import artifact as artifacts
from exporter import encoders, evaluate
from exporter.artifact import Artifact, Budget, Golden, Record, Summary
from exporter.encoders import EncoderComparison
from exporter.errors import FileChangedError
from exporter.evaluate import Comparison
from exporter.model import Model
from exporter.plugins import Plan, Target
from exporter.session import TorchSession

RIGHT_FILES = (
    "all parts in the files are the model's, so this is the runtime's own rounding, or an operator at fault: if the "
    "model has channels of outliers, leave sites as floats (ignore), or use more bits"
)
GOLDEN_TOKENS = 32
CHECKED_TOKENS = 64
SHORT_TOKENS = 7


class Found(Record):
    """One thing that a check looked at in the written files."""

    what: str
    ok: bool
    detail: str


class Outcome(Record):
    """What a check found in one artifact: its files read back, and its numbers where it runs here.

    `stand_in` says in what it ran, where that is not the target's own runtime.
    """

    target: str
    file_bytes: int
    bits_per_weight: float
    native: int
    sites: int
    folded: list[str]
    notes: list[str]
    findings: list[Found]
    comparison: Comparison | EncoderComparison | None
    stand_in: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return all(found.ok for found in self.findings) and (self.comparison is None or self.comparison.ok)

    @property
    def problems(self) -> list[str]:
        """What was wrong, a line each."""
        wrong = [f"{found.what}: {found.detail}" for found in self.findings if not found.ok]
        reasons = [] if self.comparison is None else self.comparison.reasons
        return wrong + [f"{reason}; {RIGHT_FILES}" for reason in reasons]


class Report(Record):
    """The outcomes of one export."""

    outcomes: list[Outcome]


def load_outcome(path: Path) -> Outcome:
    """Read an outcome that an earlier stage wrote."""
    return artifacts.read_record(path, Outcome, f"{path} is missing")


def prompt_of(model: Model) -> list[int]:
    """The prompt of every check: the model's BOS token, or token 0 where it has none."""
    return [0 if model.architecture.bos is None else model.architecture.bos]


def describe(model: Model, target: Target, plan: Plan, requires: Mapping[str, str], folder: Path) -> Artifact:
    """What artifact.json says of a folder whose model files are written."""
    budget = target.budget(model, plan)
    return Artifact(
        target=target.name,
        model=_summary(model, plan.context),
        recipe=[dict(step) for step in model.provenance.steps],
        decisions=sorted(plan.decisions, key=lambda decision: decision.site),
        notes=list(plan.notes),
        requires=dict(requires),
        budget=budget,
        golden=_golden(model, plan.context, budget),
        files={name: artifacts.describe_file(folder / name) for name in artifacts.files_under(folder)},
    )


def check(folder: Path, made: Artifact, model: Model, target: Target, known: Sequence[Found] = ()) -> Outcome:
    """Read an artifact's files back and, where it runs here, run it against the model.

    Args:
        folder: The artifact.
        made: Its artifact.json.
        model: The compressed model that it was lowered from.
        target: Its target.
        known: What was found before.
    """
    plan = target.plan(model, made.model.context)
    findings = [Found(what=f.what, ok=f.ok, detail=f.detail) for f in target.inspect(folder, model, plan)]
    findings += [_manifest(made, model, target, plan), *known]
    runs = target.runs_here and all(found.ok for found in findings)  # what is known to be wrong is not run
    return Outcome(
        target=made.target,
        file_bytes=made.file_bytes,
        bits_per_weight=round(made.bits_per_weight, 4),
        native=sum(decision.native for decision in made.decisions),
        sites=len(made.decisions),
        folded=sorted({decision.reason for decision in made.decisions if not decision.native}),
        notes=made.notes,
        findings=findings,
        comparison=_compare(folder, made, model, target) if runs else None,
        stand_in=target.stand_in,
    )


def digests(folder: Path, made: Artifact, target: Target) -> Found:
    """Whether the files are those that artifact.json names; only a stand-in is given others, to tell what is wrong.

    Raises:
        ArtifactError: a file was added or is missing, or is a link; or was changed, and the target has no stand-in.
    """
    try:
        artifacts.verify_files(folder, made)
    except FileChangedError as error:
        if target.stand_in is None:
            raise
        return Found(what="files", ok=False, detail=str(error))
    return Found(what="files", ok=True, detail=f"{len(made.files)}, each with the digest of {artifacts.NAME}")


def _golden(model: Model, context: int, budget: Budget) -> Golden:
    if not model.architecture.causal:
        return encoders.golden(TorchSession(model), _texts(model, min(GOLDEN_TOKENS, context))[0], budget)
    new_tokens = min(GOLDEN_TOKENS, context - 1)
    return evaluate.golden(TorchSession(model), prompt_of(model), new_tokens, budget)


def _texts(model: Model, longest: int) -> list[list[int]]:
    """What an encoder is checked on: texts of several lengths, the longest first."""
    lengths = dict.fromkeys((longest, min(longest, SHORT_TOKENS), 1))
    return [encoders.text(model.architecture, length) for length in lengths]


def _compare(folder: Path, made: Artifact, model: Model, target: Target) -> Comparison | EncoderComparison:
    reference, candidate = TorchSession(model), target.session(folder)
    if not model.architecture.causal:
        texts = _texts(model, min(CHECKED_TOKENS, made.model.context))
        return encoders.compare(reference, candidate, texts, made.budget)
    new_tokens = min(CHECKED_TOKENS, made.model.context - 1)
    return evaluate.compare(reference, candidate, prompt_of(model), new_tokens, made.budget)


def _manifest(made: Artifact, model: Model, target: Target, plan: Plan) -> Found:
    """Whether artifact.json says of its model, its budget and its decisions what this program would say."""
    derived = {
        "model": made.model == _summary(model, plan.context),
        "budget": math.isclose(made.budget.relative_l2, target.budget(model, plan).relative_l2, rel_tol=1e-9),
        "decisions": made.decisions == sorted(plan.decisions, key=lambda decision: decision.site),
    }
    wrong = [name for name, is_right in derived.items() if not is_right]
    said = f"{', '.join(wrong)}: not what this model gives" if wrong else f"{', '.join(derived)} derived again"
    return Found(what=artifacts.NAME, ok=not wrong, detail=said)


def _summary(model: Model, context: int) -> Summary:
    a, p = model.architecture, model.provenance
    return Summary(
        source=p.source, digest=p.digest, licence=p.licence, family=a.family, parameters=model.parameters,
        source_parameters=p.parameters, vocab=a.vocab, context=context, layers=len(a.layers), bos=a.bos,
        eos=list(a.eos), causal=a.causal,
    )  # fmt: skip
