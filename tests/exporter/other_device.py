"""Methods on a device that stands in for a GPU: it computes as the CPU does, and refuses to mix the two.

Run by test_devices.py, in a process of its own: torch does not forget a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from exporter.calibrate import Calibration, Samples
from exporter.compress import run
from exporter.compress.fasp import FaspConfig
from exporter.compress.pbs2p import Pbs2pConfig
from exporter.compress.quantize import QuantizeConfig
from exporter.compress.step import UNKEPT, StepConfig, Unkept
from exporter.model import Architecture, Model
from exporter.weights import Dense
from tests.models import LLAMA, OPT, random_model

NAME = "elsewhere"
ATTENTION = "re:.*(v_proj|out_proj)"  # enough, and quick
ACROSS = ("aten::copy_", "aten::_to_copy", "aten::to")  # what may have operands on both sides


backend_registration._setup_privateuseone_for_python_backend(NAME)


class Elsewhere(Tensor):
    """A tensor that says it lies on the other device, around one that lies on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.inner = inner
        return made

    inner: Tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """While it is on, tensors can be made on the other device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


@torch.inference_mode(False)  # so that all tensors are of one kind: what is changed may have been made anywhere
@torch.no_grad()
def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU, and put its results where the operator would."""
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    named = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    refuse_to_mix(func, operands)
    inner = tree_map(lambda leaf: leaf.inner if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
    inner = tree_map(lambda leaf: torch.device("cpu") if leaf in named and leaf.type == NAME else leaf, inner)
    found = func(*inner[0], **inner[1])
    is_elsewhere = named[0].type == NAME if named else any(isinstance(operand, Elsewhere) for operand in operands)
    if func._schema.name == "aten::copy_":
        return args[0]
    if not is_elsewhere:
        return found
    wrapped = tree_map(lambda leaf: Elsewhere(leaf) if isinstance(leaf, Tensor) else leaf, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if operands and not named else wrapped


def refuse_to_mix(func: Any, operands: list[Tensor]) -> None:
    """As a GPU does: only numbers, and indices into what lies there, may come from the CPU."""
    if func._schema.name in ACROSS:
        return
    here = [operand for operand in operands if not isinstance(operand, Elsewhere) and operand.ndim]
    there = [operand for operand in operands if isinstance(operand, Elsewhere)]
    is_index = func._schema.name == "aten::index" and isinstance(operands[0], Elsewhere)
    if here and there and not is_index:
        raise AssertionError(f"{func} mixes two devices: {[tuple(operand.shape) for operand in operands]}")


@pytest.fixture
def other_device() -> Iterator[None]:
    with OtherDevice():
        yield


def text(model: Model) -> Tensor:
    return torch.randint(0, model.architecture.vocab, (5, 24), generator=torch.Generator().manual_seed(3))


def values(model: Model, site: str) -> Tensor:
    weight = model.weights[site]
    return weight.values if isinstance(weight, Dense) else weight.dense()


def test_the_stand_in_refuses_to_mix(other_device: None) -> None:
    there, here = torch.ones(3, device=NAME), torch.ones(3)
    assert (there + there).device.type == NAME
    assert (there.to("cpu") + here).tolist() == [2, 2, 2]
    assert there[torch.tensor([0, 2])].cpu().tolist() == [1, 1]
    with pytest.raises(AssertionError, match="mixes two devices"):
        there + here
    with pytest.raises(AssertionError, match="mixes two devices"):
        here[torch.zeros(1, dtype=torch.int64, device=NAME)]


def test_activations_and_grams_lie_where_the_work_is_done(other_device: None) -> None:
    model = random_model(OPT)
    calibration = Calibration(model, Samples(text(model)), device=NAME)
    site = "model.decoder.layers.0.fc2"
    gram = calibration.gram(model, 0, [site])[site]
    assert gram.device.type == calibration.activations[0].device.type == NAME
    assert torch.equal(gram.cpu(), Calibration(model, Samples(text(model))).gram(model, 0, [site])[site])


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        (LLAMA, FaspConfig(sparsity=0.3)),
        (OPT, FaspConfig(sparsity=0.3, target="dense")),
        (OPT, QuantizeConfig(bits=4, targets=(ATTENTION,))),
        (OPT, QuantizeConfig(bits=4, sparsity="2:4", targets=(ATTENTION,))),
        (OPT, Pbs2pConfig(targets=(ATTENTION,))),
    ],
    ids=lambda value: value.family if isinstance(value, Architecture) else value.kind,
)
def test_a_method_gives_the_same_model_on_another_device(architecture: Architecture, config: StepConfig) -> None:
    model = random_model(architecture)
    expected = run(model, config, Samples(text(model)), UNKEPT)
    with OtherDevice():
        found = run(model, config, Samples(text(model)), Unkept(device=NAME))
    assert found.architecture == expected.architecture
    for site in expected.weights:
        assert values(found, site).device.type == "cpu"
        assert torch.equal(values(found, site), values(expected, site)), site
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)
