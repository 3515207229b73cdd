"""PBS2P: which matrices become what, with which inputs; what a file of them takes; real layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from exporter import calibrate, checkpoint, plugins, store
from exporter.calibrate import Calibration, Samples, block_influence
from exporter.compress import find, pbs2p, run
from exporter.compress.fasp import FaspConfig
from exporter.compress.pbs2p import Pbs2pConfig, layer_counts, predict, selected_sites
from exporter.compress.step import UNKEPT, Unkept, layer_sites
from exporter.errors import CheckpointError, RecipeError
from exporter.maths.binary import Plan, binarize, file_bits
from exporter.maths.pruning import index_bits
from exporter.model import Architecture, Layer, Model
from exporter.session import TorchSession
from exporter.tokenizer import Tokenizer
from exporter.weights import Dense, LowBit, Sparse, Sum, Weight, describe, nodes
from tests.models import LLAMA, OPT, low_bit, random_model, sparse

TWO = replace(LLAMA, layers=(Layer(4, 2, 16, 16, 96), Layer(4, 2, 16, 8, 56)))
OPT_TWO = replace(OPT, layers=(Layer(4, 4, 16, 16, 96), Layer(4, 4, 16, 8, 56)))
FAMILIES = pytest.mark.parametrize("architecture", [TWO, OPT_TWO], ids=lambda a: a.family)
DOWN = "model.layers.1.mlp.down_proj"


def samples(count: int = 6, length: int = 32) -> Samples:
    return Samples(torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(3)))


def binarized(model: Model, config: Pbs2pConfig) -> Model:
    return run(model, config, samples(), UNKEPT)


def trees(model: Model) -> dict[str, str]:
    return {site: describe(weight) for site, weight in model.weights.items()}


CONFIGS = [
    Pbs2pConfig(),
    Pbs2pConfig(n=6),
    Pbs2pConfig(n=2, m=4, form="B", metric="gain", sign_rounds=2),
    Pbs2pConfig(n=8),
    Pbs2pConfig(n=3, m=8, block=32, salient=1, metric="wanda"),
    Pbs2pConfig(n=8, salient=8, metric="magnitude"),
    Pbs2pConfig(n=4, form="B", salient=2, salience="weight", block=16),
    Pbs2pConfig(n=4, form="symmetric", salient=1),
    Pbs2pConfig(n=8, form="symmetric"),
]


@FAMILIES
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.n}:{c.m}{c.form}{c.salient}")
def test_a_prediction_has_the_trees_of_the_result(architecture: Architecture, config: Pbs2pConfig) -> None:
    model = random_model(architecture)
    promised, small = predict(model, config), binarized(model, config)

    assert trees(promised) == trees(small)
    for site, weight in small.weights.items():
        pairs = zip(nodes(promised.weights[site]), nodes(weight), strict=True)
        assert all(_parts(one) == _parts(other) for one, other in pairs)
    assert promised.provenance == small.provenance
    assert promised.architecture == small.architecture
    assert bool(torch.isfinite(TorchSession(small).step([1, 2, 3])).all())


@pytest.mark.parametrize("target", ["onnxruntime-mobile", "executorch-android", "coreml-ios"])
@pytest.mark.parametrize(
    "config",
    [Pbs2pConfig(n=n, form=form, salient=salient) for n in (4, 8) for form in ("A", "B", "symmetric")
     for salient in (0, 1)],
    ids=lambda c: f"{c.n}:{c.m}{c.form}{c.salient}",
)  # fmt: skip
def test_a_target_plans_for_the_prediction_what_it_plans_for_the_result(target: str, config: Pbs2pConfig) -> None:
    """Zero points that lie between codes are priced as such before there are any; rows of one group and of two."""
    model = random_model(replace(LLAMA, layers=(Layer(4, 2, 16, 16, 192),)))
    plans = [plugins.target(target).plan(m, 64) for m in (predict(model, config), binarized(model, config))]
    promised, found = ([(d.site, d.tree, d.stored, d.native, d.bytes) for d in plan.decisions] for plan in plans)
    assert promised == found  # a reason may say more of values
    assert plans[0].bytes == plans[1].bytes


def _parts(node: Weight) -> list[tuple[object, object]]:
    """Shapes and types of a node's tensors, and its numbers."""
    match node:
        case LowBit():
            tensors, numbers = [node.codes, node.scales, node.zeros], (node.bits, node.group)
        case Sparse():
            tensors, numbers = [node.places], (node.n, node.m)
        case _:
            return [(type(node), node.shape)]
    return [(type(node), numbers), *((tensor.shape, tensor.dtype) for tensor in tensors)]


@FAMILIES
def test_matrices_of_the_layers_are_binarized_and_nothing_else_is_touched(architecture: Architecture) -> None:
    model = random_model(architecture)
    small = binarized(model, Pbs2pConfig())
    chosen = {site for index in range(2) for site in layer_sites(model, index)}

    assert {site for site, weight in small.weights.items() if isinstance(weight, Sparse)} == chosen
    assert all(small.weights[site] is model.weights[site] for site in set(model.weights) - chosen)
    assert all(small.tensors[name] is tensor for name, tensor in model.tensors.items())


def test_targets_and_ignore_choose_among_the_matrices_of_the_layers() -> None:
    model = random_model(TWO)
    config = Pbs2pConfig(targets=("re:.*mlp",), ignore=(DOWN,))
    small = binarized(model, config)
    changed = {site for site in model.weights if small.weights[site] is not model.weights[site]}
    assert changed == {site for site in model.weights if ".mlp." in site} - {DOWN}
    assert selected_sites(model, config)[1] == [DOWN.replace("down", "gate"), DOWN.replace("down", "up")]


def test_every_matrix_is_fitted_to_the_inputs_that_the_layers_binarized_before_give() -> None:
    model = random_model(TWO)
    config = Pbs2pConfig(metric="gain", sign_rounds=1)
    small = binarized(model, config)
    walk = Calibration(model, samples())
    for index in range(2):
        sites = layer_sites(model, index)
        grams = walk.gram(model, index, sites)
        for site in sites:
            alone = binarize(model.weights[site].dense(), grams[site], config.plan(4))
            assert torch.equal(alone.dense(), small.weights[site].dense())
        model = model.with_weights({site: small.weights[site] for site in sites})
        walk.advance(model, index)


def test_any_float_type_can_be_binarized() -> None:
    model = random_model(TWO)
    model = model.with_weights({site: Dense(weight.dense().bfloat16()) for site, weight in model.weights.items()})
    weight = binarized(model, Pbs2pConfig()).weights[DOWN]
    assert isinstance(weight, Sparse)
    assert isinstance(weight.kept, LowBit)
    assert weight.kept.scales.dtype == torch.float32


def test_a_model_that_was_pruned_to_unequal_widths_can_be_binarized() -> None:
    slim = run(random_model(TWO), FaspConfig(sparsity=0.2), samples(), UNKEPT)
    small = binarized(slim, Pbs2pConfig())
    assert len({slim.weights[DOWN].shape[1], slim.weights[DOWN.replace("1.mlp", "0.mlp")].shape[1]}) == 2
    assert bool(torch.isfinite(TorchSession(small).step([1, 2, 3])).all())
    assert [step["kind"] for step in small.provenance.steps] == ["fasp", "pbs2p"]


# ---- layers that matter more -----------------------------------------------------------------------------------------


def test_layers_that_turn_the_stream_more_keep_more_within_the_budget() -> None:
    model = random_model(replace(LLAMA, layers=LLAMA.layers * 4))
    quiet = "model.layers.2.self_attn.o_proj", "model.layers.2.mlp.down_proj"
    model = model.with_weights({site: Dense(model.weights[site].dense() / 100) for site in quiet})
    config = Pbs2pConfig(coarse=True, spread=2.0)
    influence = block_influence(model, samples()).tolist()
    kept = layer_counts(model, config, selected_sites(model, config), samples(), UNKEPT)
    small = binarized(model, config)

    assert influence.index(min(influence)) == 2
    assert kept[2] == 3
    assert sum(kept) <= 4 * 4
    assert [count for _, count in sorted(zip(influence, kept, strict=True))] == sorted(kept)
    for index, count in enumerate(kept):
        weight = small.weights[f"model.layers.{index}.mlp.down_proj"]
        assert isinstance(weight, Sparse)
        assert (weight.n, weight.m) == (count, 8)


def test_bounds_of_layers_are_one_below_and_one_above_unless_given() -> None:
    assert Pbs2pConfig(coarse=True).bounds == (3, 5)
    assert Pbs2pConfig(coarse=True, n=8).bounds == (7, 8)
    assert Pbs2pConfig(coarse=True, n=1, m=2).bounds == (1, 2)
    assert Pbs2pConfig(coarse=True, low=2, high=8).bounds == (2, 8)
    assert Pbs2pConfig().bounds == (4, 4)


# ---- what a file takes -----------------------------------------------------------------------------------------------


def stored_bytes(weight: Weight, folder: Path) -> int:
    """Bytes of a matrix's leaves as `store` writes them."""
    site = "model.layers.0.mlp.down_proj"
    folder.mkdir()
    out, width = weight.shape
    wide = replace(LLAMA, layers=(Layer(4, 2, 16, 16, width),), hidden=out)
    store.save(random_model(wide).with_weights({site: weight}), folder)
    content = (folder / store.WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    spans = [entry["data_offsets"] for name, entry in header.items() if name.startswith(f"weight/{site}")]
    assert torch.equal(store.load(folder).weights[site].dense(), weight.dense())
    return sum(end - start for start, end in spans)


@pytest.mark.parametrize(
    "plan",
    [Plan(6, 8), Plan(5, 8), Plan(4, 8), Plan(2, 4), Plan(8, 8), Plan(4, 8, "B"), Plan(4, 8, salient=1), Plan(8, 16),
     Plan(4, 8, "symmetric")],
    ids=lambda p: f"{p.n}:{p.m}{p.form}{p.salient}",
)  # fmt: skip
def test_bytes_in_a_file_are_those_of_the_formula(plan: Plan, tmp_path: Path) -> None:
    """Width 256, where no row needs padding. Steps and zero points are float16 numbers, stored as float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 256, generator=generator, dtype=torch.float64)
    weight = binarize(torch.randn(64, 256, generator=generator), x.T @ x, plan)
    bits = file_bits(plan.n, plan.m, 128, plan.form, plan.salient)
    one_zero_point = 16 * (plan.form == "symmetric")
    assert stored_bytes(weight, tmp_path / "model") * 8 == bits * 64 * 256 + one_zero_point


@pytest.mark.parametrize("m", [2, 4, 7, 8, 16])
def test_patterns_are_saved_in_as_few_bits_as_number_them_and_read_back(m: int, tmp_path: Path) -> None:
    for n in range(1, m + 1):
        weight = sparse((32, 3 * m), n, m)
        taken = stored_bytes(weight, tmp_path / str(n)) - 32 * 3 * n * 4
        assert taken == 32 * -(-3 * index_bits(n, m) // 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 3}, "3:8 is not a sparsity of rows that keep 32 columns"),
        ({"n": 9}, "9:8 is not a sparsity"),
        ({"n": 0}, "0:8 is not a sparsity"),
        ({"m": 17}, "4:17 is not a sparsity"),
        ({"m": 4}, "0 values of 1 bits take 0 bytes, not 7"),
        ({"m": 16}, "take 11 bytes, not 7"),
        ({"n": 2**70}, "is not a sparsity"),
        ({"m": "8"}, "m is '8', no whole number"),
    ],
    ids=str,
)
def test_a_saved_sparsity_that_lies_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    site = "model.layers.0.self_attn.q_proj"
    store.save(random_model(LLAMA).with_weights({site: sparse((64, 64), 4, 8)}), tmp_path)
    manifest = json.loads((tmp_path / store.MANIFEST).read_text())
    manifest["trees"][site].update(changes)
    (tmp_path / store.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        store.load(tmp_path)


def test_a_saved_pattern_that_is_none_is_refused(tmp_path: Path) -> None:
    site = "model.layers.0.self_attn.q_proj"
    store.save(random_model(LLAMA).with_weights({site: sparse((64, 64), 4, 8)}), tmp_path)
    content = bytearray((tmp_path / store.WEIGHTS).read_bytes())
    length = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + length])[f"weight/{site}.patterns"]["data_offsets"][0]
    content[8 + length + start] = 0xFF
    (tmp_path / store.WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="there is no pattern 127 of 4:8; there are 70"):
        store.load(tmp_path)


# ---- real layers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_layers(stories: Path, stories_text: Path) -> list[tuple[Tensor, Tensor]]:
    """All 35 matrices of stories260K, each with the Gram matrix of its inputs in the model as it is."""
    model = checkpoint.load(stories)
    tokens = Tokenizer(model.files, None).encode_plain(stories_text.read_text(encoding="utf-8"))
    walk = Calibration(model, Samples(calibrate.windows(tokens, 64, 256, 0, 1)))
    found = []
    for index in range(len(model.architecture.layers)):
        grams = walk.gram(model, index, layer_sites(model, index))
        found += [(model.weights[site].dense(torch.float64), gram) for site, gram in grams.items()]
        walk.advance(model, index)
    return found


def relative_error(weight: Tensor, gram: Tensor, plan: Plan) -> float:
    """|(W - W') X| / |W X|; columns of nothing make up whole groups where m does not divide the width, 172."""
    pad = -weight.shape[1] % plan.m
    padded = binarize(F.pad(weight, (0, pad)), F.pad(gram, (0, pad, 0, pad)), plan).dense(torch.float64)
    lost = weight - padded[:, : weight.shape[1]]
    return float((((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum()).sqrt())


def test_on_real_layers_pruning_beats_not_pruning_and_gain_beats_hessian(
    real_layers: list[tuple[Tensor, Tensor]],
) -> None:
    """Mean relative output errors, measured before with other windows of the same text; they differ by under 0.002."""

    def mean(plan: Plan) -> float:
        return sum(relative_error(*layer, plan) for layer in real_layers) / len(real_layers)

    whole = mean(Plan(8, 8))
    assert whole == pytest.approx(0.4885, abs=0.002)
    for n, m, hessian, gain in ((6, 8, 0.4193, 0.4062), (4, 8, 0.4095, 0.4012), (2, 4, 0.4415, 0.4318)):
        found = mean(Plan(n, m)), mean(Plan(n, m, metric="gain", sign_rounds=3))
        assert found == pytest.approx((hessian, gain), abs=0.002)
        assert found[1] < found[0] < whole


# ---- what is recorded, and refused -----------------------------------------------------------------------------------


def test_the_step_is_recorded_and_progress_ends_at_one() -> None:
    told: list[float] = []
    config = Pbs2pConfig(n=2, m=4)
    small = run(random_model(TWO), config, samples(), Unkept(told.append))
    assert small.provenance.steps == (config.model_dump(mode="json"),)
    assert Pbs2pConfig.model_validate(small.provenance.steps[0]) == config
    assert told == [0.5, 1.0]


def test_the_same_run_gives_the_same_bits() -> None:
    first, second = (binarized(random_model(TWO), Pbs2pConfig(metric="gain", salient=1)) for _ in range(2))
    assert all(torch.equal(first.weights[site].dense(), second.weights[site].dense()) for site in first.weights)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Pbs2pConfig(n=4, m=9, block=126), r"q_proj has 64 columns, no multiple of m = 9; give an m that divides them "
                                           r"\(2, 4, 8, 16\), or name the site in ignore"),
        (Pbs2pConfig(m=16, targets=(DOWN,)), r"down_proj has 56 columns, no multiple of m = 16; .*\(2, 4, 7, 8, 14\)"),
    ],
)  # fmt: skip
def test_widths_that_are_no_whole_groups_are_refused_before_the_work(config: Pbs2pConfig, message: str) -> None:
    for method in (binarized, predict):
        with pytest.raises(RecipeError, match=message):
            method(random_model(TWO), config)


def test_a_width_that_no_group_divides_is_refused_with_the_way_out() -> None:
    model = random_model(replace(LLAMA, layers=(Layer(4, 2, 16, 16, 97),)))
    with pytest.raises(RecipeError, match="has 97 columns, no multiple of m = 8; no m does: name the site in ignore"):
        predict(model, Pbs2pConfig())
    assert describe(binarized(model, Pbs2pConfig(n=8)).weights["model.layers.0.mlp.down_proj"]).startswith("1-bit")


def test_a_matrix_that_is_no_longer_dense_is_refused_with_the_way_out() -> None:
    model = random_model(TWO).with_weights({DOWN: low_bit((64, 56), 4, 28)})
    for method in (binarized, predict):
        with pytest.raises(RecipeError, match=f"{DOWN} is 4-bit group 28; pbs2p binarizes plain matrices: name the"):
            method(model, Pbs2pConfig())
    assert binarized(model, Pbs2pConfig(ignore=(DOWN,))).weights[DOWN] is model.weights[DOWN]


def test_nothing_to_binarize_is_refused() -> None:
    with pytest.raises(RecipeError, match="ignore leaves out everything that targets chose"):
        predict(random_model(TWO), Pbs2pConfig(ignore=("re:.*",)))


def test_missing_text_is_refused() -> None:
    assert find("pbs2p").needs_calibration(Pbs2pConfig())
    with pytest.raises(RecipeError, match="pbs2p: levels are fitted to the outputs on calibration text; give some"):
        run(random_model(TWO), Pbs2pConfig(), None, UNKEPT)


def test_weights_that_are_not_finite_are_told_with_their_site() -> None:
    model = random_model(TWO)
    broken = model.weights[DOWN].dense().clone()
    broken[0, 0] = torch.nan
    with pytest.raises(RecipeError, match=f"pbs2p: {DOWN}: the weight holds values that are not finite"):
        pbs2p._binarized(model.with_weights({DOWN: Dense(broken)}), DOWN, torch.eye(56).double(), Plan(4, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 9}, "not so: low 9 <= n 9 <= high 9 <= m 8"),
        ({"coarse": True, "low": 5}, "not so: low 5 <= n 4 <= high 5 <= m 8"),
        ({"coarse": True, "high": 9}, "not so: low 3 <= n 4 <= high 9 <= m 8"),
        ({"low": 2}, "low and high are bounds of coarse; give coarse: true, or leave them out"),
        ({"salient": 5}, "5 salient of every 8 are more than the 4 that are kept"),
        ({"coarse": True, "salient": 4}, "4 salient of every 8 are more than the 3 that are kept"),
        ({"block": 100}, "block 100 is no multiple of m = 8; 96 is"),
        ({"block": 4}, "block 4 is no multiple of m = 8; 8 is"),
        ({"n": 0}, "greater than or equal to 1"),
        ({"m": 17}, "less than or equal to 16"),
        ({"damp": 0}, "greater than 0"),
        ({"form": "C"}, "'A', 'B' or 'symmetric'"),
        ({"metric": "random"}, "'hessian', 'gain', 'magnitude' or 'wanda'"),
        ({"spread": float("inf")}, "finite number"),
        ({"metrik": "gain"}, "Extra inputs"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Pbs2pConfig.model_validate(fields)


def test_terms_of_a_sum_share_the_places_of_the_first() -> None:
    weight = binarized(random_model(TWO), Pbs2pConfig(salient=2)).weights[DOWN]
    assert isinstance(weight, Sum)
    first, second = weight.terms
    assert isinstance(first, Sparse)
    assert isinstance(second, Sparse)
    assert bool((second.mask <= first.mask).all())
