"""Files that change while they are read are noticed, however alike they are made to look."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.checkpoint.source_files import SourceFiles
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.synth.synthesise import synthesise


def one_byte(path: Path) -> None:
    """In place, and with the old size and time of modification."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def another_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    before = path.stat()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


CHANGES = {
    "one byte": one_byte,
    "another file": another_file,
    "grown": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "touched": lambda path: os.utime(path),
    "removed": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(tmp_path, change):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    files = SourceFiles()
    files.watch([path])
    files.require_unchanged()
    CHANGES[change](path)
    with pytest.raises(CheckpointError, match=r"/a (changed|was removed) while it was read"):
        files.require_unchanged()


def test_a_change_right_after_another_is_noticed_too(tmp_path):
    """File systems note times in steps, within which two changes look the same."""
    path = tmp_path / "a"
    for turn in range(20):
        path.write_bytes(b"%05d" % turn)
        files = SourceFiles()
        files.watch([path])
        path.write_bytes(b"!%04d" % turn)
        with pytest.raises(CheckpointError):
            files.require_unchanged()


def test_a_file_that_is_absent_must_stay_absent(tmp_path):
    files = SourceFiles(UsageError)
    files.watch([tmp_path / "a"])
    files.require_unchanged()
    (tmp_path / "a").touch()
    with pytest.raises(UsageError, match="appeared while it was read"):
        files.require_unchanged()


def test_an_old_file_is_not_waited_for(tmp_path):
    path = tmp_path / "a"
    path.touch()
    time.sleep(0.03)
    begun = time.perf_counter()
    SourceFiles().watch([path])
    assert time.perf_counter() - begun < 0.015


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "generation_config.json",
    ],
)
def test_a_digest_is_of_the_files_that_were_opened(tmp_path, monkeypatch, name):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    folder = synthesise("tiny-llama", tmp_path / "m", shards=2)
    opened = Checkpoint.open(folder)
    opened.digest()
    one_byte(folder / name)
    with pytest.raises(CheckpointError, match=f"{name} changed while it was read") as caught:
        opened.digest()
    assert caught.value.exit_code == 3
