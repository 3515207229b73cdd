"""What a compression method is: a module with a config and three functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from exporter import adapters
from exporter.model import Model

Report = Callable[[float], None]  # takes the fraction that is done


class StepConfig(BaseModel):
    """One step of a recipe: frozen, unknown keys refused. A method adds `kind`, `version` and its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Method(Protocol):
    """A method. Methods are modules; these are their functions. `config` is the method's own StepConfig."""

    def needs_calibration(self, config: Any) -> bool:
        """Whether `run` wants windows of text."""

    def run(self, model: Model, config: Any, windows: Tensor | None, report: Report) -> Model:
        """Compress a model.

        Args:
            model: Stays as it is.
            config: What to do.
            windows: Calibration text, [windows, length], token ids; None where none is needed.
            report: Told the fraction done.

        Returns:
            The compressed model, with the config as one more step of its provenance.

        Raises:
            RecipeError: the config does not fit the model, or windows are missing.
        """

    def predict(self, model: Model, config: Any) -> Model:
        """The model that `run` would return, its new parts on the meta device; reads no values."""


def layer_sites(model: Model, layer: int) -> tuple[str, ...]:
    """Sites of a decoder layer's matrices, in the order in which a token meets them."""
    adapter = adapters.find(model.architecture.family)
    attention, mlp = adapter.attention_sites(layer), adapter.mlp_sites(layer)
    gate = () if mlp.gate is None else (mlp.gate,)
    return attention.q, attention.k, attention.v, attention.o, *gate, mlp.up, mlp.down
