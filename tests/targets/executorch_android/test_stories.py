"""The published model, in ExecuTorch's runtime and in ExecuTorch's own LLM runner."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from exporter import checkpoint
from exporter.session import TorchSession, greedy
from exporter.tokenizer import Tokenizer
from exporter.weights import LowBit, Weight
from targets.executorch_android import TARGET
from tests.conftest import SHARED
from tests.targets.executorch_android.conftest import Export, export

BOS = 1
RUNNER = """
import sys, warnings
warnings.simplefilter("ignore")
import executorch.kernels.quantized
from executorch.extension.llm.custom_ops import custom_ops
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
folder, tokenizer, prompt, new = sys.argv[1:]
pieces = []
config = GenerationConfig(max_new_tokens=int(new), temperature=0.0, num_bos=0, echo=False)
TextLLMRunner(f"{folder}/model.pte", f"{folder}/{tokenizer}").generate(prompt, config, token_callback=pieces.append)
sys.stderr.write("TEXT:" + repr("".join(pieces)) + "\\n")
"""


def published() -> str:
    """The golden text that travels with the model."""
    quoted = (SHARED / "NOTICE.md").read_text().split("begins\n`")[1].split("`")[0]
    return quoted.replace("\n", " ")


def said_by_runner(folder: Path, tokenizer: str, new_tokens: int) -> str:
    """What ExecuTorch's TextLLMRunner says after the BOS token, in a process of its own."""
    command = [sys.executable, "-c", RUNNER, str(folder), tokenizer, "<s>", str(new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    line = next(line for line in done.stderr.splitlines() if line.startswith("TEXT:"))
    return str(ast.literal_eval(line.removeprefix("TEXT:")))


def test_the_published_text_comes_token_for_token(tales: Export) -> None:
    expected = list(greedy(TorchSession(tales.model), [BOS], 64))

    found = list(greedy(TARGET.session(tales.folder), [BOS], 64))

    assert found == expected
    assert Tokenizer(tales.model.files, BOS).decode(found).startswith(published())


def test_every_step_is_torchs_whether_tokens_come_at_once_or_one_by_one(tales: Export) -> None:
    tokens = [BOS, *greedy(TorchSession(tales.model), [BOS], 200)]  # more than one call takes
    expected = TorchSession(tales.model).step(tokens)
    session = TARGET.session(tales.folder)

    at_once = session.step(tokens)
    session.reset()
    one_by_one = torch.cat([session.step([token]) for token in tokens])

    for found in (at_once, one_by_one):
        assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 1e-5


def test_executorchs_own_runner_prints_the_published_text(tales: Export) -> None:
    said = said_by_runner(tales.folder, "tokenizer-runner.json", 64)

    assert said.removeprefix(" ").startswith(published())


def test_with_the_models_own_tokenizer_the_runner_would_drop_spaces(tales: Export) -> None:
    assert said_by_runner(tales.folder, "tokenizer.json", 12).startswith("Onceuponatime")
    assert any("tokenizer-runner.json" in note for note in tales.plan.notes)


def test_a_tied_dense_matrix_lies_in_the_file_once(tales: Export) -> None:
    table = tales.model.weights["model.embed_tokens"].dense().numpy().tobytes()

    assert (tales.folder / "model.pte").read_bytes().count(table) == 1


def test_the_plan_counts_the_files_bytes(tales: Export) -> None:
    written = (tales.folder / "model.pte").stat().st_size

    assert abs(tales.plan.bytes - written) / written < 0.05


@pytest.mark.slow
def test_four_bits_stay_within_the_budget_at_every_step(stories: Path, tmp_path: Path) -> None:
    model = checkpoint.load(stories)
    rounded = {site: in_four_bits(weight) for site, weight in model.weights.items()}
    made = export(model.with_weights(rounded), tmp_path / "out", 512)
    tokens = [BOS, *greedy(TorchSession(made.model), [BOS], 64)]
    expected = TorchSession(made.model).step(tokens)
    session, budget = TARGET.session(made.folder), TARGET.budget(made.model, made.plan).relative_l2

    at_once = session.step(tokens)
    session.reset()
    one_by_one = torch.cat([session.step([token]) for token in tokens])

    for found, reference in ((at_once, expected), (one_by_one, expected), (one_by_one, at_once)):
        assert float(((found - reference).norm(dim=-1) / reference.norm(dim=-1)).max()) <= budget


def in_four_bits(weight: Weight) -> LowBit:
    """Round to nearest, groups of 32, the last of a row shorter."""
    values = weight.dense()
    groups = F.pad(values, (0, -values.shape[1] % 32)).view(values.shape[0], -1, 32)
    scales = groups.abs().amax(-1).clamp(min=1e-8) / 7
    codes = ((groups / scales[..., None]).round().clamp(-8, 7) + 8).flatten(1)[:, : values.shape[1]]
    return LowBit(codes.to(torch.uint8), scales, torch.full((1, 1), 8.0), 4, 32)
