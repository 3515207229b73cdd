"""What a compression method is: a module with a config and three functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from exporter import adapters
from exporter.adapters import generic
from exporter.calibrate import Samples
from exporter.errors import RecipeError
from exporter.model import Model
from exporter.weights import Dense, Weight, describe


class StepConfig(BaseModel):
    """One step of a recipe: frozen, unknown keys refused. A method adds `kind`, `version` and its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Journal(Protocol):
    """Where a step says how far it is, and keeps what it has finished.

    Attributes:
        device: Where the work is done: `cpu` or `cuda`.
        scratch: A folder that outlives a kill and is gone when the step is done, or None.
    """

    device: str
    scratch: Path | None

    def report(self, fraction: float) -> None:
        """Say how much of the step is done."""

    def resume(self, model: Model) -> tuple[Model, int, Sequence[Tensor]]:
        """The model with the layers that an earlier run finished, their number, and the activations behind them."""

    def keep(self, before: Model, after: Model, layer: int, activations: Sequence[Tensor]) -> Model:
        """Keep what one layer changed, and the activations behind it; returns the same model, maybe out of memory."""


class Unkept:
    """A journal that keeps nothing.

    Args:
        report: Told the fraction done.
        device: Where the work is done.
    """

    def __init__(self, report: Callable[[float], None] = lambda fraction: None, device: str = "cpu") -> None:
        self.report, self.device = report, device
        self.scratch: Path | None = None

    def resume(self, model: Model) -> tuple[Model, int, Sequence[Tensor]]:
        return model, 0, ()

    def keep(self, before: Model, after: Model, layer: int, activations: Sequence[Tensor]) -> Model:
        return after


UNKEPT = Unkept()


class Method(Protocol):
    """A method. Methods are modules; these are their functions. `config` is the method's own StepConfig."""

    def needs_calibration(self, config: Any) -> bool:
        """Whether `run` wants samples."""

    def run(self, model: Model, config: Any, samples: Samples | None, journal: Journal) -> Model:
        """Compress a model.

        Args:
            model: Stays as it is.
            config: What to do.
            samples: Calibration text; None where none is needed.
            journal: Told the fraction done; keeps finished layers.

        Returns:
            The compressed model, with the config as one more step of its provenance.

        Raises:
            RecipeError: the config does not fit the model, or samples are missing.
        """

    def predict(self, model: Model, config: Any) -> Model:
        """The model that `run` would return, its new parts on the meta device; reads no values."""


def layer_sites(model: Model, layer: int) -> tuple[str, ...]:
    """Sites of a decoder layer's matrices, in the order in which a token meets them.

    Raises:
        RecipeError: the model is one that only transformers knows.
    """
    adapter = adapters.find(model.architecture.family)
    attention, mlp = adapter.attention_sites(layer), adapter.mlp_sites(layer)
    gate = () if mlp.gate is None else (mlp.gate,)
    return attention.q, attention.k, attention.v, attention.o, *gate, mlp.up, mlp.down


def matrices(model: Model, layer: int) -> tuple[str, ...]:
    """The same where all matrices are alike to a method: also of the one layer that only transformers knows."""
    is_known = model.architecture.config is None
    return layer_sites(model, layer) if is_known else generic.sites(model.architecture)


def plain(site: str, weight: Weight, advice: str) -> Tensor:
    """The values of a matrix that no step has made another tree of, [out, in].

    Args:
        site: Its name, for the message.
        weight: What it is.
        advice: What the method takes, and what to do.

    Raises:
        RecipeError: it is another tree.
    """
    if not isinstance(weight, Dense):
        raise RecipeError(f"{site} is {describe(weight)}; {advice}")
    return weight.values


def with_rows(model: Model, site: str, rows: Tensor, values: Tensor) -> Model:
    """The model with only some rows of a matrix, whose values these are, and of its bias."""
    name = f"{site}.bias"
    biases = {name: model.tensors[name][rows]} if name in model.tensors else {}
    return model.with_weights({site: Dense(values[rows])}).with_tensors(biases)


def token_tables(model: Model) -> list[str]:
    """Token embedding and, where it is not tied, head."""
    if model.architecture.config is not None:
        return [generic.table(model.architecture)]
    adapter = adapters.find(model.architecture.family)
    return [adapter.EMBEDDING] if model.architecture.tied else [adapter.EMBEDDING, adapter.HEAD]


def resized(model: Model) -> Model:
    """The model in the shapes that its architecture says; what has another shape now becomes empty, on the meta device.

    Args:
        model: Matrices that change their shape are dense.
    """
    shapes = adapters.find(model.architecture.family).shapes(model.architecture)
    lengths = {**shapes.tensors, **shapes.optional}
    weights = {site: Dense(torch.empty(shapes.weights[site], device="meta", dtype=weight.values.dtype))
               for site, weight in model.weights.items()
               if isinstance(weight, Dense) and weight.shape != shapes.weights[site]}  # fmt: skip
    tensors = {name: torch.empty(lengths[name], device="meta", dtype=tensor.dtype)
               for name, tensor in model.tensors.items() if tensor.shape != (lengths[name],)}  # fmt: skip
    return model.with_weights(weights).with_tensors(tensors)
