"""Calibration: a walk over the layers, one by one, that gives the Gram matrices of the inputs of their matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter import adapters, mapped
from exporter.errors import RecipeError
from exporter.maths.gram import Gram, cross
from exporter.model import Architecture, Model
from exporter.ops import AttentionSites, AttentionSpec, MlpSites
from exporter.torch_ops import ACTIVATIONS, TorchOps
from exporter.weights import Dense, LowBit, Sparse

MOST_TOKENS = 2**26  # of all windows together: half a GiB of token ids
ROOM = 2**22  # numbers in a batch's widest activations: larger blocks of memory are new each time, paid page by page
ROOM_ELSEWHERE = 2**26  # the same where memory is not the system's, and larger products are faster

IN_PLACE = ACTIVATIONS | {"relu": torch.relu_, "silu": partial(F.silu, inplace=True)}


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
    return _begun(found, bos)


def framed(windows: Tensor, architecture: Architecture) -> Tensor:
    """Windows as a model reads texts: an encoder's end in [SEP], in place of their last token; a decoder's go on."""
    if architecture.causal or not architecture.eos:
        return windows
    return torch.cat((windows[:, :-1], torch.full((len(windows), 1), architecture.eos[0])), dim=1)


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

    def digests(self) -> list[str | None]:
        """The sha256 of each of these in hexadecimal, None for what there is not: other samples have others."""
        tensors = (self.ids, self.pixels, self.validation)
        return [None if t is None else hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for t in tensors]


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
    return tokens[:cut], _begun(pieces, bos)


def _begun(pieces: Tensor, bos: int | None) -> Tensor:
    """Pieces of a text [count, tokens] as windows: BOS in front of each, where the model has one."""
    return pieces if bos is None else torch.cat((torch.full((len(pieces), 1), bos), pieces), dim=1)


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
        self._sums: dict[str, Gram] = {}
        self._sharing: dict[str, str] = {}  # site -> the first site that had the same input
        self._latest: tuple[str, Tensor] | None = None  # the latest first site, and its input
        self._missing: set[str] = set()  # sites of this batch that are still to come
        self.given: dict[str, Tensor] = {}  # site -> its input, known from an earlier run: what leads to it is skipped
        self.heard: dict[str, Tensor] = {}  # site -> its input in this batch
        self.attended: Tensor | None = None  # what attention gives in this batch, maybe known from an earlier run

    def grams(self) -> dict[str, Tensor]:
        """[in, in], float64, by site."""
        totals = {site: gram.total() for site, gram in self._sums.items()}
        return {site: totals[first] for site, first in self._sharing.items()}

    def reset(self) -> None:
        super().reset()
        self._missing, self.heard = set(getattr(self, "_wanted", ())), {}

    def linear(self, x: Tensor, site: str) -> Tensor:
        if site in self._wanted:
            self._hear(x, site)
        weight, bias = self.model.weights[site], f"{site}.bias"
        if isinstance(weight, Dense | LowBit | Sparse) and bias in self.model.tensors:
            return F.linear(x, self.matrix(weight), self.tensor(bias))  # goes over the result once
        return super().linear(x, site)

    def attention(self, x: Tensor, sites: AttentionSites, layer: int, spec: AttentionSpec) -> Tensor:
        if not self._wanted.isdisjoint((sites.q, sites.k, sites.v)):
            self.attended = super().attention(x, sites, layer, spec)
        elif sites.o in self.given:
            self.attended = self.linear(self.given[sites.o], sites.o)
        elif self.attended is None or sites.o in self._wanted:
            self.attended = super().attention(x, sites, layer, spec)
        return self.attended

    def mlp(self, x: Tensor, sites: MlpSites, activation: str) -> Tensor:
        if sites.down in self.given:
            return self.linear(self.given[sites.down], sites.down)
        up = self.linear(x, sites.up)  # nobody else has it: it may change in place
        if sites.gate is None:
            return self.linear(IN_PLACE[activation](up), sites.down)
        return self.linear(IN_PLACE[activation](self.linear(x, sites.gate)).mul_(up), sites.down)

    def _hear(self, x: Tensor, site: str) -> None:
        if self._latest is None or self._latest[1] is not x:
            self._latest = site, x
            self._sums.setdefault(site, Gram()).add(x)
        self._sharing[site] = self._latest[0]
        self.heard[site] = x
        self._missing.discard(site)
        if not self._missing:
            raise _EnoughError


class _Memory:
    """Where activations outlive a pass, the same memory layer after layer: to fault in new costs more than to copy."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._used: list[Tensor] = []

    def keep(self, x: Tensor) -> Tensor:
        """A copy of a tensor, until `release`."""
        fitting = [room for room in self._free if room.numel() >= x.numel()]
        room = min(fitting, key=Tensor.numel) if fitting else x.new_empty(x.numel())
        self._free = [other for other in self._free if other is not room]
        self._used.append(room)
        return room[: x.numel()].view(x.shape).copy_(x)

    def release(self) -> None:
        """Nothing that is kept is needed any more."""
        self._free, self._used = self._used, []


class Calibration:
    """Activations in front of one layer, of all windows; they move on as layers are finished.

    Args:
        model: Whose embedding the windows go through.
        samples: The windows.
        batch: Windows that run together; None for as many as run fast.
        dtype: Of the activations.
        device: Where they lie, and where the layers run.
        resumed: Layer and activations where an earlier run stood, instead of the embedding.

    Raises:
        RecipeError: a window is longer than the context, or holds a token that the model does not have; pictures are
            not what the model looks at.
    """

    def __init__(
        self,
        model: Model,
        samples: Samples,
        batch: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        resumed: tuple[int, Sequence[Tensor]] | None = None,
    ) -> None:
        check_windows(model, samples.ids)
        _check_pictures(model, samples)
        self._adapter = adapters.find(model.architecture.family)
        self._dtype, self._device = dtype, device
        self._memory = _Memory()
        self._held: dict[str, list[Tensor]] = {}  # inputs of matrices of this layer, by site and batch
        self._narrowed: dict[str, Tensor] = {}  # which channels of a held input are left
        self._attended: list[Tensor] = []  # what this layer's attention gives, by batch, once it is finished
        if resumed is not None:
            self.layer, activations = resumed
            self.activations = [x.to(device) for x in activations]
            return
        self.layer = 0
        ops, batch = TorchOps(model, dtype, device), batch or fast_batch(model, samples.ids.shape[1], device)
        with torch.inference_mode():
            self.activations = [self._embedded(_fresh(ops), *part) for part in _batches(samples, batch)]
        mapped.release()  # the token embedding, where the model lies in files

    def gram(self, model: Model, layer: int, sites: Collection[str], hold: bool = False) -> dict[str, Tensor]:
        """Sums of x x^T over all tokens, of the inputs of some matrices of a layer, in one pass that ends at the last.

        Args:
            model: As it is now, the layers before `layer` finished.
            layer: The one that the activations stand before.
            sites: Of this layer.
            hold: Keep these inputs too: the layer's later passes begin there. For sites at the end of attention or MLP;
                whoever changes what leads to a held input says so by `narrow`. Attention is finished when an input
                behind it is held.

        Returns:
            [in, in], float64, by site.

        Raises:
            RecipeError: the activations are not finite.
        """
        ops = CalibratingOps(model, sites, self._dtype, self._device)
        held: dict[str, list[Tensor]] = {site: [] for site in sites}
        attended: list[Tensor] = []
        for _ in self._run(ops, layer):
            for site in sites if hold else ():
                held[site].append(self._memory.keep(ops.heard[site]))
            if hold and ops.attended is not None:
                attended.append(self._memory.keep(ops.attended))
        grams = ops.grams()
        if not all(bool(gram.diagonal().isfinite().all()) for gram in grams.values()):  # it bounds all the others
            raise RecipeError(
                f"activations of layer {layer} are not finite: the model overflows on the calibration text"
            )
        if hold:
            self._narrowed = {site: columns for site, columns in self._narrowed.items() if site not in held}
            self._held = held if attended else self._held | held
            self._attended = attended
        return grams

    def cross(self, other: Calibration, site: str) -> Tensor:
        """Sum of y x^T over all tokens, [in, in], float64: y an input that the other holds, x the one held here."""
        batches = range(len(self.activations))
        return cross((other._input(site, batch), self._input(site, batch)) for batch in batches)

    def narrow(self, site: str, columns: Tensor) -> None:
        """Keep only some channels of an input that is held: the others were pruned."""
        columns = columns.to(self._device)
        self._narrowed[site] = self._narrowed[site][columns] if site in self._narrowed else columns

    def advance(self, model: Model, layer: int) -> None:
        """Push the activations through a finished layer."""
        for index, after in enumerate(self._run(CalibratingOps(model, (), self._dtype, self._device), layer)):
            self.activations[index] = after
        self._held, self._narrowed, self._attended = {}, {}, []
        self._memory.release()
        self.layer += 1
        mapped.release()  # the layer's matrices, where the model lies in files

    def _embedded(self, ops: TorchOps, ids: Tensor, pixels: Tensor | None) -> Tensor:
        """What stands before the first layer, with the pictures that the windows hold."""
        seen = None if pixels is None else adapters.see(self._adapter, ops, pixels)
        return adapters.embed(self._adapter, ops, ids.to(self._device), seen)

    def _input(self, site: str, batch: int) -> Tensor:
        """A held input, without the channels that were pruned."""
        x = self._held[site][batch]
        return _columns(x, self._narrowed[site]) if site in self._narrowed else x

    def _run(self, ops: CalibratingOps, layer: int) -> Iterator[Tensor]:
        """The activations behind a layer, batch by batch; those in front of it where the run ended early."""
        if layer != self.layer:
            raise ValueError(f"the activations stand before layer {self.layer}, not before layer {layer}")
        for index, x in enumerate(self.activations):
            ops.given = {site: self._input(site, index) for site in self._held}
            ops.attended = self._attended[index] if self._attended else None
            with torch.inference_mode(), suppress(_EnoughError):
                x = self._adapter.block(_fresh(ops), x, layer)
            yield x


class Unchanged:
    """The layers of a model as it came in, walked beside those that are being compressed.

    Args:
        model: As it came in.
        samples: The windows.
        device: Where the layers run.
    """

    def __init__(self, model: Model, samples: Samples, device: str = "cpu") -> None:
        self._model, self.calibration = model, Calibration(model, samples, device=device)

    def gram(self, layer: int, sites: Collection[str], hold: bool = False) -> dict[str, Tensor]:
        """See `Calibration.gram`; a walk that was resumed catches up with the layer first."""
        while self.calibration.layer < layer:
            self.calibration.advance(self._model, self.calibration.layer)
        return self.calibration.gram(self._model, layer, sites, hold)


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


def _columns(x: Tensor, columns: Tensor) -> Tensor:
    """Some channels of [..., in]; a matrix of tokens is much quicker to pick from than a tensor of more dimensions."""
    return x.flatten(0, -2).index_select(1, columns).view(*x.shape[:-1], len(columns))


def _fresh(ops: TorchOps) -> TorchOps:
    """The same verbs with an empty cache: what comes next is the beginning of a text."""
    ops.reset()
    ops.begin()
    return ops


def check_windows(model: Model, windows: Tensor) -> None:
    """Refuse windows [count, length] that a model cannot read.

    Raises:
        RecipeError: they are longer than the context, or hold a token that the model does not have.
    """
    length, context = windows.shape[1], model.architecture.positions
    if length > context:
        raise RecipeError(f"calibration windows have {length} tokens; the model's context is {context}")
    low, high, vocab = int(windows.min()), int(windows.max()), model.architecture.vocab
    if low < 0 or high >= vocab:
        raise RecipeError(f"calibration tokens run from {low} to {high}; the model has {vocab}")


def fast_batch(model: Model, length: int, device: str) -> int:
    """Windows whose widest activations fill the room."""
    layers, room = model.architecture.layers, ROOM if device == "cpu" else ROOM_ELSEWHERE
    widest = max(max(layer.heads * layer.head_dim, layer.heads * layer.value_dim, layer.mlp) for layer in layers)
    return max(1, room // (length * max(widest, model.architecture.hidden)))


def _batches(samples: Samples, batch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Windows, and their pictures where there are any, `batch` at a time."""
    for start in range(0, len(samples.ids), batch):
        part = slice(start, start + batch)
        yield samples.ids[part], None if samples.pixels is None else samples.pixels[part]


def _check_pictures(model: Model, samples: Samples) -> None:
    vision, pixels = model.architecture.vision, samples.pixels
    expected = None if vision is None else (len(samples.ids), *vision.shape)
    if pixels is not None and tuple(pixels.shape) != expected:
        takes = "none" if expected is None else f"{list(expected)} for these windows"
        raise RecipeError(f"calibration pictures are {list(pixels.shape)}; the model takes {takes}")
