"""Runtimes by the target whose artifacts they run.

To add a runtime, add a file for its session, import the class here and add a row to `RUNTIMES`.
"""

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
from quant.input_files import require_regular


@dataclass(frozen=True)
class Runtime:
    """A runtime on this host for the artifacts of one target.

    Attributes:
        open: opens a session; takes the artifact's folder, its context, a number of threads or
            None, and the options by keyword.
        options: the names of the options that ``open`` takes.
        packages: the packages that run artifacts, whose versions decide what comes out.
    """

    open: Callable[..., Session]
    options: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


RUNTIMES: dict[str, Runtime] = {
    "onnx": Runtime(OnnxSession, ("kleidiai", "adapter"), packages=("onnxruntime",)),
    "executorch": Runtime(ExecutorchSession, ("adapter",), packages=("executorch",)),
    "coreml": Runtime(
        CoremlSession, ("precision", "compute_units", "adapter"), packages=("coremltools",)
    ),
}


def taken_options(target: str, options: Mapping[str, str | None]) -> dict[str, str]:
    """Returns those of some options that the runtime of a target takes, without the defaults.

    Args:
        target: whose artifacts run.
        options: of any runtimes, by name; None as a value means the default.
    """
    taken = RUNTIMES[target].options if target in RUNTIMES else ()
    return {name: value for name, value in options.items() if value is not None and name in taken}


def open_session(
    folder: Path,
    manifest: Manifest,
    threads: int | None = None,
    options: Mapping[str, str | None] | None = None,
) -> Session:
    """Opens an artifact in its runtime on this host; close the session, or use it in a ``with``.

    Args:
        folder: the artifact.
        manifest: its manifest.
        threads: the runtime's number of threads; None for the runtime's default.
        options: further options of the runtime, by name; None as a value means the default.

    Raises:
        DeviceError: no runtime here runs this target, or the runtime has no such option.
    """
    if manifest.target not in RUNTIMES:
        raise DeviceError(
            f"no runtime here runs {manifest.target} artifacts; known: {', '.join(RUNTIMES)}"
        )
    runtime = RUNTIMES[manifest.target]
    # The runtimes open the files themselves, and would wait for a pipe's writer for ever.
    for name in manifest.files:
        try:
            require_regular(folder / name)
        except OSError as error:
            raise DeviceError(f"{folder / name} cannot be read: {error.strerror}") from error
    given = {name: value for name, value in (options or {}).items() if value is not None}
    for name in given:
        if name not in runtime.options:
            raise DeviceError(
                f"{manifest.target} artifacts have no option --{name.replace('_', '-')}: leave it "
                f"out"
            )
    session = runtime.open(folder, manifest.context, threads, **given)
    session.can_rewind = manifest.can_rewind
    return session
