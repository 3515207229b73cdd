"""LoRA: a pruned model is trained a little, by thin matrices beside its own, which are then added into them.

A step of its own (`lora`), so that it recovers what any method did that leaves dense matrices: FASP as well as
AdaPruner. Nothing of the adapters is left in the result: the same shapes, the same types, other values.

Source: LoRA, arXiv:2106.09685, with the settings of LLM-Pruner's recovery, arXiv:2305.11627. Differs: trained on the
recipe's calibration text, not on instructions; a tenth of the steps warms up.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporter.calibrate import Samples, check_windows
from exporter.compress.step import Journal, StepConfig, layer_sites, plain
from exporter.errors import BackendMissingError, RecipeError
from exporter.gradients import loss, mean_loss
from exporter.model import Model
from exporter.ops import Leaf
from exporter.torch_ops import TorchOps
from exporter.weights import Dense, to_meta

WARM_UP = 0.1  # of the steps
LARGEST_NORM = 1.0  # of a step's gradient
SAVES = 20  # of a training that may be killed
STATE = "lora.safetensors"


class LoraConfig(StepConfig):
    """Train rank-`rank` adapters beside every decoder matrix, and add them in.

    `alpha / rank` scales them, `dropout` is of their inputs. `steps` of AdamW at rate `lr`, each on `batch` of the
    recipe's calibration windows; `seed` draws windows, first values and dropout.
    """

    kind: Literal["lora"] = "lora"
    version: Literal[1] = 1
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: Annotated[float, Field(gt=0, le=4096)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-4
    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 200
    batch: Annotated[int, Field(ge=1, le=65_536)] = 8
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


def needs_calibration(config: LoraConfig) -> bool:
    """Always: it trains on the windows."""
    return True


def run(model: Model, config: LoraConfig, samples: Samples | None, journal: Journal) -> Model:
    """Train, and merge."""
    sites = adapted_sites(model, config)
    if samples is None:
        raise RecipeError("lora: training reads calibration text; give it")
    check_windows(model, samples.ids)
    adapted = Adapted(model, sites, config, journal.device)
    train(adapted, config, samples, journal)
    trained = adapted.merged()
    step = config.model_dump(mode="json")
    if samples.validation is not None:
        before, after = (mean_loss(m, samples.validation, journal.device) for m in (model, trained))
        step |= {"validation": {"before": before, "after": after}}
    return trained.with_step(step)


def predict(model: Model, config: LoraConfig) -> Model:
    """The shapes that `run` will give."""
    sites = adapted_sites(model, config)
    return model.with_weights({site: to_meta(model.weights[site]) for site in sites}).with_step(
        config.model_dump(mode="json")
    )


def adapted_sites(model: Model, config: LoraConfig) -> tuple[str, ...]:
    """Every matrix of the decoder's layers.

    Raises:
        RecipeError: the model is no decoder, a matrix is not dense any more, or is thinner than the rank.
        BackendMissingError: there is no PEFT.
    """
    if not model.architecture.causal:
        raise RecipeError(f"lora: a {model.architecture.family} predicts no next token to be trained on")
    layers = range(len(model.architecture.layers))
    sites = tuple(site for index in layers for site in layer_sites(model, index))
    for site in sites:
        if config.rank > min(_values(model, site).shape):
            raise RecipeError(f"lora: rank {config.rank} is over the thinner side of {site}, "
                              f"{min(_values(model, site).shape)}; give at most that")  # fmt: skip
    if find_spec("peft") is None:
        raise BackendMissingError("method lora", "peft", "recovery")
    return sites


class Adapted(TorchOps):
    """Eager torch whose chosen matrices are PEFT's adapted layers, in float32.

    Args:
        model: The chosen sites hold dense weights.
        sites: Whose matrices get adapters.
        config: What they look like.
        device: Where it runs.
    """

    def __init__(self, model: Model, sites: tuple[str, ...], config: LoraConfig, device: str = "cpu") -> None:
        super().__init__(model, device=device)
        names = {site: f"matrix{index}" for index, site in enumerate(sites)}  # a module's name has no dots
        bare = nn.ModuleDict({names[site]: _linear(_values(model, site)) for site in sites})
        with _seeded(config.seed, device), _quiet():
            import peft

            settings = peft.LoraConfig(
                r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(bare)
            )
            self.modules = peft.inject_adapter_in_model(settings, bare).to(device)
        self._layers = {site: self.modules[name] for site, name in names.items()}

    @property
    def adapters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: value for name, value in self.modules.named_parameters() if value.requires_grad}

    def leaf(self, x: Tensor, weight: Leaf, site: str) -> Tensor:
        if site not in self._layers:
            return super().leaf(x, weight, site)
        found: Tensor = self._layers[site](x)
        return found

    def merged(self) -> Model:
        """The model with every adapter added into its matrix, in the matrix's own type."""
        weights = {}
        with torch.no_grad():
            for site, layer in self._layers.items():
                values = _values(self.model, site)
                change = layer.get_delta_weight("default").cpu()  # [out, in], float32: scale * B A
                weights[site] = Dense((values.float() + change).to(values.dtype))
        return self.model.with_weights(weights)


def train(adapted: Adapted, config: LoraConfig, samples: Samples, journal: Journal) -> None:
    """Train the adapters in place; a killed training goes on where it was last saved, to the same result.

    Raises:
        RecipeError: the loss is not finite.
    """
    adapters = adapted.adapters
    optimizer = torch.optim.AdamW(adapters.values(), lr=config.lr, weight_decay=0.0)
    saved = None if journal.scratch is None else journal.scratch / STATE
    done = _taken_up(saved, adapters, optimizer)
    every = -(-config.steps // SAVES)
    for step in range(done, config.steps):
        optimizer.param_groups[0]["lr"] = config.lr * rate(step, config.steps)
        _train_step(adapted, config, samples, step, optimizer)
        journal.report((step + 1) / config.steps)
        if saved is not None and (step + 1) % every == 0:
            _save(saved, step + 1, adapters, optimizer)
    adapted.modules.eval()


def rate(step: int, steps: int) -> float:
    """The share of the full learning rate: it rises over the first tenth of the steps, then falls towards 0."""
    warm = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm), 1.0)


def drawn(count: int, batch: int, step: int, seed: int) -> list[int]:
    """The windows of a step: every window once, in an order of its own, before any comes again."""
    return [_order(count, place // count, seed)[place % count] for place in range(step * batch, (step + 1) * batch)]


def _order(count: int, epoch: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def _train_step(
    adapted: Adapted, config: LoraConfig, samples: Samples, step: int, optimizer: torch.optim.Optimizer
) -> None:
    windows = drawn(len(samples.ids), config.batch, step, config.seed)
    pixels = None if samples.pixels is None else samples.pixels[windows]
    adapted.modules.train()
    with _seeded(config.seed + step, adapted.device), torch.enable_grad():
        found = loss(adapted, samples.ids[windows], pixels)
        if not bool(found.isfinite()):
            raise RecipeError(f"lora: the loss of step {step} is not finite; give an lr under {config.lr:g}")
        optimizer.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(adapted.adapters.values(), LARGEST_NORM)
    optimizer.step()


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Dropout and first values of their own, whatever was drawn before."""
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PEFT's imports log: libraries of torchao for other hardware that they cannot load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _save(path: Path, done: int, adapters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Write adapters and AdamW's two moments, whole or not at all."""
    tensors = {"done": torch.tensor(done)}
    for name, value in adapters.items():
        state = optimizer.state[value]
        tensors |= {f"value/{name}": value.detach(), f"first/{name}": state["exp_avg"],
                    f"second/{name}": state["exp_avg_sq"]}  # fmt: skip
    fresh = path.with_suffix(".new")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, fresh)
    fresh.rename(path)


def _taken_up(path: Path | None, adapters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Put back what `_save` wrote; returns the steps that are done."""
    if path is None or not path.is_file():
        return 0
    tensors = load_file(path)
    done = int(tensors["done"])
    with torch.no_grad():
        for name, value in adapters.items():
            value.copy_(tensors[f"value/{name}"])
            moments = {"exp_avg": tensors[f"first/{name}"], "exp_avg_sq": tensors[f"second/{name}"]}
            state: dict[str, Any] = {key: moment.to(value.device) for key, moment in moments.items()}
            optimizer.state[value] = {"step": torch.tensor(float(done)), **state}
    return done


def _linear(values: Tensor) -> nn.Linear:
    linear = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(values.float(), requires_grad=False)
    return linear


def _values(model: Model, site: str) -> Tensor:
    return plain(site, model.weights[site], "lora trains plain matrices: put it before other steps")
