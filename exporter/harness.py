"""Any decoder, in torch or in its own runtime, as a model of lm-evaluation-harness (the extra `lm-eval` brings it).

from exporter import harness, pipeline
from exporter.session import TorchSession
model = pipeline.load("builtin")
found = harness.evaluate(TorchSession(model), pipeline.tokenizer_of(model), ["lambada_openai"], limit=100)

Works over sessions, so a checkpoint, a compressed model and an artifact are measured by the same code. Texts go one
after another, without padding; one longer than the context keeps its last tokens, as the harness itself does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from exporter.errors import BackendMissingError, PocketError
from exporter.plugins import Session
from exporter.session import greedy
from exporter.tokenizer import Tokenizer

try:
    from lm_eval import evaluator, utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError as error:
    raise BackendMissingError("lm-evaluation-harness", error.name, "lm-eval") from None

MOST_NEW_TOKENS = 256  # where a task says nothing


class SessionLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A session in the harness's own protocol.

    Args:
        session: Of a decoder.
        tokenizer: Its own.
        eos: Tokens that end a text.

    Raises:
        PocketError: it is an encoder.
    """

    def __init__(self, session: Session, tokenizer: Tokenizer, eos: Sequence[int] = ()) -> None:
        super().__init__()
        if not session.causal:
            raise PocketError("an encoder predicts no tokens, which the harness asks for; use a decoder")
        self._session, self._tokenizer, self._eos = session, tokenizer, tuple(eos)

    @property
    def eot_token_id(self) -> int:
        """What ends a text; where nothing does, what begins one."""
        first = 0 if self._tokenizer.bos is None else self._tokenizer.bos
        return self._eos[0] if self._eos else first

    @property
    def prefix_token_id(self) -> int:
        """What a text begins after."""
        return self.eot_token_id if self._tokenizer.bos is None else self._tokenizer.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, BOS first unless told otherwise."""
        plain = add_special_tokens is False
        return self._tokenizer.encode_plain(string) if plain else self._tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): its log-likelihood, in windows of the context where it is longer; no token counts twice."""
        return [self._rolled(request.args[0]) for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): the greedy text up to the first of `until`, which is left out.

        Raises:
            PocketError: the settings ask for sampling.
        """
        return [self._generated(*request.args) for request in requests]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): the continuation's log-likelihood, and whether it is greedy."""
        return [self._scored(context, continuation) for _, context, continuation in requests]

    def _rolled(self, text: str) -> float:
        tokens = self._tokenizer.encode_plain(text)
        windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self._session.context, 1)
        return sum(self._scored(*utils.make_disjoint_window(window))[0] for window in windows)

    def _scored(self, start: Sequence[int], added: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood of `added` after `start`, of which the last tokens are kept that fit."""
        context = self._session.context
        if len(added) > context:
            raise PocketError(f"{len(added)} tokens to predict do not fit the context of {context}; use a shorter task")
        if not added:
            return 0.0, True
        tokens = [*(start or [self.prefix_token_id]), *added][-(context + 1) : -1]
        self._session.reset()
        rows = self._session.step(tokens)[-len(added) :].double().log_softmax(-1)  # [added, vocab]
        chosen = rows.gather(1, torch.tensor(list(added))[:, None])
        return float(chosen.sum()), rows.argmax(-1).tolist() == list(added)

    def _generated(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample"):
            raise PocketError("text is greedy here; choose a task without do_sample")
        new_tokens = int(settings.get("max_gen_toks", MOST_NEW_TOKENS))
        if new_tokens >= self._session.context:
            raise PocketError(f"{new_tokens} new tokens leave no room in a context of {self._session.context}")
        prompt = (self._tokenizer.encode(context) or [self.prefix_token_id])[-(self._session.context - new_tokens) :]
        until, said = _listed(settings.get("until")), ""
        tokens: list[int] = []
        for token in greedy(self._session, prompt, new_tokens, self._eos):
            if token in self._eos:
                break
            tokens.append(token)
            said = self._text_after(prompt, tokens)
            if any(stop in said for stop in until):
                break
        return said[: min((said.find(stop) for stop in until if stop in said), default=len(said))]

    def _text_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """What tokens say after a prompt: a tokenizer may drop the space in front of the first of a text."""
        whole, front = self._tokenizer.decode([*prompt, *tokens]), self._tokenizer.decode(prompt)
        return whole[len(front) :] if whole.startswith(front) else self._tokenizer.decode(tokens)


def evaluate(session: Session, tokenizer: Tokenizer, tasks: Sequence[Any], eos: Sequence[int] = (), **more: Any) -> Any:
    """Run tasks of the harness.

    Args:
        session: Of a decoder: a model in torch, or an artifact in its runtime.
        tokenizer: Its own.
        tasks: Names of tasks, or their configs.
        eos: Tokens that end a text.
        more: Passed to `lm_eval.simple_evaluate`: `limit`, `num_fewshot`, `task_manager` and so on.

    Returns:
        What `lm_eval.simple_evaluate` returns; metrics are under `results`, by task.
    """
    return evaluator.simple_evaluate(SessionLM(session, tokenizer, eos), tasks=list(tasks), **more)


def _listed(until: str | Iterable[str] | None) -> list[str]:
    return [until] if isinstance(until, str) else [stop for stop in until or () if stop]
