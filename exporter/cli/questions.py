"""`pocket evaluate --questions`: how many questions about pictures a model answers right."""

from __future__ import annotations

from pathlib import Path

from exporter import artifact as artifacts
from exporter import pipeline
from exporter import questions as asking
from exporter.cli.screen import print_json, print_line, watch
from exporter.errors import PocketError


def evaluate(name: str, path: Path, as_json: bool) -> None:
    """Print the share of questions that a model answers right, in torch.

    Raises:
        PocketError: an artifact, which is shown no pictures, a model that sees none, or questions that cannot be read.
    """
    if (Path(name) / artifacts.NAME).is_file():
        raise PocketError(f"{name} is an artifact, which sees no pictures; give the model that it was lowered from")
    model = pipeline.load(name)
    questions = asking.read(path, model)
    with watch(["evaluate"]) as shown, shown.stage("evaluate") as report:
        found = asking.accuracy(model, questions, report)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    print_line(f"right answers {found.accuracy:.2%} ({found.right:,} of {found.questions:,})")
    for kind, share in found.kinds.items():
        print_line(f"  {kind}: {share.right} of {share.questions}")
