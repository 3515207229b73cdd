"""`pocket compress` and `pocket export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from exporter import memory, pipeline, plugins, store
from exporter import recipe as recipes
from exporter.checking import Outcome
from exporter.cli.screen import print_json, print_line, print_note, print_table, watch
from exporter.encoders import EncoderComparison
from exporter.errors import CheckFailedError
from exporter.evaluate import Comparison, Divergence
from exporter.model import Model
from exporter.pipeline import Job
from exporter.recipe import Recipe

MIB = 2**20


def compress(
    model: str, recipe: Path, output: Path, calibration: Path | None, device: str, memory_plan: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Compress a model and save it, or say what would be done, or what memory that would take."""
    job = Job(model, (), output, _recipe(recipe, calibration), device=device)
    _note_text(job)
    if memory_plan:
        _print_memory(job, as_json)
        return
    if dry_run:
        _print_plan(job, as_json)
        return
    with watch(list(pipeline.all_stages(job.recipe, ()))) as shown:
        pipeline.run(job, shown)
    made = store.load(output / pipeline.MODEL)
    summary = {"model": str(output / pipeline.MODEL), "parameters": made.parameters,
               "source_parameters": made.provenance.parameters}  # fmt: skip
    if as_json:
        print_json(summary)
    else:
        print_line(f"{summary['model']}: {made.parameters:,} of {made.provenance.parameters:,} parameters")


def export(
    model: str, recipe: Path | None, targets: Sequence[str], output: Path, calibration: Path | None,
    context: int | None, device: str, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Lower a model to targets and check every artifact, or say what would be done.

    Raises:
        CheckFailedError: an artifact's numbers are not its model's.
    """
    names = tuple(dict.fromkeys(targets)) or tuple(plugins.target_names())
    job = Job(model, names, output, _recipe(recipe, calibration), context, device)
    _note_text(job)
    if dry_run:
        _print_plan(job, as_json)
        return
    with watch(list(pipeline.all_stages(job.recipe, names))) as shown:
        outcomes = pipeline.run(job, shown)
    if as_json:
        print_json([outcome.model_dump(mode="json") for outcome in outcomes])
    else:
        print_outcomes(outcomes)
    refuse_failed(outcomes)


def refuse_failed(outcomes: Sequence[Outcome]) -> None:
    """Raise for the first outcome that is not right.

    Raises:
        CheckFailedError: with its first problem.
    """
    for outcome in outcomes:
        if not outcome.ok:
            raise CheckFailedError(f"{outcome.target}: {outcome.problems[0]}")


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """The table that ends an export, and below it what was folded and why."""
    columns = ("target", "bytes", "bits/weight", "max abs", "rel L2", "greedy", "native", "check")
    print_table("Artifacts against the compressed model", columns, [_row(outcome) for outcome in outcomes])
    for outcome in outcomes:
        if outcome.stand_in is not None:
            print_line(f"{outcome.target}: {words_of_stand_in(outcome.stand_in)}")
        for reason in outcome.folded:
            print_line(f"{outcome.target}: folded: {reason}")
        for note in outcome.notes:
            print_line(f"{outcome.target}: {note}")
        compared = outcome.comparison
        if isinstance(compared, Comparison) and compared.divergence is not None:
            print_line(f"{outcome.target}: {_parting(compared, compared.divergence)}")
        if isinstance(compared, EncoderComparison):
            lengths = ", ".join(map(str, compared.texts))
            print_line(f"{outcome.target}: cosine of embeddings {compared.cosine:.6f} in texts of {lengths} tokens")


def _parting(compared: Comparison, found: Divergence) -> str:
    """Where greedy texts part, and whether the budget explains it."""
    kind = "a tie within" if found.is_tie else "NOT a tie within"
    gap = f"the model's logits of the two tokens are {found.reference_gap:.2g} apart, rounding moves logits by up to"
    return f"greedy text parts at token {found.position}: {kind} the budget ({gap} {compared.max_abs:.2g})"


def _row(outcome: Outcome) -> tuple[str, ...]:
    compared = outcome.comparison
    greedy = f"{compared.greedy_agreement}/{compared.new_tokens}" if isinstance(compared, Comparison) else "-"
    errors = ("-", "-") if compared is None else (f"{compared.max_abs:.1e}", f"{compared.relative_l2:.1e}")
    sizes = f"{outcome.file_bytes:,}", f"{outcome.bits_per_weight:.2f}"
    kind = "files" if compared is None else "run" if outcome.stand_in is None else "stand-in run"
    verdict = f"{kind}: {'ok' if outcome.ok else 'FAILED'}"
    native = f"{outcome.native}/{outcome.sites}"
    return (outcome.target, *sizes, *errors, greedy, native, verdict)


def _recipe(path: Path | None, calibration: Path | None) -> Recipe:
    recipe = Recipe() if path is None else recipes.load(path)
    return recipe if calibration is None else recipes.with_text(recipe, calibration)


def words_of_stand_in(stand_in: str) -> str:
    """What to say of numbers that are not of the target's own runtime."""
    return f"run in a stand-in: {stand_in}"


def note_generic(name: str) -> None:
    """Say so where no adapter knows a model."""
    if pipeline.is_generic(name):
        print_note("no adapter knows this model, transformers runs it: it can be rounded, not pruned, and has no cache")


def _note_text(job: Job) -> None:
    """Say so where a model is not of a known family, or is calibrated on text that is hardly its own kind."""
    note_generic(job.model)
    if pipeline.wants_text(job.recipe) and job.recipe.calibration.text is None and job.model != pipeline.BUILTIN:
        print_note("calibrating on the sample that ships, Python code; give the model's kind of text by --calibration")


def _print_plan(job: Job, as_json: bool) -> None:
    """What a job would do: its steps, and per target the predicted bytes and folds."""
    ahead = pipeline.prospect(job)
    source, model, plans = ahead.source, ahead.model, ahead.plans
    steps = [pipeline.step_name(step) for step in job.recipe.steps]
    if as_json:
        print_json({"steps": steps, "parameters": model.parameters, "source_parameters": source.parameters,
                    "targets": {name: _plan_facts(plan) for name, plan in plans.items()}})  # fmt: skip
        return
    _print_steps(steps, source, model)
    rows = [(name, f"{plan.bytes:,}", f"{sum(d.native for d in plan.decisions)}/{len(plan.decisions)}")
            for name, plan in plans.items()]  # fmt: skip
    print_table("Plan", ("target", "predicted bytes", "native"), rows)
    for name, plan in plans.items():
        for reason in sorted({d.reason for d in plan.decisions if not d.native}):
            print_line(f"{name}: folded: {reason}")


def _print_memory(job: Job, as_json: bool) -> None:
    """What there will be in memory at each moment, beside the interpreter."""
    ahead = pipeline.prospect(job)
    steps = [(pipeline.step_name(step), step) for step in job.recipe.steps]
    moments = memory.plan(ahead.source, steps, ahead.samples)
    most = memory.peak(moments)
    if as_json:
        print_json({"peak_bytes": most.total, "moments": [{**asdict(m), "total": m.total} for m in moments]})
        return
    parts = ("blocks", "embeddings", "activations", "grams", "decoded", "beside", "total")
    rows = [(m.step, m.name, *(f"{getattr(m, part) / MIB:,.0f}" for part in parts)) for m in moments]
    print_table("Memory in MiB", ("step", "moment", *parts), rows)
    print_line(f"peak: {most.total / MIB:,.0f} MiB beside the interpreter, in {most.step}: {most.name}")


def _print_steps(steps: Sequence[str], source: Model, model: Model) -> None:
    for index, step in enumerate(steps, 1):
        print_line(f"step {index}: {step}")
    print_line(f"parameters: {source.parameters:,} -> {model.parameters:,}")


def _plan_facts(plan: plugins.Plan) -> dict[str, object]:
    decisions = [decision.model_dump(mode="json") for decision in plan.decisions]
    return {"predicted_bytes": plan.bytes, "decisions": decisions, "notes": list(plan.notes)}
