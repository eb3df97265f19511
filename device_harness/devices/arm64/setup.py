"""Sets the emulator up: downloads what `pins` names, unpacks it, and compiles its Python files."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from device_harness.child_process import module_command, python_environment
from device_harness.devices.arm64.cores import CORES, write_core
from device_harness.devices.arm64.deb_file import unpack
from device_harness.devices.arm64.download import OUT_OF_SPACE
from device_harness.devices.arm64.executorch.setup import set_up_executorch
from device_harness.devices.arm64.fetching import bring_packages, bring_wheels
from device_harness.devices.arm64.pins import Pins, read_pins
from device_harness.devices.arm64.place import arm64_folder
from device_harness.devices.arm64.programs import last_line, run_program
from device_harness.devices.arm64.root import (
    Root,
    find_root,
    require_host,
    root_folder,
    what_is_wrong,
    write_record,
)
from device_harness.devices.arm64.wheels import unpack_wheel
from device_harness.devices.progress import Progress, no_progress
from device_harness.errors import SetupError
from quant.locked_folders import unfinished

# What neither the worker nor a shell opens.
_UNUSED: Final = re.compile(
    r"usr/share/|usr/lib/python3\.11/(?:test|idlelib|lib2to3|tkinter|turtledemo|ensurepip|pydoc_data"
    r"|distutils|unittest/test|curses|dbm|sqlite3|venv|wsgiref|xmlrpc|msilib)/"
    r"|usr/lib/aarch64-linux-gnu/gconv/|usr/bin/(?:ldd|localedef|iconv|locale|tzselect|zdump)"
)
_UNUSED_SITE: Final = re.compile(
    r".*/tests?/|.*/_pyinstaller/|numpy/(?:f2py|distutils)/|numpy/.*\.(?:pyi|h|a|c)$"
    r"|onnxruntime/(?:transformers|tools|quantization|backend|datasets)/|.*/doc/|.*\.pyi$"
)
_LIBRARIES: Final = re.compile(r"usr/lib/x86_64-linux-gnu/[^/]+\.so[^/]*")


def set_up(progress: Progress = no_progress, executorch: bool = False) -> Root:
    """Sets the emulator up where it is not, and returns its root.

    What is there and whole is not made again, what was downloaded is not downloaded again, and a
    download that was cut goes on. Of two processes that set up at once, the second waits.

    Args:
        progress: is told each download's bytes, and each step.
        executorch: whether ExecuTorch's kernels for arm64 are set up too.

    Raises:
        SetupError: this machine does not allow it, or something cannot be fetched; it says what to
            do.
        OSError: the disk is full.
    """
    require_host()
    pins = read_pins()
    try:
        with _alone(arm64_folder(), progress):
            root = _whole_root(pins, progress)
            if executorch:
                set_up_executorch(pins, progress)
            return root
    except OSError as error:
        if error.errno in OUT_OF_SPACE:
            raise
        where = error.filename or arm64_folder()
        raise SetupError(f"{where} cannot be written: {error.strerror or error}") from error


def _whole_root(pins: Pins, progress: Progress) -> Root:
    folder = root_folder(pins)
    if folder.is_dir() and what_is_wrong(folder) is None:
        return Root(folder)
    with unfinished(folder.parent, folder.name) as making:
        replaced = _make(making, pins, progress)
        write_record(making, replaced)
        shutil.rmtree(folder, ignore_errors=True)  # what is there is not whole
        making.rename(folder)
    return find_root(pins)


def _make(making: Path, pins: Pins, progress: Progress) -> dict[str, str]:
    """Makes a root in an empty folder; returns the packages that Debian had replaced."""
    packages = pins.packages_of("python", "shell", "qemu", "host")
    debs, replaced = bring_packages(packages, progress)
    wheels = bring_wheels(pins.wheels_of("site"), progress)
    root = Root(making)
    steps = len(debs) + len(wheels)
    for name in ("usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "tmp", "etc"):
        (root.system / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root.system / name).symlink_to(f"usr/{name}")
    (root.system / "etc/ld.so.cache").touch()  # else the host's would be found
    (making / "host/lib").mkdir(parents=True)
    for at, (package, deb) in enumerate(zip(packages, debs, strict=True)):
        progress("unpacking", at, steps)
        if package.part in ("python", "shell"):
            unpack(deb, root.system, lambda name: not _UNUSED.match(name))
        else:
            _unpack_for_host(deb, making, "qemu-aarch64" + "-plugins" * (package.part == "host"))
    for at, wheel in enumerate(wheels):
        progress("unpacking", len(debs) + at, steps)
        unpack_wheel(wheel, root.site, lambda name: not _UNUSED_SITE.match(name))
    progress("unpacking", steps, steps)
    for name, core in CORES.items():
        folder = root.core(name)
        folder.mkdir(parents=True)
        for entry in ("usr", "bin", "lib", "lib64", "sbin", "etc"):
            (folder / entry).symlink_to(f"../../system/{entry}")
        write_core(core, folder, max(1, min(4, os.cpu_count() or 1)))
    _name_tools(root)
    _compile(root, progress)
    return replaced


def _unpack_for_host(deb: Path, making: Path, qemu: str) -> None:
    """Takes programs and libraries of the host out of a package."""
    with unfinished(making / "host", "package") as apart:
        names = unpack(
            deb,
            apart,
            lambda name: (
                name in ("usr/bin/qemu-aarch64", "usr/bin/proot")
                or _LIBRARIES.fullmatch(name) is not None
            ),
        )
        for name in names:
            file = Path(name).name
            target = (
                making / "host/lib" / file
                if _LIBRARIES.fullmatch(name)
                else making / "host" / (qemu if file == "qemu-aarch64" else file)
            )
            if target.is_symlink() or target.exists():
                target.unlink()
            link = apart / name
            if link.is_symlink():  # a library's short name, beside it
                target.symlink_to(Path(os.readlink(link)).name)
            else:
                link.replace(target)


def _name_tools(root: Root) -> None:
    """Gives toybox's commands their names, and ``sh`` to mksh, as a phone has them."""
    binaries = root.system / "usr/bin"
    toybox = next(
        path for path in (binaries / "toybox", root.system / "usr/sbin/toybox") if path.exists()
    )
    listed = _emulated(root, [str(toybox)])
    for name in listed.split():
        if re.fullmatch(r"[a-z0-9_\[.-]+", name) and not os.path.lexists(binaries / name):
            (binaries / name).symlink_to(os.path.relpath(toybox, binaries))
    (binaries / "sh").unlink(missing_ok=True)
    (binaries / "sh").symlink_to("mksh")


def _emulated(root: Root, command: Sequence[str]) -> str:
    """What an arm64 program prints."""
    try:
        done = run_program([*root.command("max"), *command], seconds=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"the emulator {root.qemu} does not run here: {error}") from error
    if done.returncode:
        last = last_line(done.stderr)
        raise SetupError(f"{command[0]} fails under the emulator with {done.returncode}: {last}")
    return done.stdout


def _compile(root: Root, progress: Progress) -> None:
    """Compiles all Python files, by this Python where it is of the arm64 one's version.

    Importing what is not compiled takes three times as long under the emulator.
    """
    progress("compiling", 0, 1)
    options = ["-q", "-f", "--invalidation-mode", "unchecked-hash"]
    folders = [str(root.system / "usr/lib/python3.11"), str(root.site)]
    if sys.version_info[:2] == (3, 11):
        subprocess.run(
            module_command("compileall", *options, "-j", "0", *folders),
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            env=python_environment(),
            check=False,  # files that are no Python of this version, which nobody imports
        )
    else:
        with suppress(SetupError):  # the same files
            _emulated(root, [str(root.python), "-I", "-m", "compileall", *options, *folders])
    progress("compiling", 1, 1)


@contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    """Lets one process at a time set up."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another set-up", 0, 0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
