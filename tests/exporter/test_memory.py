"""The memory plan: counted from shapes, the same for any number of layers, printed before the work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter import compress, memory
from exporter import recipe as recipes
from exporter.calibrate import Samples
from exporter.cli import main
from exporter.compress.fasp import FaspConfig
from exporter.compress.quantize import QuantizeConfig
from exporter.memory import Moment
from exporter.model import Layer, Model
from exporter.weights import LowBit, to_meta
from tests.models import LLAMA, OPT, low_bit, random_model, sparse

FASP, GPTQ = FaspConfig(sparsity=0.2), QuantizeConfig(bits=4)
STEPS = [("fasp", FASP), ("gptq", GPTQ)]


def model(layers: int = 1, family: Any = LLAMA) -> Model:
    return random_model(replace(family, layers=(family.layers[0],) * layers))


def samples(windows: int = 4, length: int = 32) -> Samples:
    return Samples(torch.zeros(windows, length, dtype=torch.int64))


def moment(found: list[Moment], step: str, name: str) -> Moment:
    return next(one for one in found if (one.step, one.name) == (step, name))


def step(kind: str) -> Any:
    fields = {"fasp": {"sparsity": 0.1}, "adapruner": {"sparsity": 0.1}, "casp": {"bits": 4}}.get(kind, {})
    return recipes.parse({"calibration": {"validation": 16}, "steps": [{"kind": kind, **fields}]}).steps[0]


def test_embedding_is_counted_in_its_file_and_as_floats() -> None:
    found = moment(memory.plan(model(), STEPS, samples()), "fasp", "embed")
    assert found.embeddings == 96 * 64 * (4 + 4)
    assert found.activations == 4 * 32 * 64 * 4
    assert found.beside == memory.PROGRAM + int((found.embeddings + found.activations) * memory.HOLES)
    assert found.total == found.embeddings + found.activations + found.beside


def test_gram_matrices_of_fasp_come_one_by_one_those_of_gptq_together() -> None:
    plan = memory.plan(model(), [("fasp", FaspConfig(sparsity=0)), ("gptq", GPTQ)], samples())
    squares = (64 * 64, 64 * 64, 64 * 64, 96 * 96)  # inputs of q, k and v; of o; of gate and up; of down
    assert moment(plan, "gptq", "sum Gram matrices").grams == (4 + 8) * sum(squares)
    plan = memory.plan(model(), STEPS, samples())
    assert moment(plan, "fasp", "sum Gram matrices").grams == (4 + 8) * 96 * 96


@pytest.mark.parametrize("family", [LLAMA, OPT])
def test_more_layers_take_no_more_memory(family: Any) -> None:
    few, many = (memory.plan(model(count, family), STEPS, samples()) for count in (1, 9))
    assert few == many


def test_the_largest_layer_decides() -> None:
    small, large = Layer(4, 2, 16, 16, 96), Layer(4, 2, 16, 16, 160)
    both = random_model(replace(LLAMA, layers=(small, large, small)))
    alone = random_model(replace(LLAMA, layers=(large,)))
    assert memory.plan(both, STEPS, samples()) == memory.plan(alone, STEPS, samples())


def test_twice_the_windows_are_twice_the_activations() -> None:
    once, twice = (memory.plan(model(), [("gptq", GPTQ)], samples(count)) for count in (4, 8))
    one, two = (moment(plan, "gptq", "solve") for plan in (once, twice))
    assert two.activations == 2 * one.activations
    assert replace(two, activations=0, beside=0) == replace(one, activations=0, beside=0)


def test_no_value_is_read() -> None:
    real = model(2)
    shapes = replace(
        real,
        weights={site: to_meta(weight) for site, weight in real.weights.items()},
        tensors={name: tensor.to("meta") for name, tensor in real.tensors.items()},
    )
    assert memory.plan(shapes, STEPS, samples()) == memory.plan(real, STEPS, samples())


def test_codes_rest_packed_and_are_made_a_byte_each() -> None:
    weight, kept = low_bit((64, 64), 3, 32), sparse((64, 64), 2, 4, bits=4)
    assert memory.resting(weight) == 64 * 24 + 4 * (64 * 2 + 1)
    assert memory.made(weight) == 64 * 64 + 4 * (64 * 2 + 1)
    assert memory.resting(kept) == memory.resting(kept.kept) + 64 * 16
    assert memory.made(kept) == memory.made(kept.kept) + 64 * 32


@pytest.mark.parametrize("kind", sorted(compress.METHODS))
def test_a_plan_knows_every_method(kind: str) -> None:
    if kind == "lora":
        pytest.importorskip("peft")
    found = memory.plan(model(3), [(kind, step(kind))], samples())
    assert memory.peak(found[1:]).total > 0


def test_methods_that_look_at_all_layers_take_more_for_more_of_them() -> None:
    few, many = (memory.plan(model(count), [("it", step("adapruner"))], samples())[-1] for count in (2, 4))
    assert many.activations == 2 * few.activations
    assert many.decoded > few.decoded


def test_rounding_of_tables_is_no_part_of_a_plan_that_leaves_them_alone() -> None:
    inside = QuantizeConfig(targets=("re:.*layers.*",))
    names = [one.name for one in memory.plan(model(), [("gptq", inside)], samples())]
    assert "round token tables" not in names
    assert isinstance(compress.predict(model(), GPTQ).weights["model.embed_tokens"], LowBit)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run `pocket`; returns its exit code and what it printed."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pocket", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), capsys.readouterr().out

    return run


def recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text("steps: [{kind: fasp, sparsity: 0.2}, {kind: quantize, bits: 4}]\n")
    return path


def test_the_command_prints_the_peak_and_writes_nothing(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("compress", "builtin", "-r", recipe(tmp_path), "-o", out, "--memory-plan")
    code, printed = run(*words)
    assert code == 0
    assert "peak: " in printed.splitlines()[-1]
    assert "MiB beside the interpreter" in printed.splitlines()[-1]
    assert not out.exists()

    facts = json.loads(run(*words, "--json")[1])
    assert facts["peak_bytes"] == max(one["total"] for one in facts["moments"])
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_before_the_work(run: Any, tmp_path: Path) -> None:
    refused = {"cuda": "finds no CUDA device here", "tpu": "no device named 'tpu'; devices: cpu, cuda"}
    for device, message in refused.items():
        words = ("compress", "builtin", "-r", recipe(tmp_path), "-o", tmp_path / "out", "--device", device, "--json")
        code, printed = run(*words)
        assert code == 2
        assert message in json.loads(printed)["error"]
        assert not (tmp_path / "out").exists()
