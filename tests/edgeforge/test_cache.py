"""Where the cache is, and what takes its place where it can only be read."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from edgeforge.cache import cache_dir, cache_note, writable_cache


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The system's folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A cache on a file system that can only be read."""
    folder = tmp_path / "cache"
    (folder / "stores").mkdir(parents=True)
    monkeypatch.setenv("EDGEFORGE_CACHE", str(folder))
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if os.geteuid() == 0:
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a file system cannot be mounted here")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
    else:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def test_a_cache_that_can_be_written_is_used(tmp_path, monkeypatch, temporary):
    for place in ("cache", "not/yet/there"):
        monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / place))
        assert writable_cache() == cache_dir() == tmp_path / place
        assert cache_note() is None
    assert not list(temporary.iterdir())


def test_a_cache_that_can_only_be_read_has_a_private_stand_in(read_only, temporary):
    used = writable_cache()
    assert used == temporary / f"edgeforge-{os.getuid()}"
    assert used.stat().st_mode & 0o077 == 0
    assert writable_cache() == used
    note = cache_note()
    assert note is not None and str(read_only) in note and str(used) in note


def test_a_folder_in_the_cache_that_can_only_be_read_counts_too(tmp_path, monkeypatch, temporary):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "stores").mkdir(parents=True)
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "stores" and real(path, mode)
    )
    assert writable_cache().parent == temporary


@pytest.mark.parametrize("kind", ["a link", "open to others"])
def test_a_folder_that_others_could_have_made_is_not_trusted(read_only, temporary, tmp_path, kind):
    usual = temporary / f"edgeforge-{os.getuid()}"
    if kind == "a link":
        (tmp_path / "theirs").mkdir()
        usual.symlink_to(tmp_path / "theirs")
    else:
        usual.mkdir()
        usual.chmod(0o777)
    used = writable_cache()
    assert used == writable_cache()
    assert used != usual and used.parent == temporary and used.stat().st_mode & 0o077 == 0
