"""Coremltools' own `MLModel` predicts on this machine, where the plug-in is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = """
import coremltools as ct, numpy as np, pytest
from coremltools.converters.mil.mil import Builder as mb, types

def converted():
    @mb.program(input_specs=[mb.TensorSpec((2,), dtype=types.fp16), mb.StateTensorSpec((2,), dtype=types.fp16)],
                opset_version=ct.target.iOS18)
    def program(x, kept):
        return mb.coreml_update_state(state=kept, value=mb.add(x=x, y=mb.read_state(input=kept)), name="y")
    return ct.convert(program, minimum_deployment_target=ct.target.iOS18)

def test_states():
    model = converted()
    state = model.make_state()
    for wanted in ([1, 2], [2, 4]):
        assert model.predict({"x": np.float16([1, 2])}, state)["y"].tolist() == wanted
    assert state.read_state("kept").tolist() == [2, 4]

def test_wrong_input():
    model = converted()
    with pytest.raises(RuntimeError, match="Unable to compute the prediction"):
        model.predict({"x": np.float16([1, 2, 3])}, model.make_state())

def test_compute_plan():
    ct.models.compute_plan.MLComputePlan.load_from_path(converted().get_compiled_model_path())

async def test_coroutine():
    assert converted() is not None
"""


def test_it_predicts_refuses_and_skips_by_name(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    root = Path(__file__).resolve().parents[4]
    command = [sys.executable, "-m", "pytest", "-rs", "-c", "/dev/null", f"--rootdir={tmp_path}", "-p",
               "targets.coreml_ios.executor.pytest_plugin", str(tmp_path / "test_it.py")]  # fmt: skip
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert "3 passed, 1 skipped" in ran.stdout, ran.stdout + ran.stderr
    assert "Core ML is the reference executor on Linux, not Apple's runtime" in ran.stdout
    assert "a compiled model: needs macOS" in ran.stdout
