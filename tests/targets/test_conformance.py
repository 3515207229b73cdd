"""One suite for all targets: every verb and every weight tree, against float64 torch.

A new target is done when this is green. Each case is a small whole model; a target that cannot run here is held to
what its files say.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporter import compress, evaluate, plugins
from exporter.compress.quantize import QuantizeConfig
from exporter.compress.step import UNKEPT
from exporter.errors import BackendMissingError, PocketError
from exporter.model import Layer, Model, Rope
from exporter.plugins import Plan, Session, Target
from exporter.session import TorchSession
from exporter.weights import Dense, Weight, to_meta
from tests import fakes
from tests.models import BERT, LLAMA, OPT, low_bit, random_model, trees

CONTEXT = 24
TOKENS = [1, 5, 90, 7, 33, 2, 61, 18, 4, 77, 12, 50]

NARROW = Layer(4, 2, 16, 8, 44)  # values narrower than keys, an MLP of no whole group
LLAMA3 = Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 16)


def dense_cases() -> dict[str, Model]:
    """Every verb, with dense weights."""
    untied = replace(LLAMA, tied=False, rope=Rope(10000.0, "linear", 4.0), activation="gelu_tanh")
    unequal = replace(LLAMA, layers=(NARROW, Layer(4, 4, 16, 16, 64), Layer(2, 1, 16, 12, 20)), rope=LLAMA3)
    return {
        "grouped queries, tied head": random_model(LLAMA),
        "biases, head norms, untied head, linear rope": random_model(untied, optional=("bias", "norm.weight")),
        "unequal widths, narrow values, llama3 rope": random_model(unequal, optional=()),
        "heads of 8 channels": random_model(replace(LLAMA, layers=(Layer(8, 4, 8, 8, 44),)), optional=()),
        "learned positions, layer norms, relu": random_model(OPT),
        "exact gelu, no biases": random_model(replace(OPT, activation="gelu", tied=False), optional=()),
    }


def tree_cases() -> dict[str, Model]:
    """Every tree, a different one at every site of a model, so that each meets several shapes."""
    model = random_model(replace(LLAMA, layers=(Layer(4, 2, 16, 16, 96),) * 2), optional=())
    sites = [site for site in model.weights if "layers" in site]
    kinds = sorted(trees((64, 64)))
    cases = {}
    for turn in range(0, len(kinds), 7):
        placed: dict[str, Weight] = {
            site: trees(model.weights[site].shape)[kinds[(index + turn) % len(kinds)]]
            for index, site in enumerate(sites)
        }
        cases[f"trees from {kinds[turn]!r} on"] = model.with_weights(placed)
    return cases


def table_cases() -> dict[str, Model]:
    """Low-bit embeddings, tied to the head and not."""
    cases = {}
    for bits in (4, 8):
        model = random_model(LLAMA, optional=())
        site = "model.embed_tokens"
        table = low_bit(model.weights[site].shape, bits, 32)
        table = replace(table, scales=(table.scales * 8).half().float())  # as large as a trained embedding
        cases[f"{bits}-bit embedding, tied"] = model.with_weights({site: table})
    untied = random_model(replace(LLAMA, tied=False), optional=())
    return cases | {"4-bit head, dense embedding": untied.with_weights({"lm_head": low_bit((96, 64), 4, 32)})}


def encoder_cases() -> dict[str, Model]:
    """Encoders: attention to all tokens, a norm after each sum; every tree at their sites."""
    unequal = replace(BERT, layers=(NARROW, Layer(2, 2, 16, 12, 20)), activation="gelu_tanh", norm_eps=1e-2)
    turned = replace(BERT, rope=LLAMA3)
    model = random_model(BERT)
    sites = [site for site in model.weights if site.startswith("encoder")]
    kinds = sorted(trees((64, 64)))
    cases = {"encoder": model, "encoder, turned": random_model(turned),
             "encoder, grouped queries, narrow values, no biases": random_model(unequal, optional=())}  # fmt: skip
    for turn in (0, len(kinds) - len(sites)):
        placed: dict[str, Weight] = {
            site: trees(model.weights[site].shape)[kinds[index + turn]] for index, site in enumerate(sites)
        }
        cases[f"encoder, trees from {kinds[turn]!r} on"] = model.with_weights(placed)
    table = low_bit((96, 64), 4, 32)
    table = replace(table, scales=(table.scales * 8).half().float())
    return cases | {"encoder, 4-bit embedding": model.with_weights({"embeddings.word_embeddings": table})}


CASES = {**dense_cases(), **tree_cases(), **table_cases(), **encoder_cases()}


@pytest.fixture(scope="module", params=[*plugins.target_names(), fakes.TARGET.name])
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == fakes.TARGET.name:
        return fakes.TARGET  # the one fake passes the suite of the real ones
    try:
        return plugins.target(request.param)
    except BackendMissingError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", CASES)
def test_a_target_says_what_torch_says(name: str, target: Target, tmp_path: Path) -> None:
    model = CASES[name]
    plan = target.plan(model, CONTEXT)
    target.lower(model, plan, tmp_path)

    wrong = [f"{found.what}: {found.detail}" for found in target.inspect(tmp_path, model, plan) if not found.ok]
    assert wrong == []
    assert_sizes(plan, tmp_path)
    if target.runs_here:
        assert_numbers(target, model, plan, tmp_path)


def assert_numbers(target: Target, model: Model, plan: Plan, folder: Path) -> None:
    """Prefill at once, in chunks and token by token, within the budget of float64 torch at every position."""
    budget = target.budget(model, plan).relative_l2
    session = target.session(folder)
    assert session.causal is model.architecture.causal
    if not model.architecture.causal:
        assert_encodes(session, model, budget)
        return
    expected = TorchSession(model, torch.float64).step(TOKENS)
    for chunks in ([12], [7, 1, 4], [1] * 12):
        session.reset()
        pieces = torch.tensor(TOKENS).split(chunks)
        found = torch.cat([session.step(piece.tolist()).double() for piece in pieces])
        assert found.shape == expected.shape
        worst = float(relative_l2(found, expected).max())
        assert worst <= budget, f"chunks {chunks}: relative L2 {worst:.2e}, budget {budget:.2e}"


def assert_encodes(session: Session, model: Model, budget: float) -> None:
    """Whole texts of several lengths, among them the whole context; a second one without a reset is refused."""
    reference = TorchSession(model, torch.float64)
    for text in (TOKENS, TOKENS[:1], TOKENS * 2):
        session.reset()
        reference.reset()
        found, expected = session.step(text).double(), reference.step(text)
        assert found.shape == expected.shape == (len(text), model.architecture.hidden)
        worst = float(relative_l2(found, expected).max())
        assert worst <= budget, f"{len(text)} tokens: relative L2 {worst:.2e}, budget {budget:.2e}"
    with pytest.raises(PocketError, match="an encoder sees a whole text at once"):
        session.step(TOKENS)
    session.reset()
    with pytest.raises(PocketError, match="tokens does not fit an encoder with a context of"):
        session.step([1] * (session.context + 1))


def relative_l2(found: Tensor, expected: Tensor) -> Tensor:
    """[tokens]: error of each position's logits."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def assert_sizes(plan: Plan, folder: Path) -> None:
    """Every site has a decision, and the plan's bytes are there (small models: graphs weigh more than weights)."""
    assert {decision.site for decision in plan.decisions} == set(plan.weights)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert written >= 0.9 * sum(decision.bytes for decision in plan.decisions)


@pytest.mark.parametrize("name", list(tree_cases()))
def test_a_plan_of_shapes_alone_predicts_the_same_bytes(name: str, target: Target) -> None:
    model = CASES[name]
    meta = replace(model, weights={site: to_meta(weight) for site, weight in model.weights.items()})

    predicted, known = target.plan(meta, CONTEXT), target.plan(model, CONTEXT)

    assert predicted.bytes == pytest.approx(known.bytes, rel=0.15)  # zero points are not seen without values


def test_four_bits_in_unequal_widths_say_the_models_text(target: Target, tmp_path: Path) -> None:
    """64 greedy tokens, or a first divergence that the budget explains; prefill and decode agree."""
    if not target.runs_here:
        pytest.skip(f"{target.name} has no runtime on this machine")
    model = random_model(
        replace(LLAMA, positions=96, layers=(NARROW, Layer(4, 4, 16, 16, 64), Layer(2, 1, 16, 12, 20)))
    )
    step = QuantizeConfig(algorithm="rtn", bits=4, group=32)
    model = compress.run(model, step, None, UNKEPT)
    plan = target.plan(model, 80)
    target.lower(model, plan, tmp_path)

    found = evaluate.compare(TorchSession(model), target.session(tmp_path), [1], 64, target.budget(model, plan))

    assert found.ok, found.reasons
    assert found.greedy_agreement == 64 or (found.divergence is not None and found.divergence.is_tie)


def test_lowering_twice_gives_the_same_bytes(target: Target, tmp_path: Path) -> None:
    model = CASES["grouped queries, tied head"].with_weights({"model.layers.0.mlp.down_proj": low_bit((64, 96), 4, 32)})
    plan = target.plan(model, CONTEXT)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        target.lower(model, plan, tmp_path / name)

    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert files
    assert files == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert [f for f in files if (tmp_path / "a" / f).read_bytes() != (tmp_path / "b" / f).read_bytes()] == []


def test_a_value_that_is_not_the_models_is_found(target: Target, tmp_path: Path) -> None:
    model = CASES["grouped queries, tied head"]
    plan = target.plan(model, CONTEXT)
    target.lower(model, plan, tmp_path)
    site = "model.layers.0.mlp.down_proj"
    values = model.weights[site].dense().clone()
    values[3, 5] += 0.5
    other = model.with_weights({site: Dense(values)})

    findings = target.inspect(tmp_path, other, target.plan(other, CONTEXT))

    assert any(not found.ok and site in f"{found.what} {found.detail}" for found in findings)
