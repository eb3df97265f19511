"""Columns of large activations stay float32, on every target whose kernels round activations."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

from device_harness.onnx_session import OnnxSession
from device_harness.registry import open_session
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import DEMO, open_model
from edgeforge.pipeline import export
from edgeforge.verification.references import references
from edgeforge.verification.rounding import rounds_activations
from exporters.errors import ExportError
from exporters.float_columns import ALL, column_values
from exporters.manifest import Manifest
from exporters.options import TargetOptions
from exporters.registry import find_target
from quant.formats.formats import parse_format
from quant.kernels import native
from tests.exporters.conftest import as_recipe, write_checkpoint

TARGETS = ("onnx", "executorch")
LARGE = (5, 70)  # columns of the residual stream, in two groups of every size tried
RECIPE = "int4-g32"


@pytest.fixture(scope="module")
def outliers(tmp_path_factory, llama_config):
    """A model whose norms make two columns far larger than the others, as real ones do."""
    config = llama_config(hidden_size=128, intermediate_size=256, head_dim=32)
    folder = write_checkpoint(tmp_path_factory.mktemp("outliers") / "model", config)
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if value.ndim == 1:
            value[list(LARGE)] *= 40
        elif not name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            value[:, list(LARGE)] /= 10
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def made(outliers, cache, tmp_path_factory):
    """Exports that model with a value of ``activations``, once each."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def made(target, activations, recipe=RECIPE):
        key = target, activations, recipe
        if key not in known:
            folder = root / str(len(known))
            options = ExportOptions(
                as_recipe(recipe, root), context=48, target=TargetOptions(activations=activations)
            )
            export(open_model(str(outliers)), [find_target(target)], folder, options)
            known[key] = folder
        return known[key]

    return made


@pytest.fixture(scope="module")
def wanted(outliers, cache, made, tokens):
    """QUANTIZED's logits by recipe."""

    def wanted(recipe):
        manifest = Manifest.read(made("onnx", "int8", recipe))
        found = references(manifest, open_model(str(outliers)), lambda *told: None)
        quantized = found.quantized
        return next(quantized.logits([torch.from_numpy(tokens[:48])]))

    return wanted


def divergence(wanted, folder, tokens):
    """KL of an artifact from QUANTIZED, nats a token."""
    with open_session(folder, Manifest.read(folder), 1, {}) as session:
        logits = torch.from_numpy(session.logits(tokens[:48]))
    one, other = wanted.log_softmax(-1), logits.log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", [RECIPE, "int8-pc"])
def test_the_lowering_error_falls_and_the_weights_stay(made, wanted, tokens, target, recipe):
    reference = wanted(recipe)
    found = {
        asked: divergence(reference, made(target, asked, recipe), tokens)
        for asked in ("int8", None, "float")
    }
    assert found[None] < found["int8"] / 10
    assert found["float"] < 1e-7 < found[None]
    digests = [
        find_target(target).stored_digests(made(target, asked, recipe)) for asked in ("int8", None)
    ]
    assert digests[0] == digests[1]
    recorded = Manifest.read(made(target, None, recipe)).weights
    assert digests[0] == {name: record.digest for name, record in recorded.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_the_manifest_names_the_columns(made, target):
    manifest = Manifest.read(made(target, None))
    projections = [name for name in manifest.weights if name.endswith("qk_proj.weight")]
    assert len(projections) == 2
    for name in projections:
        assert set(LARGE) <= set(manifest.weights[name].float_columns)
    assert manifest.weights["lm_head.weight"].float_columns == ALL  # small heads round nothing
    assert manifest.weights["model.embed_tokens.weight"].float_columns == ()
    (note,) = [note for note in manifest.notes if "large activations" in note]
    assert note.startswith("of ")
    data = json.loads((made(target, None) / "edgeforge.json").read_text())
    assert data["weights"][projections[0]]["float_columns"]
    rounded = Manifest.read(made(target, "int8"))
    assert rounded.options == {"activations": "int8"}
    assert {record.float_columns for record in rounded.weights.values()} <= {(), ALL}
    exact = Manifest.read(made(target, "float"))
    assert all(
        record.float_columns == ALL
        for name, record in exact.weights.items()
        if len(record.shape) == 2 and "embed" not in name
    )
    assert any("no matrix product rounds" in note for note in exact.notes)


def test_onnx_runtime_unpacks_the_columns_when_it_loads_the_model(made, tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(made("onnx", None) / "model.onnx", options)
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    left = Counter(node.op_type for node in graph.node)
    assert not left.keys() & {"BitShift", "BitwiseAnd", "Transpose", "Expand"}
    parted = [n for n in Manifest.read(made("onnx", None)).weights.values() if n.float_columns]
    assert left["MatMul"] == sum(record.float_columns != ALL for record in parted) > 0


@pytest.mark.parametrize(
    "name", ["int2-g32-asym", "int4-g32", "int4-g64-asym", "int4-pc", "int8-pc", "int8-g32-asym"]
)
def test_the_values_of_a_few_columns_are_those_of_the_matrix(build, llama_config, name):
    config = llama_config(hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=1)
    store, format = build(config, name).store, parse_format(name)
    weight = "model.layers.0.mlp.down_proj.weight"
    columns = [0, 7, 8, 31, 32, 100, 255]
    parts = {part: store.part(weight, part) for part in store.extents(weight)}
    whole = native.unpack(parts["codes"], parts["scale"], parts.get("zero_point"), format)
    assert torch.equal(column_values(store, weight, format, columns), whole[:, columns])


def test_the_demo_model_has_no_such_columns(cache, tmp_path):
    levels = {}
    for asked in ("auto", "int8"):
        options = ExportOptions("int4", target=TargetOptions(activations=asked))
        export(open_model(DEMO), [find_target("onnx")], tmp_path / asked, options)
        graph = onnx.load(tmp_path / asked / "model.onnx", load_external_data=False).graph
        levels[asked] = [node.SerializeToString() for node in graph.node]
    assert levels["auto"] == levels["int8"]


@pytest.mark.parametrize(
    ("targets", "recipe", "options", "words"),
    [
        (
            ["onnx"],
            RECIPE,
            {"activations": "int4"},
            "--activations int4 is not known to onnx: take auto or int8 or float",
        ),
        (
            ["coreml"],
            RECIPE,
            {"activations": "float"},
            "coreml, whose products take float16 activations and round them no further, has no "
            "option --activations: leave it out",
        ),
        (
            ["executorch"],
            "w8a8",
            {"activations": "float"},
            "--activations float is not possible with a recipe that rounds activations itself, as "
            "this one does for model.layers.0.self_attn.qk_proj.weight: leave the option out, or "
            "take a recipe that rounds only weights, such as int8",
        ),
        (
            ["executorch"],
            RECIPE,
            {"activations": "float", "lowering": "stock"},
            "--activations needs EdgeForge's own lowering for XNNPACK: leave out --activations or "
            "--lowering stock",
        ),
    ],
)
def test_what_is_refused(
    cache, checkpoint_of, llama_config, tmp_path, targets, recipe, options, words
):
    model = checkpoint_of(llama_config(num_hidden_layers=1))
    asked = ExportOptions(recipe, context=48, target=TargetOptions(**options))
    with pytest.raises(ExportError) as caught:
        export(model, [find_target(name) for name in targets], tmp_path / "out", asked)
    assert str(caught.value) == words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_verify_knows_whether_the_kernels_round(made, target):
    rounds = {
        asked: rounds_activations(Manifest.read(made(target, asked)))
        for asked in ("int8", None, "float")
    }
    assert rounds == {"int8": True, None: True, "float": False}


def test_pieces_of_a_text_give_the_same(made, tokens):
    session = OnnxSession(made("onnx", None), 48, 1)
    whole = session.logits(tokens[:20])
    assert np.abs(session.extend(tokens[:12]) - whole[11]).max() < 1e-3 * np.ptp(whole)
