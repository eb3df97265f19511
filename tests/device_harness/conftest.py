"""One small artifact for every test of the host runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from exporters.registry import find_target


@pytest.fixture(scope="session")
def workers() -> Callable[[], set[int]]:
    """Tells which processes of ExecuTorch this one has started and not yet ended, by number."""

    def workers() -> set[int]:
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                ours = f"PPid:\t{os.getpid()}\n" in (process / "status").read_text()
                if ours and b"executorch_worker" in (process / "cmdline").read_bytes():
                    found.add(int(process.name))
        return found

    return workers


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny Llama at int4 with a context of 64 tokens."""
    root = tmp_path_factory.mktemp("device harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        model = open_model(str(synthesise("tiny-llama", root / "checkpoint")))
        export(model, [find_target("onnx")], root / "artifact", ExportOptions("int4", context=64))
        yield root / "artifact"
