"""The program against torch, verb by verb: proves every operation, or names the first that is wrong.

What float16 rounds would hide a small mistake. With floats left unrounded only the last bits of float32 lie between a
program and torch on the numbers that it stores, and what the model makes of them: torch once more, with every matrix
given last bits that are off, tells how much. The program is written once more, which tells the name of every verb's
value in it; where a package is not that program, both are run, and the first operation whose value departs is named.
"""

from __future__ import annotations

import contextlib
import filecmp
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter import adapters
from exporter.errors import ArtifactError, PocketError
from exporter.evaluate import relative_l2
from exporter.model import Model
from exporter.ops import listen
from exporter.plugins import Finding, Plan
from exporter.torch_ops import fitting_threads
from targets.coreml_ios.executor.program import Operation
from targets.coreml_ios.executor.values import Value
from targets.coreml_ios.package import NAME, write
from targets.coreml_ios.reader import ROOT, SPECIFICATION, WEIGHTS, Package, block_of
from targets.coreml_ios.reference import StoredOps
from targets.coreml_ios.runner import open_session, token_table

OPERATIONS, EXECUTION = "operations", "float32 execution"
TOKENS = 8  # enough for every matrix and the states
MANY_TOKENS = 512  # where two programs are compared, so that rows are read which few tokens read
LAST_BITS = 2.0**-23  # relative; sums of float32 products in another order are off by about this
BOUND, TIMES = 1e-5, 8  # measured: 2e-6, and in models that blow up last bits up to 6 times what they make of them
Steps = Sequence[Sequence[int]]
Place = tuple[int, int]  # step, verb


def prove(folder: Path, model: Model, plan: Plan) -> list[Finding]:
    """Two findings: every verb's value as torch has it, and every operation as it would be written now.

    A package that is known to be wrong is run too: so its first wrong operation gets a name.

    Args:
        folder: The artifact.
        model: That it was lowered from.
        plan: What is stored of it.
    """
    with tempfile.TemporaryDirectory() as place:
        now, verbs = Path(place), Verbs()
        write(model, plan, now / NAME, verbs.heard)
        compared = _Compared(folder, now, model.with_weights(plan.weights), plan.context, verbs)
        return [compared.finding(), _operations(folder, now)]


def _operations(folder: Path, now: Path) -> Finding:
    """Every operation with its attributes and inputs, against the program that is written for the model now."""
    said, wanted = (Package(place / NAME).specification for place in (folder, now))
    if said.SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True):
        return Finding(OPERATIONS, True, f"{len(block_of(said).operations)}, each as the model says")
    apart = (f"{_words(a)}, not {_words(b)}"
             for a, b in zip(block_of(said).operations, block_of(wanted).operations) if a != b)  # fmt: skip
    return Finding(OPERATIONS, False, f"the first that differs: {next(apart, 'something beside the operations')}")


def _words(operation: Any) -> str:
    return " ".join((operation.type, *(output.name for output in operation.outputs)))


class Verbs:
    """A model's verbs in order, each with its site, and the name of its value in the program."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self._places: dict[str, int] = {}  # by name

    def heard(self, verb: str, value: str) -> None:
        """One more."""
        self._places[value] = len(self.said)
        self.said.append((verb, value))

    def place(self, output: str) -> int | None:
        """Which verb an output is the value of; a pass may have lengthened the name that it had."""
        return self._places.get(output.partition("_cast_")[0])

    def towards(self, outputs: Sequence[str]) -> str:
        """The first verb whose value is among these outputs; the last one where none is."""
        known = (place for output in outputs if (place := self.place(output)) is not None)
        return self.said[next(known, -1)][0]


@dataclass(frozen=True)
class _Compared:
    """A package, the same model's as it is written now, and the model.

    Args:
        folder, now: Where the packages are.
        model: With the weights that the plan stores.
        context: Longest text.
        verbs: Of the program.
    """

    folder: Path
    now: Path
    model: Model
    context: int
    verbs: Verbs

    def finding(self) -> Finding:
        """What is wrong, or what was found right."""
        try:
            right, wrong = self._against_torch()
        except PocketError as error:
            right, wrong = "", str(error)
        said = "; ".join(text for text in (wrong, self._first_apart()) if text)
        return Finding(EXECUTION, not said, said or right)

    def _against_torch(self) -> tuple[str, str]:
        """What to say of a program that is right, and what of the first value that is not ("": all are)."""
        steps = self._steps(min(TOKENS, self.context))
        wanted, shaken = (_in_torch(StoredOps(self.model, noise=noise), steps) for noise in (0.0, LAST_BITS))
        found, last = _in_program(self.folder, self.verbs, steps), max(wanted)
        if last not in found:
            return "", f"no operation gives {self.verbs.said[-1][1]}, the value of {self.verbs.said[-1][0]}"
        errors = {place: _distance(right, found[place]) for place, right in wanted.items() if place in found}
        bound = max(BOUND, TIMES * max(_distance(right, shaken[place]) for place, right in wanted.items()))
        wrong = (f"{' '.join(self.verbs.said[place[1]])} is a relative L2 of {error:.1e} from torch, bound {bound:.0e}"
                 for place, error in errors.items() if not error <= bound)  # fmt: skip
        rounded = _in_program(self.folder, self.verbs, steps, keep_float32=False)
        right = (
            f"{len(errors)} values of verbs are a relative L2 of {max(errors.values()):.1e} from torch at most, bound "
            f"{bound:.0e}; rounding to float16 moves the last by {_distance(found[last], rounded[last]):.1e}"
        )
        return right, next(wrong, "")

    def _first_apart(self) -> str:
        """The first operation whose value is not that of the program written now; "" where there is none."""
        files = (f"{NAME}/{ROOT}/{name}" for name in (SPECIFICATION, WEIGHTS))
        if all(filecmp.cmp(self.folder / name, self.now / name, shallow=False) for name in files):
            return ""
        steps = self._steps(min(MANY_TOKENS, self.context), _other_rows(self.folder, self.now))
        ran, wanted = _fingerprints(self.folder, steps), _fingerprints(self.now, steps)
        if not ran:
            return ""  # it cannot even be opened
        for index, (one, other) in enumerate(zip_longest(ran, wanted)):
            if (apart := one or other) and one != other:
                where = self.verbs.towards([name for operation in wanted[index:] for name in operation.outputs])
                return f"the first operation whose value departs: {apart.words}, on the way to {where}"
        return ""

    def _steps(self, tokens: int, first: Sequence[int] = ()) -> Steps:
        """A text all over the vocabulary: a decoder's in two steps, an encoder's in one."""
        vocab = self.model.architecture.vocab
        text = [*first, *(index * vocab // tokens for index in range(tokens))][:tokens]
        cut = len(text) - 1 if self.model.architecture.causal else 0
        return [step for step in (text[:cut], text[cut:]) if step]


def _in_torch(ops: StoredOps, steps: Steps) -> dict[Place, Tensor]:
    """The value of every verb."""
    adapter, values = adapters.find(ops.model.architecture.family), list[Tensor]()
    listen(ops, lambda verb, value: values.append(value))
    found: dict[Place, Tensor] = {}
    with torch.inference_mode(), fitting_threads(ops.model.parameters):
        for step, tokens in enumerate(steps):
            values.clear()
            ops.begin()
            adapters.logits(adapter, ops, torch.tensor([list(tokens)]))
            found |= {(step, verb): value for verb, value in enumerate(values)}
    return found


def _in_program(folder: Path, verbs: Verbs, steps: Steps, *, keep_float32: bool = True) -> dict[Place, Tensor]:
    """The values of the verbs that the program gives."""
    found, values = dict[Place, Tensor](), dict[int, Tensor]()

    def observe(operation: Operation, results: Sequence[Value]) -> None:
        for (name, _), value in zip(operation.outputs, results):
            if (verb := verbs.place(name)) is not None and isinstance(value, Tensor):
                values[verb] = value

    session = open_session(folder, keep_float32=keep_float32, observe=observe)
    for step, tokens in enumerate(steps):
        values.clear()
        session.step(tokens)
        found |= {(step, verb): value for verb, value in values.items()}
    return found


@dataclass(frozen=True)
class _Ran:
    """An operation that ran: its type, its outputs, and what stands for their values, bit for bit."""

    type: str
    outputs: tuple[str, ...]
    values: int

    @property
    def words(self) -> str:
        """Type and outputs."""
        return " ".join((self.type, *self.outputs))


def _fingerprints(folder: Path, steps: Steps) -> list[_Ran]:
    """Every operation that runs, in order, up to one that cannot be computed."""
    ran: list[_Ran] = []

    def observe(operation: Operation, results: Sequence[Value]) -> None:
        values = hash(tuple(_bytes(value) for value in results))
        ran.append(_Ran(operation.type, tuple(name for name, _ in operation.outputs), values))

    with contextlib.suppress(PocketError):  # the operation that cannot be computed is named by its error
        session = open_session(folder, keep_float32=True, observe=observe)
        for tokens in steps:
            session.step(tokens)
    return ran


def _bytes(value: Value) -> bytes:
    return value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()


def _other_rows(folder: Path, now: Path) -> list[int]:
    """Tokens whose rows in the table of tokens differ: a text that has none of them would not show it."""
    try:
        packages = Package(folder / NAME), Package(now / NAME)
        said, wanted = (package.constant(token_table(package)).decode() for package in packages)
    except ArtifactError:
        return []
    if said.shape != wanted.shape or said.ndim != 2:
        return []
    return [int(row) for row in (said != wanted).any(1).nonzero()[0]]


def _distance(right: Tensor, value: Tensor) -> float:
    """Relative L2 of the worst position; infinite for another shape, or what is no number."""
    if right.shape != value.shape:
        return math.inf
    return float(relative_l2(right.double(), value.double()).nan_to_num(math.inf).max())
