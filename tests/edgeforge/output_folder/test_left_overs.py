"""What killed exports left is put back or swept; what others hold or wrote stays."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from edgeforge.errors import UsageError
from edgeforge.output_folder import swap
from edgeforge.output_folder.atomic import atomic_folder
from edgeforge.output_folder.left_overs import repair_and_sweep
from quant.locked_folders import make_locked


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_unfinished_folders_are_swept_by_the_next_output(tmp_path):
    left(tmp_path / ".out.partial-1", "model.onnx.data")
    left(tmp_path / f".out.partial-{os.getpid()}-3", "onnx/model.onnx", "coreml/config.json")
    (tmp_path / ".out.partial-77").mkdir()
    with atomic_folder(tmp_path / "out", force=False) as partial:
        assert names(tmp_path) == [partial.name]
        (partial / "x").touch()
    assert names(tmp_path) == ["out"]


def test_a_refused_output_sweeps_too(tmp_path, artifact):
    artifact(tmp_path / "out", "model.onnx")
    left(tmp_path / ".out.partial-1", "model.onnx")
    with (
        pytest.raises(UsageError, match="exists and is not empty"),
        atomic_folder(tmp_path / "out", force=False),
    ):
        pass
    assert names(tmp_path) == ["out"]


def test_what_another_process_writes_is_left_alone(tmp_path):
    held = make_locked(tmp_path, ".out.partial-1")  # 1 is no process of ours
    left(held.path, "model.onnx")
    repair_and_sweep(tmp_path / "out")
    assert names(tmp_path) == [".out.partial-1"]
    held.release()
    repair_and_sweep(tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        ".out.partial-1/thesis.txt",
        ".out.old-1/thesis.txt",
        ".out.partial-x/model.onnx",
        ".out.partial/model.onnx",
        ".outer.partial-1/model.onnx",
        "out.partial-1/model.onnx",
    ],
)
def test_a_users_file_is_never_swept(tmp_path, name):
    left(tmp_path, name)
    with atomic_folder(tmp_path / "out", force=False) as partial:
        (partial / "x").touch()
    assert (tmp_path / name).is_file()


def test_a_link_among_left_overs_is_not_followed(tmp_path):
    left(tmp_path / "mine", "model.onnx")
    (tmp_path / ".out.partial-1").symlink_to("mine")
    repair_and_sweep(tmp_path / "out")
    assert (tmp_path / "mine" / "model.onnx").is_file()


def test_a_kill_between_two_renames_is_repaired(tmp_path, artifact):
    artifact(tmp_path / ".out.old-1", "model.onnx", text="old")
    artifact(tmp_path / ".out.partial-1", "model.onnx", text="new")
    with (
        pytest.raises(UsageError, match="exists and is not empty"),
        atomic_folder(tmp_path / "out", force=False),
    ):
        pass
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.onnx").read_text() == "old"


def test_the_old_folder_is_swept_where_the_new_one_is_in_its_place(tmp_path, artifact):
    artifact(tmp_path / ".out.old-1", "model.onnx", text="old")
    artifact(tmp_path / "out", "model.onnx", text="new")
    repair_and_sweep(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.onnx").read_text() == "new"


def _replace_and_die(out: Path, exchange: bool, call: str) -> None:
    """Replaces an artifact, and dies just after the first call of a function of ``os``."""
    if not exchange:
        swap.exchange = lambda one, other: False  # type: ignore[assignment]
    real = getattr(os, call)

    def last(*arguments: object, **options: object) -> None:
        real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    with atomic_folder(out, force=True) as partial:
        for path in out.iterdir():
            (partial / path.name).write_bytes(path.read_bytes().replace(b"old", b"new"))
        setattr(os, call, last)


@pytest.mark.parametrize(
    ("exchange", "call", "after"),
    [
        (True, "unlink", "new"),  # the old folder is being removed
        (True, "rmdir", "new"),
        (False, "rename", "old"),  # between the two renames
        (False, "unlink", "new"),
    ],
)
def test_a_kill_in_the_swap_leaves_the_old_or_the_new(tmp_path, artifact, exchange, call, after):
    out = artifact(tmp_path / "out", "model.onnx", "model.onnx.data", text="old")
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_replace_and_die, args=(out, exchange, call))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert exchange <= out.is_dir()
    repair_and_sweep(out)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["edgeforge.json", "model.onnx", "model.onnx.data"]
    assert {(out / name).read_text() for name in ("model.onnx", "model.onnx.data")} == {after}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_file_that_came_during_the_swap_is_kept(tmp_path, artifact, exchange, monkeypatch):
    out = artifact(tmp_path / "out", "model.onnx", text="old")
    if not exchange:
        monkeypatch.setattr(swap, "exchange", lambda one, other: False)
    real = swap._replace

    def late(partial: Path, final: Path) -> Path:
        (final / "thesis.txt").write_text("years of work")  # after the last look at the folder
        return real(partial, final)

    monkeypatch.setattr(swap, "_replace", late)
    with (
        pytest.raises(UsageError, match=r"got the file thesis\.txt meanwhile"),
        atomic_folder(out, force=True) as partial,
    ):
        artifact(partial, "model.onnx", text="new")
    assert names(tmp_path) == ["out"]
    assert (out / "model.onnx").read_text() == "old"
    assert (out / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_exchanges_nothing_gets_two_renames(
    tmp_path, artifact, monkeypatch, number
):
    def refused(one: bytes, other: bytes) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(swap, "_exchanger", lambda: refused)
    out = artifact(tmp_path / "out", "model.onnx", text="old")
    with atomic_folder(out, force=True) as partial:
        artifact(partial, "model.onnx", text="new")
    assert names(tmp_path) == ["out"]
    assert (out / "model.onnx").read_text() == "new"


def test_folders_are_exchanged_in_one_step_where_the_system_can(tmp_path):
    left(tmp_path / "a", "one")
    left(tmp_path / "b", "two")
    if not swap.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system exchanges no folders")
    assert names(tmp_path / "a") == ["two"] and names(tmp_path / "b") == ["one"]
    with pytest.raises(FileNotFoundError):
        swap.exchange(tmp_path / "a", tmp_path / "c")
