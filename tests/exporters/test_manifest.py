"""The manifest reads back as it was written, and finds what happened to files since."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from edgeforge.output_folder.generated_cards import CARD, CARD_DATA
from exporters.errors import ExportError
from exporters.manifest import MANIFEST, Manifest, check_files, record_files
from exporters.manifest_records import FileRecord, ModelRecord, SourceRecord, WeightRecord

PLAIN = Manifest(
    target="onnx",
    entry="model.onnx",
    recipe="int4",
    context=64,
    source=SourceRecord("größe/модель", "/models/größe", None, "ab", {"a": "b"}),
    model=ModelRecord.from_json(
        {"vocab_size": 8, "hidden_size": 4, "eos": [1, 2], "layers": [{"num_heads": 1}]}
    ),
    bits_per_weight=4.5,
    weights={"w": WeightRecord((2, 4), "int4-g32", "rtn", 0.125, "00ff")},
    inputs={"input_ids": "int64[b, t]"},
    outputs={"logits": "float[b, 1, v]"},
    states={},
    notes=("one", "two"),
    tools={"onnx": "1"},
    files={"model.onnx": FileRecord(3, "abc")},
)


def test_it_reads_back_equal(tmp_path):
    PLAIN.write(tmp_path)
    assert Manifest.read(tmp_path) == PLAIN
    data = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    assert data["schema_version"] == 2
    assert data["source"]["model"] == "größe/модель"


def test_one_from_before_structure_was_noted_reads(tmp_path):
    PLAIN.write(tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    assert data.pop("structure") == {}
    (tmp_path / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    assert Manifest.read(tmp_path) == PLAIN


def test_a_real_one_reads_back_equal(build, openelm_config, tmp_path):
    made = build(openelm_config([2, 4], [1, 2]), "int4-g32-asym")
    made.manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == made.manifest
    assert (tmp_path / MANIFEST).read_bytes() == (made.folder / MANIFEST).read_bytes()
    weights = made.manifest.weights
    assert {name: record.digest for name, record in weights.items()} == made.store.digests
    assert weights["model.layers.1.mlp.down_proj.weight"].shape == (64, 96)
    assert weights["model.norm.weight"].format == "fp32"
    assert made.manifest.context == 48
    # The cards are renewed after the manifest was written, so it does not list them.
    apart = {MANIFEST, CARD, CARD_DATA}
    files = {path.name: path for path in made.folder.iterdir() if path.name not in apart}
    assert files.keys() == made.manifest.files.keys()
    for name, record in made.manifest.files.items():
        content = files[name].read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (record.sha256, record.size)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is no EdgeForge artifact: it has no edgeforge.json"),
        ("{", "cannot be read: "),
        ("\ufeff\x00", "cannot be read: "),
        ("[]", "has schema version None; this EdgeForge reads 2: export the model again"),
        ('{"schema_version": 3}', "has schema version 3; this EdgeForge reads 2"),
        ('{"schema_version": 2}', "is not a manifest: it has no field 'target'"),
        ('{"schema_version": 2, "files": [], "weights": {}, "notes": []}', "is not a manifest: "),
        ('{"schema_version": 2, "files": {"a": {}}, "weights": {}, "notes": []}', "not a manifest"),
        ('{"schema_version": 2, "files": {}, "weights": {}, "notes": []}', "is not a manifest: "),
        ('{"schema_version": 2, "files": {}, "weights": {}, "notes": [], "x": 1}', "not a manife"),
    ],
)
def test_what_is_no_manifest_is_refused_in_one_sentence(tmp_path, text, words):
    if text is not None:
        (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ExportError) as caught:
        Manifest.read(tmp_path)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "tökenizer files").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"12345")
    (folder / "tökenizer files" / "vocab").write_bytes(b"")
    replace(PLAIN, files=record_files(folder)).write(folder)
    return folder


def test_files_as_they_were_written(folder):
    manifest = Manifest.read(folder)
    assert set(manifest.files) == {"model.onnx", "tökenizer files/vocab"}
    digest = hashlib.sha256(b"12345").hexdigest()
    assert manifest.files["model.onnx"] == FileRecord(5, digest)
    assert check_files(folder, manifest) == []
    (folder / "report.json").write_text("{}")  # what is added later is not the artifact's
    assert check_files(folder, manifest) == []


def test_files_that_changed_went_or_shrank(folder, tmp_path):
    manifest = Manifest.read(folder)
    (folder / "model.onnx").write_bytes(b"12346")
    assert check_files(folder, manifest) == [
        "model.onnx was changed after it was written: its SHA-256 differs"
    ]
    (folder / "model.onnx").write_bytes(b"123")
    (folder / "tökenizer files" / "vocab").unlink()
    assert check_files(folder, manifest) == [
        "model.onnx has 3 bytes; 5 were written",
        "tökenizer files/vocab is missing",
    ]
    shutil.rmtree(folder / "tökenizer files")
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()
    assert check_files(folder, manifest) == [
        "model.onnx is missing",
        "tökenizer files/vocab is missing",
    ]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("source",), []),
        (("source", "model"), 1),
        (("source", "revision"), 1),
        (("source", "files"), []),
        (("model", "vocab_size"), "8"),
        (("model", "bos"), True),
        (("model", "eos"), [1, "2"]),
        (("model", "ignored_config"), "all"),
        (("weights", "w", "shape"), [2, 4.5]),
        (("weights", "w", "relative_error"), None),
        (("weights", "w", "digest"), 0),
        (("files", "model.onnx", "size"), 1.5),
        (("files", "model.onnx", "sha256"), None),
        (("calibration",), {"source": "demo", "tokens": "many"}),
        (("rotation",), {"name": "hadamard", "version": "1", "seed": 0}),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_in_one_sentence(tmp_path, place, value):
    PLAIN.write(tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    *path, last = place
    row = data
    for key in path:
        row = row[key]
    row[last] = value
    (tmp_path / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ExportError, match="is not a manifest: ") as caught:
        Manifest.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("target",), 3, "target is 3, not a text"),
        (("entry",), "../model.onnx", "it names the file '../model.onnx', which is not in its"),
        (("entry",), "/etc/passwd", "which is not in its folder"),
        (("files",), {"../../x": {"size": 1, "sha256": ""}}, "which is not in its folder"),
        (("files",), {"a\0b": {"size": 1, "sha256": ""}}, "which is not in its folder"),
        (("files",), {"a": {"size": -1, "sha256": ""}}, "size is -1"),
        (("context",), 0, "context is 0"),
        (("context",), 1, "context is 1"),
        (("context",), 2**63, "context is 9223372036854775808"),
        (("context",), True, "context is True"),
        (("bits_per_weight",), "4", "bits_per_weight is '4', not a number"),
        (("inputs",), {"a": 1}, "a is 1, not a text"),
        (("outputs",), [], "outputs is [], not a table"),
        (("states",), {"a": None}, "a is None, not a text"),
        (("tools",), {"a": []}, "a is [], not a text"),
        (("notes",), "note", "notes is 'note', not a list of texts"),
        (("notes",), [1], "notes is [1], not a list of texts"),
        (("options",), [], "options is [], not a table"),
        (("structure",), 1, "structure is 1, not a table"),
        (("schema_version",), True, "has schema version True"),
        (("weights",), {"w": {"shape": [2**62, 4]}}, "which no weight can have"),
        (("weights",), {"w": {"shape": [-1]}}, "shape is [-1], which it cannot be"),
        (("calibration",), {"tokens": 0, "length": 1, "seed": 0}, "tokens is 0"),
        (("extra" * 100,), 1, "it has the unknown field 'extraextra"),
        (("source", "model"), ["x" * 100] * 10_000, "not a text"),
    ],
)
def test_a_field_of_another_kind_is_named(folder, place, value, words):
    data = json.loads((folder / MANIFEST).read_text())
    where = data
    for key in place[:-1]:
        where = where[key]
    where[place[-1]] = value
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(ExportError) as caught:
        Manifest.read(folder)
    assert words in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "is nested too deep"),
        ('{"schema_version": ' + "9" * 5000 + "}", "a whole number has 5000 digits"),
        ('{"context": NaN}', "NaN is not JSON"),
        ('{"target": "a", "target": "b"}', "the key 'target' occurs twice"),
        ('{"target": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_hostile_manifest_is_refused(tmp_path, text, words):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ExportError, match=words):
        Manifest.read(tmp_path)


def test_a_manifest_and_files_that_are_no_files(folder):
    manifest = Manifest.read(folder)
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    words = "model.onnx cannot be read: it is a named pipe, and EdgeForge reads regular files only"
    assert check_files(folder, manifest) == [words]
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to("/dev/zero")
    with pytest.raises(ExportError, match="it is a device"):
        Manifest.read(folder)
