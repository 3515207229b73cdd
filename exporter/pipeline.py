"""The road from a checkpoint to checked artifacts: load, compress, lower, check, publish.

from exporter import pipeline
model = pipeline.load("builtin")
small = pipeline.compress(model, pipeline.recipe("recipes/fasp-int4.yaml"))
for outcome in pipeline.export(small, ["onnxruntime-mobile", "executorch-android"], "out"):
    print(outcome.target, outcome.file_bytes, outcome.comparison)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

import torch

from exporter import adapters, calibrate, checking, checkpoint, pictures, plugins, store, tokenizer
from exporter import artifact as artifacts
from exporter import compress as methods
from exporter import recipe as recipes
from exporter.artifact import Artifact
from exporter.calibrate import Samples
from exporter.checking import Outcome
from exporter.compress.step import Unkept
from exporter.errors import CheckpointError, OutputError, RecipeError, TargetError
from exporter.journal import FolderJournal
from exporter.model import Model
from exporter.recipe import Recipe
from exporter.stages import Workshop, abandoned_on_error, code_version, key_of
from exporter.tokenizer import Tokenizer
from exporter.torch_ops import fitting_threads

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).parent / "builtin" / "model"
SAMPLE = Path(__file__).parent / "builtin" / "calibration.txt"
MODEL = "model"
REPORT = "report.json"
LARGEST_TEXT = 256 * 2**20  # bytes
DEVICES = ("cpu", "cuda")
CONTEXT = 2048  # tokens, unless asked otherwise or the model has fewer

Report = Callable[[float], None]  # takes the fraction that is done


class Watch(Protocol):
    """Whoever shows progress."""

    def stage(self, name: str) -> AbstractContextManager[Report]:
        """A stage begins; what it yields is told the fraction done."""

    def found(self, name: str) -> None:
        """A stage was finished by an earlier run."""


class Unwatched:
    """Shows nothing."""

    def stage(self, name: str) -> AbstractContextManager[Report]:
        return nullcontext(lambda fraction: None)

    def found(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class Job:
    """One export.

    Args:
        model: `builtin`, a checkpoint folder or a saved model.
        targets: Names.
        out: Output folder.
        recipe: Steps, maybe none.
        context: Longest context in tokens, or None for the model's own up to 2048.
        device: Where steps are worked out: `cpu` or `cuda`.
    """

    model: str
    targets: tuple[str, ...]
    out: Path
    recipe: Recipe = field(default_factory=Recipe)
    context: int | None = None
    device: str = "cpu"


def load(name: str) -> Model:
    """A model by `builtin`, by checkpoint folder, or by the folder of a saved model.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = BUILTIN_FOLDER if name == BUILTIN else Path(name)
    if not folder.exists():
        raise CheckpointError(f"no such path: {name}; give a checkpoint folder, a saved model or {BUILTIN!r}")
    if not folder.is_dir():
        raise CheckpointError(f"{name} is a file; give the folder that it lies in")
    model = store.load(folder) if store.is_stored(folder) else checkpoint.load(folder)
    return _with_frame(model) if tokenizer.FILE in model.files else model


def is_generic(name: str) -> bool:
    """Whether only transformers knows a model; False for what is no model at all, which `load` tells."""
    folder = BUILTIN_FOLDER if name == BUILTIN else Path(name)
    path = folder / (store.MANIFEST if store.is_stored(folder) else "config.json")
    if not path.is_file():
        return False
    said = checkpoint.read_json(path, "")
    architecture = said.get("architecture")
    family = architecture.get("family") if isinstance(architecture, dict) else said.get("model_type")
    return family not in adapters.FAMILIES


def tokenizer_of(model: Model) -> Tokenizer:
    """A model's own tokenizer.

    Raises:
        CheckpointError: it has none, or it cannot be read.
    """
    return Tokenizer.of(model)


def _with_frame(model: Model) -> Model:
    """The model with the tokens that its tokenizer puts around texts ([CLS], [SEP]); an encoder's config is silent.

    Raises:
        CheckpointError: the tokenizer cannot be read; it is told before the work.
    """
    frame, architecture = tokenizer_of(model).frame, model.architecture
    if architecture.causal or architecture.bos is not None or len(frame) != 2:
        return model
    return replace(model, architecture=replace(architecture, bos=frame[0], eos=(frame[1],)))


def recipe(path: str | Path) -> Recipe:
    """Read a recipe file."""
    return recipes.load(Path(path))


def compress(model: Model, recipe: Recipe, watch: Watch | None = None) -> Model:
    """Follow a recipe, in memory.

    Raises:
        RecipeError: a step does not fit what the steps before it will leave; it is told before any of them works.
    """
    predict(model, recipe)
    samples = calibration_samples(model, recipe)
    for step in recipe.steps:
        with (watch or Unwatched()).stage(step_name(step)) as report, fitting_threads(model.parameters):
            model = methods.run(model, step, samples, Unkept(report))
    return model


def predict(model: Model, recipe: Recipe) -> Model:
    """What a recipe will make of a model, in shapes: on the meta device, without work."""
    for step in recipe.steps:
        model = methods.predict(model, step)
    return model


def export(model: Model, targets: Sequence[str], out: str | Path, context: int | None = None) -> list[Outcome]:
    """Lower a model as it is and check the artifacts; see `run` for the resumable whole.

    Raises:
        OutputError: the output folder is not empty.
    """
    key = key_of(token_hex())  # a model in memory has no history that a later run could know it by
    workshop = Workshop(Path(out), {"model": key})
    with abandoned_on_error(workshop):
        return _finish(workshop, _Road(model, key, Unwatched()), tuple(targets), context)


def run(job: Job, watch: Watch | None = None) -> list[Outcome]:
    """A whole export, stage by stage; the same job goes on where a killed one was.

    Raises:
        PocketError: whatever is wrong with the input; nothing is left behind.
    """
    watch = watch or Unwatched()
    for name in job.targets:
        plugins.require_back_end(plugins.target(name))
    ahead = prospect(job)
    model, samples = ahead.source, ahead.samples
    code = code_version("exporter"), torch.__version__, job.device
    key = key_of(model.provenance.digest, code, model.provenance.steps, samples and samples.digests())
    job_key = {
        "model": key,
        "recipe": job.recipe.model_dump(mode="json"),
        "targets": job.targets,
        "context": job.context,
    }
    workshop = Workshop(job.out, job_key)
    with abandoned_on_error(workshop):
        road = _compressed(workshop, _Road(model, key, watch, job.device), job.recipe, samples)
        return _finish(workshop, road, job.targets, job.context)


@dataclass(frozen=True)
class Prospect:
    """What a job will make, known before the work.

    Args:
        source: The model that it begins with.
        samples: Calibration text, or None where no step wants any.
        model: What the recipe will make of it, in shapes.
        plans: What each target will store.
    """

    source: Model
    samples: Samples | None
    model: Model
    plans: Mapping[str, plugins.Plan]


def prospect(job: Job) -> Prospect:
    """Look ahead: everything that is wrong with a job is told here, before the work.

    Raises:
        PocketError: the device is not there, the model, text, recipe or context cannot be used, or a target cannot take
            the result.
    """
    require_device(job.device)
    source = load(job.model)
    samples = calibration_samples(source, job.recipe)
    model, context = predict(source, job.recipe), context_of(source, job.context)
    targets = {name: plugins.target(name) for name in job.targets}
    plans = {name: target.plan(model, context) for name, target in targets.items()}
    for name, plan in plans.items():
        refuse_wasted_bits(targets[name], plan)
    return Prospect(source, samples, model, plans)


def require_device(name: str) -> None:
    """Refuse a device that is not here.

    Raises:
        RecipeError: it is none of `DEVICES`, or torch finds no such device.
    """
    if name not in DEVICES:
        raise RecipeError(f"no device named {name!r}; devices: {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"torch {torch.__version__} finds no CUDA device here; leave out --device, or use cpu")


def refuse_wasted_bits(target: plugins.Target, plan: plugins.Plan) -> None:
    """Refuse a plan that would store a plain low-bit matrix as floats: nobody asks for 4 bits to get 32.

    Raises:
        TargetError: names the site and the widths or groups that the target takes.
    """
    for decision in plan.decisions:
        if re.fullmatch(r"\d-bit group \d+( with zero points)?", decision.tree) and decision.stored.startswith("float"):
            why = decision.reason.partition(": ")[2] or decision.reason
            advice = "choose bits, group and symmetric that it takes, ignore this site, or leave the target out"
            raise TargetError(f"{decision.site}: {target.name} cannot store {decision.tree}: {why}; {advice}")


def context_of(model: Model, context: int | None) -> int:
    """Longest context of an artifact, in tokens.

    Raises:
        OutputError: it is longer than the model's own, or under two tokens.
    """
    longest = model.architecture.positions
    chosen = min(longest, CONTEXT) if context is None else context
    if longest < 2:
        raise OutputError(f"a model with a context of {longest} token continues no text; at least 2 are needed")
    if not 2 <= chosen <= longest:
        raise OutputError(f"a context of {chosen} tokens is not possible; this model takes 2 to {longest}")
    return chosen


def read_text(text: Path) -> str:
    """A text file of bounded size.

    Raises:
        CheckpointError: no such file, too large, or not UTF-8.
    """
    if not text.is_file():
        raise CheckpointError(f"no text file at {text}")
    if text.stat().st_size > LARGEST_TEXT:
        raise CheckpointError(f"{text} has {text.stat().st_size} bytes; at most {LARGEST_TEXT} are read")
    try:
        return text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{text} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def wants_text(recipe: Recipe) -> bool:
    """Whether a step of a recipe is calibrated."""
    return any(methods.needs_calibration(step) for step in recipe.steps)


def calibration_samples(model: Model, recipe: Recipe) -> Samples | None:
    """Windows of tokens, and of pictures where the text is JSON lines that name them, for the steps that want them."""
    if not wants_text(recipe):
        return None
    asked, bos = recipe.calibration, model.architecture.bos
    length = min(asked.length, model.architecture.positions)
    if asked.text is not None and Path(asked.text).suffix == pictures.SUFFIX:
        return _pictured_samples(model, Path(asked.text), asked, length)
    text = read_text(SAMPLE if asked.text is None else Path(asked.text))
    tokens, validation = calibrate.split(tokenizer_of(model).encode_plain(text), asked.validation, length, bos)
    drawn = calibrate.windows(tokens, asked.windows, length, asked.seed, bos)
    return Samples(
        calibrate.framed(drawn, model.architecture),
        validation=None if validation is None else calibrate.framed(validation, model.architecture),
    )


def _pictured_samples(model: Model, path: Path, asked: recipes.CalibrationText, length: int) -> Samples:
    if asked.validation:
        raise RecipeError(f"{path}: validation windows are cut off a text, and these are pictures; give text, or none")
    return pictures.read(path, model, asked.windows, length, asked.seed)


def step_name(step: Any) -> str:
    """A step for people: its kind and what matters most."""
    config = step.model_dump(mode="json")
    shown = [f"{config[name]}" for name in ("algorithm", "sparsity", "bits") if config.get(name) is not None]
    return " ".join([config["kind"], *shown])


@dataclass(frozen=True)
class _Road:
    """A model on its way: the model, the hash of how it came about, who watches, the device, where it is saved."""

    model: Model
    key: str
    watch: Watch
    device: str = "cpu"
    saved: Path | None = None


def _compressed(workshop: Workshop, road: _Road, recipe: Recipe, samples: Samples | None) -> _Road:
    """Follow a recipe, a stage per step."""
    for index, step in enumerate(recipe.steps):
        key = key_of(road.key, step.model_dump(mode="json"))
        make = partial(_make_step, road, step, samples, workshop.journal(key))
        folder, was_there = workshop.stage(f"step{index}-{step.kind}", key, make)
        if was_there:
            road.watch.found(step_name(step))
        saved = store.load(folder)  # as saved: a resumed run sees the same numbers
        road = replace(road, model=saved, key=key, saved=folder)
    return road


def _make_step(road: _Road, step: Any, samples: Samples | None, kept: Path, folder: Path) -> None:
    """Run a step into an empty folder; what it finishes on the way lies in `kept`, and is taken up from there."""
    with road.watch.stage(step_name(step)) as report, fitting_threads(road.model.parameters):
        store.save(methods.run(road.model, step, samples, FolderJournal(kept, report, road.device)), folder)


def _finish(workshop: Workshop, road: _Road, targets: Sequence[str], context: int | None) -> list[Outcome]:
    """Save the model, lower it to every target, check each, and give all of it its final names."""
    longest = context_of(road.model, context)
    saved = road.saved or workshop.stage("model", key_of(road.key), partial(store.save, road.model))[0]
    made = [(name, *_lowered(workshop, road, name, longest)) for name in targets]
    outcomes = [checking.load_outcome(outcome) for _, _, outcome in made]
    for (name, folder, _), outcome in zip(made, outcomes):
        workshop.publish(folder / name, name if outcome.ok else f"{name}.failed")
    workshop.publish(saved, MODEL)
    workshop.write(REPORT, artifacts.to_json(checking.Report(outcomes=outcomes)))
    workshop.finish()
    return outcomes


def _lowered(workshop: Workshop, road: _Road, name: str, context: int) -> tuple[Path, Path]:
    """A stage folder with the artifact and, beside it, what its check found."""
    target = plugins.target(name)
    key = key_of(road.key, name, context, code_version("targets"))

    def make(folder: Path) -> None:
        with road.watch.stage(f"lower to {name}"):
            (folder / name).mkdir()
            made = lower(road.model, target, folder / name, context)
        with road.watch.stage(f"check {name}"):
            outcome = checking.check(folder / name, made, road.model, target)
        (folder / "outcome.json").write_text(artifacts.to_json(outcome), encoding="utf-8")

    folder, was_there = workshop.stage(name, key, make)
    if was_there:
        road.watch.found(f"lower to {name}")
    return folder, folder / "outcome.json"


def lower(model: Model, target: plugins.Target, folder: Path, context: int) -> Artifact:
    """Write one artifact into an empty folder: tokenizer, model files, artifact.json."""
    plan = target.plan(model, context)
    for name in sorted(set(model.files) & set(checkpoint.TOKENIZER_FILES)):
        (folder / name).write_bytes(model.files[name])
    requires = target.lower(model, plan, folder)
    made = checking.describe(model, target, plan, requires, folder)
    artifacts.save(made, folder)
    return made


def all_stages(recipe: Recipe, targets: Sequence[str]) -> Iterator[str]:
    """The names of the stages that `run` will go through, in order."""
    yield from (step_name(step) for step in recipe.steps)
    for name in targets:
        yield from (f"lower to {name}", f"check {name}")
