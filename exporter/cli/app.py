"""Commands and their options. Heavy imports stay inside the commands, so that `--help` is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="pocket",
    help="Compress a transformer once, lower it to every phone runtime, prove and measure each artifact.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelArgument = Annotated[str, typer.Argument(help="A checkpoint folder, a saved model, or 'builtin'.")]
FolderArgument = Annotated[Path, typer.Argument(help="An artifact: out/<target>.")]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", "-r", help="YAML recipe; without it, the model as it is.")
]
TextOption = Annotated[
    Path | None, typer.Option("--calibration", help="Calibrate on this text instead of the recipe's.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
OutOption = Annotated[Path, typer.Option("--output", "-o", help="Output folder; new or empty.")]
TargetsOption = Annotated[list[str] | None, typer.Option("--target", "-t", help="May be repeated; without it, all.")]
DeviceOption = Annotated[str, typer.Option(help="Where compression steps are worked out: cpu or cuda.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan with predicted bytes; write nothing.")]


@app.command()
def compress(
    model: ModelArgument,
    output: OutOption,
    recipe: Annotated[Path, typer.Option("--recipe", "-r", help="YAML recipe.")],
    calibration: TextOption = None,
    device: DeviceOption = "cpu",
    memory_plan: Annotated[
        bool, typer.Option("--memory-plan", help="Print the memory that it will take; write nothing.")
    ] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Compress a model by a recipe and save it."""
    from exporter.cli import export

    export.compress(model, recipe, output, calibration, device, memory_plan, dry_run, json)


@app.command(name="export")
def export_(
    model: ModelArgument,
    output: OutOption,
    target: TargetsOption = None,
    recipe: RecipeOption = None,
    calibration: TextOption = None,
    context: Annotated[int | None, typer.Option(help="Longest context in tokens.")] = None,
    device: DeviceOption = "cpu",
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Compress, lower to every target, and check each artifact."""
    from exporter.cli import export

    export.export(model, recipe, target or [], output, calibration, context, device, dry_run, json)


@app.command()
def check(
    artifact: FolderArgument,
    model: Annotated[Path | None, typer.Option(help="The saved model; by default 'model' beside the artifact.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare an artifact with the model that it was lowered from."""
    from exporter.cli import inspect

    inspect.check(artifact, model, json)


@app.command()
def run(
    artifact: Annotated[str, typer.Argument(help="An artifact, a model folder, or 'builtin'.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from; may be empty.")] = "",
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Tokens to add.")] = 64,
    json: JsonOption = False,
) -> None:
    """Print the greedy text of an artifact in its own runtime, or of a model in torch; of an encoder, an embedding."""
    from exporter.cli import inspect

    inspect.run(artifact, prompt, new_tokens, json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="An artifact, a model folder, or 'builtin'.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file.")] = None,
    questions: Annotated[Path | None, typer.Option(help="JSON lines of questions about pictures, instead.")] = None,
    reference: Annotated[str | None, typer.Option(help="Also say how far it is from this model or artifact.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of tokens.")] = 60,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    seed: Annotated[int, typer.Option(help="Decides where the windows lie; 0 or more.")] = 0,
    json: JsonOption = False,
) -> None:
    """Perplexity on a text, with a reference how far it is from that; or how many questions are answered right."""
    from exporter.cli import inspect
    from exporter.cli import questions as asking

    if (text is None) == (questions is None):
        raise typer.BadParameter("give one of --text and --questions")
    if questions is not None:
        asking.evaluate(model, questions, json)
    elif text is not None:
        inspect.evaluate(model, text, reference, windows, length, seed, json)


@app.command()
def probe(
    artifact: FolderArgument,
    phone: Annotated[str, typer.Option(help="Where to measure.")] = "host",
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=2, help="Tokens to decode.")] = 32,
    repeats: Annotated[int, typer.Option(min=2, help="Timed rounds.")] = 5,
    warmups: Annotated[int, typer.Option(min=0, help="Untimed rounds first.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    json: JsonOption = False,
) -> None:
    """Measure load, prefill, decode and memory, after the outputs proved right."""
    from exporter.cli import ship

    ship.probe(artifact, phone, prompt_tokens, new_tokens, repeats, warmups, threads, json)


@app.command()
def bundle(
    exported: Annotated[Path, typer.Argument(help="The output folder of an export.")],
    output: OutOption,
    json: JsonOption = False,
) -> None:
    """Put all artifacts of an export into one folder that can be verified."""
    from exporter.cli import ship

    ship.bundle(exported, output, json)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A bundle.")],
    json: JsonOption = False,
) -> None:
    """Check every file of a bundle against its manifest; runs nothing."""
    from exporter.cli import ship

    ship.verify(folder, json)


@app.command()
def targets(json: JsonOption = False) -> None:
    """List the installed targets and phones."""
    from exporter.cli import doctor

    doctor.targets(json)


@app.command(name="doctor")
def doctor_(json: JsonOption = False) -> None:
    """Show versions, and what each missing extra would enable."""
    from exporter.cli import doctor

    doctor.doctor(json)
