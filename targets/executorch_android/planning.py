"""What ExecuTorch stores for a model, and how far its numbers may lie: decided before the slow work."""

from __future__ import annotations

import math

from exporter import adapters
from exporter.artifact import Budget, Decision
from exporter.equivalents import decide
from exporter.errors import TargetError
from exporter.model import Model
from exporter.plugins import Plan, refuse_pictures
from exporter.weights import Dense, LowBit, Weight, describe, nodes
from targets.executorch_android import layout, spoken
from targets.executorch_android.uses import Uses

GRAPH_BYTES, LAYER_BYTES = 8_000, 11_000  # program and delegates without constants; measured on 1 to 8 layers
MATRIX_BYTES = 5_000  # of a model that only transformers knows, for each matrix with what surrounds it
ROUNDED_SCALES = "block scales are rounded to bfloat16, the only type that XNNPACK has for them"
ONCE = "codes are stored once, for the lookup and for XNNPACK"
ENCODER = "an encoder: forward takes a whole text, special tokens included, and gives its hidden states; no cache"
UNCACHED = "traced from transformers: nothing is cached, every call takes the whole text so far"
TWICE = "stored twice: XNNPACK pads its rows to whole groups, which the lookup cannot read"

INT8_STEP = 1 / (127.5 * math.sqrt(12))  # RMS error of rounding to int8, as a share of the row's maximum
BFLOAT16_STEP = 2**-9 / math.sqrt(3)  # RMS error of rounding a scale to bfloat16, as a share of it
ATTENUATION = 2.0  # on stories260K: 1.0 to 1.8 in the worst row of most leaves, 4 for one in seven (values)
FLOAT_ERROR = 1e-5


def plan(model: Model, context: int) -> Plan:
    """Decide site by site.

    Raises:
        TargetError: the context is longer than the model's positions, or too short to vary.
    """
    refuse_pictures("executorch-android", model)
    _check(model, context)
    uses = Uses(model)
    chosen = {site: _decide(site, weight, uses) for site, weight in model.weights.items()}
    return Plan(
        weights={site: weight for site, (weight, _) in chosen.items()},
        decisions=tuple(decision for _, decision in chosen.values()),
        other_bytes=_other_bytes(model, context),
        context=context,
        notes=_notes(model),
    )


def _check(model: Model, context: int) -> None:
    longest = model.architecture.positions
    if not 2 <= context <= longest:
        raise TargetError(f"a context of {context} tokens is not possible; this model takes 2 to {longest}")


def _decide(site: str, weight: Weight, uses: Uses) -> tuple[Weight, Decision]:
    if site in uses.lookups:
        return _decide_table(site, weight, is_tied=site in uses.tied)
    stored, decision = decide(weight, site, layout.price_product)
    digits = layout.in_digits(weight)
    if digits is not weight:
        in_digits, other = decide(digits, site, layout.price_product)
        if other.bytes < decision.bytes:
            reason = "XNNPACK has these codes only in groups of 4 bits: stored as two 4-bit digits, exactly"
            stored, decision = (
                in_digits,
                other.model_copy(update={"tree": describe(weight), "native": False, "reason": _joined(reason, other)}),
            )
    if any(layout.rounds_scales(node) for node in nodes(stored)):
        decision = _because(decision, ROUNDED_SCALES)
    return stored, decision


def _decide_table(site: str, weight: Weight, is_tied: bool) -> tuple[Weight, Decision]:
    """A matrix whose rows are looked up; there is no lookup in a product or a sum."""
    price = layout.price_tied if is_tied else layout.price_lookup
    if not isinstance(weight, Dense | LowBit):
        folded, decision = decide(Dense(weight.dense()), site, price)
        reason = f"{describe(weight)} stored dense: rows are looked up in codes or floats only"
        return folded, decision.model_copy(update={"tree": describe(weight), "native": False, "reason": reason})
    stored, decision = decide(weight, site, price)
    if is_tied and isinstance(stored, LowBit):
        decision = _because(decision, ONCE if layout.is_shareable(stored) else TWICE)
        return stored, _because(decision, ROUNDED_SCALES) if layout.rounds_scales(stored) else decision
    return stored, _because(decision, "the head reads the same constant") if is_tied else decision


def _because(decision: Decision, reason: str) -> Decision:
    return decision.model_copy(update={"reason": f"{decision.reason}; {reason}"})


def _joined(reason: str, decision: Decision) -> str:
    return reason if decision.native else f"{reason}; {decision.reason}"


def _other_bytes(model: Model, context: int) -> int:
    layers = model.architecture.layers
    vectors = 4 * sum(tensor.numel() for tensor in model.tensors.values())
    heads = {layer.head_dim for layer in layers} if model.architecture.rope else set()
    tables = sum(4 * (context * width + width * width) for width in heads)  # cosines and sines, the quarter turn
    positions = 0 if model.architecture.rope else 8 * context
    graph = LAYER_BYTES * len(layers) if model.architecture.config is None else MATRIX_BYTES * len(model.weights)
    return vectors + tables + positions + GRAPH_BYTES + graph


def _notes(model: Model) -> tuple[str, ...]:
    notes = ["runs on the stock ExecuTorch 1.4.1 AAR: XNNPACK, LLM and quantized kernels, no operator of ours"]
    unequal = [i for i, layer in enumerate(model.architecture.layers) if layer.value_dim != layer.head_dim]
    if unequal:
        which = ", ".join(map(str, unequal))
        notes.append(f"layers {which}: heads of keys and values are padded to one width with zeros, which is exact")
    if model.architecture.config is not None:
        notes.append(UNCACHED)
    if not model.architecture.causal:
        notes.append(ENCODER)
    elif spoken.tokenizer(model.files) is not None:
        notes.append(f"ExecuTorch's LLM runners should be given {spoken.FILE}: with tokenizer.json they drop spaces")
    return tuple(notes)


def budget(model: Model, stored: Plan) -> Budget:
    """The relative L2 error of the logits, from what each stored leaf does to its input.

    A leaf with codes rounds each row of its input to int8 between the row's extremes: with crest = maximum / RMS a
    relative error of crest / (127.5 sqrt(12)) of the input. The matrix spreads that error evenly, but may amplify the
    row itself ATTENUATION times less than the average direction. Block scales add 2^-9 / sqrt(3). Leaves are
    independent, and a residual network passes each error on at most as large as it was: they add in quadrature. The
    rest is float32.
    """
    uses = Uses(model)
    gated = _gated_sites(model)
    squares = [
        _leaf_error(leaf, site in gated) ** 2
        for site, weight in stored.weights.items()
        if site in uses.products
        for leaf in nodes(weight)
        if isinstance(leaf, LowBit)
    ]
    if not squares:
        return Budget(relative_l2=FLOAT_ERROR, reason="float32 throughout; sums are taken in another order")
    reason = (
        f"{len(squares)} leaves with int8 rows: each crest/(127.5 sqrt 12), crest twice that of a Gaussian row"
        " (2 sqrt(2 ln n), after a gate 2 ln n, at most sqrt n), on rows that the matrix amplifies half as much as"
        " others; bfloat16 scales 2^-9/sqrt 3; added in quadrature"
    )
    return Budget(relative_l2=math.sqrt(sum(squares)) + FLOAT_ERROR, reason=reason)


def _gated_sites(model: Model) -> set[str]:
    """Sites whose inputs are products of two activations: the down matrix of a gated MLP."""
    if model.architecture.config is not None:
        return set(model.weights)  # unknown: the wider bound
    adapter = adapters.find(model.architecture.family)
    sites = [adapter.mlp_sites(layer) for layer in range(len(model.architecture.layers))]
    return {site.down for site in sites if site.gate is not None}


def _leaf_error(leaf: LowBit, is_gated: bool) -> float:
    """RMS error of a leaf's output, relative to the output.

    The largest of n Gaussians is about sqrt(2 ln n) of their RMS, that of n products of two about ln n; twice that for
    outliers; never more than sqrt(n).
    """
    width = max(2, leaf.shape[1])
    likely = math.log(width) if is_gated else math.sqrt(2 * math.log(width))
    crest = min(2 * likely, math.sqrt(width))
    scales = 0.0 if layout.is_row_wise(leaf) else BFLOAT16_STEP
    return math.hypot(ATTENUATION * crest * INT8_STEP, scales)
