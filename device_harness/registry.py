"""Runtimes by the target whose artifacts they run. To add one: a file, an import, a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from device_harness.coreml_session import CoremlSession
from device_harness.errors import DeviceError
from device_harness.executorch_session import ExecutorchSession
from device_harness.onnx_session import OnnxSession
from device_harness.session import Session
from exporters.manifest import Manifest

RUNTIMES: dict[str, Callable[..., Session]] = {
    "onnx": OnnxSession,
    "executorch": ExecutorchSession,
    "coreml": CoremlSession,
}


def open_session(
    folder: Path,
    manifest: Manifest,
    threads: int | None = None,
    options: Mapping[str, str | None] | None = None,
) -> Session:
    """Opens an artifact in its runtime on this host.

    Args:
        folder: the artifact.
        manifest: its manifest.
        threads: for the runtime; by default one per processor, four at most.
        options: what else a user asks of the runtime, by name; None leaves it its default.

    Raises:
        DeviceError: no runtime here runs this target, or it has no such option.
    """
    if manifest.target not in RUNTIMES:
        raise DeviceError(
            f"no runtime here runs {manifest.target} artifacts; known: {', '.join(RUNTIMES)}"
        )
    runtime = RUNTIMES[manifest.target]
    given = {name: value for name, value in (options or {}).items() if value is not None}
    for name in given:
        if name not in getattr(runtime, "options", ()):
            raise DeviceError(
                f"--{name.replace('_', '-')} means nothing to {manifest.target} artifacts: leave "
                f"it out"
            )
    return runtime(folder, manifest.context, threads, **given)
