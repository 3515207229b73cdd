"""Phones: one suite for the fake and for this host, then what only a process of its own can do wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from exporter import artifact as artifacts
from exporter import plugins, probe
from exporter.errors import ArtifactError, BackendMissingError, PhoneError, TargetError
from exporter.plugins import Job, Phone, Target
from targets.phones import host_worker
from targets.phones.host import HostPhone
from tests import fakes
from tests.models import LLAMA, random_model

JOB = Job(prompt=(1, 5, 9, 3), new_tokens=6, warmups=1, repeats=3, threads=1)


@pytest.fixture(autouse=True)
def _fake_targets_are_found_by_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "path").mkdir()
    fakes.install(tmp_path / "path")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), str(fakes.ROOT)]))


@pytest.fixture(params=["fake phone", "host"])
def phone(request: pytest.FixtureRequest, tmp_path: Path) -> Phone:
    (tmp_path / "storage").mkdir()
    return HostPhone(timeout_s=300) if request.param == "host" else fakes.FakePhone(tmp_path / "storage")


def make(folder: Path, target: Target = fakes.TARGET) -> artifacts.Artifact:
    return fakes.write_artifact(folder, random_model(LLAMA), target, {"tokenizer.json": b"{}"})


def test_a_phone_says_what_it_is(phone: Phone) -> None:
    facts = phone.facts()

    assert phone.kind in ("real", "emulated", "host")
    assert all(facts[name] for name in ("cpu", "cores", "memory_bytes", "os"))


def test_a_phone_answers_with_the_artifacts_logits(phone: Phone, tmp_path: Path) -> None:
    golden = make(tmp_path / "fake").golden

    answers = phone.answers(phone.push(tmp_path / "fake"), golden, threads=1)

    assert list(answers.best) == golden.tokens
    assert [list(row) for row in answers.logits] == [pytest.approx(row, abs=1e-4) for row in golden.logits]


def test_a_phone_sends_back_a_sample_for_everything_it_was_asked_to_time(phone: Phone, tmp_path: Path) -> None:
    model = random_model(LLAMA)
    make(tmp_path / "fake")

    timings = phone.run(phone.push(tmp_path / "fake"), JOB)

    assert len(timings.load_s) == len(timings.prefill_s) == len(timings.decode_s) == 3
    assert [len(row) for row in timings.decode_s] == [5, 5, 5]
    assert min([*timings.load_s, *timings.prefill_s, *timings.decode_s[0]]) > 0
    assert list(timings.tokens) == list(fakes.greedy(fakes.TorchSession(model), JOB.prompt, JOB.new_tokens))
    assert timings.memory["VmHWM"] >= timings.memory["RssAnon"] > timings.idle["RssAnon"] > 0


def test_a_phone_gives_back_what_was_pushed(phone: Phone, tmp_path: Path) -> None:
    make(tmp_path / "fake")
    place = phone.push(tmp_path / "fake")

    phone.pull(place, "model/pocket.json", tmp_path / "pulled")

    assert (tmp_path / "pulled").read_bytes() == (tmp_path / "fake" / "model" / "pocket.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"has no file 'absent'"):
        phone.pull(place, "absent", tmp_path / "pulled")
    with pytest.raises(ArtifactError, match="leaves its folder"):
        phone.pull(place, "../secret", tmp_path / "pulled")


def test_an_artifact_can_be_measured_on_a_phone(phone: Phone, tmp_path: Path) -> None:
    make(tmp_path / "fake")

    found = probe.measure(tmp_path / "fake", phone, JOB)

    assert found.kind == phone.kind
    assert list(found.statistics) == ["load", "pp4", "tg5"]
    assert found.proof.max_abs <= found.proof.tolerance


@pytest.mark.parametrize("name", ["onnxruntime-mobile", "executorch-android"])
def test_this_host_measures_a_real_runtime(name: str, tmp_path: Path) -> None:
    try:
        target = plugins.target(name)
    except BackendMissingError as error:
        pytest.skip(str(error))
    make(tmp_path / name, target)

    found = probe.measure(tmp_path / name, HostPhone(timeout_s=300), JOB)

    assert (found.kind, found.target) == ("host", name)
    assert found.memory["RssAnon"] > found.idle["RssAnon"]  # the runtime and the model
    assert found.machine["runtimes"]["torch"].startswith("2.")


def test_this_host_says_how_busy_it_was_and_what_it_runs(tmp_path: Path) -> None:
    facts = HostPhone().facts()

    assert facts["kernel"] == os.uname().release
    assert facts["runtimes"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(facts["load_average_before"]) == 3
    assert 1 <= facts["usable_cores"] <= facts["cores"]


def test_a_runtime_that_is_not_here_is_refused(tmp_path: Path) -> None:
    golden = make(tmp_path / "elsewhere", fakes.ELSEWHERE).golden

    with pytest.raises(TargetError, match="elsewhere has no runtime on this machine; probe it on a phone"):
        HostPhone().answers(str(tmp_path / "elsewhere"), golden, threads=1)
    with pytest.raises(TargetError, match="elsewhere has no runtime on this machine"):
        HostPhone().run(str(tmp_path / "elsewhere"), JOB)


def test_a_stand_in_for_a_runtime_is_not_timed(tmp_path: Path) -> None:
    golden = make(tmp_path / "stood-in", fakes.STOOD_IN).golden
    says = "stood-in runs here in a stand-in: torch, not the fake's own runtime; its times say nothing of a phone's"

    with pytest.raises(TargetError, match=says):
        HostPhone().answers(str(tmp_path / "stood-in"), golden, threads=1)
    with pytest.raises(TargetError, match=says):
        HostPhone().run(str(tmp_path / "stood-in"), JOB)


def test_a_crash_of_the_runtime_is_one_clear_line(tmp_path: Path) -> None:
    make(tmp_path / "dies", fakes.DIES)

    with pytest.raises(PhoneError, match=r"^the process that ran the artifact was killed by SIGSEGV; [^\n]*$"):
        HostPhone().run(str(tmp_path / "dies"), JOB)


def test_an_exception_of_the_runtime_is_told_in_its_own_words(tmp_path: Path) -> None:
    make(tmp_path / "raises", fakes.RAISES)

    with pytest.raises(PhoneError, match="ended with code 1; its last words: ValueError: the graph is odd"):
        HostPhone().run(str(tmp_path / "raises"), JOB)


def test_a_runtime_that_hangs_is_stopped(tmp_path: Path) -> None:
    make(tmp_path / "hangs", fakes.HANGS)

    with pytest.raises(PhoneError, match=r"no answer within 5 s; ask for fewer tokens or repeats"):
        HostPhone(timeout_s=5).run(str(tmp_path / "hangs"), JOB)


def test_a_runtime_that_prints_does_not_spoil_the_answer(tmp_path: Path) -> None:
    golden = make(tmp_path / "chats", fakes.CHATS).golden

    assert list(HostPhone().answers(str(tmp_path / "chats"), golden, threads=1).best) == golden.tokens


def test_what_lies_in_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = make(tmp_path / "fake").golden
    (tmp_path / "json.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)

    assert list(HostPhone().answers(str(tmp_path / "fake"), golden, threads=1).best) == golden.tokens


def test_an_answer_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "fake")
    worker = tmp_path / "path" / "fake_python"
    monkeypatch.setattr(sys, "executable", str(worker))

    worker.write_text("#!/bin/sh\necho hello\n")
    worker.chmod(0o755)
    with pytest.raises(PhoneError, match=r"answered no JSON but 'hello\\n'"):
        HostPhone().run(str(tmp_path / "fake"), JOB)

    worker.write_text("#!/bin/sh\necho '{}'\n")
    with pytest.raises(PhoneError, match="the process that ran the artifact answered Input should be"):
        HostPhone().run(str(tmp_path / "fake"), JOB)


class CountingSession:
    """A session that writes down what it was asked."""

    context = 32

    def __init__(self, log: list[str]) -> None:
        self._log = log
        log.append("load")
        self._inner = fakes.TorchSession(random_model(LLAMA))

    def reset(self) -> None:
        self._log.append("reset")
        self._inner.reset()

    def step(self, tokens: list[int]) -> fakes.torch.Tensor:
        self._log.append(f"step {len(tokens)}")
        return self._inner.step(tokens)


def test_rounds_run_on_one_loaded_session_and_loads_are_timed_apart() -> None:
    log: list[str] = []

    timings = host_worker.measure(lambda: CountingSession(log), JOB)

    one_round = ["reset", "step 4", *["step 1"] * 5]
    assert log == ["load", *one_round * (JOB.warmups + JOB.repeats), *["load"] * JOB.repeats]
    assert len(timings.load_s) == JOB.repeats


def test_a_kernel_that_does_not_say_gives_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_worker, "STATUS", tmp_path / "absent")

    assert host_worker.memory() == {}
