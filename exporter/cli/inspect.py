"""`pocket check`, `pocket run` and `pocket evaluate`: one artifact, or one model."""

from __future__ import annotations

from pathlib import Path

from exporter import artifact as artifacts
from exporter import calibrate, checking, pipeline, plugins
from exporter import evaluate as evaluation
from exporter.cli.export import print_outcomes, refuse_failed
from exporter.cli.screen import print_json, print_line, watch
from exporter.errors import ArtifactError
from exporter.model import Model
from exporter.plugins import Session
from exporter.session import TorchSession, greedy
from exporter.tokenizer import Tokenizer


def check(folder: Path, model_folder: Path | None, as_json: bool) -> None:
    """Check an artifact's digests, read its files back, and run it against its model where its runtime is here.

    Raises:
        ArtifactError: it is no artifact, it is damaged, or its model is not there or another one.
        CheckFailedError: its numbers are not its model's.
    """
    made = artifacts.load(folder)
    artifacts.verify_files(folder, made)
    model = _model_of(folder, made, model_folder)
    target = plugins.target(made.target)
    with watch([f"check {made.target}"]) as shown, shown.stage(f"check {made.target}"):
        outcome = checking.check(folder, made, model, target)
    if as_json:
        print_json(outcome.model_dump(mode="json"))
    else:
        print_outcomes([outcome])
        for found in outcome.findings:
            print_line(f"{'ok' if found.ok else 'WRONG'}: {found.what}: {found.detail}")
    refuse_failed([outcome])


def run(name: str, prompt: str, new_tokens: int, as_json: bool) -> None:
    """Print the greedy text of an artifact or a model."""
    session, tokenizer, eos = _open(name)
    asked = tokenizer.encode(prompt)
    tokens = list(greedy(session, asked, new_tokens, eos))
    text = tokenizer.decode([*asked, *tokens])
    if as_json:
        print_json({"prompt": asked, "tokens": tokens, "text": text})
    else:
        print_line(text)


def evaluate(name: str, text: Path, windows: int, length: int, seed: int, as_json: bool) -> None:
    """Print the perplexity of an artifact or a model on a text."""
    session, tokenizer, _ = _open(name)
    tokens = tokenizer.encode_plain(pipeline.read_text(text))
    drawn = calibrate.windows(tokens, windows, min(length, session.context), seed, tokenizer.bos)
    with watch(["evaluate"]) as shown, shown.stage("evaluate") as report:
        found = evaluation.perplexity(session, drawn, report)
    if as_json:
        print_json({**found.model_dump(mode="json"), "windows": windows, "length": length, "seed": seed})
    else:
        print_line(f"perplexity {found.perplexity:.4f} (mean loss {found.nll:.4f}, {found.tokens:,} tokens, {windows} "
                   f"windows of {length}, seed {seed})")  # fmt: skip


def _open(name: str) -> tuple[Session, Tokenizer, tuple[int, ...]]:
    """A session of an artifact in its own runtime, or of a model in torch, with its tokenizer and ending tokens."""
    folder = Path(name)
    if (folder / artifacts.NAME).is_file():
        made = artifacts.load(folder)
        artifacts.verify_files(folder, made)
        session = plugins.target(made.target).session(folder)
        files = {path.name: path.read_bytes() for path in folder.glob("tokenizer*.json")}
        return session, Tokenizer(files, made.model.bos, made.model.vocab), tuple(made.model.eos)
    model = pipeline.load(name)
    return TorchSession(model), pipeline.tokenizer_of(model), model.architecture.eos


def _model_of(folder: Path, made: artifacts.Artifact, given: Path | None) -> Model:
    """The compressed model that an artifact was lowered from."""
    place = given or folder.resolve().parent / pipeline.MODEL
    if not place.exists():
        raise ArtifactError(f"the model of {folder} is not at {place}; give it with --model")
    model = pipeline.load(str(place))
    steps = [dict(step) for step in model.provenance.steps]
    if model.provenance.digest != made.model.digest or steps != made.recipe:
        raise ArtifactError(f"{place} is another model than the one {folder} was lowered from; give that with --model")
    return model
