"""ExecuTorch's runtime through a shim of plain C, where torch is absent.

The folder that ``$EDGEFORGE_EXECUTORCH`` names holds the runtime's libraries for this processor and
``libshim.so``, as `device_harness.devices.arm64.executorch` sets them up.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Run = Callable[[npt.NDArray[np.int64], int], list[npt.NDArray[np.float32]]]
"""A method: tokens ``int64[t]`` and the first one's position -> its results."""

VARIABLE: Final = "EDGEFORGE_EXECUTORCH"

# ExecuTorch's error codes (`runtime/core/error.h`) that a program can cause.
_ERRORS: Final = {
    0x01: "internal error", 0x02: "invalid state", 0x10: "not supported", 0x11: "not implemented",
    0x12: "invalid argument", 0x13: "invalid type", 0x14: "an operator is missing",
    0x20: "not found", 0x21: "not enough memory", 0x22: "the file cannot be read",
    0x23: "invalid program", 0x24: "invalid external data", 0x25: "not enough resources",
    0x30: "the delegate is not compatible", 0x31: "not enough memory for the delegate",
    0x32: "the delegate's handle is invalid",
}  # fmt: skip


def shim_folder() -> Path | None:
    """The folder of the runtime; None where ExecuTorch's own Python package is used."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder else None


def shim_version(folder: Path) -> str:
    """The version of ExecuTorch."""
    return (folder / "version").read_text(encoding="ascii").strip()


class ShimRuntime:
    """The runtime, loaded once a process.

    Args:
        folder: its libraries.
        threads: for the runtime.

    Raises:
        RuntimeError: a library cannot be loaded.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        load = ctypes.CDLL(None).dlopen
        load.restype, load.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
        why = ctypes.CDLL(None).dlerror
        why.restype = ctypes.c_char_p
        # `ctypes` loads with RTLD_NOW, but functions of torch's that are never called are missing.
        flags = os.RTLD_LAZY | os.RTLD_GLOBAL
        for name in _in_order(folder):
            if not load(str(name).encode(), flags):
                raise RuntimeError(
                    (why() or b"a library cannot be loaded").decode("utf-8", "replace")
                )
        self._shim = _declared(ctypes.CDLL(str(folder / "libshim.so"), flags))
        self._shim.shim_threads(threads)

    def open(self, file: str, weights: str = "") -> ShimProgram:
        """Opens a program.

        Args:
            file: the .pte.
            weights: the .ptd; empty for none.

        Raises:
            RuntimeError: it is none.
        """
        return ShimProgram(self._shim, file, weights)


class ShimProgram:
    """A program in the runtime.

    Attributes:
        names: of its methods.
    """

    def __init__(self, shim: ctypes.CDLL, file: str, weights: str) -> None:
        self._shim = shim
        # The runtime reads from the mapped files as long as the program is used.
        self._files = [_mapped(each) for each in (file, weights) if each]
        parts = [part for each in self._files for part in (each.ctypes.data, len(each))]
        error = ctypes.c_int()
        given = (*parts, *(None, 0)[: 4 - len(parts)])
        self._program = shim.shim_open(*given, ctypes.byref(error))
        if not self._program:
            raise RuntimeError(f"loading the program failed: {_words(error.value)}")
        count = shim.shim_methods(self._program)
        found = [shim.shim_method_name(self._program, at) for at in range(count)]
        self.names = [name.decode() for name in found if name is not None]

    def constants(self) -> dict[str, list[int]]:
        """The results of all methods without inputs, which are integers."""
        return {
            name: self._integers(name)
            for name in self.names
            if self._shim.shim_inputs(self._program, name.encode()) == 0
        }

    def load(self, name: str) -> Run:
        """Loads a method with caches of its own.

        Raises:
            RuntimeError: it cannot be loaded, or, of the function, it fails.
        """
        method = self._load(name)

        def run(tokens: npt.NDArray[np.int64], position: int) -> list[npt.NDArray[np.float32]]:
            given = np.ascontiguousarray(tokens, np.int64)
            error = self._shim.shim_run(method, given.ctypes.data, len(given), position)
            if error:
                raise RuntimeError(f"{name} failed: {_words(error)}")
            return [self._tensor(method, at) for at in range(self._shim.shim_results(method))]

        return run

    def _load(self, name: str) -> int:
        error = ctypes.c_int()
        method: int | None = self._shim.shim_load(self._program, name.encode(), ctypes.byref(error))
        if not method:
            raise RuntimeError(f"loading method {name} failed: {_words(error.value)}")
        return method

    def _integers(self, name: str) -> list[int]:
        method = self._load(name)
        if error := self._shim.shim_run(method, None, 0, 0):
            raise RuntimeError(f"{name} failed: {_words(error)}")
        found = []
        for at in range(self._shim.shim_results(method)):
            value = ctypes.c_int64()
            if error := self._shim.shim_integer(method, at, ctypes.byref(value)):
                raise RuntimeError(f"{name} gives no integer: {_words(error)}")
            found.append(value.value)
        return found

    def _tensor(self, method: int, at: int) -> npt.NDArray[np.float32]:
        sizes, data = (ctypes.c_int64 * 8)(), ctypes.POINTER(ctypes.c_float)()
        rank = self._shim.shim_tensor(method, at, sizes, ctypes.byref(data))
        if rank < 0:
            raise RuntimeError(f"result {at} is no float32 tensor: {_words(-rank)}")
        shape = tuple(sizes[:rank])
        # The memory is the method's, which writes there at its next run.
        return np.ctypeslib.as_array(data, (int(np.prod(shape)),)).reshape(shape).copy()


def _mapped(file: str) -> npt.NDArray[np.uint8]:
    """A file's bytes, ``uint8[n]``, which are read when they are used.

    Raises:
        RuntimeError: it cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise RuntimeError(f"{file} cannot be read: {error}") from error
    return np.frombuffer(pages, np.uint8)


def _in_order(folder: Path) -> list[Path]:
    """The libraries, each after those that it names.

    The loader takes a library that is loaded already for one that is named, so that no path to
    them need be set before this process begins.
    """
    first = (
        "libtorch.so", "libcudart.so.13", "libcupti.so.13", "libgomp.so.1", "libgfortran.so.5",
        "libnvpl_blas_core.so.0", "libnvpl_blas_lp64_gomp.so.0", "libnvpl_lapack_core.so.0",
        "libnvpl_lapack_lp64_gomp.so.0", "libarm_compute.so", "libarm_compute_graph.so",
        "libc10.so", "libtorch_cpu.so", "libtorch_python.so",
    )  # fmt: skip
    last = ("libquantized_ops_aot_lib.so", "libcustom_ops_aot_lib.so")
    runtime = next(folder.glob("_portable_lib.*"), folder / "_portable_lib.so")
    return [*(folder / name for name in first), runtime, *(folder / name for name in last)]


def _declared(shim: ctypes.CDLL) -> ctypes.CDLL:
    """The shim's functions with their types."""
    pointer, size, long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long
    text, number, error = ctypes.c_char_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int)
    types: dict[str, tuple[object, tuple[object, ...]]] = {
        "shim_threads": (None, (ctypes.c_uint,)),
        "shim_open": (pointer, (pointer, size, pointer, size, error)),
        "shim_methods": (size, (pointer,)),
        "shim_method_name": (text, (pointer, size)),
        "shim_inputs": (long, (pointer, text)),
        "shim_load": (pointer, (pointer, text, error)),
        "shim_run": (ctypes.c_int, (pointer, pointer, ctypes.c_int32, number)),
        "shim_results": (size, (pointer,)),
        "shim_integer": (ctypes.c_int, (pointer, size, ctypes.POINTER(number))),
        "shim_tensor": (long, (pointer, size, pointer, pointer)),
    }
    for name, (result, arguments) in types.items():
        function = getattr(shim, name)
        function.restype, function.argtypes = result, arguments
    return shim


def _words(error: int) -> str:
    return f"{_ERRORS.get(error, 'an error of ExecuTorch')} ({error:#x})"
