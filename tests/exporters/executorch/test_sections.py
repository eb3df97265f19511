"""What `inspect` says of a .pte is read from the file: delegates, operators, weights and bytes."""

from __future__ import annotations

from collections import Counter

import pytest

from exporters.executorch import state
from exporters.executorch.reader import read_parts, read_pte
from exporters.executorch.structure import structure_of
from exporters.executorch.tensors import file_tensors
from exporters.structure import to_json


@pytest.fixture(scope="module")
def artifact(pte, llama_config, tmp_path_factory):
    recipe = tmp_path_factory.mktemp("recipe") / "mixed.yaml"
    recipe.write_text(
        "- {match: embedding, format: int8-pc}\n- {match: '*o_proj*', format: int4-pc}\n"
        "- {match: '*down*', format: fp16}\n- {match: '*', format: int4-g32}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "SMALL", 0)
        yield pte(llama_config(rms_norm_eps=3e-5), str(recipe))


@pytest.fixture(scope="module")
def sections(artifact):
    return to_json(structure_of(read_pte(artifact.folder / "model.pte")))


def test_delegates_of_each_method(sections):
    rows = sections["Delegates"]
    for method in ("forward", "logits_all"):
        found = [row for row in rows if row["method"] == method]
        assert sum(row["delegates"] for row in found) == 3  # one more than layers
        assert {row["backend"] for row in found} == {"XnnpackBackend"}
        weights = Counter()
        for row in found:
            for words in row["weights in each"].split(", "):
                count, name = words.split()
                weights[name] += int(count) * row["delegates"]
        # qk, v, gate and up of each layer and the head; o; down.
        assert (weights["int4-g32"], weights["int4-pc"], weights["fp16"]) == (7, 2, 2)


def test_every_call_outside_of_them_is_counted(artifact, sections):
    rows = sections["Operators outside delegates"]
    counts = {row["operator"]: row["calls"] for row in rows if row["method"] == "logits_all"}
    assert counts["llama::custom_sdpa.out"] == 2 and counts["llama::update_cache.out"] == 4
    assert counts["quantized_decomposed::embedding_byte.dtype_out"] == 1
    program = read_pte(artifact.folder / "model.pte").program
    calls = sum(
        row["instr_args"].table == "KernelCall"
        for plan in program["execution_plan"]
        for row in plan["chains"][0]["instructions"]
    )
    assert sum(row["calls"] for row in rows) == calls


def test_weights_are_those_of_the_store(artifact, sections):
    rows = {
        (row["read by"], row["format"]): row for row in sections["Weights as the file holds them"]
    }
    table = rows["quantized_decomposed::embedding_byte", "int8-pc"]
    assert (table["tensors"], table["parameters"]) == (1, 320 * 64)
    assert table["bytes"] == 320 * 64 + 2 * 320
    grouped = rows["XnnpackBackend", "int4-g32"]
    assert grouped["parameters"] == 2 * (128 + 192) * 64 + 320 * 64
    assert grouped["bytes"] == grouped["parameters"] * 4.5 / 8
    halves = rows["XnnpackBackend", "fp16"]
    assert halves["bytes"] == 2 * halves["parameters"] == 2 * 2 * 64 * 96
    # The places are those that the reader of EdgeForge's own names finds.
    pte = read_pte(artifact.folder / "model.pte")
    named = {
        place.offset for parts in read_parts(pte).values() for p in parts.values() for place in p
    }
    read = {stored.offset for tensor in file_tensors(pte) for stored in tensor.parts.values()}
    assert named <= read


def test_segments_are_the_whole_file(artifact, sections):
    rows = sections["Segments"]
    pte = read_pte(artifact.folder / "model.pte")
    assert sum(row["segments"] for row in rows) == len(pte.segments)
    assert sum(row["bytes"] for row in rows) == sum(size for _, size in pte.segments)
    kinds = {row["what"]: row["segments"] for row in rows}
    assert kinds["constants of kernels"] == 1
    assert set(kinds) == {"constants of kernels", "programs of delegates", "weights of delegates"}


def test_the_manifest_holds_it_too(artifact, sections):
    assert artifact.manifest.structure == sections


def test_weights_in_a_file_of_their_own(pte, llama_config):
    made = pte(llama_config(tie_word_embeddings=True), "int4-g32", weights="external")
    sections = to_json(structure_of(read_pte(made.folder / "model.pte")))
    rows = {row["what"]: row for row in sections["Segments"]}
    size = (made.folder / "model.ptd").stat().st_size
    assert 0 < size - rows["weights in model.ptd"]["bytes"] < 10_000
    readers = {row["read by"] for row in sections["Weights as the file holds them"]}
    assert readers == {"XnnpackBackend", "quantized_decomposed::embedding_4bit"}
