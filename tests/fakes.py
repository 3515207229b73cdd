"""The only fakes: a target and a phone that pass the same suites as real ones.

The target's runtime is torch and its files are a saved model; the phone lives in the test's process, and its clock is
a script. Other processes find the target by the entry point that `install` writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from exporter import artifact as artifacts
from exporter import evaluate, store
from exporter.artifact import Artifact, Budget, Decision, Golden, Summary
from exporter.model import Model
from exporter.plugins import Answers, Finding, Job, Plan, Timings
from exporter.session import TorchSession, greedy
from exporter.weights import Dense, LowBit, Shared, Sparse, Weight, describe, nodes

ROOT = Path(__file__).resolve().parent.parent
MODEL = "model"


class FakeTarget:
    """A target whose runtime is torch: it takes every tree as it is."""

    extra = "fake"
    modules = ("torch",)

    def __init__(self, name: str = "fake", runs_here: bool = True, stand_in: str | None = None) -> None:
        self.name, self.runs_here, self.stand_in = name, runs_here, stand_in

    def plan(self, model: Model, context: int) -> Plan:
        decisions = tuple(_decision(site, weight) for site, weight in model.weights.items())
        return Plan(model.weights, decisions, sum(4 * t.numel() for t in model.tensors.values()), context)

    def lower(self, model: Model, plan: Plan, folder: Path) -> Mapping[str, str]:
        (folder / MODEL).mkdir()
        store.save(model, folder / MODEL)
        return {"torch": "2.0"}

    def budget(self, model: Model, plan: Plan) -> Budget:
        return Budget(relative_l2=1e-5, reason="float32 sums")

    def inspect(self, folder: Path, model: Model, plan: Plan) -> Sequence[Finding]:
        found = store.load(folder / MODEL).weights
        same = {site: torch.equal(weight.dense(), found[site].dense()) for site, weight in model.weights.items()}
        return [Finding(site, ok, "as the model has it" if ok else "differs") for site, ok in same.items()]

    def session(self, folder: Path, threads: int = 1) -> TorchSession:
        torch.set_num_threads(threads)
        return TorchSession(store.load(folder / MODEL))


TARGET = FakeTarget()
ELSEWHERE = FakeTarget("elsewhere", runs_here=False)
STOOD_IN = FakeTarget("stood-in", stand_in="torch, not the fake's own runtime")


class _CrashingTarget(FakeTarget):
    """A target whose runtime takes its process down, or never answers, or prints, as native code may."""

    def __init__(self, name: str, end: str) -> None:
        super().__init__(name)
        self._end = end

    def session(self, folder: Path, threads: int = 1) -> TorchSession:
        import os
        import signal
        import time

        os.write(1, b"a runtime prints what it likes\n")
        if self._end == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._end == "hangs":
            time.sleep(600)
        if self._end == "raises":
            raise ValueError("the graph is odd")
        return super().session(folder, threads)


DIES, HANGS, RAISES, CHATS = (_CrashingTarget(end, end) for end in ("dies", "hangs", "raises", "chats"))


def install(folder: Path) -> None:
    """Write entry points of the fake targets, for processes that have `folder` in their import path."""
    info = folder / "fake_targets-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-targets\nVersion: 1\n")
    names = {"fake": "TARGET", "elsewhere": "ELSEWHERE", "stood-in": "STOOD_IN"}
    names |= {n: n.upper() for n in ("dies", "hangs", "raises", "chats")}
    lines = [f"{name} = tests.fakes:{thing}" for name, thing in names.items()]
    (info / "entry_points.txt").write_text("\n".join(["[pocket.targets]", *lines, ""]))


@dataclass
class FakePhone:
    """A phone in this process. Its seconds are made up; its tokens and logits are the artifact's own.

    Args:
        storage: Where pushed folders go.
        target: Its runtime.
        load_s, prefill_s, decode_s: Seconds that everything takes, the same every time.
    """

    storage: Path
    target: FakeTarget = TARGET
    load_s: float = 0.25
    prefill_s: float = 0.5
    decode_s: float = 0.125
    kind: str = "emulated"
    asked: list[str] = field(default_factory=list)

    def facts(self) -> Mapping[str, Any]:
        return {"cpu": "Fake A1", "cores": 4, "memory_bytes": 2**30, "os": "FakeOS 1"}

    def push(self, folder: Path) -> str:
        place = f"pushed-{len(list(self.storage.iterdir()))}"
        shutil.copytree(folder, self.storage / place)
        return place

    def answers(self, place: str, golden: Golden, threads: int) -> Answers:
        """All forced tokens in one step, where a real phone takes one at a time."""
        self.asked.append("answers")
        forced = [*golden.prompt, *golden.tokens][: len(golden.prompt) + len(golden.top) - 1]
        logits = self.target.session(self.storage / place, threads).step(forced)[len(golden.prompt) - 1 :]
        top = tuple(tuple(row[ids].tolist()) for row, ids in zip(logits, golden.top))
        return Answers(top, tuple(logits.argmax(-1).tolist()))

    def run(self, place: str, job: Job) -> Timings:
        self.asked.append("run")
        session = self.target.session(self.storage / place, job.threads)
        tokens = tuple(greedy(session, job.prompt, job.new_tokens))
        decode = ((self.decode_s,) * (job.new_tokens - 1),) * job.repeats
        memory = {"RssAnon": 3 * 2**20, "RssFile": 2**20, "VmHWM": 5 * 2**20}
        idle = {name: size // 2 for name, size in memory.items()}
        return Timings((self.load_s,) * job.repeats, (self.prefill_s,) * job.repeats, decode, tokens, memory, idle)

    def pull(self, place: str, name: str, to: Path) -> None:
        source = self.storage / place / artifacts.checked_path(name)
        if not source.is_file():
            raise artifacts.ArtifactError(f"{place} has no file {name!r}")
        shutil.copyfile(source, to)


def write_artifact(folder: Path, model: Model, target: Any, files: Mapping[str, bytes], context: int = 32) -> Artifact:
    """Export a model as the pipeline does, with eight golden tokens.

    Args:
        folder: Made here.
        model: Any.
        target: Any.
        files: Tokenizer files.
        context: In tokens.
    """
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    plan = target.plan(model, context)
    requires, budget = target.lower(model, plan, folder), target.budget(model, plan)
    made = Artifact(
        target=target.name,
        model=_summary(model, context),
        recipe=[],
        decisions=list(plan.decisions),
        notes=[],
        requires=dict(requires),
        budget=budget,
        golden=evaluate.golden(TorchSession(model), [1], 8, budget),
        files={name: artifacts.describe_file(folder / name) for name in artifacts.files_under(folder)},
    )
    artifacts.save(made, folder)
    return made


def _summary(model: Model, context: int) -> Summary:
    a, p = model.architecture, model.provenance
    return Summary(
        source=p.source, digest=p.digest, licence="apache-2.0", family=a.family, parameters=model.parameters,
        source_parameters=model.parameters, vocab=a.vocab, context=context, layers=len(a.layers), bos=a.bos,
        eos=list(a.eos),
    )  # fmt: skip


def _decision(site: str, weight: Weight) -> Decision:
    size = -(-sum(map(_bits, nodes(weight))) // 8)
    tree = describe(weight)
    return Decision(
        site=site, shape=weight.shape, tree=tree, stored=tree, native=True, reason="runs as it is", bytes=size
    )


def _bits(node: Weight) -> int:
    """Bits of a node's own parts, as `store` packs them."""
    match node:
        case Dense(values):
            return values.numel() * values.element_size() * 8
        case LowBit(codes, scales, zeros, bits):
            return codes.numel() * bits + (scales.numel() + zeros.numel()) * 32
        case Sparse(_, places, _, m):
            return places.numel() * (m - 1).bit_length()
        case Shared(_, labels):
            return labels.numel() * 64
        case _:
            return 0
