"""ExecuTorch artifacts of the same checkpoints, and the runtime to run them in."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_harness.executorch_session import ExecutorchSession
from exporters.executorch import target
from exporters.options import TargetOptions

CHUNK = 16  # so that the 48 tokens of a context take three runs


@pytest.fixture(scope="session")
def pte(build):
    """Exports a config for ExecuTorch by a recipe (or a format's name)."""

    def pte(config, recipe="fp32", context=48, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, "CHUNK_TOKENS", CHUNK)
            return build(config, recipe, context, "executorch", TargetOptions(**options))

    return pte


@pytest.fixture(scope="session")
def run_pte():
    """Opens an artifact in ExecuTorch for the length of a ``with``."""

    def run_pte(folder: Path, context: int = 48) -> ExecutorchSession:
        return ExecutorchSession(folder, context, 1)

    return run_pte
