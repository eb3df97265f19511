"""Runtimes by the target whose artifacts they run. To add one: a file, an import, a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from device_harness.coreml_session import CoremlSession
from device_harness.errors import DeviceError
from device_harness.executorch_session import ExecutorchSession
from device_harness.onnx_session import OnnxSession
from device_harness.session import Session
from exporters.manifest import Manifest


@dataclass(frozen=True)
class Runtime:
    """What runs the artifacts of one target on this host.

    Attributes:
        open: takes the artifact's folder, its context and a number of threads or None, and the
            options by keyword.
        options: names of the options that ``open`` takes.
    """

    open: Callable[..., Session]
    options: tuple[str, ...] = ()


RUNTIMES: dict[str, Runtime] = {
    "onnx": Runtime(OnnxSession),
    "executorch": Runtime(ExecutorchSession),
    "coreml": Runtime(CoremlSession, options=("precision", "compute_units")),
}


def open_session(
    folder: Path,
    manifest: Manifest,
    threads: int | None = None,
    options: Mapping[str, str | None] | None = None,
) -> Session:
    """Opens an artifact in its runtime on this host; close it, or open it by ``with``.

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
        if name not in runtime.options:
            raise DeviceError(
                f"--{name.replace('_', '-')} means nothing to {manifest.target} artifacts: leave "
                f"it out"
            )
    return runtime.open(folder, manifest.context, threads, **given)
