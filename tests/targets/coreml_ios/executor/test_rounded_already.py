"""Operations that only pass values on are not rounded again, but where the program declares another type."""

from __future__ import annotations

import numpy as np
import pytest

from targets.coreml_ios.backend import mb
from targets.coreml_ios.executor import ReferenceModel
from targets.coreml_ios.reader import block_of
from tests.targets.coreml_ios.executor.programs import converted

NEAR_ONE = 1 + 2.0**-12  # float16 rounds it to 1


@pytest.fixture(scope="module")
def specification() -> object:
    """x * 2, then another shape; all in float32."""

    def program(x: object) -> object:
        return mb.reshape(x=mb.mul(x=x, y=np.float32(2)), shape=[4], name="y")

    return converted(program, [mb.TensorSpec((2, 2))]).get_spec()


@pytest.mark.parametrize(("kinds", "says"), [((11, 11), NEAR_ONE), ((11, 10), 1), ((10, 10), 1), ((10, 11), 1)])
def test_what_is_passed_on_has_the_type_that_is_declared(
    kinds: tuple[int, int], says: float, specification: object
) -> None:
    for operation in block_of(specification).operations:
        for output in operation.outputs:
            if operation.type in ("mul", "reshape"):
                output.type.tensorType.dataType = kinds[operation.type == "reshape"]

    found = ReferenceModel.of(specification, None).predict({"x": np.full((2, 2), NEAR_ONE / 2, np.float32)})

    assert found["y"].tolist() == [says] * 4
