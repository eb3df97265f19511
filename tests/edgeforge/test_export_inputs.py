"""What an export reads: never replaced by its output, and never mixed with what came later."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgeforge import api
from edgeforge.calibration.text import CalibrationOptions
from edgeforge.errors import CheckpointError, EdgeForgeError, UsageError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import CALIBRATION_TEXT, open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from exporters.registry import find_target

SHORT = ExportOptions("int4-g32", context=48, threads=1)
RULES = "- {match: '*', format: int8-pc}\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def synthesised(tmp_path_factory) -> Path:
    return synthesise("tiny-llama", tmp_path_factory.mktemp("synth") / "m")


@pytest.fixture
def checkpoint(synthesised, tmp_path) -> Path:
    return shutil.copytree(synthesised, tmp_path / "models" / "m")


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


PLACES = {
    "the checkpoint": ("models/m", "is the checkpoint"),
    "a link to it": ("link", "is the checkpoint"),
    "its parent": ("models", "holds the checkpoint"),
    "a folder in it": ("models/m/out", "lies in the checkpoint"),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("targets", ["onnx", "onnx,coreml", "executorch"])
@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_is_never_replaced(checkpoint, tmp_path, edgeforge, place, targets, force):
    (tmp_path / "link").symlink_to("models/m")
    # An artifact beside the checkpoint must not make its parent look like EdgeForge's own.
    (tmp_path / "models" / "onnx").mkdir()
    manifest = '{"target": "onnx", "files": {}, "schema_version": 1}'
    (tmp_path / "models" / "onnx" / "edgeforge.json").write_text(manifest)
    before = digests(tmp_path / "models")
    out, relation = PLACES[place]
    options = ["--target", targets, *(["--force"] if force else [])]
    shown = edgeforge("export", checkpoint, "-o", tmp_path / out, "-q", *options)
    assert (shown.code, shown.out) == (2, "") and shown.err.count("\n") == 1
    assert relation in shown.err
    assert digests(tmp_path / "models") == before


def test_a_checkpoint_of_the_hubs_cache_is_never_replaced(checkpoint, tmp_path):
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.move(checkpoint, repository / "blobs")
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    before = digests(repository)
    for out in (snapshot, repository, repository / "blobs", repository / "new", snapshot / "new"):
        with pytest.raises(UsageError, match=r"(is|holds|lies in) the checkpoint"):
            api.export(snapshot, out, force=True)
    assert digests(repository) == before


@pytest.mark.parametrize("what", ["calibration", "recipe", "tokenizer", "save_plan", "resume"])
def test_no_input_in_the_output_is_deleted(checkpoint, tmp_path, what):
    out = tmp_path / "out"
    api.export(checkpoint, out, recipe="int4-g32", context=48)
    name = {"calibration": "t.txt", "tokenizer": "tokenizer.json", "resume": "r"}.get(
        what, "r.yaml"
    )
    place = out / name
    if what == "calibration":
        shutil.copy(CALIBRATION_TEXT, place)
    elif what == "recipe":
        place.write_text(RULES)
    elif what == "resume":
        place.mkdir()
    before = digests(out)
    given: dict[str, object] = {what: place if what == "save_plan" else str(place)}
    if what != "recipe":
        given["recipe"] = "int4-gptq"
    with pytest.raises(UsageError, match=r"output folder .*out") as caught:
        api.export(checkpoint, out, context=48, force=True, **given)
    assert "\n" not in str(caught.value)
    assert digests(out) == before


def test_partial_results_are_not_kept_in_a_checkpoint(checkpoint, tmp_path):
    (checkpoint / "weights.safetensors").write_text("years of work")
    for folder in (checkpoint, checkpoint / "partial"):
        with pytest.raises(UsageError, match=r"--resume .* the checkpoint"):
            api.export(checkpoint, tmp_path / "out", recipe="int4-gptq", resume=folder)
    assert (checkpoint / "weights.safetensors").read_text() == "years of work"


def test_a_plan_is_not_saved_over_what_is_no_plan_of_the_users(checkpoint, tmp_path):
    file = tmp_path / "plan.yaml"
    given = {"recipe": "int8", "context": 48, "save_plan": file}
    for text, words in (("services: {}\n", "is not a recipe"), (RULES + "# mine\n", "--force")):
        file.write_text(text)
        with pytest.raises(UsageError, match=words):
            api.export(checkpoint, tmp_path / "out", **given)
        assert file.read_text() == text
    with pytest.raises(UsageError, match=r"--save-plan .* is the recipe"):
        api.export(checkpoint, tmp_path / "out", context=48, recipe=str(file), save_plan=file)
    api.export(checkpoint, tmp_path / "out", force=True, **given)
    written = file.read_text()
    assert "# mine" not in written
    api.export(checkpoint, tmp_path / "again", **given)  # the same plan once more
    assert file.read_text() == written


def in_place(path: Path) -> None:
    """Changes a byte; size and time of modification stay."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-2] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchanged(path: Path) -> None:
    """Puts another file of the same size and time in the place."""
    before, other = path.stat(), path.with_suffix(".other")
    shutil.copy2(path, other)
    in_place(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def at_stage(wanted: str, change: Callable[[], None]) -> Callable[[str, int, int], None]:
    """A progress that makes a change once, when a stage begins."""
    todo = [change]

    def progress(stage: str, done: int, size: int) -> None:
        if stage == wanted and todo:
            todo.pop()()

    return progress


def whole_stores(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "stores").glob("[!.]*"))


@pytest.mark.parametrize("stage", ["hash", "quantize", "write onnx"])
@pytest.mark.parametrize("change", [in_place, exchanged])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_checkpoint_that_changes_is_refused_and_spoils_nothing(
    checkpoint, synthesised, tmp_path, cache, name, change, stage
):
    changed = at_stage(stage, lambda: change(checkpoint / name))
    model = open_model(str(checkpoint))
    with pytest.raises(CheckpointError, match=f"{name} changed while it was read") as caught:
        export(model, [find_target("onnx")], tmp_path / "out", SHORT, changed)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    # A store that was whole before the change is of the old bytes, and may stay.
    assert whole_stores(cache) == [] or stage == "write onnx"


def test_a_store_is_never_of_other_bytes_than_its_key_says(checkpoint, tmp_path, cache):
    """The weights change while they are quantized, and are put back afterwards."""
    file = checkpoint / "model.safetensors"
    original = shutil.copy2(file, tmp_path / "original")
    model, out = open_model(str(checkpoint)), tmp_path / "out"
    with pytest.raises(CheckpointError, match="changed while it was read"):
        export(
            model, [find_target("onnx")], out, SHORT, at_stage("quantize", lambda: in_place(file))
        )
    shutil.copy2(original, file)
    export(open_model(str(checkpoint)), [find_target("onnx")], out, SHORT)
    shutil.rmtree(cache)
    again = tmp_path / "again"
    export(open_model(str(checkpoint)), [find_target("onnx")], again, SHORT)
    assert digests(out) == digests(again)


@pytest.mark.parametrize("stage", ["hash", "calibrate", "write onnx"])
def test_partial_results_of_a_checkpoint_that_changes_spoil_nothing(
    checkpoint, tmp_path, cache, stage
):
    calibration = CalibrationOptions(tokens=96, length=48)
    options = replace(SHORT, recipe="int4-gptq", calibration=calibration)
    file = checkpoint / "model.safetensors"
    original = shutil.copy2(file, tmp_path / "original")
    changed = at_stage(stage, lambda: in_place(file))
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="changed while it was read"):
        export(open_model(str(checkpoint)), [find_target("onnx")], out, options, changed)
    shutil.copy2(original, file)
    export(open_model(str(checkpoint)), [find_target("onnx")], out, options)
    shutil.rmtree(cache)
    again = tmp_path / "again"
    export(open_model(str(checkpoint)), [find_target("onnx")], again, options)
    assert digests(out) == digests(again)


@pytest.mark.parametrize("what", ["calibration text", "recipe"])
def test_a_text_or_recipe_that_changes_is_refused(checkpoint, tmp_path, what):
    text, rules = tmp_path / "text.txt", tmp_path / "rules.yaml"
    shutil.copy(CALIBRATION_TEXT, text)
    rules.write_text("- {match: '*', format: int4-g32, algorithm: gptq}\n")
    options = replace(
        SHORT, recipe=str(rules), calibration=CalibrationOptions(str(text), tokens=96, length=48)
    )
    file = text if what == "calibration text" else rules
    changed = at_stage("calibrate", lambda: in_place(file))
    with pytest.raises(UsageError, match=f"{file.name} changed while it was read") as caught:
        export(
            open_model(str(checkpoint)), [find_target("onnx")], tmp_path / "out", options, changed
        )
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_changes_while_it_is_verified_is_refused(checkpoint, tmp_path):
    (folder,) = api.export(checkpoint, tmp_path / "out", recipe="int4-g32", context=48)
    from edgeforge.verification.verify import verify
    from edgeforge.verification.verify_options import VerifyOptions

    changed = at_stage("generate", lambda: in_place(checkpoint / "model.safetensors"))
    with pytest.raises(EdgeForgeError, match="changed while it was read"):
        verify(folder, VerifyOptions(tokens=96, timed=False), changed)
    assert not (folder / "report.json").exists()


def test_a_link_that_leads_out_is_not_copied_and_that_is_said(checkpoint, tmp_path, edgeforge):
    (tmp_path / "secret").write_text("hunter2")
    (checkpoint / "chat_template.jinja").symlink_to(tmp_path / "secret")
    out = tmp_path / "out"
    shown = edgeforge("export", checkpoint, "-o", out, "--target", "onnx,coreml,executorch")
    assert shown.code == 0
    assert f"{checkpoint}/chat_template.jinja is a link to {tmp_path}/secret" in shown.err
    assert not [
        path for path in out.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()
    ]


@pytest.fixture
def read_only(cache):
    """A cache on a file system that can only be read, which holds a store already."""
    if os.geteuid() or subprocess.run(["mount", "--bind", cache, cache]).returncode:
        pytest.skip("only root may mount a folder, and not everywhere")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(cache)], check=True)
    yield cache
    subprocess.run(["umount", str(cache)], check=True)


def test_a_read_only_cache_is_read_and_a_private_one_is_written(
    checkpoint, tmp_path, cache, edgeforge, request, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    api.export(checkpoint, tmp_path / "before", recipe="int4-g32", context=48)
    request.getfixturevalue("read_only")
    options = ("--context", "48", "--recipe")
    shown = edgeforge("export", checkpoint, "-o", tmp_path / "a", *options, "int4-g32")
    assert shown.code == 0, shown.err
    private = tmp_path / f"edgeforge-{os.getuid()}"
    assert f"the cache {cache} can only be read, so {private} is used" in shown.err
    assert "quantize (cached)" in shown.err
    shown = edgeforge("export", checkpoint, "-o", tmp_path / "b", *options, "int8")
    assert shown.code == 0, shown.err
    assert len(whole_stores(private)) == 1
