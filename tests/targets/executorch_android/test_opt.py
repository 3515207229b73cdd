"""An OPT with random weights, against transformers' own model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from exporter import checkpoint
from targets.executorch_android import TARGET
from tests.targets.executorch_android.conftest import export


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
