"""AdaPruner: heads and MLP channels are pruned by a measure of importance that a Bayesian search finds.

A trial draws a calibration subset and a measure (`maths.taylor.Metric`), prunes by it, and is judged by the loss of
the pruned model, as it is, on text that the subset never touches. The first trial is LLM-Pruner's measure.

Groups: a key-value head with all its query heads (rows of q, k and v, columns of o), and an MLP channel (a row of gate
and up, a column of down). Every pruned layer loses the same share of its weights.

Source: AdaPruner, arXiv:2503.06184, on LLM-Pruner, arXiv:2305.11627. Differs: the paper's search space is not published
in detail; this one is ours. Heads are counted first, then the MLP makes up for their rounding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from exporter import adapters
from exporter.calibrate import Samples, check_windows
from exporter.compress import search
from exporter.compress.search import Point, Trial
from exporter.compress.step import Journal, StepConfig, layer_sites, plain, resized, with_rows
from exporter.errors import RecipeError
from exporter.gradients import Gradients, mean_loss
from exporter.maths.channels import strongest
from exporter.maths.groups import kept_width, rows_of
from exporter.maths.taylor import AGGREGATIONS, GRANULARITIES, Metric, group_scores, row_scores, weight_scores
from exporter.model import Layer, Model
from exporter.weights import Dense

SUBSETS, COUNTS = 64, (5, 10, 20)  # seeds of calibration subsets, and their sizes in windows
Statistics = Mapping[str, tuple[Tensor, Tensor]]  # site -> mean gradient, mean squared gradient

SPACE = search.Space(
    named={
        "subset": tuple(range(SUBSETS)),
        "windows": COUNTS,
        "granularity": GRANULARITIES,
        "aggregation": AGGREGATIONS,
    },
    ranged={"first": (0.0, 1.0), "second": (0.0, 1.0), "weight_power": (0.0, 2.0), "gradient_power": (0.0, 2.0)},
    default={"subset": 0, "windows": 10, "granularity": "fine", "aggregation": "sum",
             "first": 1.0, "second": 0.0, "weight_power": 1.0, "gradient_power": 1.0},
)  # fmt: skip


class AdaPrunerConfig(StepConfig):
    """Prune heads and MLP channels by a searched measure of importance.

    `sparsity` is the fraction of the decoder layers' weights to remove; `skip_first` and `skip_last` layers stay whole
    and the others lose more. MLP widths are rounded to `multiple`. `trials` measures are tried, the first is
    LLM-Pruner's; 1 is LLM-Pruner alone. `sampler` proposes the others, `random` being the control; `seed` is its own.
    `storage` is an Optuna URL (sqlite, postgresql) that several workers may share; null keeps trials beside the job.
    """

    kind: Literal["adapruner"] = "adapruner"
    version: Literal[1] = 1
    sparsity: Annotated[float, Field(ge=0, le=0.9)]
    skip_first: Annotated[int, Field(ge=0, le=4096)] = 0
    skip_last: Annotated[int, Field(ge=0, le=4096)] = 0
    multiple: Annotated[int, Field(ge=1, le=1024)] = 8
    trials: Annotated[int, Field(ge=1, le=100_000)] = 50
    sampler: search.Sampler = "tpe"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    storage: Annotated[str, Field(min_length=1, max_length=4096)] | None = None

    @field_validator("storage")
    @classmethod
    def _is_a_url(cls, storage: str | None) -> str | None:
        """Told when the recipe is read, and without the value, in which a password may stand."""
        if storage is not None and not re.match(r"[a-z]\w*(\+\w+)?://", storage):
            raise ValueError("no Optuna URL; give one such as sqlite:///search.db, or leave storage out")
        return storage


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays of one layer.

    Args:
        heads: Key-value heads, rising indices.
        channels: MLP channels, rising indices.
    """

    heads: Tensor
    channels: Tensor


def needs_calibration(config: AdaPrunerConfig) -> bool:
    """Whether anything is pruned: importance reads gradients."""
    return config.sparsity > 0


def run(model: Model, config: AdaPrunerConfig, samples: Samples | None, journal: Journal) -> Model:
    """Search for the measure, and prune by the best one."""
    widths = pruned_widths(model, config)
    if widths == model.architecture.layers:  # nothing to prune, or so little that no width moves
        return model.with_step(_step(config))
    samples = _required(model, config, samples)
    candidates = Candidates(model, widths, samples, journal.device)
    trials = _tried(candidates, config, _identity(model, config, samples), journal)
    best = search.best(trials)
    if math.isinf(best.loss):
        raise RecipeError("adapruner: no trial left a model with finite logits; give a smaller sparsity")
    return candidates.at(best.point).with_step(_step(config) | {"search": _record(trials, best)})


def predict(model: Model, config: AdaPrunerConfig) -> Model:
    """The shapes that `run` will give."""
    for index, layer in enumerate(pruned_widths(model, config)):
        model = model.with_layer(index, layer)
    return resized(model).with_step(_step(config))


class Candidates:
    """The pruned models that points of the space stand for.

    Args:
        model: Before pruning.
        widths: Of every layer after pruning.
        samples: `ids` give the gradients, `validation` the loss.
        device: Where both are worked out.
    """

    def __init__(self, model: Model, widths: tuple[Layer, ...], samples: Samples, device: str = "cpu") -> None:
        self._model, self._samples, self._device = model, samples, device
        before = model.architecture.layers
        self._changed = {index: layer for index, layer in enumerate(widths) if layer != before[index]}
        sites = [site for index in self._changed for site in layer_sites(model, index)]
        self._gradients = Gradients(model, sites, samples, device=device)

    def loss(self, point: Point) -> float:
        """Of the pruned model, as it is, on the validation windows; in nats a token."""
        assert self._samples.validation is not None
        return mean_loss(self.at(point), self._samples.validation, self._device)

    def at(self, point: Point) -> Model:
        """The model pruned by one measure."""
        values: dict[str, Any] = dict(point)
        windows = subset(len(self._samples.ids), values.pop("subset"), values.pop("windows"))
        statistics, metric = self._gradients.statistics(windows), Metric(**values)
        model = self._model
        for index, layer in self._changed.items():
            model = sliced(model, index, chosen(model, index, layer, statistics, metric))
        return model


def subset(pool: int, seed: int, count: int) -> list[int]:
    """Some windows of a pool, the same ones for the same seed; fewer are the first of more."""
    return torch.randperm(pool, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def pruned_widths(model: Model, config: AdaPrunerConfig) -> tuple[Layer, ...]:
    """Widths of every layer after pruning.

    Raises:
        RecipeError: the model is no decoder, no layer is left to prune, they do not hold that much, or one has a matrix
            that is not dense any more.
        BackendMissingError: a search is asked for, and there is no Optuna.
    """
    layers = model.architecture.layers
    if not config.sparsity:
        return layers
    pruned = _pruned_layers(model, config)
    gated = adapters.find(model.architecture.family).mlp_sites(0).gate is not None
    sizes = [_Size.of(layer, gated) for layer in layers]
    more = sum(size.whole for size in sizes) / sum(sizes[index].whole for index in pruned)
    most = min(sizes[index].most for index in pruned) / more
    if config.sparsity >= most:
        raise RecipeError(
            f"adapruner: sparsity {config.sparsity:g} is more than heads and MLPs hold; give less than {most:.3f}"
        )
    if config.trials > 1:
        search.require_optuna("method adapruner with more than one trial")
    share = config.sparsity * more
    return tuple(
        pruned_layer(layer, gated, share, config.multiple) if index in pruned else layer
        for index, layer in enumerate(layers)
    )


def pruned_layer(layer: Layer, gated: bool, share: float, multiple: int) -> Layer:
    """Widths of a layer that loses a share of its weights: heads to the nearest, the MLP what is still missing.

    Args:
        layer: Before.
        gated: Whether its MLP has a gate.
        share: To remove, so small that the MLP is not used up.
        multiple: Of the MLP's width, >= 1.
    """
    size, group = _Size.of(layer, gated), layer.heads // layer.kv_heads
    heads = max(1, math.floor(layer.kv_heads * (1 - share) + 0.5))
    missing = share * size.whole - (layer.kv_heads - heads) * size.head
    mlp = kept_width(layer.mlp, max(0.0, missing / (layer.mlp * size.channel)), multiple)
    return replace(layer, heads=heads * group, kv_heads=heads, mlp=mlp)


def chosen(model: Model, index: int, after: Layer, statistics: Statistics, metric: Metric) -> Kept:
    """The groups of a layer that matter most.

    Args:
        model: Before pruning of this layer.
        index: The layer.
        after: Its widths after pruning.
        statistics: g and F of each of its sites, [out, in].
        metric: How they matter.
    """
    sites, mlp = _sites(model, index)
    before = model.architecture.layers[index]

    def members(names: tuple[str, ...], last: str, groups: int) -> list[Tensor]:
        scores = [weight_scores(_values(model, n).to(statistics[n][0].device), *statistics[n], metric)
                  for n in (*names, last)]  # fmt: skip
        rows = [*scores[:-1], scores[-1].T]  # the last matrix of a group loses columns
        return [row_scores(row, metric.granularity).reshape(groups, -1) for row in rows]

    heads = group_scores(members(sites[:-1], sites[-1], before.kv_heads), metric.aggregation)
    channels = group_scores(members(mlp[:-1], mlp[-1], before.mlp), metric.aggregation)
    return Kept(strongest(heads, after.kv_heads).cpu(), strongest(channels, after.mlp).cpu())


def sliced(model: Model, index: int, kept: Kept) -> Model:
    """The model with only some groups of one layer; biases of q, k, v, gate and up go with their rows."""
    before = model.architecture.layers[index]
    (q, k, v, o), (*ups, down) = _sites(model, index)
    group = before.heads // before.kv_heads
    rows = {q: rows_of(kept.heads, group * before.head_dim), k: rows_of(kept.heads, before.head_dim),
            v: rows_of(kept.heads, before.value_dim), **dict.fromkeys(ups, kept.channels)}  # fmt: skip
    columns = {o: rows_of(kept.heads, group * before.value_dim), down: kept.channels}
    for site, which in rows.items():
        model = with_rows(model, site, which, _values(model, site))
    weights = {site: Dense(_values(model, site)[:, which].contiguous()) for site, which in columns.items()}
    count = len(kept.heads)
    layer = replace(before, heads=count * group, kv_heads=count, mlp=len(kept.channels))
    return model.with_weights(weights).with_layer(index, layer)


@dataclass(frozen=True)
class _Size:
    """Weights per channel of the residual stream: of a key-value head with its query heads, a channel, a layer."""

    head: int
    channel: int
    whole: int
    most: float  # share that can be removed: every head but one, and the MLP

    @staticmethod
    def of(layer: Layer, gated: bool) -> _Size:
        head = (layer.heads // layer.kv_heads + 1) * layer.head_dim  # rows of q and k
        head += (layer.heads // layer.kv_heads + 1) * layer.value_dim  # columns of o, rows of v
        channel = 3 if gated else 2
        whole = layer.kv_heads * head + layer.mlp * channel
        return _Size(head, channel, whole, 1 - head / whole)


def _pruned_layers(model: Model, config: AdaPrunerConfig) -> range:
    """The layers that are pruned: at least one, and dense."""
    count = len(model.architecture.layers)
    if not model.architecture.causal:
        raise RecipeError(f"adapruner: a {model.architecture.family} predicts no next token; prune it with fasp")
    if config.skip_first + config.skip_last >= count:
        skipped = f"skip_first {config.skip_first} and skip_last {config.skip_last}"
        raise RecipeError(f"adapruner: {skipped} leave none of {count} layers; together they must be under {count}")
    pruned = range(config.skip_first, count - config.skip_last)
    for site in (site for index in pruned for site in layer_sites(model, index)):
        _values(model, site)
    return pruned


def require_windows(config: AdaPrunerConfig, windows: int, validation: int) -> None:
    """Refuse a calibration that a search cannot use; a recipe asks before the work.

    Args:
        config: What to do.
        windows: Calibration windows there are.
        validation: Validation windows there are.

    Raises:
        RecipeError: too few.
    """
    if not needs_calibration(config):
        return
    if not validation:
        raise RecipeError(
            "adapruner: trials are judged on text of their own; add `validation: 16` to the recipe's `calibration`"
        )
    wanted = int(SPACE.default["windows"]) if config.trials == 1 else max(COUNTS)
    if windows < wanted:
        raise RecipeError(
            f"adapruner: measures are taken on up to {wanted} calibration windows; there are {windows}; set `windows` "
            f"of the recipe's `calibration` to {wanted} or more"
        )


def _required(model: Model, config: AdaPrunerConfig, samples: Samples | None) -> Samples:
    """The samples, if they are all that a search needs."""
    if samples is None:
        raise RecipeError("adapruner: importance reads gradients on calibration text; give it")
    validation = samples.validation
    require_windows(config, len(samples.ids), 0 if validation is None else len(validation))
    for windows in (samples.ids, validation):
        if windows is not None:
            check_windows(model, windows)
    return samples


def _tried(candidates: Candidates, config: AdaPrunerConfig, identity: Any, journal: Journal) -> tuple[Trial, ...]:
    """All trials, the first LLM-Pruner's; that one alone needs no study."""
    if config.trials == 1:
        return (Trial(0, SPACE.default, candidates.loss(SPACE.default)),)
    with search.opened(config.storage, identity, journal) as study:
        return search.minimise(
            candidates.loss, SPACE, config.trials, config.sampler, config.seed, study, journal
        )  # fmt: skip


def _identity(model: Model, config: AdaPrunerConfig, samples: Samples) -> Any:
    """What a study belongs to: trials of another model, text or config are not its own."""
    came_from = (model.provenance.digest, model.provenance.steps)
    return came_from, config.model_dump(mode="json", exclude={"trials", "storage"}), samples.digests()


def _step(config: AdaPrunerConfig) -> dict[str, Any]:
    """What is recorded of the config; where trials were kept, and the password to it, is nobody's business."""
    return config.model_dump(mode="json", exclude={"storage"})


def _record(trials: tuple[Trial, ...], best: Trial) -> dict[str, Any]:
    """What the search found, as JSON; losses are in nats a token, null where they are infinite."""
    default = next(trial for trial in trials if trial.point == SPACE.default)
    return {
        "trials": len(trials),
        "default": {"trial": default.number, "loss": _finite(default.loss)},
        "best": {"trial": best.number, "loss": best.loss, **best.point},
        "improvements": [{"trial": trial.number, "loss": trial.loss} for trial in search.improvements(trials)],
    }


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _sites(model: Model, index: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sites of a layer's attention and of its MLP, each with the matrix that loses columns last."""
    sites = layer_sites(model, index)
    return sites[:4], sites[4:]


def _values(model: Model, site: str) -> Tensor:
    return plain(site, model.weights[site], "adapruner prunes plain matrices: put it before other steps")
