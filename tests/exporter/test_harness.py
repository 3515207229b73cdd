"""lm-evaluation-harness over sessions: its own evaluator runs, on tasks that lie in a local file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter import pipeline
from exporter.compress import run
from exporter.compress.quantize import QuantizeConfig
from exporter.compress.step import UNKEPT
from exporter.errors import PocketError
from exporter.session import TorchSession, greedy
from exporter.tokenizer import Tokenizer
from tests.models import BERT, random_model

pytest.importorskip("lm_eval", reason="install the extra lm-eval")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the harness's own imports
    from exporter import harness

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and what it brings warn of themselves
MODEL = pipeline.load("builtin")
ROWS = [
    {"begin": "for index in range(", "right": "len(values)):", "wrong": "zebra zebra zebra"},
    {"begin": "import ", "right": "os", "wrong": "qqq;;"},
    {"begin": "def __init__(self", "right": "):", "wrong": "%%%"},
]


def tokenizer() -> Tokenizer:
    return pipeline.tokenizer_of(MODEL)


def evaluated(folder: Path, task: dict[str, Any], model: Any = MODEL) -> dict[str, Any]:
    """What lm_eval.simple_evaluate says of one task over the rows."""
    (folder / "rows.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    config = {
        "task": "local", "dataset_path": "json", "test_split": "train",
        "dataset_kwargs": {"data_files": str(folder / "rows.json"), "cache_dir": str(folder / "cache")}, **task,
    }  # fmt: skip
    found = harness.evaluate(
        TorchSession(model), tokenizer(), [config], model.architecture.eos, bootstrap_iters=0, log_samples=True
    )
    return dict(found)


CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{begin}}", "doc_to_choice": "{{[wrong, right]}}",
    "doc_to_target": 1, "target_delimiter": "", "metric_list": [{"metric": "acc"}],
}  # fmt: skip


def test_the_harness_scores_choices_as_the_session_does(tmp_path: Path) -> None:
    found = evaluated(tmp_path, CHOICE)

    assert found["results"]["local"]["acc,none"] == 1.0
    sample = next(s for s in found["samples"]["local"] if s["doc"]["begin"] == "import ")
    score = float(sample["filtered_resps"][1][0])
    start, whole = tokenizer().encode("import"), tokenizer().encode("import os")
    rows = TorchSession(MODEL, torch.float64).step(whole).log_softmax(-1)
    right = sum(float(rows[place - 1, whole[place]]) for place in range(len(start), len(whole)))
    assert score == pytest.approx(right, rel=1e-4)


def request(*args: Any) -> Any:
    return type("Request", (), {"args": args})()


def test_the_likelihood_of_a_text_is_that_of_its_windows_beyond_the_context_too() -> None:
    text = "x = [value for value in values]\n" * 40
    session = TorchSession(MODEL)
    session.context = 64

    total = harness.SessionLM(session, tokenizer()).loglikelihood_rolling([request(text)])[0]

    tokens = tokenizer().encode_plain(text)
    assert len(tokens) > 128
    expected, done, previous = 0.0, 0, [tokenizer().bos]
    while done < len(tokens):
        piece = tokens[done : done + 64]
        looks_back = done and len(piece) < 64  # the last window, as far as the context goes
        inputs = tokens[len(tokens) - 65 : -1] if looks_back else [*previous, *piece[:-1]]
        session.reset()
        rows = session.step(inputs).log_softmax(-1)[-len(piece) :]
        expected += float(rows.gather(1, torch.tensor(piece)[:, None]).sum())
        done, previous = done + len(piece), [piece[-1]]
    assert total == pytest.approx(expected, rel=1e-4)


def test_text_is_greedy_and_ends_before_what_ends_it(tmp_path: Path) -> None:
    task = {
        "output_type": "generate_until", "doc_to_text": "{{begin}}", "doc_to_target": "{{right}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    found = evaluated(tmp_path, task)

    for sample in found["samples"]["local"]:
        prompt = tokenizer().encode(sample["doc"]["begin"])
        said = sample["resps"][0][0]
        tokens = list(greedy(TorchSession(MODEL), prompt, 12, MODEL.architecture.eos))
        whole = tokenizer().decode([*prompt, *tokens])
        assert whole.startswith(tokenizer().decode(prompt) + said)
        assert "\n" not in said


def test_a_compressed_model_is_measured_by_the_same_code(tmp_path: Path) -> None:
    small = run(MODEL, QuantizeConfig(algorithm="rtn", bits=2, scale_search="max"), None, UNKEPT)

    scores = []
    for index, model in enumerate((MODEL, small)):
        (tmp_path / str(index)).mkdir()
        samples = evaluated(tmp_path / str(index), CHOICE, model)["samples"]["local"]
        scores.append(sum(float(sample["filtered_resps"][1][0]) for sample in samples))
    assert scores[1] < scores[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"do_sample": True}, "text is greedy here"), ({"max_gen_toks": 10**6}, "1000000 new tokens leave no room")],
)
def test_what_a_session_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    lm = harness.SessionLM(TorchSession(MODEL), tokenizer())
    with pytest.raises(PocketError, match=message):
        lm.generate_until([request("import ", settings)])


def test_a_continuation_longer_than_the_context_is_refused() -> None:
    session = TorchSession(MODEL)
    session.context = 4
    with pytest.raises(PocketError, match="tokens to predict do not fit the context of 4"):
        harness.SessionLM(session, tokenizer()).loglikelihood([request("a", " = b + c + d + e + f + g")])


def test_an_encoder_is_refused() -> None:
    with pytest.raises(PocketError, match="an encoder predicts no tokens"):
        harness.SessionLM(TorchSession(random_model(BERT)), tokenizer())
