"""The loss of a language model, and its gradients, window by window."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter import adapters
from exporter.calibrate import Samples
from exporter.errors import RecipeError
from exporter.model import Model
from exporter.ops import Leaf
from exporter.torch_ops import TorchOps

UNPREDICTED = -100  # a label that is no token
ROOM = 2**31  # bytes of gradients that are kept, so that no window is worked through twice


def loss(ops: TorchOps, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
    """Mean over the tokens behind the first of -log p(token | those before it), each window a text of its own.

    Args:
        ops: Of a decoder, in the type that the loss gets.
        ids: [windows, length], length at least 2.
        pixels: [windows, channels, height, width], the picture of each window; its places are given, not predicted.

    Returns:
        A number, in nats, differentiable.
    """
    architecture, ids = ops.model.architecture, ids.to(ops.device)
    adapter = adapters.find(architecture.family)
    ops.reset()
    ops.begin()
    seen = None if pixels is None else adapters.see(adapter, ops, pixels.to(ops.device))
    logits = adapters.logits(adapter, ops, ids, seen)  # [windows, length, vocab]
    wanted = ids[:, 1:]
    if architecture.vision is not None:
        wanted = wanted.masked_fill(wanted == architecture.vision.token, UNPREDICTED)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=UNPREDICTED)


def mean_loss(model: Model, windows: Tensor, device: str = "cpu", batch: int = 8) -> float:
    """The loss of a model over windows [count, length], without gradients; in nats, infinite where it is not finite."""
    ops, total = TorchOps(model, device=device), 0.0
    with torch.inference_mode():
        for ids in torch.split(windows, batch):
            total += float(loss(ops, ids)) * len(ids)
    mean = total / len(windows)
    return mean if abs(mean) < float("inf") else float("inf")  # NaN too


class LeafOps(TorchOps):
    """Eager torch whose chosen matrices are leaves of autograd.

    Args:
        model: The chosen sites hold dense weights.
        sites: Whose gradients are wanted.
        dtype: Of every value and gradient.
        device: Where it runs.
    """

    def __init__(
        self, model: Model, sites: Collection[str], dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        super().__init__(model, dtype, device)
        self.leaves = {site: self.matrix(model.weights[site]).detach().requires_grad_() for site in sites}

    def leaf(self, x: Tensor, weight: Leaf, site: str) -> Tensor:
        return F.linear(x, self.leaves[site]) if site in self.leaves else super().leaf(x, weight, site)


class Gradients:
    """Gradients of the loss of single windows, kept while there is room.

    Args:
        model: A decoder whose `sites` are dense.
        sites: Whose gradients are wanted.
        samples: Whose `ids`, and `pixels` where there are any, are the windows.
        dtype: Of the gradients.
        device: Where they are worked out and lie.
        room: Bytes that may be kept.
    """

    def __init__(
        self,
        model: Model,
        sites: Collection[str],
        samples: Samples,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        room: int = ROOM,
    ) -> None:
        self._ops, self._samples, self._room = LeafOps(model, sites, dtype, device), samples, room
        self._kept: dict[int, dict[str, Tensor]] = {}

    def of(self, window: int) -> dict[str, Tensor]:
        """The gradient at each site of the loss of one window, [out, in].

        Raises:
            RecipeError: it is not finite.
        """
        if window in self._kept:
            return self._kept[window]
        leaves, one = self._ops.leaves, slice(window, window + 1)
        pixels = None if self._samples.pixels is None else self._samples.pixels[one]
        with torch.enable_grad():
            of_window = loss(self._ops, self._samples.ids[one], pixels)
            grads = torch.autograd.grad(of_window, list(leaves.values()))
        if not all(bool(grad.isfinite().all()) for grad in grads):
            raise RecipeError(f"gradients of calibration window {window} are not finite: the model overflows on it")
        found = dict(zip(leaves, grads))
        size = sum(grad.numel() * grad.element_size() for grad in grads)
        if (len(self._kept) + 1) * size <= self._room:
            self._kept[window] = found
        return found

    def statistics(self, windows: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """Per site, over some windows: g, the mean gradient, and F, the mean of the squared gradients of each window.

        Args:
            windows: Indices, at least one.

        Returns:
            g and F, each [out, in].
        """
        sums = {site: (torch.zeros_like(leaf), torch.zeros_like(leaf)) for site, leaf in self._ops.leaves.items()}
        for window in windows:
            for site, grad in self.of(window).items():
                sums[site][0].add_(grad)
                sums[site][1].addcmul_(grad, grad)
        return {site: (g.div_(len(windows)), f.div_(len(windows))) for site, (g, f) in sums.items()}
