"""A killed step goes on behind its last finished layer, with the numbers that an undisturbed run sees."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter import compress, pipeline, store
from exporter import recipe as recipes
from exporter.calibrate import Samples
from exporter.compress.fasp import FaspConfig
from exporter.compress.quantize import QuantizeConfig
from exporter.compress.step import UNKEPT, Unkept
from exporter.errors import CheckpointError
from exporter.journal import FolderJournal
from exporter.model import Architecture, Layer, Model
from exporter.pipeline import Job, Unwatched
from exporter.weights import Dense, LowBit, Packed, as_held
from tests.models import LLAMA, OPT, random_model, trees

THREE = (Layer(4, 2, 16, 16, 96),) * 3
STEPS: dict[str, Any] = {
    "fasp": FaspConfig(sparsity=0.2),
    "fasp to the dense outputs": FaspConfig(sparsity=0.2, target="dense"),
    "gptq": QuantizeConfig(bits=4, scale_search="max"),
    "rtn": QuantizeConfig(bits=3, algorithm="rtn", scale_search="max"),
}
SAMPLES = Samples(torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(1)))


class KilledError(Exception):
    """Instead of kill -9."""


class Dying(FolderJournal):
    """A journal of a process that dies when a layer is finished, before or after that is written down."""

    def __init__(self, folder: Path, layer: int, kept: bool) -> None:
        super().__init__(folder, lambda fraction: None)
        self._last, self._kept = layer, kept

    def keep(self, before: Model, after: Model, layer: int, activations: Any) -> Model:
        if layer == self._last and not self._kept:
            raise KilledError
        model = super().keep(before, after, layer, activations)
        if layer == self._last:
            raise KilledError
        return model


def journal(folder: Path, report: Callable[[float], None] = lambda fraction: None) -> FolderJournal:
    return FolderJournal(folder, report)


def saved(model: Model, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    store.save(model, folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize(("name", "family"), [*((name, LLAMA) for name in STEPS), ("fasp", OPT)])
@pytest.mark.parametrize(("layer", "kept"), [(0, False), (1, True)])
def test_a_killed_step_gives_the_bytes_of_an_undisturbed_one(
    name: str, family: Architecture, layer: int, kept: bool, tmp_path: Path
) -> None:
    model, config, told = random_model(replace(family, layers=family.layers * 3)), STEPS[name], []
    expected = saved(compress.run(model, config, SAMPLES, UNKEPT), tmp_path / "whole")
    (tmp_path / "kept").mkdir()
    with pytest.raises(KilledError):
        compress.run(model, config, SAMPLES, Dying(tmp_path / "kept", layer, kept))

    again = compress.run(model, config, SAMPLES, journal(tmp_path / "kept", told.append))

    assert saved(again, tmp_path / "again") == expected
    assert len(told) == 3 - layer - kept, "finished layers were worked on again"


def test_only_the_latest_activations_are_kept(tmp_path: Path) -> None:
    compress.run(random_model(replace(LLAMA, layers=THREE)), STEPS["gptq"], SAMPLES, journal(tmp_path))
    assert [path.name for path in tmp_path.glob("activations-*")] == ["activations-00002.safetensors"]
    assert len(list(tmp_path.glob("0*.json"))) == 3


def test_finished_layers_lie_in_their_files(tmp_path: Path) -> None:
    site = "model.layers.1.mlp.down_proj"
    model = compress.run(random_model(replace(LLAMA, layers=THREE)), STEPS["gptq"], SAMPLES, journal(tmp_path))
    weight = model.weights[site]
    assert isinstance(weight, LowBit)
    assert isinstance(as_held(weight), Packed)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("00000.safetensors", "layer 0 cannot be taken up: its file is not the one that was written"),
        ("activations-00001.safetensors", "layer 1 cannot be taken up: its activations are not those"),
    ],
)
def test_a_file_that_was_changed_is_not_taken_up(tmp_path: Path, name: str, message: str) -> None:
    model = random_model(replace(LLAMA, layers=THREE))
    with pytest.raises(KilledError):
        compress.run(model, STEPS["fasp"], SAMPLES, Dying(tmp_path, 1, kept=True))
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)

    with pytest.raises(CheckpointError, match=message):
        journal(tmp_path).resume(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("trees"),
        lambda record: record["widths"].update(heads=3),
        lambda record: record.update(removed=3),
        lambda record: next(iter(record["trees"].values())).update(values="weight/of nobody"),
    ],
)
def test_a_record_that_lies_is_not_taken_up(change: Callable[[Any], Any], tmp_path: Path) -> None:
    model = random_model(replace(LLAMA, layers=THREE))
    with pytest.raises(KilledError):
        compress.run(model, STEPS["fasp"], SAMPLES, Dying(tmp_path, 0, kept=True))
    record = json.loads((tmp_path / "00000.json").read_text())
    change(record)
    (tmp_path / "00000.json").write_text(json.dumps(record))

    with pytest.raises(CheckpointError, match=r"00000\.json: layer 0 cannot be taken up: "):
        journal(tmp_path).resume(model)


@pytest.mark.parametrize("name", sorted(trees((64, 64))))
def test_every_tree_is_kept_bit_for_bit(name: str, tmp_path: Path) -> None:
    site, before = "model.layers.0.self_attn.q_proj", random_model(LLAMA)
    after = before.with_weights({site: trees((64, 64))[name]})

    kept = journal(tmp_path).keep(before, after, 0, ())

    assert torch.equal(kept.weights[site].dense(), after.weights[site].dense())
    assert journal(tmp_path).resume(before)[1] == 1


def test_two_walks_of_a_step_are_kept_apart(tmp_path: Path) -> None:
    site, model = "model.layers.0.self_attn.q_proj", random_model(LLAMA)

    def both(book: FolderJournal) -> list[tuple[int, float]]:
        found = []
        for value in (1.0, 2.0):
            resumed, done, _ = book.resume(model)
            found.append((done, float(resumed.weights[site].dense().sum())))
            book.keep(model, model.with_weights({site: Dense(torch.full((64, 64), value))}), 0, ())
        return found

    both(journal(tmp_path))
    assert both(journal(tmp_path)) == [(1, 4096.0), (1, 8192.0)]


def test_a_layer_that_changes_another_is_a_mistake_of_the_method(tmp_path: Path) -> None:
    model = random_model(replace(LLAMA, layers=THREE))
    with pytest.raises(ValueError, match="layer 0 changed more of the architecture than its layer"):
        journal(tmp_path).keep(model, model.with_layer(1, Layer(4, 2, 16, 8, 96)), 0, ())


def test_scratch_is_there_and_outlives_the_journal(tmp_path: Path) -> None:
    scratch = journal(tmp_path).scratch
    assert scratch is not None
    (scratch / "search.db").write_text("x")
    again = journal(tmp_path).scratch
    assert again is not None
    assert (again / "search.db").read_text() == "x"
    assert Unkept().scratch is None


class Interrupting(Unwatched):
    """Presses Ctrl-C when a step has come so far."""

    def __init__(self, step: str, fraction: float) -> None:
        self._step, self._fraction = step, fraction
        self.told: list[tuple[str, float]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        def report(fraction: float) -> None:
            self.told.append((name, fraction))
            if name.startswith(self._step) and fraction >= self._fraction:
                raise KeyboardInterrupt

        yield report


def test_an_interrupted_job_goes_on_layer_by_layer_to_the_same_files(tmp_path: Path) -> None:
    recipe = recipes.parse({"calibration": {"windows": 2, "length": 16},
                            "steps": [{"kind": "fasp", "sparsity": 0.2},
                                      {"kind": "quantize", "algorithm": "rtn", "scale_search": "max"}]})  # fmt: skip
    pipeline.run(Job("builtin", (), tmp_path / "whole", recipe))
    job = Job("builtin", (), tmp_path / "killed", recipe)
    for step in ("fasp", "quantize"):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(job, Interrupting(step, 0.5))

    last = Interrupting("none", 2)
    pipeline.run(job, last)

    assert [name.split()[0] for name, _ in last.told] == ["quantize"] * 2, "layers 0 and 1 of 4 were finished"
    files = [{path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
             for folder in (tmp_path / "whole", tmp_path / "killed")]  # fmt: skip
    assert files[0] == files[1]
    assert "model/weights.safetensors" in files[0]
