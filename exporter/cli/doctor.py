"""`pocket doctor` and `pocket targets`: what is installed here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from exporter import plugins
from exporter.cli.screen import print_json, print_line, print_table

CORE = ("pocket-exporter", "torch", "safetensors", "tokenizers", "pydantic")
EXTRAS = {  # extra -> distributions that it brings, what it enables
    "onnxruntime": (("onnx", "onnx-ir", "onnxruntime"), "target onnxruntime-mobile"),
    "executorch": (("executorch", "torchao"), "target executorch-android"),
    "coreml": (("coremltools",), "target coreml-ios"),
    "generic": (("transformers",), "models that no adapter knows, run by transformers"),
    "lm-eval": (("lm-eval",), "tasks of lm-evaluation-harness over a session (exporter.harness)"),
    "pictures": (("pillow",), "pictures that a multimodal model is shown"),
}


def targets(as_json: bool) -> None:
    """List targets and whether their back ends are here."""
    rows = [(name, _state(name.split("-")[0])) for name in plugins.target_names()]
    if as_json:
        print_json([{"target": name, "back_end": state} for name, state in rows])
    else:
        print_table("Targets", ("target", "back end"), rows)


def doctor(as_json: bool) -> None:
    """Print versions, and what each missing extra would enable."""
    core = {name: _version(name) or "missing" for name in CORE}
    extras = {extra: {"state": _state(extra), "enables": enables} for extra, (_, enables) in EXTRAS.items()}
    if as_json:
        print_json(
            {"python": platform.python_version(), "machine": platform.platform(), "core": core, "extras": extras}
        )
        return
    print_line(f"python {platform.python_version()} on {platform.platform()}")
    print_table("Core", ("package", "version"), list(core.items()))
    print_line()
    rows = [(extra, facts["state"], facts["enables"]) for extra, facts in extras.items()]
    print_table("Extras", ("extra", "state", "enables"), rows)


def _state(extra: str) -> str:
    distributions = EXTRAS.get(extra, ((), ""))[0]
    found = {name: _version(name) for name in distributions}
    missing = [name for name, number in found.items() if number is None]
    if missing:
        return f"missing {', '.join(missing)}: pip install 'pocket-exporter[{extra}]'"
    return ", ".join(f"{name} {number}" for name, number in found.items()) or "installed by another distribution"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
