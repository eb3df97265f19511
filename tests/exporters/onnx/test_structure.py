"""The graphs are as lean as they are meant to be, valid, and the same every time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from device_harness.onnx_session import OnnxSession
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from exporters.onnx.graph import GraphBuilder
from exporters.onnx.quantized import SMALL_HEAD, accuracy_level
from exporters.onnx.weight_file import WeightFile
from exporters.registry import find_target

GRAPHS = ("model.onnx", "verify.onnx")
# What every graph computes once: sequence lengths from the mask, the embedding, the end.
ONCE = {"ReduceSum": 1, "Sub": 1, "Shape": 1, "Gather": 2, "Mul": 1, "Cast": 2, "Identity": 1}
# What `model.onnx` has besides: the place of each row's last token, and two selections of it.
LAST = {"Shape": 1, "Gather": 1, "Min": 1, "Sub": 1, "Unsqueeze": 1, "GatherND": 2}
FEED_FORWARD = {"Split": 1, "QuickGelu": 1, "Mul": 1}


def load(artifact, graph):
    return onnx.load(artifact.folder / graph, load_external_data=False)


def count(*parts: dict[str, int]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total


def layer_counts(matrices: str, casts: int) -> dict[str, int]:
    return {
        matrices: 5,
        "Cast": casts,
        "GroupQueryAttention": 1,
        "SkipSimplifiedLayerNormalization": 2,
        **FEED_FORWARD,
        "Split": 2,  # query and key; gate and up
    }


@pytest.mark.parametrize("layers", [1, 3])
def test_llama_rotates_inside_the_attention(build, llama_config, layers):
    artifact = build(llama_config(num_hidden_layers=layers), "int4-g32")
    whole = count(
        ONCE,
        # Embedding and head are two tables; each has its scales cast once.
        {"GatherBlockQuantized": 1, "MatMulNBits": 1, "Cast": 2, "RMSNormalization": 1},
        *[layer_counts("MatMulNBits", 5)] * layers,
    )
    for graph in GRAPHS:
        model = load(artifact, graph)
        last = LAST if graph == "model.onnx" else {}
        assert Counter(node.op_type for node in model.graph.node) == count(whole, last)
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                assert all(node.input[:3])
                assert helper.get_node_attr_value(node, "do_rotary") == 1
        levels = {
            node.input[1]: helper.get_node_attr_value(node, "accuracy_level")
            for node in model.graph.node
            if node.op_type == "MatMulNBits"
        }
        head = next(name for name in levels if name.startswith("lm_head"))
        # Only a head this small keeps float32 activations inside the kernel.
        assert levels.pop(head) == 1
        assert set(levels.values()) == {4}


def test_a_large_head_is_computed_as_fast_as_the_rest():
    assert accuracy_level(True, SMALL_HEAD, 4) == 1
    assert accuracy_level(True, SMALL_HEAD + 1, 4) == 4
    assert accuracy_level(False, 1, 8) == accuracy_level(True, 1, 2) == 4


def test_openelm_normalises_heads_before_the_attention(build, openelm_config):
    artifact = build(openelm_config([2], [1]), "int4-g32")
    whole = count(
        ONCE,
        # Tied: one set of scales.
        {"GatherBlockQuantized": 1, "MatMulNBits": 1, "Cast": 1, "RMSNormalization": 1},
        layer_counts("MatMulNBits", 5),
        {"Reshape": 4, "RMSNormalization": 2},
    )
    assert Counter(node.op_type for node in load(artifact, "verify.onnx").graph.node) == whole


def test_rotation_outside_the_kernel_where_the_kernel_cannot(build, phi3_config):
    artifact = build(phi3_config(head_dim=32, partial_rotary_factor=0.75), "fp32")
    model = load(artifact, "model.onnx")
    ops = Counter(node.op_type for node in model.graph.node)
    # Two layers of two rotations; the positions are made once for all of them.
    assert (ops["RotaryEmbedding"], ops["Range"], ops["GroupQueryAttention"]) == (4, 1, 2)
    assert ops["FusedMatMul"] == 11 and ops["Cast"] == 3
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            assert helper.get_node_attr_value(node, "do_rotary") == 0 and len(node.input) == 7


def test_rounded_activations_beside_rotation_outside_the_kernel(
    build, phi3_config, tokens, tmp_path
):
    """Both need a zero, of their own types."""
    path = tmp_path / "rounded.yaml"
    path.write_text(
        "- {match: '*self_attn*', format: int8-pc, activation: int8-token}\n"
        "- {match: '*', format: fp32}\n"
    )
    artifact = build(phi3_config(head_dim=40, partial_rotary_factor=0.4), str(path))
    session = OnnxSession(artifact.folder, artifact.manifest.context, 1)
    wanted = artifact.quantized_logits(tokens[:9])
    assert np.abs(session.logits(tokens[:9]) - wanted).max() < 1e-2 * np.ptp(wanted)
    last = session.extend(tokens[:9])
    assert np.abs(last - wanted[-1]).max() < 1e-2 * np.ptp(wanted)


def test_a_constants_name_stands_for_one_value():
    builder = GraphBuilder(WeightFile("w"))
    assert builder.constant("zero", np.array(0, np.int64)) == "zero"
    assert builder.constant("zero", np.array(0, np.int64)) == "zero"
    for other in (np.array(0, np.float32), np.array(1, np.int64), np.array([0], np.int64)):
        with pytest.raises(AssertionError, match="two constants have the name zero"):
            builder.constant("zero", other)


def test_a_window_reaches_the_kernel_only_if_it_hides_something(build, llama_config):
    for window, wanted in ((7, [7, 7]), (47, [47, 47]), (48, [None, None]), (500, [None, None])):
        config = llama_config(model_type="mistral", sliding_window=window)
        model = load(build(config, "fp32"), "model.onnx")
        found = [
            {a.name: a.i for a in node.attribute}.get("local_window_size")
            for node in model.graph.node
            if node.op_type == "GroupQueryAttention"
        ]
        assert found == wanted


def places(model, *suffixes):
    """External places of the initializers whose names end so."""
    return [
        tuple(entry.value for entry in tensor.external_data)
        for tensor in model.graph.initializer
        if tensor.name.endswith(suffixes) and tensor.name.startswith(("model.embed", "lm_head"))
    ]


@pytest.mark.parametrize("recipe", ["int4-g32", "int8", "fp16", "fp32"])
def test_a_tied_head_is_stored_once(build, llama_config, recipe):
    sizes = {}
    for tied in (True, False):
        artifact = build(llama_config(tie_word_embeddings=tied), recipe)
        sizes[tied] = (artifact.folder / "model.onnx.data").stat().st_size
        for graph in GRAPHS:
            model = load(artifact, graph)
            ends = (".rows", ".blocks", ".stored", ".weight")
            found = [place for place in places(model, *ends) if place]
            assert len(found) == 2
            assert len(set(found)) == (1 if tied else 2)
            assert {place[0] for place in found} == {"model.onnx.data"}
    table = 320 * 64 * {"int4-g32": 4, "int8": 8, "fp16": 16, "fp32": 32}[recipe] // 8
    assert sizes[False] - sizes[True] >= table


def test_both_graphs_read_the_same_bytes(build, llama_config):
    artifact = build(llama_config(), "int4-g32-asym")
    tables = [
        {
            tensor.name: [entry.value for entry in tensor.external_data]
            for tensor in load(artifact, graph).graph.initializer
            if tensor.external_data
        }
        for graph in GRAPHS
    ]
    assert tables[0] == tables[1] and tables[0]
    # onnxruntime maps what begins on a page.
    assert all(int(place[1]) % 4096 == 0 for place in tables[0].values())


@pytest.mark.parametrize("recipe", ["int4-g32", "fp16"])
def test_only_the_last_token_reaches_the_end_of_the_graph(
    build, openelm_config, llama_config, recipe, tokens, tmp_path
):
    for config in (openelm_config([2, 4], [1, 2]), llama_config()):
        artifact = build(config, recipe)
        op = "MatMulNBits" if recipe == "int4-g32" else "FusedMatMul"
        rows = {graph: observed_rows(artifact, graph, op, tokens[:9]) for graph in GRAPHS}
        layer = "model.layers.{}.{}"
        tied = artifact.model.spec.tied
        head = "model.embed_tokens" if tied else "lm_head"
        attention = ("self_attn.qk_proj", "self_attn.v_proj", "self_attn.o_proj")
        names = (*attention, "mlp.gate_up_proj", "mlp.down_proj")
        every = {layer.format(i, name): 9 for i in (0, 1) for name in names} | {head: 9}
        ended = {layer.format(1, name): 1 for name in names[2:]} | {head: 1}
        assert rows["verify.onnx"] == every
        assert rows["model.onnx"] == every | ended


def observed_rows(artifact, graph, op, tokens):
    """Tokens that each matrix product really saw, by weight: its output's second dimension."""
    model = load(artifact, graph)
    watched = {}
    for node in model.graph.node:
        if node.op_type == op:
            watched[node.output[0]] = node.input[1].partition(".weight")[0]
            model.graph.output.append(
                helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
            )
    path = artifact.folder / f"watched-{graph}"
    onnx.save(model, path)
    try:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options)
        feeds = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in session.get_inputs()
            if value.name.startswith("past_")
        }
        feeds["input_ids"] = tokens[None]
        feeds["attention_mask"] = np.ones((1, len(tokens)), np.int64)
        found = session.run(list(watched), feeds)
    finally:
        path.unlink()
    return {name: value.shape[1] for name, value in zip(watched.values(), found, strict=True)}


@pytest.mark.parametrize("recipe", ["int4-g32", "int8", "fp16", "fp32"])
def test_both_graphs_give_the_same_logits(build, openelm_config, recipe, tokens):
    artifact = build(openelm_config([2, 4], [1, 2]), recipe)
    session = OnnxSession(artifact.folder, artifact.manifest.context, 1)
    every = session.logits(tokens[:21])
    last = session.extend(tokens[:21])
    # One row of a product is computed by another kernel than many: equal up to rounding.
    assert np.abs(last - every[-1]).max() < 1e-5 * np.ptp(every)


def test_the_checker_passes_both_graphs_in_full(exported_distinct):
    for graph in GRAPHS:
        onnx.checker.check_model(str(exported_distinct.folder / graph), full_check=True)


@pytest.mark.parametrize("recipe", ["int4-g32-asym", "int4-pc-asym", "int8", "fp16"])
def test_the_checker_passes_every_format(build, openelm_config, recipe):
    artifact = build(openelm_config([2, 4], [1, 2]), recipe)
    for graph in GRAPHS:
        onnx.checker.check_model(str(artifact.folder / graph), full_check=True)


def test_the_graph_declares_its_own_names_and_shapes(build, openelm_config):
    artifact = build(openelm_config([2, 6], [1, 3]), "int4-g32")
    session = onnxruntime.InferenceSession(str(artifact.folder / "model.onnx"))
    manifest = artifact.manifest
    declared = {**manifest.inputs, **manifest.states}
    found = {
        value.name: f"{value.type[7:-1]}[{', '.join(map(str, value.shape))}]"
        for value in session.get_inputs()
    }
    assert declared == found
    assert manifest.outputs == {"logits": "float[batch_size, 1, 320]"}
    assert found["past_key_values.1.key"] == "float[batch_size, 3, past_length, 16]"
    names = [value.name for value in session.get_outputs()]
    assert names == ["logits"] + [
        f"present.{i}.{kind}" for i in (0, 1) for kind in ("key", "value")
    ]


@pytest.mark.parametrize("recipe", ["int4-g32-asym", "fp16"])
def test_two_exports_are_equal_byte_for_byte(build, openelm_config, recipe, tmp_path, monkeypatch):
    first = build(openelm_config([2, 4], [1, 2]), recipe)
    # In another place, from another store made anew.
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "other cache"))
    second = tmp_path / "øther"
    model = open_model(str(first.model.checkpoint.path))
    options = ExportOptions(recipe=recipe, context=48, threads=1)
    export(model, [find_target("onnx")], second, options)
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first.folder / name).read_bytes() == (second / name).read_bytes(), name
        if name != "edgeforge.json":
            content = (second / name).read_bytes()
            for private in (tmp_path, model.checkpoint.path, first.store.folder):
                assert str(private).encode() not in content
                assert str(private.parent).encode() not in content
