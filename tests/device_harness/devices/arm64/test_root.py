"""A root folder that is whole, and one that was cut short."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from device_harness.devices.arm64 import setup
from device_harness.devices.arm64.place import arm64_folder
from device_harness.devices.arm64.root import (
    find_root,
    require_host,
    root_folder,
    what_is_wrong,
    write_record,
)
from device_harness.errors import SetupError
from edgeforge.cache import cache_dir
from edgeforge.cli.exits import explain

ROOT = Path(__file__).parents[4]


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "root"
    (made / "a").mkdir(parents=True)
    (made / "a/file").write_bytes(b"12345")
    (made / "link").symlink_to("a/file")
    (made / "linked").symlink_to("a")
    write_record(made, {"libc6": "2"})
    return made


def test_a_whole_folder_is_known(folder):
    assert what_is_wrong(folder) is None


def test_a_file_more_does_no_harm(folder):
    (folder / "a/__pycache__").mkdir()
    (folder / "a/__pycache__/x.pyc").touch()
    assert what_is_wrong(folder) is None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "a/file").unlink(), "a/file is missing"),
        (lambda f: (f / "a/file").write_bytes(b"123"), "a/file has 3 bytes, not 5"),
        (lambda f: (f / "link").unlink(), "link is missing"),
        (lambda f: (f / "whole.json").unlink(), "whole.json is missing"),
        (lambda f: (f / "whole.json").write_text("{"), "whole.json is missing or damaged"),
        (lambda f: os.truncate(f / "whole.json", 20), "whole.json is missing or damaged"),
    ],
)
def test_what_is_missing_is_named(folder, damage, words):
    damage(folder)
    assert words in what_is_wrong(folder)


@pytest.fixture
def small(place, monkeypatch):
    """Set-up that makes a root of one file; returns how often it was made."""
    made = []

    def make(making: Path, pins, progress):
        made.append(making)
        (making / "python").write_bytes(b"arm64")
        return {"libc6": "9"}

    monkeypatch.setattr(setup, "_make", make)
    return made


def test_set_up_makes_a_root_once(small):
    root = setup.set_up()
    assert root.folder == root_folder() and root.replaced == {"libc6": "9"}
    assert setup.set_up() == root and len(small) == 1
    assert find_root() == root
    assert not small[0].exists()  # it was made beside, and renamed when whole


def test_a_root_that_was_cut_short_is_told_and_made_whole(small):
    root = setup.set_up()
    os.truncate(root.folder / "python", 2)
    with pytest.raises(SetupError, match=r"not whole \(python has 2 bytes, not 5\): run"):
        find_root()
    assert setup.set_up() == root and len(small) == 2
    assert (root.folder / "python").read_bytes() == b"arm64"


def test_a_failed_set_up_leaves_nothing_half_made(small, place, monkeypatch):
    def fail(making, pins, progress):
        (making / "python").write_bytes(b"ar")
        raise SetupError("the mirror fails")

    monkeypatch.setattr(setup, "_make", fail)
    with pytest.raises(SetupError, match="the mirror fails"):
        setup.set_up()
    assert [path.name for path in place.iterdir()] == [".lock"]


def test_a_left_over_of_a_killed_set_up_goes(small, place):
    left = place / f".{root_folder().name}.partial-1-1"
    left.mkdir(parents=True)
    setup.set_up()
    assert not left.exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEFORGE_ARM64", str(tmp_path / "file"))
    with pytest.raises(SetupError, match="file cannot be written: "):
        setup.set_up()


def test_a_full_disk_is_told_as_such(small, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/y")

    monkeypatch.setattr(setup, "_make", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        setup.set_up()
    assert explain(caught.value) == (5, "/x/y: No space left on device")


def test_a_second_set_up_waits_for_the_first(small, place):
    place.mkdir()
    told = []
    with (place / ".lock").open("w") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = pool.submit(setup.set_up, lambda stage, *_: told.append(stage))
        while not told:
            time.sleep(0.01)
        assert told == ["waiting for another set-up"] and not small
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert second.result().folder == root_folder()


@pytest.mark.parametrize(("ci", "outcome"), [("true", "1 error"), ("", "1 skipped")])
def test_without_the_emulator_tests_skip_and_in_ci_they_fail(tmp_path, ci, outcome):
    (tmp_path / "file").touch()
    environment = {**os.environ, "EDGEFORGE_ARM64": str(tmp_path / "file"), "CI": ci}
    test = (
        "tests/device_harness/devices/arm64/test_root.py::test_the_root_serves_a_shell_and_a_phone"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", test]
    done = subprocess.run(
        [*command, "-rs"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert outcome in done.stdout, done.stdout
    assert "the arm64 emulator" in done.stdout and "cannot be written" in done.stdout


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_a_machine_that_cannot_run_it_is_told(monkeypatch, system, machine):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(SetupError, match=f"Linux on x86-64 only, and this machine is {system} on"):
        require_host()


def test_the_folder_is_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("EDGEFORGE_ARM64", raising=False)
    for name in ("EDGEFORGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert arm64_folder() == cache_dir() / "arm64"
        monkeypatch.delenv(name)
    assert arm64_folder() == cache_dir() / "arm64"


def test_the_root_serves_a_shell_and_a_phone(arm64_root):
    """What the virtual phone needs is there, with its short names."""
    binaries = arm64_root.system / "usr/bin"
    assert {"sh", "mksh", "toybox", "tar", "sha256sum", "cat"} <= set(os.listdir(binaries))
    assert arm64_root.qemu.is_file() and Path(arm64_root.proot[-1]).is_file()
