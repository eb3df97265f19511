"""Full disks, damaged stores and signals: nothing is left half-written."""

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from edgeforge.synth import synthesise as synth
from edgeforge.synth.presets import PRESETS
from edgeforge.synth.synthesise import synthesise

QUANTIZATION, EXPORT = 4, 5


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
    assert not (small_disk.parent / "out").exists()
    assert not list(small_disk.glob("cache/stores/*"))
    assert not list(small_disk.glob("cache/stores/.*"))


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
def test_an_interrupt_halfway_leaves_nothing(large, tmp_path, cache, nothing_is_left, number, code):
    command = ["export", large, "-o", tmp_path / "out", "-q", "--threads", "1"]
    running = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "edgeforge.cli.entry",
            *map(str, command),
            "--recipe",
            "int4-g32-asym",
        ],
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
    nothing_is_left()
