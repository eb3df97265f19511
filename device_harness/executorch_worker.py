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
from typing import Any, BinaryIO

import numpy as np

from device_harness.memory import resident_peak

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


def serve(file: str, weights: str, threads: int, requests: BinaryIO, answers: BinaryIO) -> None:
    """Loads a program and answers requests."""
    import torch

    torch.set_num_threads(1)
    runtime = load_runtime()
    runtime._unsafe_reset_threadpool(threads)
    try:
        program = runtime._load_program(file)
        names = {program.get_method_name(i) for i in range(program.num_methods())}
        constants = {
            name: [int(value) for value in program.load_method(name)([])]
            for name in names
            if program.method_meta(name).num_inputs() == 0
        }
    except RuntimeError as error:
        _answer(answers, {"error": str(error)})
        return
    _answer(answers, {"methods": sorted(names), "constants": constants, "peak": resident_peak()})
    methods: dict[tuple[str, bool], Any] = {}
    for line in requests:
        asked = json.loads(line)
        name = asked["method"], asked["apart"]
        tokens = np.frombuffer(requests.read(8 * asked["tokens"]), np.int64)
        try:
            if name not in methods:
                methods[name] = load_method(runtime, file, weights, name[0])
            if not len(tokens):  # asked to load it only
                _answer(answers, {"shape": [0], "peak": resident_peak()})
                continue
            inputs = [
                torch.from_numpy(tokens.copy()).reshape(1, -1),
                torch.tensor([asked["position"]]),
            ]
            found = [result.float().numpy() for result in methods[name](inputs)]
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
