"""Checkpoint folders of small models, as transformers and tokenizers write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors

from exporter import checkpoint
from exporter.model import Model

SPOKEN = "a cat dog sat on the mat and ran home to see sun rain wind"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *SPOKEN.split()]
VOCAB, CLS, SEP = 80, 2, 3


def bert(folder: Path, tokenizer: bool = True, kind: str = "BertModel", seed: int = 0, **changes: Any) -> Any:
    """Write a random BERT; returns transformers' own model of it."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(**{
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 32, **changes,
    })  # fmt: skip
    model = getattr(transformers, kind)(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = model.float().eval()
    model.save_pretrained(folder)
    if tokenizer:
        _tokenizer().save(str(folder / "tokenizer.json"))
    return model


def only_transformers_knows(folder: Path) -> Model:
    """A random GPT-NeoX: no adapter of ours takes it apart, and its queries, keys and values are one matrix."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    return checkpoint.load(folder)


def hidden_states(model: Any, tokens: list[int]) -> torch.Tensor:
    """What transformers says of a text, [tokens, hidden]."""
    with torch.no_grad():
        states: torch.Tensor = model(torch.tensor([tokens])).last_hidden_state[0]
    return states


def _tokenizer() -> tokenizers.Tokenizer:
    """Words, in the frame of [CLS] and [SEP], cut and filled to four tokens as sentence encoders' are to their own."""
    vocab = {word: index for index, word in enumerate(WORDS)}
    found = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    found.add_special_tokens(WORDS[:4])
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    found.enable_truncation(4)
    found.enable_padding(length=4)
    return found
