"""Which files count as EdgeForge's: those that its manifest lists, and none beside."""

from __future__ import annotations

import json
import os

import pytest

from edgeforge.output_folder.contents import (
    SYNTH_RECORD,
    remove_known,
    strange_file,
    strange_left_over,
)
from edgeforge.synth.synthesise import synthesise

FILES = ("model.onnx", "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin", "vocab.json")


def test_an_artifact_with_its_report_holds_nothing_strange(tmp_path, artifact):
    folder = artifact(tmp_path / "a", *FILES)
    for name in ("report.json", ".DS_Store", "model.mlpackage/.DS_Store"):
        (folder / name).touch()
    (folder / "an empty folder").mkdir()
    assert strange_file(folder) is None


@pytest.mark.parametrize(
    "name", ["thesis.txt", "model.safetensors", "model.mlpackage/mine.bin", ".hidden", "sub/a"]
)
def test_a_file_that_the_manifest_does_not_list_is_strange(tmp_path, artifact, name):
    folder = artifact(tmp_path / "a", *FILES)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    assert strange_file(folder) == name
    assert not remove_known(folder, strange_file)
    assert (folder / name).exists() and (folder / "model.onnx").exists()


def test_what_is_no_ordinary_file_is_strange_under_a_known_name_too(tmp_path, artifact):
    for number, put in enumerate(
        (lambda path: path.symlink_to("vocab.json"), lambda path: os.mkfifo(path))
    ):
        folder = artifact(tmp_path / str(number), *FILES)
        (folder / "model.onnx").unlink()
        put(folder / "model.onnx")
        assert strange_file(folder) == "model.onnx"


@pytest.mark.parametrize(
    "manifest", ["", "{", "[]", "old", '{"files": {}', "[" * 100_000, '{"name": "an app"}']
)
def test_a_file_that_only_bears_the_manifests_name_is_strange(tmp_path, manifest):
    (tmp_path / "edgeforge.json").write_text(manifest)
    assert strange_file(tmp_path) == "edgeforge.json"


def test_a_manifest_that_lists_no_files_makes_files_known_by_name(tmp_path, artifact):
    folder = artifact(tmp_path / "a", "model.pte", "tokenizer.json", "config.json")
    manifest = json.loads((folder / "edgeforge.json").read_text())
    del manifest["files"]
    (folder / "edgeforge.json").write_text(json.dumps({**manifest, "schema_version": 0}))
    assert strange_file(folder) is None
    (folder / "notes.md").touch()
    assert strange_file(folder) == "notes.md"


def test_artifacts_of_several_targets_bear_their_targets_names(tmp_path, artifact):
    out = tmp_path / "out"
    for target in ("onnx", "coreml"):
        artifact(out / target, "model", target=target)
    assert strange_file(out) is None
    (out / ".DS_Store").touch()
    assert strange_file(out) is None
    artifact(out / "my-int8", "model", target="onnx")
    assert strange_file(out) == "my-int8/edgeforge.json"


@pytest.mark.parametrize("name", ["thesis.txt", "model/config.json", "onnx/thesis.txt"])
def test_a_file_beside_artifacts_is_strange(tmp_path, artifact, name):
    out = tmp_path / "out"
    artifact(out / "onnx", "model", target="onnx")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).touch()
    assert strange_file(out) == name


def test_a_link_in_the_place_of_a_targets_folder_is_strange(tmp_path, artifact):
    out = tmp_path / "out"
    artifact(out / "coreml", "model", target="coreml")
    artifact(tmp_path / "onnx", "model", target="onnx")
    (out / "onnx").symlink_to(tmp_path / "onnx")
    assert strange_file(out) == "onnx"


def test_an_artifact_in_an_artifact_is_strange(tmp_path, artifact):
    artifact(tmp_path / "out", "model")
    artifact(tmp_path / "out" / "onnx", "model")
    assert strange_file(tmp_path / "out") == "onnx/edgeforge.json"


def test_a_checkpoint_is_known_by_the_record_that_it_was_synthesised(tmp_path):
    folder = synthesise("tiny-llama", tmp_path / "tiny")
    assert strange_file(folder) is None
    (folder / "chat_template.jinja").touch()
    assert strange_file(folder) == "chat_template.jinja"
    (folder / "chat_template.jinja").unlink()
    file = folder / "model.safetensors"
    before = file.stat()
    for content in (file.read_bytes(), file.read_bytes() + b" "):  # as if a trained one were saved
        file.write_bytes(content)
        assert strange_file(folder) == "model.safetensors"
    os.truncate(file, before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert strange_file(folder) is None
    (folder / SYNTH_RECORD).unlink()
    assert strange_file(folder) == "config.json"


def test_unfinished_folders_hold_what_targets_write(tmp_path, artifact):
    folder = tmp_path / ".out.partial-1"
    for name in (*FILES, "onnx/model.onnx.data", "coreml/config.json", "executorch/model.pte"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert strange_left_over(folder) is None
    (folder / "onnx" / "thesis.txt").touch()
    assert strange_left_over(folder) == "onnx/thesis.txt"


def test_what_is_known_is_removed_to_the_last_folder(tmp_path, artifact):
    folder = artifact(tmp_path / "a", *FILES)
    assert remove_known(folder, strange_file)
    assert list(tmp_path.iterdir()) == []
