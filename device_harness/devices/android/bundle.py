"""What a phone needs to run an artifact: Python, NumPy and the runtime for arm64, and our files.

They lie in two archives: the runtime's, which hardly ever changes, and EdgeForge's own files.
"""

from __future__ import annotations

import os
import py_compile
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from device_harness.devices.arm64.place import arm64_folder
from device_harness.devices.arm64.root import Root

LOADER: Final = "lib/ld-linux-aarch64.so.1"
PYTHON: Final = "bin/python3.11"
_PYTHON_VERSION: Final = (3, 11)
_PACKAGES: Final = ("device_harness", "exporters", "quant")
_OURS: Final = Path(__file__).parents[3]
_LIBRARIES: Final = "usr/lib/aarch64-linux-gnu"


def runtime_files(root: Root) -> dict[str, Path]:
    """The runtime's files by their path in the archive.

    Args:
        root: the emulator's root folder, which has all of it.
    """
    files = {PYTHON: root.python}
    for name, path in _libraries(root.system / _LIBRARIES):
        files[f"lib/{name}"] = path
    loader = Path(LOADER).name
    files[LOADER] = next(
        path
        for path in (root.system / _LIBRARIES / loader, root.system / "usr/lib" / loader)
        if path.exists()
    )
    files |= files_below(root.system / "usr/lib/python3.11", "lib/python3.11/")
    return files | files_below(root.site, "site/")


def worker_files() -> dict[str, Path]:
    """EdgeForge's files that the worker may import, by their path in the archive."""
    # A process that the worker starts makes the package `edgeforge` known by this file.
    files = {"edgeforge/__init__.py": _OURS / "edgeforge/__init__.py"}
    for package in _PACKAGES:
        for path in sorted((_OURS / package).rglob("*.py")):
            name = path.relative_to(_OURS).as_posix()
            files[name] = path
            compiled = _compiled(path, name)
            if compiled is not None:
                files[f"{Path(name).parent}/__pycache__/{path.stem}.cpython-311.pyc"] = compiled
        for path in sorted((_OURS / package).rglob("*.json")):
            files[path.relative_to(_OURS).as_posix()] = path
    return files


def _compiled(path: Path, name: str) -> Path | None:
    """The compiled file, where this Python is of the phone's version.

    An emulated phone would take seconds to compile all of them at each start. They are not checked
    against the source's time, which an archive does not keep.
    """
    if sys.version_info[:2] != _PYTHON_VERSION:
        return None
    status = path.stat()
    key = f"{status.st_mtime_ns:x}-{status.st_size:x}"
    target = arm64_folder() / "compiled" / f"{name.replace('/', '.')}-{key}.pyc"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # It is written beside and renamed by `py_compile` itself.
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(path), str(target), name, doraise=True, invalidation_mode=mode)
    return target


def _libraries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Shared libraries, each once: by the short name where a link gives it one."""
    links = {path.name: os.readlink(path) for path in folder.iterdir() if path.is_symlink()}
    longer = {os.path.basename(target) for target in links.values()}
    for path in sorted(folder.iterdir()):
        if ".so" in path.name and path.name not in longer and path.is_file():
            yield path.name, path


def files_below(folder: Path, before: str = "") -> dict[str, Path]:
    """The files below a folder by their path in the archive; links to files are files.

    Of a Python file that was compiled the compiled one is taken alone, under the name that Python
    looks for where there is no source: half as many files, and nothing to compile there.

    Args:
        folder: of this host.
        before: what their path in the archive begins with.
    """
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            compiled = path.parent / "__pycache__" / f"{path.stem}.cpython-311.pyc"
            taken, name = path, path.relative_to(folder)
            if path.suffix == ".py" and compiled.is_file():
                taken, name = compiled, name.with_suffix(".pyc")
            found[before + name.as_posix()] = taken
    return found
