"""CASP: low-rank queries and keys, bits by influence, a budget that holds, and what is refused before the work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from exporter import adapters, calibrate, checkpoint, evaluate, recipe, store
from exporter.calibrate import Calibration, Samples, block_influence
from exporter.compress import find, run
from exporter.compress.casp import CaspConfig, budget_of, predict
from exporter.compress.fasp import FaspConfig
from exporter.compress.quantize import QuantizeConfig
from exporter.compress.step import UNKEPT, Journal, Unkept, layer_sites
from exporter.errors import RecipeError
from exporter.maths import gptq
from exporter.maths.lowrank import truncated
from exporter.maths.rounding import Grid, quantize_rows
from exporter.maths.whitening import balanced, kept_rank, whitened
from exporter.model import Architecture, Layer, Model, Provenance
from exporter.session import TorchSession
from exporter.tokenizer import Tokenizer
from exporter.torch_ops import TorchOps, heads_first
from exporter.weights import Dense, LowBit, Product, Weight, describe, nodes
from tests.checkpoints import only_transformers_knows
from tests.models import LLAMA, OPT, low_bit, random_model, random_unequal

TWO = replace(LLAMA, layers=(Layer(4, 2, 16, 16, 96), Layer(4, 2, 16, 8, 60)))  # grouped queries, unequal widths
OPT_TWO = replace(OPT, layers=(Layer(4, 4, 16, 16, 96), Layer(4, 4, 16, 8, 60)))
FOUR = replace(LLAMA, layers=(Layer(4, 2, 16, 16, 96),) * 4)
FAMILIES = pytest.mark.parametrize("architecture", [TWO, OPT_TWO], ids=lambda a: a.family)
PLAIN = CaspConfig(bits=3.5)
ROOT = Path(__file__).resolve().parents[2]


def text(count: int = 6, length: int = 32) -> Samples:
    return Samples(torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(3)))


def compressed(model: Model, config: CaspConfig, journal: Journal = UNKEPT) -> Model:
    return run(model, config, text(), journal)


def outcome(model: Model) -> dict[str, object]:
    found = model.provenance.steps[-1]["outcome"]
    assert isinstance(found, dict)
    return found


def values(model: Model, site: str) -> Tensor:
    weight = model.weights[site]
    assert isinstance(weight, Dense)
    return weight.values


def factors(model: Model, site: str) -> tuple[LowBit, LowBit]:
    weight = model.weights[site]
    assert isinstance(weight, Product)
    assert isinstance(weight.left, LowBit)
    assert isinstance(weight.right, LowBit)
    return weight.left, weight.right


def same(first: Weight, second: Weight) -> bool:
    pairs = zip(nodes(first), nodes(second), strict=True)
    return all(
        torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
        for a, b in pairs
        if isinstance(a, LowBit) and isinstance(b, LowBit)
    ) and describe(first) == describe(second)


def shapes_only(hidden: int, layer: Layer, layers: int) -> Model:
    architecture = replace(LLAMA, hidden=hidden, layers=(layer,) * layers)
    shapes = adapters.find("llama").shapes(architecture).weights
    weights: dict[str, Weight] = {site: Dense(torch.empty(shape, device="meta")) for site, shape in shapes.items()}
    return Model(architecture, weights, {}, Provenance("shapes", "0" * 64, 0))


def widths(model: Model) -> list[int]:
    """Bits of the down projection of each layer."""
    found = [model.weights[layer_sites(model, index)[-1]] for index in range(len(model.architecture.layers))]
    return [weight.bits for weight in found if isinstance(weight, LowBit)]


# ---- what comes out ----------------------------------------------------------------------------------------------


@FAMILIES
def test_queries_and_keys_become_products_and_the_rest_low_bit(architecture: Architecture) -> None:
    model = random_model(architecture)
    small = compressed(model, replace_config(PLAIN, levels=(2, 4)))
    chosen = outcome(small)["bits_per_layer"]
    assert chosen == widths(small)
    for index, bits in enumerate(widths(small)):
        q, k, *others = layer_sites(model, index)
        for site in (q, k):
            rank = kept_rank(*model.weights[site].shape, 0.25)
            assert describe(small.weights[site]) == f"rank {rank} (3-bit group {min(32, rank)} x 3-bit group 32)"
        assert {describe(small.weights[site]).split("-bit")[0] for site in others} == {str(bits)}
    assert all(small.tensors[name] is model.tensors[name] for name in model.tensors)
    untouched = set(model.weights) - {site for index in (0, 1) for site in layer_sites(model, index)}
    assert all(small.weights[site] is model.weights[site] for site in untouched)
    assert small.architecture == model.architecture
    assert bool(TorchSession(small).step([1, 2, 3]).isfinite().all())


def replace_config(config: CaspConfig, **fields: object) -> CaspConfig:
    return CaspConfig.model_validate(config.model_dump() | fields)


def test_with_grouped_queries_keys_have_a_rank_of_their_own() -> None:
    small = compressed(random_model(TWO), PLAIN)
    q, k, *_ = layer_sites(small, 0)
    assert [f.shape for f in factors(small, q)] == [(64, 8), (8, 64)]
    assert [f.shape for f in factors(small, k)] == [(32, 5), (5, 64)]  # 32 * 64 / 4 / 96 = 5.33


def test_embedding_and_head_are_rounded_where_asked() -> None:
    small = compressed(random_model(replace(TWO, tied=False)), replace_config(PLAIN, embedding_bits=8))
    assert [describe(small.weights[site]) for site in ("model.embed_tokens", "lm_head")] == ["8-bit group 32"] * 2


def test_the_model_that_is_given_stays_as_it_is_and_the_same_run_gives_the_same_bits() -> None:
    model = random_model(TWO)
    before = {site: weight.dense().clone() for site, weight in model.weights.items()}
    first, second = compressed(model, PLAIN), compressed(model, PLAIN)
    assert all(torch.equal(model.weights[site].dense(), kept) for site, kept in before.items())
    assert all(same(first.weights[site], second.weights[site]) for site in first.weights)


def test_checkpoints_of_half_precision_are_computed_in_double() -> None:
    model = random_model(TWO)
    halved = model.with_weights({site: Dense(weight.dense().bfloat16()) for site, weight in model.weights.items()})
    again = halved.with_weights({site: Dense(weight.dense()) for site, weight in halved.weights.items()})
    first, second = compressed(halved, PLAIN), compressed(again, PLAIN)
    assert all(same(first.weights[site], second.weights[site]) for site in first.weights if "layers" in site)


# ---- the same by hand --------------------------------------------------------------------------------------------


def low_rank_by_hand(model: Model, index: int, gram: Tensor) -> Model:
    for site in layer_sites(model, index)[:2]:
        pair = whitened(values(model, site), gram, kept_rank(*model.weights[site].shape, 0.25))
        left, right = (Dense(factor.float()) for factor in balanced(*pair))
        model = model.with_weights({site: Product(left, right)})
    return model


def rounded_by_hand(model: Model, sites: Sequence[str], grams: dict[str, Tensor], bits: int) -> Model:
    """GPTQ of some sites, a product from the right: its left factor sees what the rounded right one gives."""
    for site in sites:
        weight = model.weights[site]
        if isinstance(weight, Product):
            right = gptq.quantize(weight.right.dense(), grams[site], Grid(3, 32))
            inner = right.dense(torch.float64) @ grams[site] @ right.dense(torch.float64).T
            done: Weight = Product(gptq.quantize(weight.left.dense(), inner, Grid(3, 32)), right)
        else:
            done = gptq.quantize(weight.dense(), grams[site], Grid(bits, 32))
        model = model.with_weights({site: done})
    return model


@FAMILIES
@pytest.mark.parametrize("inputs", ["compressed", "original"])
def test_layers_are_compressed_one_after_another_as_the_paper_and_gptq_say(
    architecture: Architecture, inputs: str
) -> None:
    original = model = random_model(architecture)
    bits = [3, 2]  # what these budgets hold
    config = CaspConfig(bits=2.8 if architecture.family == "llama" else 2.6, levels=(2, 3), inputs=inputs)
    source, walk = Calibration(original, text()), Calibration(original, text())
    for index in (0, 1):
        sites = layer_sites(original, index)
        weighing = (walk, model) if inputs == "compressed" else (source, original)
        model = low_rank_by_hand(model, index, weighing[0].gram(weighing[1], index, sites[:1])[sites[0]])
        model = rounded_by_hand(model, sites, walk.gram(model, index, sites), bits[index])
        walk.advance(model, index)
        source.advance(original, index)

    small = compressed(original, config)

    assert widths(small) == bits
    assert all(same(small.weights[site], model.weights[site]) for site in model.weights)


def test_without_gptq_everything_is_rounded_to_nearest() -> None:
    model = random_model(TWO)
    small = compressed(model, replace_config(PLAIN, algorithm="rtn", levels=(3,), bits=4))
    q, k, *others = layer_sites(model, 0)
    gram = Calibration(model, text()).gram(model, 0, [q])[q]
    by_hand = low_rank_by_hand(model, 0, gram)
    for site in (q, k):
        factored = by_hand.weights[site]
        assert isinstance(factored, Product)
        for ours, theirs in zip(factors(small, site), (factored.left, factored.right), strict=True):
            assert torch.equal(ours.codes, quantize_rows(theirs.dense(), 3, 32).codes)
    for site in others:
        assert same(small.weights[site], quantize_rows(values(model, site), 3, 32))


def test_low_rank_loses_less_of_a_real_layer_than_plain_truncation_does(stories: Path, stories_text: Path) -> None:
    model = checkpoint.load(stories)
    tokens = Tokenizer(model.files, None).encode_plain(stories_text.read_text(encoding="utf-8"))
    walk = Calibration(model, Samples(calibrate.windows(tokens, 8, 128, 0, 1)))
    for layer in range(len(model.architecture.layers)):
        for site in layer_sites(model, layer)[:2]:
            gram, weight = walk.gram(model, layer, [site])[site], values(model, site).double()
            rank, lost = kept_rank(*weight.shape, 0.25), {}
            for name, pair in (("whitened", whitened(weight, gram, rank)), ("plain", truncated(weight, rank)[:2])):
                error = pair[0] @ pair[1] - weight
                lost[name] = float(torch.einsum("oi,ij,oj->", error, gram, error))
            assert lost["whitened"] < lost["plain"], site
        walk.advance(model, layer)


@FAMILIES
def test_the_attention_map_of_a_layer_moves_within_its_density_bound(architecture: Architecture) -> None:
    """|S' - S| <= sqrt(D) N max|delta logits| / 2 for each head; causal maps have a density of (N + 1) / 2N."""
    model = random_model(architecture)
    gram = Calibration(model, text()).gram(model, 0, layer_sites(model, 0)[:1]).popitem()[1]
    small = low_rank_by_hand(model, 0, gram)
    tokens = 32
    maps, logits = zip(*(attention_map(m, text().ids[:1, :tokens]) for m in (model, small)), strict=True)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    density = float(seen.double().mean())
    assert density == (tokens + 1) / (2 * tokens)
    largest = ((logits[1] - logits[0]).abs() * seen).amax((-2, -1))  # [heads]
    moved = (maps[1] - maps[0]).norm(dim=(-2, -1))
    assert bool((moved <= 0.5 * density**0.5 * tokens * largest).all())
    assert bool((moved > 1e-3).all())


def attention_map(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention weights and logits of the first layer, each [heads, tokens, tokens], float64."""
    adapter = adapters.find(model.architecture.family)
    found: list[tuple[Tensor, Tensor]] = []

    class Looking(TorchOps):
        def cached_attention(self, q: Tensor, k: Tensor, v: Tensor, layer: int, spec: object) -> Tensor:
            width = model.architecture.layers[0]
            q, k = (self.rotate(heads_first(x, n), spec) for x, n in ((q, width.heads), (k, width.kv_heads)))  # type: ignore[arg-type]
            logits = q @ k.repeat_interleave(width.heads // width.kv_heads, dim=1).mT * spec.scale  # type: ignore[attr-defined]
            future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            found.append((logits.masked_fill(future, -torch.inf).softmax(-1)[0], logits[0]))
            return torch.zeros(*ids.shape, width.heads * width.value_dim, dtype=torch.float64)  # nobody looks at it

    ops = Looking(model, torch.float64)
    ops.begin()
    adapter.block(ops, adapter.embed(ops, ids), 0)
    return found[0]


# ---- bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(2, 3), (2, 3, 4), (4, 8), (2, 8)])
@pytest.mark.parametrize("count_scales", [True, False])
def test_the_layers_that_turn_the_stream_most_get_the_most_bits(levels: tuple[int, ...], count_scales: bool) -> None:
    model = random_model(FOUR)
    for index, scale in enumerate((0.3, 3.0, 0.1, 10.0)):  # of what a layer adds to a stream that grows on its way
        sites = [site for position, site in enumerate(layer_sites(model, index)) if position in (3, 6)]
        model = model.with_weights({site: Dense(values(model, site) * scale) for site in sites})
    influence = block_influence(model, text())
    assert influence.argsort(descending=True).tolist() == [1, 3, 0, 2]

    middle = sum(levels) / len(levels) + (0.4 if count_scales else -0.2)
    small = compressed(model, CaspConfig(bits=middle, levels=levels, count_scales=count_scales))

    found = widths(small)
    assert found[1] >= found[3] >= found[0] >= found[2]
    assert found[1] > found[2]
    assert outcome(small)["influence"] == influence.tolist()
    ideal = outcome(small)["ideal_bits"]
    assert isinstance(ideal, list)
    assert sorted(range(4), key=lambda layer: ideal[layer]) == [2, 0, 3, 1]


@FAMILIES
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"group": None},
        {"group": 16, "symmetric": False},
        {"count_scales": False},
        {"keep": 1.0},
        {"levels": (3, 8)},
        {"levels": (1, 3), "qk_bits": 1, "bits": 2.0},
    ],
    ids=str,
)
def test_the_bits_of_the_written_trees_keep_to_the_budget_and_nearly_spend_it(
    architecture: Architecture, fields: dict[str, object]
) -> None:
    model = random_model(architecture)
    config = replace_config(CaspConfig(bits=4.0, levels=(2, 3, 4, 5)), **fields)
    small = compressed(model, config)
    codes = grids = weights = 0
    for index in range(2):
        for site in layer_sites(model, index):
            weights += values(model, site).numel()
            for leaf in nodes(small.weights[site]):
                if isinstance(leaf, LowBit):
                    codes += leaf.codes.numel() * leaf.bits
                    grids += leaf.scales.numel() * (16 + (0 if config.symmetric else leaf.bits))

    assert outcome(small)["code_bits_per_weight"] == pytest.approx(codes / weights, rel=1e-12)
    assert outcome(small)["bits_per_weight"] == pytest.approx((codes + grids) / weights, rel=1e-12)
    counted = codes + grids if config.count_scales else codes
    assert counted <= config.bits * weights
    top = max(widths(small))
    dearest = max(budget_of(model, config).sizes) * max(after - before for before, after in pairwise(config.levels))
    assert set(widths(small)) == {top} == {config.levels[-1]} or counted > config.bits * weights - dearest


@pytest.mark.parametrize(
    ("hidden", "mlp", "layers", "keep", "qk_bits", "count"),
    [(4096, 11008, 32, 0.25, 3, 7), (5120, 13824, 40, 0.25, 3, 9), (4096, 11008, 32, 0.5, 2, 6)],
    ids=["7B", "13B", "7B, keep half"],
)
def test_llama_at_2_bits_has_what_the_released_lists_have_less_the_part_of_a_layer(
    hidden: int, mlp: int, layers: int, keep: float, qk_bits: int, count: int
) -> None:
    """7.95, 9.90 and 6.36 layers (see test_allocation), the first ones and the last."""
    model = shapes_only(hidden, Layer(hidden // 128, hidden // 128, 128, 128, mlp), layers)
    config = CaspConfig(bits=2.0, levels=(2, 3), keep=keep, qk_bits=qk_bits, count_scales=False)
    found = widths(predict(model, config))
    assert [layer for layer, bits in enumerate(found) if bits == 3] == [*range(count - 1), layers - 1]
    q = predict(model, config).weights[layer_sites(model, 0)[0]]
    assert isinstance(q, Product)
    assert q.left.shape == (hidden, int(hidden * keep / 2))


def test_keys_of_grouped_queries_have_rank_204_where_those_of_4096_queries_have_512() -> None:
    model = shapes_only(4096, Layer(32, 8, 128, 128, 14336), 1)
    promised = predict(model, CaspConfig(bits=4.0))
    q, k, *_ = (promised.weights[site] for site in layer_sites(model, 0))
    assert isinstance(q, Product)
    assert isinstance(k, Product)
    assert (q.left.shape, q.right.shape) == ((4096, 512), (512, 4096))
    assert (k.left.shape, k.right.shape) == ((1024, 204), (204, 4096))


def test_decimal_budgets_are_exact() -> None:
    """2.2 is a little over 22/10 as a float: on 10 million weights that is no bit more."""
    model = random_model(FOUR)
    weights = sum(values(model, site).numel() for index in range(4) for site in layer_sites(model, index))
    config = CaspConfig(bits=3.3, levels=(2,), count_scales=False)
    spent = [
        3 * rank * (out + width)
        for index in range(4)
        for out, width in (model.weights[site].shape for site in layer_sites(model, index)[:2])
        for rank in [kept_rank(out, width, 0.25)]
    ]
    assert budget_of(model, config).bits == Fraction(33, 10) * weights // 1 - sum(spent)


def test_after_pruning_the_budget_is_counted_on_what_is_left() -> None:
    model = random_model(FOUR)
    pruned = run(model, FaspConfig(sparsity=0.2), text(), UNKEPT)
    small = compressed(pruned, CaspConfig(bits=3.0))

    left = sum(values(pruned, site).numel() for index in range(4) for site in layer_sites(pruned, index))
    bits = outcome(small)["bits_per_weight"]
    assert isinstance(bits, float)
    assert 3.0 * left >= bits * left > 3.0 * left - max(budget_of(pruned, CaspConfig(bits=3.0)).sizes)
    assert [step["kind"] for step in small.provenance.steps] == ["fasp", "casp"]
    assert small.architecture == pruned.architecture != model.architecture


# ---- predictions, resuming, recipes ------------------------------------------------------------------------------

LAYER = st.builds(
    lambda kv, group, dim, value, mlp: (kv, group, dim * 2, value, mlp),
    st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.integers(2, 8), st.integers(1, 16), st.integers(1, 40),
)  # fmt: skip


@given(
    drawn=st.lists(LAYER, min_size=1, max_size=3),
    family=st.sampled_from(["llama", "opt"]),
    bits=st.floats(2, 8),
    keep=st.floats(0.05, 1),
    group=st.sampled_from([0, 7, 32]),
    symmetric=st.booleans(),
    algorithm=st.sampled_from(["gptq", "rtn"]),
    inputs=st.sampled_from(["compressed", "original"]),
    levels=st.sampled_from([(2, 3, 4), (2, 4), (3, 8), (4,)]),
)
@settings(max_examples=30)
def test_a_prediction_has_the_trees_of_the_result(
    drawn: list[tuple[int, int, int, int, int]],
    family: str,
    bits: float,
    keep: float,
    group: int,
    symmetric: bool,
    algorithm: str,
    inputs: str,
    levels: tuple[int, ...],
) -> None:
    model = random_unequal(drawn, family, hidden=24)
    fields = {"keep": keep, "group": group, "symmetric": symmetric, "algorithm": algorithm, "inputs": inputs}
    config = replace_config(CaspConfig(bits=bits), embedding_bits=4, levels=levels, **fields)
    try:
        promised = predict(model, config)
    except RecipeError as error:
        assert "casp: " in str(error)  # noqa: PT017 (drawn, not expected)
        with pytest.raises(RecipeError, match="casp: "):
            run(model, config, text(2, 16), UNKEPT)
        return
    small = run(model, config, text(2, 16), UNKEPT)

    assert {n: t.shape for n, t in promised.tensors.items()} == {n: t.shape for n, t in small.tensors.items()}
    for site, weight in small.weights.items():
        for ours, theirs in zip(nodes(weight), nodes(promised.weights[site]), strict=True):
            assert (type(ours), ours.shape) == (type(theirs), theirs.shape)
            if isinstance(ours, LowBit) and isinstance(theirs, LowBit):
                assert (ours.scales.shape, ours.zeros.shape) == (theirs.scales.shape, theirs.zeros.shape)
                assert ours.group == theirs.group
    if len(set(model.architecture.layers)) == 1 and len(levels) <= 2:
        assert sorted(widths(small)) == sorted(widths(promised))
    assert promised.provenance.steps[-1] == config.model_dump(mode="json")


def test_a_prediction_of_two_levels_has_as_many_layers_of_each_and_reads_no_values() -> None:
    model = random_model(FOUR)
    empty = {site: Dense(torch.empty(weight.shape, device="meta")) for site, weight in model.weights.items()}
    for bits in (2.6, 3.0, 3.4):
        config = CaspConfig(bits=bits, levels=(2, 3))
        promised = predict(replace(model, weights=empty), config)
        assert sorted(widths(promised)) == sorted(widths(compressed(model, config)))
        leaves = [leaf for site in layer_sites(model, 0) for leaf in nodes(promised.weights[site])]
        assert all(leaf.codes.is_meta for leaf in leaves if isinstance(leaf, LowBit))


class Interrupted(Unkept):
    """Keeps finished layers in memory, and stops the first run behind layer `last`."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._last, self._kept = last, None

    def resume(self, model: Model) -> tuple[Model, int, Sequence[Tensor]]:
        return self._kept or (model, 0, ())

    def keep(self, before: Model, after: Model, layer: int, activations: Sequence[Tensor]) -> Model:
        if self._kept is None and layer == self._last:
            self._kept = after, layer + 1, list(activations)
            raise KeyboardInterrupt
        return after


@pytest.mark.parametrize("inputs", ["compressed", "original"])
@pytest.mark.parametrize("last", [0, 2, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(inputs: str, last: int) -> None:
    model, config = random_model(FOUR), CaspConfig(bits=3.5, inputs=inputs)
    journal = Interrupted(last)
    with pytest.raises(KeyboardInterrupt):
        compressed(model, config, journal)

    resumed, whole = compressed(model, config, journal), compressed(model, config)

    assert all(same(resumed.weights[site], whole.weights[site]) for site in whole.weights)
    assert resumed.provenance == whole.provenance


def test_the_step_is_recorded_with_its_outcome_and_survives_saving(tmp_path: Path) -> None:
    small = compressed(random_model(TWO), PLAIN)
    step = dict(small.provenance.steps[-1])
    decided = step.pop("outcome")
    assert set(decided) == {
        "bits_per_layer", "influence", "ideal_bits", "code_bits_per_weight", "bits_per_weight"
    }  # fmt: skip
    assert CaspConfig.model_validate(step) == PLAIN

    store.save(small, tmp_path)
    again = store.load(tmp_path)

    assert again.provenance == small.provenance
    assert json.loads(json.dumps(again.provenance.steps)) == [*again.provenance.steps]
    assert all(same(again.weights[site], small.weights[site]) for site in small.weights if "layers" in site)


def test_progress_ends_at_one() -> None:
    told: list[float] = []
    run(random_model(TWO), PLAIN, text(), Unkept(told.append))
    assert told == [0.5, 1.0]


def test_the_example_recipe_is_read_and_followed(tmp_path: Path) -> None:
    (step,) = recipe.load(ROOT / "recipes" / "casp.yaml").steps
    assert isinstance(step, CaspConfig)
    small = compressed(random_model(FOUR), step)
    assert set(widths(small)) == {4, 8}
    with pytest.raises(RecipeError, match=r"unknown key 'steps\.0\.casp\.qkbits'; did you mean 'qk_bits'\?"):
        recipe.parse({"steps": [{"kind": "casp", "bits": 3, "qkbits": 3}]})


def test_casp_beats_uniform_gptq_of_more_bytes_on_text_of_a_real_model(stories: Path, stories_text: Path) -> None:
    model = checkpoint.load(stories)
    written = stories_text.read_text(encoding="utf-8")
    tokenizer = Tokenizer(model.files, model.architecture.bos)
    seen, unseen = (
        tokenizer.encode_plain(half) for half in (written[: len(written) // 2], written[len(written) // 2 :])
    )
    samples = Samples(calibrate.windows(seen, 32, 128, 0, 1))
    held_out = calibrate.windows(unseen, 8, 256, 0, 1)
    uniform = QuantizeConfig(bits=2, group=0, targets=("re:model.layers.*",))

    found = {}
    for name, step in (("casp", CaspConfig(bits=2.21, levels=(2, 3), group=0)), ("uniform", uniform)):
        small = run(model, step, samples, UNKEPT)
        bits = sum(
            leaf.codes.numel() * leaf.bits + leaf.scales.numel() * 16
            for index in range(5) for site in layer_sites(model, index)
            for leaf in nodes(small.weights[site]) if isinstance(leaf, LowBit)
        )  # fmt: skip
        found[name] = bits, evaluate.perplexity(TorchSession(small), held_out).perplexity
    assert found["casp"][0] <= found["uniform"][0]
    assert found["casp"][1] < found["uniform"][1]


# ---- refusals ----------------------------------------------------------------------------------------------------


def refused(model: Model, config: CaspConfig, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        predict(model, config)
    with pytest.raises(RecipeError, match=message):
        compressed(model, config)


def test_a_budget_under_the_lowest_level_is_refused_with_the_least_that_holds() -> None:
    config, model = CaspConfig(bits=2.0), random_model(TWO)
    refused(model, config, r"casp: 2 bits a weight do not hold all layers at 2 bits .* keys at 3; give at least 2\.\d+")
    with pytest.raises(RecipeError) as error:
        predict(model, config)
    least = float(str(error.value).split("at least ")[1].split(",")[0])
    assert widths(predict(model, CaspConfig(bits=least))) == [2, 2]
    refused(model, CaspConfig(bits=least - 0.002), "do not hold all layers")
    refused(model, CaspConfig(bits=1.5, count_scales=False), "give at least .*, lower levels or a lower keep")


def test_a_share_that_leaves_no_rank_is_refused_with_the_least_that_leaves_one() -> None:
    model = random_model(TWO)
    refused(
        model, CaspConfig(bits=4.0, keep=0.01), r"keep 0\.01 leaves .*q_proj of 64 x 64 no rank; give over 0\.03125"
    )


def test_a_matrix_that_is_not_dense_any_more_is_refused() -> None:
    for position in (0, 6):
        model = random_model(TWO)
        site = layer_sites(model, 1)[position]
        model = model.with_weights({site: low_bit(model.weights[site].shape, 4, 32)})
        refused(model, PLAIN, f"{site} is 4-bit group 32; casp compresses plain matrices")


def test_a_model_whose_queries_and_keys_are_not_known_is_refused(tmp_path: Path) -> None:
    refused(only_transformers_knows(tmp_path), PLAIN, "which of its matrices belong together is not known")


def test_casp_twice_is_refused() -> None:
    refused(compressed(random_model(TWO), PLAIN), PLAIN, r"q_proj is rank 8 .*; casp compresses plain matrices")


def test_missing_text_is_refused() -> None:
    assert find("casp").needs_calibration(PLAIN)
    with pytest.raises(RecipeError, match="casp: low rank and allocation want calibration text"):
        run(random_model(TWO), PLAIN, None, UNKEPT)


def test_activations_that_are_not_finite_are_told_with_their_layer() -> None:
    model = random_model(TWO)
    down = layer_sites(model, 1)[-1]
    broken = model.with_weights({down: Dense(torch.full_like(values(model, down), torch.inf))})
    with pytest.raises(RecipeError, match="casp: activations of layer 1 are not finite"):
        compressed(broken, PLAIN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "Field required"),
        ({"bits": 0}, "greater than 0"),
        ({"bits": 17}, "less than or equal to 16"),
        ({"bits": float("nan")}, "finite number"),
        ({"bits": 3, "levels": ()}, "at least 1 item"),
        ({"bits": 3, "levels": (3, 2)}, r"levels \[3, 2\] do not rise"),
        ({"bits": 3, "levels": (2, 2)}, r"levels \[2, 2\] do not rise"),
        ({"bits": 3, "levels": (2, 9)}, "less than or equal to 8"),
        ({"bits": 3, "levels": (2, 2.5)}, "valid integer"),
        ({"bits": 3, "keep": 0}, "greater than 0"),
        ({"bits": 3, "keep": 1.1}, "less than or equal to 1"),
        ({"bits": 3, "qk_bits": 9}, "less than or equal to 8"),
        ({"bits": 3, "inputs": "both"}, "'compressed' or 'original'"),
        ({"bits": 3, "algorithm": "aqlm"}, "'gptq' or 'rtn'"),
        ({"bits": 3, "symmetric": False, "levels": (1, 2)}, "1 bit without symmetric"),
        ({"bits": 3, "symmetric": False, "qk_bits": 1}, "1 bit without symmetric"),
        ({"bits": 3, "symmetric": False, "embedding_bits": 1}, "1 bit without symmetric"),
        ({"bits": 3, "level": (2, 3)}, "Extra inputs"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CaspConfig.model_validate(fields)
