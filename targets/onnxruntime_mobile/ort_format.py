"""An exported folder in ONNX Runtime's own format, one model.ort, for runtimes that are built without ONNX.

    python -m targets.onnxruntime_mobile.ort_format out/onnxruntime-mobile model.ort

It is made from an artifact, and is none itself: ONNX Runtime writes its tables in another order each time, so that two
conversions are not the same bytes. It holds the weights again, a tied low-bit embedding twice.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch

from exporter import artifact as artifacts
from exporter.artifact import Golden
from exporter.errors import CheckFailedError, OutputError, PocketError
from exporter.plugins import Session
from targets.onnxruntime_mobile.constants import MODEL
from targets.onnxruntime_mobile.runner import PROVIDERS, open_session


def convert(folder: Path, file: Path) -> None:
    """Write an artifact's model as one .ort file; it gets its name only when its golden answers are right.

    Only optimizations that hold on every processor are made.

    Args:
        folder: An artifact of `onnxruntime-mobile`.
        file: The .ort file; must not exist.

    Raises:
        ArtifactError: the folder is no artifact, or is damaged.
        CheckFailedError: the file's logits are not the golden ones.
        OutputError: the file exists already, or its folder does not.
    """
    artifact = artifacts.load(folder)
    artifacts.verify_files(folder, artifact)
    if file.exists() or not file.parent.is_dir():
        raise OutputError(f"{file} exists already, or its folder does not; give a new file in a folder that exists")
    with tempfile.TemporaryDirectory(dir=file.parent) as place:
        fresh = Path(place) / "model.ort"
        _write(folder / MODEL, fresh)
        _require_golden(open_session(fresh), artifact.golden)
        fresh.rename(file)


def _write(model: Path, file: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.optimized_model_filepath = str(file)
    onnxruntime.InferenceSession(model, options, providers=PROVIDERS)


def _require_golden(session: Session, golden: Golden) -> None:
    """Feed the golden text token by token, an encoder's at once, and compare the largest numbers at every step."""
    pieces = [golden.prompt, *([token] for token in golden.tokens[:-1])]
    rows = [session.step(piece)[-1] for piece in pieces] if session.causal else list(session.step(golden.prompt))
    for step, (row, ids, expected) in enumerate(zip(rows, golden.top, golden.logits)):
        error = float((row[ids].double() - torch.tensor(expected, dtype=torch.float64)).abs().max())
        if not error <= golden.tolerance:
            raise CheckFailedError(f"step {step}: a logit is {error:.3g} from golden; at most {golden.tolerance:.3g}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m targets.onnxruntime_mobile.ort_format", description=convert.__doc__
    )
    parser.add_argument("folder", type=Path, help="an artifact: out/onnxruntime-mobile")
    parser.add_argument("file", type=Path, help="the .ort file to write")
    words = parser.parse_args()
    try:
        convert(words.folder, words.file)
    except PocketError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
