"""Which of its exact equivalents a target stores for a weight tree: the smallest that it runs.

A target prices a leaf: the bits that it stores for it, or why it cannot. Structure is kept only where it is smaller
than its fold in that target; every fold is recorded with its reason. Works on the meta device, where nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from exporter.artifact import Decision
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, Weight, describe

Price = Callable[[Weight], int | str]  # a leaf to bits, or to the reason why the target cannot store it

LABEL_BITS = 32


@dataclass(frozen=True)
class Choice:
    """A tree that a target stores, its bits, and what was folded on the way (nothing: native)."""

    weight: Weight
    bits: int
    folds: tuple[str, ...] = ()


def decide(weight: Weight, site: str, price: Price) -> tuple[Weight, Decision]:
    """Choose what a target stores for a site, and say why.

    Args:
        weight: The model's tree.
        site: Its name.
        price: The target's bits per leaf. It must have a price for a Dense.
    """
    choice = smallest(weight, price)
    reason = "; ".join(choice.folds) or "runs as it is"
    decision = Decision(
        site=site, shape=weight.shape, tree=describe(weight), stored=describe(choice.weight),
        native=not choice.folds, reason=reason, bytes=-(-choice.bits // 8),
    )  # fmt: skip
    return choice.weight, decision


def smallest(weight: Weight, price: Price) -> Choice:
    """The smallest equivalent that a target runs; of two equal ones, the one with more structure."""
    kept = _structure(weight, price)
    if isinstance(kept, Choice):
        if isinstance(weight, Dense):
            return kept
        if isinstance(weight, LowBit):  # wider codes are never smaller; shorter groups are where the last one is padded
            return min([kept, *_shorter_groups(weight, kept, price)], key=lambda choice: choice.bits)
    why = kept if isinstance(kept, str) else f"its structure would take {-(-kept.bits // 8)} bytes"
    choices = [kept] if isinstance(kept, Choice) else []
    for fold in _equivalents(weight):
        bits = price(fold)
        if not isinstance(bits, str):
            choices.append(Choice(fold, bits, (f"{describe(weight)} stored as {describe(fold)}: {why}",)))
    best = min(choices, key=lambda choice: choice.bits)
    return replace(best, weight=Dense(weight.dense())) if _is_placeholder(best.weight, weight) else best


def _shorter_groups(weight: LowBit, kept: Choice, price: Price) -> Iterator[Choice]:
    """The same codes with scales repeated for shorter groups: a target that pads the last group may store less."""
    for fold in (_regrouped(weight, group) for group in _groups(weight) if group < weight.group):
        bits = price(fold)
        if not isinstance(bits, str):
            why = f"whole groups of {weight.group} would take {-(-kept.bits // 8)} bytes"
            yield Choice(fold, bits, (f"{describe(weight)} stored as {describe(fold)}: {why}",))


def _is_placeholder(chosen: Weight, weight: Weight) -> bool:
    """Whether a fold still lacks its values: a dense fold is priced by its shape, and decoded only when chosen."""
    return isinstance(chosen, Dense) and chosen.values.is_meta and chosen is not weight


def _structure(weight: Weight, price: Price) -> Choice | str:
    """The tree itself with its children at their smallest, or why the target cannot have it."""
    match weight:
        case Sum():
            terms = [smallest(term, price) for term in weight.terms]
            return _join(Sum(tuple(term.weight for term in terms)), terms)
        case Product():
            left, right = smallest(weight.left, price), smallest(weight.right, price)
            return _join(Product(left.weight, right.weight), [left, right])
        case Shared():
            rows = smallest(weight.rows, price)
            return _join(Shared(rows.weight, weight.labels), [rows], LABEL_BITS * weight.labels.numel())
        case _:
            bits = price(weight)
            return bits if isinstance(bits, str) else Choice(weight, bits)


def _join(weight: Weight, parts: list[Choice], more_bits: int = 0) -> Choice:
    folds = tuple(dict.fromkeys(fold for part in parts for fold in part.folds))
    return Choice(weight, more_bits + sum(part.bits for part in parts), folds)


def _equivalents(weight: Weight) -> Iterator[Weight]:
    """Exact stand-ins for a tree, apart from itself."""
    if isinstance(weight, LowBit):
        yield from _other_low_bits(weight)
    if isinstance(weight, Sparse) and isinstance(weight.kept, LowBit):
        kept = weight.kept  # zero points that are halves are no codes; twice as wide they are
        widths = (_widened(kept, bits) if bits > kept.bits else kept for bits in range(kept.bits, 9))
        filled = next((found for found in (_filled(weight, wide) for wide in widths) if found is not None), None)
        if filled is not None:
            yield filled
            yield from _other_low_bits(filled)
    if not isinstance(weight, Dense):
        yield Dense(torch.empty(weight.shape, device="meta"))


def _other_low_bits(weight: LowBit) -> Iterator[LowBit]:
    """The same numbers in wider codes, or with scales repeated for shorter groups."""
    groups = _groups(weight)
    for bits in range(weight.bits, 9):
        wide = weight if bits == weight.bits else _widened(weight, bits)
        if bits > weight.bits:
            yield wide
        for group in groups:
            yield _regrouped(wide, group)


def _groups(weight: LowBit) -> list[int]:
    """Group sizes that runtimes have, into which this weight's groups divide."""
    sizes = [256, 128, 64, 32, 16]
    one_scale_a_row = weight.group >= weight.shape[1]  # any group repeats it
    return [size for size in sizes if one_scale_a_row or (size < weight.group and weight.group % size == 0)]


def _widened(weight: LowBit, bits: int) -> LowBit:
    """Codes of more bits, moved so that the middle stays the middle; zero points that are halves become whole."""
    zeros = weight.zeros
    if _has_halves(weight):  # s (c - z) = s/2 (2c - 2z): twice the codes, around 2^b - 1
        shift = 2 ** (bits - 1) - 2**weight.bits + 1
        return LowBit(weight.codes * 2 + shift, weight.scales / 2, zeros * 2 + shift, bits, weight.group)
    shift = 2 ** (bits - 1) - 2 ** (weight.bits - 1)
    is_unknown = zeros.is_meta and not weight.has_whole_zeros
    return LowBit(weight.codes + shift, weight.scales, zeros + shift, bits, weight.group, fractional=is_unknown)


def _has_halves(weight: LowBit) -> bool:
    """Whether zero points are halves, some or all, and none is finer; of placeholders, the single one of 1 bit."""
    zeros = weight.zeros
    if zeros.is_meta:
        return weight.bits == 1 and zeros.shape == (1, 1)
    return bool((zeros * 2 % 1 == 0).all() and (zeros % 1 != 0).any())


def _regrouped(weight: LowBit, group: int) -> LowBit:
    """Shorter groups with the same scales: exact."""
    count = -(-weight.shape[1] // group)
    repeats = -(-min(weight.group, weight.shape[1]) // group)

    def spread(grid: torch.Tensor) -> torch.Tensor:
        return grid if grid.shape == (1, 1) and weight.groups > 1 else grid.repeat_interleave(repeats, dim=1)[:, :count]

    zeros = weight.zeros if weight.zeros.shape == (1, 1) else spread(weight.zeros)
    return replace(weight, scales=spread(weight.scales), zeros=zeros, group=group)


def _filled(weight: Sparse, kept: LowBit) -> LowBit | None:
    """N:M codes with the zero point at pruned places: exact where zero points are whole numbers."""
    zeros = kept.zeros
    if not kept.has_whole_zeros or kept.group * weight.m % weight.n or kept.group % weight.n:
        return None
    group = kept.group * weight.m // weight.n
    codes = zeros.to(torch.uint8).expand(weight.shape[0], zeros.shape[1])
    repeats = weight.shape[1] if zeros.shape == (1, 1) else group
    codes = codes.repeat_interleave(repeats, dim=1)[:, : weight.shape[1]].contiguous()
    codes = codes.scatter(1, weight.columns, kept.codes)
    return LowBit(codes, kept.scales, kept.zeros, kept.bits, group)
