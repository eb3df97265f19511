"""Oracles of the families, which lie apart under ``tests/oracles``, and the command line."""

import importlib.util
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from edgeforge.cli import entry as cli

_ORACLES = Path(__file__).parent.parent / "oracles"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"edgeforge_oracle_{name}", _ORACLES / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def openelm_numpy() -> ModuleType:
    """OpenELM written once more, in NumPy."""
    return _load("openelm_numpy")


@pytest.fixture(scope="session")
def hugging_face() -> ModuleType:
    """Tiny checkpoints saved by transformers, and transformers' logits for them."""
    return _load("hugging_face")


@pytest.fixture(scope="session")
def peft_adapters() -> ModuleType:
    """Adapters in peft's format, and peft itself."""
    return _load("peft_adapters")


@pytest.fixture(scope="session")
def traced() -> ModuleType:
    """What is under test: a checkpoint folder opened, traced and run by the reference operators."""
    return _load("traced")


@pytest.fixture(scope="session")
def packed_checkpoints() -> ModuleType:
    """Checkpoints that were quantized elsewhere, from integers one knows."""
    return _load("packed_checkpoints")


@pytest.fixture(scope="session")
def tiny_families() -> ModuleType:
    """A tiny configuration of each family that transformers has."""
    return _load("tiny_families")


@pytest.fixture(scope="session")
def gguf_files() -> ModuleType:
    """GGUF files, written as llama.cpp's converter does."""
    return _load("gguf_files")


@pytest.fixture(scope="session")
def quantized_floats() -> ModuleType:
    """Checkpoints of MLX, FP8 and NF4, from values one knows."""
    return _load("quantized_floats")


@pytest.fixture
def edgeforge(monkeypatch, capfd):
    """Runs a command in this process: its exit code, stdout and stderr."""

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["edgeforge", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Ctrl-C as a user has it: runners that were started in the background inherit it ignored."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)
