"""The process that the host phone measures in: one request as JSON on stdin, one reply as JSON on stdout.

Request: {"place": folder, "job": {...}} or {"place": folder, "golden": {...}, "threads": n}.
Reply: {"timings": {...}}, {"answers": {...}}, or {"error": class in exporter.errors, "message": one line}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from pydantic import TypeAdapter

from exporter import artifact as artifacts
from exporter import plugins
from exporter.artifact import Golden
from exporter.errors import PocketError, TargetError
from exporter.plugins import Answers, Job, Session, Timings

STATUS = Path("/proc/self/status")
MEMORY = ("RssAnon", "RssFile", "VmHWM")
Round = tuple[list[int], list[float]]  # tokens, and the seconds that each took


def answer(session: Session, golden: Golden) -> Answers:
    """Force the golden text on a session: the prompt in one step, then one token a step."""
    session.reset()
    logits, best = [], []
    forced = [golden.prompt, *([token] for token in golden.tokens)]
    for tokens, top in zip(forced, golden.top):
        last = session.step(tokens)[-1]  # [vocab]
        logits.append(tuple(float(last[token]) for token in top))
        best.append(int(last.argmax()))
    return Answers(tuple(logits), tuple(best))


def measure(load: Callable[[], Session], job: Job) -> Timings:
    """Time a job: first the rounds on one loaded session, then loading on its own.

    Rounds come first so that memory is that of one load; loading comes last so that what a first load alone does
    (importing the runtime, reading the file from disk) is in no sample.
    """
    idle = memory()
    session = load()
    for _ in range(job.warmups):
        _round(session, job)
    rounds = [_round(session, job) for _ in range(job.repeats)]
    used = memory()
    del session
    loads = tuple(_load_seconds(load) for _ in range(job.repeats))
    prefills, decodes = tuple(took[0] for _, took in rounds), tuple(tuple(took[1:]) for _, took in rounds)
    return Timings(loads, prefills, decodes, tuple(rounds[0][0]), used, idle)


def memory() -> dict[str, int]:
    """This process's memory in bytes, by the kernel's names; empty where the kernel does not say."""
    if not STATUS.is_file():
        return {}
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in MEMORY if name in fields}


def _round(session: Session, job: Job) -> Round:
    """Greedy text after the prompt; the first of the times is the prefill's."""
    session.reset()
    gc.collect()
    tokens, took, step = [], [], list(job.prompt)
    for _ in range(job.new_tokens):
        start = time.perf_counter()
        token = int(session.step(step)[-1].argmax())
        took.append(time.perf_counter() - start)
        tokens.append(token)
        step = [token]
    return tokens, took


def _load_seconds(load: Callable[[], Session]) -> float:
    gc.collect()  # the session before is gone
    start = time.perf_counter()
    session = load()
    took = time.perf_counter() - start
    del session
    return took


def _reply(request: dict[str, Any]) -> dict[str, Any]:
    place = Path(request["place"])
    target = plugins.target(artifacts.load(place).target)
    if not target.runs_here:
        raise TargetError(f"{target.name} has no runtime on this machine; probe it on a phone that has one")
    if target.stand_in:
        raise TargetError(
            f"{target.name} runs here in a stand-in: {target.stand_in}; its times say nothing of a phone's, so nothing "
            "is timed; `pocket check` runs it"
        )
    if "golden" in request:
        session = target.session(place, threads=request["threads"])
        found = answer(session, Golden.model_validate(request["golden"]))
        return {"answers": TypeAdapter(Answers).dump_python(found, mode="json")}
    job = TypeAdapter(Job).validate_python(request["job"])
    timings = measure(lambda: target.session(place, threads=job.threads), job)
    return {"timings": TypeAdapter(Timings).dump_python(timings, mode="json")}


def _own_stdout() -> TextIO:
    """A stream to the real stdout; what a runtime prints goes to stderr from here on."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def main() -> None:
    """Answer the request on stdin; an error of ours is an answer, any other ends the process."""
    gc.disable()  # no collection falls into a sample
    with _own_stdout() as out:
        try:
            reply = _reply(json.load(sys.stdin))
        except PocketError as error:
            reply = {"error": type(error).__name__, "message": str(error)}
        json.dump(reply, out)


if __name__ == "__main__":
    main()
