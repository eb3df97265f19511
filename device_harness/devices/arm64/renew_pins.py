"""Writes ``pins.json`` anew, for a maintainer.

``python -m device_harness.devices.arm64.renew_pins``, in a checkout.
Packages are taken from Debian's signed indexes as they are now, with the libraries that they need;
wheels from pip's index, in the versions of ``requirements/``.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from device_harness.devices.arm64.debian_index import Stanza, read_index
from device_harness.devices.arm64.mirror import find_mirror
from device_harness.devices.arm64.remote_wheel import Ranges
from device_harness.devices.arm64.wheels import find_wheel

_ROOT = Path(__file__).parents[3]
_PYTHON = (
    "libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 "
    "python3.11-minimal libpython3.11-minimal libpython3.11-stdlib"
)
# What compiles one file of C++ without a driver, and links it without libraries.
_COMPILER = (
    "g++-12-aarch64-linux-gnu libgcc-12-dev-arm64-cross libstdc++-12-dev-arm64-cross "
    "libc6-dev-arm64-cross linux-libc-dev-arm64-cross binutils-aarch64-linux-gnu libbinutils "
    "libjansson4 libgmp10 libmpfr6 libmpc3 libisl23 libzstd1 zlib1g libc6 libgcc-s1 libstdc++6"
)
# By part: suite, architecture, packages, and whether the packages that they need come with them.
_PARTS = {
    "python": ("bookworm", "arm64", _PYTHON, False),
    "shell": ("bookworm", "arm64", "mksh toybox libcrypt1", False),
    "qemu": ("trixie", "amd64", "qemu-user", False),
    "host": ("bookworm", "amd64", "qemu-user proot", True),
    "cross": ("bookworm", "amd64", _COMPILER, False),
}
_WHEELS = {"site": ("numpy", "onnxruntime"), "executorch": ("executorch", "torch")}
# Of these wheels, only the files that match are taken.
_MEMBERS = {
    "torch": re.compile(
        r"torch/lib/lib(?:torch_cpu|c10|arm_compute|arm_compute_graph|gfortran|gomp|nvpl_\w+)\.so.*"
    )
}


def main() -> None:
    """Writes the file."""
    content: dict[str, dict[str, object]] = {"packages": {}, "wheels": {}}
    mirror = find_mirror()
    for part, (suite, architecture, names, needed) in _PARTS.items():
        with tempfile.TemporaryDirectory() as folder:
            index = read_index(mirror, suite, architecture, Path(folder))
        chosen = sorted(_closure(index, names.split())) if needed else names.split()
        files = [
            {
                "name": each.name,
                "version": each.version,
                "file": each.file,
                "sha256": each.sha256,
                "size": each.size,
            }
            for each in (index[name] for name in chosen)
        ]
        content["packages"][part] = {"suite": suite, "architecture": architecture, "files": files}
    versions = dict(_versions())
    for part, wheels in _WHEELS.items():
        content["wheels"][part] = [_wheel(name, versions[name]) for name in wheels]
    text = json.dumps(content, indent=1) + "\n"
    Path(__file__).with_name("pins.json").write_text(text, encoding="utf-8")


def _wheel(name: str, version: str) -> dict[str, object]:
    found = find_wheel(name, version)
    file = Ranges(found.address)
    row: dict[str, object] = {"name": name, "version": version, "sha256": found.sha256}
    row["size"] = file.seek(0, 2)
    if name in _MEMBERS:
        with zipfile.ZipFile(io.BufferedReader(file, 1 << 20)) as archive:
            record = archive.read(f"{name}-{version}.dist-info/RECORD").decode()
            sizes = {each.filename: each.file_size for each in archive.infolist()}
        row["members"] = [
            {"path": path, "sha256": _hexadecimal(digest), "size": sizes[path]}
            for path, digest, _ in csv.reader(record.splitlines())
            if _MEMBERS[name].fullmatch(path)
        ]
    return row


def _hexadecimal(digest: str) -> str:
    """A digest of a wheel's record, as others write it."""
    return base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=").hex()


def _versions() -> Iterator[tuple[str, str]]:
    for file in ("lock-run.txt", "lock-executorch.txt"):
        for line in (_ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines():
            name, equal, version = line.partition("==")
            if equal:
                yield name.lower(), version


def _closure(index: dict[str, Stanza], names: Sequence[str]) -> list[str]:
    """The packages with all that they need, by the first of each list of alternatives."""
    found: list[str] = []
    left = list(names)
    while left:
        name = left.pop()
        if name in found or name not in index:
            continue
        found.append(name)
        left += index[name].needs
    return found


if __name__ == "__main__":
    main()
