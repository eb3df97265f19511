"""Output folders: whole or absent, whatever stops the writing."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgeforge.errors import DiskFullError, UsageError
from edgeforge.output_folder import swap
from edgeforge.output_folder.atomic import atomic_folder


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_folder_appears_only_when_whole(tmp_path):
    final = tmp_path / "a" / "óut put"
    with atomic_folder(final, force=False) as partial:
        assert partial.parent == final.parent
        assert partial.name == f".óut put.partial-{os.getpid()}"
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text("1")
        assert not final.exists()
    assert listing(tmp_path) == ["a", "a/óut put", "a/óut put/sub", "a/óut put/sub/x"]


def test_every_file_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(old, new):
        events.append("rename")
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with atomic_folder(tmp_path / "out", force=False) as partial:
        (partial / "x").write_text("1")
    assert events == ["x", f".out.partial-{os.getpid()}", "rename", tmp_path.name]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_leaves_nothing_not_even_parents(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "a" / "b" / "out", False) as partial:
        (partial / "x").write_text("1")
        raise error
    assert listing(tmp_path) == []


def artifact(folder: Path, recipe: str, *files: str) -> None:
    """As much of an artifact as tells that EdgeForge wrote the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = {name: {"size": 0, "sha256": ""} for name in files}
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(recipe)
    manifest = {"target": folder.name, "recipe": recipe, "files": listed, "schema_version": 1}
    (folder / "edgeforge.json").write_text(json.dumps(manifest))


def recipe(folder: Path) -> str:
    return json.loads((folder / "edgeforge.json").read_text())["recipe"]


def test_a_finished_folder_is_replaced_only_by_force(tmp_path):
    final = tmp_path / "out"
    artifact(final, "old", "stale")
    with (
        pytest.raises(UsageError, match=r"exists and is not empty.*--force") as caught,
        atomic_folder(final, force=False),
    ):
        pass
    assert caught.value.exit_code == 2
    with atomic_folder(final, force=True) as partial:
        assert recipe(final) == "old"
        artifact(partial, "new")
    assert listing(tmp_path) == ["out", "out/edgeforge.json"]
    assert recipe(final) == "new"


def test_a_folder_of_several_artifacts_is_replaced_by_force(tmp_path):
    artifact(tmp_path / "out" / "onnx", "old")
    with atomic_folder(tmp_path / "out", force=True) as partial:
        artifact(partial, "new")
    assert listing(tmp_path) == ["out", "out/edgeforge.json"]


def test_a_failure_with_force_keeps_the_old_folder(tmp_path):
    artifact(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", force=True):
        raise RuntimeError
    assert listing(tmp_path) == ["out", "out/edgeforge.json"]


@pytest.fixture
def two_renames(monkeypatch):
    """A system that cannot exchange two folders in one step."""
    monkeypatch.setattr(swap, "exchange", lambda one, other: False)


@pytest.mark.usefixtures("two_renames")
def test_a_failure_of_the_swap_itself_restores_the_old_folder(tmp_path, monkeypatch):
    artifact(tmp_path / "out", "old")
    real = os.rename

    def rename(old, new):
        if ".partial-" in str(old):
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    with (
        pytest.raises(UsageError, match=r"put in place .*busy"),
        atomic_folder(tmp_path / "out", force=True) as partial,
    ):
        artifact(partial, "new")
    assert listing(tmp_path) == ["out", "out/edgeforge.json"]
    assert recipe(tmp_path / "out") == "old"


def test_force_does_not_replace_a_folder_that_is_no_artifact(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("")
    with (
        pytest.raises(UsageError, match=r"home holds thesis, which EdgeForge did not write"),
        atomic_folder(tmp_path / "home", force=True),
    ):
        pass
    assert listing(tmp_path) == ["home", "home/thesis"]


def test_an_empty_folder_and_a_link_are_used(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link", force=False) as partial:
        (partial / "x").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert listing(tmp_path) == ["link", "real", "real/x"]


def test_unusable_places_are_usage_errors(tmp_path):
    (tmp_path / "file").write_text("")
    for place, words in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "cannot be"),
        (Path("/"), "cannot be an output folder"),
        (tmp_path / ("x" * 300), "cannot be"),
    ]:
        with pytest.raises(UsageError, match=words) as caught, atomic_folder(place, force=True):
            pass
        assert "\n" not in str(caught.value)
    assert listing(tmp_path) == ["file"]


def test_what_another_process_holds_is_not_in_the_way(tmp_path):
    with (
        atomic_folder(tmp_path / "out", force=False) as theirs,
        atomic_folder(tmp_path / "out", force=False) as partial,
    ):
        assert theirs.is_dir()
        assert partial.name == f"{theirs.name}-1"
    assert listing(tmp_path) == ["out"]


def test_a_folder_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    with (
        pytest.raises(UsageError, match="exists and is not empty"),
        atomic_folder(tmp_path / "out", force=False),
    ):
        artifact(tmp_path / "out", "theirs")
    assert listing(tmp_path) == ["out", "out/edgeforge.json"]


def test_too_little_space_is_said_before_any_work(tmp_path):
    with (
        pytest.raises(DiskFullError, match=f"needs {10**18} bytes and its disk has") as caught,
        atomic_folder(tmp_path / "a" / "out", force=False, needed_bytes=10**18),
    ):
        pytest.fail("the work began")
    assert caught.value.exit_code == 5
    assert listing(tmp_path) == []


def test_a_full_disk_however_wrapped_becomes_one_sentence(tmp_path):
    with (
        pytest.raises(DiskFullError, match=r"it needs 7 bytes.*No space left.*nothing was left"),
        atomic_folder(tmp_path / "out", force=False, needed_bytes=7),
    ):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("a library's words") from error
    assert listing(tmp_path) == []


def test_other_system_errors_pass_through(tmp_path):
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "out", force=False):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.fixture
def tiny_disk(tmp_path):
    mount = tmp_path / "tiny"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("mount is not installed")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_really_full(tiny_disk):
    with (
        pytest.raises(DiskFullError, match="No space left on device; nothing was left"),
        atomic_folder(tiny_disk / "out", force=False) as partial,
        (partial / "x").open("wb") as file,
    ):
        file.write(bytes(2 << 20))
    assert listing(tiny_disk) == []
    with atomic_folder(tiny_disk / "out", force=False) as partial:
        (partial / "x").write_bytes(bytes(1 << 19))
    assert listing(tiny_disk) == ["out", "out/x"]


def test_a_file_size_limit_is_a_full_disk(tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    script = (
        "import sys; from pathlib import Path\n"
        "from edgeforge.output_folder.atomic import atomic_folder\n"
        "from edgeforge.errors import DiskFullError\n"
        "try:\n"
        "    with atomic_folder(Path(sys.argv[1]) / 'out', False) as partial:\n"
        "        (partial / 'x').write_bytes(bytes(1 << 20))\n"
        "except DiskFullError as error:\n"
        "    print(error); sys.exit(error.exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert (done.returncode, done.stdout.count("\n")) == (5, 1), done.stderr
    assert "File too large" in done.stdout
    assert listing(tmp_path) == []


def test_ctrl_c_halfway_leaves_nothing(tmp_path):
    script = (
        "import sys, time; from pathlib import Path\n"
        "from edgeforge.output_folder.atomic import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1]) / 'out', False) as partial:\n"
        "    for i in range(10_000_000):\n"
        "        (partial / f'x{i % 50}').write_bytes(bytes(4096)); \n"
        "        if i == 100: print('go', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    assert listing(tmp_path)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in words
    assert listing(tmp_path) == []


@pytest.mark.usefixtures("two_renames")
def test_ctrl_c_during_the_swap_comes_after_it(tmp_path, monkeypatch):
    artifact(tmp_path / "out", "old")
    real = os.rename

    def rename(old, new):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", force=True) as partial:
        artifact(partial, "new")
    assert listing(tmp_path) == ["out", "out/edgeforge.json"]
    assert recipe(tmp_path / "out") == "new"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_works_off_the_main_thread(tmp_path):
    def work() -> None:
        with atomic_folder(tmp_path / "out", force=False) as partial:
            (partial / "x").write_text("1")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert listing(tmp_path) == ["out", "out/x"]
