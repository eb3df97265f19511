"""Sound checkpoints and artifacts to spoil, and commands that must refuse them."""

import shutil
from pathlib import Path

import pytest

from edgeforge import api
from edgeforge.synth.synthesise import synthesise


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def sound(shared):
    """A sound checkpoint that no test may spoil."""
    return synthesise("tiny-llama", shared / "sound")


@pytest.fixture(scope="session")
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
def nothing_is_left(tmp_path, cache):
    """Checks that there is neither the output nor a piece of it, nor a piece of a store."""

    def check() -> None:
        assert not (tmp_path / "out").exists()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        stores = cache / "stores"
        assert not stores.exists() or list(stores.iterdir()) == []

    return check


@pytest.fixture
def refuses(edgeforge, nothing_is_left):
    """Runs a command that must fail in one line, with a code and words, and leave nothing."""

    def run(code: int, *words: str, command: tuple[object, ...]) -> str:
        shown = edgeforge(*command)
        assert shown.err.startswith("edgeforge: ") and shown.err.count("\n") == 1, shown.err
        assert "Traceback" not in shown.err
        assert shown.code == code, shown.err
        for word in words:
            assert word in shown.err
        assert shown.out == ""
        nothing_is_left()
        return shown.err

    return run


@pytest.fixture
def export(refuses, tmp_path):
    """Exports something that must be refused."""

    def run(source: object, code: int, *words: str, options: tuple[object, ...] = ()) -> str:
        command = ("export", source, "--out", tmp_path / "out", "-q", *options)
        return refuses(code, *words, command=command)

    return run
