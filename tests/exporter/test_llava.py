"""LLaVA against transformers' own classes: logits, calibration, and a language part that is compressed alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from exporter import adapters, checkpoint, compress, plugins, recipe, store
from exporter.adapters import llava
from exporter.calibrate import Calibration, Samples, block_influence
from exporter.compress.step import UNKEPT, layer_sites
from exporter.errors import ArchitectureError, CheckpointError, PocketError, RecipeError, TargetError
from exporter.model import Model, Vision
from exporter.ops import Ops
from exporter.session import TorchSession
from exporter.torch_ops import TorchOps
from exporter.weights import nodes
from tests.models import LLAMA, random_model
from tests.pictures import IMAGE, LLAVA, VISION, seeing_model

REFERENCE = Path(__file__).resolve().parents[3] / "reference" / "pictures"

TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
         "image_size": 16, "patch_size": 4}  # fmt: skip
TEXT = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def theirs(tower: dict[str, Any], text: dict[str, Any], **more: Any) -> LlavaForConditionalGeneration:
    """A random model of transformers, its weights so large that every part is felt in the logits."""
    config = LlavaConfig(vision_config=CLIPVisionConfig(**{**TOWER, **tower}),
                         text_config=LlamaConfig(**{**TEXT, **text}), image_token_index=5, **more)  # fmt: skip
    model = LlavaForConditionalGeneration(config).float().eval()
    for name, parameter in model.named_parameters():
        parameter.data += (0.3 if parameter.dim() > 1 else 0.5) * torch.randn_like(parameter) * ("norm" not in name)
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def saved(model: LlavaForConditionalGeneration, folder: Path) -> Model:
    model.save_pretrained(folder)
    return checkpoint.load(folder)


def a_text(vision: Vision, vocab: int, before: int = 3, after: int = 7) -> Tensor:
    """Two random texts with a picture in their middle, [2, tokens]."""
    ids = torch.randint(vision.token + 1, vocab, (2, before + vision.tokens + after))
    ids[:, before : before + vision.tokens] = vision.token
    return ids


def our_logits(model: Model, ids: Tensor, pixels: Tensor) -> Tensor:
    adapter, ops = adapters.find(model.architecture.family), TorchOps(model)
    with torch.inference_mode():
        return adapters.logits(adapter, ops, ids, adapters.see(adapter, ops, pixels))


def their_logits(model: LlavaForConditionalGeneration, ids: Tensor, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def vision_of(model: Model) -> Vision:
    assert model.architecture.vision is not None
    return model.architecture.vision


@pytest.mark.parametrize(
    ("tower", "text", "more", "layers"),
    [
        ({}, {}, {}, 2),
        ({}, {}, {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}, 3),
        ({}, {}, {"vision_feature_layer": 1, "multimodal_projector_bias": False}, 1),
        ({}, {}, {"vision_feature_layer": -4, "vision_feature_select_strategy": "full"}, 0),
        ({"hidden_act": "gelu", "layer_norm_eps": 0.1}, {"tie_word_embeddings": True, "rms_norm_eps": 0.1}, {}, 2),
        ({"patch_size": 16, "num_attention_heads": 3}, {"num_key_value_heads": 4, "attention_bias": True}, {}, 2),
        ({"image_size": 24, "patch_size": 8}, {"head_dim": 10}, {"projector_hidden_act": "relu"}, 2),
    ],
)  # fmt: skip
def test_logits_equal_those_of_transformers(
    tower: dict[str, Any], text: dict[str, Any], more: dict[str, Any], layers: int, tmp_path: Path
) -> None:
    reference = theirs(tower, text, **more)
    model = saved(reference, tmp_path)
    vision = vision_of(model)
    assert (vision.layers, vision.unread) == (layers, 3 - layers)
    ids, pixels = a_text(vision, 60), torch.randn(2, *vision.shape)
    expected, found = their_logits(reference, ids, pixels), our_logits(model, ids, pixels)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    other = our_logits(model, ids, torch.randn(2, *vision.shape))
    assert float((other - expected).norm() / expected.norm()) > 1e-2  # pictures are felt, or the check above is empty


@pytest.mark.skipif(
    not (REFERENCE / "model.safetensors").exists(),
    reason="train it: scripts/train_pictures.py --out ../reference/pictures",
)
def test_the_trained_model_equals_transformers() -> None:
    reference = LlavaForConditionalGeneration.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    model = checkpoint.load(REFERENCE)
    ids, pixels = a_text(vision_of(model), 300, before=1), torch.rand(2, *vision_of(model).shape) * 2 - 1
    expected = their_logits(reference, ids, pixels)
    assert float((our_logits(model, ids, pixels) - expected).norm() / expected.norm()) < 1e-5


FIRST_NAMES = {"vision_tower.": "vision_tower.vision_model."}
MIDDLE_NAMES = {"vision_tower.": "model.vision_tower.vision_model.", "language_model.model.": "model.language_model.",
                "language_model.lm_head": "lm_head", "multi_modal_": "model.multi_modal_"}  # fmt: skip


@pytest.mark.parametrize("said", [FIRST_NAMES, MIDDLE_NAMES])
def test_checkpoints_with_other_names_are_the_same_model(said: dict[str, str], tmp_path: Path) -> None:
    model = saved(theirs({}, {}), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for now, before in said.items():
        tensors = {before + name.removeprefix(now) if name.startswith(now) else name: t for name, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    again = checkpoint.load(tmp_path)
    assert again.weights.keys() == model.weights.keys()
    assert all(torch.equal(again.weights[site].dense(), model.weights[site].dense()) for site in model.weights)
    assert all(torch.equal(again.tensors[name], model.tensors[name]) for name in model.tensors)


def test_layers_that_nothing_reads_are_left_out_and_unknown_ones_refused(tmp_path: Path) -> None:
    model = saved(theirs({}, {}), tmp_path)
    assert not [site for site in model.weights if ".encoder.layers.2." in site]
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["vision_tower.encoder.layers.3.mlp.fc1.weight"] = torch.zeros(40, 24)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not have: vision_tower\.encoder\.layers\.3"):
        checkpoint.load(tmp_path)


def test_a_tied_head_that_is_stored_all_the_same_must_be_the_embedding(tmp_path: Path) -> None:
    saved(theirs({}, {"tie_word_embeddings": True}), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["language_model.lm_head.weight"] = torch.zeros(60, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"language_model\.lm_head\.weight is not the embedding"):
        checkpoint.load(tmp_path)


# ---- config.json --------------------------------------------------------------------------------------------------


def published_config(**changes: Any) -> dict[str, Any]:
    """What llava-hf/llava-1.5-7b-hf says of itself."""
    text = {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "torch_dtype": "float16", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
            "vocab_size": 32064}  # fmt: skip
    tower = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
             "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
             "vocab_size": 32000}  # fmt: skip
    return {"architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
            "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu", "text_config": text,
            "tie_word_embeddings": False, "torch_dtype": "float16", "vision_config": tower, "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default", "vocab_size": 32064, **changes}  # fmt: skip


def test_the_published_config_is_read_with_the_defaults_that_it_leaves_out() -> None:
    found = llava.read(published_config())
    assert (found.hidden, len(found.layers), found.vocab, found.bos, found.eos) == (4096, 32, 32064, 1, (2,))
    assert found.vision == Vision(336, 3, 14, 1024, 23, 16, 4096, "quick_gelu", 1e-5, "gelu", False, 32000, unread=1)
    assert found.vision.tokens == 576
    shapes = llava.shapes(found)
    assert shapes.weights["vision_tower.embeddings.patch_embedding"] == (1024, 588)
    assert shapes.weights["multi_modal_projector.linear_1"] == (4096, 1024)
    assert shapes.unread == ("vision_tower.encoder.layers.23.",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]; one of a tower of 24 layers"),
        ({"vision_feature_layer": -26}, "from -25 to 24"),
        ({"vision_feature_layer": True}, "vision_feature_layer is True"),
        ({"vision_feature_select_strategy": "cls"}, "only 'default' or 'full' can be exported"),
        ({"text_config": {"model_type": "qwen2"}}, "text_config is a 'qwen2'; only 'llama'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config is a 'siglip_vision_model'"),
        ({"vision_config": {"image_size": 336, "patch_size": 13}}, "336 pixels are no whole patches of 13"),
        ({"vision_config": {"num_attention_heads": 7}}, "1024 vision channels are no multiple of 7 heads"),
        ({"vision_config": {"hidden_act": "mish"}}, "hidden_act is 'mish'; known: gelu"),
        ({"vision_config": {"image_size": 2**24, "patch_size": 1}}, "has more than"),
        ({"vision_config": {"use_head": True}}, "cannot honour use_head"),
        ({"image_token_index": 32064}, "image token 32064 is none of a vocabulary of 32064"),
        ({"image_token_id": 5}, r"image tokens are \[5, 32000\]"),
        ({"vocab_size": 32000}, "vocab_size is 32000; only 32064"),
        ({"spatial_merge_size": 2}, "the llava adapter cannot honour spatial_merge_size"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        llava.read(published_config(**changes))


def test_a_llava_model_without_a_tower_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="says nothing of any"):
        llava.shapes(replace(LLAVA, vision=None))


# ---- sessions -----------------------------------------------------------------------------------------------------


def test_a_picture_is_seen_once_and_read_token_after_token() -> None:
    model = seeing_model()
    ids, pixels = a_text(VISION, 96), torch.randn(2, *VISION.shape)
    whole, session = our_logits(model, ids, pixels), TorchSession(model)
    prompt = 3 + VISION.tokens
    for text, picture, expected in zip(ids.tolist(), pixels, whole):
        session.show(picture)
        for _ in range(2):  # a reset forgets the tokens, not the picture
            session.reset()
            steps = [session.step(text[:prompt]), *(session.step([token]) for token in text[prompt:])]
            assert torch.allclose(torch.cat(steps), expected, rtol=1e-4, atol=1e-4)


def test_a_text_without_a_picture_is_only_read() -> None:
    model, tokens = seeing_model(), [1, 7, 8, 9]
    session = TorchSession(model)
    before = session.step(tokens)
    session.show(torch.randn(VISION.shape))
    session.reset()
    assert torch.equal(session.step(tokens), before)


def test_what_cannot_be_shown_is_refused() -> None:
    session = TorchSession(seeing_model())
    with pytest.raises(PocketError, match=r"a picture of \[3, 8, 8\] was shown; the model takes pictures of \[3, 16, "):
        session.show(torch.zeros(3, 8, 8))
    with pytest.raises(PocketError, match="the model takes none"):
        TorchSession(random_model(LLAMA)).show(torch.zeros(3, 8, 8))
    pretender = random_model(LLAMA)
    pretender = replace(pretender, architecture=replace(pretender.architecture, vision=VISION))
    with pytest.raises(ArchitectureError, match="a llama model looks at no pictures; llava models do"):
        TorchSession(pretender).show(torch.zeros(VISION.shape))
    session.show(torch.zeros(VISION.shape))
    with pytest.raises(PocketError, match="a text has 2 image tokens; its picture takes 16"):
        session.step([1, IMAGE, IMAGE, 7])


@pytest.mark.parametrize("target", plugins.target_names())
def test_a_target_refuses_pictures_before_the_work(target: str) -> None:
    with pytest.raises(TargetError, match=f"{target} cannot take a llava model: it shows no pictures"):
        plugins.target(target).plan(seeing_model(), 64)


def test_an_implementation_that_shows_no_pictures_says_so() -> None:
    ops, x = TorchOps(seeing_model()), torch.zeros(1)
    for verb in (lambda: Ops.patches(ops, x, 1), lambda: Ops.prepend(ops, x, ""), lambda: Ops.add_rows(ops, x, ""),
                 lambda: Ops.skip(ops, x, 1), lambda: Ops.merge_pictures(ops, x, x, x, 1)):  # fmt: skip
        with pytest.raises(TargetError, match="TorchOps shows no pictures"):
            verb()


# ---- calibration --------------------------------------------------------------------------------------------------


def hooked_grams(reference: LlavaForConditionalGeneration, samples: Samples) -> dict[str, Tensor]:
    """Sums of x x^T in front of every linear of transformers' own language model, a window at a time, float64."""
    reference = reference.double()
    heard: dict[str, list[Tensor]] = {}
    linears = {name: module for name, module in reference.model.language_model.named_modules()
               if isinstance(module, torch.nn.Linear)}  # fmt: skip
    hooks = [module.register_forward_pre_hook(lambda _, x, name=name: heard.setdefault(name, []).append(x[0][0]))
             for name, module in linears.items()]  # fmt: skip
    assert samples.pixels is not None
    for window, picture in zip(samples.ids, samples.pixels):
        their_logits(reference, window[None], picture[None].double())
    for hook in hooks:
        hook.remove()
    return {f"language_model.model.{name}": (x := torch.cat(parts)).T @ x for name, parts in heard.items()}


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_grams_are_those_of_transformers_with_the_pictures_in_them(batch: int, tmp_path: Path) -> None:
    reference = theirs({}, {})
    model = saved(reference, tmp_path)
    ids = torch.cat([a_text(vision_of(model), 60) for _ in range(3)])[:5]
    samples = Samples(ids, torch.randn(5, 3, 16, 16))
    expected, walk = hooked_grams(reference, samples), Calibration(model, samples, batch=batch, dtype=torch.float64)
    for layer in range(2):
        sites = layer_sites(model, layer)
        grams = walk.gram(model, layer, sites)
        assert set(grams) == set(sites) <= set(expected)
        for site in sites:
            error = (grams[site] - expected[site]).norm() / expected[site].norm()
            assert float(error) < 1e-6, site  # their RMS norm is float32 in any model
        walk.advance(model, layer)
    unseen = Calibration(model, Samples(ids), dtype=torch.float64).gram(model, 0, [layer_sites(model, 0)[0]])
    assert not torch.allclose(unseen[layer_sites(model, 0)[0]], expected[layer_sites(model, 0)[0]], rtol=0.1)


def test_pictures_that_are_not_the_models_are_refused() -> None:
    ids = a_text(VISION, 96)
    with pytest.raises(RecipeError, match=r"calibration pictures are \[1, 3, 16, 16\]; the model takes \[2, 3, "):
        Calibration(seeing_model(), Samples(ids, torch.zeros(1, 3, 16, 16)))
    with pytest.raises(RecipeError, match="the model takes none"):
        Calibration(random_model(LLAMA), Samples(ids, torch.zeros(2, 3, 16, 16)))


# ---- compression of the language part -----------------------------------------------------------------------------

STEPS = [
    {"kind": "fasp", "sparsity": 0.2},
    {"kind": "quantize", "bits": 4, "group": 16},
    {"kind": "swsc", "clusters": 8, "rank": 4},
    {"kind": "casp", "bits": 4, "group": 16},
    {"kind": "pbs2p", "n": 4, "m": 8, "block": 16},
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: str(step["kind"]))
def test_methods_compress_the_language_and_leave_the_tower_byte_for_byte(step: dict[str, Any]) -> None:
    model = seeing_model()
    (config,) = recipe.parse({"steps": [step]}).steps
    samples = Samples(torch.cat([a_text(VISION, 96) for _ in range(4)]), torch.randn(8, *VISION.shape))
    small = compress.run(model, config, samples, UNKEPT)
    language = [site for site in model.weights if site.startswith("language_model.")]
    assert any(small.weights[site] is not model.weights[site] for site in language)
    for site in model.weights.keys() - set(language):
        assert small.weights[site] is model.weights[site]
    for name in (name for name in model.tensors if not name.startswith("language_model.")):
        assert small.tensors[name] is model.tensors[name]
    ahead = compress.predict(model, config)
    assert ahead.architecture == small.architecture
    assert {s: [(type(n), n.shape) for n in nodes(w)] for s, w in ahead.weights.items()} == {
        s: [(type(n), n.shape) for n in nodes(w)] for s, w in small.weights.items()
    }
    assert our_logits(small, samples.ids, samples.pixels).isfinite().all()


def test_pictures_change_what_gptq_rounds() -> None:
    model = seeing_model()
    (config,) = recipe.parse({"steps": [STEPS[1]]}).steps
    ids, site = a_text(VISION, 96), layer_sites(model, 0)[0]
    first, other = (
        compress.run(model, config, Samples(ids, torch.randn(2, *VISION.shape)), UNKEPT).weights[site].dense()
        for _ in range(2)
    )
    assert not torch.equal(first, other)


def test_block_influence_is_measured_with_the_pictures() -> None:
    model, ids = seeing_model(), a_text(VISION, 96)
    with_pictures = block_influence(model, Samples(ids, torch.randn(2, *VISION.shape)))
    assert with_pictures.shape == (2,)
    assert not torch.allclose(with_pictures, block_influence(model, Samples(ids)))


# ---- on disk ------------------------------------------------------------------------------------------------------


def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    model = seeing_model()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    store.save(model, tmp_path / "one")
    again = store.load(tmp_path / "one")
    assert again.architecture == model.architecture
    assert again.files == model.files
    ids, pixels = a_text(VISION, 96), torch.randn(2, *VISION.shape)
    assert torch.equal(our_logits(again, ids, pixels), our_logits(model, ids, pixels))
    store.save(again, tmp_path / "two")
    for name in ("pocket.json", "weights.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("change", [{"patch": 5}, {"size": 0}, {"token": 96}, {"heads": 3}, {"norm_eps": -1.0}])
def test_a_saved_model_with_an_impossible_tower_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    store.save(seeing_model(), tmp_path)
    manifest = checkpoint.read_json(tmp_path / "pocket.json", "")
    manifest["architecture"]["vision"] |= change
    (tmp_path / "pocket.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        store.load(tmp_path)
