"""Train the reference models of docs/results.md: a Llama of 3.5 M parameters and an OPT of 3.8 M.

Text, split and tokenizer are the built-in model's (see ``train_builtin.py``): the interpreter's own standard library,
one file in twenty held out. Weights stay out of the repository; this builds them again, in under an hour a model on
one core.

    OMP_NUM_THREADS=1 python scripts/train_reference.py llama --out reference/llama
    OMP_NUM_THREADS=1 python scripts/train_reference.py opt --out reference/opt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import train_builtin as training
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel


def build_llama(tokenizer: Tokenizer) -> PreTrainedModel:
    """A Llama whose 8 query heads share 4 key-value heads."""
    config = LlamaConfig(
        vocab_size=training.VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(training.BOS),
        eos_token_id=tokenizer.token_to_id(training.EOS),
    )
    return LlamaForCausalLM(config)


def build_opt(tokenizer: Tokenizer) -> PreTrainedModel:
    """An OPT: learned positions, biases, ReLU, LayerNorm before each part."""
    config = OPTConfig(
        vocab_size=training.VOCAB,
        hidden_size=256,
        word_embed_proj_dim=256,
        ffn_dim=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=512,
        dropout=0.0,
        bos_token_id=tokenizer.token_to_id(training.BOS),
        eos_token_id=tokenizer.token_to_id(training.EOS),
        pad_token_id=tokenizer.token_to_id(training.EOS),
    )
    return OPTForCausalLM(config)


BUILDERS = {"llama": (build_llama, 3e-3), "opt": (build_opt, 2e-3)}


def main() -> None:
    """Train, save, reload and measure."""
    parser = argparse.ArgumentParser(description="Train a reference model on the standard library.")
    parser.add_argument("model", choices=sorted(BUILDERS))
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--steps", type=int, default=2200, help="number of updates")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    split, tokenizer = training.prepare(options.out)
    stream = training.to_stream(tokenizer, split.train)
    training.print_data(split, stream)
    build, rate = BUILDERS[options.model]
    torch.manual_seed(options.seed)
    plan = training.Plan(options.out, options.steps, 16, rate, 150, options.seed, 8.0)
    training.train(build(tokenizer), tokenizer, stream, plan)
    (options.out.parent / f"{options.model}-held-out.txt").write_text("\n".join(split.held_out.values()), "utf-8")
    print(f"held-out perplexity {training.measure(options.out, split.held_out):.3f}")


if __name__ == "__main__":
    main()
