"""Measurements: an artifact on a phone, first proved right there, then timed. Raw samples are kept."""

from __future__ import annotations

import math
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue

from exporter import artifact as artifacts
from exporter import statistics
from exporter.artifact import Artifact, Golden, Record
from exporter.errors import CheckFailedError, PhoneError, PocketError
from exporter.plugins import Answers, Job, Phone, Timings
from exporter.statistics import Statistic


class Proof(Record):
    """How far an artifact's logits lay from its golden ones on the phone: over `steps` steps, in absolute terms."""

    steps: int
    max_abs: float
    tolerance: float


class Measurement(Record):
    """One artifact, measured once on one phone.

    `artifact_digest` is the sha256 of artifact.json, which holds the digests of all other files. `statistics` has
    `load`, `pp<N>` (prefill of N tokens) and `tg<N>` (N tokens after the first). `memory` and `idle` are bytes by the
    kernel's own names, with the artifact loaded and before.
    """

    format_version: Literal[1] = 1
    kind: Literal["real", "emulated", "host"]
    target: str
    source: str
    artifact_digest: str
    pocket: str
    requires: dict[str, str]
    machine: dict[str, JsonValue]
    proof: Proof
    job: Job
    samples: Timings
    statistics: dict[str, Statistic]
    memory: dict[str, int]
    idle: dict[str, int]

    @property
    def machine_line(self) -> str:
        """The machine in one line, for people."""
        cpu, cores, system = (self.machine.get(name, "unknown") for name in ("cpu", "cores", "os"))
        return f"{cpu}, {self.job.threads} of {cores} cores, {system}"

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Name, p50, p90, 95 % interval of p50 and n of every quantity, ready to print."""
        timed = [_row(name, statistic) for name, statistic in self.statistics.items()]
        return timed + [(name, _mib(size), "", _idle(self.idle.get(name)), "1") for name, size in self.memory.items()]


def schema() -> dict[str, Any]:
    """The published JSON Schema of measurements."""
    return Measurement.model_json_schema()


def prompt(artifact: Artifact, tokens: int) -> tuple[int, ...]:
    """A prompt of that many tokens: the artifact's golden text, over and over.

    Raises:
        PocketError: the artifact is an encoder, or its context is shorter.
    """
    _require_decoder(artifact)
    if tokens > artifact.model.context:
        raise PocketError(f"{tokens} prompt tokens do not fit the artifact's context of {artifact.model.context}")
    return tuple(islice(cycle([*artifact.golden.prompt, *artifact.golden.tokens]), tokens))


def measure(folder: Path, phone: Phone, job: Job) -> Measurement:
    """Prove an artifact right on a phone, then time it there.

    Args:
        folder: The artifact.
        phone: Where.
        job: What is timed.

    Raises:
        ArtifactError: the folder is not what its artifact.json says.
        CheckFailedError: its outputs on the phone are not its golden ones; nothing was timed.
        PhoneError: the phone lost the run, or sent back something else than samples of this job.
        PocketError: the artifact is an encoder, or the job does not fit it.
    """
    artifact = artifacts.load(folder)
    artifacts.verify_files(folder, artifact)
    _require_fit(artifact, job)
    machine = dict(phone.facts())  # before the work, for the load average
    place = phone.push(folder)
    proof = _prove(artifact.golden, phone.answers(place, artifact.golden, job.threads))
    timings = phone.run(place, job)
    _require_samples(timings, job)
    _require_same_text(artifact.golden, job, timings.tokens)
    return Measurement(
        kind=phone.kind,  # type: ignore[arg-type]  # a phone says a plain str; pydantic checks it
        target=artifact.target,
        source=artifact.model.source,
        artifact_digest=artifacts.describe_file(folder / artifacts.NAME).sha256,
        pocket=version("pocket-exporter"),
        requires=artifact.requires,
        machine=machine,
        proof=proof,
        job=job,
        samples=timings,
        statistics=_statistics(timings, job),
        memory=dict(timings.memory),
        idle=dict(timings.idle),
    )


def _require_decoder(artifact: Artifact) -> None:
    if not artifact.model.causal:
        raise PocketError("this artifact is an encoder; what is measured is how a decoder goes on from a prompt")


def _require_fit(artifact: Artifact, job: Job) -> None:
    _require_decoder(artifact)
    context, vocab = artifact.model.context, artifact.model.vocab
    if len(job.prompt) + job.new_tokens > context:
        wanted = f"{len(job.prompt)} prompt tokens and {job.new_tokens} new ones"
        raise PocketError(f"{wanted} do not fit the artifact's context of {context}; ask for fewer")
    if outside := [token for token in job.prompt if not 0 <= token < vocab]:
        raise PocketError(f"token {outside[0]} of the prompt is none of the artifact's {vocab}")


def _prove(golden: Golden, answers: Answers) -> Proof:
    """Compare what an artifact answered with its golden logits and tokens."""
    shape = [len(row) for row in golden.logits]
    if [len(row) for row in answers.logits] != shape or len(answers.best) != len(shape):
        raise PhoneError(f"the phone answered {len(answers.logits)} steps of the golden text's {len(shape)}")
    problems = _problems(golden, answers)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckFailedError(f"outputs on the phone are not the golden ones: {problems[0]}{more}; nothing was timed")
    pairs = [pair for ours, theirs in zip(golden.logits, answers.logits) for pair in zip(ours, theirs)]
    return Proof(steps=len(shape), max_abs=max(abs(a - b) for a, b in pairs), tolerance=golden.tolerance)


def _problems(golden: Golden, answers: Answers) -> list[str]:
    found = []
    for step, (ids, expected, got) in enumerate(zip(golden.top, golden.logits, answers.logits)):
        for token, right, value in zip(ids, expected, got):
            if not abs(value - right) <= golden.tolerance:  # also where value is no number
                within = f"more than {golden.tolerance:.3g} away"
                found.append(f"step {step}: the logit of token {token} is {value:.6g}, golden {right:.6g}, {within}")
        if not _is_tie(golden, step, answers.best[step]):
            found.append(f"step {step}: the likeliest token is {answers.best[step]}, golden {ids[0]}")
    return found


def _is_tie(golden: Golden, step: int, token: int) -> bool:
    """Whether a token may be the likeliest, each logit being within the tolerance of the golden one.

    A token that is not among the golden top lies at most as high as the last of them.
    """
    logits = dict(zip(golden.top[step], golden.logits[step]))
    return max(golden.logits[step]) - logits.get(token, min(golden.logits[step])) <= 2 * golden.tolerance


def _require_same_text(golden: Golden, job: Job, tokens: tuple[int, ...]) -> None:
    """The timed text is the golden text, where the prompt is its beginning; up to the first tie."""
    text, start = [*golden.prompt, *golden.tokens], len(job.prompt)
    if list(job.prompt) != text[:start] or start < len(golden.prompt):
        return
    for step, (token, right) in enumerate(zip(tokens, text[start:]), start - len(golden.prompt)):
        if token != right:
            if step < len(golden.top) and _is_tie(golden, step, token):
                return
            raise CheckFailedError(f"the timed run gave token {token} at step {step}, golden {right}; times are void")


def _require_samples(timings: Timings, job: Job) -> None:
    """Refuse samples that a phone cannot have measured in this job."""
    found = [len(timings.load_s), len(timings.prefill_s), len(timings.decode_s), len(timings.tokens)]
    found += [len(row) for row in timings.decode_s]
    wanted = [job.repeats] * 3 + [job.new_tokens] + [job.new_tokens - 1] * job.repeats
    if found != wanted:
        raise PhoneError(f"the phone sent back {found} samples, not {wanted}, for load, prefill, decode and tokens")
    samples = [*timings.load_s, *timings.prefill_s, *(s for row in timings.decode_s for s in row)]
    if not all(math.isfinite(sample) and sample > 0 for sample in samples):
        raise PhoneError("the phone sent back a time that is not a number of seconds over 0")


def _statistics(timings: Timings, job: Job) -> dict[str, Statistic]:
    prefill = [[sample] for sample in timings.prefill_s]
    return {
        "load": statistics.seconds([[sample] for sample in timings.load_s]),
        f"pp{len(job.prompt)}": statistics.rate(prefill, len(job.prompt), "tok/s"),
        f"tg{job.new_tokens - 1}": statistics.rate(timings.decode_s, 1, "tok/s"),
    }


def _row(name: str, s: Statistic) -> tuple[str, str, str, str, str]:
    interval = "one round only" if s.low is None or s.high is None else f"{_shown(s.low)} to {_shown(s.high)}"
    return name, f"{_shown(s.p50)} {s.unit}", f"{_shown(s.p90)} {s.unit}", interval, str(s.n)


def _idle(size: int | None) -> str:
    """What the process held before it loaded anything: on a host, most of it is Python and torch."""
    return "" if size is None else f"{_mib(size)} when idle"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _shown(value: float) -> str:
    return f"{value:,.1f}" if value >= 100 else f"{value:.3g}"
