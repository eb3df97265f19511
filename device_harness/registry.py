"""Runtimes by the target whose artifacts they run. To add one: a file, an import, a row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from device_harness.errors import DeviceError
from device_harness.executorch_session import ExecutorchSession
from device_harness.onnx_session import OnnxSession
from device_harness.session import Session
from exporters.manifest import Manifest

RUNTIMES: dict[str, Callable[[Path, int, int | None], Session]] = {
    "onnx": OnnxSession,
    "executorch": ExecutorchSession,
}


def open_session(folder: Path, manifest: Manifest, threads: int | None = None) -> Session:
    """Opens an artifact in its runtime on this host.

    Args:
        folder: the artifact.
        manifest: its manifest.
        threads: for the runtime; by default one per processor, four at most.

    Raises:
        DeviceError: no runtime here runs this target.
    """
    if manifest.target not in RUNTIMES:
        raise DeviceError(
            f"no runtime here runs {manifest.target} artifacts; known: {', '.join(RUNTIMES)}"
        )
    return RUNTIMES[manifest.target](folder, manifest.context, threads)
