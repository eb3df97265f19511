"""Writes ``pins.json`` anew, for a maintainer: ``python -m device_harness.devices.arm64.renew_pins``.

Packages are taken from Debian's signed indexes as they are now, with the libraries that they need;
wheels from pip's index, in the versions of ``requirements/``.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from device_harness.devices.arm64.debian_index import Stanza, read_index
from device_harness.devices.arm64.mirror import find_mirror
from device_harness.devices.arm64.wheels import find_wheel

_ROOT = Path(__file__).parents[3]
_PYTHON = (
    "libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 "
    "python3.11-minimal libpython3.11-minimal libpython3.11-stdlib"
)
# By part: suite, architecture, packages, and whether the packages that they need come with them.
_PARTS = {
    "python": ("bookworm", "arm64", _PYTHON, False),
    "shell": ("bookworm", "arm64", "mksh toybox libcrypt1", False),
    "qemu": ("trixie", "amd64", "qemu-user", False),
    "host": ("bookworm", "amd64", "qemu-user proot", True),
    "cross": ("bookworm", "amd64", "g++-12-aarch64-linux-gnu", True),
}
# No header or library of the sanitizers is used by what is built.
_UNUSED = re.compile(r"lib(a|hwa|l|t|ub)san\d+-arm64-cross|gcc-12.*-base|gcc-12-base")
_WHEELS = {"site": ("numpy", "onnxruntime"), "executorch": ("executorch", "torch")}


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
    for part, names in _WHEELS.items():
        found = [(name, versions[name], find_wheel(name, versions[name])) for name in names]
        content["wheels"][part] = [
            {"name": name, "version": version, "sha256": where.sha256}
            for name, version, where in found
        ]
    text = json.dumps(content, indent=1) + "\n"
    Path(__file__).with_name("pins.json").write_text(text, encoding="utf-8")


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
        if name in found or name not in index or _UNUSED.fullmatch(name):
            continue
        found.append(name)
        left += index[name].needs
    return found


if __name__ == "__main__":
    main()
