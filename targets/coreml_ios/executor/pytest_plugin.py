"""Points coremltools' own tests at the reference executor: `pytest -p targets.coreml_ios.executor.pytest_plugin ...`.

Off macOS coremltools' tests stop before they predict, for want of one compiled module. This plug-in says that the
machine is a Mac with macOS 15, and puts in the place of that module's class, through which `MLModel` reaches Core ML,
one that asks the executor. It changes nothing else: the tests, what they compare, and `MLModel` are those of the wheel.
What is no ML program, and what has no meaning without Apple's compiler, is skipped by name.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools as ct
    import coremltools._deps
    import coremltools.models._compiled_model
    import coremltools.models.compute_device
    import coremltools.models.compute_plan
    import coremltools.models.model
    import coremltools.models.utils

from exporter.errors import PocketError
from targets.coreml_ios.executor.model import NOTE, ReferenceModel, ReferenceState

MACOS = (15, 0)
MODULE = "coremltools.libcoremlpython"


def _needs_macos(what: str) -> Callable[..., NoReturn]:
    def skip(*_: Any) -> NoReturn:
        pytest.skip(f"{what}: needs macOS")

    return skip


class Proxy:
    """What coremltools' `_MLModelProxy` is on macOS: a model that Core ML has loaded.

    Args:
        path: An `.mlpackage` or `.mlmodel`.
        compute_units: Taken and left: there is the CPU.
        function_name: Of a package with several functions, or empty.
        optimization_hints: Taken and left.
        asset: Of a compiled model.

    Raises:
        RuntimeError: the executor cannot load it; `MLModel` keeps this for `predict`.
    """

    def __init__(
        self, path: str, compute_units: str, function_name: str, optimization_hints: Mapping[str, str], asset: Any
    ) -> None:
        if asset is not None or path.rstrip("/").endswith(".mlmodelc"):
            _needs_macos("a compiled model")()
        self._model: ReferenceModel | None = None
        self._kind = None
        if Path(path).is_dir():
            self._kind = ct.utils.load_spec(path).WhichOneof("Type")
        if self._kind == "mlProgram":
            self._model = _translated(ReferenceModel, path, function_name or None)

    def predict(self, data: Mapping[str, Any], state: ReferenceState | None = None) -> Any:
        """Outputs by name."""
        return _translated(self._reference().predict, data, state)

    def batchPredict(self, data: Sequence[Mapping[str, Any]]) -> Any:  # noqa: N802 (coremltools calls it that)
        """Outputs by name, of each."""
        return _translated(self._reference().predict, data)

    def newState(self) -> ReferenceState:  # noqa: N802
        """States, all zero."""
        made: ReferenceState = _translated(self._reference().make_state)
        return made

    def _reference(self) -> ReferenceModel:
        if self._model is None:
            pytest.skip(f"a model of type {self._kind or 'other than ML program'}: the executor runs ML programs only")
        return self._model

    maximum_supported_specification_version = staticmethod(lambda: ct._SPECIFICATION_VERSION_IOS_26)
    get_compiled_model_path = _needs_macos("a compiled model")
    compileModel = staticmethod(_needs_macos("a compiled model"))  # noqa: N815
    create_model_asset_from_path = staticmethod(_needs_macos("a compiled model"))
    create_model_asset_from_memory = staticmethod(_needs_macos("a compiled model"))
    get_load_duration_in_nano_seconds = _needs_macos("Core ML's time to load")
    get_last_predict_duration_in_nano_seconds = _needs_macos("Core ML's time to predict")
    get_model_structure = staticmethod(_needs_macos("a compiled model"))
    get_compute_plan = staticmethod(_needs_macos("a compute plan"))
    get_all_compute_devices = staticmethod(_needs_macos("compute devices"))
    get_available_compute_devices = staticmethod(_needs_macos("compute devices"))


def pytest_configure(config: pytest.Config) -> None:
    """Pretend, before any test module is imported."""
    models = coremltools.models
    for module in (models.utils, models.model, models._compiled_model):
        module._is_macos = lambda: True
        module._macos_version = lambda: MACOS
    coremltools._deps._IS_MACOS = True
    for module in (models.model, models._compiled_model, models.compute_plan, models.compute_device):
        module._MLModelProxy = Proxy
    ct.libcoremlpython = sys.modules[MODULE] = ModuleType(MODULE)
    ct.libcoremlpython._MLModelProxy = Proxy
    logging.getLogger("coremltools").setLevel(logging.NOTSET)  # some tests read its warnings, which `backend` silences


def pytest_report_header(config: pytest.Config) -> str:
    """What runs the programs, at the top of a report."""
    return f"coremltools {ct.__version__}: Core ML is the {NOTE}"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine to its end, where no other plug-in does."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True


def _translated(function: Callable[..., Any], *args: Any) -> Any:
    """The executor's errors as those that Core ML's errors become in Python."""
    try:
        return function(*args)
    except PocketError as error:
        raise RuntimeError(f"Unable to compute the prediction using ML Program: {error}") from error
