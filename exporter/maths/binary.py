"""SPBO: a matrix becomes two levels per row and block, with N of every M neighbours kept.

A row w of a block keeps the places m (0 or 1) with signs b (-1 or 1). With p = m * b it is approximated by
w' = alpha * p + mu * q, where q = m in form A (pruned places are 0), q = 1 in form B (pruned places are mu) and q = 0
in the symmetric form (there is no mu). The error is E = (w - w') S (w - w')^T, S the block of the damped Gram matrix H
of the inputs; for given m and b the best alpha and mu are the solution of two linear equations.

Source: PBS2P, arXiv:2502.01705, after its description; block structure and scores of BiLLM, arXiv:2402.04291. Differs:
alpha and mu are solved for together, exactly, where the paper alternates between them; what a block loses is made up
for by the columns behind it exactly, not by the diagonal of U alone; `gain` and the signs that are taken anew are ours;
channels that no calibration token used keep their weights. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from exporter.maths.gptq import damped, inverse_factor
from exporter.maths.pruning import index_bits, places_of_mask, without_cheapest
from exporter.maths.rounding import LARGEST, SMALLEST, finite
from exporter.weights import LowBit, Sparse, Sum, Weight

Form = Literal["A", "B", "symmetric"]
Metric = Literal["hessian", "gain", "magnitude", "wanda"]
Salience = Literal["column", "weight"]

DEGENERATE = 1e-10  # of the determinant, relative: all kept signs are equal, and alpha and mu cannot be told apart
ZERO_STEP = 2.0**-10  # zero points are multiples of it, so that float32 decodes every level without rounding
SALIENT_SHARE = 1.1  # of the weights, in the papers' count of bits: a tenth of the columns is stored twice


@dataclass(frozen=True)
class Plan:
    """How a matrix is binarized.

    Args:
        n: Kept of every m neighbours along `in`; n = m prunes nothing.
        m: Neighbours in a group; divides `in`, but for n = m without salient columns.
        form: Pruned places are 0 (A), or mu (B), or 0 with mu = 0 (symmetric).
        metric: What dropping a weight costs; see `cost`.
        sign_rounds: How often, after each step, signs are taken anew in the rows where that lowers the error.
        salient: Of every m, of those that a row keeps, how many have their error binarized once more; 0..n.
        salience: Which ones; see `salient`.
        block: Columns that share alpha and mu; a multiple of m.
        damp: Added to the diagonal of the Gram matrix, as a fraction of its mean, > 0.
    """

    n: int
    m: int
    form: Form = "A"
    metric: Metric = "hessian"
    sign_rounds: int = 0
    salient: int = 0
    salience: Salience = "column"
    block: int = 128
    damp: float = 1e-2


@dataclass(frozen=True, eq=False)
class Block:
    """Some columns of a matrix, and what weighs their errors.

    Args:
        weight: [out, columns], float64, made up for the blocks in front.
        gram: [columns, columns], float64: S.
        pivots: [columns], the diagonal of U there; pivots^2 is what is left of the inverse of H.
    """

    weight: Tensor
    gram: Tensor
    pivots: Tensor

    def error(self, values: Tensor) -> Tensor:
        """E of an approximation, by row: [out, 1]."""
        lost = self.weight - values
        return ((lost @ self.gram) * lost).sum(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Fit:
    """A binarized block.

    Args:
        mask: [out, columns], bool: what is kept.
        signs: [out, columns], float64, -1 or 1; those of pruned places mean nothing.
        alpha, mu: [out, 1], float64; alpha may be negative.
        form: As in `Plan`.
    """

    mask: Tensor
    signs: Tensor
    alpha: Tensor
    mu: Tensor
    form: Form

    def dense(self) -> Tensor:
        """The approximation, [out, columns]."""
        return self.alpha * (self.mask * self.signs) + self.mu * _offset(self.mask, self.form)


@dataclass(frozen=True, eq=False)
class Stored:
    """A fit in the numbers that a file holds: `steps * (codes - zeros)`.

    Args:
        mask: As in `Fit`.
        codes: [out, columns], uint8: 0, 1 (pruned) or 2 in form B, else 0 or 1.
        steps, zeros: [out, 1], float64, numbers that float16 holds; steps > 0.
        form: As in `Plan`.
    """

    mask: Tensor
    codes: Tensor
    steps: Tensor
    zeros: Tensor
    form: Form

    def dense(self) -> Tensor:
        """What is decoded, [out, columns]."""
        levels = self.steps * (self.codes - self.zeros)
        return levels if self.form == "B" else levels * self.mask


def binarize(weight: Tensor, gram: Tensor, plan: Plan) -> Weight:
    """Binarize a matrix block after block; the columns behind a block make up for what it loses.

    With the inverse of H as U^T U, the columns R behind a block b with error E_b change by -E_b U_bb^-1 U_bR, which
    minimises tr(E H E^T) over them.

    Args:
        weight: [out, in], any float type; computed in float64, where gram lies.
        gram: [in, in], sum of x x^T over tokens.
        plan: How.

    Returns:
        A Sparse of 1-bit codes, a zero point per group or, symmetric, one for all; in form B, 2-bit codes; where
        n = m, a plain 1-bit matrix. With salient columns, a Sum of it and a second Sparse of 1-bit codes.

    Raises:
        WeightError: a weight is not finite, or gram is no Gram matrix.
    """
    values = finite(weight).to(gram.device, torch.float64, copy=True)
    hessian, upper = damped(gram, plan.damp), inverse_factor(gram, plan.damp)
    layers: list[tuple[Stored, ...]] = []  # by block: the first binarization, and that of salient columns
    for start in range(0, values.shape[1], plan.block):
        here, behind = slice(start, start + plan.block), slice(start + plan.block, None)
        block = Block(values[:, here], hessian[here, here], upper.diagonal()[here])
        layers.append(binarize_block(block, plan))
        lost = block.weight - sum(layer.dense() for layer in layers[-1])
        carried = torch.linalg.solve_triangular(upper[here, here], lost, upper=True, left=False)
        values[:, behind] -= carried @ upper[here, behind]
    first, *second = zip(*layers)
    terms = [_node(first, plan.n, plan), *(_node(layer, plan.salient, plan) for layer in second)]
    return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def binarize_block(block: Block, plan: Plan) -> tuple[Stored, ...]:
    """A block in stored numbers; and once more, where there are salient columns, what these lose."""
    first = stored(stepwise(block, plan))
    if not plan.salient:
        return (first,)
    rest = replace(block, weight=block.weight - first.dense())
    mask = salient(block, first.mask, plan)
    form = _form_of_one_bit(plan.form)
    mean = (rest.weight * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True) if form == "A" else 0.0
    return first, stored(resigned(rest, fitted(rest, mask, signs(rest.weight - mean), form), plan.sign_rounds))


def stepwise(block: Block, plan: Plan) -> Fit:
    """Drop one more of every m, m - n times, with alpha and mu solved for after each; then signs may be taken anew.

    Without sign rounds, and with costs that do not depend on the fit (all but `gain`), the last solution is that of
    the last mask alone: the steps change nothing.
    """
    mean = block.weight.mean(1, keepdim=True) * (plan.form != "symmetric")
    centred = block.weight - mean
    mask = torch.ones_like(block.weight, dtype=torch.bool)
    if plan.n == plan.m:  # nothing is pruned, and form B is form A
        whole = fitted(block, mask, signs(centred), _form_of_one_bit(plan.form))
        return resigned(block, whole, plan.sign_rounds)
    fit = Fit(mask, signs(centred), centred.abs().mean(1, keepdim=True), mean, plan.form)
    for _ in range(plan.m - plan.n):
        mask = without_cheapest(fit.mask, cost(block, fit, plan.metric), plan.m)
        fit = resigned(block, fitted(block, mask, fit.signs, plan.form), plan.sign_rounds)
    return fit


def fitted(block: Block, mask: Tensor, signs: Tensor, form: Form) -> Fit:
    """The alpha and mu of the least error, for given mask and signs.

        [ pSp  pSq ] [alpha]   [ wSp ]
        [ pSq  qSq ] [ mu  ] = [ wSq ]

    Where all kept signs of a row are equal, or q is 0, mu is 0 and alpha alone is fitted.
    """
    p, q = mask * signs, _offset(mask, form)
    ps, qs = p @ block.gram, q @ block.gram
    a, c, d = (_dots(*pair) for pair in ((ps, p), (ps, q), (qs, q)))
    e, f = _dots(ps, block.weight), _dots(qs, block.weight)
    det = a * d - c * c
    is_one = det <= DEGENERATE * a * d
    alpha = torch.where(is_one, e / a, (d * e - c * f) / det)
    return Fit(mask, signs, alpha, torch.where(is_one, 0.0, (a * f - c * e) / det), form)


def resigned(block: Block, fit: Fit, rounds: int) -> Fit:
    """Move every kept weight to the nearer level and fit again, in the rows where that lowers the error."""
    for _ in range(rounds):
        nearer = signs(block.weight - fit.mu)  # a negative alpha turns them all, and the fit turns it back
        tried = fitted(block, fit.mask, nearer, fit.form)
        better = block.error(tried.dense()) < block.error(fit.dense())  # [out, 1]
        pairs = ((tried.signs, fit.signs), (tried.alpha, fit.alpha), (tried.mu, fit.mu))
        taken, alpha, mu = (torch.where(better, new, old) for new, old in pairs)
        fit = Fit(fit.mask, taken, alpha, mu, fit.form)
    return fit


def cost(block: Block, fit: Fit, metric: Metric) -> Tensor:
    """What dropping each weight costs, [out, columns].

    `hessian`, w^2 / U_jj^2, is the paper's: what removing a weight costs a matrix that keeps the others as they are.
    `magnitude` is |w|, `wanda` |w| times the norm of its input. `gain`, ours, is what is lost by a pruned weight over
    what is lost by a binarized one: ((w - pruned)^2 - (w - binarized)^2) / U_jj^2, of the fit at hand.
    """
    weight = block.weight
    if metric == "magnitude":
        return weight.abs()
    if metric == "wanda":
        return weight.abs() * block.gram.diagonal().sqrt()
    if metric == "hessian":
        return (weight / block.pivots).square()
    pruned = fit.mu if fit.form == "B" else torch.zeros_like(fit.mu)
    binarized = fit.mu + fit.alpha * fit.signs
    return ((weight - pruned).square() - (weight - binarized).square()) / block.pivots.square()


def salient(block: Block, kept: Tensor, plan: Plan) -> Tensor:
    """Of what each row keeps, what would cost most to remove: [out, columns], bool, nested in `kept`.

    Source: salient columns of BiLLM, arXiv:2402.04291, by the sum over all rows of w^2 / U_jj^2. Differs: as many in
    every group of m, and none that the row has dropped, so that both binarizations and their sum are N:M. `weight`,
    ours, asks every weight for itself: places are stored row by row anyway, so it takes no more.
    """
    salience = (block.weight / block.pivots).square()
    if plan.salience == "column":
        salience = salience.sum(0).expand_as(kept)
    for _ in range(plan.n - plan.salient):
        kept = without_cheapest(kept, salience, plan.m)
    return kept


def stored(fit: Fit) -> Stored:
    """Round a fit to what a file holds: steps and zero points that are float16 numbers, chosen before any error counts.

    A row whose step would be lost beside mu keeps mu alone, all codes equal; a row of nothing decodes to exact zeros,
    or, symmetric, to the smallest step.
    """
    middle = 1.0 if fit.form == "B" else 0.5
    steps = _half(fit.alpha.abs() / middle)
    plus = fit.signs * signs(fit.alpha)  # a negative alpha is a positive one with all signs turned
    codes = 1 + plus * fit.mask if fit.form == "B" else middle * (1 + plus)
    if fit.form == "symmetric":
        return Stored(fit.mask, codes.to(torch.uint8), steps.clamp(min=SMALLEST), torch.full_like(steps, 0.5), fit.form)
    zeros = _half((middle - fit.mu / steps).div(ZERO_STEP).round() * ZERO_STEP)
    is_flat = steps <= fit.mu.abs() * ZERO_STEP / 2  # a zero point would need more digits than float16 has
    codes = torch.where(is_flat, (fit.mu > 0).double(), codes).to(torch.uint8)
    steps = torch.where(is_flat, _half(fit.mu.abs()), steps).clamp(min=SMALLEST)
    return Stored(fit.mask, codes, steps, torch.where(is_flat, (fit.mu < 0).double(), zeros), fit.form)


def signs(values: Tensor) -> Tensor:
    """-1 or 1; 1 for 0, which would be a third level."""
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)


def file_bits(n: int, m: int, block: int = 128, form: Form = "A", salient: int = 0, grid_bits: int = 16) -> float:
    """Bits per weight of a file that holds everything, but for the padding of rows to whole bytes.

    Codes n/m, which places are kept ceil(log2 C(m, n))/m, and a step and a zero point per block, 2 * grid_bits / block;
    symmetric, the step alone. Form B: 2 bits in place of codes and places. Without pruning, n = m: 1 bit. Salient
    columns are once more the same, `salient` of m.

    Args:
        n: Kept of m.
        m: Neighbours in a group.
        block: Columns that share a step and a zero point.
        form: As in `Plan`.
        salient: As in `Plan`.
        grid_bits: Of a step, and of a zero point.
    """
    codes = 1.0 if n == m else 2.0 if form == "B" else (n + index_bits(n, m)) / m
    grid = (1 if form == "symmetric" else 2) * grid_bits / block
    return codes + grid + (file_bits(salient, m, block, _form_of_one_bit(form), 0, grid_bits) if salient else 0.0)


def paper_bits(n: int, m: int) -> float:
    """The "W-bits" of PBS2P and STBLLM: 1.1 n/m. Signs alone, a tenth of the columns twice; no places, no scales."""
    return SALIENT_SHARE * n / m


def _node(blocks: tuple[Stored, ...], n: int, plan: Plan) -> Weight:
    """The tree of a matrix's blocks, n of m kept."""
    mask, codes, steps, zeros = (
        torch.cat([getattr(block, name) for block in blocks], dim=1).cpu()
        for name in ("mask", "codes", "steps", "zeros")
    )
    group = min(plan.block, mask.shape[1])
    grid = steps.float(), torch.full((1, 1), 0.5) if plan.form == "symmetric" else zeros.float()
    if blocks[0].form == "B":
        return LowBit(codes, *grid, 2, group)
    if n == plan.m:
        return LowBit(codes, *grid, 1, group)
    kept = LowBit(codes[mask].view(len(mask), -1), *grid, 1, group * n // plan.m)
    return Sparse(kept, places_of_mask(mask, plan.m), n, plan.m)


def _form_of_one_bit(form: Form) -> Form:
    """The form of a matrix without a middle level."""
    return "A" if form == "B" else form


def _offset(mask: Tensor, form: Form) -> Tensor:
    """q: where mu is added, [out, columns], float64."""
    if form == "A":
        return mask.double()
    return torch.full_like(mask, form == "B", dtype=torch.float64)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Row by row: [out, 1]."""
    return (left * right).sum(1, keepdim=True)


def _half(values: Tensor) -> Tensor:
    """The nearest float16, not beyond its largest."""
    return values.clamp(-LARGEST, LARGEST).half().to(values.dtype)
