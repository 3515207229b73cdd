"""Windows of text, and Gram matrices against the activations themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from exporter import adapters
from exporter.calibrate import ROOM, Calibration, Samples, block_influence, fast_batch, split, windows
from exporter.compress.step import layer_sites
from exporter.errors import RecipeError
from exporter.model import Architecture, Layer, Model
from exporter.torch_ops import TorchOps
from exporter.weights import Dense
from tests.models import LLAMA, OPT, random_model

LAYERS = (Layer(4, 2, 16, 16, 96), Layer(4, 2, 16, 6, 40))
OPT_LAYERS = (Layer(4, 4, 16, 16, 96), Layer(4, 4, 16, 6, 40))
ARCHITECTURES = [replace(LLAMA, layers=LAYERS), replace(OPT, layers=OPT_LAYERS)]
FAMILIES = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.family)


def text(model: Model, count: int = 5, length: int = 12) -> Tensor:
    return torch.randint(0, model.architecture.vocab, (count, length), generator=torch.Generator().manual_seed(3))


class Listening(TorchOps):
    """Keeps the input of every matrix."""

    def __init__(self, model: Model) -> None:
        super().__init__(model, torch.float64)
        self.heard: dict[str, list[Tensor]] = {}

    def linear(self, x: Tensor, site: str) -> Tensor:
        self.heard.setdefault(site, []).append(x[0])
        return super().linear(x, site)


def slow_grams(model: Model, windows: Tensor) -> dict[str, Tensor]:
    """Every window alone through the whole model, its inputs kept and multiplied at the end."""
    ops = Listening(model)
    for window in windows:
        ops.reset()
        ops.begin()
        adapters.logits(adapters.find(model.architecture.family), ops, window[None])
    return {site: (x := torch.cat(heard)).T @ x for site, heard in ops.heard.items()}


@FAMILIES
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_grams_of_every_layer_are_those_of_the_whole_model(architecture: Architecture, batch: int) -> None:
    model = random_model(architecture)
    ids = text(model)
    expected = slow_grams(model, ids)
    walk = Calibration(model, Samples(ids), batch=batch, dtype=torch.float64)
    for layer in range(len(architecture.layers)):
        sites = layer_sites(model, layer)
        grams = walk.gram(model, layer, sites)
        assert set(grams) == set(sites)
        for site in sites:
            assert torch.allclose(grams[site], expected[site], rtol=1e-9, atol=1e-12), site
        walk.advance(model, layer)


def test_sums_are_float64_where_activations_are_float32() -> None:
    model = random_model(ARCHITECTURES[0])
    ids, site = text(model), layer_sites(model, 0)[0]
    found = Calibration(model, Samples(ids)).gram(model, 0, [site])[site]
    assert found.dtype == torch.float64
    assert torch.allclose(found, slow_grams(model, ids)[site], rtol=1e-4, atol=1e-4)


def test_sites_of_one_input_share_one_sum() -> None:
    model = random_model(ARCHITECTURES[0])
    q, k, v, o, gate, up, down = layer_sites(model, 0)
    grams = Calibration(model, Samples(text(model))).gram(model, 0, [q, k, v, o, gate, up, down])
    assert grams[q] is grams[k] is grams[v]
    assert grams[gate] is grams[up]
    assert len({id(gram) for gram in grams.values()}) == 4


def test_only_the_sites_asked_for_are_summed() -> None:
    model = random_model(ARCHITECTURES[0])
    _, _, v, o, *_ = layer_sites(model, 0)
    assert list(Calibration(model, Samples(text(model))).gram(model, 0, [v, o])) == [v, o]


def test_a_gram_follows_the_model_as_it_is_now() -> None:
    model = random_model(ARCHITECTURES[0], optional=())
    down = layer_sites(model, 0)[-1]
    walk = Calibration(model, Samples(text(model)))
    before = walk.gram(model, 0, [down])[down]
    changed = model.with_weights({"model.layers.0.mlp.up_proj": Dense(torch.zeros(96, 64))})
    assert float(before.norm()) > 0
    assert float(walk.gram(changed, 0, [down])[down].norm()) == 0


def test_layers_are_walked_in_order() -> None:
    model = random_model(ARCHITECTURES[0])
    walk = Calibration(model, Samples(text(model)))
    with pytest.raises(ValueError, match="stand before layer 0, not before layer 1"):
        walk.gram(model, 1, [])
    walk.advance(model, 0)
    with pytest.raises(ValueError, match="stand before layer 1, not before layer 0"):
        walk.advance(model, 0)


def test_windows_that_do_not_fit_the_model_are_refused() -> None:
    model = random_model(ARCHITECTURES[0])
    with pytest.raises(RecipeError, match="windows have 65 tokens; the model's context is 64"):
        Calibration(model, Samples(text(model, length=65)))
    with pytest.raises(RecipeError, match="tokens run from 0 to 96; the model has 96"):
        Calibration(model, Samples(torch.tensor([[0, 96]])))


def test_activations_that_overflow_are_told_with_their_layer() -> None:
    model = random_model(ARCHITECTURES[0])
    up = "model.layers.0.mlp.up_proj"
    model = model.with_weights({up: Dense(model.weights[up].dense() * 1e38)})
    down = layer_sites(model, 0)[-1]
    with pytest.raises(RecipeError, match="activations of layer 0 are not finite"):
        Calibration(model, Samples(text(model))).gram(model, 0, [down])


# ---- windows -----------------------------------------------------------------------------------------------------


def test_windows_are_pieces_of_the_text_after_a_bos_token() -> None:
    tokens = list(range(100, 150))
    found = windows(tokens, 20, 8, seed=0, bos=1)
    assert found.shape == (20, 8)
    assert bool((found[:, 0] == 1).all())
    assert bool((found[:, 1:].diff(dim=1) == 1).all())
    assert len(set(found[:, 1].tolist())) > 10
    assert set(found[:, 1].tolist()) <= set(range(100, 144))


def test_the_seed_decides_the_windows() -> None:
    tokens = list(range(1000))
    assert torch.equal(windows(tokens, 5, 8, 3, None), windows(tokens, 5, 8, 3, None))
    assert not torch.equal(windows(tokens, 5, 8, 3, None), windows(tokens, 5, 8, 4, None))


@pytest.mark.parametrize(("bos", "needed"), [(1, 7), (None, 8)])
def test_a_text_may_be_one_window_long_but_no_shorter(bos: int | None, needed: int) -> None:
    assert windows(range(needed), 2, 8, 0, bos)[1].tolist()[-needed:] == list(range(needed))
    with pytest.raises(RecipeError, match=f"the text has {needed - 1} tokens and a window needs {needed}"):
        windows(range(needed - 1), 2, 8, 0, bos)


@pytest.mark.parametrize(("count", "length"), [(0, 8), (4, 1)])
def test_windows_that_calibrate_nothing_are_refused(count: int, length: int) -> None:
    with pytest.raises(RecipeError, match="at least 1 window of 2 tokens"):
        windows(range(100), count, length, 0, None)


@pytest.mark.parametrize(
    ("count", "seed", "message"),
    [(10**12, 0, "are over 67,108,864 tokens"), (1, -1, "seed -1 is not possible"), (1, 10**30, "give one from 0 to")],
)
def test_windows_that_no_memory_holds_and_seeds_that_are_none_are_refused(count: int, seed: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        windows(range(100), count, 16, seed, None)


@FAMILIES
def test_a_pass_that_begins_at_held_inputs_gives_what_a_whole_pass_gives(architecture: Architecture) -> None:
    model = random_model(architecture)
    whole, held = (Calibration(model, Samples(text(model)), batch=2, dtype=torch.float64) for _ in range(2))
    for layer in range(len(architecture.layers)):
        *_, o, _up, down = (site for site in layer_sites(model, layer) if "gate" not in site)
        for site in (o, down):
            found, expected = held.gram(model, layer, [site], hold=True), whole.gram(model, layer, [site])
            assert torch.equal(found[site], expected[site])
        held.advance(model, layer)
        whole.advance(model, layer)
        assert all(torch.equal(x, y) for x, y in zip(held.activations, whole.activations))


def test_held_inputs_are_narrowed_with_the_matrix_that_reads_them() -> None:
    model, layer = random_model(ARCHITECTURES[0]), 0
    down = layer_sites(model, layer)[-1]
    kept = torch.arange(0, 96, 2)
    calibration = Calibration(model, Samples(text(model)), dtype=torch.float64)
    calibration.gram(model, layer, [down], hold=True)
    calibration.narrow(down, kept)
    values = model.weights[down].dense()
    calibration.advance(model.with_weights({down: Dense(values[:, kept])}), layer)

    masked = torch.zeros_like(values).index_copy(1, kept, values[:, kept])
    expected = Calibration(model, Samples(text(model)), dtype=torch.float64)
    expected.advance(model.with_weights({down: Dense(masked)}), layer)
    assert torch.allclose(calibration.activations[0], expected.activations[0], rtol=1e-12, atol=1e-12)


def test_a_resumed_walk_stands_where_the_first_one_stood() -> None:
    model = random_model(ARCHITECTURES[0])
    first = Calibration(model, Samples(text(model)))
    first.advance(model, 0)
    again = Calibration(model, Samples(text(model)), resumed=(1, first.activations))
    site = layer_sites(model, 1)[0]
    assert torch.equal(again.gram(model, 1, [site])[site], first.gram(model, 1, [site])[site])


@FAMILIES
def test_block_influence_is_one_minus_the_cosine_of_what_comes_and_what_goes(architecture: Architecture) -> None:
    model = random_model(architecture)
    found = block_influence(model, Samples(text(model)))
    adapter, ops = adapters.find(architecture.family), TorchOps(model, torch.float64)
    expected = torch.zeros(len(architecture.layers), dtype=torch.float64)
    for window in text(model):
        ops.reset()
        ops.begin()
        x = adapter.embed(ops, window[None])
        for layer in range(len(expected)):
            y = adapter.block(ops, x, layer)
            cosines = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
            expected[layer] += (1 - cosines).mean() / len(text(model))
            x = y
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("bos", [None, 1])
def test_validation_windows_are_the_end_of_the_text_and_calibration_never_sees_them(bos: int | None) -> None:
    tokens = list(range(100, 200))
    rest, validation = split(tokens, 3, 10, bos)
    assert validation is not None
    assert validation.shape == (3, 10)
    body = validation if bos is None else validation[:, 1:]
    assert [*rest, *body.flatten().tolist()] == tokens
    assert bos is None or bool((validation[:, 0] == bos).all())
    assert split(tokens, 0, 10, bos) == (tokens, None)


def test_a_text_too_short_for_validation_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"the text has 100 tokens; 10 validation windows .* need 110"):
        split(list(range(100)), 10, 10, None)


def test_channels_that_are_narrowed_twice_and_held_again_are_those_that_are_left() -> None:
    model = random_model(ARCHITECTURES[0])
    down = layer_sites(model, 0)[-1]
    calibration = Calibration(model, Samples(text(model)), batch=2, dtype=torch.float64)
    whole = calibration.gram(model, 0, [down], hold=True)[down].clone()
    first, second = torch.arange(0, 96, 2), torch.tensor([1, 4, 40])
    calibration.narrow(down, first)
    calibration.narrow(down, second)
    kept = first[second]
    assert torch.allclose(calibration.cross(calibration, down), whole[kept][:, kept], rtol=1e-12)

    small = model.with_weights({down: Dense(model.weights[down].dense()[:, kept])})
    again = calibration.gram(small, 0, [down], hold=True)[down]
    assert torch.allclose(again, whole[kept][:, kept], rtol=1e-12)
    calibration.narrow(down, torch.tensor([2]))
    assert torch.allclose(calibration.cross(calibration, down), whole[kept[2:], kept[2:]], rtol=1e-12)


@FAMILIES
def test_attention_is_not_worked_out_again_behind_a_held_input(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = random_model(architecture), []
    plain = TorchOps.cached_attention

    def counted(ops: TorchOps, *arguments: object) -> Tensor:
        calls.append(ops)
        return plain(ops, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchOps, "cached_attention", counted)
    calibration = Calibration(model, Samples(text(model)), batch=5)
    o, down = layer_sites(model, 0)[3], layer_sites(model, 0)[-1]
    calibration.gram(model, 0, [o], hold=True)
    calibration.gram(model, 0, [down], hold=True)
    calibration.advance(model, 0)
    assert len(calls) == 1


def test_inputs_before_attention_are_heard_also_where_a_later_one_is_held() -> None:
    model = random_model(ARCHITECTURES[0])
    q, down = layer_sites(model, 0)[0], layer_sites(model, 0)[-1]
    calibration, fresh = Calibration(model, Samples(text(model))), Calibration(model, Samples(text(model)))
    calibration.gram(model, 0, [down], hold=True)
    assert torch.equal(calibration.gram(model, 0, [q])[q], fresh.gram(model, 0, [q])[q])


def test_batches_are_as_large_as_their_memory_can_be_used_again() -> None:
    model = random_model(ARCHITECTURES[0])  # 96 wide
    assert fast_batch(model, 64, "cpu") == ROOM // (64 * 96)
    assert fast_batch(model, ROOM, "cpu") == 1
    assert fast_batch(model, 64, "cuda") > fast_batch(model, 64, "cpu")
