"""Every operation by MIL's name, grouped as Apple's reference groups them: one file a group.

A function takes its parameters by MIL's names. A tensor is float32, int32 or bool (see `values.py`); a parameter that
the program may leave out has a default here; what the declared type is, the caller knows and rounds to. A function that
can give more than it takes calls `require_room` first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from targets.coreml_ios.executor.ops import (
    activation,
    classify,
    control_flow,
    conv,
    elementwise_binary,
    elementwise_unary,
    image_resizing,
    image_sampling,
    linear,
    normalization,
    pool,
    quantization,
    random,
    recurrent,
    reduction,
    scatter_gather,
    tensor_operation,
    tensor_transformation,
    transformers,
)

GROUPS = (
    activation,
    classify,
    control_flow,
    conv,
    elementwise_binary,
    elementwise_unary,
    image_resizing,
    image_sampling,
    linear,
    normalization,
    pool,
    quantization,
    random,
    recurrent,
    reduction,
    scatter_gather,
    tensor_operation,
    tensor_transformation,
    transformers,
)
OPERATIONS: dict[str, Callable[..., Any]] = {
    name: function for group in GROUPS for name, function in group.OPERATIONS.items()
}
