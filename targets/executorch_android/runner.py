"""A session over ExecuTorch's own runtime, as the pip wheel brings it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import executorch.kernels.quantized  # noqa: F401 (registers the lookups)
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 (registers custom_sdpa and update_cache)
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from torch import Tensor

from exporter.errors import ArtifactError, TargetError
from exporter.session import require_known, require_room, require_whole_text
from targets.executorch_android.package import FILE


class _Program:
    """A folder's program, loaded.

    Args:
        folder: Holds model.pte.
        threads: Of XNNPACK's pool, which the whole process shares.

    Raises:
        TargetError: there is no model.pte.
        ArtifactError: the runtime cannot load it, or later not run it.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        if not (folder / FILE).is_file():
            raise TargetError(f"{folder} has no {FILE}; `pocket export --target executorch-android` writes one")
        portable_lib._unsafe_reset_threadpool(threads)
        try:
            self._program = Runtime.get().load_program(folder / FILE)
            self._forward = self._program.load_method("forward")
        except RuntimeError as error:
            raise ArtifactError(f"{folder / FILE} does not load in ExecuTorch: {error}") from None

    def call(self, *inputs: Tensor) -> Tensor:
        """What `forward` gives, without the batch."""
        try:
            found: Tensor = self._forward.execute(inputs)[0]
        except RuntimeError as error:
            raise ArtifactError(f"the program does not run in ExecuTorch: {error}") from None
        return found[0].clone()  # the output is the runtime's own memory

    def constant(self, name: str) -> int:
        """The value of a constant method."""
        return int(self._program.load_method(name).execute(())[0])


class ExecutorchSession:
    """A decoder running in ExecuTorch, token after token."""

    causal = True

    def __init__(self, program: _Program) -> None:
        self._program = program
        self.context = program.constant("get_max_context_len")
        self._longest = program.constant("get_max_seq_len")
        self._position = 0

    def reset(self) -> None:
        """Forget every token: attention never looks beyond the position, so the caches stay as they are."""
        self._position = 0

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens; returns the logits after each of them, [tokens, vocab].

        Raises:
            TargetError: they do not fit the context.
        """
        if self._position + len(tokens) > self.context:
            raise TargetError(f"{self._position + len(tokens)} tokens do not fit the context of {self.context}")
        pieces = [tokens[i : i + self._longest] for i in range(0, len(tokens), self._longest)]
        return torch.cat([self._call(piece) for piece in pieces])

    def _call(self, tokens: Sequence[int]) -> Tensor:
        logits = self._program.call(torch.tensor([list(tokens)]), torch.tensor([self._position]))
        self._position += len(tokens)
        return logits


class WholeTextSession:
    """A program without a cache: an encoder takes one text after each reset, a decoder the whole text at every step.

    The text so far is kept here.
    """

    def __init__(self, program: _Program) -> None:
        self._program = program
        self.causal = bool(program.constant("is_causal"))
        self.context, self._vocab = program.constant("get_max_context_len"), program.constant("get_vocab_size")
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self._text: list[int] = []

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits after each of more tokens, [tokens, vocab], or hidden states of a whole text, [tokens, hidden].

        Raises:
            PocketError: an encoder was not reset, or the text does not fit the context.
            TargetError: a token that the vocabulary lacks.
        """
        if not self.causal:
            require_whole_text(not self._text, len(tokens), self.context)
        require_room(len(self._text) + len(tokens), self.context)
        require_known(tokens, self._vocab)
        self._text += tokens
        return self._program.call(torch.tensor([self._text]))[-len(tokens) :]


def open_session(folder: Path, threads: int = 1) -> ExecutorchSession | WholeTextSession:
    """Run a folder; see `_Program` for what may be wrong with it."""
    program = _Program(folder, threads)
    return ExecutorchSession(program) if program.constant("use_kv_cache") else WholeTextSession(program)
