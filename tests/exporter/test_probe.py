"""Measurements: a wrong result is never timed, and every number follows from the raw samples."""

from __future__ import annotations

import hashlib
import json
import random
import statistics as oracle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import artifact as artifacts
from exporter import probe, statistics
from exporter.artifact import Golden
from exporter.errors import ArtifactError, CheckFailedError, PhoneError, PocketError
from exporter.plugins import Answers, Job, Timings
from tests import fakes
from tests.models import LLAMA, random_model

JOB = Job(prompt=(1, 5, 9, 3), new_tokens=6, warmups=1, repeats=3, threads=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fakes.write_artifact(tmp_path / "fake", random_model(LLAMA), fakes.TARGET, {"tokenizer.json": b"{}"})
    return tmp_path / "fake"


@pytest.fixture
def phone(tmp_path: Path) -> fakes.FakePhone:
    (tmp_path / "storage").mkdir()
    return fakes.FakePhone(tmp_path / "storage")


class Lying(fakes.FakePhone):
    """A phone whose answers or samples are changed on their way back."""

    def __init__(self, storage: Path) -> None:
        storage.mkdir(exist_ok=True)
        super().__init__(storage)
        self.change_answers: Callable[[Answers], Answers] = lambda answers: answers
        self.change_timings: Callable[[Timings], Timings] = lambda timings: timings

    def answers(self, place: str, golden: Golden, threads: int) -> Answers:
        return self.change_answers(super().answers(place, golden, threads))

    def run(self, place: str, job: Job) -> Timings:
        return self.change_timings(super().run(place, job))


@pytest.fixture
def liar(tmp_path: Path) -> Lying:
    return Lying(tmp_path / "storage")


def test_a_measurement_says_what_was_measured_and_where(folder: Path, phone: fakes.FakePhone) -> None:
    found = probe.measure(folder, phone, JOB)

    digest = hashlib.sha256((folder / artifacts.NAME).read_bytes()).hexdigest()
    assert (found.kind, found.target, found.source) == ("emulated", "fake", "random")
    assert found.artifact_digest == digest
    assert found.machine == phone.facts()
    assert found.machine_line == "Fake A1, 1 of 4 cores, FakeOS 1"
    assert found.job == JOB
    assert (found.memory["VmHWM"], found.idle["RssFile"]) == (5 * 2**20, 2**19)
    assert phone.asked == ["answers", "run"]


def test_throughput_is_tokens_over_seconds(folder: Path, phone: fakes.FakePhone) -> None:
    numbers = probe.measure(folder, phone, JOB).statistics

    assert {name: (s.p50, s.unit, s.n) for name, s in numbers.items()} == {
        "load": (0.25, "s", 3),
        "pp4": (4 / 0.5, "tok/s", 3),
        "tg5": (1 / 0.125, "tok/s", 15),
    }


def test_rows_are_ready_to_print(folder: Path, phone: fakes.FakePhone) -> None:
    assert probe.measure(folder, phone, JOB).rows() == [
        ("load", "0.25 s", "0.25 s", "0.25 to 0.25", "3"),
        ("pp4", "8 tok/s", "8 tok/s", "8 to 8", "3"),
        ("tg5", "8 tok/s", "8 tok/s", "8 to 8", "15"),
        ("RssAnon", "3.0 MiB", "", "1.5 MiB when idle", "1"),
        ("RssFile", "1.0 MiB", "", "0.5 MiB when idle", "1"),
        ("VmHWM", "5.0 MiB", "", "2.5 MiB when idle", "1"),
    ]


def test_one_round_gives_no_interval(folder: Path, phone: fakes.FakePhone) -> None:
    found = probe.measure(folder, phone, replace(JOB, repeats=1))

    assert found.rows()[0] == ("load", "0.25 s", "0.25 s", "one round only", "1")


def test_the_published_schema_is_the_measurements(folder: Path, phone: fakes.FakePhone) -> None:
    schema = json.loads((fakes.ROOT / "exporter" / "schemas" / "measurement.schema.json").read_text())
    found = probe.measure(folder, phone, JOB).model_dump(mode="json")

    assert schema == probe.schema(), "write it anew: docs/probe.md says how"
    jsonschema.validate(found, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found, "kind": "latency"}, schema)


def test_a_measurement_is_json_and_back(folder: Path, phone: fakes.FakePhone) -> None:
    found = probe.measure(folder, phone, JOB)

    again = probe.Measurement.model_validate_json(artifacts.to_json(found))

    assert again == found
    assert json.loads(artifacts.to_json(found))["samples"]["prefill_s"] == [0.5] * 3


def test_a_changed_file_is_refused_before_anything_runs(folder: Path, phone: fakes.FakePhone) -> None:
    (folder / "tokenizer.json").write_bytes(b"[]")

    with pytest.raises(ArtifactError, match=r"'tokenizer.json' was changed"):
        probe.measure(folder, phone, JOB)
    assert phone.asked == []


def test_a_wrong_model_is_never_timed(folder: Path, phone: fakes.FakePhone) -> None:
    right = artifacts.load(folder).golden
    other = fakes.write_artifact(folder.parent / "other", random_model(LLAMA, seed=1), fakes.TARGET, {})
    artifacts.save(other.model_copy(update={"golden": right}), folder.parent / "other")

    with pytest.raises(CheckFailedError, match=r"the golden ones: step 0: .*\(and \d+ more\); nothing was timed$"):
        probe.measure(folder.parent / "other", phone, JOB)
    assert phone.asked == ["answers"]


@pytest.mark.parametrize("off", [2e-3, -2e-3, float("nan"), float("inf")])
def test_one_logit_outside_the_tolerance_is_refused(off: float, folder: Path, liar: Lying) -> None:
    token = artifacts.load(folder).golden.top[3][2]

    def change(answers: Answers) -> Answers:
        rows = [list(row) for row in answers.logits]
        rows[3][2] += off
        return replace(answers, logits=tuple(map(tuple, rows)))

    liar.change_answers = change
    with pytest.raises(CheckFailedError, match=rf"step 3: the logit of token {token} is .* more than .* away"):
        probe.measure(folder, liar, JOB)
    assert liar.asked == ["answers"]


def test_another_likeliest_token_is_refused(folder: Path, liar: Lying) -> None:
    golden = artifacts.load(folder).golden
    unlisted = next(token for token in range(96) if token not in golden.top[2])
    for token in (golden.top[2][1], unlisted):
        liar.change_answers = lambda a, token=token: replace(a, best=(*a.best[:2], token, *a.best[3:]))
        says = f"step 2: the likeliest token is {token}, golden {golden.tokens[2]}"
        with pytest.raises(CheckFailedError, match=says):
            probe.measure(folder, liar, JOB)


def test_another_likeliest_token_is_right_where_the_tolerance_makes_it_a_tie(folder: Path, liar: Lying) -> None:
    made = artifacts.load(folder)
    first, second = made.golden.logits[2][:2]
    loose = made.golden.model_copy(update={"tolerance": (first - second) / 2 * 1.01})
    artifacts.save(made.model_copy(update={"golden": loose}), folder)
    liar.change_answers = lambda a: replace(a, best=(*a.best[:2], made.golden.top[2][1], *a.best[3:]))

    assert probe.measure(folder, liar, JOB).proof.tolerance == loose.tolerance


def test_answers_of_another_shape_are_refused(folder: Path, liar: Lying) -> None:
    liar.change_answers = lambda a: Answers(a.logits[:-1], a.best)
    with pytest.raises(PhoneError, match="answered 7 steps of the golden text's 8"):
        probe.measure(folder, liar, JOB)


def test_timed_text_that_leaves_the_golden_text_voids_the_times(folder: Path, liar: Lying) -> None:
    golden = artifacts.load(folder).golden
    job = replace(JOB, prompt=(*golden.prompt, *golden.tokens[:2]), new_tokens=4)
    assert list(probe.measure(folder, liar, job).samples.tokens) == golden.tokens[2:6]

    wrong = next(token for token in range(96) if token not in golden.top[3])
    liar.change_timings = lambda t: replace(t, tokens=(t.tokens[0], wrong, *t.tokens[2:]))
    says = f"the timed run gave token {wrong} at step 3, golden {golden.tokens[3]}; times are void"
    with pytest.raises(CheckFailedError, match=says):
        probe.measure(folder, liar, job)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: replace(t, load_s=t.load_s[1:]), r"the phone sent back \[2, 3, 3, 6, 5, 5, 5\] samples, not \[3, 3"),
        (lambda t: replace(t, decode_s=(t.decode_s[0][1:], *t.decode_s[1:])), "6, 4, 5, 5] samples"),
        (lambda t: replace(t, prefill_s=(0.5, 0.0, 0.5)), "not a number of seconds over 0"),
        (lambda t: replace(t, load_s=(0.5, float("nan"), 0.5)), "not a number of seconds over 0"),
        (lambda t: replace(t, decode_s=((-1.0,) * 5, *t.decode_s[1:])), "not a number of seconds over 0"),
    ],
)
def test_samples_that_cannot_have_been_measured_are_refused(
    change: Callable[[Timings], Timings], says: str, folder: Path, liar: Lying
) -> None:
    liar.change_timings = change
    with pytest.raises(PhoneError, match=says):
        probe.measure(folder, liar, JOB)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"new_tokens": 29}, "4 prompt tokens and 29 new ones do not fit the artifact's context of 32; ask for fewer"),
        ({"prompt": (96,)}, "token 96 of the prompt is none of the artifact's 96"),
        ({"prompt": ()}, "a job needs a prompt of at least one token"),
        ({"new_tokens": 1}, "a job cannot have new_tokens 1; at least 2"),
        ({"warmups": -1}, "a job cannot have warmups -1; at least 0"),
        ({"repeats": 0}, "a job cannot have repeats 0; at least 1"),
        ({"threads": 0}, "a job cannot have threads 0; at least 1"),
    ],
)
def test_a_job_that_cannot_be_done_is_refused(
    changes: dict[str, object], says: str, folder: Path, phone: fakes.FakePhone
) -> None:
    with pytest.raises(PocketError, match=says):
        probe.measure(folder, phone, replace(JOB, **changes))
    assert phone.asked == []


def test_a_prompt_is_the_golden_text_over_and_over(folder: Path) -> None:
    made = artifacts.load(folder)
    text = (*made.golden.prompt, *made.golden.tokens)

    assert probe.prompt(made, 4) == text[:4]
    assert probe.prompt(made, 20) == (*text, *text, *text[:2])
    with pytest.raises(PocketError, match="1000000000000 prompt tokens do not fit the artifact's context of 32"):
        probe.prompt(made, 10**12)  # before anything of that size is made


SECONDS = st.floats(1e-6, 1e3)
ROUNDS = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(SECONDS, min_size=width, max_size=width), min_size=2, max_size=6)
)


@settings(max_examples=25, deadline=None)
@given(ROUNDS)
def test_statistics_are_those_of_the_samples(rounds: list[list[float]]) -> None:
    samples = [sample for row in rounds for sample in row]

    found = statistics.seconds(rounds)

    assert found.n == len(samples)
    assert found.p50 == pytest.approx(oracle.median(samples))
    assert found.p90 == pytest.approx(percentile(samples, 0.9))
    assert min(samples) <= found.low <= found.high <= max(samples)  # type: ignore[operator]
    assert found == statistics.seconds(rounds)


def percentile(samples: list[float], share: float) -> float:
    """Slow oracle: linear between the two neighbours in sorted order."""
    ordered, place = sorted(samples), share * (len(samples) - 1)
    below, above = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    return below + (above - below) * (place - int(place))


@settings(max_examples=25, deadline=None)
@given(ROUNDS)
def test_the_bad_tail_of_a_rate_is_the_slow_one(rounds: list[list[float]]) -> None:
    took, found = statistics.seconds(rounds), statistics.rate(rounds, 7, "tok/s")

    assert found.p90 <= found.p50
    assert found.low <= found.high  # type: ignore[operator]
    assert (found.p50, found.p90) == (7 / took.p50, 7 / took.p90)


def test_the_interval_agrees_with_a_slow_bootstrap() -> None:
    drawn = random.Random(3)
    rounds = [[drawn.uniform(1, 2) + shift for _ in range(7)] for shift in (0.0, 0.1, 0.3, 0.2, 0.05, 0.6)]
    medians = [oracle.median(s for row in drawn.choices(rounds, k=len(rounds)) for s in row) for _ in range(20_000)]

    found = statistics.seconds(rounds)

    assert found.low == pytest.approx(percentile(medians, 0.025), abs=0.02)
    assert found.high == pytest.approx(percentile(medians, 0.975), abs=0.02)


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        found = statistics.seconds(generator.lognormal(size=(40, 1)).tolist())
        covered += found.low <= 1.0 <= found.high  # type: ignore[operator]
    assert covered >= 52  # 57 of 60 expected; fewer than 52 would come once in 200 tries
