"""Brings packages and wheels here, several at once, and keeps them for the next set-up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from device_harness.devices.arm64.debian_index import Stanza, read_index
from device_harness.devices.arm64.download import (
    NotOnMirrorError,
    NotReachableError,
    fetch,
    is_whole,
)
from device_harness.devices.arm64.mirror import find_mirror
from device_harness.devices.arm64.pins import Package, Wheel
from device_harness.devices.arm64.place import arm64_folder
from device_harness.devices.arm64.wheels import download_wheel, find_wheel
from device_harness.devices.progress import Progress
from device_harness.errors import SetupError
from quant.locked_folders import unfinished

_T = TypeVar("_T")
_R = TypeVar("_R")
_CONNECTIONS: Final = 4


class _Sum:
    """Reports the bytes of several downloads as those of one.

    Args:
        progress: is told.
        size: the bytes of all of them together.
    """

    def __init__(self, progress: Progress, size: int) -> None:
        self._progress, self._size = progress, size
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, stage: str, done: int, size: int) -> None:
        with self._lock:
            self._done[stage] = done
            self._progress("downloading", min(sum(self._done.values()), self._size), self._size)


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
    together = _Sum(progress, sum(package.size for package in packages))

    def bring(package: Package) -> Path | None:
        target = download_file(package.sha256, package.file)
        if is_whole(target, package.sha256):
            together(package.name, package.size, package.size)
            return target
        try:
            address = f"{find_mirror()}/{package.file}"
            return fetch(address, target, package.sha256, package.size, together)
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
    target = download_file(stanza.sha256, stanza.file)
    fetch(f"{mirror}/{stanza.file}", target, stanza.sha256, stanza.size, progress)
    return target, stanza.version


def bring_wheels(wheels: Sequence[Wheel], progress: Progress) -> list[Path]:
    """Downloads wheels.

    Raises:
        SetupError: something cannot be fetched.
    """
    together = _Sum(progress, sum(wheel.size for wheel in wheels))

    def bring(wheel: Wheel) -> Path:
        target = download_file(wheel.sha256, f"{wheel.name}-{wheel.version}.whl")
        if is_whole(target, wheel.sha256):
            together(wheel.name, wheel.size, wheel.size)
            return target
        address = find_wheel(wheel.name, wheel.version).address
        try:
            return fetch(address, target, wheel.sha256, wheel.size, together)
        except NotReachableError:  # the index may want a password or a certificate, as pip knows
            with unfinished(target.parent, wheel.name) as folder:
                file = download_wheel(wheel.name, wheel.version, folder)
                return fetch(file.as_uri(), target, wheel.sha256, wheel.size, together)

    return _at_once(bring, wheels)


def _at_once(work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(work, items))


def download_file(sha256: str, file: str) -> Path:
    """Where a download is kept."""
    return arm64_folder() / "downloads" / f"{sha256[:12]}-{file.rsplit('/', 1)[-1]}"
