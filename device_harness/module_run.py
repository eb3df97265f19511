"""Runs artifacts of modules on this host: named arrays in, named arrays out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from device_harness.errors import DeviceError

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class ModuleFile:
    """An artifact of a module.

    Attributes:
        path: what the runtime opens.
        inputs: the inputs' names in the order of the program.
        outputs: the outputs' names in the order of the program.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


Run = Callable[[Mapping[str, npt.NDArray[Any]]], Arrays]


def open_module(target: str, file: ModuleFile, threads: int | None = None) -> Run:
    """Opens an artifact in the runtime of its target.

    Args:
        target: the target's name.
        file: the artifact.
        threads: the runtime's number of threads; None for its default.

    Raises:
        DeviceError: the runtime is not installed, or cannot open the artifact.
    """
    if target not in _RUNTIMES:
        raise DeviceError(f"no runtime here runs modules of {target}: {', '.join(_RUNTIMES)} do")
    return _RUNTIMES[target](file, threads)


def _onnx(file: ModuleFile, threads: int | None) -> Run:
    from device_harness.onnx_session import require_onnxruntime

    require_onnxruntime()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = _explained(
        lambda: onnxruntime.InferenceSession(
            str(file.path), options, providers=["CPUExecutionProvider"]
        ),
        "onnxruntime cannot open",
        file.path,
    )

    def run(inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        found = _explained(
            lambda: session.run(list(file.outputs), dict(inputs)), "onnxruntime fails on", file.path
        )
        return dict(zip(file.outputs, found, strict=True))

    return run


def _executorch(file: ModuleFile, threads: int | None) -> Run:
    import torch

    with _silent_stderr():  # what the runtime finds out about the processor is no user's concern
        try:
            from device_harness.executorch_worker import load_method, load_runtime

            runtime = load_runtime()
        except ImportError as error:
            raise DeviceError(
                f"ExecuTorch's runtime needs {error.name}, which is not installed: pip install "
                f'"edgeforge[executorch]"'
            ) from error
        if threads is not None:
            runtime._unsafe_reset_threadpool(threads)
        method = _explained(
            lambda: load_method(runtime, str(file.path), "", "forward"),
            "ExecuTorch cannot open",
            file.path,
        )

    def run(inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        given = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in file.inputs]
        found = _explained(lambda: method(given), "ExecuTorch fails on", file.path)
        # The runtime's outputs lie in its own memory, which the next call overwrites.
        arrays = [each.detach().clone().numpy() for each in found]
        return dict(zip(file.outputs, arrays, strict=True))

    return run


def _coreml(file: ModuleFile, threads: int | None) -> Run:
    from device_harness.coreml_interpreter.interpreter import Interpreter
    from exporters.coreml.package import open_package

    package = open_package(file.path)
    interpreter = Interpreter(package)
    interpreter.bind()
    kinds = interpreter.inputs()

    def run(inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        # Core ML has no 64-bit integers and no boolean inputs.
        given = {
            name: value.astype(np.int32) if kinds[name].dtype.startswith("int") else value
            for name, value in inputs.items()
        }
        found = interpreter.run(given)
        return {name: found[name] for name in file.outputs}

    return run


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what native code writes to the process's standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _explained(work: Callable[[], Any], what: str, path: Path) -> Any:
    """Runs some work of a runtime, whose errors share no class, and makes them one sentence."""
    try:
        return work()
    except Exception as error:
        words = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DeviceError(f"{what} {path}: {words}") from error


_RUNTIMES: Final[Mapping[str, Callable[[ModuleFile, int | None], Run]]] = {
    "onnx": _onnx,
    "executorch": _executorch,
    "coreml": _coreml,
}
