"""How good a model is, and how close an artifact is to its model: perplexity, distances, greedy text, golden answers.

Everything works over sessions, so a model in torch and an artifact in its own runtime are measured alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.artifact import Budget, Golden, Number, Record
from exporter.errors import CheckFailedError, PocketError
from exporter.plugins import Session
from exporter.session import greedy

LARGEST_LOSS = 700.0  # exp of more is no float
DEVIATIONS = 6.0  # of an error that is spread evenly over the logits; a normal one goes beyond once in 10^9


class Perplexity(Record):
    """Mean loss (natural logarithm) of the predicted tokens of a text, and its exponential (infinite over 700)."""

    tokens: int
    nll: float
    perplexity: Number


class Agreement(Record):
    """Two models on one text: mean KL(reference || candidate) in nats, how often the likeliest token is the same."""

    tokens: int
    kl: float
    top1: float


class Divergence(Record):
    """Where the candidate's own greedy text leaves the reference's.

    `reference_gap` is how much higher the reference's logit of its own token is than that of the candidate's token.
    It is a tie where a budget-sized error, spread evenly over the logits, explains it (`allowed_gap`).
    """

    position: int
    reference_token: int
    candidate_token: int
    reference_gap: float
    allowed_gap: float
    is_tie: bool


class Comparison(Record):
    """A candidate against its reference, both fed the prompt and the reference's greedy text.

    The candidate runs twice, in one prefill and as prefill of the prompt and one step per token; each number is that
    of the worse run. `max_abs` and `relative_l2` are of the worst position, `kl` (nats) is a mean over positions,
    `top1` a fraction of them. `prefill_decode_l2` is between the candidate's two runs. `greedy_agreement` counts the
    tokens of the candidate's own greedy text before the first that differs. Infinite (null in JSON) where logits are
    not finite.
    """

    positions: int
    max_abs: Number
    relative_l2: Number
    budget_l2: float
    kl: Number
    top1: float
    prefill_decode_l2: Number
    greedy_agreement: int
    new_tokens: int
    divergence: Divergence | None
    ok: bool
    reasons: list[str]


def perplexity(
    session: Session, windows: Tensor, report: Callable[[float], None] = lambda fraction: None
) -> Perplexity:
    """Perplexity of a text, each window on its own; the first token of a window is given, the others are predicted.

    Args:
        session: Reset for each window.
        windows: [windows, length], token ids, length at least 2.
        report: Told the fraction done.

    Raises:
        PocketError: it is an encoder, or a window is longer than the context.
        CheckFailedError: logits are not finite.
    """
    _require_decoder(session)
    require_room(session, windows.shape[1])
    total = 0.0
    for index, window in enumerate(windows):
        likelihood = finite(whole_text(session, window.tolist()), f"window {index}").log_softmax(-1)  # [length, vocab]
        total -= float(likelihood[:-1].gather(1, window[1:, None]).sum())
        report((index + 1) / len(windows))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = total / tokens
    return Perplexity(tokens=tokens, nll=mean, perplexity=math.exp(mean) if mean < LARGEST_LOSS else math.inf)


def agreement(reference: Session, candidate: Session, windows: Tensor) -> Agreement:
    """How a candidate's predictions differ from a reference's on a text.

    Args:
        reference: Reset for each window.
        candidate: Likewise.
        windows: [windows, length], token ids.

    Raises:
        PocketError: one is an encoder, or a window is longer than a context.
        CheckFailedError: logits are not finite, or the two have other vocabularies.
    """
    distances = []
    _require_decoder(reference)
    _require_decoder(candidate)
    for index, window in enumerate(windows):
        require_room(reference, len(window))
        require_room(candidate, len(window))
        right = finite(whole_text(reference, window.tolist()), f"window {index} of the reference")
        other = finite(whole_text(candidate, window.tolist()), f"window {index} of the candidate")
        require_shape(other, right)
        distances.append(_distance(right, other))
    tokens = windows.numel()
    kl, top1 = (sum(getattr(d, name) for d in distances) / len(distances) for name in ("kl", "top1"))
    return Agreement(tokens=tokens, kl=kl, top1=top1)


def compare(
    reference: Session, candidate: Session, prompt: Sequence[int], new_tokens: int, budget: Budget
) -> Comparison:
    """Hold a candidate to a reference: logits within the budget at every position, greedy text equal up to ties.

    Args:
        reference: The model.
        candidate: The artifact.
        prompt: At least one token.
        new_tokens: Length of the greedy text.
        budget: How far logits may lie apart.

    Raises:
        PocketError: prompt and new tokens do not fit a context.
        CheckFailedError: the reference's own logits are not finite, or the candidate's are of another vocabulary.
    """
    tokens = list(greedy(reference, prompt, new_tokens))
    text = [*prompt, *tokens[:-1]]
    right = finite(whole_text(reference, text), "the model")  # [positions, vocab]
    prefill, decode = whole_text(candidate, text), _prefill_and_decode(candidate, text, len(prompt))
    for logits in (prefill, decode):
        require_shape(logits, right)
    distances = {"prefill": _distance(right, prefill), "decode": _distance(right, decode)}
    apart = _distance(prefill, decode)
    own = list(greedy(candidate, prompt, new_tokens))
    divergence = _divergence(tokens, own, right[len(prompt) - 1 :], budget)
    reasons = [*_too_far(distances, apart, budget), *_unexplained(divergence)]
    worst = distances.values()
    return Comparison(
        positions=len(text),
        max_abs=max(d.max_abs for d in worst),
        relative_l2=max(d.relative_l2 for d in worst),
        budget_l2=budget.relative_l2,
        kl=max(d.kl for d in worst),
        top1=min(d.top1 for d in worst),
        prefill_decode_l2=apart.relative_l2,
        greedy_agreement=new_tokens if divergence is None else divergence.position,
        new_tokens=new_tokens,
        divergence=divergence,
        ok=not reasons,
        reasons=reasons,
    )


def golden(session: Session, prompt: Sequence[int], new_tokens: int, budget: Budget, top: int = 8) -> Golden:
    """Answers of a model that an artifact carries with it.

    The tolerance of a logit is what `DEVIATIONS` of a budget-sized error come to, spread evenly over the vocabulary.

    Args:
        session: The model.
        prompt: At least one token.
        new_tokens: Length of the greedy text, at least 1.
        budget: Of the artifact.
        top: Logits per step, the largest.

    Raises:
        PocketError: prompt and new tokens do not fit the context.
        CheckFailedError: logits are not finite.
    """
    tokens = list(greedy(session, prompt, new_tokens))
    text = [*prompt, *tokens[:-1]]
    rows = finite(_prefill_and_decode(session, text, len(prompt)), "the model")[len(prompt) - 1 :]
    largest = rows.topk(min(top, rows.shape[1]))
    return Golden(
        prompt=list(prompt),
        tokens=tokens,
        top=largest.indices.tolist(),
        logits=largest.values.tolist(),
        tolerance=float(spread(rows, budget).max()),
    )


@dataclass(frozen=True)
class _Distance:
    """Of two runs; `position` is where relative_l2 is largest."""

    max_abs: float
    relative_l2: float
    position: int
    kl: float
    top1: float


def _distance(right: Tensor, other: Tensor) -> _Distance:
    """How far `other` lies from `right`, both [positions, vocab]; infinite where one is not finite."""
    broken = ~(right.isfinite() & other.isfinite()).all(-1)
    if bool(broken.any()):
        return _Distance(math.inf, math.inf, int(broken.int().argmax()), math.inf, 0.0)
    relative = relative_l2(right, other)
    likely, guess = right.log_softmax(-1), other.log_softmax(-1)
    kl = (likely.exp() * (likely - guess)).sum(-1).mean().clamp(min=0)  # below 0 by rounding only
    same = (right.argmax(-1) == other.argmax(-1)).double().mean()
    largest = (right - other).abs().max()
    return _Distance(float(largest), float(relative.max()), int(relative.argmax()), float(kl), float(same))


def relative_l2(right: Tensor, other: Tensor) -> Tensor:
    """|other - right| / |right| per row, 0 for two rows of zeros."""
    error = (other - right).norm(dim=-1)
    return torch.where(error == 0, error, error / right.norm(dim=-1))


def _divergence(tokens: list[int], own: list[int], right: Tensor, budget: Budget) -> Divergence | None:
    """The first difference of two greedy texts; right [new_tokens, vocab] are the logits that chose `tokens`.

    The candidate's logits are r + d with |d| <= budget * |r|. It prefers token b to a where d_b - d_a >= r_a - r_b. The
    worst case of d allows sqrt(2) * budget * |r|, which every candidate within the budget meets: as a check it would be
    empty. An error of that size spread evenly over the vocabulary has a deviation of s = budget * rms(r) per logit, and
    sqrt(2) s in a difference of two; `DEVIATIONS` of these are allowed.
    """
    for position, (ours, theirs) in enumerate(zip(tokens, own)):
        if ours != theirs:
            row = right[position]
            gap, allowed = float(row[ours] - row[theirs]), math.sqrt(2) * float(spread(row, budget))
            return Divergence(
                position=position, reference_token=ours, candidate_token=theirs, reference_gap=gap,
                allowed_gap=allowed, is_tie=gap <= allowed,
            )  # fmt: skip
    return None


def spread(rows: Tensor, budget: Budget) -> Tensor:
    """How far one logit may lie off where a budget-sized error is spread evenly: [..., vocab] to [...]."""
    return DEVIATIONS * budget.relative_l2 * rows.square().mean(-1).sqrt()


def _too_far(distances: dict[str, _Distance], apart: _Distance, budget: Budget) -> Iterator[str]:
    """Which runs lie further apart than the budget; written so that a NaN is too far."""
    for name, found in [*distances.items(), ("prefill against decode", apart)]:
        if math.isinf(found.max_abs):
            yield f"{name}: logits at position {found.position} are not finite"
        elif not found.relative_l2 <= budget.relative_l2:
            limit = f"budget {budget.relative_l2:.2e}"
            yield f"{name}: relative L2 error {found.relative_l2:.2e} at position {found.position}, {limit}"


def _unexplained(divergence: Divergence | None) -> Iterator[str]:
    if divergence is not None and not divergence.is_tie:
        tokens = f"token {divergence.candidate_token} instead of {divergence.reference_token}"
        gap = f"the model has them {divergence.reference_gap:.3g} apart, a tie is at most {divergence.allowed_gap:.3g}"
        yield f"greedy text: {tokens} at {divergence.position}; {gap}"


def whole_text(session: Session, tokens: Sequence[int]) -> Tensor:
    """Logits after each token of a text, in one step: [tokens, vocab], float64."""
    session.reset()
    return session.step(tokens).double()


def _prefill_and_decode(session: Session, tokens: Sequence[int], prompt: int) -> Tensor:
    """The same with the first `prompt` tokens in one step and then one token a step."""
    session.reset()
    steps = [session.step(tokens[:prompt]), *(session.step([token]) for token in tokens[prompt:])]
    return torch.cat([step.double() for step in steps])


def finite(logits: Tensor, whose: str) -> Tensor:
    """The same numbers.

    Raises:
        CheckFailedError: one is not finite.
    """
    if not bool(logits.isfinite().all()):
        raise CheckFailedError(f"logits of {whose} are not finite; its weights or activations overflow")
    return logits


def require_shape(logits: Tensor, right: Tensor) -> None:
    """Refuse numbers of another shape than the model's.

    Raises:
        CheckFailedError: they are.
    """
    if logits.shape != right.shape:
        raise CheckFailedError(f"logits are {list(logits.shape)}; the model's are {list(right.shape)}")


def _require_decoder(session: Session) -> None:
    if not session.causal:
        raise PocketError("an encoder predicts no tokens: compare its hidden states with a reference's instead")


def require_room(session: Session, tokens: int) -> None:
    """Refuse more tokens than a session's context.

    Raises:
        PocketError: they are.
    """
    if tokens > session.context:
        raise PocketError(f"{tokens} tokens do not fit the context of {session.context}; take shorter windows")
