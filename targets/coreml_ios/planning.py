"""What Core ML will store for a model, and how far float16 may carry it: known without coremltools."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.artifact import Budget, Decision
from exporter.equivalents import decide
from exporter.errors import TargetError
from exporter.model import Model
from exporter.plugins import Plan, refuse_generic, refuse_pictures
from exporter.weights import LowBit, Sparse, Weight, nodes
from targets.coreml_ios import roundings
from targets.coreml_ios.encoding import Form, form, leaves, price, with_stored_scales

LEAST = 2.0**-24  # the least float16 over 0
ENCODER = "an encoder: inputIds are a whole text, special tokens included; out comes lastHiddenState; no states"
BLOB = 128  # bytes of a blob beside its data: its record, and zeros up to a multiple of 64
BLOBS = 3  # of a leaf, at most: codes, scales, zero points or mask or table
OPERATIONS = 22_500  # bytes of a layer's operations in model.mlmodel (measured: 22,100 to 22,900; OPT 13,100)
SPARSE_OPERATIONS = 750  # more of them for a sparse leaf, which takes two (measured: 471 over blocks, 724 over tables)
HALF_ULP = 2.0**-11  # relative: one rounding to float16
IOS, TABLES_IOS = {"ios": "18.0", "macos": "15.0"}, {"ios": "18.2", "macos": "15.2"}


def plan(model: Model, context: int) -> Plan:
    """Decide, site by site.

    Raises:
        TargetError: the context is not possible, or heads that are turned have an odd size.
    """
    refuse_pictures("coreml-ios", model)
    refuse_generic("coreml-ios", model)
    _check(model, context)
    decided = [_decide(site, weight) for site, weight in model.weights.items()]
    weights = {decision.site: weight for weight, decision in decided}
    decisions = tuple(decision for _, decision in decided)
    return Plan(weights, decisions, _other_bytes(model, weights, context), context, _notes(model, weights))


def budget(model: Model, plan: Plan) -> Budget:
    """How far float16 arithmetic may carry the logits: each operation on the way rounds its output once.

    First order: no block is taken to enlarge the relative error of what it is given, every rounding is taken to push
    the same way, and sums inside an operation are taken to be in float32, as the reference executor has them.
    """
    count = roundings.count(model.with_weights(plan.weights))
    reason = (
        f"float16 activations: {count} roundings on the longest way ({len(model.architecture.layers)} layers), each at "
        "most 2^-11, all one way, to first order; sums inside an operation in float32, which Apple's Neural Engine "
        "does not promise"
    )
    return Budget(relative_l2=count * HALF_ULP, reason=reason)


def requires(weights: Mapping[str, Weight]) -> dict[str, str]:
    """The systems that run what is stored: tables with scales were mended in macOS 15.2."""
    return TABLES_IOS if _has_scaled_tables(weights) else IOS


def _decide(site: str, weight: Weight) -> tuple[Weight, Decision]:
    stored, decision = decide(weight, site, price)
    stored, change = with_stored_scales(stored)
    reason = decision.reason
    if change:
        reason += f"; scales rounded once to float16, by at most {change:.1e} of a scale"
    if _is_padded(stored):
        reason += "; the last group of a row padded to a whole one, with zero channels, counted"
    return stored, decision.model_copy(update={"reason": reason})


def _check(model: Model, context: int) -> None:
    positions = model.architecture.positions
    if not 1 <= context <= positions:
        raise TargetError(f"a context of {context} tokens is not possible for coreml-ios; possible: 1 to {positions}")
    odd = [layer.head_dim for layer in model.architecture.layers if model.architecture.rope and layer.head_dim % 2]
    if odd:
        raise TargetError(f"heads of {odd[0]} channels cannot be turned by position; their number must be even")


def _other_bytes(model: Model, weights: Mapping[str, Weight], context: int) -> int:
    """Norms, biases (a zero one where a matrix has none), rotary tables, and what surrounds every blob."""
    architecture = model.architecture
    head_sizes = {layer.head_dim for layer in architecture.layers} if architecture.rope else set()
    rope = sum(2 * context * size // 2 for size in head_sizes)
    widths = {weight.shape[0] for site, weight in weights.items() if f"{site}.bias" not in model.tensors}
    numbers = rope + sum(widths) + sum(tensor.numel() for tensor in model.tensors.values())
    stored = [leaf for site, weight in weights.items() for _, leaf in leaves(site, weight)]
    operations = OPERATIONS * (len(architecture.layers) + 1)
    operations += SPARSE_OPERATIONS * sum(isinstance(leaf, Sparse) for leaf in stored)
    blobs = BLOBS * len(stored)
    blobs += 2 * len(head_sizes) + len(widths) + len(model.tensors)
    return 2 * numbers + BLOB * blobs + operations


def _notes(model: Model, weights: Mapping[str, Weight]) -> tuple[str, ...]:
    system = requires(weights)
    needs = f"needs iOS {system['ios']} or macOS {system['macos']}"
    if not model.architecture.causal:
        return f"{needs}: its attention, and the types of its weights", ENCODER, *_raised_epsilon(model)
    notes = [f"{needs}: a stateful program", *_raised_epsilon(model)]
    layers = model.architecture.layers
    if len({(layer.kv_heads, layer.head_dim, layer.value_dim) for layer in layers}) > 1:
        notes.append("keyCache and valueCache are as wide as the widest layer; narrower layers leave the rest zero")
    return tuple(notes)


def _raised_epsilon(model: Model) -> list[str]:
    """Said where float16 has no such number, and another one is added to variances."""
    eps = model.architecture.norm_eps
    return [f"norms add {LEAST:.0e}, float16's least number, where the model adds {eps:g}"] if eps < LEAST / 2 else []


def _is_padded(weight: Weight) -> bool:
    return any(isinstance(node, LowBit) and node.groups > 1 and node.shape[1] % node.group for node in nodes(weight))


def _has_scaled_tables(weights: Mapping[str, Weight]) -> bool:
    forms = [form(node) for weight in weights.values() for node in nodes(weight) if isinstance(node, LowBit)]
    return any(isinstance(found, Form) and found.style == "scaled table" for found in forms)
