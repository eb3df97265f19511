"""Sets up ExecuTorch's runtime for arm64: libraries out of two wheels, and a shim that is built.

The wheel of executorch holds the runtime with its kernels, and headers. What it lacks (thread pool,
processor detection, KleidiAI) is in torch's library for the processor, of which nothing else is
used. The shim is built by Debian's compiler for arm64, which is taken out of its packages, used and
removed; no compiler of the host is asked.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from device_harness.devices.arm64.deb_file import unpack
from device_harness.devices.arm64.download import fetch
from device_harness.devices.arm64.executorch.constructors import leave_out_constructors
from device_harness.devices.arm64.executorch.place import executorch_folder
from device_harness.devices.arm64.fetching import bring_packages, bring_wheels, download_file
from device_harness.devices.arm64.pins import Pins, Wheel
from device_harness.devices.arm64.place import arm64_folder
from device_harness.devices.arm64.programs import run_program
from device_harness.devices.arm64.remote_wheel import NoRangesError, fetch_members
from device_harness.devices.arm64.root import what_is_wrong, write_record
from device_harness.devices.arm64.wheels import find_wheel, unpack_wheel
from device_harness.devices.progress import Progress
from device_harness.errors import SetupError
from quant.locked_folders import unfinished

_HERE: Final = Path(__file__).parent
_RUNTIME: Final = {
    "executorch/extension/pybindings/_portable_lib.cpython-311-aarch64-linux-gnu.so": None,
    "executorch/kernels/quantized/libquantized_ops_aot_lib.so": None,
    "executorch/extension/llm/custom_ops/libcustom_ops_aot_lib.so": None,
}
_HEADERS: Final = "executorch/include/"
# Libraries that others name and nothing here calls: of the GPU, and of torch beyond the processor.
_EMPTY: Final = ("libtorch.so", "libcudart.so.13", "libcupti.so.13")
_TORCH: Final = "libtorch_cpu.so"
_TRIPLE: Final = "aarch64-linux-gnu"


def set_up_executorch(pins: Pins, progress: Progress) -> Path:
    """Sets the runtime up where it is not, and returns its folder.

    Raises:
        SetupError: something cannot be fetched or built.
    """
    folder = executorch_folder(pins)
    if folder.is_dir() and what_is_wrong(folder) is None:
        return folder
    runtime, torch = pins.wheels_of("executorch")
    (wheel,) = bring_wheels([runtime], progress)
    libraries = _bring_members(torch, progress)
    debs, _ = bring_packages(pins.packages_of("cross"), progress)
    with unfinished(folder.parent, folder.name) as making:
        progress("building ExecuTorch's shim", 0, 1)
        for file, member in zip(libraries, torch.members, strict=True):
            if member.name == _TORCH:
                shutil.copyfile(file, making / member.name)
                leave_out_constructors(making / member.name)
            else:
                _link_or_copy(file, making / member.name)
        with unfinished(making, "build") as build:
            unpack_wheel(wheel, build, lambda name: name in _RUNTIME or name.startswith(_HEADERS))
            for name in _RUNTIME:
                (build / name).replace(making / Path(name).name)
            for deb in debs:
                unpack(deb, build / "compiler", _is_for_compiling)
            _build(build, making)
        progress("building ExecuTorch's shim", 1, 1)
        (making / "version").write_text(runtime.version, encoding="ascii")
        write_record(making, {})
        shutil.rmtree(folder, ignore_errors=True)  # what is there is not whole
        making.rename(folder)
    return folder


def _bring_members(torch: Wheel, progress: Progress) -> list[Path]:
    """The libraries of torch; the whole wheel where its server sends no parts of it."""
    downloads = arm64_folder() / "downloads"
    address = find_wheel(torch.name, torch.version).address
    try:
        return fetch_members(address, torch.members, downloads, progress)
    except NoRangesError:
        pass
    wheel = fetch(
        address, download_file(torch.sha256, torch.name), torch.sha256, torch.size, progress
    )
    return fetch_members(wheel.as_uri(), torch.members, downloads, progress)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # they are large, and nobody changes them
    except OSError:
        shutil.copyfile(source, target)


def _is_for_compiling(name: str) -> bool:
    return not re.match(r"usr/share/|usr/lib/gcc-cross/.*/(?:lto|.*\.a$)|usr/libexec/", name)


def _build(build: Path, making: Path) -> None:
    """Builds the shim and the libraries that are named and not needed."""
    compiler, headers = build / "compiler", build / _HEADERS.rstrip("/")
    gcc = compiler / f"usr/lib/gcc-cross/{_TRIPLE}/12"
    cross = compiler / f"usr/{_TRIPLE}/include"
    includes = [cross / "c++/12", cross / f"c++/12/{_TRIPLE}", gcc / "include", cross]
    command = [str(gcc / "cc1plus"), "-quiet", "-nostdinc", "-nostdinc++", "-O2", "-fPIC"]
    command += ["-std=c++17", "-mno-outline-atomics", "-D_GNU_SOURCE"]
    command += ["-DC10_USING_CUSTOM_GENERATED_MACROS"]
    command += [f"-isystem{path}" for path in includes]
    command += [f"-I{headers}", f"-I{headers}/executorch/runtime/core/portable_type/c10"]
    assembly = build / "shim.s"
    _run(compiler, [*command, str(_HERE / "shim.cpp"), "-o", str(assembly)])
    _link(compiler, assembly, making / "libshim.so")
    _link(compiler, _HERE / "stub_torch_python.s", making / "libtorch_python.so")
    nothing = build / "nothing.s"
    nothing.write_text('.section .note.GNU-stack,"",%progbits\n', encoding="ascii")
    for name in _EMPTY:
        _link(compiler, nothing, making / name)


def _link(compiler: Path, assembly: Path, library: Path) -> None:
    """A shared library of one assembly file; what it lacks is found where it is loaded."""
    thing = assembly.name.replace(".s", ".o")
    compiled = compiler / thing
    _run(compiler, [str(compiler / f"usr/bin/{_TRIPLE}-as"), str(assembly), "-o", str(compiled)])
    linker = [str(compiler / f"usr/bin/{_TRIPLE}-ld.bfd"), "-shared", f"-soname={library.name}"]
    _run(compiler, [*linker, "-o", str(library), str(compiled)])


def _run(compiler: Path, command: Sequence[str]) -> None:
    """Runs a program of the compiler's packages with the libraries that it was built with."""
    libraries = compiler / "usr/lib/x86_64-linux-gnu"
    loader = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)]
    done = run_program([*loader, *command])
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason"]
        raise SetupError(
            f"{Path(command[0]).name} cannot build ExecuTorch's shim: {errors[0][:300]}"
        )
