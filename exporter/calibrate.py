"""Calibration: a walk over the decoder, block by block, that gives the Gram matrices of the inputs of its matrices."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from exporter import adapters
from exporter.errors import RecipeError
from exporter.model import Model
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


class CalibratingOps(TorchOps):
    """Eager torch whose `linear` also adds up x^T x for the sites that are asked for.

    Args:
        model: What runs.
        sites: Whose inputs are summed. Sites of one input, such as q, k and v, share one sum.
        dtype: Of the activations; sums are float64.
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

    @property
    def grams(self) -> dict[str, Tensor]:
        """[in, in], float64, by site."""
        return {site: self._sums[first] for site, first in self._sharing.items()}

    def linear(self, x: Tensor, site: str) -> Tensor:
        if site in self._wanted:
            if self._latest is None or self._latest[1] is not x:
                self._latest = site, x
                tokens = x.flatten(0, -2).double()  # [tokens, in]
                self._sums[site] = self._sums.get(site, 0) + tokens.T @ tokens
            self._sharing[site] = self._latest[0]
        return super().linear(x, site)


class Calibration:
    """Activations in front of one decoder layer, of all windows; they move on as layers are finished.

    Args:
        model: Whose embedding the windows go through.
        windows: [count, length], token ids; every window is a text of its own.
        batch: Windows that run together.
        dtype: Of the activations.

    Raises:
        RecipeError: a window is longer than the context, or holds a token that the model does not have.
    """

    def __init__(self, model: Model, windows: Tensor, batch: int = 8, dtype: torch.dtype = torch.float32) -> None:
        _check(model, windows)
        self._adapter = adapters.find(model.architecture.family)
        self._dtype = dtype
        self._layer = 0
        ops = TorchOps(model, dtype)
        with torch.inference_mode():
            self._activations = [self._adapter.embed(_fresh(ops), ids) for ids in torch.split(windows, batch)]

    def gram(self, model: Model, layer: int, sites: Collection[str]) -> dict[str, Tensor]:
        """Sums of x x^T over all tokens, of the inputs of some matrices of a layer.

        Args:
            model: As it is now, the layers before `layer` finished.
            layer: The one that the activations stand before.
            sites: Of this layer.

        Returns:
            [in, in], float64, by site.

        Raises:
            RecipeError: the activations are not finite.
        """
        ops = CalibratingOps(model, sites, self._dtype)
        for _ in self._run(ops, layer):
            pass
        if not all(bool(gram.isfinite().all()) for gram in ops.grams.values()):
            raise RecipeError(
                f"activations of layer {layer} are not finite: the model overflows on the calibration text"
            )
        return ops.grams

    def advance(self, model: Model, layer: int) -> None:
        """Push the activations through a finished layer."""
        for index, after in enumerate(self._run(TorchOps(model, self._dtype), layer)):
            self._activations[index] = after
        self._layer += 1

    def _run(self, ops: TorchOps, layer: int) -> Iterator[Tensor]:
        if layer != self._layer:
            raise ValueError(f"the activations stand before layer {self._layer}, not before layer {layer}")
        with torch.inference_mode():
            for x in self._activations:
                yield self._adapter.block(_fresh(ops), x, layer)


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
