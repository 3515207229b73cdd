"""An operation twice: as the executor computes it, and as coremltools does when it folds constants."""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Function
from numpy.typing import NDArray
from torch import Tensor

from targets.coreml_ios.backend import mb
from targets.coreml_ios.executor.machine import carried
from targets.coreml_ios.executor.ops import OPERATIONS

Array = NDArray[Any]


def computed(operation: str, **parameters: Any) -> Array:
    """What the executor gives, before it is rounded to a declared type."""
    given = {key: one if isinstance(one, str) else carried(np.array(one)) for key, one in parameters.items()}
    result = OPERATIONS[operation](**given)
    assert isinstance(result, Tensor)
    return result.numpy()


def folded(operation: str, **parameters: Any) -> Array:
    """What coremltools gives for constants; of parameters that are left out, with its defaults."""
    with Function({}), np.errstate(all="ignore"):
        value = getattr(mb, operation)(**parameters).val
    assert value is not None, f"coremltools does not fold {operation}"
    return np.asarray(value)
