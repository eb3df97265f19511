"""Bad input from end to end: one clear sentence, the right exit code, nothing half-written."""

import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeforge import api, cli, synth
from edgeforge.synth import synthesise
from edgeforge.synth_presets import PRESETS

USAGE, CHECKPOINT, QUANTIZATION, EXPORT, DEVICE = 2, 3, 4, 5, 6
QKV = "model.layers.0.self_attn.qkv_proj.weight"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def sound(shared):
    """A sound checkpoint that no test may spoil."""
    return synthesise("tiny-llama", shared / "sound")


@pytest.fixture(scope="module")
def sound_artifact(shared, sound):
    """An artifact that no test may spoil; its store lies in the shared cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(shared / "cache"))
        return api.export(sound, shared / "artifact")[0]


@pytest.fixture
def checkpoint(sound, tmp_path):
    """A checkpoint to spoil."""
    return shutil.copytree(sound, tmp_path / "checkpoint")


@pytest.fixture
def artifact(sound_artifact, tmp_path):
    """An artifact to spoil."""
    return shutil.copytree(sound_artifact, tmp_path / "artifact")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def warm(monkeypatch, shared):
    """The shared cache, in which the sound checkpoint is quantized already."""
    monkeypatch.setenv("EDGEFORGE_CACHE", str(shared / "cache"))


@pytest.fixture
def edgeforge(monkeypatch, capfd):
    """Runs a command in this process: its exit code, stdout and stderr."""

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["edgeforge", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def refuses(edgeforge, tmp_path, cache):
    """Runs a command that must fail in one line, with a code and words, and leave nothing."""

    def run(code: int, *words: str, command: tuple[object, ...]) -> str:
        shown = edgeforge(*command)
        assert shown.err.startswith("edgeforge: ") and shown.err.count("\n") == 1, shown.err
        assert "Traceback" not in shown.err
        assert shown.code == code, shown.err
        for word in words:
            assert word in shown.err
        assert shown.out == ""
        nothing_is_left(tmp_path / "out", cache)
        return shown.err

    return run


def nothing_is_left(out: Path, cache: Path) -> None:
    """Neither the output nor a piece of it, nor a piece of a store."""
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    stores = cache / "stores"
    assert not stores.exists() or list(stores.iterdir()) == []


@pytest.fixture
def export(refuses, tmp_path):
    """Exports something that must be refused."""

    def run(source: object, code: int, *words: str, options: tuple[object, ...] = ()) -> str:
        command = ("export", source, "--out", tmp_path / "out", "-q", *options)
        return refuses(code, *words, command=command)

    return run


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def change_tensors(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def write_header(folder: Path, header: object, data: int = 64) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


# Files


def test_a_missing_shard_is_named(tmp_path, export):
    folder = synthesise("tiny-llama", tmp_path / "sharded", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    export(folder, CHECKPOINT, "model-00002-of-00003.safetensors is missing", "index lists it")


def test_a_truncated_shard_is_named(tmp_path, export):
    folder = synthesise("tiny-llama", tmp_path / "sharded", shards=3)
    shard = folder / "model-00003-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    export(folder, CHECKPOINT, str(shard), "10")


def test_a_shard_without_the_tensor_its_index_promises_is_named(tmp_path, export):
    folder = synthesise("tiny-llama", tmp_path / "sharded", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    export(folder, CHECKPOINT, "model-00001-of-00002.safetensors", "model.norm.weight")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}, "a"),
        (
            {
                "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
            },
            "overlap",
        ),
        ({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 64]}}, "a"),
        ({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "a"),
        (b"{not json", "JSON"),
        (b"[]", "JSON object"),
    ],
    ids=["outside", "overlapping", "huge", "negative", "no JSON", "a list"],
)
def test_a_safetensors_header_that_lies_is_refused(checkpoint, export, header, words):
    write_header(checkpoint, header)
    export(checkpoint, CHECKPOINT, "model.safetensors", words)


@pytest.mark.parametrize("length", [0, 7, 1 << 40, (1 << 64) - 1])
def test_a_header_of_a_false_length_is_refused(checkpoint, export, length):
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    export(checkpoint, CHECKPOINT, "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(checkpoint, export, content):
    (checkpoint / "config.json").write_bytes(content)
    export(checkpoint, CHECKPOINT, "config.json")


def test_no_config_is_refused(checkpoint, export):
    (checkpoint / "config.json").unlink()
    export(checkpoint, CHECKPOINT, "config.json is missing")


def test_a_folder_without_weights_says_what_it_has(checkpoint, export):
    (checkpoint / "model.safetensors").rename(checkpoint / "model.gguf")
    export(checkpoint, CHECKPOINT, "has no weights", "model.gguf")


def test_an_empty_folder_and_a_file_are_no_checkpoints(tmp_path, export):
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", CHECKPOINT, "is not a checkpoint: it has no config.json")
    (tmp_path / "file").touch()
    export(tmp_path / "file", CHECKPOINT, "is a file; name the folder")
    export(tmp_path / "nowhere", CHECKPOINT, "neither a folder here nor a hub id")


def test_a_pickle_that_would_run_code_runs_none(checkpoint, tmp_path, export):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (checkpoint / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(128)}, checkpoint / "pytorch_model.bin")
    export(checkpoint, CHECKPOINT, "lacks")  # such a file is read
    torch.save({"a": Bomb()}, checkpoint / "pytorch_model.bin")
    export(checkpoint, CHECKPOINT, "pytorch_model.bin")
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb()}))
    export(checkpoint, CHECKPOINT, "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


def test_a_hub_id_offline_says_what_is_missing(tmp_path):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "EDGEFORGE_CACHE": str(tmp_path / "cache"),
    }
    shown = subprocess.run(
        [sys.executable, "-m", "edgeforge.cli", "export", "org/model", "-o", tmp_path / "out"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == CHECKPOINT and shown.stdout == ""
    assert shown.stderr.count("\n") == 1
    assert "org/model at revision main is not in the cache" in shown.stderr
    assert "HF_HUB_OFFLINE is set" in shown.stderr and "hf download org/model" in shown.stderr
    nothing_is_left(tmp_path / "out", tmp_path / "cache")


# What the config and the tensors say


def test_an_unknown_model_type_lists_those_known(checkpoint, export):
    change_config(checkpoint, model_type="lama")
    shown = export(checkpoint, CHECKPOINT, "model_type 'lama'", "did you mean 'llama'?")
    assert all(family in shown for family in ("llama", "mistral", "openelm", "phi3"))
    change_config(checkpoint, model_type=None)
    export(checkpoint, CHECKPOINT, "model_type None")


def test_a_field_that_changes_the_maths_is_named(checkpoint, export):
    change_config(checkpoint, clip_qkv=8.0)
    export(checkpoint, CHECKPOINT, "'clip_qkv'", "--ignore-config clip_qkv")


def test_a_missing_tensor_is_named(checkpoint, export):
    change_tensors(checkpoint, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    export(checkpoint, CHECKPOINT, "lacks model.layers.1.mlp.up_proj.weight")


def test_an_extra_tensor_is_named(checkpoint, export):
    change_tensors(checkpoint, lambda t: t.update({"model.layers.0.bias": torch.ones(3)}))
    export(checkpoint, CHECKPOINT, "holds model.layers.0.bias")


def test_a_tensor_of_another_shape_is_named(checkpoint, export):
    change_tensors(checkpoint, lambda t: t.update({"model.norm.weight": torch.ones(127)}))
    export(checkpoint, CHECKPOINT, "model.norm.weight has shape [127]", "calls for [128]")


def test_a_tensor_of_another_dtype_is_named(checkpoint, export):
    ones = torch.ones(128, dtype=torch.int8)
    change_tensors(checkpoint, lambda t: t.update({"model.norm.weight": ones}))
    export(checkpoint, CHECKPOINT, "model.norm.weight is int8", "bfloat16, float16, float32")


@pytest.mark.parametrize("recipe", ["int4", "int8", "fp16"])
@pytest.mark.parametrize(("bad", "words"), [(torch.nan, "NaN"), (torch.inf, "an infinite value")])
def test_what_is_not_finite_is_named_with_its_row(checkpoint, export, bad, words, recipe):
    def spoil(tensors):
        # Rows of q come first (4 heads of 32), then those of k: row 5 of k is row 133 of all.
        tensors["model.layers.0.self_attn.k_proj.weight"][5, 7] = bad

    change_tensors(checkpoint, spoil)
    options = ("--recipe", recipe)
    export(checkpoint, QUANTIZATION, f"{QKV} has {words} in row 133", options=options)


def test_a_norm_that_is_not_finite_is_named(checkpoint, export):
    change_tensors(checkpoint, lambda t: t["model.norm.weight"].__setitem__(9, torch.nan))
    export(checkpoint, QUANTIZATION, "model.norm.weight has NaN")


def test_what_float16_cannot_hold_is_named(checkpoint, export):
    def spoil(tensors):
        tensors["model.embed_tokens.weight"][300, 0] = 1e6

    change_tensors(checkpoint, spoil)
    options = ("--recipe", "fp16")
    export(checkpoint, QUANTIZATION, "model.embed_tokens.weight", "row 300", options=options)


# Options


def test_groups_that_do_not_divide_are_refused_as_the_style_guide_says(tmp_path, export):
    folder = synthesise("tiny-phi-3", tmp_path / "phi")
    options = ("--recipe", "int4-g64")
    shown = export(folder, QUANTIZATION, options=options)
    assert shown == (
        "edgeforge: model.embed_tokens.weight has 96 input columns; int4-g64 needs a multiple of "
        "group_size 64: use group_size 48 or keep it int8-pc\n"
    )


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--recipe", "int-4"), QUANTIZATION, "no recipe 'int-4' (did you mean 'int4'?)"),
        (("--target", "onxn"), EXPORT, "no target 'onxn' (did you mean 'onnx'?)"),
        (("--target", ""), EXPORT, "no target ''"),
        (("--target", "onnx,"), EXPORT, "no target ''"),
        (("--context", "1"), USAGE, "--context 1 is not possible: this model takes 2 to 512"),
        (("--context", "513"), USAGE, "--context 513 is not possible"),
        (("--context", "-5"), USAGE, "--context -5"),
        (("--context", "many"), USAGE, "'--context'"),
        (("--revision", "main"), USAGE, "is a folder, which has no revision 'main'"),
        (("--tokenizer", "/nowhere"), CHECKPOINT, "the tokenizer '/nowhere' is neither"),
        (("--recipe", "/nowhere.yaml"), QUANTIZATION, "/nowhere.yaml cannot be read"),
    ],
)
def test_options_that_cannot_be_met_are_refused(sound, export, options, code, words):
    export(sound, code, words, options=options)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("- {match: *, format: int4-g32}", "is not YAML at line 1, column 12"),
        ("- {match: '*', format: int5}", "rule 1: 'int5' is not a weight format"),
        ("- {match: '*mlp*', format: int4-g32}", "end it with a rule for '*'"),
        (
            "- {match: 'model.layers.7.*', format: fp16}\n- {match: '*', format: int8-pc}",
            "no weight is left for the rule 'model.layers.7.*'",
        ),
        ("- {match: '*', format: int4-g32, algorithm: gptq}", "no algorithm 'gptq'"),
        ("- {match: '*', format: int4-g48}", "group_size 48"),
    ],
)
def test_recipe_files_that_do_not_fit_are_refused(sound, export, tmp_path, rules, words):
    file = tmp_path / "my recipe.yaml"
    file.write_text(rules)
    export(sound, QUANTIZATION, words, options=("--recipe", file))


def test_groups_that_the_kernels_lack_are_refused_before_any_work(sound, export, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("- {match: '*', format: int4-g8}")
    export(sound, EXPORT, "groups of 8", "16, 32, 64, 128", options=("--recipe", file))


def test_a_file_in_the_outputs_place_is_refused(sound, edgeforge, tmp_path):
    (tmp_path / "out").write_text("mine")
    shown = edgeforge("export", sound, "-o", tmp_path / "out", "-q", "--force")
    assert shown.code == USAGE and "is a file: name a folder" in shown.err
    assert (tmp_path / "out").read_text() == "mine"


def test_force_spares_a_folder_that_is_no_artifact(sound, edgeforge, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    shown = edgeforge("export", sound, "-o", tmp_path / "out", "-q", "--force")
    assert shown.code == USAGE and shown.err.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.usefixtures("warm")
def test_an_old_artifact_outlives_a_failed_replacement(checkpoint, artifact, edgeforge):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in artifact.iterdir())
    change_tensors(checkpoint, lambda t: t["model.norm.weight"].__setitem__(0, torch.nan))
    shown = edgeforge("export", checkpoint, "-o", artifact, "-q", "--force")
    assert shown.code == QUANTIZATION
    assert sorted((p.name, p.stat().st_mtime_ns) for p in artifact.iterdir()) == before
    assert sorted(p.name for p in artifact.parent.iterdir()) == ["artifact", "checkpoint"]


# Disks


@pytest.fixture
def small_files():
    """Stands in for a full disk: no file may grow past 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("sound", "small_files")
def test_a_full_cache_is_named(sound, export, cache):
    export(sound, EXPORT, f"the cache of weight stores {cache}/stores has no room", "File too larg")


@pytest.mark.usefixtures("sound_artifact", "warm", "small_files")
def test_a_full_output_is_named(sound, export, tmp_path):
    export(sound, EXPORT, f"{tmp_path}/out could not be written", "nothing was left there")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system, and not everywhere")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("sound_artifact", "warm")
def test_a_real_disk_that_is_full_is_left_empty(sound, edgeforge, monkeypatch, small_disk):
    shown = edgeforge("export", sound, "-o", small_disk / "out", "-q")
    assert shown.code == EXPORT and shown.err.count("\n") == 1
    assert "No space left on device" in shown.err
    assert list(small_disk.iterdir()) == []
    monkeypatch.setenv("EDGEFORGE_CACHE", str(small_disk / "cache"))
    shown = edgeforge("export", sound, "-o", small_disk.parent / "out", "-q")
    assert shown.code == EXPORT and shown.err.count("\n") == 1
    assert f"{small_disk}/cache/stores has no room" in shown.err
    nothing_is_left(small_disk.parent / "out", small_disk / "cache")


def test_a_cache_that_is_no_folder_is_refused(sound, edgeforge, cache, tmp_path):
    cache.write_text("a file")
    shown = edgeforge("export", sound, "-o", tmp_path / "out", "-q")
    assert shown.code == QUANTIZATION and shown.err.count("\n") == 1
    assert "cannot be written" in shown.err and "EDGEFORGE_CACHE" in shown.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_store_is_made_again(sound, edgeforge, cache, tmp_path):
    assert edgeforge("export", sound, "-o", tmp_path / "first", "-q").code == 0
    (store,) = (cache / "stores").iterdir()
    os.truncate(store / "weights.safetensors", 1000)
    assert edgeforge("export", sound, "-o", tmp_path / "second", "-q").code == 0
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


# Interrupts


@pytest.fixture(scope="module")
def large(shared):
    """A checkpoint that takes seconds to quantize."""
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 5,
    }
    preset = PRESETS["tiny-llama2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synth.PRESETS, "large", replace(preset, config={**preset.config, **sizes}))
        return synthesise("large", shared / "large")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_halfway_leaves_nothing(large, tmp_path, cache, number, code):
    command = ["export", large, "-o", tmp_path / "out", "-q", "--threads", "1"]
    running = subprocess.Popen(
        [sys.executable, "-m", "edgeforge.cli", *map(str, command), "--recipe", "int4-g32-asym"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stores = cache / "stores"
    try:
        patience = time.monotonic() + 100
        while not list(stores.glob(".*.partial-*/weights.safetensors")):
            assert running.poll() is None and time.monotonic() < patience
            time.sleep(0.002)
        assert list(tmp_path.glob(".out.partial-*"))
        running.send_signal(number)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert (running.returncode, out) == (code, "")
    assert err == "edgeforge: interrupted; nothing was left half-written\n"
    nothing_is_left(tmp_path / "out", cache)


# Names


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


# Artifacts


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
        (("-p", "caf\udce9"), "the prompt is not UTF-8 text"),
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
        assert f"{QKV} differs from the weight store" in shown.err


def test_another_checkpoint_is_refused(sound_artifact, refuses, tmp_path):
    other = synthesise("tiny-llama", tmp_path / "other", seed=1)
    command = ("verify", sound_artifact, "-q", "--checkpoint", other)
    refuses(USAGE, "is not the checkpoint that the artifact was made of", command=command)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_an_artifact_of_another_version_is_refused(artifact, refuses, version):
    manifest = json.loads((artifact / "edgeforge.json").read_text())
    (artifact / "edgeforge.json").write_text(json.dumps({**manifest, "schema_version": version}))
    for command in (("verify", artifact, "-q"), ("inspect", artifact), ("run", artifact, "-p", "")):
        refuses(EXPORT, f"has schema version {version!r}; this EdgeForge reads 1", command=command)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"schema_version": 1}'])
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
