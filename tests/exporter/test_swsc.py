"""SWSC: what its trees hold, what they cost, what the low-rank term makes up for, and which matrices it takes."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from exporter import adapters, equivalents
from exporter.calibrate import Samples
from exporter.compress import find, run
from exporter.compress.fasp import FaspConfig
from exporter.compress.quantize import QuantizeConfig
from exporter.compress.step import UNKEPT, Unkept, layer_sites
from exporter.compress.swsc import (
    SwscConfig,
    amounts,
    average_bits,
    predict,
    shared_channels,
    with_low_rank,
)
from exporter.errors import RecipeError, WeightError
from exporter.maths.kmeans import kmeans
from exporter.maths.lowrank import truncated
from exporter.model import Architecture, Layer, Model
from exporter.torch_ops import TorchOps
from exporter.weights import Dense, LowBit, Product, Shared, Sum, Weight, children, describe, nodes
from tests.checkpoints import only_transformers_knows
from tests.models import LLAMA, OPT, low_bit, random_model

TWO = replace(LLAMA, layers=(Layer(4, 2, 16, 16, 96), Layer(4, 2, 16, 8, 60)))  # grouped queries, unequal widths
OPT_TWO = replace(OPT, layers=(Layer(4, 4, 16, 16, 96), Layer(4, 4, 16, 8, 60)))
FAMILIES = pytest.mark.parametrize("architecture", [TWO, OPT_TWO], ids=lambda a: a.family)
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
SMALL = SwscConfig(clusters=0.25, rank=0.25)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alike(out: int = 256, width: int = 256, kinds: int = 16, noise: float = 0.7, seed: int = 0) -> Tensor:
    """A matrix whose rows are of a few kinds, with noise of low rank for the most part."""
    labels = torch.randint(0, kinds, (out,), generator=torch.Generator().manual_seed(seed))
    drift = normal(out, 8, seed=seed + 1) @ normal(8, width, seed=seed + 2) / 8**0.5
    return normal(kinds, width, seed=seed + 3)[labels] + noise * (drift + 0.3 * normal(out, width, seed=seed + 4))


def compressed(values: Tensor, clusters: int, rank: int, **fields: Any) -> Weight:
    config = SwscConfig(**fields)
    return with_low_rank(values, shared_channels(values, clusters, config), rank, config)


def relative_error(values: Tensor, weight: Weight) -> float:
    return float((values.double() - weight.dense(torch.float64)).norm() / values.double().norm())


def kinds(model: Model) -> dict[str, str]:
    return {site: describe(weight) for site, weight in model.weights.items()}


def shapes(weight: Weight) -> list[tuple[object, ...]]:
    """All that a plan reads of a tree."""
    found: list[tuple[object, ...]] = []
    for node in nodes(weight):
        found.append((type(node), node.shape))
        if isinstance(node, LowBit):
            found.append((node.bits, node.group, node.scales.shape, node.zeros.shape, node.is_symmetric))
        if isinstance(node, Dense):
            found.append((node.values.dtype,))
        if isinstance(node, Shared):
            found.append((node.labels.shape, node.labels.dtype))
    return found


# ---- what is stored ----------------------------------------------------------------------------------------------


def test_rows_are_the_means_of_their_clusters_plus_a_low_rank_term() -> None:
    values = alike()
    weight = compressed(values, 16, 8, seed=3)

    found = kmeans(values, 16, 3)
    means = found.centres.half().double()
    left, right, _ = truncated(values - means[found.labels], 8)
    assert isinstance(weight, Sum)
    shared, low_rank = weight.terms
    assert isinstance(shared, Shared)
    assert isinstance(low_rank, Product)
    assert torch.equal(shared.labels, found.labels)
    assert torch.equal(shared.rows.dense(torch.float64), means)
    assert torch.equal(low_rank.left.dense(torch.float64), left.half().double())
    assert torch.equal(low_rank.right.dense(torch.float64), right.half().double())


def test_columns_are_clustered_as_the_rows_of_the_transposed_matrix() -> None:
    values = alike().T.contiguous()
    weight = compressed(values, 16, 0, axis="columns")
    turned = compressed(values.T.contiguous(), 16, 0)

    assert isinstance(weight, Product)
    assert isinstance(weight.right, LowBit)
    assert weight.right.is_symmetric
    chosen = weight.right.dense()
    assert sorted(set(chosen.flatten().tolist())) == [0, 1]
    assert torch.equal(chosen.sum(0), torch.ones(256))  # one cluster a column
    assert torch.equal(weight.dense(torch.float64), turned.dense(torch.float64).T)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_as_many_clusters_as_channels_are_the_matrix(axis: str) -> None:
    values = normal(24, 18).half()
    assert torch.equal(compressed(values, 24 if axis == "rows" else 18, 0, axis=axis).dense(), values.float())


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_the_full_rank_is_the_matrix_up_to_float16(axis: str) -> None:
    values = normal(24, 18)
    assert relative_error(values, compressed(values, 4, 18, axis=axis)) < 1e-3


def test_what_is_missed_are_the_singular_values_that_were_dropped() -> None:
    values = alike(64, 48)
    shared = shared_channels(values, 8, SwscConfig())
    error = values - shared.dense(torch.float64)
    _, _, singular = truncated(error, 0)
    for rank in (1, 7, 30):
        left, right, _ = truncated(error, rank)
        missed = (error - left @ right).square().sum()
        assert float(missed) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-9)
        stored = relative_error(values, compressed(values, 8, rank)) * float(values.norm())
        assert stored**2 == pytest.approx(float(missed), rel=1e-3)  # float16 factors


def test_more_rank_is_never_worse_on_a_thousand_instances() -> None:
    generator = torch.Generator().manual_seed(11)
    for seed in range(1000):
        out, width = torch.randint(4, 14, (2,), generator=generator).tolist()
        clusters = int(torch.randint(1, out + 1, (1,), generator=generator))
        rank = int(torch.randint(1, min(out, width) + 1, (1,), generator=generator))
        values = torch.randn(out, width, generator=generator) * 0.05
        shared = shared_channels(values, clusters, SwscConfig(seed=seed))
        errors = [relative_error(values, with_low_rank(values, shared, kept, SwscConfig())) for kept in range(rank + 1)]
        assert all(more <= less + 1e-4 for less, more in pairwise(errors)), (seed, errors)  # float16 factors
        assert errors[-1] < errors[0] or errors[0] < 1e-3


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_store_means_and_factors_and_lose_little(bits: int, axis: str) -> None:
    values = alike() if axis == "rows" else alike().T.contiguous()
    exact = compressed(values, 16, 8, axis=axis)
    small = compressed(values, 16, 8, axis=axis, centroid_bits=bits, factor_bits=bits)

    assert not any(isinstance(node, Dense) for node in nodes(small))
    lost = relative_error(values, exact)
    assert lost < relative_error(values, small) < lost * (1.01 if bits == 8 else 1.3)


def test_the_low_rank_term_makes_up_for_the_rounding_of_the_means_too() -> None:
    values = alike(64, 64)
    coarse = SwscConfig(centroid_bits=2, group=0)
    shared = shared_channels(values, 8, coarse)
    _, _, singular = truncated(values - shared.dense(torch.float64), 0)
    missed = relative_error(values, with_low_rank(values, shared, 16, coarse)) * float(values.norm())
    assert missed**2 == pytest.approx(float(singular[16:].square().sum()), rel=1e-3)


# ---- why ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_where_rows_are_alike_it_beats_plain_low_rank_of_the_same_size(seed: int) -> None:
    values = alike(seed=seed)
    left, right, _ = truncated(values, 16)  # 16 * 512 numbers, as 16 means and 8 triplets have
    plain = float((values - left @ right).norm() / values.norm())
    shared = relative_error(values, compressed(values, 16, 0))
    ours = relative_error(values, compressed(values, 16, 8))
    assert ours < shared
    assert ours < plain


# ---- what it costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clusters", "rank", "bits"),
    [(256, 0, 1.00390625), (256, 128, 2.00390625), (512, 128, 3.00390625), (256, 256, 3.00390625)],
)
def test_average_bits_are_the_papers(clusters: int, rank: int, bits: float) -> None:
    assert average_bits((4096, 4096), clusters, rank) == bits


def test_honest_labels_take_as_many_bits_as_number_the_clusters() -> None:
    assert average_bits((4096, 4096), 256, 128, label_bits=8) == 2 + 8 / 4096


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_average_bits_count_what_a_tree_holds(axis: str) -> None:
    values = normal(96, 64) if axis == "rows" else normal(64, 96)
    weight = compressed(values, 12, 5, axis=axis)
    numbers = sum(node.values.numel() for node in nodes(weight) if isinstance(node, Dense))
    labels = 96
    assert average_bits((96, 64), 12, 5) == 16 * (numbers + labels) / (96 * 64)


def test_a_plan_prices_the_tree_as_the_honest_count_says() -> None:
    weight = compressed(normal(96, 64), 12, 5)

    def price(leaf: Weight) -> int | str:
        return 16 * leaf.shape[0] * leaf.shape[1]

    stored, decision = equivalents.decide(weight, "site", price)
    assert stored.shape == (96, 64)
    assert decision.native
    assert decision.bytes * 8 == average_bits((96, 64), 12, 5, equivalents.LABEL_BITS) * 96 * 64


def test_shares_cost_the_same_bits_whatever_the_shape() -> None:
    two, three = SwscConfig(), SwscConfig(rank=0.125)
    assert amounts((4096, 4096), two) == (256, 128)
    assert amounts((4096, 4096), three) == (256, 256)
    assert amounts((4096, 4096), SwscConfig(clusters=0.125)) == (512, 128)
    assert amounts((1024, 4096), two) == (64, 51)  # keys of grouped-query attention
    assert amounts((1024, 4096), SwscConfig(rank=0.25)) == (64, 204)
    for shape in ((4096, 4096), (1024, 4096), (11008, 4096), (4096, 11008)):
        assert 1.97 < average_bits(shape, *amounts(shape, two)) - 16 / shape[1] <= 2.0


def test_a_share_is_rounded_down_but_leaves_a_cluster() -> None:
    assert amounts((10, 10), SwscConfig(clusters=0.29, rank=0.29)) == (2, 1)
    assert amounts((100, 10), SwscConfig(clusters=0.29, rank=0.0001)) == (29, 0)
    assert amounts((10, 10), SwscConfig(clusters=0.01, rank=0)) == (1, 0)


def test_whole_numbers_are_the_same_for_every_matrix() -> None:
    config = SwscConfig(clusters=7, rank=3)
    assert amounts((4096, 4096), config) == amounts((16, 64), config) == (7, 3)
    assert amounts((16, 64), config.model_copy(update={"axis": "columns", "clusters": 64})) == (64, 3)


# ---- models ------------------------------------------------------------------------------------------------------


@FAMILIES
def test_queries_and_keys_are_compressed_and_nothing_else(architecture: Architecture) -> None:
    model = random_model(architecture)
    small = run(model, SMALL, None, UNKEPT)

    adapter = adapters.find(architecture.family)
    attention = [adapter.attention_sites(layer) for layer in range(2)]
    changed = {site for site in model.weights if small.weights[site] is not model.weights[site]}
    assert changed == {site for sites in attention for site in (sites.q, sites.k)}
    assert small.tensors is model.tensors
    assert small.architecture == model.architecture


def test_narrow_keys_get_as_much_of_themselves_as_wide_queries() -> None:
    small = run(random_model(TWO), SMALL, None, UNKEPT)
    assert kinds(small)[Q] == "16 shared rows of float16 + rank 8 (float16 x float16)"
    assert kinds(small)[K] == "8 shared rows of float16 + rank 5 (float16 x float16)"


def test_any_matrix_of_a_layer_may_be_chosen() -> None:
    config = SMALL.model_copy(update={"targets": ("re:.*mlp",), "ignore": ("re:.*up_proj",)})
    small = run(random_model(TWO), config, None, UNKEPT)
    changed = {site for site, kind in kinds(small).items() if "shared" in kind}
    assert changed == {f"model.layers.{i}.mlp.{name}_proj" for i, name in product((0, 1), ("gate", "down"))}
    for site in changed:
        assert small.weights[site].shape == random_model(TWO).weights[site].shape


@FAMILIES
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_compressed_model_computes_what_its_dense_matrices_compute(
    architecture: Architecture, axis: str, bits: int | None
) -> None:
    config = SMALL.model_copy(
        update={"axis": axis, "centroid_bits": bits, "factor_bits": bits, "targets": (r"re:.*layers\.",)}
    )
    small = run(random_model(architecture), config, None, UNKEPT)
    dense = small.with_weights({site: Dense(weight.dense(torch.float64)) for site, weight in small.weights.items()})
    ids = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    adapter = adapters.find(architecture.family)

    ours, theirs = (adapters.logits(adapter, TorchOps(model, torch.float64), ids) for model in (small, dense))

    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    assert all(children(small.weights[site]) for site in layer_sites(small, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_matrices_of_every_float_type_are_taken(dtype: torch.dtype) -> None:
    model = random_model(TWO)
    turned = model.with_weights({site: Dense(weight.dense(dtype)) for site, weight in model.weights.items()})
    small = run(turned, SMALL, None, UNKEPT)
    assert kinds(small)[Q] == kinds(run(model, SMALL, None, UNKEPT))[Q]
    assert relative_error(turned.weights[Q].dense(torch.float64), small.weights[Q]) < 0.9


@FAMILIES
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rank": 0},
        {"axis": "columns"},
        {"axis": "columns", "rank": 0, "centroid_bits": 3},
        {"centroid_bits": 4, "factor_bits": 8, "group": None},
        {"clusters": 5, "rank": 7, "factor_bits": 2, "group": 3, "targets": (r"re:.*layers\.",)},
    ],
    ids=str,
)
def test_a_prediction_has_the_trees_of_the_result(architecture: Architecture, fields: dict[str, Any]) -> None:
    model = random_model(architecture)
    config = SMALL.model_copy(update=fields)
    empty = {site: Dense(torch.empty(weight.shape, device="meta")) for site, weight in model.weights.items()}
    promised, small = predict(replace(model, weights=empty), config), run(model, config, None, UNKEPT)

    assert kinds(promised) == kinds(small)
    assert promised.provenance == small.provenance
    for site, weight in small.weights.items():
        assert weight is model.weights[site] or shapes(promised.weights[site]) == shapes(weight), site


def test_it_follows_fasp_and_is_rounded_by_quantize() -> None:
    windows = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(3))
    model = run(random_model(TWO), FaspConfig(sparsity=0.2), Samples(windows), UNKEPT)
    model = run(model, SMALL.model_copy(update={"targets": (r"re:.*layers\.",)}), None, UNKEPT)
    small = run(model, QuantizeConfig(bits=4), Samples(windows), UNKEPT)

    assert kinds(small)[Q] == "16 shared rows of 4-bit group 32 + rank 8 (4-bit group 8 x 4-bit group 32)"
    assert [step["kind"] for step in small.provenance.steps] == ["fasp", "swsc", "quantize"]


def test_the_step_is_recorded_and_no_text_is_wanted() -> None:
    told: list[float] = []
    small = run(random_model(TWO), SMALL, None, Unkept(told.append))
    assert not find("swsc").needs_calibration(SMALL)
    assert small.provenance.steps == (SMALL.model_dump(mode="json"),)
    assert SwscConfig.model_validate_json(SMALL.model_dump_json()) == SMALL
    assert told == [0.5, 1.0]


def test_the_same_run_gives_the_same_bits_and_a_seed_may_give_others() -> None:
    first, second, other = (
        run(random_model(TWO), SMALL.model_copy(update={"seed": seed}), None, UNKEPT).weights[Q] for seed in (0, 0, 1)
    )
    assert torch.equal(first.dense(), second.dense())
    assert not torch.equal(first.dense(), other.dense())


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clusters": 33}, f"swsc: {K}: 33 clusters of 32 rows; give 1 to 32, or a share under 1"),
        ({"clusters": 0}, "0 clusters of 64 rows; give 1 to 64"),
        ({"clusters": 65, "axis": "columns"}, "65 clusters of 64 columns; give 1 to 64"),
        ({"rank": 33}, f"swsc: {K}: rank 33 of a 32 x 64 matrix; give 0 to 32, or a share under 1"),
        ({"targets": ("re:.*kproj",)}, "matches no site; nearest: .*k_proj"),
        ({"targets": ("model.embed_tokens",)}, "matches no site"),
        ({"ignore": (r"re:.*",)}, "swsc: ignore leaves out everything that targets chose"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_the_work(fields: dict[str, Any], message: str) -> None:
    empty = {s: Dense(torch.empty(w.shape, device="meta")) for s, w in random_model(TWO).weights.items()}
    model = replace(random_model(TWO), weights=empty)  # any work on it would fail in another way
    config = SMALL.model_copy(update=fields)
    for attempt in (lambda: predict(model, config), lambda: run(model, config, None, UNKEPT)):
        with pytest.raises(RecipeError, match=message):
            attempt()


def test_where_queries_and_keys_are_not_known_targets_name_them(tmp_path: Path) -> None:
    """A model that only transformers knows: its queries, keys and values are one matrix."""
    model = only_transformers_knows(tmp_path)
    for attempt in (lambda: predict(model, SMALL), lambda: run(model, SMALL, None, UNKEPT)):
        with pytest.raises(RecipeError, match="which of its matrices belong together is not known"):
            attempt()
    small = run(model, SMALL.model_copy(update={"targets": ("re:.*query_key_value",)}), None, UNKEPT)
    assert [site for site, kind in kinds(small).items() if "shared" in kind] == [
        f"gpt_neox.layers.{layer}.attention.query_key_value" for layer in (0, 1)
    ]


def test_a_matrix_that_is_no_longer_plain_is_refused_before_the_work() -> None:
    model = random_model(TWO).with_weights({K: low_bit((32, 64), 4, 32)})
    for attempt in (lambda: predict(model, SMALL), lambda: run(model, SMALL, None, UNKEPT)):
        with pytest.raises(RecipeError, match=f"swsc: {K} is 4-bit group 32; it takes plain matrices: put it before"):
            attempt()


def test_weights_that_are_not_finite_are_told_with_their_site() -> None:
    values = random_model(TWO).weights[K].dense().clone()
    values[3, 4] = float("nan")
    with pytest.raises(RecipeError, match=f"swsc: {K}: the matrix holds values that are not finite"):
        run(random_model(TWO).with_weights({K: Dense(values)}), SMALL, None, UNKEPT)


def test_values_that_float16_does_not_hold_want_bits() -> None:
    with pytest.raises(WeightError, match="over 65504, which float16 does not hold; give them bits"):
        compressed(normal(8, 8) * 1e6, 4, 0)
    assert math.isfinite(relative_error(normal(8, 8) * 1e6, compressed(normal(8, 8) * 1e6, 4, 0, centroid_bits=8)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clusters": 1.5}, "1.5 is neither a whole number nor a fraction between 0 and 1"),
        ({"rank": 1.0}, "1.0 is neither a whole number nor a fraction"),
        ({"rank": -1}, "-1 is neither a whole number nor a fraction"),
        ({"clusters": 0.0}, "0.0 is neither a whole number nor a fraction"),
        ({"clusters": True}, "1.0 is neither a whole number nor a fraction"),
        ({"rank": float("nan")}, "finite"),
        ({"centroid_bits": 0}, "greater than or equal to 1"),
        ({"factor_bits": 9}, "less than or equal to 8"),
        ({"axis": "both"}, "'rows' or 'columns'"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"group": -1}, "greater than or equal to 0"),
        ({"cluster": 4}, "Extra inputs"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SwscConfig.model_validate(fields)
