"""Models that only transformers knows: equal to it, rounded, refused where their insides would have to be known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from exporter import adapters, checkpoint, compress, pipeline, plugins, store
from exporter.adapters import generic
from exporter.calibrate import Samples
from exporter.compress.adapruner import AdaPrunerConfig
from exporter.compress.fasp import FaspConfig
from exporter.compress.pbs2p import Pbs2pConfig
from exporter.compress.quantize import QuantizeConfig
from exporter.compress.recovery import LoraConfig
from exporter.compress.step import UNKEPT, matrices
from exporter.errors import (
    ArchitectureError,
    BackendMissingError,
    CheckpointError,
    PocketError,
    RecipeError,
    TargetError,
)
from exporter.evaluate import agreement
from exporter.model import Model
from exporter.recipe import parse
from exporter.session import TorchSession
from exporter.weights import Dense, LowBit
from tests import checkpoints

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, tuple[Any, Any]] = {
    "gpt2": (
        transformers.GPT2Config(vocab_size=80, n_embd=48, n_layer=2, n_head=4, n_positions=32, **SPECIAL),
        transformers.GPT2LMHeadModel,
    ),
    "gpt_neox": (
        transformers.GPTNeoXConfig(
            vocab_size=80, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=32, **SPECIAL,
        ),
        transformers.GPTNeoXForCausalLM,
    ),
    "distilbert": (
        transformers.DistilBertConfig(
            vocab_size=80, dim=48, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32
        ),
        transformers.DistilBertModel,
    ),
}  # fmt: skip
TOKENS = [1, 5, 70, 7, 33, 2, 61, 18, 4, 77, 12, 50]
WINDOWS = torch.randint(0, 80, (8, 24), generator=torch.Generator().manual_seed(3))


def written(folder: Path, name: str) -> Any:
    """A random checkpoint; returns transformers' own model."""
    torch.manual_seed(0)
    config, kind = CONFIGS[name]
    model = kind(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.float().eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("gpt2")
    written(folder, "gpt2")
    return checkpoint.load(folder)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- equal to transformers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_what_only_transformers_knows_equals_it_at_once_and_step_by_step(name: str, tmp_path: Path) -> None:
    theirs = written(tmp_path, name)
    with torch.no_grad():
        said = theirs(torch.tensor([TOKENS]))
    expected = said.logits[0] if "logits" in said else said.last_hidden_state[0]

    model = checkpoint.load(tmp_path)
    session = TorchSession(model)

    assert model.architecture.family == "generic"
    assert model.architecture.causal is ("logits" in said)
    assert model.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    assert relative(session.step(TOKENS), expected) < 1e-5
    if session.causal:
        session.reset()
        pieces = torch.cat([session.step(TOKENS[:7]), session.step(TOKENS[7:8]), session.step(TOKENS[8:])])
        assert relative(pieces, expected) < 1e-5


def test_matrices_that_transformers_keeps_the_other_way_round_are_turned(gpt2: Model) -> None:
    assert gpt2.weights["transformer.h.0.mlp.c_fc"].shape == (192, 48)
    assert "lm_head" not in gpt2.weights  # it is the embedding, and multiplies under its name


def test_a_saved_model_runs_without_the_checkpoint(gpt2: Model, tmp_path: Path) -> None:
    store.save(gpt2, tmp_path)

    found = pipeline.load(str(tmp_path))

    assert found.architecture == gpt2.architecture
    assert torch.equal(TorchSession(found).step(TOKENS), TorchSession(gpt2).step(TOKENS))
    assert pipeline.is_generic(str(tmp_path))
    assert not pipeline.is_generic("builtin")


def test_a_text_longer_than_the_context_is_refused_step_by_step(gpt2: Model) -> None:
    session = TorchSession(gpt2)
    session.step(TOKENS)
    with pytest.raises(PocketError, match="36 tokens do not fit the context of 32"):
        session.step(TOKENS * 2)


# ---- what cannot be ----------------------------------------------------------------------------------------------


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mumba"}, "no adapter for model type 'mumba', and transformers does not know it either"),
        ({"is_encoder_decoder": True}, "a model of encoder and decoder, or one in codes, cannot be exported"),
        ({"quantization_config": {"bits": 4}}, "a model of encoder and decoder, or one in codes, cannot be exported"),
        ({"n_layer": 3}, "missing tensors: transformer.h.2"),
        ({"n_layer": 1}, "unexpected tensors: transformer.h.1"),
        ({"n_inner": 5}, "transformers cannot read|mismatched tensors"),
        ({"n_head": 5}, "transformers makes no model of it"),
    ],
)
def test_a_config_that_is_not_the_checkpoints_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    written(tmp_path, "gpt2")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(edited(tmp_path, **changes))


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    theirs = written(tmp_path, "gpt2")
    (tmp_path / "evil.py").write_text("raise SystemExit('this code was run')\n")
    edited(tmp_path, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})

    model = checkpoint.load(tmp_path)

    assert relative(TorchSession(model).step(TOKENS), theirs(torch.tensor([TOKENS])).logits[0].detach()) < 1e-5


def test_a_model_with_tables_of_its_own_kind_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(
        vocab_size=80, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError, match=r"only plain matrices, tables and vectors .* not model.embed_tokens"):
        checkpoint.load(tmp_path)


def test_a_model_whose_code_does_more_than_its_matrices_say_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "gpt2")
    right = generic._Plain.linear
    monkeypatch.setattr(generic._Plain, "linear", lambda self, x, site: right(self, x, site) * 1.01)
    with pytest.raises(ArchitectureError, match="does more than its matrices and norms say"):
        checkpoint.load(tmp_path)


def test_without_transformers_the_families_that_are_known_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ArchitectureError, match=r"no adapter for model type 'gpt2'; known: bert, .*\[generic\]"):
        adapters.find_or_generic("gpt2")


def test_a_saved_generic_model_without_transformers_says_which_extra_brings_it(
    gpt2: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    generic._network.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendMissingError, match=r"needs transformers, .*pocket-exporter\[generic\]"):
        TorchSession(gpt2).step(TOKENS)


# ---- compressed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_gptq_in_one_go_beats_rounding_to_nearest_and_is_predicted(name: str, tmp_path: Path) -> None:
    written(tmp_path, name)
    model, held_out = checkpoint.load(tmp_path), torch.randint(0, 80, (6, 24))
    found = {}
    for algorithm in ("gptq", "rtn"):
        step = QuantizeConfig(algorithm=algorithm, bits=3, group=16)
        small, predicted = compress.run(model, step, Samples(WINDOWS), UNKEPT), compress.predict(model, step)
        assert {site: weight.shape for site, weight in small.weights.items()} == {
            site: weight.shape for site, weight in predicted.weights.items()
        }
        assert all(isinstance(small.weights[site], LowBit) for site in matrices(model, 0))
        found[algorithm] = agreement(TorchSession(model), TorchSession(small), held_out).kl
    assert 0 < found["gptq"] < found["rtn"]


def test_sites_are_chosen_by_selectors_and_positions_are_never_rounded(gpt2: Model) -> None:
    step = QuantizeConfig(algorithm="rtn", targets=("re:.*",), ignore=("re:.*attn.*", "transformer.wte"))

    small = compress.run(gpt2, step, None, UNKEPT)

    rounded = {site for site, weight in small.weights.items() if isinstance(weight, LowBit)}
    assert rounded == {f"transformer.h.{layer}.mlp.{name}" for layer in (0, 1) for name in ("c_fc", "c_proj")}
    assert isinstance(small.weights["transformer.wpe"], Dense)


@pytest.mark.parametrize("run", [compress.predict, lambda *args: compress.run(*args, Samples(WINDOWS), UNKEPT)])
@pytest.mark.parametrize(
    "step",
    [FaspConfig(sparsity=0.2), AdaPrunerConfig(sparsity=0.2), Pbs2pConfig(), LoraConfig()],
    ids=lambda step: step.kind,
)
def test_a_model_whose_insides_are_unknown_is_not_pruned(step: Any, run: Any, gpt2: Model) -> None:
    with pytest.raises(RecipeError, match="that only transformers knows cannot be pruned structurally"):
        run(gpt2, step)


@pytest.mark.parametrize("target", ["onnxruntime-mobile", "coreml-ios"])
def test_a_target_that_writes_its_own_graph_refuses_before_the_work(target: str, gpt2: Model) -> None:
    with pytest.raises(TargetError, match=f"{target} cannot take a model that only transformers knows"):
        plugins.target(target).plan(gpt2, 16)


def test_the_road_of_a_generic_model_ends_in_executorch(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    written(folder, "gpt2")
    recipe = parse(
        {"steps": [{"kind": "quantize", "algorithm": "rtn", "bits": 4, "group": 32, "ignore": ["re:.*wte"]}]}
    )

    outcome = pipeline.run(pipeline.Job(str(folder), ("executorch-android",), tmp_path / "out", recipe))[0]

    assert outcome.ok, outcome.problems
    assert outcome.native == outcome.sites
    small = pipeline.load(str(tmp_path / "out" / "model"))
    session = plugins.target("executorch-android").session(tmp_path / "out" / "executorch-android")
    assert session.causal
    expected = TorchSession(small).step(TOKENS)
    pieces = torch.cat([session.step(TOKENS[:7]), session.step(TOKENS[7:8]), session.step(TOKENS[8:])])
    session.reset()
    at_once = session.step(TOKENS)
    budget = outcome.comparison.budget_l2 if outcome.comparison is not None else 0.0
    assert relative(at_once, expected) <= budget
    assert relative(pieces, at_once) < 1e-5  # the whole text again at every step
    session.reset()
    with pytest.raises(PocketError, match="33 tokens do not fit the context of 32"):
        session.step([1] * 33)


def test_a_bert_is_known_and_no_generic_model(tmp_path: Path) -> None:
    checkpoints.bert(tmp_path)
    assert not pipeline.is_generic(str(tmp_path))
    model = checkpoint.load(tmp_path)
    assert replace(model.architecture, config=None) == model.architecture
