"""Sessions: a model, or an artifact, running; and greedy text from one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from exporter import adapters
from exporter.errors import PocketError, TargetError
from exporter.model import Model
from exporter.plugins import Session
from exporter.torch_ops import TorchOps, fitting_threads


class TorchSession:
    """A model running in torch: the session that artifacts are compared with."""

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self._ops = TorchOps(model, dtype, device)
        self._adapter = adapters.find(model.architecture.family)
        self._parameters = model.parameters
        self.context, self.causal = model.architecture.positions, model.architecture.causal
        self._is_uncached = model.architecture.config is not None
        self._vision = model.architecture.vision
        self._seen: Tensor | None = None
        self.reset()

    def show(self, pixels: Tensor) -> None:
        """Look at a picture: image tokens stand for it, until another is shown.

        Args:
            pixels: [channels, height, width], scaled as the model was trained to see them.

        Raises:
            PocketError: the model sees no pictures, or none of this shape.
        """
        if self._vision is None or tuple(pixels.shape) != self._vision.shape:
            takes = "none" if self._vision is None else f"pictures of {list(self._vision.shape)}"
            raise PocketError(f"a picture of {list(pixels.shape)} was shown; the model takes {takes}")
        with torch.inference_mode(), fitting_threads(self._parameters):
            self._seen = adapters.see(self._adapter, self._ops, pixels[None])

    def reset(self) -> None:
        """Forget every token, but not the picture."""
        self._ops.reset()
        self._is_fresh = True
        self._text: list[int] = []  # so far, where nothing is cached

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens; returns the logits after each of them, [tokens, vocab]; see `plugins.Session`."""
        if not self.causal:
            require_whole_text(self._is_fresh, len(tokens), self.context)
        self._is_fresh = False
        count = len(tokens)
        if self._is_uncached:
            tokens = self._text = [*self._text, *tokens]
            require_room(len(tokens), self.context)
        ids = torch.tensor([list(tokens)], device=self._ops.device)
        seen = self._seen if self._vision is not None and self._vision.token in tokens else None
        with torch.inference_mode(), fitting_threads(self._parameters):
            self._ops.begin()
            return adapters.logits(self._adapter, self._ops, ids, seen)[0, -count:]


class EncoderSession:
    """An encoder's artifact, running: one whole text after each reset.

    Args:
        context: Longest text, in tokens.
        vocab: Of the artifact.
        hidden_states: What the runtime gives for a whole text, [tokens, hidden], float32.
    """

    causal = False

    def __init__(self, context: int, vocab: int, hidden_states: Callable[[Sequence[int]], Tensor]) -> None:
        self.context, self._vocab, self._hidden_states = context, vocab, hidden_states
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self._is_fresh = True

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Hidden states of a whole text, [tokens, hidden], float32.

        Raises:
            PocketError: the session was not reset, or the text does not fit the context.
            TargetError: a token that the vocabulary lacks.
            ArtifactError: the runtime cannot run the artifact.
        """
        require_whole_text(self._is_fresh, len(tokens), self.context)
        require_known(tokens, self._vocab)
        self._is_fresh = False
        return self._hidden_states(tokens)


def require_whole_text(is_fresh: bool, tokens: int, context: int) -> None:
    """Refuse a step of an encoder that is no whole text.

    Args:
        is_fresh: Whether the session was reset since its last step.
        tokens: Of the text.
        context: Of the session.

    Raises:
        PocketError: it was not, or the text is empty or too long.
    """
    if not is_fresh:
        raise PocketError("an encoder sees a whole text at once, and has seen one; reset before the next")
    if not 1 <= tokens <= context:
        raise PocketError(f"a text of {tokens} tokens does not fit an encoder with a context of {context}")


def require_room(tokens: int, context: int) -> None:
    """Refuse a text that is longer than the context.

    Raises:
        PocketError: it is.
    """
    if tokens > context:
        raise PocketError(f"{tokens} tokens do not fit the context of {context}")


def require_known(tokens: Sequence[int], vocab: int) -> None:
    """Refuse a token that the vocabulary lacks: a runtime would read beyond its table.

    Raises:
        TargetError: it names the first.
    """
    if strange := [token for token in tokens if not 0 <= token < vocab]:
        raise TargetError(f"token {strange[0]} is not in the vocabulary; its tokens are 0 to {vocab - 1}")


def require_step(tokens: Sequence[int], vocab: int, before: int, context: int) -> None:
    """Refuse a step that a runtime cannot take.

    Args:
        tokens: Of the step.
        vocab: Of the artifact.
        before: Tokens that it has seen since the last reset.
        context: Of the artifact.

    Raises:
        TargetError: no token, one that the vocabulary lacks, or more than the context holds.
    """
    if not tokens:
        raise TargetError("a step takes at least one token")
    require_known(tokens, vocab)
    if before + len(tokens) > context:
        more = f"{before} tokens and {len(tokens)} more"
        raise TargetError(f"{more} do not fit the context of {context}; reset, or export with a longer one")


def greedy(session: Session, prompt: Sequence[int], new_tokens: int, eos: Sequence[int] = ()) -> Iterator[int]:
    """The likeliest next token, again and again; ends early after a token of `eos`.

    Args:
        session: Reset first.
        prompt: At least one token.
        new_tokens: Tokens to add, at most.
        eos: Tokens that end the text; the ending token is given too.

    Raises:
        PocketError: it is an encoder's session, or prompt and new tokens do not fit the context.
    """
    if not session.causal:
        raise PocketError("an encoder writes no text: it gives the hidden states of one; use a decoder")
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
