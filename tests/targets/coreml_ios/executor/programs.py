"""Small programs, as coremltools writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from targets.coreml_ios.backend import ct, mb, quiet
from targets.coreml_ios.executor import ReferenceModel


def converted(function: Callable[..., Any], specs: Iterable[Any], opset: int = 18, **given: Any) -> Any:
    """An `MLModel`, whose package lies on disk while it lives; in float32, where `given` does not say otherwise."""
    target = getattr(ct.target, f"iOS{opset}")
    with quiet():
        program = mb.program(input_specs=list(specs), opset_version=target)(function)
        return ct.convert(program, minimum_deployment_target=target, skip_model_load=True,
                          **{"compute_precision": ct.precision.FLOAT32, **given})  # fmt: skip


def runnable(function: Callable[..., Any], specs: Iterable[Any], opset: int = 18, **given: Any) -> ReferenceModel:
    """The program, ready to predict."""
    return ReferenceModel(converted(function, specs, opset, **given).package_path)
