"""Adapters equal transformers' own models, on configs drawn at random."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter import adapters, checkpoint
from exporter.errors import ArchitectureError, CheckpointError
from exporter.session import TorchSession
from exporter.tokenizer import Tokenizer

FEW = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))

ROPES = st.sampled_from([
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
])  # fmt: skip


def relative_error(model: Any) -> float:
    """Our logits against transformers', in chunks against at once, over one random text."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = model.float().eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        session = TorchSession(checkpoint.load(Path(folder)))
        tokens = torch.randint(0, model.config.vocab_size, (24,)).tolist()
        ours = torch.cat([session.step(tokens[:7]), session.step(tokens[7:8]), session.step(tokens[8:])])
        with torch.no_grad():
            theirs = model(torch.tensor([tokens])).logits[0]
    return float((ours - theirs).norm() / theirs.norm())


@FEW
@given(
    st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3"]),
    st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (4, 4)]),
    st.sampled_from([8, 16, 12]), st.integers(1, 3), st.booleans(), st.booleans(), ROPES, st.integers(0, 1000),
)  # fmt: skip
def test_llama_and_its_kin_equal_transformers(
    kind: str, heads: tuple[int, int], head_dim: int, layers: int, tied: bool, bias: bool, rope: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    more = {"attention_bias": bias, "mlp_bias": bias} if kind == "Llama" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=80, hidden_size=heads[0] * 12, intermediate_size=52, num_hidden_layers=layers,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim, max_position_embeddings=64,
        tie_word_embeddings=tied, rope_parameters=rope, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip

    assert relative_error(getattr(transformers, f"{kind}ForCausalLM")(config)) < 1e-5


@FEW
@given(st.sampled_from([(1, 16), (4, 8), (3, 12)]), st.integers(1, 3), st.sampled_from(["relu", "gelu"]),
       st.booleans(), st.integers(0, 1000))  # fmt: skip
def test_opt_equals_transformers(heads: tuple[int, int], layers: int, act: str, tied: bool, seed: int) -> None:
    torch.manual_seed(seed)
    hidden = heads[0] * heads[1]
    config = transformers.OPTConfig(
        vocab_size=80, hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=52, num_hidden_layers=layers,
        num_attention_heads=heads[0], max_position_embeddings=64, activation_function=act, tie_word_embeddings=tied,
    )  # fmt: skip

    assert relative_error(transformers.OPTForCausalLM(config)) < 1e-5


def test_stories_greedy_text_is_the_published_one(stories: Path) -> None:
    from exporter.session import greedy

    model = checkpoint.load(stories)
    tokens = list(greedy(TorchSession(model), [1], 64))

    assert (
        Tokenizer(model.files, 1)
        .decode(tokens)
        .startswith(
            "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she "
            "saw a big, red ball. She wanted to play with it, but it was too high."
        )
    )


def llama3(**changes: Any) -> dict[str, Any]:
    return {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, **changes}  # fmt: skip


def llama_config(**changes: Any) -> dict[str, Any]:
    config = transformers.LlamaConfig(hidden_size=16, num_attention_heads=4, intermediate_size=8, vocab_size=9)
    return {**json.loads(config.to_json_string(use_diff=False)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"secret_sauce": 3}, "cannot honour secret_sauce"),
        ({"quantization_config": {"bits": 4}}, "cannot honour quantization_config"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; known: gelu, gelu_new"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type is 'yarn'; known: default, linear"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "odd": 1}}, "cannot honour odd"),
        ({"num_key_value_heads": 3}, "4 attention heads are no multiple of 3 key-value heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be a whole number from 1 to 4096"),
        ({"hidden_size": "big"}, "hidden_size is 'big'; it must be a whole number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a positive number"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'; it must be a token id"),
        ({"layer_types": ["linear_attention"]}, "layer_types are linear_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0"),
        ({"rope_parameters": True}, "rope_parameters is True; it must be an object"),
        ({"rope_parameters": None, "rope_scaling": [1]}, r"rope_scaling is \[1\]; it must be an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters and rope_scaling say different"),
        ({"rope_parameters": llama3(low_freq_factor=4.0)}, "low 4 is not under high 4"),
        ({"rope_parameters": llama3(factor=0.5)}, "rotary factor 0.5 is under 1"),
        ({"layer_types": 3}, "layer_types is 3; it must be a list of names"),
        ({"layer_types": [["x"]]}, "it must be a list of names"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"sliding_window": 8, "use_sliding_window": "no"}, "use_sliding_window is 'no'; it must be true or false"),
        ({"bos_token_id": True}, "bos_token_id is True; it must be a token id"),
        ({"bos_token_id": 9}, r"token \[9\] is none of a vocabulary of 9"),
        ({"eos_token_id": [2, 1.0]}, "it must be a token id or a list"),
        ({"head_dim": 5}, "heads of 5 channels cannot be rotated"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; it must be a positive number"),
    ],
)
def test_a_config_field_that_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        adapters.find("llama").read(llama_config(**changes))


def test_an_unknown_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        ArchitectureError, match="no adapter for model type 'mamba'; known: bert, llama, llava, mistral, opt, qwen2"
    ):
        adapters.find("mamba")


@pytest.mark.parametrize(("changes", "message"), [
    ({"do_layer_norm_before": False}, "do_layer_norm_before is False; only True"),
    ({"word_embed_proj_dim": 4}, "word_embed_proj_dim is 4; only 16"),
    ({"hidden_size": 18}, "hidden size 18 is no multiple of 4 attention heads"),
])  # fmt: skip
def test_opt_without_its_usual_shape_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = transformers.OPTConfig(hidden_size=16, word_embed_proj_dim=16, num_attention_heads=4)
    with pytest.raises(ArchitectureError, match=message):
        adapters.find("opt").read({**json.loads(config.to_json_string(use_diff=False)), **changes})


def test_a_sliding_window_bounds_the_context() -> None:
    config = {**llama_config(), "sliding_window": 128, "max_position_embeddings": 4096}

    assert adapters.find("llama").read(config).positions == 128


def test_a_tokenizer_that_is_another_models_is_refused(stories: Path) -> None:
    model = checkpoint.load(stories)

    assert Tokenizer(model.files, 1, model.architecture.vocab).encode("Once upon a time")
    with pytest.raises(CheckpointError, match=r"gives token \d+; the model has 20: one is another's"):
        Tokenizer(model.files, 1, 20).encode("Once upon a time")


def test_a_prompt_that_is_no_unicode_is_refused(stories: Path) -> None:
    with pytest.raises(CheckpointError, match="is not Unicode"):
        Tokenizer(checkpoint.load(stories).files, 1).encode("\udcff")
