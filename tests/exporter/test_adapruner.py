"""AdaPruner: what is pruned together, what the search promises, what survives a kill, and LoRA recovery."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from exporter import adapters, compress, plugins, recipe
from exporter.calibrate import Samples
from exporter.compress import adapruner, recovery, search
from exporter.compress.adapruner import SPACE, AdaPrunerConfig, Candidates, predict, pruned_layer, pruned_widths, subset
from exporter.compress.fasp import FaspConfig
from exporter.compress.quantize import QuantizeConfig
from exporter.compress.recovery import Adapted, LoraConfig, adapted_sites, drawn
from exporter.compress.step import UNKEPT, Unkept, layer_sites
from exporter.errors import BackendMissingError, RecipeError
from exporter.gradients import mean_loss
from exporter.model import Architecture, Layer, Model, Provenance
from exporter.plugins import Target
from exporter.session import TorchSession, greedy
from exporter.torch_ops import TorchOps
from exporter.weights import Dense, Weight
from tests.models import LLAMA, OPT, assert_same_shapes, low_bit, random_model, random_unequal

ROOT = Path(__file__).resolve().parents[2]
TWO = replace(LLAMA, hidden=32, layers=(Layer(8, 4, 8, 8, 48), Layer(8, 4, 8, 8, 48)))
OPT_TWO = replace(OPT, hidden=32, layers=(Layer(4, 4, 8, 8, 48), Layer(4, 4, 8, 8, 48)))
FAMILIES = pytest.mark.parametrize("architecture", [TWO, OPT_TWO], ids=lambda a: a.family)
QUARTER = AdaPrunerConfig(sparsity=0.25, trials=1)


def texts(count: int, seed: int, length: int = 12) -> Tensor:
    """Windows in which each token is likely to follow from the one before, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 3, (count, length), generator=generator)
    return (torch.randint(0, 96, (count, 1), generator=generator) + steps.cumsum(1)) % 96


SAMPLES = Samples(texts(20, 1), validation=texts(8, 2))


def pruned(model: Model, config: AdaPrunerConfig = QUARTER, samples: Samples = SAMPLES) -> Model:
    return compress.run(model, config, samples, UNKEPT)


def found(model: Model) -> dict:  # type: ignore[type-arg]
    """What the last step recorded of its search."""
    return dict(model.provenance.steps[-1]["search"])


def values(model: Model, site: str) -> Tensor:
    weight = model.weights[site]
    assert isinstance(weight, Dense)
    return weight.values


def kept_rows(before: Tensor, after: Tensor) -> list[int]:
    """Which row of `before` each row of `after` is."""
    same = (before[:, None] == after[None]).all(-1)  # [before, after]
    assert bool((same.sum(0) == 1).all())
    return same.int().argmax(0).tolist()


def logits(model: Model, ids: Tensor) -> Tensor:
    return adapters.logits(adapters.find(model.architecture.family), TorchOps(model, torch.float64), ids)


def same_bits(left: Model, right: Model) -> bool:
    return all(torch.equal(values(left, site), values(right, site)) for site in left.weights)


# ---- what is pruned together -------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("aggregation", ["sum", "prod"])
def test_a_sliced_model_is_the_masked_model(architecture: Architecture, aggregation: str) -> None:
    model = random_model(architecture)
    widths = pruned_widths(model, QUARTER)
    small = Candidates(model, widths, SAMPLES).at({**SPACE.default, "aggregation": aggregation})
    masked = model
    for index, layer in enumerate(architecture.layers):
        _, _, v, o, *ups, down = layer_sites(model, index)
        group = layer.heads // layer.kv_heads
        kept = torch.zeros(layer.kv_heads * layer.value_dim)
        kept[kept_rows(values(model, v), values(small, v))] = 1
        columns = kept.reshape(layer.kv_heads, 1, -1).expand(-1, group, -1).flatten()
        channels = torch.zeros(layer.mlp)
        channels[kept_rows(values(model, ups[0]), values(small, ups[0]))] = 1
        masked = masked.with_weights(
            {o: Dense(values(model, o) * columns), down: Dense(values(model, down) * channels)}
        )

    assert all(layer.kv_heads == 3 and layer.mlp < 48 for layer in small.architecture.layers)
    assert torch.allclose(logits(small, SAMPLES.ids), logits(masked, SAMPLES.ids), rtol=1e-9, atol=1e-9)


@FAMILIES
def test_queries_keys_values_and_outputs_lose_the_same_heads_in_their_order(architecture: Architecture) -> None:
    model = random_model(architecture)
    small = pruned(model)
    for index, layer in enumerate(architecture.layers):
        q, k, v, o, *ups, down = layer_sites(model, index)
        group = layer.heads // layer.kv_heads
        heads = []
        for site, size in ((q, group * layer.head_dim), (k, layer.head_dim), (v, layer.value_dim)):
            rows = kept_rows(values(model, site), values(small, site))
            assert rows == sorted(set(rows))
            heads.append([row // size for row in rows[::size]])
        columns = kept_rows(values(model, o).T, values(small, o).T)
        heads.append([column // (group * layer.value_dim) for column in columns[:: group * layer.value_dim]])
        assert heads[0] == heads[1] == heads[2] == heads[3] == sorted(set(heads[0]))
        assert len(heads[0]) == small.architecture.layers[index].kv_heads == 3
        channels = [kept_rows(values(model, site), values(small, site)) for site in ups]
        channels.append(kept_rows(values(model, down).T, values(small, down).T))
        assert all(kept == channels[0] == sorted(set(kept)) for kept in channels)


def test_biases_go_with_their_rows_and_later_biases_and_norms_stay() -> None:
    model = random_model(OPT_TWO)
    small = pruned(model)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1"):
        site = f"model.decoder.layers.1.{name}"
        rows = kept_rows(values(model, site), values(small, site))
        assert torch.equal(small.tensors[f"{site}.bias"], model.tensors[f"{site}.bias"][rows])
    for name in ("self_attn.out_proj.bias", "fc2.bias", "final_layer_norm.weight", "self_attn_layer_norm.bias"):
        assert small.tensors[f"model.decoder.layers.1.{name}"] is model.tensors[f"model.decoder.layers.1.{name}"]


def test_heads_and_channels_that_do_nothing_go_first() -> None:
    model = random_model(TWO, optional=())
    _, _, v, _, _, up, _ = layer_sites(model, 0)
    dead, weight, channels = 2, values(model, v).clone(), values(model, up).clone()
    weight[dead * 8 : dead * 8 + 8] = 0
    channels[[4, 11, 30]] = 0
    model = model.with_weights({v: Dense(weight), up: Dense(channels)})
    small = pruned(model)
    assert bool((values(small, v) != 0).all())
    assert bool((values(small, up) != 0).all())


def test_no_sparsity_is_no_change_and_wants_nothing() -> None:
    model, config = random_model(TWO), AdaPrunerConfig(sparsity=0.0)
    assert not compress.needs_calibration(config)
    same = compress.run(model, config, None, UNKEPT)
    assert same.architecture == model.architecture
    assert all(same.weights[site] is model.weights[site] for site in model.weights)


def test_a_sparsity_that_rounds_to_nothing_is_no_change() -> None:
    model = random_model(TWO)
    same = pruned(model, AdaPrunerConfig(sparsity=0.01))
    assert all(same.weights[site] is model.weights[site] for site in model.weights)
    assert same.provenance.steps == predict(model, AdaPrunerConfig(sparsity=0.01)).provenance.steps


def test_the_model_that_is_given_stays_as_it_is() -> None:
    model = random_model(TWO)
    before = {site: weight.dense().clone() for site, weight in model.weights.items()}
    compress.run(pruned(model), LoraConfig(steps=1, batch=2, rank=2), SAMPLES, UNKEPT)
    assert model.architecture == TWO
    assert all(torch.equal(model.weights[site].dense(), kept) for site, kept in before.items())
    assert not any(values(model, site).requires_grad for site in model.weights)


# ---- widths ------------------------------------------------------------------------------------------------------


def shapes_only(architecture: Architecture) -> Model:
    shapes = adapters.find(architecture.family).shapes(architecture)
    weights: dict[str, Weight] = {s: Dense(torch.empty(shape, device="meta")) for s, shape in shapes.weights.items()}
    tensors = {name: torch.empty(length, device="meta") for name, length in shapes.tensors.items()}
    return Model(architecture, weights, tensors, Provenance("shapes", "0" * 64, 0))


SEVEN_B = replace(
    LLAMA, vocab=32000, hidden=4096, positions=2048, tied=False, layers=(Layer(32, 32, 128, 128, 11008),) * 32
)


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_a_quarter_of_26_layers_of_llama_7b_leaves_as_many_parameters_as_llm_pruner(multiple: int) -> None:
    model = shapes_only(SEVEN_B)
    config = AdaPrunerConfig(sparsity=0.25 * 26 / 32, skip_first=4, skip_last=2, multiple=multiple)
    small = predict(model, config)
    assert model.parameters == 6_738_415_616
    assert small.parameters == 5_422_977_024
    kept = [(layer.heads, layer.kv_heads, layer.mlp) for layer in small.architecture.layers]
    assert kept == [(32, 32, 11008)] * 4 + [(24, 24, 8256)] * 26 + [(32, 32, 11008)] * 2


@pytest.mark.parametrize(
    "layer", [Layer(32, 8, 128, 128, 14336), Layer(12, 12, 64, 64, 3072), Layer(9, 3, 64, 64, 1536)]
)
@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.37, 0.5])
@pytest.mark.parametrize("gated", [True, False])
def test_mlps_make_up_for_the_rounding_of_heads(layer: Layer, sparsity: float, gated: bool) -> None:
    after = pruned_layer(layer, gated, sparsity, 8)
    sizes = []
    for w in (layer, after):
        attention = (w.heads + w.kv_heads) * (w.head_dim + w.value_dim)
        sizes.append(attention + w.mlp * (3 if gated else 2))
    assert after.heads // after.kv_heads == layer.heads // layer.kv_heads
    assert abs(after.kv_heads - layer.kv_heads * (1 - sparsity)) <= 0.5
    assert after.mlp % 8 == 0
    assert 1 - sizes[1] / sizes[0] == pytest.approx(sparsity, abs=0.01)


LAYER = st.builds(
    lambda kv, group, dim, value, mlp: (kv, group, dim * 2, value, mlp),
    st.integers(1, 4), st.sampled_from([1, 2]), st.integers(1, 4), st.integers(1, 8), st.integers(1, 40),
)  # fmt: skip


@given(
    widths=st.lists(LAYER, min_size=1, max_size=3),
    family=st.sampled_from(["llama", "opt"]),
    biases=st.sampled_from([(), ("bias",), ("v_proj.bias",)]),
    sparsity=st.floats(0, 0.6),
    skip=st.integers(0, 2),
    multiple=st.sampled_from([1, 8]),
)
@settings(max_examples=30)
def test_a_prediction_has_the_shapes_of_the_result(
    widths: list[tuple[int, int, int, int, int]],
    family: str,
    biases: tuple[str, ...],
    sparsity: float,
    skip: int,
    multiple: int,
) -> None:
    model = random_unequal(widths, family, hidden=16, optional=biases)
    config = AdaPrunerConfig(sparsity=sparsity, skip_first=min(skip, len(widths) - 1), multiple=multiple, trials=1)
    try:
        promised = predict(model, config)
    except RecipeError as error:
        assert "is more than heads and MLPs hold" in str(error)  # noqa: PT017 (drawn, not expected)
        return
    small = pruned(model, config)

    assert_same_shapes(promised, small)
    assert {s: w.shape for s, w in small.weights.items()} == dict(
        adapters.find(family).shapes(small.architecture).weights
    )
    assert bool(logits(small, SAMPLES.ids).isfinite().all())


def test_layers_that_are_skipped_stay_whole() -> None:
    model = random_model(replace(TWO, layers=TWO.layers[:1] * 4))
    small = pruned(model, AdaPrunerConfig(sparsity=0.2, skip_first=1, skip_last=1, trials=1))
    for site in (*layer_sites(model, 0), *layer_sites(model, 3)):
        assert small.weights[site] is model.weights[site]
    assert [layer.kv_heads for layer in small.architecture.layers] == [4, 2, 2, 4]  # 40 % of each of the two


# ---- the search --------------------------------------------------------------------------------------------------


def test_the_default_is_tried_first_and_the_best_is_never_worse() -> None:
    model = random_model(TWO)
    small = pruned(model, AdaPrunerConfig(sparsity=0.25, trials=14))
    record = found(small)
    assert record["trials"] == 14
    assert record["default"] == {"trial": 0, "loss": mean_loss(pruned(model), SAMPLES.validation)}
    assert record["best"]["loss"] <= record["default"]["loss"]
    assert record["best"]["loss"] == mean_loss(small, SAMPLES.validation)
    losses = [step["loss"] for step in record["improvements"]]
    assert record["improvements"][0] == record["default"]
    assert losses == sorted(set(losses), reverse=True)
    assert record["improvements"][-1] == {name: record["best"][name] for name in ("trial", "loss")}


def test_one_trial_is_llm_pruner_alone() -> None:
    record = found(pruned(random_model(TWO)))
    assert record["trials"] == 1
    assert {name: record["best"][name] for name in SPACE.default} == SPACE.default


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_gives_the_same_result(sampler: str) -> None:
    model = random_model(TWO)
    config = AdaPrunerConfig(sparsity=0.25, trials=12, sampler=sampler)
    first, second = pruned(model, config), pruned(model, config)
    assert first.provenance == second.provenance
    assert same_bits(first, second)


def test_another_seed_tries_other_points_and_samplers_differ_behind_the_random_start() -> None:
    def points(sampler: str, seed: int) -> list[search.Point]:
        with search.opened(None, "x", UNKEPT) as study:
            trials = search.minimise(
                lambda point: float(point["first"]), SPACE, 14, sampler, seed, study, UNKEPT  # type: ignore[arg-type]
            )  # fmt: skip
        return [trial.point for trial in trials]

    tpe, random, other = points("tpe", 0), points("random", 0), points("tpe", 1)
    assert tpe[0] == random[0] == other[0] == SPACE.default
    assert tpe[1:] != other[1:]
    assert tpe[search.STARTUP :] != random[search.STARTUP :]


def test_tpe_finds_a_basin_that_random_points_find_worse() -> None:
    def objective(point: search.Point) -> float:
        return abs(float(point["first"]) - 0.3) + abs(float(point["gradient_power"]) - 1.4)

    least = {"tpe": 0.0, "random": 0.0}
    for sampler in least:
        for seed in range(3):
            with search.opened(None, "x", UNKEPT) as study:
                done = search.minimise(objective, SPACE, 40, sampler, seed, study, UNKEPT)  # type: ignore[arg-type]
            least[sampler] += search.best(done).loss
    assert least["tpe"] < least["random"]


def test_every_value_of_the_space_is_one_that_a_model_can_be_pruned_by() -> None:
    model = random_model(TWO)
    candidates = Candidates(model, pruned_widths(model, QUARTER), SAMPLES)
    for name, choices in {**SPACE.named, **SPACE.ranged}.items():
        for value in choices[:: max(1, len(choices) // 5)]:
            assert candidates.loss({**SPACE.default, name: value}) < 50


def test_a_subset_is_its_own_by_seed_and_smaller_ones_begin_larger_ones() -> None:
    assert subset(128, 3, 20)[:5] == subset(128, 3, 5)
    assert subset(128, 3, 20) != subset(128, 4, 20)
    assert len(set(subset(128, 3, 20))) == 20
    assert {n for seed in range(64) for n in subset(32, seed, 20)} == set(range(32))


def test_of_equally_good_trials_the_first_is_the_best() -> None:
    trials = [search.Trial(n, {"n": n}, loss) for n, loss in enumerate([3.0, 2.0, 2.0, float("inf")])]
    assert search.best(trials).number == 1
    assert [trial.number for trial in search.improvements(trials)] == [0, 1]


def test_progress_ends_at_one_and_the_step_is_recorded_without_its_storage(tmp_path: Path) -> None:
    told: list[float] = []
    config = AdaPrunerConfig(sparsity=0.25, trials=3, storage=f"sqlite:///{tmp_path}/s.db")
    small = compress.run(random_model(TWO), config, SAMPLES, Unkept(told.append))
    assert told == [1 / 3, 2 / 3, 1.0]
    step = dict(small.provenance.steps[0])
    del step["search"]
    assert step == config.model_dump(mode="json", exclude={"storage"})
    assert str(tmp_path) not in str(small.provenance)


# ---- kills and workers -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a test ends a run with."""


def journal(folder: Path, trials: int = 10**9) -> Unkept:
    """A journal with a scratch that ends the run once some trials or steps are done."""

    def report(fraction: float) -> None:
        nonlocal trials
        trials -= 1
        if not trials:
            raise Killed

    kept = Unkept(report)
    kept.scratch = folder
    return kept


def test_a_killed_search_goes_on_to_the_same_result(tmp_path: Path) -> None:
    model, config = random_model(TWO), AdaPrunerConfig(sparsity=0.25, trials=13)
    for kill in (1, 11):  # in front of the second trial, and among those that TPE proposes
        with pytest.raises(Killed):
            compress.run(model, config, SAMPLES, journal(tmp_path, kill))
    resumed = compress.run(model, config, SAMPLES, journal(tmp_path))
    assert found(resumed)["trials"] == 13
    assert found(resumed) == found(pruned(model, config))


def test_a_trial_that_was_killed_half_way_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = random_model(TWO), AdaPrunerConfig(sparsity=0.25, trials=3)

    def killed(candidates: Candidates, point: search.Point) -> float:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Candidates, "loss", killed)
        with pytest.raises(Killed):
            compress.run(model, config, SAMPLES, journal(tmp_path))
    record, whole = found(compress.run(model, config, SAMPLES, journal(tmp_path))), found(pruned(model, config))
    assert record["default"]["loss"] == whole["default"]["loss"]  # its number is that of the second attempt
    assert record["best"]["loss"] == whole["best"]["loss"]


WORKER = """
import sys
from exporter import compress
from exporter.compress.adapruner import AdaPrunerConfig
from exporter.compress.step import UNKEPT
from tests.exporter.test_adapruner import SAMPLES, TWO
from tests.models import random_model
config = AdaPrunerConfig(sparsity=0.25, trials=8, storage=sys.argv[1])
small = compress.run(random_model(TWO), config, SAMPLES, UNKEPT)
print(small.provenance.steps[0]["search"]["trials"])
"""


def test_two_workers_share_the_trials_of_one_storage(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/shared.db"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, storage], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]  # fmt: skip
    outcomes = [worker.communicate(timeout=300) for worker in workers]

    assert [worker.returncode for worker in workers] == [0, 0], outcomes
    config = AdaPrunerConfig(sparsity=0.25, trials=8, storage=storage)
    last = found(compress.run(random_model(TWO), config, SAMPLES, UNKEPT))  # nothing is left to try
    assert 8 <= last["trials"] <= 9  # each worker may have had one under way at the end
    assert last["best"]["loss"] <= last["default"]["loss"]


def test_studies_of_other_models_texts_and_configs_in_a_storage_are_left_alone(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/shared.db"
    model, config = random_model(TWO), AdaPrunerConfig(sparsity=0.25, trials=2, storage=storage)
    pruned(model, config)
    other = replace(model, provenance=replace(model.provenance, digest="1" * 64))
    for run in (
        pruned(other, config),
        pruned(model, config.model_copy(update={"seed": 1})),
        pruned(model, config, replace(SAMPLES, ids=texts(20, 5))),
        pruned(model, config, replace(SAMPLES, validation=texts(8, 6))),
    ):
        assert found(run)["trials"] == 2
        assert found(run)["best"]["trial"] < 2
    more = pruned(model, config.model_copy(update={"trials": 4}))  # the same study, longer
    assert found(more)["trials"] == 4


@pytest.mark.parametrize(
    "storage",
    ["sqlite:////no/such/folder/s.db", "nosuchdatabase://me:secret@host/db", "sqlite://me:secret@host/s.db"],
)
def test_a_storage_that_cannot_be_opened_is_told_without_its_password(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "PAUSE", 0)
    with pytest.raises(RecipeError, match=r"storage of trials cannot be opened: .*sqlite:///search.db") as error:
        pruned(random_model(TWO), AdaPrunerConfig(sparsity=0.25, trials=2, storage=storage))
    assert "secret" not in str(error.value)


def test_a_storage_that_is_no_url_is_told_when_the_recipe_is_read_without_what_it_says() -> None:
    step = {"kind": "adapruner", "sparsity": 0.2, "storage": "me:secret@host/db"}
    with pytest.raises(RecipeError, match="storage: no Optuna URL; give one such as sqlite") as error:
        recipe.parse({"calibration": {"validation": 4}, "steps": [step]})
    assert "secret" not in str(error.value)


def by_first(point: search.Point) -> float:
    return float(point["first"])


def test_a_default_that_a_kill_left_in_the_queue_is_tried_once(tmp_path: Path) -> None:
    with search.opened(f"sqlite:///{tmp_path}/s.db", "x", UNKEPT) as study:
        study.enqueue_trial(SPACE.default)
        trials = search.minimise(by_first, SPACE, 3, "tpe", 0, study, UNKEPT)
    assert [trial.point == SPACE.default for trial in trials] == [True, False, False]


def test_a_search_goes_on_until_the_default_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker takes up the default that this one put into the queue, and is killed."""
    with search.opened(f"sqlite:///{tmp_path}/s.db", "x", UNKEPT) as study:
        ask, asked = study.ask, []

        def robbed() -> object:
            asked.append(ask())
            return ask() if len(asked) == 1 else asked[-1]

        monkeypatch.setattr(study, "ask", robbed)
        trials = search.minimise(by_first, SPACE, 1, "tpe", 0, study, UNKEPT)
    assert [trial.point == SPACE.default for trial in trials] == [False, True]


def test_other_pictures_are_another_study() -> None:
    model = random_model(TWO)
    blank, white = (replace(SAMPLES, pixels=torch.full((20, 3, 4, 4), shade)) for shade in (0.0, 1.0))
    assert adapruner._identity(model, QUARTER, blank) != adapruner._identity(model, QUARTER, white)
    assert adapruner._identity(model, QUARTER, blank) == adapruner._identity(model, QUARTER, replace(blank))


# ---- chains and runtimes -----------------------------------------------------------------------------------------


def chain(model: Model, *steps: object) -> Model:
    for step in steps:
        promised = compress.predict(model, step)
        model = compress.run(model, step, SAMPLES, UNKEPT)
        assert promised.architecture == model.architecture
        assert {s: w.shape for s, w in promised.weights.items()} == {s: w.shape for s, w in model.weights.items()}
    return model


@FAMILIES
def test_steps_follow_each_other(architecture: Architecture) -> None:
    lora = LoraConfig(rank=2, steps=2, batch=4)
    small = chain(random_model(architecture), FaspConfig(sparsity=0.1, multiple=4), QUARTER, lora, QUARTER,
                  QuantizeConfig(bits=4, group=16))  # fmt: skip
    assert [step["kind"] for step in small.provenance.steps] == ["fasp", "adapruner", "lora", "adapruner", "quantize"]
    assert bool(logits(small, SAMPLES.ids).isfinite().all())


def test_results_keep_the_type_of_the_checkpoint() -> None:
    model = random_model(TWO)
    halved = model.with_weights({site: Dense(weight.dense().bfloat16()) for site, weight in model.weights.items()})
    small = chain(halved, QUARTER, LoraConfig(rank=2, steps=2, batch=4))
    assert {values(small, site).dtype for site in small.weights} == {torch.bfloat16}


UNEQUAL = replace(LLAMA, layers=(Layer(8, 4, 8, 8, 64), Layer(8, 4, 8, 8, 64), Layer(4, 2, 16, 16, 64)))


@pytest.fixture(params=plugins.target_names())
def target(request: pytest.FixtureRequest) -> Target:
    try:
        return plugins.target(request.param)
    except BackendMissingError as error:
        pytest.skip(str(error))


def test_layers_of_unequal_heads_run_in_every_runtime(target: Target, tmp_path: Path) -> None:
    model = pruned(random_model(UNEQUAL), AdaPrunerConfig(sparsity=0.3, skip_first=1, trials=2))
    assert [layer.kv_heads for layer in model.architecture.layers] == [4, 2, 1]
    plan = target.plan(model, 24)
    target.lower(model, plan, tmp_path)
    assert all(finding.ok for finding in target.inspect(tmp_path, model, plan))
    if not target.runs_here:
        return
    tokens, session = texts(1, 4)[0].tolist(), target.session(tmp_path)
    expected = TorchSession(model, torch.float64).step(tokens)
    pieces = torch.cat([session.step(tokens[:5]), *(session.step([token]) for token in tokens[5:])]).double()
    error = (pieces - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.max()) <= target.budget(model, plan).relative_l2


def test_onnxruntime_genai_takes_each_layers_heads_from_the_graph(tmp_path: Path) -> None:
    """Its config names one head count, the first layer's; it must not believe it."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = pruned(random_model(UNEQUAL), AdaPrunerConfig(sparsity=0.3, skip_last=1, trials=1))
    model = pruned(model, AdaPrunerConfig(sparsity=0.1, skip_first=1, skip_last=1, trials=1))
    layers = [(layer.heads, layer.kv_heads, layer.head_dim) for layer in model.architecture.layers]
    assert layers == [(4, 2, 8), (2, 1, 8), (4, 2, 16)]
    onnx = plugins.target("onnxruntime-mobile")
    onnx.lower(model, onnx.plan(model, 32), tmp_path)
    runtime = genai.Model(str(tmp_path))
    params = genai.GeneratorParams(runtime)
    params.set_search_options(max_length=21)
    generator = genai.Generator(runtime, params)
    generator.append_tokens([1])
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0))[1:] == list(greedy(TorchSession(model), [1], 20, eos=(2,)))


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_more_than_there_is_to_prune_is_refused() -> None:
    for method in (pruned, predict):
        with pytest.raises(RecipeError, match=r"sparsity 0\.9 is more than heads and MLPs hold; give less than 0\.857"):
            method(random_model(TWO), AdaPrunerConfig(sparsity=0.9, trials=1))
    most = AdaPrunerConfig(sparsity=0.85, trials=1, multiple=1)
    assert {layer.kv_heads for layer in pruned(random_model(TWO), most).architecture.layers} == {1}


def test_skipping_every_layer_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"skip_first 1 and skip_last 1 leave none of 2 layers; together .* under 2"):
        predict(random_model(TWO), AdaPrunerConfig(sparsity=0.2, skip_first=1, skip_last=1))


def test_pruning_after_quantizing_is_refused_with_the_order() -> None:
    down = "model.layers.1.mlp.down_proj"
    model = random_model(TWO).with_weights({down: low_bit((32, 48), 4, 16)})
    for method in (pruned, predict):
        with pytest.raises(RecipeError, match=f"{down} is 4-bit group 16; adapruner prunes plain matrices: put it bef"):
            method(model, QUARTER)
    untouched = pruned(model, AdaPrunerConfig(sparsity=0.1, skip_last=1, trials=1))  # gradients pass through it
    assert untouched.weights[down] is model.weights[down]
    with pytest.raises(RecipeError, match=f"{down} is 4-bit group 16; lora trains plain matrices"):
        compress.predict(model, LoraConfig())


def test_an_encoder_is_refused() -> None:
    encoder = shapes_only(TWO)
    encoder = replace(encoder, architecture=replace(encoder.architecture, causal=False))
    with pytest.raises(RecipeError, match="a llama predicts no next token; prune it with fasp"):
        predict(encoder, QUARTER)
    with pytest.raises(RecipeError, match="a llama predicts no next token to be trained on"):
        compress.predict(encoder, LoraConfig())


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (None, "importance reads gradients on calibration text; give it"),
        (Samples(SAMPLES.ids), r"judged on text of their own; add `validation: 16` to the recipe's `calibration`"),
        (replace(SAMPLES, ids=texts(19, 1)), r"up to 20 calibration windows; there are 19; set `windows` .* to 20 or"),
        (replace(SAMPLES, validation=texts(2, 1, 65)), "windows have 65 tokens; the model's context is 64"),
        (replace(SAMPLES, ids=texts(20, 1) + 90), "calibration tokens run from"),
    ],
)
def test_samples_that_a_search_cannot_use_are_refused(samples: Samples | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compress.run(random_model(TWO), AdaPrunerConfig(sparsity=0.25), samples, UNKEPT)


def test_one_trial_wants_ten_windows() -> None:
    assert pruned(random_model(TWO), QUARTER, replace(SAMPLES, ids=texts(10, 1))).parameters
    with pytest.raises(RecipeError, match="up to 10 calibration windows; there are 9"):
        pruned(random_model(TWO), QUARTER, replace(SAMPLES, ids=texts(9, 1)))


def test_a_search_in_which_every_model_overflows_is_refused() -> None:
    model = random_model(TWO, optional=())
    site = "model.embed_tokens"  # gradients do not see what only the validation text reads
    table = values(model, site).clone()
    table[95] = torch.nan
    seen, unseen = SAMPLES.ids % 90, torch.full((2, 12), 95)
    broken = model.with_weights({site: Dense(table)})
    broken = replace(broken, architecture=replace(broken.architecture, tied=False))
    broken = broken.with_weights({"lm_head": model.weights[site]})
    with pytest.raises(RecipeError, match="no trial left a model with finite logits; give a smaller sparsity"):
        pruned(broken, QUARTER, Samples(seen, validation=unseen))


def test_missing_optuna_and_peft_are_told_before_the_work_with_their_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shapes_only(TWO)
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BackendMissingError, match=r"needs optuna, .* pip install 'pocket-exporter\[search\]'"):
        predict(model, AdaPrunerConfig(sparsity=0.25))
    with pytest.raises(BackendMissingError, match=r"method lora needs peft, .* 'pocket-exporter\[recovery\]'"):
        compress.predict(model, LoraConfig())
    assert pruned(random_model(TWO), QUARTER).parameters  # one trial searches nothing


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "less than or equal to 0.9"),
        ({"sparsity": float("nan")}, "finite number"),
        ({"sparsity": 0.2, "trials": 0}, "greater than or equal to 1"),
        ({"sparsity": 0.2, "sampler": "grid"}, "'tpe' or 'random'"),
        ({"sparsity": 0.2, "skip_first": -1}, "greater than or equal to 0"),
        ({"sparsity": 0.2, "storage": ""}, "at least 1 character"),
        ({"sparsity": 0.2, "recovery": None}, "Extra inputs"),
        ({}, "Field required"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdaPrunerConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({}, r"add `validation: 16` to the recipe's `calibration`"),
        ({"validation": 4, "windows": 12}, "up to 20 calibration windows; there are 12"),
    ],
)
def test_a_recipe_without_text_to_search_on_is_refused_when_it_is_read(
    calibration: dict[str, int], message: str
) -> None:
    fasp, searching = {"kind": "fasp", "sparsity": 0.1}, {"kind": "adapruner", "sparsity": 0.1}
    with pytest.raises(RecipeError, match=message):
        recipe.parse({"calibration": calibration, "steps": [fasp, searching]})
    none = recipe.parse({"calibration": calibration, "steps": [{"kind": "adapruner", "sparsity": 0}]})
    assert none.steps[0].kind == "adapruner"


def test_the_example_recipe_is_one() -> None:
    steps = recipe.load(ROOT / "recipes" / "adapruner.yaml").steps
    assert [step.kind for step in steps] == ["adapruner", "lora", "quantize"]


# ---- LoRA recovery -----------------------------------------------------------------------------------------------

LORA = LoraConfig(rank=4, steps=30, batch=8, lr=1e-2)


@FAMILIES
def test_merged_adapters_say_what_adapters_beside_the_matrices_say(architecture: Architecture) -> None:
    model = random_model(architecture)
    adapted = Adapted(model, adapted_sites(model, LORA), LORA)
    recovery.train(adapted, LORA.model_copy(update={"steps": 3}), SAMPLES, UNKEPT)
    adapted.reset()
    adapted.begin()
    with torch.no_grad():
        beside = adapters.logits(adapters.find(architecture.family), adapted, SAMPLES.ids)
    merged = adapted.merged()
    assert not same_bits(merged, model)
    assert torch.allclose(beside.double(), logits(merged, SAMPLES.ids), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        before = logits(model, SAMPLES.ids)
    assert not torch.allclose(before, logits(merged, SAMPLES.ids), atol=1e-2)


def test_adapters_that_are_not_trained_yet_change_nothing() -> None:
    model = random_model(TWO)
    assert same_bits(Adapted(model, adapted_sites(model, LORA), LORA).merged(), model)


@FAMILIES
def test_recovery_lowers_the_loss_on_text_that_it_was_not_trained_on(architecture: Architecture) -> None:
    small = pruned(random_model(architecture))
    tuned = compress.run(small, LORA, SAMPLES, UNKEPT)
    measured = tuned.provenance.steps[-1]["validation"]
    assert measured["before"] == mean_loss(small, SAMPLES.validation)
    assert measured["after"] == mean_loss(tuned, SAMPLES.validation)
    assert measured["after"] < measured["before"] - 0.1
    assert tuned.architecture == small.architecture
    changed = {site for site in small.weights if not torch.equal(values(small, site), values(tuned, site))}
    assert changed == set(adapted_sites(small, LORA))
    assert all(tuned.tensors[name] is small.tensors[name] for name in small.tensors)


def test_recovery_without_validation_text_measures_nothing() -> None:
    tuned = compress.run(random_model(TWO), LoraConfig(rank=2, steps=1, batch=2), Samples(SAMPLES.ids), UNKEPT)
    assert tuned.provenance.steps[-1] == LoraConfig(rank=2, steps=1, batch=2).model_dump(mode="json")


def test_the_same_training_gives_the_same_bits_and_another_seed_others() -> None:
    config = LORA.model_copy(update={"steps": 4, "dropout": 0.3})
    first, second, other = (
        compress.run(random_model(TWO), config.model_copy(update={"seed": seed}), SAMPLES, UNKEPT) for seed in (0, 0, 1)
    )
    assert same_bits(first, second)
    assert not same_bits(first, other)


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = LORA.model_copy(update={"steps": 12, "dropout": 0.3})
    for kill in (1, 5):
        with pytest.raises(Killed):
            compress.run(random_model(TWO), config, SAMPLES, journal(tmp_path, kill))
    told: list[float] = []
    going_on = Unkept(told.append)
    going_on.scratch = tmp_path
    resumed = compress.run(random_model(TWO), config, SAMPLES, going_on)
    assert told[0] > 1 / 12  # what was done is not done again
    assert told[-1] == 1.0
    assert same_bits(resumed, compress.run(random_model(TWO), config, SAMPLES, UNKEPT))


def test_every_window_is_read_once_before_any_comes_again() -> None:
    seen = [window for step in range(5) for window in drawn(10, 4, step, 7)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert len(drawn(3, 8, 0, 0)) == 8  # a batch may be more than there is


def test_the_rate_rises_over_a_tenth_and_falls_to_almost_nothing() -> None:
    rates = [recovery.rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 90)
    assert recovery.rate(0, 1) == 1.0


def test_a_rank_over_the_thinner_side_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"rank 33 is over the thinner side of .*q_proj, 32; give at most that"):
        compress.predict(random_model(TWO), LoraConfig(rank=33))


def test_recovery_without_text_or_with_a_loss_that_overflows_is_refused() -> None:
    with pytest.raises(RecipeError, match="lora: training reads calibration text; give it"):
        compress.run(random_model(TWO), LORA, None, UNKEPT)
    model = random_model(TWO)
    broken = model.with_weights({"model.embed_tokens": Dense(torch.full((96, 32), torch.inf))})
    with pytest.raises(RecipeError, match=r"the loss of step 0 is not finite; give an lr under 0\.01"):
        compress.run(broken, LORA, SAMPLES, UNKEPT)


def test_modules_are_named_by_what_they_do() -> None:
    assert compress.find("adapruner") is adapruner
    assert compress.find("lora") is recovery
