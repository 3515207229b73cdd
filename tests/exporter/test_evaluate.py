"""Perplexity, comparison and golden answers: right models pass, wrong ones are told where they are wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exporter import checkpoint
from exporter.artifact import Budget, to_json
from exporter.compress import run
from exporter.compress.quantize import QuantizeConfig
from exporter.compress.step import UNKEPT
from exporter.errors import CheckFailedError, PocketError
from exporter.evaluate import Comparison, agreement, compare, golden, perplexity
from exporter.model import Layer, Model
from exporter.session import TorchSession, greedy
from exporter.tokenizer import Tokenizer
from tests.models import LLAMA, random_model

TIGHT = Budget(relative_l2=1e-5, reason="float32 sums")
LOOSE = Budget(relative_l2=1e-2, reason="8-bit activations")
MODEL = random_model(replace(LLAMA, layers=(Layer(4, 2, 16, 16, 96),) * 2))


def rounded(bits: int) -> Model:
    return run(MODEL, QuantizeConfig(algorithm="rtn", bits=bits), None, UNKEPT)


class Table:
    """A session whose logits depend on the latest token alone."""

    context, causal = 64, True

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def reset(self) -> None:
        pass

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self.rows[list(tokens)]


class BrokenDecode(TorchSession):
    """Right in a prefill, wrong in a step of one token after others."""

    wrong = 1.1

    def step(self, tokens: Sequence[int]) -> Tensor:
        logits = super().step(tokens)
        return logits * self.wrong if len(tokens) == 1 and self._ops._start > 0 else logits


def chain(*gaps: float) -> Tensor:
    """Logits of a text 0, 1, 2, ...: token i + 1 leads token 9 by gaps[i] after token i."""
    rows = torch.linspace(-3, 3, 12).repeat(12, 1)
    for token, gap in enumerate(gaps):
        rows[token, 9] = 8.0
        rows[token, token + 1] = 8.0 + gap
    return rows


# ---- perplexity --------------------------------------------------------------------------------------------------


def test_perplexity_is_the_exponential_of_the_mean_loss_of_predicted_tokens() -> None:
    windows, told = torch.randint(0, 96, (3, 20)), list[float]()
    found = perplexity(TorchSession(MODEL), windows, told.append)

    losses = []
    for window in windows:
        session = TorchSession(MODEL, torch.float64)
        losses.append(F.cross_entropy(session.step(window.tolist())[:-1], window[1:], reduction="none"))
    mean = float(torch.cat(losses).mean())
    assert found.tokens == 3 * 19
    assert found.nll == pytest.approx(mean, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert told == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]


def test_the_published_model_has_its_published_loss(stories: Path, stories_text: Path) -> None:
    model = checkpoint.load(stories)
    tokens = Tokenizer(model.files, None).encode_plain(stories_text.read_text(encoding="utf-8"))
    pieces = torch.tensor(tokens[: 60 * 256]).view(60, 256)[:, :255]
    windows = torch.cat((torch.ones(60, 1, dtype=torch.int64), pieces), dim=1)
    assert perplexity(TorchSession(model), windows).nll == pytest.approx(1.847, abs=5e-4)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    assert perplexity(Table(torch.zeros(12, 12)), torch.randint(0, 12, (2, 9))).perplexity == pytest.approx(12)


def test_a_loss_beyond_floats_is_an_infinite_perplexity() -> None:
    found = perplexity(Table(torch.eye(12) * 1e6), torch.tensor([[0, 1, 2]]))
    assert found.nll == pytest.approx(1e6)
    assert found.perplexity == math.inf


def test_perplexity_without_finite_logits_is_refused() -> None:
    rows = torch.zeros(12, 12)
    rows[3, 3] = float("nan")
    with pytest.raises(CheckFailedError, match="logits of window 1 are not finite"):
        perplexity(Table(rows), torch.tensor([[1, 2], [3, 1]]))


def test_windows_beyond_the_context_are_refused() -> None:
    with pytest.raises(PocketError, match="65 tokens do not fit the context of 64"):
        perplexity(TorchSession(MODEL), torch.zeros(1, 65, dtype=torch.int64))


# ---- agreement ---------------------------------------------------------------------------------------------------


def test_a_model_agrees_with_itself_and_less_with_its_roundings() -> None:
    windows = torch.randint(0, 96, (3, 20))
    same, eight, three = (agreement(TorchSession(MODEL), TorchSession(m), windows)
                          for m in (MODEL, rounded(8), rounded(3)))  # fmt: skip
    assert (same.kl, same.top1, same.tokens) == (0.0, 1.0, 60)
    assert 0 < eight.kl < three.kl
    assert three.top1 < eight.top1 <= 1


def test_agreement_is_the_divergence_of_the_two_distributions() -> None:
    right, other = torch.randn(12, 12), torch.randn(12, 12)
    windows = torch.tensor([[0, 1, 2], [5, 6, 7]])
    found = agreement(Table(right), Table(other), windows)
    rows = windows.flatten()
    expected = F.kl_div(other[rows].log_softmax(-1), right[rows].log_softmax(-1), log_target=True, reduction="none")
    assert found.kl == pytest.approx(float(expected.sum(-1).mean()), rel=1e-5)


# ---- compare -----------------------------------------------------------------------------------------------------


def test_a_model_is_itself() -> None:
    found = compare(TorchSession(MODEL), TorchSession(MODEL), [1, 5, 7], 12, TIGHT)
    assert found.ok
    assert found.reasons == []
    assert (found.positions, found.greedy_agreement, found.new_tokens) == (14, 12, 12)
    assert found.divergence is None
    assert found.top1 == 1
    assert found.prefill_decode_l2 < 1e-5
    assert found.relative_l2 <= found.budget_l2 == 1e-5


def test_distances_are_those_of_the_worst_position() -> None:
    right = chain(3.0, 3.0, 3.0)
    other = right.clone()
    other[1, 4] += 0.25
    found = compare(Table(right), Table(other), [0], 3, LOOSE)
    assert found.max_abs == pytest.approx(0.25)
    assert found.relative_l2 == pytest.approx(0.25 / float(right[1].norm()), rel=1e-6)
    assert found.kl > 0


def test_another_model_is_told_with_error_position_and_budget() -> None:
    found = compare(TorchSession(MODEL), TorchSession(rounded(3)), [1, 5], 10, LOOSE)
    assert not found.ok
    assert found.relative_l2 > 0.01
    assert any(reason.startswith("prefill: relative L2 error") and "budget 1.00e-02" in reason
               for reason in found.reasons)  # fmt: skip
    assert any(reason.startswith("decode: relative L2 error") for reason in found.reasons)


def test_a_decode_that_differs_from_the_prefill_is_told() -> None:
    found = compare(TorchSession(MODEL), BrokenDecode(MODEL), [1, 5, 7], 8, LOOSE)
    assert found.greedy_agreement == 8  # ten percent larger logits choose the same tokens
    assert found.relative_l2 == pytest.approx(0.1, rel=1e-3)
    assert [reason.split(":")[0] for reason in found.reasons] == ["decode", "prefill against decode"]
    assert re.search(r"at position ([3-9]),", found.reasons[0])  # all steps after the prompt are equally far


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_fail_and_still_print(value: float) -> None:
    right = chain(3.0, 3.0, 3.0)
    other = right.clone()
    other[2, 5] = value
    found = compare(Table(right), Table(other), [0], 4, LOOSE)
    assert not found.ok
    assert found.relative_l2 == math.inf
    assert "prefill: logits at position 2 are not finite" in found.reasons
    assert "Infinity" not in to_json(found)  # which is no JSON
    assert Comparison.model_validate(json.loads(to_json(found))) == found


def test_an_infinite_reference_is_nobody_s_reference() -> None:
    rows = chain(3.0, 3.0)
    rows[1, 0] = -math.inf
    with pytest.raises(CheckFailedError, match="logits of the model are not finite"):
        compare(Table(rows), Table(rows), [0], 3, LOOSE)


def test_another_vocabulary_is_told() -> None:
    with pytest.raises(CheckFailedError, match=r"logits are \[3, 13\]; the model's are \[3, 12\]"):
        compare(Table(chain(3.0, 3.0)), Table(torch.zeros(12, 13)), [0], 3, LOOSE)


@pytest.mark.parametrize(("gap", "is_tie"), [(0.02, True), (1.0, False)])
def test_leaving_the_text_is_right_only_where_the_model_hesitates(gap: float, is_tie: bool) -> None:
    right = chain(3.0, gap, 3.0, 3.0)
    other = right.clone()
    other[1, 9] += gap * 1.5  # token 9 now leads token 2

    found = compare(Table(right), Table(other), [0], 4, LOOSE)

    assert found.greedy_agreement == 1
    assert found.divergence is not None
    assert (found.divergence.position, found.divergence.reference_token, found.divergence.candidate_token) == (1, 2, 9)
    assert found.divergence.reference_gap == pytest.approx(gap, rel=1e-3)
    assert found.divergence.is_tie is is_tie
    assert any(reason.startswith("greedy text: token 9 instead of 2 at 1") for reason in found.reasons) is not is_tie


def test_a_divergence_within_the_l2_budget_is_no_tie_unless_its_gap_is_that_of_one_logit() -> None:
    """A budget's whole error in two logits of a large vocabulary is within the budget, and still no rounding."""
    right = torch.linspace(-3, 3, 4096).repeat(4096, 1)
    right[0, [1, 2]] = torch.tensor([9.0, 8.4])
    other = right.clone()
    other[0, 2] += 0.7

    found = compare(Table(right), Table(other), [0], 1, LOOSE)

    assert found.relative_l2 < LOOSE.relative_l2
    assert found.divergence is not None
    assert not found.divergence.is_tie
    assert not found.ok


def test_more_tokens_than_the_context_are_refused() -> None:
    with pytest.raises(PocketError, match="do not fit the context of 64"):
        compare(TorchSession(MODEL), TorchSession(MODEL), [1], 64, TIGHT)


# ---- golden answers ----------------------------------------------------------------------------------------------


def test_golden_answers_are_the_greedy_text_and_its_largest_logits() -> None:
    session = TorchSession(MODEL)
    answers = golden(session, [1, 5], 6, TIGHT, top=4)

    assert answers.tokens == list(greedy(session, [1, 5], 6))
    assert [row[0] for row in answers.top] == answers.tokens
    session.reset()
    rows = session.step([1, 5, *answers.tokens[:-1]])[1:]
    for ids, logits, row in zip(answers.top, answers.logits, rows, strict=True):
        assert logits == pytest.approx(row.topk(4).values.tolist(), rel=1e-4, abs=1e-5)
        assert set(ids) == set(row.topk(4).indices.tolist())


def test_the_tolerance_follows_the_budget() -> None:
    tight, loose = (golden(TorchSession(MODEL), [1], 4, budget).tolerance for budget in (TIGHT, LOOSE))
    assert loose == pytest.approx(tight * 1000)
    rows = TorchSession(MODEL).step([1])
    assert loose == pytest.approx(6 * 0.01 * float(rows.square().mean().sqrt()), rel=0.5)


def test_a_model_that_overflows_gives_no_golden_answers() -> None:
    rows = chain(3.0, 3.0)
    rows[1, 0] = -math.inf
    with pytest.raises(CheckFailedError, match="logits of the model are not finite"):
        golden(Table(rows), [0], 2, LOOSE)
