"""The root folder that the emulator runs in, and how one that was cut short is known."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from device_harness.devices.arm64.cores import CORES
from device_harness.devices.arm64.pins import Pins, read_pins
from device_harness.devices.arm64.place import arm64_folder
from device_harness.errors import SetupError
from quant.sealed_json import seal, unseal

RECORD: Final = "whole.json"
PARTS: Final = ("python", "shell", "qemu", "host", "site")
# Counts up when the same downloads are unpacked or compiled in another way.
_BUILD: Final = 1
SET_UP: Final = "edgeforge devices setup arm64"


@dataclass(frozen=True)
class Root:
    """A whole root folder.

    Attributes:
        folder: holds all of it.
    """

    folder: Path

    @property
    def replaced(self) -> dict[str, str]:
        """Packages that Debian had replaced, with the version that was taken."""
        return dict(_record(self.folder)["replaced"])

    @property
    def system(self) -> Path:
        """The arm64 system: Python 3.11, mksh, toybox and the libraries that they need."""
        return self.folder / "system"

    @property
    def site(self) -> Path:
        """The aarch64 packages: numpy and onnxruntime."""
        return self.folder / "site"

    @property
    def python(self) -> Path:
        """The arm64 Python."""
        return self.system / "usr/bin/python3.11"

    @property
    def qemu(self) -> Path:
        """The emulator, one static program of the host."""
        return self.folder / "host/qemu-aarch64"

    @property
    def proot(self) -> list[str]:
        """The command of proot on the host, for kernels without user namespaces."""
        return [*self._loader, str(self.folder / "host/proot")]

    @property
    def counting_qemu(self) -> list[str]:
        """The command of an emulator on the host that takes plugins; it knows fewer cores."""
        return [*self._loader, str(self.folder / "host/qemu-aarch64-plugins")]

    @property
    def _loader(self) -> list[str]:
        """Programs of the host run with the libraries that they were built with."""
        libraries = self.folder / "host/lib"
        return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)]

    def core(self, name: str) -> Path:
        """The root as programs see it on a core: the system with the core's own /proc and /sys.

        It holds links to the system, so that it serves ``qemu -L``, but no ``chroot``.
        """
        return self.folder / "cores" / name

    def counting_command(self, core: str, plugin: str) -> list[str]:
        """The same by the emulator that takes plugins.

        Args:
            core: the core.
            plugin: the file of a plugin with its options, as ``-plugin`` takes them.
        """
        cpu = CORES[core].counted_as
        return [*self.counting_qemu, "-L", str(self.core(core)), "-cpu", cpu, "-plugin", plugin]

    def command(self, core: str) -> list[str]:
        """The command that begins an arm64 program on a core; the program's own follows.

        Paths that the system does not hold are the host's.
        """
        return [str(self.qemu), "-L", str(self.core(core)), "-cpu", core]


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


def root_folder(pins: Pins | None = None) -> Path:
    """Where the root of these pins is, or would be."""
    name = (pins or read_pins()).digest(*PARTS)
    return arm64_folder() / f"root-{name}-{_BUILD}"


def find_root(pins: Pins | None = None) -> Root:
    """Returns the root that was set up, after a look at the size of every file.

    Raises:
        SetupError: there is none, or it is not whole.
    """
    folder = root_folder(pins)
    if not folder.is_dir():
        raise SetupError(f"the arm64 emulator is not set up: run `{SET_UP}` once")
    if wrong := what_is_wrong(folder):
        raise SetupError(
            f"the arm64 emulator's root {folder} is not whole ({wrong}): run `{SET_UP}`"
        )
    return Root(folder)


def write_record(folder: Path, replaced: Mapping[str, str]) -> None:
    """Records that a folder is whole, with the size of each file."""
    record = {"schema_version": 1, "replaced": dict(replaced), "files": dict(_files(folder))}
    (folder / RECORD).write_text(seal(record), encoding="utf-8")


def what_is_wrong(folder: Path) -> str | None:
    """Says what a folder lacks of what its record states; None where it is whole."""
    try:
        recorded = _record(folder)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{RECORD} is missing or damaged"
    found = dict(_files(folder))
    for name, what in recorded.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != what:
            return f"{name} has {found[name]} bytes, not {what}"
    return None


def _record(folder: Path) -> dict[str, Any]:
    return unseal((folder / RECORD).read_text(encoding="utf-8"))


def _files(folder: Path) -> Iterator[tuple[str, int | str]]:
    """Each file with its size, and each link with where it points to."""
    for where, folders, names in os.walk(folder):
        for name in (*names, *folders):
            path = os.path.join(where, name)
            relative = os.path.relpath(path, folder)
            if os.path.islink(path):
                yield relative, os.readlink(path)
            elif name not in folders and relative != RECORD:
                yield relative, os.lstat(path).st_size
