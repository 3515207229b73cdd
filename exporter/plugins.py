"""What a target, a session and a phone must be able to do; found by entry point, loaded only when asked.

A target is one package under `targets/` (or any installed distribution) with an object under the entry point group
`pocket.targets`; a phone likewise under `pocket.phones`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from exporter.artifact import Budget, Decision, Golden
from exporter.errors import BackendMissingError, PocketError, TargetError
from exporter.model import Model
from exporter.weights import Weight

TARGETS, PHONES = "pocket.targets", "pocket.phones"


class Session(Protocol):
    """A model or an artifact that runs: a decoder token after token, an encoder one whole text after each reset.

    Attributes:
        context: Longest text, in tokens.
        causal: Whether it is a decoder.
    """

    context: int
    causal: bool

    def reset(self) -> None:
        """Forget every token."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens; returns the logits after each of them, [tokens, vocab], float.

        An encoder takes a whole text, and returns its hidden states, [tokens, hidden].
        """


@dataclass(frozen=True)
class Plan:
    """What a target will store, known before the work: also for a model on the meta device.

    Args:
        weights: The tree that is stored, by site: the model's own, or an equivalent that the target runs.
        decisions: One per site, with bytes.
        other_bytes: Estimate of everything else in the files: norms, tables, graph.
        context: Longest context, in tokens.
        notes: What a user should know, e.g. that values were padded.
    """

    weights: Mapping[str, Weight]
    decisions: tuple[Decision, ...]
    other_bytes: int
    context: int
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Predicted bytes of the files."""
        return self.other_bytes + sum(decision.bytes for decision in self.decisions)


@dataclass(frozen=True)
class Finding:
    """One thing that a check looked at."""

    what: str
    ok: bool
    detail: str


class Target(Protocol):
    """A runtime that models are lowered to.

    Attributes:
        name: As users type it, e.g. `coreml-ios`.
        extra: The pip extra that brings its back end.
        modules: Import packages of its back end.
        runs_here: Whether `session` works on this machine.
        stand_in: What `session` runs where that is not the target's own runtime, in words for whoever reads its
            results; None: it is the runtime itself. What a stand-in takes in time or memory says nothing of a phone. It
            takes files that are known to be damaged: it is how a check tells what is wrong with them.
    """

    name: str
    extra: str
    modules: tuple[str, ...]
    runs_here: bool
    stand_in: str | None

    def plan(self, model: Model, context: int) -> Plan:
        """Decide, site by site, what is stored; raises TargetError for what cannot be taken at all."""

    def lower(self, model: Model, plan: Plan, folder: Path) -> Mapping[str, str]:
        """Write the model files into an existing folder, which holds the tokenizer already.

        Returns:
            Runtime name to the least version needed, for artifact.json.
        """

    def budget(self, model: Model, plan: Plan) -> Budget:
        """How far the logits may lie from the model's, derived from the leaves."""

    def inspect(self, folder: Path, model: Model, plan: Plan) -> Sequence[Finding]:
        """Read the written files back: parts bit for bit, interface as stated; run them exactly where that can be."""

    def session(self, folder: Path, threads: int = 1) -> Session:
        """Run a folder in the target's own runtime, or in its stand-in; raises TargetError where neither is here."""


@dataclass(frozen=True)
class Job:
    """What a phone is asked to time: greedy text after a prompt, several times over.

    Args:
        prompt: Tokens, at least one.
        new_tokens: Tokens to add, at least two: the first ends the prefill, each further one is a decode sample.
        warmups: Untimed rounds first.
        repeats: Timed rounds, at least one.
        threads: Threads of the runtime.

    Raises:
        PocketError: a number is out of range.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    warmups: int
    repeats: int
    threads: int

    def __post_init__(self) -> None:
        if not self.prompt:
            raise PocketError("a job needs a prompt of at least one token")
        for name, least in (("new_tokens", 2), ("warmups", 0), ("repeats", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise PocketError(f"a job cannot have {name} {getattr(self, name)}; at least {least}")


@dataclass(frozen=True)
class Timings:
    """Raw samples of a job.

    Args:
        load_s: Seconds to load, once a repeat, each into a process that has loaded the artifact before.
        prefill_s: Seconds from prompt to first token, per repeat, on a loaded artifact.
        decode_s: Seconds of each further token, per repeat: [repeats][new_tokens - 1].
        tokens: The greedy tokens of the first timed round.
        memory: Bytes by the kernel's own name (RssAnon, RssFile, VmHWM), after one load and all rounds.
        idle: The same of the process before it loads anything.
    """

    load_s: tuple[float, ...]
    prefill_s: tuple[float, ...]
    decode_s: tuple[tuple[float, ...], ...]
    tokens: tuple[int, ...]
    memory: Mapping[str, int] = field(default_factory=dict)
    idle: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """What an artifact answers where its golden text is forced upon it.

    Args:
        logits: The artifact's logits of `golden.top[i]`, for every step i.
        best: Its own likeliest token at every step.
    """

    logits: tuple[tuple[float, ...], ...]
    best: tuple[int, ...]


class Phone(Protocol):
    """A place where an artifact is measured: this host, an emulated phone, a real one.

    Attributes:
        kind: `real`, `emulated` or `host`; every record carries it.
    """

    kind: str

    def facts(self) -> Mapping[str, Any]:
        """Machine, system, processor, memory, load, runtime versions: JSON values by name.

        `cpu`, `cores`, `memory_bytes` and `os` are always there; a phone adds what it knows.
        """

    def push(self, folder: Path) -> str:
        """Make a folder available there; returns its place."""

    def answers(self, place: str, golden: Golden, threads: int) -> Answers:
        """Force the golden text on a pushed folder: the prompt in one step, then one token a step.

        Raises:
            PhoneError: the process there ended without an answer.
            TargetError: the artifact's runtime does not exist there.
        """

    def run(self, place: str, job: Job) -> Timings:
        """Time a job on a pushed folder, in a process of its own.

        Raises:
            PhoneError: the process there ended without an answer.
            TargetError: the artifact's runtime does not exist there.
        """

    def pull(self, place: str, name: str, to: Path) -> None:
        """Copy a file of a pushed folder back."""


def target_names() -> list[str]:
    """Names of all installed targets, sorted."""
    return sorted({point.name for point in entry_points(group=TARGETS)})


def target(name: str) -> Target:
    """Load a target.

    Raises:
        TargetError: there is none of that name.
        BackendMissingError: its back end is not installed.
    """
    return cast(Target, _load(TARGETS, "target", name))


def require_back_end(target: Target) -> None:
    """Refuse a target that plans without its back end but could not lower; imports nothing.

    Raises:
        BackendMissingError: a package of its back end is not installed.
    """
    for module in target.modules:
        if find_spec(module) is None:
            raise BackendMissingError(f"target {target.name}", module, target.extra)


def refuse_pictures(target: str, model: Model) -> None:
    """What a target says first where nothing of it shows pictures.

    Raises:
        TargetError: the model sees pictures.
    """
    if model.architecture.vision is not None:
        raise TargetError(
            f"{target} cannot take a {model.architecture.family} model: it shows no pictures; no target does yet, so "
            "compress and evaluate this model in torch"
        )


def refuse_generic(target: str, model: Model) -> None:
    """What a target says first where it cannot take torch code, but only models that are written in verbs.

    Raises:
        TargetError: only transformers knows the model.
    """
    if model.architecture.config is not None:
        raise TargetError(
            f"{target} cannot take a model that only transformers knows: it writes its own graph, and this model is "
            "torch code; executorch-android takes it"
        )


def phone(name: str) -> Phone:
    """Load a phone: `host`, later `adb:SERIAL` and emulated ones.

    Raises:
        TargetError: there is none of that name.
    """
    return cast(Phone, _load(PHONES, "phone", name.split(":")[0]))


def _load(group: str, noun: str, name: str) -> object:
    points: dict[str, EntryPoint] = {point.name: point for point in entry_points(group=group)}
    if name not in points:
        raise TargetError(f"no {noun} named {name!r}; installed: {', '.join(sorted(points)) or 'none'}")
    try:
        return points[name].load()
    except ModuleNotFoundError as error:
        raise BackendMissingError(f"{noun} {name}", error.name, name.split("-")[0]) from None
