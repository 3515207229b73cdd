"""`pocket check`, `pocket run` and `pocket evaluate`: one artifact, or one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from exporter import artifact as artifacts
from exporter import calibrate, checking, encoders, pipeline, plugins
from exporter import evaluate as evaluation
from exporter.cli.export import note_generic, print_outcomes, refuse_failed, words_of_stand_in
from exporter.cli.screen import print_json, print_line, print_note, watch
from exporter.errors import ArtifactError, PocketError
from exporter.model import Model
from exporter.plugins import Session
from exporter.session import TorchSession, greedy
from exporter.tokenizer import Tokenizer

SAMPLE = "One text, 2 tokenizers: are they the same?"


def check(folder: Path, model_folder: Path | None, as_json: bool) -> None:
    """Check an artifact's digests, read its files back, and run it against its model where its runtime is here.

    Raises:
        ArtifactError: it is no artifact, it is damaged, or its model is not there or another one.
        CheckFailedError: its numbers are not its model's.
    """
    made = artifacts.load(folder)
    target = plugins.target(made.target)
    digests = checking.digests(folder, made, target)
    model = _model_of(folder, made, model_folder)
    with watch([f"check {made.target}"]) as shown, shown.stage(f"check {made.target}"):
        outcome = checking.check(folder, made, model, target, [digests])
    if as_json:
        print_json(outcome.model_dump(mode="json"))
    else:
        print_outcomes([outcome])
        for found in outcome.findings:
            print_line(f"{'ok' if found.ok else 'WRONG'}: {found.what}: {found.detail}")
    refuse_failed([outcome])


def run(name: str, prompt: str, new_tokens: int, as_json: bool) -> None:
    """Print the greedy text of an artifact or a model; of an encoder, the embedding of the prompt."""
    opened = _open(name)
    session, tokenizer = opened.session, opened.tokenizer
    asked = tokenizer.encode(prompt)
    if not session.causal:
        _print_embedding(opened, [*asked, *opened.eos[:1]], as_json)
        return
    tokens = list(greedy(session, asked, new_tokens, opened.eos))
    text = tokenizer.decode([*asked, *tokens])
    if as_json:
        print_json({"prompt": asked, "tokens": tokens, "text": text, **opened.facts})
    else:
        print_line(text)


def evaluate(
    name: str, text: Path, reference: str | None, windows: int, length: int, seed: int, as_json: bool
) -> None:  # fmt: skip
    """Print the perplexity of an artifact or a model on a text, and how far it is from a reference.

    Raises:
        PocketError: an encoder without a reference, or a reference of another kind, tokenizer or context.
    """
    opened = _open(name)
    session, tokenizer, eos = opened.session, opened.tokenizer, opened.eos
    right = None if reference is None else _reference(reference, session, tokenizer)
    if not session.causal and right is None:
        raise PocketError(f"{name} is an encoder, which has no perplexity; give what to compare it with by --reference")
    longest = min(session.context, session.context if right is None else right.context)
    tokens = tokenizer.encode_plain(pipeline.read_text(text))
    drawn = calibrate.windows(tokens, windows, min(length, longest), seed, tokenizer.bos)
    if not session.causal and eos:
        drawn[:, -1] = eos[0]  # an encoder's texts end in [SEP]
    found, lines = _measured(session, right, drawn)
    if as_json:
        print_json({**found, "windows": windows, "length": drawn.shape[1], "seed": seed, **opened.facts})
    else:
        for line in lines:
            print_line(f"{line} ({drawn.numel():,} tokens, {windows} windows of {drawn.shape[1]}, seed {seed})")


def _measured(session: Session, right: Session | None, drawn: Tensor) -> tuple[dict[str, object], list[str]]:
    """What there is to say of a session on windows of a text: numbers by name, and lines for people."""
    with watch(["evaluate"]) as shown, shown.stage("evaluate") as report:
        if right is not None and not session.causal:
            near = encoders.agreement(right, session, drawn, report)
            cosines = f"cosine of embeddings {near.cosine_mean:.6f} mean, {near.cosine_worst:.6f} worst"
            errors = f"of hidden states {near.relative_l2_mean:.2e} mean, {near.relative_l2_worst:.2e} worst"
            return near.model_dump(mode="json"), [f"{cosines}; relative L2 {errors}"]
        found = evaluation.perplexity(session, drawn, report)
        lines = [f"perplexity {found.perplexity:.4f}, mean loss {found.nll:.4f}"]
        if right is None:
            return found.model_dump(mode="json"), lines
        apart = evaluation.agreement(right, session, drawn)
    lines.append(f"KL from the reference {apart.kl:.3e} nats, the same likeliest token at {apart.top1:.2%}")
    return {**found.model_dump(mode="json"), "reference": apart.model_dump(mode="json")}, lines


def _reference(name: str, session: Session, tokenizer: Tokenizer) -> Session:
    """The session of a reference, refused where it is not of the candidate's kind."""
    opened = _open(name)
    right, own = opened.session, opened.tokenizer
    if right.causal != session.causal:
        raise PocketError(f"{name} and its candidate are not both encoders, or both decoders")
    if own.bos != tokenizer.bos or own.encode_plain(SAMPLE) != tokenizer.encode_plain(SAMPLE):
        raise PocketError(f"{name} has another tokenizer than its candidate, so their numbers cannot be compared")
    return right


def _print_embedding(opened: _Opened, tokens: list[int], as_json: bool) -> None:
    opened.session.reset()
    hidden = opened.session.step(tokens)
    vector = encoders.embedding(hidden)
    if as_json:
        print_json({"prompt": tokens, "embedding": vector.tolist(), **opened.facts})
        return
    first = ", ".join(f"{value:.4f}" for value in vector[:8].tolist())
    print_line(f"an encoder: {len(tokens)} tokens, {hidden.shape[1]} channels")
    print_line(f"embedding (mean of hidden states, of length {float(hidden.mean(0).norm()):.4f}, made 1): {first}, ...")


@dataclass(frozen=True)
class _Opened:
    """A session of an artifact or a model, its tokenizer, its ending tokens, and what stands in for its runtime."""

    session: Session
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    stand_in: str | None = None

    @property
    def facts(self) -> dict[str, str]:
        """What machines are told of the runtime: nothing, unless another stands in for it."""
        return {} if self.stand_in is None else {"stand_in": self.stand_in}


def _open(name: str) -> _Opened:
    """An artifact in its own runtime, or in what stands in for it, which is said; or a model in torch."""
    folder = Path(name)
    if (folder / artifacts.NAME).is_file():
        made = artifacts.load(folder)
        artifacts.verify_files(folder, made)
        target = plugins.target(made.target)
        session = target.session(folder)
        if target.stand_in is not None:
            print_note(f"{made.target} is {words_of_stand_in(target.stand_in)}")
        files = {path.name: path.read_bytes() for path in folder.glob("tokenizer*.json")}
        tokenizer = Tokenizer(files, made.model.bos, made.model.vocab)
        return _Opened(session, tokenizer, tuple(made.model.eos), target.stand_in)
    note_generic(name)
    model = pipeline.load(name)
    return _Opened(TorchSession(model), pipeline.tokenizer_of(model), model.architecture.eos)


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
