"""Runs an ExecuTorch program in a separate process, because the runtime may end its process.

Its arguments are FILE, WEIGHTS and THREADS, where WEIGHTS is the .ptd or an empty string. It reads
requests on stdin: each is a line of JSON, followed by as many ``int64`` tokens as the line states.
It answers on stdout with a line of JSON, followed by as many ``float32`` numbers as that line
states, of each result in turn. It ends when stdin ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from device_harness.executorch_shim import Run, ShimRuntime, shim_folder
from device_harness.memory import resident_peak


class Program(Protocol):
    """A program in a runtime."""

    names: list[str]

    def constants(self) -> dict[str, list[int]]:
        """The results of all methods without inputs."""

    def load(self, name: str) -> Run:
        """Loads a method with caches of its own."""


# Shared libraries that register the kernels of quantized embeddings, attention and caches.
_KERNELS = (
    "kernels/quantized/libquantized_ops_aot_lib.so",
    "extension/llm/custom_ops/libcustom_ops_aot_lib.so",
)


def load_runtime() -> Any:
    """Loads ExecuTorch's runtime with the kernels that EdgeForge's programs call.

    It imports the runtime's bindings directly. ``executorch.runtime`` would first import the whole
    exporter, which takes 4 to 10 seconds instead of a twentieth of a second.
    """
    import torch
    from executorch.extension.pybindings import _portable_lib

    spec = find_spec("executorch")
    assert spec is not None and spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    for library in _KERNELS:
        torch.ops.load_library(  # type: ignore[no-untyped-call]
            str(next(root.glob(library.replace(".so", ".*"))))
        )
    return _portable_lib


def main() -> None:
    """Serves requests until stdin ends."""
    # Ctrl-C also reaches this process; the process that started it decides when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The runtime may print on stdout, so its output goes to stderr, and only answers go to stdout.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    file, weights, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    try:
        serve(file, weights, threads, sys.stdin.buffer, answers)
    except BrokenPipeError:
        sys.exit(1)


class TorchRuntime:
    """ExecuTorch's own Python package, which takes and gives tensors of torch.

    Args:
        threads: for the runtime.
    """

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(1)
        self._runtime = load_runtime()
        self._runtime._unsafe_reset_threadpool(threads)

    def open(self, file: str, weights: str) -> TorchProgram:
        """Opens a program; ``weights`` is the .ptd, or empty."""
        return TorchProgram(self._runtime, file, weights)


class TorchProgram:
    """A program in ExecuTorch's Python package; the same as `device_harness.executorch_shim`'s.

    Attributes:
        names: of its methods.
    """

    def __init__(self, runtime: Any, file: str, weights: str) -> None:
        self._runtime, self._file, self._weights = runtime, file, weights
        self._program = program = runtime._load_program(file)
        self.names = sorted({program.get_method_name(i) for i in range(program.num_methods())})

    def constants(self) -> dict[str, list[int]]:
        """The results of all methods without inputs, which are integers."""
        return {
            name: [int(value) for value in self._program.load_method(name)([])]
            for name in self.names
            if self._program.method_meta(name).num_inputs() == 0
        }

    def load(self, name: str) -> Run:
        """Loads a method with caches of its own."""
        import torch

        method = load_method(self._runtime, self._file, self._weights, name)

        def run(tokens: np.ndarray[Any, Any], position: int) -> list[np.ndarray[Any, Any]]:
            text = torch.from_numpy(tokens.copy()).reshape(1, -1)
            return [each.float().numpy() for each in method([text, torch.tensor([position])])]

        return run


def open_program(file: str, weights: str, threads: int) -> Program:
    """Opens a program in the runtime that is here; ``weights`` is the .ptd, or empty.

    Raises:
        RuntimeError: the runtime refuses it.
    """
    folder = shim_folder()
    runtime = TorchRuntime(threads) if folder is None else ShimRuntime(folder, threads)
    return runtime.open(file, weights)


def serve(file: str, weights: str, threads: int, requests: BinaryIO, answers: BinaryIO) -> None:
    """Loads a program and answers requests."""
    try:
        program = open_program(file, weights, threads)
        names, constants = program.names, program.constants()
    except RuntimeError as error:
        _answer(answers, {"error": str(error)})
        return
    _answer(answers, {"methods": sorted(names), "constants": constants, "peak": resident_peak()})
    methods: dict[tuple[str, bool], Run] = {}
    for line in requests:
        asked = json.loads(line)
        name = asked["method"], asked["apart"]
        tokens = np.frombuffer(requests.read(8 * asked["tokens"]), np.int64)
        try:
            if name not in methods:
                methods[name] = program.load(name[0])
            if not len(tokens):  # asked to load it only
                _answer(answers, {"shape": [0], "peak": resident_peak()})
                continue
            found = methods[name](tokens, asked["position"])
        except RuntimeError as error:
            _answer(answers, {"error": str(error)})
            continue
        shapes = [list(each.shape) for each in found]
        words = {"shape": shapes[0], "shapes": shapes, "peak": resident_peak()}
        _answer(answers, words, *found)


def load_method(runtime: Any, file: str, weights: str, name: str) -> Callable[[Any], Any]:
    """Loads a method with caches of its own.

    Each method gets its own loaded program, because the methods of one loaded program would share
    the memory of their caches.

    Args:
        runtime: the result of `load_runtime`.
        file: the .pte.
        weights: the .ptd; empty for none.
        name: the method's name.
    """
    import torch

    if not weights:
        method = runtime._load_program(file).load_method(name)
        return lambda inputs: method(inputs, clone_outputs=False)
    module = runtime._load_for_executorch(file, weights)
    # The module loads a method at its first run, so one token is run now. The keys and values that
    # it leaves in the caches are overwritten before any token reads them.
    module.run_method(name, [torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0])])
    return lambda inputs: module.run_method(name, inputs, clone_outputs=False)


def _answer(answers: BinaryIO, words: Mapping[str, object], *numbers: np.ndarray[Any, Any]) -> None:
    answers.write(json.dumps(words).encode() + b"\n")
    for each in numbers:
        answers.write(np.ascontiguousarray(each, np.float32).data)
    answers.flush()


if __name__ == "__main__":
    main()
