"""What is decided, written and read back: bytes, places, versions, and files that are not what they should be."""

import json
from dataclasses import replace

import onnx
import pytest
import torch

from exporter.errors import ArtifactError, TargetError
from exporter.model import Layer
from exporter.weights import Dense, LowBit, Product, Shared, Sparse, Sum, to_meta
from targets.onnxruntime_mobile import TARGET, runner
from targets.onnxruntime_mobile.constants import ALIGNMENT, DATA, MODEL
from targets.onnxruntime_mobile.ops import GraphOps
from targets.onnxruntime_mobile.package import GENAI
from targets.onnxruntime_mobile.prices import price

EMBEDDING = "model.embed_tokens"


def written(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def edited(folder, change):
    """Change a written graph."""
    model = onnx.load(folder / MODEL, load_external_data=False)
    change(model)
    (folder / MODEL).write_bytes(model.SerializeToString())
    return folder


def entries(model, name):
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return {entry.key: entry for entry in tensor.external_data}


# ---- decisions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group", "kind", "row_bits"), [
    (4, 32, "symmetric", 192 * 4 + 6 * 32),  # 172 columns are six blocks of 32
    (4, 32, "whole", 192 * 4 + 6 * 32 + 24),  # six zero points of four bits, in whole bytes
    (2, 64, "whole", 192 * 2 + 3 * 32 + 8),
    (8, 16, "whole", 176 * 8 + 11 * 32 + 88),
    (4, 32, "half", 192 * 4 + 6 * 32),  # one zero point is an attribute
    (4, 32, "fractional", 192 * 4 + 6 * 64),
])  # fmt: skip
def test_a_low_bit_leaf_costs_its_padded_codes_scales_and_zero_points(to_nearest, bits, group, kind, row_bits):
    assert price(to_nearest(torch.randn(10, 172), bits=bits, group=group, kind=kind)) == 10 * row_bits


def test_what_has_no_fast_kernel_is_refused_with_what_has(to_nearest):
    weight = torch.randn(8, 96)
    assert price(to_nearest(weight, bits=3)) == (
        "3 bits is not a width that MatMulNBits takes; widths that it does: 2, 4, 8"
    )
    assert price(to_nearest(weight, bits=2, group=16)) == (
        "MatMulNBits has no fast 2-bit kernel for blocks of 16; sizes with one: 32, 64, 128"
    )
    assert str(price(to_nearest(weight, group=24))).endswith("sizes with one: 16, 32, 64, 128, 256")
    places = torch.arange(0, 4, 2, dtype=torch.uint8).repeat(8, 24)
    assert price(Sparse(Dense(weight[:, :48].contiguous()), places, 2, 4)) == "ONNX Runtime has no N:M operator on CPU"
    assert price(Sum((Dense(weight),))) == "float32 is no leaf"


def test_an_embedding_with_fractional_zero_points_is_stored_in_floats_and_says_why(decoder, all_rounded):
    plan = TARGET.plan(all_rounded(decoder(), kind="fractional"), 48)
    decision = next(decision for decision in plan.decisions if decision.site == EMBEDDING)
    assert decision.stored == "float32"
    assert decision.reason.endswith("GatherBlockQuantized takes whole zero points only")
    assert "fractional zero points run as a second, small product" in plan.notes[-1]


def test_an_embedding_of_a_tree_is_folded_and_says_why(decoder):
    tree = Product(Dense(torch.randn(80, 4)), Dense(torch.randn(4, 64)))
    plan = TARGET.plan(decoder().with_weights({EMBEDDING: tree}), 48)
    decision = next(decision for decision in plan.decisions if decision.site == EMBEDDING)
    assert (decision.native, decision.bytes) == (False, 80 * 64 * 4)
    assert decision.tree == "rank 4 (float32 x float32)"
    assert decision.reason.startswith("stored as float32: rows of an embedding are looked up in codes or floats")


def test_a_context_that_the_model_lacks_is_refused(decoder):
    for context in (0, 49):
        with pytest.raises(TargetError, match=rf"context of {context} tokens is not possible; .* takes 1 to 48"):
            TARGET.plan(decoder(), context)


def test_weights_that_no_plan_made_are_refused_while_writing(decoder):
    model = decoder()
    places = torch.arange(0, 4, 2, dtype=torch.uint8).repeat(64, 16)
    sparse = Sparse(Dense(torch.randn(64, 32)), places, 2, 4)
    ops = GraphOps(model.with_weights({EMBEDDING: Sum((Dense(torch.randn(80, 64)),))}), 8)
    with pytest.raises(TargetError, match="an embedding is stored as floats or codes; lower with the plan"):
        ops.embedding(ops.ids, EMBEDDING)
    with pytest.raises(TargetError, match="there is no N:M operator on CPU; lower with the plan"):
        ops.leaf(ops.ids, sparse, "site")
    with pytest.raises(TargetError, match=r"activation 'tanh' has no operator here; known: silu, gelu"):
        ops.activation(ops.ids, "tanh")


def test_the_budget_grows_with_the_leaves_in_low_bits_and_is_float32s_without(decoder, all_rounded, to_nearest):
    model = decoder()
    one = model.with_weights({"model.layers.0.mlp.up_proj": to_nearest(torch.randn(96, 64))})
    table = decoder(tied=False)
    table = table.with_weights({EMBEDDING: to_nearest(table.weights[EMBEDDING].dense())})  # looked up only: exact
    errors = [TARGET.budget(m, TARGET.plan(m, 48)).relative_l2 for m in (model, table, one, all_rounded(model))]
    assert errors[0] == errors[1] == 1e-5
    assert 0.0128 < errors[2] < errors[3] < 0.15


# ---- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["dense", "symmetric", "whole", "half", "fractional"])
def test_the_plan_says_the_bytes_of_the_files_exactly(exported, decoder, all_rounded, tied, kind):
    model = decoder(tied=tied)
    folder, plan = exported(model if kind == "dense" else all_rounded(model, kind=kind))
    assert plan.bytes == written(folder)


def test_shapes_alone_say_the_bytes_too(decoder, all_rounded):
    model = all_rounded(decoder())
    meta = replace(
        model, weights={site: to_meta(weight) for site, weight in model.weights.items()},
        tensors={name: tensor.to("meta") for name, tensor in model.tensors.items()},
    )  # fmt: skip
    assert TARGET.plan(meta, 48).bytes == TARGET.plan(model, 48).bytes


@pytest.mark.parametrize("is_low_bit", [False, True])
@pytest.mark.parametrize("hidden", [64, 72])  # 72 columns are padded to 96 codes
def test_a_tied_matrix_is_stored_once(exported, decoder, all_rounded, is_low_bit, hidden):
    sizes = []
    for tied in (True, False):
        model = decoder(hidden=hidden, tied=tied, vocab=4096)
        folder, plan = exported(all_rounded(model) if is_low_bit else model)
        sizes.append((folder / DATA).stat().st_size)
    head = next(decision.bytes for decision in plan.decisions if decision.site == "lm_head")
    assert head <= sizes[1] - sizes[0] < head + 2 * ALIGNMENT


def test_every_constant_lies_at_an_aligned_place(exported, decoder, all_rounded):
    folder, _ = exported(all_rounded(decoder(), kind="whole"))
    model = onnx.load(folder / MODEL, load_external_data=False)
    offsets = [int(entry.value) for t in model.graph.initializer for entry in t.external_data if entry.key == "offset"]
    assert len(offsets) > 40
    assert {offset % ALIGNMENT for offset in offsets} == {0}


def test_two_writings_are_equal_bytes(exported, decoder, all_rounded):
    model = all_rounded(decoder((Layer(4, 2, 16, 8, 33), Layer(2, 1, 8, 8, 20))), kind="fractional")
    first, second = exported(model)[0], exported(model)[0]
    names = sorted(path.name for path in first.iterdir())
    assert names == [GENAI, MODEL, DATA]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_sums_and_norms_are_one_node(exported, decoder):
    for family, operator in (("llama", "SkipSimplifiedLayerNormalization"), ("opt", "SkipLayerNormalization")):
        folder, _ = exported(decoder(family=family, extras=("norm.weight",)))
        operators = [node.op_type for node in onnx.load(folder / MODEL, load_external_data=False).graph.node]
        assert operators.count(operator) == (5 if family == "opt" else 4)  # OPT adds positions before its first norm
        assert operators.count("Add") == (2 if family == "opt" else 0)  # of position numbers, not of activations


def test_rotary_is_inside_attention_where_the_head_size_allows_it(exported, decoder):
    for head_dim, apart in ((16, 0), (24, 2)):
        folder, _ = exported(decoder((Layer(2, 1, head_dim, head_dim, 32),)))
        operators = [node.op_type for node in onnx.load(folder / MODEL, load_external_data=False).graph.node]
        assert operators.count("RotaryEmbedding") == apart


def test_genai_config_says_names_sizes_and_context(exported, decoder):
    folder, _ = exported(decoder(), 40)
    config = json.loads((folder / GENAI).read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == 40
    assert config["model"]["decoder"]["head_size"] == 16
    assert config["model"]["decoder"]["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert config["model"]["eos_token_id"] == [2]
    assert config["search"]["past_present_share_buffer"] is True


@pytest.mark.parametrize(("bits", "kind", "with_embedding", "least"), [
    (4, "symmetric", False, "1.22.0"), (8, "symmetric", False, "1.24.3"), (2, "symmetric", False, "1.29.0"),
    (4, "symmetric", True, "1.23.2"), (4, "whole", True, "1.27.0"), (2, "whole", True, "1.29.0"),
])  # fmt: skip
def test_the_least_version_follows_from_what_is_stored(
    decoder, tmp_path, to_nearest, bits, kind, with_embedding, least
):
    model = decoder()
    sites = [site for site in model.weights if with_embedding or "embed" not in site]
    stored = {site: to_nearest(model.weights[site].dense(), bits=bits, kind=kind) for site in sites}
    model = model.with_weights(stored)
    requires = TARGET.lower(model, TARGET.plan(model, 48), tmp_path)
    assert requires == {"onnxruntime": least, "onnx opset": "21", "onnx ir": "10"}


# ---- reading back ---------------------------------------------------------------------------------------------


def wrong(folder, model, plan):
    return {finding.what: finding.detail for finding in TARGET.inspect(folder, model, plan) if not finding.ok}


@pytest.mark.parametrize(("part", "kind"), [("codes", "symmetric"), ("scales", "symmetric"), ("zeros", "whole"),
                                            ("shifts", "fractional")])  # fmt: skip
def test_one_changed_bit_of_any_part_is_found(exported, decoder, all_rounded, part, kind):
    site = "model.layers.1.mlp.down_proj"
    model = all_rounded(decoder(), kind=kind)
    folder, plan = exported(model)
    assert wrong(folder, model, plan) == {}
    place = int(entries(onnx.load(folder / MODEL, load_external_data=False), f"{site}.{part}")["offset"].value)
    content = bytearray((folder / DATA).read_bytes())
    content[place + 5] ^= 1
    (folder / DATA).write_bytes(content)
    assert wrong(folder, model, plan) == {site: f"differs in {part}"}


def test_a_changed_norm_table_graph_or_interface_is_found(exported, decoder, all_rounded):
    model = all_rounded(decoder())
    folder, plan = exported(model)
    norm = "model.layers.0.input_layernorm.weight"
    other = model.with_tensors({norm: model.tensors[norm] + 1})
    assert wrong(folder, other, plan) == {norm: "differs"}

    def exact(graph):
        for node in graph.graph.node:
            for attribute in node.attribute:
                attribute.i = 0 if attribute.name == "accuracy_level" else attribute.i

    assert list(wrong(edited(folder, exact), model, plan)) == ["nodes"]

    def renamed(graph):
        graph.graph.output[0].name = "scores"

    assert "inputs and outputs" in wrong(edited(folder, renamed), model, plan)


def test_a_rotary_table_far_out_settings_and_the_rest_of_the_graph_are_compared(exported, decoder):
    model = decoder()
    folder, plan = exported(model)
    place = entries(onnx.load(folder / MODEL, load_external_data=False), "rotary_16.sin")
    content = bytearray((folder / DATA).read_bytes())
    content[int(place["offset"].value) + int(place["length"].value) - 4] ^= 1  # position 47
    (folder / DATA).write_bytes(content)
    assert wrong(folder, model, plan) == {"rotary_16.sin": "differs"}

    folder, _ = exported(model)
    (folder / GENAI).write_text(
        (folder / GENAI).read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    assert wrong(folder, model, plan) == {"genai_config.json": "differs"}

    def shorten(graph):
        graph.metadata_props[0].value = "24"

    assert list(wrong(edited(exported(model)[0], shorten), model, plan)) == ["rest of the graph"]


def test_labels_of_shared_rows_are_compared(exported, decoder):
    site, labels = "model.layers.0.mlp.up_proj", torch.arange(96) // 2
    model = decoder().with_weights({site: Shared(Dense(torch.randn(48, 64)), labels)})
    folder, plan = exported(model)
    assert wrong(folder, model, plan) == {}
    name = next(
        t.name for t in onnx.load(folder / MODEL, load_external_data=False).graph.initializer if t.data_type == 6
    )
    content = (folder / DATA).read_bytes()
    stored = labels.to(torch.int32).numpy().tobytes()
    assert content.count(stored) == 1
    (folder / DATA).write_bytes(content.replace(stored, labels.flip(0).to(torch.int32).numpy().tobytes()))
    assert list(wrong(folder, model, plan)) == [name]


def test_files_are_run_with_float_activations_against_the_model_itself(exported, decoder, all_rounded):
    model = all_rounded(decoder())
    folder, plan = exported(model)
    proof = TARGET.inspect(folder, model, plan)[-1]
    assert (proof.what, proof.ok) == ("float32 activations", True)
    site = "model.layers.0.mlp.up_proj"
    other = model.with_weights({site: replace(model.weights[site], scales=model.weights[site].scales * 1.001)})
    assert list(wrong(folder, other, plan)) == ["float32 activations"]  # the plan is in the files, but is not the model
    dense = decoder()
    assert all("activations" not in f.what for f in TARGET.inspect(exported(dense)[0], dense, TARGET.plan(dense, 48)))


def test_constants_that_overlap_are_found(exported, decoder):
    model = decoder()
    folder, plan = exported(model)

    def overlap(graph):
        place = entries(graph, "model.norm.weight")["offset"]
        place.value = str(int(place.value) - 4)

    assert "places in the data file" in wrong(edited(folder, overlap), model, plan)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("location", "../secret", r"lies in '../secret'; only model.onnx.data may be named"),
    ("offset", "-4", r"has the place '-4'; it must be a whole number"),
    ("offset", "9" * 30, r"it must be a whole number"),
    ("offset", "99999999", r"ends at byte \d+; model.onnx.data has \d+"),
    ("length", "12", r"has 12 bytes, which is not its shape \[64\]"),
])  # fmt: skip
def test_a_reference_that_lies_is_refused(exported, decoder, key, value, message):
    folder, _ = exported(decoder())

    def lie(graph):
        entries(graph, "model.norm.weight")[key].value = value

    with pytest.raises(ArtifactError, match=message):
        TARGET.session(edited(folder, lie))


def test_a_constant_of_a_foreign_type_is_refused(exported, decoder):
    folder, _ = exported(decoder())

    def retype(graph):
        next(t for t in graph.graph.initializer if t.name == "model.norm.weight").data_type = onnx.TensorProto.INT64

    with pytest.raises(ArtifactError, match="has a type or shape that this target does not write"):
        TARGET.session(edited(folder, retype))


def test_missing_data_and_what_is_no_graph_are_refused(exported, decoder, tmp_path, monkeypatch):
    with pytest.raises(ArtifactError, match=r"has no model.onnx; `pocket export` makes it"):
        TARGET.session(tmp_path)
    (tmp_path / MODEL).write_bytes(b"no graph at all")
    with pytest.raises(ArtifactError, match="is no ONNX file"):
        TARGET.session(tmp_path)
    folder, _ = exported(decoder())
    monkeypatch.setattr("targets.onnxruntime_mobile.readback.LARGEST_GRAPH", 1000)
    with pytest.raises(ArtifactError, match=r"has \d+ bytes; a graph has at most 1000"):
        TARGET.session(folder)
    monkeypatch.undo()
    (folder / DATA).unlink()
    with pytest.raises(ArtifactError, match=r"ends at byte \d+; model.onnx.data has 0"):
        TARGET.session(folder)


def test_a_graph_that_the_runtime_refuses_or_without_a_context_is_told(exported, decoder):
    folder, _ = exported(decoder())

    def forget(graph):
        graph.metadata_props[0].value = "many"

    with pytest.raises(ArtifactError, match="the graph's context is 'many'; it must be a whole number"):
        TARGET.session(edited(folder, forget))

    def misname(graph):
        graph.graph.node[0].op_type = "NoSuchOperator"

    with pytest.raises(ArtifactError, match="does not load in onnxruntime 1"):
        TARGET.session(edited(folder, misname))


def test_a_graph_that_loads_and_does_not_run_is_told(exported, decoder):
    folder, _ = exported(decoder())

    def split(graph):
        attention = next(node for node in graph.graph.node if node.op_type == "GroupQueryAttention")
        next(a for a in attention.attribute if a.name == "kv_num_heads").i = 4

    with pytest.raises(ArtifactError, match="the graph does not run in onnxruntime 1"):
        TARGET.session(edited(folder, split)).step([1])


# ---- sessions -------------------------------------------------------------------------------------------------


def test_a_step_refuses_no_token_a_strange_one_and_too_many(exported, decoder):
    session = TARGET.session(exported(decoder(), 8)[0])
    assert session.context == 8
    with pytest.raises(TargetError, match="a step takes at least one token"):
        session.step([])
    for token in (-1, 80):  # a mask of padding has no way in
        with pytest.raises(TargetError, match=f"token {token} is not in the vocabulary; its tokens are 0 to 79"):
            session.step([token])
    first = session.step([1, 2, 3, 4, 5])
    with pytest.raises(TargetError, match="5 tokens and 4 more do not fit the context of 8; reset, or export"):
        session.step([1, 2, 3, 4])
    session.reset()
    assert torch.equal(session.step([1, 2, 3, 4, 5]), first)


def test_exact_activations_are_nearer_than_int8_ones(exported, decoder, all_rounded, distance):
    folder, _ = exported(all_rounded(decoder()))
    tokens = list(range(20))
    apart = distance(TARGET.session(folder).step(tokens), runner.exact_session(folder).step(tokens))
    assert 1e-4 < apart < 0.1


def test_leaves_of_one_site_have_names_of_their_own(decoder):
    term = Dense(torch.randn(64, 64))
    ops = GraphOps(decoder().with_weights({"a": Sum((term, Dense(torch.randn(64, 64)), term))}), 8)
    ops.linear(ops.ids, "a")
    assert list(ops.leaves) == ["a", "a.leaf1"]  # the same leaf twice is stored once
    assert not any(isinstance(leaf, LowBit) for leaf in ops.leaves.values())
