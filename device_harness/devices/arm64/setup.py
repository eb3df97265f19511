"""Sets the emulator up: downloads what `pins` names, unpacks it, and compiles its Python files."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from device_harness.devices.arm64 import root as rooms
from device_harness.devices.arm64.cores import CORES, write_core
from device_harness.devices.arm64.deb_file import unpack
from device_harness.devices.arm64.debian_index import Stanza, read_index
from device_harness.devices.arm64.download import NotOnMirrorError, fetch
from device_harness.devices.arm64.mirror import find_mirror
from device_harness.devices.arm64.pins import Package, Pins, Wheel, read_pins
from device_harness.devices.arm64.place import arm64_folder
from device_harness.devices.arm64.progress import Progress, no_progress
from device_harness.devices.arm64.root import Root, find_root, root_folder, what_is_wrong
from device_harness.devices.arm64.wheels import find_wheel, unpack_wheel
from device_harness.errors import SetupError
from quant.locked_folders import unfinished

_T = TypeVar("_T")
_R = TypeVar("_R")
_CONNECTIONS: Final = 4
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
    """
    require_host()
    pins = read_pins()
    try:
        with _alone(arm64_folder()):
            root = _whole_root(pins, progress)
            if executorch:
                from device_harness.devices.arm64.executorch_setup import set_up_executorch

                set_up_executorch(root, pins, progress)
            return root
    except OSError as error:
        where = error.filename or arm64_folder()
        raise SetupError(f"{where} cannot be written: {error.strerror or error}") from error


def require_host() -> None:
    """Refuses machines that cannot run the emulator.

    Raises:
        SetupError: says what this machine is.
    """
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "AMD64"):
        raise SetupError(
            f"the arm64 emulator runs on Linux on x86-64 only, and this machine is {system} on "
            f"{machine}: use a phone over adb, or such a machine"
        )


def _whole_root(pins: Pins, progress: Progress) -> Root:
    folder = root_folder(pins)
    if folder.is_dir() and what_is_wrong(folder) is None:
        return find_root(pins)
    with unfinished(folder.parent, folder.name) as making:
        replaced = _make(making, pins, progress)
        rooms.write_record(making, replaced)
        shutil.rmtree(folder, ignore_errors=True)  # what is there is not whole
        making.rename(folder)
    return find_root(pins)


def _make(making: Path, pins: Pins, progress: Progress) -> dict[str, str]:
    """Makes a root in an empty folder; returns the packages that Debian had replaced."""
    packages = pins.packages_of("python", "shell", "qemu", "host")
    debs, replaced = bring_packages(packages, progress)
    wheels = bring_wheels(pins.wheels_of("site"), progress)
    root = Root(making, {})
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
        done = subprocess.run(
            [*root.command("max"), *command],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=600,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"the emulator {root.qemu} does not run here: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1][:300]
        raise SetupError(f"{command[0]} fails under the emulator with {done.returncode}: {last}")
    return done.stdout


def _compile(root: Root, progress: Progress) -> None:
    """Compiles all Python files, by this Python where it is of the arm64 one's version.

    Importing what is not compiled takes three times as long under the emulator.
    """
    progress("compiling", 0, 1)
    command = ["-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash"]
    folders = [str(root.system / "usr/lib/python3.11"), str(root.site)]
    if sys.version_info[:2] == (3, 11):
        subprocess.run(
            [sys.executable, "-I", *command, "-j", "0", *folders],
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            check=False,  # files that are no Python of this version, which nobody imports
        )
    else:
        try:
            _emulated(root, [str(root.python), "-I", *command, *folders])
        except SetupError:
            pass  # the same files
    progress("compiling", 1, 1)


def bring_packages(
    packages: Sequence[Package], progress: Progress
) -> tuple[list[Path], dict[str, str]]:
    """Downloads packages; one that Debian replaced is taken as Debian's signed index names it.

    Returns:
        the files in the order of ``packages``, and the versions of those that were replaced.

    Raises:
        SetupError: something cannot be fetched.
    """
    replaced: dict[str, str] = {}
    indexes: dict[tuple[str, str], dict[str, Stanza]] = {}

    def bring(package: Package) -> Path | None:
        target = _download(package.sha256, package.file)
        if target.is_file():
            return fetch("", target, package.sha256, package.size, progress)
        try:
            address = f"{find_mirror()}/{package.file}"
            return fetch(address, target, package.sha256, package.size, progress)
        except NotOnMirrorError:
            return None

    found = _at_once(bring, packages)
    for at, package in enumerate(packages):
        if found[at] is None:
            found[at], version = _bring_replacement(package, indexes, progress)
            replaced[package.name] = version
    return [path for path in found if path is not None], replaced


def _bring_replacement(
    package: Package, indexes: dict[tuple[str, str], dict[str, Stanza]], progress: Progress
) -> tuple[Path, str]:
    """Brings what Debian's signed index names in place of a package, and its version."""
    mirror, where = find_mirror(), (package.suite, package.architecture)
    if where not in indexes:
        indexes[where] = read_index(mirror, *where, arm64_folder() / "downloads", progress)
    stanza = indexes[where].get(package.name)
    if stanza is None:
        raise SetupError(
            f"{mirror} has neither {package.name} {package.version} nor any other version in "
            f"{package.suite}: set EDGEFORGE_DEBIAN_MIRROR to a mirror that keeps this release"
        )
    target = _download(stanza.sha256, stanza.file)
    fetch(f"{mirror}/{stanza.file}", target, stanza.sha256, stanza.size, progress)
    return target, stanza.version


def bring_wheels(wheels: Sequence[Wheel], progress: Progress) -> list[Path]:
    """Downloads wheels.

    Raises:
        SetupError: something cannot be fetched.
    """

    def bring(wheel: Wheel) -> Path:
        target = _download(wheel.sha256, f"{wheel.name}-{wheel.version}.whl")
        if target.is_file():
            return fetch("", target, wheel.sha256, progress=progress)
        address = find_wheel(wheel.name, wheel.version).address
        return fetch(address, target, wheel.sha256, progress=progress)

    return _at_once(bring, wheels)


def _at_once(work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(work, items))


def _download(sha256: str, file: str) -> Path:
    """Where a download is kept."""
    return arm64_folder() / "downloads" / f"{sha256[:12]}-{file.rsplit('/', 1)[-1]}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time set up."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
