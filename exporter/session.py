"""Sessions: a model, or an artifact, running token after token; and greedy text from one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from exporter import adapters
from exporter.errors import PocketError
from exporter.model import Model
from exporter.plugins import Session
from exporter.torch_ops import TorchOps, fitting_threads


class TorchSession:
    """A model running in torch, token after token: the session that artifacts are compared with."""

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self._ops = TorchOps(model, dtype, device)
        self._adapter = adapters.find(model.architecture.family)
        self._parameters = model.parameters
        self.context = model.architecture.positions

    def reset(self) -> None:
        """Forget every token."""
        self._ops.reset()

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens; returns the logits after each of them, [tokens, vocab]."""
        ids = torch.tensor([list(tokens)], device=self._ops.device)
        with torch.inference_mode(), fitting_threads(self._parameters):
            self._ops.begin()
            return adapters.logits(self._adapter, self._ops, ids)[0]


def greedy(session: Session, prompt: Sequence[int], new_tokens: int, eos: Sequence[int] = ()) -> Iterator[int]:
    """The likeliest next token, again and again; ends early after a token of `eos`.

    Args:
        session: Reset first.
        prompt: At least one token.
        new_tokens: Tokens to add, at most.
        eos: Tokens that end the text; the ending token is given too.

    Raises:
        PocketError: prompt and new tokens do not fit the context.
    """
    if not prompt:
        raise PocketError("the prompt has no token; give text, or a model whose tokenizer begins with a BOS token")
    if len(prompt) + new_tokens > session.context:
        wanted = f"{len(prompt)} prompt tokens and {new_tokens} new ones"
        raise PocketError(f"{wanted} do not fit the context of {session.context}; ask for fewer")
    session.reset()
    logits = session.step(prompt)
    for count in range(new_tokens):
        token = int(logits[-1].argmax())
        yield token
        if token in eos or count + 1 == new_tokens:
            return
        logits = session.step([token])
