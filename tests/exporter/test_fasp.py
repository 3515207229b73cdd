"""FASP: what is pruned together, what stays exact, what restoration promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from exporter import adapters, calibrate, checkpoint, evaluate
from exporter.calibrate import Samples
from exporter.compress import fasp, find, run
from exporter.compress.fasp import FaspConfig, multiplier, predict, value_channels, value_multiple
from exporter.compress.step import UNKEPT, Unkept
from exporter.errors import RecipeError
from exporter.maths.groups import kept_width
from exporter.model import Architecture, Layer, Model, Provenance
from exporter.session import TorchSession
from exporter.tokenizer import Tokenizer
from exporter.weights import Dense, Weight
from tests.models import LLAMA, OPT, assert_same_shapes, low_bit, random_model, random_unequal

TWO = replace(LLAMA, layers=(Layer(4, 2, 16, 16, 96), Layer(4, 2, 16, 16, 60)))
OPT_TWO = replace(OPT, layers=(Layer(4, 4, 16, 16, 96), Layer(4, 4, 16, 16, 60)))
FAMILIES = pytest.mark.parametrize("architecture", [TWO, OPT_TWO], ids=lambda a: a.family)


def text(count: int = 6, length: int = 32) -> Tensor:
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(3))


def pruned(model: Model, config: FaspConfig, windows: Tensor | None = None) -> Model:
    return run(model, config, Samples(text() if windows is None else windows), UNKEPT)


def values(model: Model, site: str) -> Tensor:
    weight = model.weights[site]
    assert isinstance(weight, Dense)
    return weight.values


def kept_rows(before: Tensor, after: Tensor) -> Tensor:
    """Which rows of `before` are in `after`, all of them different."""
    same = (before[:, None] == after[None]).all(-1)  # [before, after]
    assert bool((same.sum(0) == 1).all())
    return same.any(1)


def masked(model: Model, small: Model) -> Model:
    """The unpruned model with the columns that `small` lacks set to 0, and their share of v's bias kept in o's."""
    adapter = adapters.find(model.architecture.family)
    for index, layer in enumerate(model.architecture.layers):
        attention, mlp = adapter.attention_sites(index), adapter.mlp_sites(index)
        group = layer.heads // layer.kv_heads
        v, o = values(model, attention.v), values(model, attention.o)
        rows = kept_rows(v, values(small, attention.v)).reshape(layer.kv_heads, 1, -1)
        columns = rows.expand(-1, group, -1).flatten()
        bias = model.tensors[f"{attention.v}.bias"].reshape(layer.kv_heads, 1, -1).expand(-1, group, -1).flatten()
        o_bias = model.tensors[f"{attention.o}.bias"] + o @ (bias * ~columns)
        kept = kept_rows(values(model, mlp.up), values(small, mlp.up))
        weights = {attention.o: Dense(o * columns), mlp.down: Dense(values(model, mlp.down) * kept)}
        model = model.with_weights(weights).with_tensors({f"{attention.o}.bias": o_bias})
    return model


def logits(model: Model, ids: Tensor) -> Tensor:
    session = TorchSession(model, torch.float64)
    rows = []
    for window in ids:
        session.reset()
        rows.append(session.step(window.tolist()))
    return torch.stack(rows)


# ---- exactness ---------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("scores", ["wanda", "magnitude"])
def test_a_sliced_model_is_the_masked_model(architecture: Architecture, scores: str) -> None:
    model = random_model(architecture)
    small = pruned(model, FaspConfig(sparsity=0.3, scores=scores, restore=False))

    assert small.architecture.layers[0].value_dim < 16
    assert torch.allclose(logits(small, text()), logits(masked(model, small), text()), rtol=1e-5, atol=1e-5)


@FAMILIES
def test_moving_the_bias_of_values_changes_no_output(architecture: Architecture) -> None:
    model = random_model(architecture)
    moved = fasp._bias_moved(model, 0)

    assert len(moved.tensors) == len(model.tensors) - 1
    assert torch.allclose(logits(moved, text()), logits(model, text()), rtol=1e-5, atol=1e-5)


def test_a_bias_of_values_finds_a_place_where_the_output_matrix_had_none() -> None:
    model = random_model(TWO, optional=("v_proj.bias",))
    moved = fasp._bias_moved(model, 0)
    assert "model.layers.0.self_attn.o_proj.bias" in moved.tensors
    assert torch.allclose(logits(moved, text()), logits(model, text()), rtol=1e-5, atol=1e-5)


@FAMILIES
def test_no_sparsity_is_no_change_and_wants_no_text(architecture: Architecture) -> None:
    model = random_model(architecture)
    config = FaspConfig(sparsity=0.0)
    assert not find("fasp").needs_calibration(config)

    same = run(model, config, None, UNKEPT)

    assert same.architecture == model.architecture
    assert all(same.weights[site] is model.weights[site] for site in model.weights)
    assert all(same.tensors[name] is model.tensors[name] for name in model.tensors)


def test_queries_keys_norms_and_later_biases_stay() -> None:
    model = random_model(OPT_TWO)
    small = pruned(model, FaspConfig(sparsity=0.3))
    for name in ("q_proj", "k_proj"):
        site = f"model.decoder.layers.1.self_attn.{name}"
        assert small.weights[site] is model.weights[site]
    for name in ("fc2.bias", "final_layer_norm.weight", "self_attn.q_proj.bias"):
        assert small.tensors[f"model.decoder.layers.1.{name}"] is model.tensors[f"model.decoder.layers.1.{name}"]


def test_the_model_that_is_given_stays_as_it_is() -> None:
    model = random_model(TWO)
    before = {site: weight.dense().clone() for site, weight in model.weights.items()}
    pruned(model, FaspConfig(sparsity=0.3))
    assert model.architecture == TWO
    assert all(torch.equal(model.weights[site].dense(), values) for site, values in before.items())


# ---- choice ------------------------------------------------------------------------------------------------------


def test_value_channels_are_kept_per_key_value_head_and_for_all_its_query_heads() -> None:
    layer = Layer(heads=4, kv_heads=2, head_dim=4, value_dim=4, mlp=8)
    scores = torch.zeros(4, 4)  # [heads, value_dim]
    scores[0] = torch.tensor([5.0, 0, 0, 1])  # heads 0 and 1 read kv head 0: sums 5, 6, 1, 1
    scores[1] = torch.tensor([0.0, 6, 1, 0])
    scores[3] = torch.tensor([0.0, 0, 9, 9])

    rows, columns = value_channels(scores.flatten(), layer, 2)

    assert rows.tolist() == [0, 1, 4 + 2, 4 + 3]
    assert columns.tolist() == [0, 1, 4, 5, 8 + 2, 8 + 3, 12 + 2, 12 + 3]


def test_channels_that_never_fire_go_first() -> None:
    model = random_model(TWO)
    up, dead = "model.layers.0.mlp.up_proj", [5, 17, 40]
    weight, bias = values(model, up).clone(), model.tensors[f"{up}.bias"].clone()
    weight[dead], bias[dead] = 0, 0
    down = "model.layers.0.mlp.down_proj"
    strong = values(model, down).clone()
    strong[:, dead] *= 100  # magnitude alone would keep them
    model = model.with_weights({up: Dense(weight), down: Dense(strong)}).with_tensors({f"{up}.bias": bias})

    small = pruned(model, FaspConfig(sparsity=0.1, restore=False))

    kept = kept_rows(strong.T, values(small, down).T)
    assert not bool(kept[dead].any())
    assert bool(kept_rows(strong.T, values(pruned(model, MAGNITUDE), down).T)[dead].all())


MAGNITUDE = FaspConfig(sparsity=0.1, scores="magnitude", restore=False)


def test_magnitude_without_restoration_wants_no_text() -> None:
    model = random_model(TWO)
    assert not find("fasp").needs_calibration(MAGNITUDE)
    assert run(model, MAGNITUDE, None, UNKEPT).parameters < model.parameters


# ---- widths ------------------------------------------------------------------------------------------------------


def shapes_only(family: str, hidden: int, layer: Layer) -> Model:
    architecture = replace(LLAMA if family == "llama" else OPT, hidden=hidden, layers=(layer,))
    shapes = adapters.find(family).shapes(architecture).weights
    weights: dict[str, Weight] = {site: Dense(torch.empty(shape, device="meta")) for site, shape in shapes.items()}
    return Model(architecture, weights, {}, Provenance("shapes", "0" * 64, 0))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (shapes_only("llama", 4096, Layer(32, 32, 128, 128, 11008)), 1.19876),  # LLaMA 7B
        (shapes_only("llama", 6656, Layer(52, 52, 128, 128, 17920)), 1.19847),  # LLaMA 30B
        (shapes_only("opt", 2048, Layer(32, 32, 64, 64, 8192)), 1.2),  # OPT 1.3B
        (shapes_only("llama", 4096, Layer(32, 8, 128, 128, 14336)), 1.10638),  # LLaMA 3 8B
    ],
    ids=["7B", "30B", "OPT", "3-8B"],
)
def test_other_matrices_are_pruned_more_because_queries_and_keys_are_not(model: Model, expected: float) -> None:
    assert multiplier(model) == pytest.approx(expected, abs=5e-6)


def test_a_prediction_reaches_the_sparsity_over_all_matrices_of_a_layer() -> None:
    model = shapes_only("llama", 4096, Layer(32, 32, 128, 128, 11008))
    small = predict(model, FaspConfig(sparsity=0.2))
    weights = {site: weight for site, weight in model.weights.items() if "layers" in site}
    before, after = (sum(m.weights[s].shape[0] * m.weights[s].shape[1] for s in weights) for m in (model, small))
    assert 1 - after / before == pytest.approx(0.2, abs=0.002)  # rounded to multiples of 8


@pytest.mark.parametrize(
    ("width", "share", "multiple", "kept"),
    [
        (172, 0.0, 8, 172),  # nothing to remove: also where the width is no multiple
        (172, 0.01, 8, 172),
        (172, 0.231, 8, 136),
        (172, 0.231, 32, 128),
        (96, 0.25, 8, 72),
        (96, 0.99, 8, 8),  # at least one multiple
        (6, 0.5, 8, 6),  # narrower than the multiple
        (20, 0.4, 8, 8),  # 12 lies between 8 and 16: the smaller
    ],
)
def test_kept_widths_are_the_nearest_multiple(width: int, share: float, multiple: int, kept: int) -> None:
    assert kept_width(width, share, multiple) == kept


@pytest.mark.parametrize(("value_dim", "multiple", "step"), [(128, 32, 32), (64, 32, 16), (64, 8, 8), (8, 8, 2),
                                                             (6, 8, 1), (2, 8, 1), (48, 12, 12)])  # fmt: skip
def test_value_heads_are_rounded_to_quarters_at_the_coarsest(value_dim: int, multiple: int, step: int) -> None:
    assert value_multiple(value_dim, multiple) == step


LAYER = st.builds(
    lambda kv, group, dim, value, mlp: (kv, group, dim * 2, value, mlp),
    st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.integers(1, 8), st.integers(1, 16), st.integers(1, 40),
)  # fmt: skip


@given(
    widths=st.lists(LAYER, min_size=1, max_size=3),
    family=st.sampled_from(["llama", "opt"]),
    biases=st.sampled_from([(), ("bias",), ("v_proj.bias",)]),
    sparsity=st.floats(0, 0.6),
    multiple=st.sampled_from([1, 4, 8]),
    restore=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_prediction_has_the_shapes_of_the_result(
    widths: list[tuple[int, int, int, int, int]],
    family: str,
    biases: tuple[str, ...],
    sparsity: float,
    multiple: int,
    restore: bool,
) -> None:
    model = random_unequal(widths, family, hidden=24, optional=biases)
    config = FaspConfig(sparsity=sparsity, multiple=multiple, restore=restore)
    try:
        promised = predict(model, config)
    except RecipeError as error:
        assert "is more than values and MLPs hold" in str(error)  # noqa: PT017 (drawn, not expected)
        return
    small = pruned(model, config, text(2, 16))

    assert_same_shapes(promised, small)
    assert promised.provenance == small.provenance
    assert {s: shape for s, shape in adapters.find(family).shapes(small.architecture).weights.items()} == {
        s: w.shape for s, w in small.weights.items()
    }
    assert bool(logits(small, text(1, 8)).isfinite().all())


def test_pruning_twice_prunes_what_is_left() -> None:
    once = pruned(random_model(TWO), FaspConfig(sparsity=0.2))
    twice = pruned(once, FaspConfig(sparsity=0.2))
    assert twice.parameters < once.parameters
    assert len(twice.provenance.steps) == 2
    assert bool(logits(twice, text()).isfinite().all())


# ---- restoration -------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_the_first_restored_matrix_is_never_worse_than_the_pruned_one(architecture: Architecture, ridge: float) -> None:
    """The later ones have other inputs, so only the first is comparable; the maths is tested for all."""
    model = random_model(architecture)
    sites = adapters.find(architecture.family).attention_sites(0)
    gram = calibrate.Calibration(model, Samples(text())).gram(fasp._bias_moved(model, 0), 0, [sites.o])[sites.o]
    errors = []
    for restore in (True, False):
        small = pruned(model, FaspConfig(sparsity=0.3, restore=restore, ridge=ridge))
        rows = kept_rows(values(model, sites.v), values(small, sites.v)).reshape(architecture.layers[0].kv_heads, 1, -1)
        columns = rows.expand(-1, architecture.layers[0].heads // len(rows), -1).flatten()
        filled = torch.zeros(64, 64, dtype=torch.float64)
        filled[:, columns] = values(small, sites.o).double()
        lost = filled - values(model, sites.o).double()
        errors.append(float(torch.einsum("oi,ij,oj->", lost, gram, lost)))
    assert errors[0] < errors[1]


def test_restored_beats_pruned_beats_magnitude_on_text_of_a_real_model(stories: Path, stories_text: Path) -> None:
    model = checkpoint.load(stories)
    text = stories_text.read_text(encoding="utf-8")
    tokenizer = Tokenizer(model.files, model.architecture.bos)
    seen, unseen = (tokenizer.encode_plain(half) for half in (text[: len(text) // 2], text[len(text) // 2 :]))
    windows = calibrate.windows(seen, 16, 128, 0, 1)
    held_out = calibrate.windows(unseen, 8, 256, 0, 1)

    def perplexity(config: FaspConfig) -> float:
        return evaluate.perplexity(TorchSession(pruned(model, config, windows)), held_out).perplexity

    restored = perplexity(FaspConfig(sparsity=0.2))
    plain = perplexity(FaspConfig(sparsity=0.2, restore=False))
    magnitude = perplexity(FaspConfig(sparsity=0.2, restore=False, scores="magnitude"))
    assert restored < plain < magnitude


@FAMILIES
def test_reaching_for_the_dense_models_outputs_comes_closer_to_them(architecture: Architecture) -> None:
    """In the second layer, whose inputs come from a pruned one, the error against the dense outputs is smaller."""
    model = random_model(architecture)
    expected = logits(model, text())
    errors = []
    for target in ("dense", "same"):
        small = pruned(model, FaspConfig(sparsity=0.4, target=target, ridge=1e-6))
        errors.append(float((logits(small, text()) - expected).norm()))
    assert errors[0] < errors[1]


def test_for_one_layer_both_targets_are_the_same_thing() -> None:
    """Nothing before the first attention is pruned, so its inputs are the dense model's."""
    model, site = random_model(TWO), "model.layers.0.self_attn.o_proj"
    dense, same = (pruned(model, FaspConfig(sparsity=0.3, target=target)) for target in ("dense", "same"))
    assert torch.allclose(values(dense, site), values(same, site), rtol=1e-4, atol=1e-5)


def test_random_scores_come_from_the_seed_alone() -> None:
    model, site = random_model(TWO), "model.layers.1.self_attn.v_proj"
    drawn = [
        values(pruned(model, FaspConfig(sparsity=0.3, scores="random", restore=False, seed=seed)), site)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# ---- what is recorded, and refused -------------------------------------------------------------------------------


def test_the_step_is_recorded_and_progress_ends_at_one() -> None:
    told: list[float] = []
    config = FaspConfig(sparsity=0.2)
    small = run(random_model(TWO), config, Samples(text()), Unkept(told.append))
    assert small.provenance.steps == (config.model_dump(mode="json"),)
    assert FaspConfig.model_validate(small.provenance.steps[0]) == config
    assert told == [0.5, 1.0]


def test_results_keep_the_type_of_the_checkpoint() -> None:
    model = random_model(TWO)
    halved = {site: Dense(weight.dense().bfloat16()) for site, weight in model.weights.items()}
    small = pruned(model.with_weights(halved), FaspConfig(sparsity=0.2))
    assert {values(small, site).dtype for site in small.weights} == {torch.bfloat16}


def test_the_same_run_gives_the_same_bits() -> None:
    first, second = (pruned(random_model(TWO), FaspConfig(sparsity=0.2)) for _ in range(2))
    assert all(torch.equal(values(first, site), values(second, site)) for site in first.weights)


def test_more_than_there_is_to_prune_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"sparsity 0\.9 is more than values and MLPs hold; give less than 0\.7"):
        pruned(random_model(TWO), FaspConfig(sparsity=0.9))


def test_pruning_after_quantizing_is_refused_with_the_order() -> None:
    down = "model.layers.1.mlp.down_proj"
    model = random_model(TWO).with_weights({down: low_bit((64, 60), 4, 32)})
    for method in (pruned, predict):
        with pytest.raises(RecipeError, match=f"{down} is 4-bit group 32; fasp prunes plain matrices"):
            method(model, FaspConfig(sparsity=0.2))


def test_missing_text_is_refused() -> None:
    with pytest.raises(RecipeError, match="fasp: scores and restoration want calibration text"):
        run(random_model(TWO), FaspConfig(sparsity=0.2), None, UNKEPT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "less than or equal to 0.9"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"sparsity": float("nan")}, "finite number"),
        ({"sparsity": 0.2, "multiple": 0}, "greater than or equal to 1"),
        ({"sparsity": 0.2, "ridge": -1}, "greater than or equal to 0"),
        ({"sparsity": 0.2, "scores": "taylor"}, "'wanda', 'magnitude' or 'random'"),
        ({"sparsity": 0.2, "sparsty": 0.2}, "Extra inputs"),
        ({}, "Field required"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FaspConfig.model_validate(fields)


def test_an_unknown_method_is_told_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"no method named 'magic'; known: .*fasp.*, quantize"):
        find("magic")
