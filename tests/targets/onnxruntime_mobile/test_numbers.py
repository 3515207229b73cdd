"""What the graphs compute, in onnxruntime and onnxruntime-genai, against torch."""

from pathlib import Path

import onnxruntime_genai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter import checkpoint
from exporter.model import Layer, Rope
from exporter.session import TorchSession, greedy
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum
from targets.onnxruntime_mobile import TARGET, runner

STORIES = Path(__file__).resolve().parents[4] / "shared" / "models" / "stories260K"
PUBLISHED = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big,\nred ball. She wanted to play with it, but it was too high."
)
TOKENS = [int(token) for token in torch.randint(0, 80, (40,), generator=torch.Generator().manual_seed(1))]
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260K is not on this machine")


def stepwise(session, tokens=TOKENS, prompt=16):
    """Logits of a prompt at once and the rest token by token."""
    session.reset()
    return torch.cat([session.step(tokens[:prompt]), *(session.step([token]) for token in tokens[prompt:])])


def at_once(session, tokens=TOKENS):
    session.reset()
    return session.step(tokens)


def genai_text(folder, new_tokens):
    """Greedy tokens after BOS from onnxruntime-genai on an untouched folder, and the text that its tokenizer says."""
    model = onnxruntime_genai.Model(str(folder))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=1 + new_tokens)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens([1])
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)]
    return tokens[1:], model


@needs_stories
def test_a_published_llama_says_its_published_text_here_and_in_genai(exported):
    model = checkpoint.load(STORIES)
    folder, _ = exported(model, 512)
    wanted = list(greedy(TorchSession(model), [1], 64))
    assert list(greedy(TARGET.session(folder), [1], 64)) == wanted
    tokens, genai = genai_text(folder, 64)
    assert tokens == wanted
    said = onnxruntime_genai.Tokenizer(genai).decode(tokens)
    assert " ".join(said.split()).startswith(" ".join(PUBLISHED.split())[:100])


@needs_stories
def test_a_published_llama_in_four_bits_stays_in_budget_and_runs_in_genai(exported, all_rounded, distance):
    model = all_rounded(checkpoint.load(STORIES))
    folder, plan = exported(model, 512)
    session, reference = TARGET.session(folder), TorchSession(model)
    text = list(greedy(reference, [1], 64))
    wanted, budget = at_once(reference, [1, *text]), TARGET.budget(model, plan).relative_l2
    assert distance(at_once(session, [1, *text]), wanted) < budget
    assert distance(stepwise(session, [1, *text]), wanted) < budget
    assert distance(at_once(runner.exact_session(folder), [1, *text]), wanted) < 1e-5
    assert genai_text(folder, 64)[0] == list(greedy(session, [1], 64))


def test_a_random_opt_equals_transformers(exported, tmp_path, distance):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(vocab_size=80, hidden_size=64, num_hidden_layers=2, ffn_dim=96, num_attention_heads=4,
                       max_position_embeddings=48, word_embed_proj_dim=64, init_std=0.2)  # fmt: skip
    theirs = OPTForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "opt")
    model = checkpoint.load(tmp_path / "opt")
    folder, _ = exported(model, 48)
    with torch.inference_mode():
        wanted = theirs(torch.tensor([TOKENS])).logits[0]
        ones = torch.ones(1, 1, dtype=torch.long)  # 1 is OPT's padding too: without a mask it would be left out
        text = theirs.generate(ones, attention_mask=ones, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 1:]
    session = TARGET.session(folder)
    assert distance(at_once(session), wanted) < 1e-5
    assert distance(stepwise(session), wanted) < 1e-5
    assert list(greedy(session, [1], 20)) == text.tolist()
    assert genai_text(folder, 20)[0] == text.tolist()[: len(genai_text(folder, 20)[0])]


HEADS = st.sampled_from([(2, 1), (4, 2), (2, 2)])
LAYERS = st.builds(
    lambda heads, dim, value, mlp: Layer(*heads, dim, value, mlp),
    HEADS, st.sampled_from([2, 4, 8, 12, 16, 32]), st.sampled_from([1, 4, 7, 8, 16]), st.sampled_from([8, 20, 33]),
)  # fmt: skip
ROPES = st.sampled_from([Rope(10000.0), Rope(500.0, "linear", 2.0), Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 16)])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.lists(LAYERS, min_size=1, max_size=3), rope=ROPES, tied=st.booleans(),
    family=st.sampled_from(["llama", "opt"]), activation=st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]),
    extras=st.sets(st.sampled_from(["norm.weight", "bias"])), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_widths_rotary_kind_norms_and_biases_equal_torch(
    exported, decoder, distance, layers, rope, tied, family, activation, extras, seed
):
    model = decoder(layers, family, 40, 80, 48, tied, rope, activation, extras, seed=seed)
    folder, _ = exported(model)
    wanted = at_once(TorchSession(model, torch.float64)).float()
    assert distance(at_once(TARGET.session(folder)), wanted) < 1e-5
    assert distance(stepwise(TARGET.session(folder)), wanted) < 1e-5


@pytest.mark.parametrize("kind", ["symmetric", "whole", "single", "half", "fractional"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (2, 64), (2, 128), (4, 16), (4, 32), (4, 256), (8, 16), (8, 64)])
def test_every_width_block_and_zero_point_is_exact_with_exact_activations(
    exported, decoder, all_rounded, distance, bits, group, kind
):
    model = all_rounded(decoder(hidden=64 if group < 128 else 200), bits=bits, group=group, kind=kind)
    folder, plan = exported(model)
    wanted = at_once(TorchSession(model, torch.float64)).float()
    assert distance(at_once(runner.exact_session(folder)), wanted) < 1e-5
    budget = TARGET.budget(model, plan).relative_l2
    session = TARGET.session(folder)
    assert distance(at_once(session), wanted) < budget
    assert distance(stepwise(session), wanted) < budget
    assert all(finding.ok for finding in TARGET.inspect(folder, model, plan))


def trees(dense, round_it):
    """A tree of each kind for a matrix [64, 64]."""
    places = torch.arange(0, 4, 2, dtype=torch.uint8).repeat(64, 16)  # [64, 32]
    kept = round_it(dense[:, :32].contiguous(), group=16)
    left, right = dense[:, :8].contiguous(), dense[:8].contiguous()
    return {
        "3 bits": round_it(dense, bits=3),
        "1 bit": round_it(dense, bits=1, kind="half"),
        "sparse low bit": Sparse(kept, places, 2, 4),
        "sparse floats": Sparse(Dense(dense[:, :32].contiguous()), places, 2, 4),
        "shared rows": Shared(round_it(left.T.contiguous()), torch.arange(64) % 8),
        "low rank": Product(Dense(left), round_it(right)),
        "sum": Sum((round_it(dense), Product(Dense(left), Dense(right)))),
        "odd group": round_it(dense, group=24),
        "long group": round_it(dense, bits=2, group=256),
    }


@pytest.mark.parametrize("kind", ["3 bits", "1 bit", "sparse low bit", "sparse floats", "shared rows", "low rank",
                                  "sum", "odd group", "long group"])  # fmt: skip
@pytest.mark.parametrize("sites", ["all", "linears"])
def test_every_tree_is_exact_with_exact_activations(exported, decoder, to_nearest, distance, kind, sites):
    model = decoder(hidden=64, vocab=64)
    square = [site for site, weight in model.weights.items() if weight.shape == (64, 64)]
    chosen = [site for site in square if sites == "all" or "embed" not in site]
    model = model.with_weights({site: trees(model.weights[site].dense(), to_nearest)[kind] for site in chosen})
    folder, plan = exported(model)
    tokens = [token % 64 for token in TOKENS]
    wanted = at_once(TorchSession(model, torch.float64), tokens).float()
    assert distance(at_once(runner.exact_session(folder), tokens), wanted) < 1e-5
    assert distance(at_once(TARGET.session(folder), tokens), wanted) < TARGET.budget(model, plan).relative_l2
    assert all(finding.ok for finding in TARGET.inspect(folder, model, plan))


def test_unequal_layers_and_narrow_values_stay_quantized_and_run_in_genai(exported, decoder, all_rounded, distance):
    layers = (Layer(4, 2, 16, 8, 96), Layer(4, 2, 16, 12, 96), Layer(2, 1, 24, 24, 50), Layer(8, 4, 8, 4, 50))
    model = all_rounded(decoder(layers, tied=False))
    folder, plan = exported(model)
    assert distance(at_once(runner.exact_session(folder)), at_once(TorchSession(model))) < 1e-5
    assert all(isinstance(weight, LowBit) for weight in plan.weights.values())
    assert "layers 1: heads of 16 (keys) and 12 (values) channels are padded with zeros to 16" in plan.notes[1]
    assert genai_text(folder, 20)[0] == list(greedy(TARGET.session(folder), [1], 20, eos=(2,)))


def test_two_threads_compute_what_one_does(exported, decoder, distance):
    folder, _ = exported(decoder())
    assert distance(at_once(TARGET.session(folder, threads=2)), at_once(TARGET.session(folder))) < 1e-6
