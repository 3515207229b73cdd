"""Quantization of models: which sites, which leaves, in which order, and what GPTQ gains on a real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from exporter import calibrate, checkpoint
from exporter.calibrate import Calibration, Samples
from exporter.compress import find, run
from exporter.compress.quantize import QuantizeConfig, predict
from exporter.compress.step import UNKEPT, Unkept, layer_sites, token_tables
from exporter.compress.trees import rounded
from exporter.errors import RecipeError
from exporter.maths import gptq
from exporter.maths.rounding import Grid, quantize_rows
from exporter.maths.sparsegpt import quantize_sparse, sparsify_by_size
from exporter.model import Layer, Model
from exporter.tokenizer import Tokenizer
from exporter.weights import Dense, LowBit, Product, Sparse, describe, nodes
from tests.models import LLAMA, OPT, low_bit, random_model, sparse, trees

TWO = replace(LLAMA, layers=(Layer(4, 2, 16, 16, 96), Layer(4, 2, 16, 8, 60)))
OPT_TWO = replace(OPT, layers=(Layer(4, 4, 16, 16, 96), Layer(4, 4, 16, 8, 60)))
RTN = QuantizeConfig(algorithm="rtn")
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def text(count: int = 6, length: int = 32) -> Tensor:
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(3))


def quantized(model: Model, config: QuantizeConfig, windows: Tensor | None = None) -> Model:
    return run(model, config, Samples(text() if windows is None else windows), UNKEPT)


def kinds(model: Model) -> dict[str, str]:
    return {site: describe(weight) for site, weight in model.weights.items()}


def low(model: Model, site: str) -> LowBit:
    weight = model.weights[site]
    assert isinstance(weight, LowBit)
    return weight


# ---- which sites -------------------------------------------------------------------------------------------------


def test_everything_but_position_tables_and_vectors_is_rounded() -> None:
    for architecture in (TWO, replace(TWO, tied=False), OPT_TWO):
        model = random_model(architecture)
        small = quantized(model, RTN)
        left = {site for site, kind in kinds(small).items() if kind != "4-bit group 32"}
        assert left == ({"model.decoder.embed_positions"} if architecture.family == "opt" else set())
        assert all(small.tensors[name] is model.tensors[name] for name in model.tensors)


def test_embedding_and_head_may_have_bits_of_their_own() -> None:
    small = quantized(random_model(replace(TWO, tied=False)), RTN.model_copy(update={"embedding_bits": 8}))
    assert {site for site, kind in kinds(small).items() if kind == "8-bit group 32"} == {
        "model.embed_tokens",
        "lm_head",
    }


def test_targets_and_ignore_choose_sites() -> None:
    config = QuantizeConfig(algorithm="rtn", targets=[r"re:.*mlp\."], ignore=[r"re:.*layers\.1\."])
    small = quantized(random_model(TWO), config)
    rounded = {site for site, kind in kinds(small).items() if kind == "4-bit group 32"}
    assert rounded == {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}


def test_a_position_table_is_no_site_to_choose() -> None:
    config = QuantizeConfig(algorithm="rtn", targets=["model.decoder.embed_positions"])
    with pytest.raises(RecipeError, match=r"matches no site; nearest: .*embed_tokens"):
        quantized(random_model(OPT_TWO), config)


def test_choosing_nothing_is_refused() -> None:
    config = QuantizeConfig(algorithm="rtn", ignore=["re:.*"])
    for method in (quantized, predict):
        with pytest.raises(RecipeError, match="ignore leaves out everything"):
            method(random_model(TWO), config)


def test_two_steps_give_two_widths() -> None:
    first = QuantizeConfig(algorithm="rtn", bits=8, targets=[UP])
    small = quantized(quantized(random_model(TWO), first), RTN)
    assert kinds(small)[UP] == "8-bit group 32"
    assert sum(kind == "4-bit group 32" for kind in kinds(small).values()) == len(small.weights) - 1
    assert len(small.provenance.steps) == 2


def test_a_step_that_would_change_nothing_is_refused_before_the_work() -> None:
    small = quantized(random_model(TWO), RTN)
    for again in (RTN, QuantizeConfig(), RTN.model_copy(update={"bits": 2}), SPARSE):
        for method in (quantized, predict):
            with pytest.raises(RecipeError, match=r"nothing is left to round, .*q_proj is 4-bit group 32 already"):
                method(small, again)


def test_inputs_of_matrices_that_have_few_bits_already_are_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    summing = Calibration.gram

    def listening(self: Calibration, model: Model, layer: int, sites: list[str]) -> dict[str, Tensor]:
        heard.extend(sites)
        return summing(self, model, layer, sites)

    monkeypatch.setattr(Calibration, "gram", listening)
    quantized(quantized(random_model(TWO), RTN.model_copy(update={"ignore": (DOWN,)})), QuantizeConfig())
    assert heard == [DOWN]


@pytest.mark.parametrize("group", [0, None])
def test_no_group_is_a_scale_a_row(group: int | None) -> None:
    small = quantized(random_model(TWO), QuantizeConfig(algorithm="rtn", group=group))
    assert low(small, DOWN).group == 60
    assert low(small, DOWN).scales.shape == (64, 1)


# ---- which leaves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", trees((64, 64)))
def test_every_dense_leaf_of_a_tree_is_rounded_and_the_tree_keeps_its_form(name: str) -> None:
    tree = trees((64, 64))[name]
    inputs = torch.randn(100, 64, dtype=torch.float64)
    for gram in (None, inputs.T @ inputs):
        small = rounded(
            tree,
            gram,
            lambda values, own: (
                quantize_rows(values, 4, 32) if own is None else gptq.quantize(values, own, Grid(4, 32))
            ),
        )
        assert not any(isinstance(node, Dense) for node in nodes(small))
        assert [type(node) for node in nodes(small) if not isinstance(node, LowBit)] == [
            type(node) for node in nodes(tree) if not isinstance(node, LowBit | Dense)
        ]
        assert small.shape == tree.shape
        error = (small.dense() - tree.dense()).norm() / tree.dense().norm()
        assert float(error) < 0.3


def test_leaves_that_are_low_bit_already_stay() -> None:
    weight = low_bit((64, 64), 2, 32)
    assert rounded(weight, None, lambda values, own: quantize_rows(values, 4, 32)) is weight


def test_the_left_factor_is_rounded_on_what_the_right_one_gives_it() -> None:
    asked: list[tuple[tuple[int, ...], Tensor | None]] = []
    product, x = trees((64, 64))["low rank"], torch.randn(200, 64, dtype=torch.float64)

    def rounder(values: Tensor, own: Tensor | None) -> LowBit:
        asked.append((tuple(values.shape), own))
        return quantize_rows(values, 8, 0)

    small = rounded(product, x.T @ x, rounder)

    assert isinstance(small, Product)
    inner = x @ small.right.dense(torch.float64).T
    assert [shape for shape, _ in asked] == [(16, 64), (64, 16)]
    own = asked[1][1]
    assert own is not None
    assert torch.allclose(own, inner.T @ inner, rtol=1e-9, atol=1e-9)


def test_a_gram_matrix_reaches_shared_rows_and_terms_but_no_sparse_values() -> None:
    gram = torch.eye(64, dtype=torch.float64)
    given: dict[str, list[bool]] = {}
    for name in ("shared", "2:4", "shared + low rank"):
        seen: list[bool] = []

        def rounder(values: Tensor, own: Tensor | None, seen: list[bool] = seen) -> LowBit:
            seen.append(own is not None)
            return quantize_rows(values, 4, 32)

        rounded(trees((64, 64))[name], gram, rounder)
        given[name] = seen
    assert given == {"shared": [True], "2:4": [False], "shared + low rank": [True, True]}


# ---- order and shapes --------------------------------------------------------------------------------------------


def test_gptq_sees_the_inputs_that_the_layers_rounded_before_give() -> None:
    model = random_model(TWO)
    config = QuantizeConfig(ignore=["model.embed_tokens"])
    small = quantized(model, config)
    first = {site: small.weights[site] for site in layer_sites(model, 0)}
    walk = Calibration(model, Samples(text()))
    walk.advance(model.with_weights(first), 0)
    gram = walk.gram(model, 1, [DOWN])[DOWN]

    expected = gptq.quantize(model.weights[DOWN].dense(), gram, Grid(4, 32))

    assert torch.equal(low(small, DOWN).codes, expected.codes)
    assert torch.equal(low(small, DOWN).scales, expected.scales)


@pytest.mark.parametrize("architecture", [TWO, replace(TWO, tied=False), OPT_TWO], ids=["tied", "untied", "opt"])
@pytest.mark.parametrize("fields", [{}, {"symmetric": False}, {"group": None, "embedding_bits": 8}, {"bits": 3}])
def test_a_prediction_has_the_trees_of_the_result(architecture: object, fields: dict[str, object]) -> None:
    model = random_model(architecture)  # type: ignore[arg-type]
    every = trees((96, 64))
    model = model.with_weights({f"{layer_sites(model, 0)[-2]}": every["shared + low rank"]})
    config = QuantizeConfig.model_validate({"algorithm": "rtn", **fields})
    promised, small = predict(model, config), quantized(model, config)

    assert kinds(promised) == kinds(small)
    assert promised.provenance == small.provenance
    for site, weight in small.weights.items():
        for ours, theirs in zip(nodes(weight), nodes(promised.weights[site]), strict=True):
            assert ours.shape == theirs.shape
            if isinstance(ours, LowBit) and isinstance(theirs, LowBit):
                assert (ours.scales.shape, ours.zeros.shape) == (theirs.scales.shape, theirs.zeros.shape)
                assert ours.is_symmetric == theirs.is_symmetric


def test_a_prediction_reads_no_values() -> None:
    model = random_model(TWO)
    empty = {site: Dense(torch.empty(weight.shape, device="meta")) for site, weight in model.weights.items()}
    promised = predict(replace(model, weights=empty), QuantizeConfig())
    assert all(isinstance(w, LowBit) and w.codes.is_meta for w in promised.weights.values())


def test_the_step_is_recorded_and_progress_ends_at_one() -> None:
    told: list[float] = []
    config = QuantizeConfig(algorithm="rtn", bits=3)
    small = run(random_model(TWO), config, None, Unkept(told.append))
    assert small.provenance.steps == (config.model_dump(mode="json"),)
    assert QuantizeConfig.model_validate(small.provenance.steps[0]) == config
    assert told == [0.5, 1.0]


def test_the_same_run_gives_the_same_bits() -> None:
    first, second = (quantized(random_model(TWO), QuantizeConfig()) for _ in range(2))
    assert all(torch.equal(low(first, site).codes, low(second, site).codes) for site in first.weights)


# ---- sparsity ----------------------------------------------------------------------------------------------------

SPARSE = QuantizeConfig(sparsity="2:4", group=16)


@pytest.mark.parametrize("algorithm", ["gptq", "rtn"])
@pytest.mark.parametrize(("bits", "kept"), [(4, "4-bit group 16"), (None, "float32")])
def test_matrices_of_layers_are_pruned_and_tables_only_rounded(algorithm: str, bits: int | None, kept: str) -> None:
    for architecture in (TWO, replace(TWO, tied=False), OPT_TWO):
        model = random_model(architecture)
        config = SPARSE.model_copy(update={"algorithm": algorithm, "bits": bits, "embedding_bits": 8})
        small = quantized(model, config)
        sites = {site for index in range(2) for site in layer_sites(model, index)}
        assert {site for site, kind in kinds(small).items() if kind == f"2:4 of {kept}"} == sites
        assert {kinds(small)[site] for site in token_tables(model)} == {"8-bit group 16"}


def test_without_bits_tables_stay_as_they_are() -> None:
    model = random_model(TWO)
    small = quantized(model, SPARSE.model_copy(update={"bits": None}))
    assert kinds(small)["model.embed_tokens"] == "float32"
    assert torch.equal(small.weights["model.embed_tokens"].dense(), model.weights["model.embed_tokens"].dense())


@pytest.mark.parametrize("algorithm", ["gptq", "rtn"])
def test_exactly_n_of_m_stay_in_a_model(algorithm: str) -> None:
    small = quantized(random_model(TWO), SPARSE.model_copy(update={"sparsity": "3:4", "group": 0}))
    weight = small.weights[UP].dense()
    assert int((weight == 0).view(96, 16, 4).sum(-1).min()) >= 1
    sparse = small.weights[UP]
    assert isinstance(sparse, Sparse)
    assert torch.equal(sparse.mask.view(96, 16, 4).sum(-1), torch.full((96, 16), 3))


def test_pruning_sees_the_inputs_of_its_own_layer() -> None:
    model = random_model(TWO)
    small = quantized(model, SPARSE.model_copy(update={"ignore": ("model.embed_tokens",)}))
    gram = Calibration(model, Samples(text())).gram(model, 0, [UP])[UP]
    expected = quantize_sparse(model.weights[UP].dense(), gram, Grid(4, 16), 2, 4)
    assert torch.equal(small.weights[UP].dense(), expected.dense())


def test_every_plain_leaf_of_a_tree_is_pruned_and_sparse_ones_are_only_rounded() -> None:
    model = random_model(TWO)
    given = {UP: trees((96, 64))["shared + low rank"], DOWN: sparse((64, 60), 1, 4)}
    small = quantized(model.with_weights(given), SPARSE)
    assert kinds(small)[UP] == (
        "24 shared rows of 4-bit group 32 + rank 24 (2:4 of 4-bit group 12 x 2:4 of 4-bit group 16)"
    )
    assert kinds(small)[DOWN] == "1:4 of 4-bit group 15"


@pytest.mark.parametrize("architecture", [TWO, OPT_TWO], ids=["llama", "opt"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"algorithm": "rtn", "symmetric": False},
        {"bits": None},
        {"bits": 1, "group": None, "sparsity": "1:2"},
        {"sparsity": "3:4", "group": 12, "embedding_bits": 8},
    ],
    ids=str,
)
def test_a_prediction_has_the_sparse_trees_of_the_result(architecture: object, fields: dict[str, object]) -> None:
    model = random_model(architecture)  # type: ignore[arg-type]
    model = model.with_weights({layer_sites(model, 0)[-2]: trees((96, 64))["shared + low rank"]})
    config = SPARSE.model_copy(update=fields)
    promised, small = predict(model, config), quantized(model, config)

    assert kinds(promised) == kinds(small)
    for site, weight in small.weights.items():
        for ours, theirs in zip(nodes(weight), nodes(promised.weights[site]), strict=True):
            assert ours.shape == theirs.shape
            if isinstance(ours, LowBit) and isinstance(theirs, LowBit):
                assert (ours.scales.shape, ours.zeros.shape) == (theirs.scales.shape, theirs.zeros.shape)
            if isinstance(ours, Sparse) and isinstance(theirs, Sparse):
                assert (ours.places.shape, ours.places.dtype) == (theirs.places.shape, theirs.places.dtype)


@pytest.mark.parametrize("algorithm", ["gptq", "rtn"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": "4:8"}, f"quantize: {DOWN}: 60 columns are no multiple of the 8 in 4:8; choose another sparsity"),
        ({"sparsity": "3:4"}, "a group of 16 kept columns cuts a 3:4 in two; give a multiple of 3, or 0"),
    ],
)
def test_widths_that_do_not_divide_are_refused_before_the_work(
    algorithm: str, fields: dict[str, object], message: str
) -> None:
    model = random_model(TWO)
    empty = {site: Dense(torch.empty(weight.shape, device="meta")) for site, weight in model.weights.items()}
    config = SPARSE.model_copy(update={"algorithm": algorithm, **fields})
    for method in (quantized, predict):
        with pytest.raises(RecipeError, match=message):
            method(replace(model, weights=empty), config)  # any work on it would fail in another way
    ignoring = config.model_copy(update={"ignore": (DOWN,), "group": 0})
    assert kinds(quantized(model, ignoring))[DOWN] == "float32"


# ---- a real model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sparsity", "bits"), [((2, 4), 4), ((4, 8), 3)])
def test_pruning_by_the_inputs_loses_less_output_than_by_size_in_every_matrix_of_a_real_layer(
    stories: Path, stories_text: Path, sparsity: tuple[int, int], bits: int
) -> None:
    model = checkpoint.load(stories)
    tokens = Tokenizer(model.files, None).encode_plain(stories_text.read_text(encoding="utf-8"))
    sites = [site for site in layer_sites(model, 0) if model.weights[site].shape[1] % sparsity[1] == 0]
    grams = Calibration(model, Samples(calibrate.windows(tokens, 8, 128, 0, 1))).gram(model, 0, sites)
    for site in sites:
        weight = model.weights[site].dense(torch.float64)
        ours = quantize_sparse(weight, grams[site], Grid(bits, 32), *sparsity)
        plain = sparsify_by_size(weight, *sparsity, Grid(bits, 32))
        lost = [found.dense(torch.float64) - weight for found in (ours, plain)]
        error = [float(torch.einsum("oi,ij,oj->", d, grams[site], d)) for d in lost]
        assert error[0] < error[1], site


def test_gptq_loses_less_output_than_rounding_in_every_matrix_of_a_real_layer(
    stories: Path, stories_text: Path
) -> None:
    model = checkpoint.load(stories)
    tokens = Tokenizer(model.files, None).encode_plain(stories_text.read_text(encoding="utf-8"))
    sites = layer_sites(model, 0)
    grams = Calibration(model, Samples(calibrate.windows(tokens, 8, 128, 0, 1))).gram(model, 0, sites)
    for site in sites:
        weight = model.weights[site].dense(torch.float64)
        lost = {
            name: found.dense(torch.float64) - weight
            for name, found in (
                ("gptq", gptq.quantize(weight, grams[site], Grid(4, 32))),
                ("rtn", quantize_rows(weight, 4, 32)),
            )
        }
        error = {name: float(torch.einsum("oi,ij,oj->", d, grams[site], d)) for name, d in lost.items()}
        assert error["gptq"] < error["rtn"], site


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_gptq_without_text_is_refused_and_rounding_wants_none() -> None:
    assert find("quantize").needs_calibration(QuantizeConfig())
    assert not find("quantize").needs_calibration(RTN)
    with pytest.raises(RecipeError, match="gptq wants calibration text; give it, or use algorithm rtn"):
        run(random_model(TWO), QuantizeConfig(), None, UNKEPT)


def test_weights_that_are_not_finite_are_told_with_their_site() -> None:
    values = random_model(TWO).weights[DOWN].dense().clone()
    values[3, 4] = float("nan")
    with pytest.raises(RecipeError, match=f"quantize: {DOWN}: the weight holds values that are not finite"):
        quantized(random_model(TWO).with_weights({DOWN: Dense(values)}), RTN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 9}, "less than or equal to 8"),
        ({"bits": 0}, "greater than or equal to 1"),
        ({"group": -1}, "greater than or equal to 0"),
        ({"embedding_bits": 0}, "greater than or equal to 1"),
        ({"algorithm": "awq"}, "'gptq' or 'rtn'"),
        ({"scale_search": "median"}, "'mse' or 'max'"),
        ({"bits": 1, "symmetric": False}, "1 bit without symmetric leaves 0 and one more number"),
        ({"embedding_bits": 1, "symmetric": False}, "1 bit without symmetric leaves 0 and one more number"),
        ({"bit": 4}, "Extra inputs"),
        ({"bits": None}, "bits: null leaves matrices as they are; give bits, or a sparsity"),
        ({"sparsity": "2of4"}, "String should match pattern"),
        ({"sparsity": "4:4"}, "sparsity 4:4 is not N:M with 1 <= N < M <= 16"),
        ({"sparsity": "0:4"}, "sparsity 0:4 is not N:M"),
        ({"sparsity": "8:32"}, "sparsity 8:32 is not N:M"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizeConfig.model_validate(fields)
