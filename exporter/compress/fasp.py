"""FASP: whole channels are pruned, and those that stay are restored by least squares.

Removing column j of a later matrix makes row j of the earlier one useless: `down[:, j]` with `gate[j]` and `up[j]`,
`o[:, j]` with `v[j]`. Queries and keys are left whole, so the other matrices are pruned a little more.

Source: FASP, arXiv:2501.09412. Differs, or decides what it leaves open: value channels are chosen in groups that share
a key-value head, the same number per head, so that attention stays one operation; kept widths are multiples; the
least squares are pulled towards the unpruned columns (see `maths.channels.restored`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from exporter import adapters
from exporter.calibrate import Calibration, Samples, Unchanged
from exporter.compress.step import Journal, StepConfig, layer_sites, plain, resized, with_rows
from exporter.compress.walk import walk
from exporter.errors import RecipeError
from exporter.maths.channels import column_scores, restored, strongest
from exporter.maths.groups import kept_width
from exporter.model import Layer, Model
from exporter.weights import Dense

QUARTER = 4  # a value head is never rounded more coarsely than to quarters of it


class FaspConfig(StepConfig):
    """Prune channels of values and MLPs.

    `sparsity` is the fraction of the decoder layers' weights to remove, queries and keys counted in. Kept widths are
    rounded to `multiple`; value heads to the largest divisor of it that is at most a quarter of the head.
    `scores`: `wanda` weighs channels by the norm of their inputs, `magnitude` does not, `random` (from `seed`) is the
    control. `restore` refits what stays, with `ridge` times the mean squared input as its pull towards the old weights.
    `target`: the outputs to reach are those for the `same` inputs, which come from pruned layers, or those of the
    `dense` model.
    """

    kind: Literal["fasp"] = "fasp"
    version: Literal[1] = 1
    sparsity: Annotated[float, Field(ge=0, le=0.9)]
    multiple: Annotated[int, Field(ge=1, le=1024)] = 8
    scores: Literal["wanda", "magnitude", "random"] = "wanda"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    restore: bool = True
    ridge: Annotated[float, Field(ge=0, le=100)] = 1e-2
    target: Literal["same", "dense"] = "same"


def needs_calibration(config: FaspConfig) -> bool:
    """Whether scores or restoration read activations."""
    return config.sparsity > 0 and (config.scores == "wanda" or config.restore)


def run(model: Model, config: FaspConfig, samples: Samples | None, journal: Journal) -> Model:
    """Prune layer after layer: attention first, then the MLP with what the restored attention gives it."""
    widths, samples = pruned_widths(model, config), _wanted(config, samples)
    dense = _dense(model, samples, journal.device) if samples is not None and config.target == "dense" else None

    def block(model: Model, index: int, calibration: Calibration | None) -> Model:
        road = _Road(config, calibration, dense)
        model = _prune_values(model, index, widths[index].value_dim, road)
        return _prune_mlp(model, index, widths[index].mlp, road)

    return walk(model, samples, block, journal).with_step(config.model_dump(mode="json"))


def predict(model: Model, config: FaspConfig) -> Model:
    """The shapes that `run` will give."""
    before, widths = model.architecture.layers, pruned_widths(model, config)
    for index, layer in enumerate(widths):
        if layer.value_dim != before[index].value_dim:
            model = _bias_moved_in_shape(model, index)
        model = model.with_layer(index, layer)
    return resized(model).with_step(config.model_dump(mode="json"))


def multiplier(model: Model) -> float:
    """How much more to prune of the prunable matrices, so that the whole reaches the sparsity without q and k."""
    whole = skipped = 0
    for index in range(len(model.architecture.layers)):
        q, k, *others = (model.weights[site].shape for site in layer_sites(model, index))
        skipped += q[0] * q[1] + k[0] * k[1]
        whole += sum(out * width for out, width in others)
    return (whole + skipped) / whole


def pruned_widths(model: Model, config: FaspConfig) -> tuple[Layer, ...]:
    """Widths of every layer after pruning.

    Raises:
        RecipeError: the matrices that may be pruned do not hold that much, or are not dense any more.
    """
    more = multiplier(model)
    share = config.sparsity * more
    if share >= 1:
        raise RecipeError(
            f"fasp: sparsity {config.sparsity:g} is more than values and MLPs hold; give less than {1 / more:.3f}"
        )
    layers = model.architecture.layers
    for index in range(len(layers) if share else 0):
        for site in layer_sites(model, index)[2:]:
            _values(model, site)
    return tuple(_pruned_layer(layer, share, config.multiple) for layer in layers)


def value_multiple(value_dim: int, multiple: int) -> int:
    """The largest divisor of `multiple` that is at most a quarter of a value head, at least 1."""
    return max((d for d in range(1, value_dim // QUARTER + 1) if multiple % d == 0), default=1)


def value_channels(scores: Tensor, layer: Layer, keep: int) -> tuple[Tensor, Tensor]:
    """Choose the value channels that stay, the same number in each key-value head.

    One row of v feeds a column of o in each query head of its group, so these columns are kept or pruned together.

    Args:
        scores: [heads * value_dim], of the columns of o.
        layer: Widths before pruning.
        keep: Channels per head that stay.

    Returns:
        Rows of v [kv_heads * keep] and columns of o [heads * keep], rising.
    """
    group = layer.heads // layer.kv_heads
    per_channel = scores.reshape(layer.kv_heads, group, layer.value_dim).sum(1)
    kept = strongest(per_channel, keep)  # [kv_heads, keep]
    heads = torch.arange(layer.heads, device=kept.device)[:, None]
    rows = heads[: layer.kv_heads] * layer.value_dim + kept
    columns = heads * layer.value_dim + kept.repeat_interleave(group, dim=0)
    return rows.flatten(), columns.flatten()


def _pruned_layer(layer: Layer, share: float, multiple: int) -> Layer:
    value_dim = kept_width(layer.value_dim, share, value_multiple(layer.value_dim, multiple))
    return replace(layer, value_dim=value_dim, mlp=kept_width(layer.mlp, share, multiple))


def _wanted(config: FaspConfig, samples: Samples | None) -> Samples | None:
    if not needs_calibration(config):
        return None
    if samples is None:
        raise RecipeError("fasp: scores and restoration want calibration text; give it, or magnitude without restore")
    return samples


def _dense(model: Model, samples: Samples, device: str) -> Unchanged:
    """The unpruned model's own activations, layer by layer beside those of the pruned one."""
    for index in range(len(model.architecture.layers)):
        model = _bias_moved(model, index)  # as in the pruned model, so that both give `o` the same thing to do
    return Unchanged(model, samples, device)


@dataclass(frozen=True)
class _Road:
    """What pruning a layer needs besides the model."""

    config: FaspConfig
    calibration: Calibration | None
    dense: Unchanged | None

    def heard(self, model: Model, index: int, site: str) -> tuple[Tensor | None, Tensor | None]:
        """Gram matrix of an input, which is held, and its products with the dense model's; None where not wanted."""
        if self.calibration is None:
            return None, None
        gram = self.calibration.gram(model, index, [site], hold=True)[site]
        if self.dense is None:
            return gram, None
        self.dense.gram(index, [site], hold=True)
        return gram, self.calibration.cross(self.dense.calibration, site)

    def narrow(self, site: str, columns: Tensor) -> None:
        """Tell the calibration which inputs stay."""
        if self.calibration is not None:
            self.calibration.narrow(site, columns)


def _prune_values(model: Model, index: int, keep: int, road: _Road) -> Model:
    layer = model.architecture.layers[index]
    if keep == layer.value_dim:
        return model
    sites = adapters.find(model.architecture.family).attention_sites(index)
    model = _bias_moved(model, index)
    gram, cross = road.heard(model, index, sites.o)
    rows, columns = value_channels(_scores(model, sites.o, gram, road.config), layer, keep)
    road.narrow(sites.o, columns)
    model = with_rows(model, sites.v, rows, _values(model, sites.v))
    model = _with_columns(model, sites.o, columns, gram, cross, road.config)
    return model.with_layer(index, replace(layer, value_dim=keep))


def _prune_mlp(model: Model, index: int, keep: int, road: _Road) -> Model:
    layer = model.architecture.layers[index]
    if keep == layer.mlp:
        return model
    sites = adapters.find(model.architecture.family).mlp_sites(index)
    gram, cross = road.heard(model, index, sites.down)
    kept = strongest(_scores(model, sites.down, gram, road.config), keep)
    road.narrow(sites.down, kept)
    for site in (sites.up,) if sites.gate is None else (sites.gate, sites.up):
        model = with_rows(model, site, kept, _values(model, site))
    model = _with_columns(model, sites.down, kept, gram, cross, road.config)
    return model.with_layer(index, replace(layer, mlp=keep))


def _scores(model: Model, site: str, gram: Tensor | None, config: FaspConfig) -> Tensor:
    values = _values(model, site)
    if config.scores == "random":
        seed = int.from_bytes(hashlib.sha256(f"{config.seed} {site}".encode()).digest()[:8], "big") >> 1
        return torch.rand(values.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return column_scores(values, gram if config.scores == "wanda" else None)


def _with_columns(
    model: Model, site: str, columns: Tensor, gram: Tensor | None, cross: Tensor | None, config: FaspConfig
) -> Model:
    """The model with only some columns of a matrix, refitted where the config says so."""
    values = _values(model, site)
    if gram is None or not config.restore:
        return model.with_weights({site: Dense(values[:, columns].contiguous())})
    return model.with_weights({site: Dense(restored(values, gram, columns, config.ridge, cross).to(values.dtype))})


def _bias_moved(model: Model, index: int) -> Model:
    """The same model with the bias of v in the bias of o: attention weights sum to 1, so it passes unchanged.

    Pruned channels then take no bias with them.
    """
    sites = adapters.find(model.architecture.family).attention_sites(index)
    v_bias, o_bias = f"{sites.v}.bias", f"{sites.o}.bias"
    if v_bias not in model.tensors:
        return model
    layer, given = model.architecture.layers[index], model.tensors[v_bias]
    heads = given.double().reshape(layer.kv_heads, 1, -1).expand(-1, layer.heads // layer.kv_heads, -1)
    moved = _values(model, sites.o).double() @ heads.flatten()  # [hidden]
    moved = moved + model.tensors[o_bias].double() if o_bias in model.tensors else moved
    return _without(model, v_bias).with_tensors({o_bias: moved.to(given.dtype)})


def _bias_moved_in_shape(model: Model, index: int) -> Model:
    """What `_bias_moved` does to the names and lengths of tensors."""
    sites = adapters.find(model.architecture.family).attention_sites(index)
    v_bias = f"{sites.v}.bias"
    if v_bias not in model.tensors:
        return model
    moved = torch.empty(model.architecture.hidden, device="meta", dtype=model.tensors[v_bias].dtype)
    return _without(model, v_bias).with_tensors({f"{sites.o}.bias": moved})


def _without(model: Model, name: str) -> Model:
    return replace(model, tensors={key: tensor for key, tensor in model.tensors.items() if key != name})


def _values(model: Model, site: str) -> Tensor:
    return plain(site, model.weights[site], "fasp prunes plain matrices: put it before other steps")
