"""What a package holds besides the right numbers: its functions, states, weights and texts."""

from __future__ import annotations

import filecmp
import json
from collections import Counter

import pytest

from edgeforge.export_options import ExportOptions
from edgeforge.pipeline import export
from exporters.coreml import names
from exporters.coreml.package import open_package
from exporters.options import TargetOptions
from exporters.registry import find_target


@pytest.fixture(scope="module")
def tied(package, llama_config):
    config = llama_config(tie_word_embeddings=True, num_attention_heads=4, head_dim=32)
    return package(config, "int4")


@pytest.fixture(scope="module")
def uneven(package, openelm_config):
    return package(openelm_config([3, 4, 6], [1, 2, 3]), "int4")


def blobs_of(operation):
    """Offsets of all the blobs that an operation names, by parameter."""
    values = dict(operation.attributes.items())
    for name, argument in operation.inputs.items():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "value":
                values[name] = binding.value
    return {n: v.blobFileValue.offset for n, v in values.items() if v.blobFileValue.offset}


def test_three_functions_share_every_weight(uneven, operations):
    package = open_package(uneven.folder / names.PACKAGE)
    assert package.default_function == names.DECODE
    assert set(package.functions) == {names.DECODE, names.PREFILL, names.VERIFY}
    held = {}
    for function in package.functions:
        held[function] = {
            operation.outputs[0].name: blobs_of(operation)
            for operation in operations(uneven.folder, function)
            if operation.outputs and "__weight" in operation.outputs[0].name
        }
    assert held[names.DECODE] == held[names.PREFILL] == held[names.VERIFY]
    assert len(held[names.DECODE]) >= len(uneven.manifest.weights)


def test_the_file_holds_each_weight_once(tied):
    package = tied.folder / names.PACKAGE
    stored = tied.store.nbytes
    size = (package / names.WEIGHTS_PATH).stat().st_size
    # Headers of 64 bytes, alignment, rotary tables of 48 positions and zero biases come on top.
    assert stored < size < stored + 40_000


def test_a_tied_head_reads_the_embeddings_constant(tied, operations):
    for function in (names.DECODE, names.PREFILL, names.VERIFY):
        readers = [
            operation.type
            for operation in operations(tied.folder, function)
            for argument in operation.inputs.values()
            for binding in argument.arguments
            if binding.name == "model__embed_tokens__weight"
        ]
        assert sorted(readers) == ["gather", "linear"]


def test_names_are_unique_and_plain_within_a_function(uneven, operations):
    for function in (names.DECODE, names.PREFILL, names.VERIFY):
        own = [
            o.attributes["name"].immediateValue.tensor.strings.values[0]
            for o in operations(uneven.folder, function)
        ]
        values = [v.name for o in operations(uneven.folder, function) for v in o.outputs]
        for found in (own, values):
            assert max(Counter(found).values()) == 1
            assert all(name.isidentifier() and name.isascii() for name in found)


def test_each_layer_has_two_states_of_its_own_heads(uneven):
    interface = open_package(uneven.folder / names.PACKAGE).interface(names.PREFILL)
    shapes = {state.name: (state.dtype, state.shape) for state in interface.states}
    assert shapes == {
        f"{kind}Cache_{layer}": ("fp16", (1, heads, 48, 16))
        for layer, heads in enumerate((1, 2, 3))
        for kind in ("key", "value")
    }
    assert uneven.manifest.states["keyCache_2"] == "fp16[1, 3, 48, 16]"


def test_prefill_computes_the_head_for_one_position(uneven, operations):
    shapes = {}
    for function in (names.PREFILL, names.VERIFY):
        (head,) = [
            operation
            for operation in operations(uneven.folder, function)
            if operation.outputs and operation.outputs[0].name == names.LOGITS
        ]
        dims = head.outputs[0].type.tensorType.dimensions
        shapes[function] = [dim.constant.size for dim in dims]
    assert shapes == {names.PREFILL: [1, 1, 320], names.VERIFY: [1, 16, 320]}


def test_query_heads_that_share_keys_are_rows_of_one_product(uneven, operations):
    mixed = [
        o
        for o in operations(uneven.folder, names.PREFILL)
        if o.type == "scaled_dot_product_attention"
    ]
    shapes = [[dim.constant.size for dim in o.outputs[0].type.tensorType.dimensions] for o in mixed]
    assert shapes == [[1, 1, 48, 16], [1, 2, 32, 16], [1, 3, 32, 16]]


def test_two_exports_are_the_same_bytes(tied, tmp_path):
    out = tmp_path / "again"
    options = ExportOptions("int4", 48, target=TargetOptions(chunk="16"))
    export(tied.model, [find_target("coreml")], out, options)
    compared = filecmp.dircmp(tied.folder / names.PACKAGE, out / names.PACKAGE)
    assert compared.left_list == compared.right_list
    for path in ("Manifest.json", names.MODEL_PATH, names.WEIGHTS_PATH):
        one, other = ((folder / names.PACKAGE / path).read_bytes() for folder in (tied.folder, out))
        assert one == other, path


def test_the_table_of_contents_names_both_files(tied):
    package = tied.folder / names.PACKAGE
    contents = json.loads((package / "Manifest.json").read_text())
    entries = contents["itemInfoEntries"]
    assert entries[contents["rootModelIdentifier"]]["path"] == "com.apple.CoreML/model.mlmodel"
    assert {entry["path"] for entry in entries.values()} == {
        "com.apple.CoreML/model.mlmodel",
        "com.apple.CoreML/weights",
    }
    assert all((package / "Data" / entry["path"]).exists() for entry in entries.values())


def test_stripping_leaves_the_function_for_verification_out(package, llama_config):
    stripped = package(llama_config(), "int4", strip=True)
    found = open_package(stripped.folder / names.PACKAGE)
    assert set(found.functions) == {names.DECODE, names.PREFILL}
    assert stripped.manifest.outputs == {
        "decode.logits": "fp16[1, 1, 320]",
        "prefill.logits": "fp16[1, 1, 320]",
    }


def test_a_choice_of_chunks_is_enumerated_in_the_description(package, llama_config):
    chosen = package(llama_config(), "int4", chunk="16,4,64")
    found = open_package(chosen.folder / names.PACKAGE)
    (ids, _) = found.interface(names.PREFILL).inputs
    assert ids.shapes == ((1, 4), (1, 16), (1, 48)), "no chunk is longer than the context"
    assert found.interface(names.VERIFY).inputs[0].shape == (1, 48)
    assert "exactly 4 or 16 or 48 tokens" in " ".join(chosen.manifest.notes)


def test_without_states_caches_are_inputs_and_outputs(package, llama_config):
    old = package(llama_config(), "fp16", opset="ios17")
    found = open_package(old.folder / names.PACKAGE)
    assert found.spec.specificationVersion == 8
    interface = found.interface()
    assert interface.name == names.MAIN and not interface.states
    caches = {"keyCache_0", "valueCache_0", "keyCache_1", "valueCache_1"}
    assert {i.name for i in interface.inputs} == {names.TOKENS, names.POSITION, *caches}
    assert {o.name for o in interface.outputs} == {names.LOGITS, *(c + "Updated" for c in caches)}
    (note,) = [note for note in old.manifest.notes if note.startswith("iOS 17")]
    assert "the caches, 0.0 MB, go into every call as inputs and come out" in note


def test_tokenizer_and_texts_go_with_the_package(tied, coremltools):
    assert (tied.folder / "tokenizer.json").is_file()
    path = str(tied.folder / names.PACKAGE)
    spec = coremltools.models.MLModel(path, skip_model_load=True).get_spec()
    metadata = spec.description.metadata
    assert metadata.shortDescription.endswith(
        "a language model: tokens in, scores of the next token out; 48 tokens of context"
    )
    told = dict(metadata.userDefined)
    assert {
        key: told[f"edgeforge.{key}"]
        for key in (
            "context_length",
            "prefill_tokens",
            "eos_token_ids",
            "recipe",
            "profile",
            "tokenizer",
        )
    } == {
        "context_length": "48",
        "prefill_tokens": "16",
        "eos_token_ids": "257",
        "recipe": "int4",
        "profile": "gpu",
        "tokenizer": "tokenizer.json",
    }
    assert "co.huggingface.exporters.name" not in told, "the hub has no such model"
    for function in spec.description.functions:
        for feature in (*function.input, *function.output, *function.state):
            assert feature.shortDescription.endswith(".")


def test_what_a_profile_changes_and_what_is_not_known_is_said(tied, package, llama_config):
    engine = package(llama_config(), "lut4-gc16", profile="ane")
    notes = " ".join(engine.manifest.notes)
    assert "no float32 arithmetic" in notes
    assert "64 positions for a context of 48, 32 columns for heads of 16" in notes
    assert (
        "norms' weights and other small ones are stored as they are and rounded to float16" in notes
    )
    assert "float16 except for norms and rotary tables" in " ".join(tied.manifest.notes)
    for artifact in (tied, engine):
        assert (
            "EdgeForge cannot verify without a Mac whether Core ML's own compiler accepts"
            in " ".join(artifact.manifest.notes)
        )
