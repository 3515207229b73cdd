"""An OPT with random weights, against transformers' own model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from exporter import checkpoint, pipeline
from exporter.tokenizer import Tokenizer
from targets.executorch_android import TARGET
from tests.targets.executorch_android.conftest import export
from tests.targets.executorch_android.test_stories import said_by_runner


def test_a_random_opt_says_what_transformers_says(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=120, hidden_size=48, word_embed_proj_dim=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, init_std=0.2,
    )  # fmt: skip
    theirs = OPTForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "checkpoint")
    made = export(checkpoint.load(tmp_path / "checkpoint"), tmp_path / "out", 40)
    session = TARGET.session(made.folder)
    tokens = torch.randint(3, 120, (40,)).tolist()

    found = torch.cat([session.step(tokens[:30]), *(session.step([token]) for token in tokens[30:])])

    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 1e-5
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_executorchs_own_runner_prints_what_transformers_generates(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=2048, hidden_size=48, word_embed_proj_dim=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, init_std=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    theirs = OPTForCausalLM(config).eval()
    tokenizer = Tokenizer({"tokenizer.json": (pipeline.BUILTIN_FOLDER / "tokenizer.json").read_bytes()}, 0, 2048)
    whole = [token for token in range(3, 2048) if tokenizer.decode([token]).isascii()]
    parts = sorted(set(range(2048)) - set(whole))  # pieces of characters, which the runner cannot print alone
    theirs.model.decoder.embed_tokens.weight.data[parts] = 0  # the head too: such a token is never the likeliest
    theirs.save_pretrained(tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "checkpoint" / name).write_bytes((pipeline.BUILTIN_FOLDER / name).read_bytes())
    made = export(checkpoint.load(tmp_path / "checkpoint"), tmp_path / "out", 40)

    prompt = torch.tensor([[0]])
    with torch.no_grad():
        tokens = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)

    text = tokenizer.decode(tokens[0, 1:].tolist())
    assert len(text) > 24
    assert said_by_runner(made.folder, "tokenizer.json", 24) == text
