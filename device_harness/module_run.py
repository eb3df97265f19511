"""Runs artifacts of modules in this process: named arrays in, named arrays out.

A runtime that crashes ends the process, so that `device_harness.module_session` has this done by a
process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class Opened:
    """An artifact in its runtime.

    Attributes:
        run: calls it.
        runtime: the runtime's name and version, for reports.
        seconds: that opening took, once the runtime was imported.
        limits: what a run here cannot tell of one on a device, one sentence each.
    """

    run: Callable[[Mapping[str, npt.NDArray[Any]]], Arrays]
    runtime: str
    seconds: float
    limits: tuple[str, ...] = ()


def open_module(target: str, file: ModuleFile, threads: int | None = None) -> Opened:
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


def _onnx(file: ModuleFile, threads: int | None) -> Opened:
    from device_harness.onnx_session import require_onnxruntime

    version = require_onnxruntime()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    started = time.perf_counter()
    session = _explained(
        lambda: onnxruntime.InferenceSession(
            str(file.path), options, providers=["CPUExecutionProvider"]
        ),
        "onnxruntime cannot open",
        file.path,
    )

    seconds = time.perf_counter() - started

    def run(inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        found = _explained(
            lambda: session.run(list(file.outputs), dict(inputs)), "onnxruntime fails on", file.path
        )
        return dict(zip(file.outputs, found, strict=True))

    return Opened(run, f"onnxruntime {version} (CPU{_threads_text(threads)})", seconds)


def _executorch(file: ModuleFile, threads: int | None) -> Opened:
    import torch

    from device_harness.executorch_session import require_executorch
    from device_harness.executorch_worker import load_method, load_runtime

    version = require_executorch()
    runtime = load_runtime()
    if threads is not None:
        runtime._unsafe_reset_threadpool(threads)
    started = time.perf_counter()
    method = _explained(
        lambda: load_method(runtime, str(file.path), "", "forward"),
        "ExecuTorch cannot open",
        file.path,
    )

    seconds = time.perf_counter() - started

    def run(inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        given = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in file.inputs]
        found = _explained(lambda: method(given), "ExecuTorch fails on", file.path)
        # The runtime's outputs lie in its own memory, which the next call overwrites.
        arrays = [each.detach().clone().numpy() for each in found]
        return dict(zip(file.outputs, arrays, strict=True))

    return Opened(run, f"ExecuTorch {version} (XNNPACK{_threads_text(threads)})", seconds)


def _coreml(file: ModuleFile, threads: int | None) -> Opened:
    from device_harness.coreml_interpreter.interpreter import Interpreter
    from device_harness.coreml_session import UNKNOWN_TO_INTERPRETER
    from exporters.coreml.package import open_package

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    started = time.perf_counter()
    package = open_package(file.path)
    interpreter = Interpreter(package)
    interpreter.bind()
    kinds = interpreter.inputs()
    seconds = time.perf_counter() - started

    def run(inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        # Core ML has no 64-bit integers and no boolean inputs.
        given = {
            name: value.astype(np.int32) if kinds[name].dtype.startswith("int") else value
            for name, value in inputs.items()
        }
        found = interpreter.run(given)
        return {name: found[name] for name in file.outputs}

    runtime = "EdgeForge's interpreter of the Core ML package (fp16 rounding), not Apple's runtime"
    return Opened(run, runtime, seconds, UNKNOWN_TO_INTERPRETER)


def _threads_text(threads: int | None) -> str:
    return "" if threads is None else f", {threads} threads"


def _explained(work: Callable[[], Any], what: str, path: Path) -> Any:
    """Runs some work of a runtime, whose errors share no class, and makes them one sentence."""
    try:
        return work()
    except Exception as error:
        words = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DeviceError(f"{what} {path}: {words}") from error


_RUNTIMES: Final[Mapping[str, Callable[[ModuleFile, int | None], Opened]]] = {
    "onnx": _onnx,
    "executorch": _executorch,
    "coreml": _coreml,
}
