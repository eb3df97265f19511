"""What the set-up downloads: packages of Debian and wheels, each with its version and digest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("pins.json")


@dataclass(frozen=True)
class Package:
    """A package of Debian.

    Attributes:
        name: as Debian calls it.
        version: Debian's version.
        suite: the release, such as ``bookworm``.
        architecture: ``arm64`` or ``amd64``, whose index lists it.
        file: its path below the mirror.
        sha256: of the file.
        size: of the file, in bytes.
        part: what it is for, a key of ``pins.json``.
    """

    name: str
    version: str
    suite: str
    architecture: str
    file: str
    sha256: str
    size: int
    part: str


@dataclass(frozen=True)
class Member:
    """A file of a wheel.

    Attributes:
        path: in the wheel.
        sha256: of the file.
        size: of the file, in bytes.
    """

    path: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """The path without folders."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Wheel:
    """A wheel for Python 3.11 on aarch64.

    Attributes:
        name: of the distribution.
        version: the one that runs on the host too.
        sha256: of the file.
        size: of the file, in bytes.
        part: what it is for.
        members: the files that are taken out of a large wheel; empty where it is taken whole.
    """

    name: str
    version: str
    sha256: str
    size: int
    part: str
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Pins:
    """Everything that the set-up downloads."""

    packages: tuple[Package, ...]
    wheels: tuple[Wheel, ...]

    def packages_of(self, *parts: str) -> list[Package]:
        """The packages of some parts."""
        return [package for package in self.packages if package.part in parts]

    def wheels_of(self, part: str) -> list[Wheel]:
        """The wheels of a part."""
        return [wheel for wheel in self.wheels if wheel.part == part]

    def digest(self, *parts: str) -> str:
        """Names what some parts hold, in twelve characters: another pin gives another name."""
        pins: list[Package | Wheel] = [*self.packages, *self.wheels]
        chosen = sorted(f"{pin.name} {pin.sha256}" for pin in pins if pin.part in parts)
        return hashlib.sha256("\n".join(chosen).encode()).hexdigest()[:12]


@lru_cache
def read_pins(file: Path = _FILE) -> Pins:
    """Returns what ``pins.json`` says."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    packages = tuple(
        Package(part=part, suite=where["suite"], architecture=where["architecture"], **package)
        for part, where in content["packages"].items()
        for package in where["files"]
    )
    wheels = tuple(
        Wheel(
            part=part,
            members=tuple(Member(**member) for member in wheel.pop("members", ())),
            **wheel,
        )
        for part, files in content["wheels"].items()
        for wheel in files
    )
    return Pins(packages, wheels)
