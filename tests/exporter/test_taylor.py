"""Importance by Taylor expansion: the equations, their extremes, and gradients against a slow oracle."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exporter.calibrate import Samples
from exporter.compress.step import layer_sites
from exporter.errors import RecipeError
from exporter.gradients import Gradients, LeafOps, loss, mean_loss
from exporter.maths.channels import strongest
from exporter.maths.groups import rows_of
from exporter.maths.taylor import AGGREGATIONS, GRANULARITIES, Metric, group_scores, row_scores, weight_scores
from exporter.model import Layer, Model
from exporter.torch_ops import TorchOps
from exporter.weights import Dense
from tests.models import LLAMA, OPT, random_model

SMALL = replace(LLAMA, hidden=16, layers=(Layer(4, 2, 4, 4, 12), Layer(2, 1, 4, 4, 8)))
SMALL_OPT = replace(OPT, hidden=16, layers=(Layer(2, 2, 8, 8, 12),))
METRICS = st.builds(Metric, st.sampled_from(GRANULARITIES), st.floats(0, 1), st.floats(0, 1), st.floats(0, 2),
                    st.floats(0, 2), st.sampled_from(AGGREGATIONS))  # fmt: skip


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def windows(count: int = 3, length: int = 8) -> Tensor:
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(3))


def sites_of(model: Model) -> list[str]:
    return [site for index in range(len(model.architecture.layers)) for site in layer_sites(model, index)]


# ---- scores ------------------------------------------------------------------------------------------------------


@given(metric=METRICS, seed=st.integers(0, 2**31))
def test_scores_are_the_equation_written_out(metric: Metric, seed: int) -> None:
    weight, gradient, fisher = drawn(seed, 3, 4), drawn(seed + 1, 3, 4), drawn(seed + 2, 3, 4).abs()
    scores = weight_scores(weight, gradient, fisher, metric)
    for i in range(3):
        total = size = 0.0
        for j in range(4):
            w, g, f = float(weight[i, j]), float(gradient[i, j]), float(fisher[i, j])
            s = metric.first * abs(w) ** metric.weight_power * abs(g) ** metric.gradient_power
            s -= metric.second * 0.5 * w * w * f
            assert float(scores[i, j]) == pytest.approx(s, rel=1e-9, abs=1e-12)
            total, size = total + s, size + abs(s)
        expected = size if metric.granularity == "fine" else abs(total)
        assert float(row_scores(scores, metric.granularity)[i]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_default_is_llm_pruners_sum_of_weight_times_gradient() -> None:
    weight, gradient = drawn(0, 5, 7), drawn(1, 5, 7)
    metric = Metric()
    found = row_scores(weight_scores(weight, gradient, drawn(2, 5, 7).abs(), metric), metric.granularity)
    assert torch.allclose(found, (weight.double() * gradient.double()).abs().sum(1))
    assert metric.aggregation == "sum"


def test_no_gradient_power_is_magnitude_also_where_gradients_are_0() -> None:
    weight = drawn(0, 4, 6)
    found = weight_scores(weight, torch.zeros(4, 6), torch.zeros(4, 6), Metric(gradient_power=0.0))
    assert torch.equal(found, weight.double().abs())


def test_orders_of_the_expansion_cancel_in_a_coarse_row_and_not_in_a_fine_one() -> None:
    weight, gradient = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    fisher = torch.tensor([[0.0, 2.0]])  # scores: 1 and -1
    scores = weight_scores(weight, gradient, fisher, Metric(second=1.0))
    assert scores.tolist() == [[1.0, -1.0]]
    assert (float(row_scores(scores, "coarse")), float(row_scores(scores, "fine"))) == (0.0, 2.0)


@pytest.mark.parametrize(
    ("aggregation", "expected"), [("sum", [11.0, 12.0]), ("mean", [5.5, 6.0]), ("max", [6.0, 10.0]),
                                  ("first", [5.0, 2.0])]
)  # fmt: skip
def test_rows_of_a_matrix_are_added_and_then_matrices_are_aggregated(aggregation: str, expected: list[float]) -> None:
    members = [torch.tensor([[1.0, 4.0], [2.0, 0.0]]), torch.tensor([[6.0], [10.0]])]  # q has more rows than k
    assert group_scores(members, aggregation).tolist() == expected  # type: ignore[arg-type]


def test_a_product_of_small_scores_does_not_become_0() -> None:
    tiny = [torch.tensor([[1e-200], [2e-200], [3e-200]], dtype=torch.float64)] * 7  # the product is 1e-1400
    scores = group_scores(tiny, "prod")
    assert bool(scores.isfinite().all())
    assert strongest(scores, 2).tolist() == [1, 2]
    assert float(scores[1] - scores[0]) == pytest.approx(7 * torch.tensor(2.0).double().log().item())


def test_a_group_without_any_score_is_the_first_to_go_in_a_product() -> None:
    members = [torch.tensor([[0.0], [1e-30], [1e-20]])] * 3
    assert strongest(group_scores(members, "prod"), 2).tolist() == [1, 2]


@given(
    granularity=st.sampled_from(GRANULARITIES),
    aggregation=st.sampled_from(AGGREGATIONS),
    order=st.sampled_from([1, 2]),
    power=st.floats(0.1, 2),
    exponent=st.integers(-8, 8),
    seed=st.integers(0, 2**31),
)
def test_the_order_of_groups_does_not_change_with_the_scale_of_the_loss_where_one_term_is_used(
    granularity: str, aggregation: str, order: int, power: float, exponent: int, seed: int
) -> None:
    metric = Metric(granularity, float(order == 1), float(order == 2), 1.0, power, aggregation)  # type: ignore[arg-type]
    scale = 2.0**exponent  # of the loss: gradients scale alike, their squares twice

    def order_of(scale: float) -> list[int]:
        members = []
        for matrix in range(3):
            weight, gradient = drawn(seed + matrix, 12, 5), drawn(seed - matrix - 1, 12, 5) * scale
            scores = weight_scores(weight, gradient, gradient.square(), metric)
            members.append(row_scores(scores, metric.granularity).reshape(6, 2))
        return group_scores(members, metric.aggregation).argsort().tolist()

    assert order_of(scale) == order_of(1.0)


def test_rows_of_groups_stand_together_and_rise() -> None:
    rows = rows_of(torch.tensor([0, 2, 3]), 4)
    assert rows.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15]


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [SMALL, SMALL_OPT], ids=lambda a: a.family)
def test_gradients_are_the_slope_of_the_loss(architecture) -> None:  # type: ignore[no-untyped-def]
    """Central differences of the float64 loss, at one weight of every matrix."""
    model, ids, step = random_model(architecture), windows(1), 1e-5
    found = Gradients(model, sites_of(model), Samples(ids), torch.float64).of(0)
    for index, site in enumerate(sites_of(model)):
        values = model.weights[site].dense(torch.float64)
        at = (index % values.shape[0], (3 * index) % values.shape[1])
        slopes = []
        for sign in (1, -1):
            moved = values.clone()
            moved[at] += sign * step
            slopes.append(float(loss(TorchOps(model.with_weights({site: Dense(moved)}), torch.float64), ids)))
        assert float(found[site][at]) == pytest.approx((slopes[0] - slopes[1]) / (2 * step), rel=1e-5, abs=1e-9)


def test_float32_gradients_are_the_float64_ones() -> None:
    model = random_model(SMALL)
    exact = Gradients(model, sites_of(model), Samples(windows()), torch.float64).of(1)
    found = Gradients(model, sites_of(model), Samples(windows())).of(1)
    for site, gradient in exact.items():
        assert torch.allclose(found[site].double(), gradient, rtol=1e-4, atol=1e-6)


def test_statistics_are_means_of_gradients_and_of_their_squares_window_by_window() -> None:
    model, ids = random_model(SMALL), windows(4)
    gradients = Gradients(model, sites_of(model), Samples(ids), torch.float64)
    chosen = [2, 0, 3]
    statistics = gradients.statistics(chosen)
    for site in sites_of(model):
        alone = []
        for window in chosen:
            ops = LeafOps(model, [site], torch.float64)
            alone.append(torch.autograd.grad(loss(ops, ids[window : window + 1]), ops.leaves[site])[0])
        mean, squares = statistics[site]
        assert torch.allclose(mean, torch.stack(alone).mean(0), rtol=1e-9, atol=1e-15)
        assert torch.allclose(squares, torch.stack(alone).square().mean(0), rtol=1e-9, atol=1e-15)
        assert not torch.allclose(squares, mean.square())  # the square of the mean is another thing


def test_gradients_without_room_are_worked_out_again_and_are_the_same() -> None:
    model = random_model(SMALL)
    kept, again = (Gradients(model, sites_of(model), Samples(windows()), room=room) for room in (2**31, 0))
    assert kept.of(0) is kept.of(0)
    assert again.of(0) is not again.of(0)
    for site, (mean, squares) in again.statistics([0, 1]).items():
        assert torch.equal(mean, kept.statistics([0, 1])[site][0])
        assert torch.equal(squares, kept.statistics([0, 1])[site][1])


def test_the_loss_is_that_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=96, hidden_size=16, intermediate_size=12, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
                         tie_word_embeddings=True)  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    model = random_model(replace(SMALL, layers=SMALL.layers[:1]), optional=())
    state = {f"{site}.weight": weight.dense() for site, weight in model.weights.items()} | dict(model.tensors)
    theirs.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    with torch.no_grad():
        expected = float(theirs(windows(), labels=windows()).loss)
    assert float(loss(TorchOps(model), windows())) == pytest.approx(expected, rel=1e-5)
    assert mean_loss(model, windows(), batch=2) == pytest.approx(expected, rel=1e-5)


def test_a_model_that_overflows_has_an_infinite_loss_and_no_gradients() -> None:
    model = random_model(SMALL)
    site = "model.layers.0.mlp.down_proj"
    broken = model.with_weights({site: Dense(torch.full((16, 12), 3e38))})
    assert mean_loss(broken, windows()) == float("inf")
    with pytest.raises(RecipeError, match="gradients of calibration window 1 are not finite"):
        Gradients(broken, sites_of(broken), Samples(windows())).of(1)


def test_a_gradient_step_lowers_the_loss() -> None:
    model, ids = random_model(SMALL), windows(1)
    losses = [mean_loss(model, ids)]
    for _ in range(3):
        gradients = Gradients(model, sites_of(model), Samples(ids)).of(0)
        moved = {site: Dense(model.weights[site].dense() - 0.05 * gradient) for site, gradient in gradients.items()}
        model = model.with_weights(moved)
        losses.append(mean_loss(model, ids))
    assert all(after < before for before, after in pairwise(losses))
