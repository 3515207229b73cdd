"""What a model becomes here: a decision per site, exact bytes, and how far the numbers may move."""

from __future__ import annotations

import math
from collections.abc import Sequence

from exporter.artifact import Budget
from exporter.errors import TargetError
from exporter.model import Layer, Model
from exporter.plugins import Plan, refuse_generic, refuse_pictures
from exporter.weights import LowBit, Weight, children
from targets.onnxruntime_mobile import package, prices
from targets.onnxruntime_mobile.ops import cache_width

FLOAT_STEP = 2.0**-24  # of a float32 rounding, relative
FLOAT_FLOOR = 1e-5
ONE_IN_A_THOUSAND = 3.09  # standard deviations of a normal distribution


def plan(model: Model, context: int) -> Plan:
    """Decide what is stored for every site; reads no value of a model on the meta device.

    Raises:
        TargetError: the context is not one that the model has.
    """
    refuse_pictures("onnxruntime-mobile", model)
    refuse_generic("onnxruntime-mobile", model)
    longest = model.architecture.positions
    if not 1 <= context <= longest:
        raise TargetError(f"a context of {context} tokens is not possible; this model takes 1 to {longest}")
    looked_up = package.looked_up(model)
    decided = {site: prices.decide(weight, site, site in looked_up) for site, weight in model.weights.items()}
    weights = {site: weight for site, (weight, _) in decided.items()}
    decisions = tuple(decision for _, decision in decided.values())
    whole = Plan(weights, decisions, 0, context, _notes(model, weights))
    return Plan(weights, decisions, _other_bytes(model, whole), context, whole.notes)


def budget(model: Model, plan: Plan) -> Budget:
    """How far the outputs may lie from the model's: rounding of activations to int8, and float32's own."""
    uses = package.build(model, plan)[0].products  # a lookup alone is exact
    low_bit = [leaf for leaf in uses if isinstance(leaf, LowBit)]
    eights = math.sqrt(sum(_int8_error(leaf) ** 2 for leaf in low_bit))
    floats = float_error(uses)
    blocks = ", ".join(str(group) for group in sorted({leaf.group for leaf in low_bit}))
    rounding = _EIGHTS.format(len(low_bit), blocks, eights) if low_bit else "activations stay float32. "
    return Budget(relative_l2=math.hypot(eights, floats), reason=rounding + _FLOATS.format(floats))


def float_error(products: Sequence[Weight]) -> float:
    """Relative error of float32 alone: every product's sums run in it, here and in the reference."""
    return max(FLOAT_FLOOR, 2 * FLOAT_STEP * math.sqrt(sum(leaf.shape[1] for leaf in products)))


def _int8_error(leaf: LowBit) -> float:
    """Relative error that one leaf gives to its output, exceeded at one position in a thousand."""
    per_number = math.sqrt(leaf.group) / (127 * math.sqrt(12))
    return per_number * math.exp(ONE_IN_A_THOUSAND / math.sqrt(min(leaf.shape)))


_EIGHTS = (
    "MatMulNBits at accuracy_level 4 rounds its activations to int8 in blocks, in steps of max|x| / 127: a rounding "
    "error of max|x| / (127 sqrt(12)) per number, rms. A block of B has max|x| <= sqrt(B) rms(x) (one number holds "
    "everything), so a leaf's input moves by at most e = sqrt(B) / (127 sqrt(12)) of its norm. A matrix that stretches "
    "error and signal alike keeps that ratio on average; over r = min(out, in) numbers it scatters as F(r, r), whose "
    "logarithm has variance 4/r, so at one position in a thousand it is e exp(3.09 / sqrt(r)). Errors of the {} leaves "
    "on the way (blocks of {}) are independent and add in quadrature: {:.2e}. "
)
_FLOATS = (
    "Float32: 2^-24 per addition on both sides, in quadrature over the columns of all leaves, at least 1e-5: {:.1e}."
)


ENCODER = (
    "an encoder: input_ids [batch, tokens] are whole texts of one length, special tokens included, without padding; "
    "last_hidden_state is [batch, tokens, hidden]; there is no cache, and onnxruntime-genai is not for it"
)


def _leaves(weight: Weight) -> list[Weight]:
    below = children(weight)
    return [leaf for child in below for leaf in _leaves(child)] if below else [weight]


def _other_bytes(model: Model, plan: Plan) -> int:
    """Everything but the sites: norms, tables, alignment, the graph, genai_config.json. Exact."""
    ops, graph = package.build(model, plan)
    config = package.genai_config(model.architecture, plan.context) if model.architecture.causal else ""
    files = ops.constants.size + len(package.serialized(graph)) + len(config)
    return files - sum(decision.bytes for decision in plan.decisions)


def _notes(model: Model, weights: dict[str, Weight]) -> tuple[str, ...]:
    found = _paddings(model.architecture.layers) if model.architecture.causal else [ENCODER]
    shifted = sorted(site for site, weight in weights.items() if any(map(_is_shifted, _leaves(weight))))
    if shifted:
        found.append(f"fractional zero points run as a second, small product, at full speed: {', '.join(shifted)}")
    return tuple(found)


def _paddings(layers: tuple[Layer, ...]) -> list[str]:
    """What is padded for GroupQueryAttention, layers of equal widths together."""
    alike: dict[tuple[int, int, int], list[str]] = {}
    for index, layer in enumerate(layers):
        alike.setdefault((layer.head_dim, layer.value_dim, cache_width(layer)), []).append(str(index))
    return [
        f"layers {', '.join(indices)}: heads of {keys} (keys) and {values} (values) channels are padded with zeros to "
        f"{width} around GroupQueryAttention, exactly; weights keep their size, the cache has the padded one"
        for (keys, values, width), indices in alike.items() if not keys == values == width
    ]  # fmt: skip


def _is_shifted(weight: Weight) -> bool:
    return isinstance(weight, LowBit) and not weight.has_whole_zeros
