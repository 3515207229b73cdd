"""An exported folder running on this machine, in the reference executor: what a program says, not how fast it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.errors import ArtifactError
from exporter.session import EncoderSession, require_step
from targets.coreml_ios.executor import ReferenceModel
from targets.coreml_ios.executor.machine import Observer
from targets.coreml_ios.package import HIDDEN, LOGITS, NAME
from targets.coreml_ios.reader import Package

UNSEEN = -1e4  # in the mask: minus infinity would make a row that is masked throughout no number
RANK = {"inputIds": 2, "causalMask": 4}


@dataclass(frozen=True)
class _Program:
    """A program and how it is run.

    Args:
        model: The program.
        threads: Of torch.
    """

    model: ReferenceModel
    threads: int

    def predicted(self, output: str, inputs: dict[str, Tensor], state: Any = None) -> Tensor:
        """An output [1, tokens, channels] as [tokens, channels], float32."""
        with _running_in(self.threads):
            return torch.from_numpy(self.model.predict(inputs, state)[output]).float()[0]


class CoreMLSession:
    """A decoder, token after token, as an app runs it: the caller makes the mask, the program keeps the states.

    Args:
        program: A decoder's.
        context: Longest text, in tokens.
        vocab: Of the program.
    """

    causal = True

    def __init__(self, program: _Program, context: int, vocab: int) -> None:
        self._program, self.context, self._vocab = program, context, vocab
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self._count, self._state = 0, self._program.model.make_state()

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens; returns the logits after each of them, [tokens, vocab], float32.

        Raises:
            TargetError: no token, one that the vocabulary lacks, or more than the context holds.
            ArtifactError: an operation cannot be computed; it is named.
        """
        require_step(tokens, self._vocab, self._count, self.context)
        inputs = {"inputIds": torch.tensor([list(tokens)]), "causalMask": causal_mask(self._count, len(tokens))}
        logits = self._program.predicted(LOGITS, inputs, self._state)
        self._count += len(tokens)
        return logits


def open_session(
    folder: Path, threads: int = 1, *, keep_float32: bool = False, observe: Observer | None = None
) -> CoreMLSession | EncoderSession:
    """Run the package of a folder.

    Args:
        folder: An artifact's.
        threads: Of torch.
        keep_float32: Leave floats unrounded, to see how much of an error is float16's.
        observe: Called with every operation and its results, in order.

    Raises:
        ArtifactError: the package is damaged, or not what this target writes.
    """
    package = Package(folder / NAME)
    interface = package.interface()
    is_decoder, ranks = bool(interface.states), {name: len(shape) for name, (shape, _) in interface.inputs.items()}
    wanted = RANK if is_decoder else {"inputIds": RANK["inputIds"]}
    if ranks != wanted:
        raise ArtifactError(f"the program takes {ranks} (axes by name); one of ours takes {wanted}")
    model = ReferenceModel.of(package.specification, package.weights, keep_float32=keep_float32, observe=observe)
    program = _Program(model, threads)
    context, vocab = interface.inputs["inputIds"][0][1][1], package.shape(token_table(package))[0]
    if is_decoder:
        return CoreMLSession(program, context, vocab)
    return EncoderSession(
        context, vocab, lambda tokens: program.predicted(HIDDEN, {"inputIds": torch.tensor([list(tokens)])})
    )


def causal_mask(start: int, tokens: int) -> Tensor:
    """What `tokens` new tokens after `start` others see, [1, 1, tokens, end]: 0 where a token may look."""
    return torch.full((1, 1, tokens, start + tokens), UNSEEN).triu(start + 1)


def token_table(package: Package) -> str:
    """The constant whose rows stand for tokens: a program of ours looks these up first.

    Raises:
        ArtifactError: it looks up none.
    """
    gather = next((operation for operation in package.block.operations if operation.type == "gather"), None)
    arguments = gather.inputs["x"].arguments if gather is not None and "x" in gather.inputs else ()
    if not arguments or arguments[0].name not in package.names:
        raise ArtifactError("the program looks up no tokens; one of ours does so first")
    return str(arguments[0].name)


@contextmanager
def _running_in(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
