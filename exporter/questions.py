"""Question accuracy: how many questions about pictures a multimodal model answers right, word for word.

Questions are JSON lines beside their pictures, {"image": "0001.png", "question": "<image> how many?", "answer": "two"},
maybe with a "kind", by which right answers are counted too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from exporter.artifact import Record
from exporter.model import Model
from exporter.pictures import lines_of, prompt
from exporter.pixels import pixels_of, scaling_of, vision_of
from exporter.session import TorchSession, greedy
from exporter.tokenizer import Tokenizer

LONGEST_ANSWER = 16  # tokens; an answer ends before a line break or an ending token


@dataclass(frozen=True)
class Question:
    """A question about a picture: the tokens that ask it, and the one answer that is right."""

    picture: Path
    prompt: tuple[int, ...]
    answer: str
    kind: str | None = None


class Share(Record):
    """How many questions there were, and how many answers were right."""

    questions: int
    right: int


class Accuracy(Record):
    """The share of right answers, 0 to 1, and the counts behind it; `kinds` where questions say theirs."""

    accuracy: float
    questions: int
    right: int
    kinds: dict[str, Share]


def read(path: Path, model: Model) -> list[Question]:
    """Questions from a file of JSON lines.

    Raises:
        CheckpointError: a line that cannot be read; see `pictures.lines_of`.
        RecipeError: the model sees no pictures, or a question holds no image token.
    """
    vision, tokenizer = vision_of(model), Tokenizer.of(model)
    return [
        Question(
            line.picture,
            tuple(prompt(tokenizer, line.fields["question"], vision, f"{path}, line {line.number}")),
            line.fields["answer"].strip(),
            line.fields.get("kind"),
        )
        for line in lines_of(path, ("question", "answer"))
    ]


def accuracy(
    model: Model, questions: Sequence[Question], report: Callable[[float], None] = lambda fraction: None
) -> Accuracy:
    """Ask a model, in torch, and count the greedy answers that are right to the letter.

    Args:
        model: A multimodal one.
        questions: At least one; those of one picture are best together, as it is looked at once.
        report: Told the fraction done.

    Raises:
        PocketError: a picture that cannot be read, or a question that does not fit the context.
    """
    session, tokenizer = TorchSession(model), Tokenizer.of(model)
    vision, scaling = vision_of(model), scaling_of(model)
    asked, right, shown = Counter[str | None](), Counter[str | None](), None
    for index, question in enumerate(questions):
        if question.picture != shown:
            session.show(pixels_of(question.picture, vision, scaling))
            shown = question.picture
        asked[question.kind] += 1
        right[question.kind] += answer(session, tokenizer, question.prompt, model.architecture.eos) == question.answer
        report((index + 1) / len(questions))
    kinds = {kind: Share(questions=count, right=right[kind]) for kind, count in sorted(asked.items()) if kind}
    total, good = asked.total(), right.total()
    return Accuracy(accuracy=good / total, questions=total, right=good, kinds=kinds)


def answer(session: TorchSession, tokenizer: Tokenizer, asked: Sequence[int], eos: Sequence[int]) -> str:
    """The first line of the greedy text, without spaces around it."""
    tokens: list[int] = []
    for token in takewhile(lambda token: token not in eos, greedy(session, asked, LONGEST_ANSWER, eos)):
        tokens.append(token)
        if "\n" in tokenizer.decode(tokens):
            break
    return tokenizer.decode(tokens).partition("\n")[0].strip()
