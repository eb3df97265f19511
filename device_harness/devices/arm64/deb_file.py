"""Unpacks packages of Debian without Debian's tools, and without the right to make devices."""

from __future__ import annotations

import io
import lzma
import posixpath
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from device_harness.errors import SetupError

_MAGIC: Final = b"!<arch>\n"
_LARGEST: Final = 1 << 30  # bytes of the files of one package, unpacked


def unpack(deb: Path, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Unpacks the files and links of a package below a folder.

    Folders ``bin``, ``lib``, ``lib64`` and ``sbin`` of the root are those of ``usr``, as on any
    Debian. A link to an absolute path is made relative, so that it stays in the folder.

    Args:
        deb: the package.
        folder: takes the files; it may hold those of other packages.
        wanted: is given a path like ``usr/bin/python3.11``.

    Returns:
        the paths that were unpacked.

    Raises:
        SetupError: the package is damaged, or wants to write outside of the folder.
    """
    try:
        with deb.open("rb") as content, tarfile.open(fileobj=_data(content, deb)) as archive:
            return _unpack(archive, deb, folder, wanted)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        raise SetupError(f"{deb} is damaged: {' '.join(str(error).split())[:200]}") from error


def _data(content: BinaryIO, deb: Path) -> BinaryIO:
    """The archive inside a package that holds its files."""
    if content.read(8) != _MAGIC:
        raise SetupError(f"{deb} is no package of Debian")
    while len(header := content.read(60)) == 60:
        name, size = header[:16].decode("ascii", "replace").strip(" /"), int(header[48:58])
        if name in ("data.tar.xz", "data.tar.gz", "data.tar"):
            return io.BytesIO(content.read(size))
        if name.startswith("data.tar"):
            raise SetupError(f"{deb} is packed as {name}, which is not read here")
        content.seek(size + size % 2, 1)
    raise SetupError(f"{deb} is damaged: it holds no files")


def _unpack(
    archive: tarfile.TarFile, deb: Path, folder: Path, wanted: Callable[[str], bool]
) -> list[str]:
    done: list[str] = []
    total = 0
    for member in archive:
        name = _merged(_inside(member.name, deb))
        if not name or not wanted(name):
            continue
        target = folder / name
        if member.isfile():
            total += member.size
            if total > _LARGEST:
                raise SetupError(f"{deb} unpacks to more than {_LARGEST} bytes")
            _make_parent(folder, target, deb)
            source = archive.extractfile(member)
            assert source is not None
            with source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            target.chmod(0o755 if member.mode & 0o100 else 0o644)
        elif member.islnk():
            _make_parent(folder, target, deb)
            source_file = folder / _merged(_inside(member.linkname, deb))
            if source_file.is_symlink() or not source_file.is_file():
                raise SetupError(f"{deb} is damaged: {name} links to what it does not hold")
            shutil.copy2(source_file, target)
        elif member.issym():
            _make_parent(folder, target, deb)
            target.symlink_to(_link(name, member.linkname, deb))
        else:
            continue
        done.append(name)
    return done


def _inside(name: str, deb: Path) -> str:
    """A member's path, which must stay below the folder."""
    path = posixpath.normpath(name.lstrip("/"))
    if path == ".." or path.startswith("../") or "\0" in path:
        raise SetupError(f"{deb} wants to write outside of its folder: {name!r}")
    return "" if path == "." else path


def _merged(name: str) -> str:
    """A path in a root whose ``bin``, ``lib``, ``lib64`` and ``sbin`` are those of ``usr``.

    >>> _merged("lib/aarch64-linux-gnu/libc.so.6"), _merged("etc/passwd")
    ('usr/lib/aarch64-linux-gnu/libc.so.6', 'etc/passwd')
    """
    first = name.split("/", 1)[0]
    return f"usr/{name}" if first in ("bin", "lib", "lib64", "sbin") else name


def _link(name: str, to: str, deb: Path) -> str:
    """Where a link points to, as a relative path."""
    here = posixpath.dirname(name)
    inside = _inside(posixpath.join(here, to) if not to.startswith("/") else to, deb)
    return posixpath.relpath(_merged(inside), here or ".")


def _make_parent(folder: Path, target: Path, deb: Path) -> None:
    """Makes the folder of a target, and refuses one that a link leads away."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise SetupError(f"{deb} wants to write outside of its folder: {target}")
    target.unlink(missing_ok=True)
