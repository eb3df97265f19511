"""Digests against sha256sum, and the cache that spares the second hashing."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgeforge.cache import cache_dir
from edgeforge.checkpoint import digest as digest_module
from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.errors import CheckpointError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"a": torch.randn(1500, 1000)}, path / "model.safetensors")
    return path


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are really read."""
    names: list[str] = []
    real = digest_module.hash_file

    def hash_and_note(path, *rest):
        names.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(digest_module, "hash_file", hash_and_note)
    return names


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_digests_are_those_of_sha256sum(folder):
    digest = Checkpoint.open(folder).digest()
    names = ["config.json", "model.safetensors"]
    lines = subprocess.run(
        ["sha256sum", *names], cwd=folder, capture_output=True, check=True
    ).stdout
    assert [f"{f.sha256}  {f.name}" for f in digest.files] == lines.decode().splitlines()
    assert [f.size for f in digest.files] == [(folder / n).stat().st_size for n in names]
    overall = subprocess.run(["sha256sum"], input=lines, capture_output=True, check=True).stdout
    assert digest.sha256 == overall.decode().split()[0]


def test_a_second_run_hashes_nothing_and_says_the_same(folder, hashed):
    first = Checkpoint.open(folder).digest()
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    seen = []
    assert Checkpoint.open(folder).digest(lambda done, total: seen.append((done, total))) == first
    assert len(hashed) == 2
    size = sum(file.size for file in first.files)
    assert seen[-1] == (size, size)


def test_a_change_of_one_byte_is_seen_even_with_the_old_time_and_size(folder, hashed):
    first = Checkpoint.open(folder).digest()
    path = folder / "model.safetensors"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = Checkpoint.open(folder).digest()
    assert hashed.count("model.safetensors") == 2
    assert second.sha256 != first.sha256
    assert second.files[0] == first.files[0]


def test_a_blob_named_after_a_digest_is_hashed_all_the_same(folder, hashed, tmp_path):
    blob = tmp_path / ("0" * 64)
    shutil.move(folder / "model.safetensors", blob)
    (folder / "model.safetensors").symlink_to(blob)
    digest = Checkpoint.open(folder).digest()
    assert digest.files[1].sha256 != blob.name
    assert "model.safetensors" in hashed


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"sha256": "00"}', b"[" * 100_000])
def test_a_damaged_cache_is_hashed_over(folder, cache, content):
    first = Checkpoint.open(folder).digest()
    for record in (cache / "digests").iterdir():
        record.write_bytes(content)
    assert Checkpoint.open(folder).digest() == first


def test_a_cached_digest_with_one_changed_digit_is_not_believed(folder, cache):
    first = Checkpoint.open(folder).digest()
    for record in (cache / "digests").iterdir():
        text = record.read_text()
        found = next(file.sha256 for file in first.files if file.sha256 in text)
        changed = ("1" if found[0] == "0" else "0") + found[1:]
        record.write_text(text.replace(found, changed))
    assert Checkpoint.open(folder).digest() == first
    # They were written anew, too.
    texts = [record.read_text() for record in (cache / "digests").iterdir()]
    assert all(any(file.sha256 in text for text in texts) for file in first.files)


def test_a_damaged_file_of_the_hubs_cache_is_named(folder, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    whole = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    shutil.move(folder / "model.safetensors", blobs / whole)
    (folder / "model.safetensors").symlink_to(blobs / whole)
    assert Checkpoint.open(folder).digest().files[1].sha256 == whole
    content = bytearray((blobs / whole).read_bytes())
    content[-1] ^= 1
    (blobs / whole).write_bytes(content)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: the hub names"):
            Checkpoint.open(folder).digest()
    assert (blobs / whole).read_bytes() == content


def test_a_cache_that_cannot_be_written_is_no_error(folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "file" / "cache"))
    assert Checkpoint.open(folder).digest().files[0].name == "config.json"


def test_progress_counts_every_byte_in_order(folder):
    seen = []
    digest = Checkpoint.open(folder).digest(lambda done, total: seen.append((done, total)))
    total = sum(file.size for file in digest.files)
    assert [t for _, t in seen] == [total] * len(seen)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert seen[-1][0] == total
    assert len(seen) >= 3


def test_a_file_that_changes_or_goes_while_it_is_hashed_is_refused(folder):
    def grow(done: int, total: int) -> None:
        with (folder / "model.safetensors").open("ab") as file:
            file.write(b"x")

    with pytest.raises(CheckpointError, match="changed while it was read"):
        Checkpoint.open(folder).digest(grow)
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.digest()


def test_an_interrupted_digest_is_not_remembered(folder, cache):
    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        Checkpoint.open(folder).digest(stop)
    assert not list(cache.rglob("*.json"))


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("EDGEFORGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "edgeforge"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == Path.home() / ".cache" / "edgeforge"
