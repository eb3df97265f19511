"""Artifacts that were altered, and what run and verify cannot do with them."""

import json
import shutil

import pytest

from edgeforge.synth.synthesise import synthesise

USAGE, CHECKPOINT, EXPORT, DEVICE = 2, 3, 5, 6
QKV = "model.layers.0.self_attn.qk_proj.weight"


def test_spaces_and_letters_of_all_alphabets_in_paths(sound, edgeforge, monkeypatch, tmp_path):
    place = tmp_path / "größe und 漢字 ёж"
    monkeypatch.setenv("EDGEFORGE_CACHE", str(place / "der cache"))
    source = shutil.copytree(sound, place / "mein modell")
    out, text = place / "neue ordner" / "artefakt é", place / "ein text.txt"
    text.write_text("größe und 漢字", encoding="utf-8")
    assert edgeforge("export", source, "-o", out, "-q").code == 0
    report = edgeforge("verify", out, "--text", text, "--no-timed", "-q", "--json")
    assert report.code == 0 and json.loads(report.out)[0]["text"] == text.name
    assert edgeforge("verify", out, "-q", "--tokens", "64").code == 0
    shown = edgeforge("inspect", out)
    assert shown.code == 0 and str(out) in shown.out
    assert edgeforge("run", out, "-p", "größe 漢字", "-n", "4").code == 0
    assert list((place / "der cache" / "stores").iterdir())


@pytest.mark.usefixtures("warm")
def test_no_tokenizer_exports_and_verifies_but_does_not_run(checkpoint, edgeforge, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    out = tmp_path / "art"
    assert edgeforge("export", checkpoint, "-o", out, "-q").code == 0
    assert edgeforge("verify", out, "-q", "--no-timed", "--tokens", "64").code == 0
    (tmp_path / "t.txt").write_text("some text")
    for command in (("run", out, "-p", "x"), ("verify", out, "-q", "--text", tmp_path / "t.txt")):
        shown = edgeforge(*command)
        assert (shown.code, shown.out) == (CHECKPOINT, "")
        assert shown.err.count("\n") == 1 and "--tokenizer PATH" in shown.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-p", "x" * 600), "the prompt has 601 tokens"),
        (("-p", "x", "--temperature", "-1"), "--temperature -1.0 must be between 0 and 100"),
        (("-p", "x", "--temperature", "101"), "--temperature 101.0"),
        (("-p", "x", "--temperature", "nan"), "--temperature nan"),
        (("-p", "x", "--top-p", "0"), "--top-p 0.0 must be above 0"),
        (("-p", "x", "--top-p", "1.5"), "--top-p 1.5"),
        (("-p", "caf\udce9"), "is not UTF-8 text: give the prompt in UTF-8"),
    ],
)
def test_what_run_cannot_do_is_refused(sound_artifact, refuses, options, words):
    refuses(USAGE, words, command=("run", sound_artifact, *options))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.onnx.data", "flip", "model.onnx.data was changed after it was written"),
        ("model.onnx", "cut", "model.onnx has"),
        ("tokenizer.json", "remove", "tokenizer.json is missing"),
    ],
)
def test_an_altered_artifact_fails_its_checks(artifact, edgeforge, name, change, words):
    file = artifact / name
    if change == "remove":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data if change == "flip" else data[:-1])
    for command in ("verify", "inspect"):
        shown = edgeforge(command, artifact, *(["-q"] if command == "verify" else []))
        assert shown.code == 1 and words in shown.err and shown.err.count("\n") == 1
    assert shown.out  # inspect shows what it can all the same
    data = edgeforge("inspect", artifact, "--json")
    assert data.code == 1 and words in json.loads(data.out)["problems"][0]
    assert not (artifact / "report.json").exists()


def test_weights_that_are_not_the_stores_fail_the_check(artifact, edgeforge):
    """The files are as the manifest says, and still not what was quantized."""
    manifest = json.loads((artifact / "edgeforge.json").read_text())
    manifest["weights"][QKV]["digest"] = "0" * 32
    (artifact / "edgeforge.json").write_text(json.dumps(manifest))
    for command in (("verify", artifact, "-q"), ("inspect", artifact)):
        shown = edgeforge(*command)
        assert shown.code == 1 and shown.err.count("\n") == 1
        assert f"{QKV} has other integers or scales in the files than" in shown.err


def test_another_checkpoint_is_refused(sound_artifact, refuses, tmp_path):
    other = synthesise("tiny-llama", tmp_path / "other", seed=1)
    command = ("verify", sound_artifact, "-q", "--checkpoint", other)
    refuses(USAGE, "is not the checkpoint that the artifact was made of", command=command)


@pytest.mark.parametrize("version", [0, 1, None, "2"])
def test_an_artifact_of_another_version_is_refused(artifact, refuses, version):
    manifest = json.loads((artifact / "edgeforge.json").read_text())
    (artifact / "edgeforge.json").write_text(json.dumps({**manifest, "schema_version": version}))
    for command in (("verify", artifact, "-q"), ("inspect", artifact), ("run", artifact, "-p", "")):
        refuses(EXPORT, f"has schema version {version!r}; this EdgeForge reads 2", command=command)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"schema_version": 2}'])
def test_a_manifest_that_is_none_is_refused(artifact, refuses, content):
    (artifact / "edgeforge.json").write_bytes(content)
    refuses(EXPORT, "edgeforge.json", command=("inspect", artifact))


def test_a_folder_that_is_no_artifact_is_refused(tmp_path, refuses):
    for command in (("verify", tmp_path), ("inspect", tmp_path), ("run", tmp_path, "-p", "x")):
        refuses(EXPORT, "is no EdgeForge artifact: it has no edgeforge.json", command=command)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"", "holds no text"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a", "has 1 tokens; at least 2 are needed"),
    ],
)
def test_a_text_that_cannot_be_reported_on_is_refused(
    sound_artifact, refuses, tmp_path, content, words
):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    refuses(USAGE, words, command=("verify", sound_artifact, "-q", "--text", file))


def test_a_model_that_the_runtime_refuses_is_a_device_error(artifact, edgeforge):
    (artifact / "model.onnx").write_bytes(b"no model")
    shown = edgeforge("run", artifact, "-p", "x")
    assert shown.code == DEVICE and shown.err.count("\n") == 1
    assert "onnxruntime cannot load" in shown.err
