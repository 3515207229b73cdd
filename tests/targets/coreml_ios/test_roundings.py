"""The budget's count of roundings is that of the longest way through the program that is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from targets.coreml_ios import roundings
from targets.coreml_ios.reader import Package
from tests.models import LLAMA, random_model
from tests.targets.coreml_ios.conftest import CONTEXT, Lowered, lower

Get = Callable[[str], Lowered]
HALF = 10  # MIL's number of float16
PRODUCTS = {"linear", "matmul", "mul", "layer_norm"}  # of which a constant's own rounding comes on top
EXACT = {"abs", "concat", "expand_dims", "gather", "identity", "maximum", "pad", "read_state", "reduce_max", "relu",
         "reshape", "slice_by_index", "slice_update", "squeeze", "tile", "transpose"}  # fmt: skip


def longest_way(package: Package) -> int:
    """Roundings on the longest way through the float16 values of a program, by its operations alone."""
    ways: dict[str, int] = {}
    constants: set[str] = set()
    for operation in package.block.operations:
        read = [binding.name for argument in operation.inputs.values() for binding in argument.arguments]
        way = max((ways[name] for name in read if name in ways), default=0) + (operation.type not in EXACT)
        if operation.type == "const" or operation.type.startswith("constexpr"):
            way = 1
            constants |= {output.name for output in operation.outputs}
        elif operation.type == "gather" and not constants.isdisjoint(read):  # rows of a constant are constants
            constants.add(operation.outputs[0].name)
        elif operation.type in PRODUCTS and not constants.isdisjoint(read):
            way += 1
        ways |= {made.name: way for made in operation.outputs if made.type.tensorType.dataType == HALF}
    return ways[operation.outputs[0].name]


@pytest.mark.parametrize("name", ["unequal", "unequal in 4 bits", "forest", "opt", "bert"])
def test_the_count_is_that_of_the_program(name: str, lowered: Get) -> None:
    made = lowered(name)
    assert roundings.count(made.model.with_weights(made.plan.weights)) == longest_way(Package(made.package))


def test_norms_of_heads_count_too(tmp_path: Path) -> None:
    made = lower(random_model(replace(LLAMA, positions=CONTEXT), optional=("bias", "norm.weight")), tmp_path)
    assert roundings.count(made.model) == longest_way(Package(made.package))
