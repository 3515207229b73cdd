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
from targets.executorch_android.package import FILE


class ExecutorchSession:
    """A folder running in ExecuTorch, token after token.

    Args:
        folder: Holds model.pte.
        threads: Of XNNPACK's pool, which the whole process shares.

    Raises:
        TargetError: there is no model.pte.
        ArtifactError: the runtime cannot load it, or later not run it.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        if not (folder / FILE).is_file():
            raise TargetError(f"{folder} has no {FILE}; `pocket export --target executorch-android` writes one")
        portable_lib._unsafe_reset_threadpool(threads)
        try:
            self._program = Runtime.get().load_program(folder / FILE)
            self._forward = self._program.load_method("forward")
        except RuntimeError as error:
            raise ArtifactError(f"{folder / FILE} does not load in ExecuTorch: {error}") from None
        self.context = self._constant("get_max_context_len")
        self._longest = self._constant("get_max_seq_len")
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
        inputs = (torch.tensor([list(tokens)]), torch.tensor([self._position]))
        try:
            logits: Tensor = self._forward.execute(inputs)[0]
        except RuntimeError as error:
            raise ArtifactError(f"the program does not run in ExecuTorch: {error}") from None
        self._position += len(tokens)
        return logits[0].clone()  # the output is the runtime's own memory

    def _constant(self, name: str) -> int:
        return int(self._program.load_method(name).execute(())[0])
