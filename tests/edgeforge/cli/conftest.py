"""A checkpoint, an artifact and a cache that the command line's tests share."""

import subprocess
import sys

import pytest

from edgeforge import api
from edgeforge.synth.synthesise import synthesise


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="session")
def checkpoint(folder):
    return synthesise("tiny-llama", folder / "checkpoint")


@pytest.fixture(scope="session")
def artifact(folder, checkpoint):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(folder / "cache"))
        return api.export(checkpoint, folder / "artifact")[0]


@pytest.fixture
def cache(monkeypatch, folder):
    """The cache that the artifact was made with."""
    monkeypatch.setenv("EDGEFORGE_CACHE", str(folder / "cache"))


@pytest.fixture
def in_a_process():
    """Runs a command as a shell does."""

    def run(*arguments: object, **options) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "edgeforge.cli.entry", *map(str, arguments)],
            capture_output=True,
            timeout=120,
            **options,
        )

    return run
