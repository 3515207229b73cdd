"""Calibration: a walk over the layers, one by one, that gives the Gram matrices of the inputs of their matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter import adapters
from exporter.errors import RecipeError
from exporter.model import Model
from exporter.ops import AttentionSites, AttentionSpec, MlpSites
from exporter.torch_ops import TorchOps

MOST_TOKENS = 2**26  # of all windows together: half a GiB of token ids


def windows(tokens: Sequence[int], count: int, length: int, seed: int, bos: int | None) -> Tensor:
    """Windows of a text at random places, the same ones for the same seed.

    Args:
        tokens: The text.
        count: Windows, at least 1.
        length: Tokens in a window, BOS included, at least 2.
        seed: Of the places.
        bos: First token of every window, or None.

    Returns:
        [count, length], int64.

    Raises:
        RecipeError: count or length is too small, both together are too large, the seed is out of range, or the text
            is shorter than a window.
    """
    if count < 1 or length < 2:
        raise RecipeError(f"{count} windows of {length} tokens calibrate nothing; at least 1 window of 2 tokens")
    if count * length > MOST_TOKENS:
        raise RecipeError(f"{count} windows of {length} tokens are over {MOST_TOKENS:,} tokens; ask for fewer")
    if not 0 <= seed < 2**63:
        raise RecipeError(f"seed {seed} is not possible; give one from 0 to {2**63 - 1}")
    taken = length if bos is None else length - 1
    if len(tokens) < taken:
        raise RecipeError(
            f"the text has {len(tokens)} tokens and a window needs {taken}; give more text or a less length"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - taken + 1, (count, 1), generator=generator)
    found = torch.tensor(list(tokens), dtype=torch.int64)[starts + torch.arange(taken)]
    return found if bos is None else torch.cat((torch.full((count, 1), bos), found), dim=1)


@dataclass(frozen=True, eq=False)
class Samples:
    """What a model is calibrated on; every window is a text of its own.

    Args:
        ids: [count, length], int64, token ids.
        pixels: [count, channels, height, width], float32, the picture of each window, or None.
        validation: [count, length], int64, windows of text that `ids` never touch, or None.
    """

    ids: Tensor
    pixels: Tensor | None = None
    validation: Tensor | None = None


def split(tokens: Sequence[int], validation: int, length: int, bos: int | None) -> tuple[Sequence[int], Tensor | None]:
    """Cut validation windows, one after another, off the end of a text.

    Args:
        tokens: The text.
        validation: Windows, maybe none.
        length: Tokens in a window, BOS included.
        bos: First token of every window, or None.

    Returns:
        The text in front of them, and the windows [validation, length], or None.

    Raises:
        RecipeError: the text is too short to leave anything in front.
    """
    if not validation:
        return tokens, None
    body = length if bos is None else length - 1
    cut = len(tokens) - validation * body
    if cut < body:
        raise RecipeError(
            f"the text has {len(tokens)} tokens; {validation} validation windows and one to calibrate on need "
            f"{(validation + 1) * body}; give more text or fewer windows"
        )
    pieces = torch.tensor(list(tokens[cut:]), dtype=torch.int64).view(validation, body)
    return tokens[:cut], pieces if bos is None else torch.cat((torch.full((validation, 1), bos), pieces), dim=1)


class _EnoughError(Exception):
    """Every input that was asked for is there; the rest of the layer need not run."""


class CalibratingOps(TorchOps):
    """Eager torch whose `linear` also adds up x^T x for the sites that are asked for.

    Args:
        model: What runs.
        sites: Whose inputs are summed. Sites of one input, such as q, k and v, share one sum.
        dtype: Of the activations; sums over batches are float64.
        device: Where it runs.
    """

    def __init__(
        self, model: Model, sites: Collection[str], dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        super().__init__(model, dtype, device)
        self._wanted = frozenset(sites)
        self._sums: dict[str, Tensor] = {}
        self._sharing: dict[str, str] = {}  # site -> the first site that had the same input
        self._latest: tuple[str, Tensor] | None = None  # the latest first site, and its input
        self._missing: set[str] = set()  # sites of this batch that are still to come
        self.given: dict[str, Tensor] = {}  # site -> its input, known from an earlier run: what leads to it is skipped
        self.heard: dict[str, Tensor] = {}  # site -> its input in this batch

    @property
    def grams(self) -> dict[str, Tensor]:
        """[in, in], float64, by site."""
        return {site: self._sums[first] for site, first in self._sharing.items()}

    def reset(self) -> None:
        super().reset()
        self._missing, self.heard = set(getattr(self, "_wanted", ())), {}

    def linear(self, x: Tensor, site: str) -> Tensor:
        if site in self._wanted:
            self._hear(x, site)
        return super().linear(x, site)

    def attention(self, x: Tensor, sites: AttentionSites, layer: int, spec: AttentionSpec) -> Tensor:
        if sites.o in self.given:
            return self.linear(self.given[sites.o], sites.o)
        return super().attention(x, sites, layer, spec)

    def mlp(self, x: Tensor, sites: MlpSites, activation: str) -> Tensor:
        if sites.down in self.given:
            return self.linear(self.given[sites.down], sites.down)
        return super().mlp(x, sites, activation)

    def _hear(self, x: Tensor, site: str) -> None:
        if self._latest is None or self._latest[1] is not x:
            self._latest = site, x
            tokens = x.flatten(0, -2)  # [tokens, in]
            self._sums[site] = self._sums.get(site, 0) + (tokens.T @ tokens).double()
        self._sharing[site] = self._latest[0]
        self.heard[site] = x
        self._missing.discard(site)
        if not self._missing:
            raise _EnoughError


class Calibration:
    """Activations in front of one layer, of all windows; they move on as layers are finished.

    Args:
        model: Whose embedding the windows go through.
        samples: The windows.
        batch: Windows that run together.
        dtype: Of the activations.
        device: Where they lie, and where the layers run.
        resumed: Layer and activations where an earlier run stood, instead of the embedding.

    Raises:
        RecipeError: a window is longer than the context, or holds a token that the model does not have.
    """

    def __init__(
        self,
        model: Model,
        samples: Samples,
        batch: int = 8,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        resumed: tuple[int, Sequence[Tensor]] | None = None,
    ) -> None:
        _check(model, samples.ids)
        self._adapter = adapters.find(model.architecture.family)
        self._dtype, self._device = dtype, device
        self._held: dict[str, list[Tensor]] = {}
        if resumed is not None:
            self.layer, activations = resumed
            self.activations = [x.to(device) for x in activations]
            return
        self.layer = 0
        ops = TorchOps(model, dtype, device)
        with torch.inference_mode():
            self.activations = [
                self._adapter.embed(_fresh(ops), ids.to(device)) for ids in torch.split(samples.ids, batch)
            ]

    def gram(self, model: Model, layer: int, sites: Collection[str], hold: bool = False) -> dict[str, Tensor]:
        """Sums of x x^T over all tokens, of the inputs of some matrices of a layer, in one pass that ends at the last.

        Args:
            model: As it is now, the layers before `layer` finished.
            layer: The one that the activations stand before.
            sites: Of this layer.
            hold: Keep these inputs too: the layer's later passes begin there. For sites at the end of attention or MLP;
                whoever changes what leads to a held input says so by `narrow`.

        Returns:
            [in, in], float64, by site.

        Raises:
            RecipeError: the activations are not finite.
        """
        ops = CalibratingOps(model, sites, self._dtype, self._device)
        held: dict[str, list[Tensor]] = {site: [] for site in sites}
        for _ in self._run(ops, layer):
            for site in sites if hold else ():
                held[site].append(ops.heard[site])
        if not all(bool(gram.isfinite().all()) for gram in ops.grams.values()):
            raise RecipeError(
                f"activations of layer {layer} are not finite: the model overflows on the calibration text"
            )
        self._held |= held if hold else {}
        return ops.grams

    def cross(self, other: Calibration, site: str) -> Tensor:
        """Sum of y x^T over all tokens, [in, in], float64: y an input that the other holds, x the one held here."""
        pairs = zip(other._held[site], self._held[site])
        products = [(y.flatten(0, -2).T @ x.flatten(0, -2)).double() for y, x in pairs]
        return torch.stack(products).sum(0)

    def narrow(self, site: str, columns: Tensor) -> None:
        """Keep only some channels of an input that is held: the others were pruned."""
        self._held[site] = [x[..., columns.to(x.device)] for x in self._held[site]]

    def advance(self, model: Model, layer: int) -> None:
        """Push the activations through a finished layer."""
        for index, after in enumerate(self._run(CalibratingOps(model, (), self._dtype, self._device), layer)):
            self.activations[index] = after
        self._held = {}
        self.layer += 1

    def _run(self, ops: CalibratingOps, layer: int) -> Iterator[Tensor]:
        """The activations behind a layer, batch by batch; those in front of it where the run ended early."""
        if layer != self.layer:
            raise ValueError(f"the activations stand before layer {self.layer}, not before layer {layer}")
        for index, x in enumerate(self.activations):
            ops.given = {site: held[index] for site, held in self._held.items()}
            with torch.inference_mode(), suppress(_EnoughError):
                x = self._adapter.block(_fresh(ops), x, layer)
            yield x


def block_influence(
    model: Model,
    samples: Samples,
    report: Callable[[float], None] = lambda fraction: None,
    device: str = "cpu",
) -> Tensor:
    """How much each layer turns the residual stream: 1 - mean over tokens of cos(h_in, h_out), in [0, 2].

    Returns:
        [layers], float64.

    Source: Block Influence of ShortGPT, arXiv:2403.03853.
    """
    calibration, found = Calibration(model, samples, device=device), []
    count = len(model.architecture.layers)
    for layer in range(count):
        before = list(calibration.activations)
        calibration.advance(model, layer)
        pairs = zip(before, calibration.activations)
        cosines = [torch.cosine_similarity(x.double(), y.double(), dim=-1).flatten() for x, y in pairs]
        found.append(1 - float(torch.cat(cosines).mean()))
        report((layer + 1) / count)
    return torch.tensor(found, dtype=torch.float64)


def _fresh(ops: TorchOps) -> TorchOps:
    """The same verbs with an empty cache: what comes next is the beginning of a text."""
    ops.reset()
    ops.begin()
    return ops


def _check(model: Model, windows: Tensor) -> None:
    length, context = windows.shape[1], model.architecture.positions
    if length > context:
        raise RecipeError(f"calibration windows have {length} tokens; the model's context is {context}")
    low, high, vocab = int(windows.min()), int(windows.max()), model.architecture.vocab
    if low < 0 or high >= vocab:
        raise RecipeError(f"calibration tokens run from {low} to {high}; the model has {vocab}")
