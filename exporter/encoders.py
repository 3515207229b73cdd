"""How close an encoder is to its model: hidden states at every position, and the embeddings of whole texts.

The embedding of a text is the mean of its hidden states, special tokens included, of length 1: what sentence encoders
are trained with. A decoder's measures are in `evaluate`; both work over sessions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from exporter.artifact import Budget, Golden, Number, Record
from exporter.errors import PocketError
from exporter.evaluate import finite, relative_l2, require_room, require_shape, spread, whole_text
from exporter.model import Architecture
from exporter.plugins import Session


class EncoderAgreement(Record):
    """Two encoders on the windows of a text.

    `cosine_mean` and `cosine_worst` are between the embeddings of a window; `relative_l2_mean` and `_worst` are of the
    hidden states of a position.
    """

    windows: int
    tokens: int
    cosine_mean: float
    cosine_worst: float
    relative_l2_mean: float
    relative_l2_worst: float


class EncoderComparison(Record):
    """A candidate against its reference, on texts of several lengths, each a whole text of its own.

    `max_abs` and `relative_l2` are of the worst position, `cosine` is that of the worst text's embeddings. Infinite
    (null in JSON), or a cosine of -1, where hidden states are not finite.
    """

    texts: list[int]
    positions: int
    max_abs: Number
    relative_l2: Number
    budget_l2: float
    cosine: float
    ok: bool
    reasons: list[str]


def text(architecture: Architecture, tokens: int) -> list[int]:
    """A text of so many tokens, all over the vocabulary, in the frame of the model's special tokens where it fits."""
    drawn = torch.randint(architecture.vocab, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    if architecture.bos is not None:
        drawn[0] = architecture.bos
    if architecture.eos and tokens > 1:
        drawn[-1] = architecture.eos[0]
    return drawn


def embedding(hidden: Tensor) -> Tensor:
    """The embedding of a text: [tokens, hidden] to [hidden], the mean, of length 1."""
    return torch.nn.functional.normalize(hidden.mean(0), dim=0)


def agreement(
    reference: Session, candidate: Session, windows: Tensor, report: Callable[[float], None] = lambda fraction: None
) -> EncoderAgreement:
    """How a candidate's hidden states and embeddings differ from a reference's on a text.

    Args:
        reference: Reset for each window.
        candidate: Likewise.
        windows: [windows, length], token ids.
        report: Told the fraction done.

    Raises:
        PocketError: one is a decoder, or a window is longer than a context.
        CheckFailedError: hidden states are not finite, or of another width.
    """
    cosines, errors = [], []
    for index, window in enumerate(windows):
        right = _hidden(reference, window.tolist(), f"window {index} of the reference")
        other = _hidden(candidate, window.tolist(), f"window {index} of the candidate")
        require_shape(other, right)
        cosines.append(_cosine(right, other))
        errors.append(relative_l2(right, other))
        report((index + 1) / len(windows))
    everywhere = torch.cat(errors)
    return EncoderAgreement(
        windows=len(windows), tokens=windows.numel(), cosine_mean=sum(cosines) / len(cosines),
        cosine_worst=min(cosines), relative_l2_mean=float(everywhere.mean()), relative_l2_worst=float(everywhere.max()),
    )  # fmt: skip


def compare(
    reference: Session, candidate: Session, texts: Sequence[Sequence[int]], budget: Budget
) -> EncoderComparison:
    """Hold a candidate to a reference: hidden states within the budget at every position of every text.

    Args:
        reference: The model.
        candidate: The artifact.
        texts: Each at least one token.
        budget: How far hidden states may lie apart.

    Raises:
        PocketError: a text does not fit a context, or one of the two is a decoder.
        CheckFailedError: the reference's own hidden states are not finite, or the candidate's are of another width.
    """
    pairs = [(_hidden(reference, tokens, "the model"), _run(candidate, tokens)) for tokens in texts]
    for right, other in pairs:
        require_shape(other, right)
    broken = [not bool(other.isfinite().all()) for _, other in pairs]
    errors = [float(relative_l2(*pair).max()) if not bad else math.inf for pair, bad in zip(pairs, broken)]
    apart = [float((right - other).abs().max()) if not bad else math.inf for (right, other), bad in zip(pairs, broken)]
    cosines = [_cosine(*pair) if not bad else -1.0 for pair, bad in zip(pairs, broken)]
    reasons = list(_too_far(texts, errors, budget))
    return EncoderComparison(
        texts=[len(tokens) for tokens in texts], positions=sum(map(len, texts)), max_abs=max(apart),
        relative_l2=max(errors), budget_l2=budget.relative_l2, cosine=min(cosines), ok=not reasons, reasons=reasons,
    )  # fmt: skip


def golden(session: Session, tokens: Sequence[int], budget: Budget, top: int = 8) -> Golden:
    """Answers of an encoder that an artifact carries with it: the largest channels, by size, at every position.

    The tolerance is that of a decoder's logits: a budget-sized error, spread evenly over the channels.

    Args:
        session: The model.
        tokens: A text.
        budget: Of the artifact.
        top: Channels per position.

    Raises:
        PocketError: the text does not fit the context.
        CheckFailedError: hidden states are not finite.
    """
    rows = _hidden(session, tokens, "the model")
    largest = rows.abs().topk(min(top, rows.shape[1])).indices
    return Golden(
        prompt=list(tokens),
        tokens=[],
        top=largest.tolist(),
        logits=rows.gather(1, largest).tolist(),
        tolerance=float(spread(rows, budget).max()),
    )


def _run(session: Session, tokens: Sequence[int]) -> Tensor:
    """Hidden states of a text, [tokens, hidden], float64."""
    if session.causal:
        raise PocketError("a decoder has no hidden states to compare; use perplexity, KL and greedy text")
    require_room(session, len(tokens))
    return whole_text(session, tokens)


def _hidden(session: Session, tokens: Sequence[int], whose: str) -> Tensor:
    return finite(_run(session, tokens), whose)


def _cosine(right: Tensor, other: Tensor) -> float:
    return float(embedding(right) @ embedding(other))


def _too_far(texts: Sequence[Sequence[int]], errors: Sequence[float], budget: Budget) -> Iterator[str]:
    """Which texts lie further apart than the budget; written so that a NaN is too far."""
    for tokens, error in zip(texts, errors):
        if math.isinf(error):
            yield f"a text of {len(tokens)} tokens: hidden states are not finite"
        elif not error <= budget.relative_l2:
            limit = f"budget {budget.relative_l2:.2e}"
            yield f"a text of {len(tokens)} tokens: relative L2 error {error:.2e} at the worst position, {limit}"
