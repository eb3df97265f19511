"""Folders of live processes are told from those of killed ones, whatever their numbers."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from quant.locked_folders import left_over, lock, make_locked, unfinished

HOLDER = """
import sys, time
from pathlib import Path
from quant.locked_folders import make_locked
held = make_locked(Path(sys.argv[1]), ".out.partial-1")
print(held.path, flush=True)
time.sleep(60)
"""


def test_a_folder_is_held_until_its_process_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline().strip()
    folder = tmp_path / ".out.partial-1"
    with left_over(folder) as free:
        assert not free
    assert lock(folder) is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with left_over(folder) as free:
        assert free
        assert lock(folder) is None  # whoever sweeps it holds it meanwhile
    assert folder.is_dir()


def test_names_are_counted_on(tmp_path):
    made = [make_locked(tmp_path, "a") for _ in range(3)]
    assert [held.path.name for held in made] == ["a", "a-1", "a-2"]
    for held in made:
        held.release()
        held.release()


def test_a_lock_moves_with_its_folder(tmp_path):
    held = make_locked(tmp_path, "a")
    os.rename(tmp_path / "a", tmp_path / "b")
    with left_over(tmp_path / "b") as free:
        assert not free
    held.release()
    with left_over(tmp_path / "b") as free:
        assert free


def test_a_link_a_file_and_nothing_are_no_left_overs(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "file").touch()
    for name in ("link", "file", "nothing"):
        with left_over(tmp_path / name) as free:
            assert not free


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_where_nothing_can_be_locked_nothing_is_a_left_over(tmp_path, monkeypatch, number):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".a.partial-1").mkdir()
    with unfinished(tmp_path, "a") as folder:
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == [".a.partial-1"]


def test_an_unfinished_folder_goes_and_takes_older_ones_with_it(tmp_path):
    cache = tmp_path / "cache"
    (cache / ".a.partial-1-1").mkdir(parents=True)
    (cache / ".a.partial-1-1" / "weights").touch()
    (cache / ".key.resume").mkdir()
    with unfinished(cache, "a") as first, unfinished(cache, "a") as second:
        assert first != second and first.is_dir() and second.is_dir()
        first.rename(cache / "whole")
    assert sorted(path.name for path in cache.iterdir()) == [".key.resume", "whole"]
