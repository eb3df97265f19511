"""What Debian itself says that a release holds now, by its signed index."""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from device_harness.devices.arm64.download import fetch
from device_harness.devices.progress import Progress, no_progress
from device_harness.errors import SetupError

KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_LARGEST_RELEASE: Final = 4 << 20
_LARGEST_INDEX: Final = 512 << 20  # bytes, unpacked


@dataclass(frozen=True)
class Stanza:
    """What an index says about a package.

    Attributes:
        name: the package.
        version: the version that the release holds.
        file: its path below the mirror.
        sha256: of the file.
        size: of the file, in bytes.
        needs: the packages that it depends on, the first of each list of alternatives.
    """

    name: str
    version: str
    file: str
    sha256: str
    size: int
    needs: tuple[str, ...]


def read_index(
    mirror: str,
    suite: str,
    architecture: str,
    folder: Path,
    progress: Progress = no_progress,
    keyring: Path = KEYRING,
) -> dict[str, Stanza]:
    """Returns the packages of a release, after Debian's signature was checked by ``gpgv``.

    Args:
        mirror: address of a mirror.
        suite: the release, such as ``bookworm``.
        architecture: such as ``arm64``.
        folder: takes the index.
        progress: is told the bytes.
        keyring: Debian's public keys.

    Raises:
        SetupError: ``gpgv`` or the keys are missing, the signature is not Debian's, or the mirror
            fails.
    """
    release = _signed_release(mirror, suite, folder, keyring)
    path = f"main/binary-{architecture}/Packages.xz"
    listed = re.search(
        rf"^SHA256:\n(?: .*\n)*? ([0-9a-f]{{64}}) +(\d+) {re.escape(path)}$", release, re.MULTILINE
    )
    if listed is None:
        raise SetupError(f"Debian's index of {suite} at {mirror} lists no {path}")
    sha256, size = listed[1], int(listed[2])
    packed = fetch(
        f"{mirror}/dists/{suite}/{path}",
        folder / f"{suite}-{architecture}-Packages.xz",
        sha256,
        size,
        progress,
    )
    try:
        with lzma.open(packed, "rt", encoding="utf-8") as text:
            return dict(_stanzas(text.read(_LARGEST_INDEX)))
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise SetupError(f"Debian's index of {suite} cannot be read: {error}") from error


def _signed_release(mirror: str, suite: str, folder: Path, keyring: Path) -> str:
    """The release file's text, which Debian signed."""
    import urllib.request

    gpgv = shutil.which("gpgv")
    if gpgv is None or not keyring.is_file():
        missing = "gpgv" if gpgv is None else str(keyring)
        raise SetupError(
            f"Debian replaced a pinned package, and what replaced it cannot be checked without "
            f"{missing}: install gpgv and debian-archive-keyring, or update EdgeForge"
        )
    address = f"{mirror}/dists/{suite}/InRelease"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        signed, text = Path(temporary) / "InRelease", Path(temporary) / "Release"
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                signed.write_bytes(answer.read(_LARGEST_RELEASE))
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise SetupError(f"{address} cannot be fetched: {reason}") from None
        checked = subprocess.run(
            [gpgv, "--keyring", str(keyring), "--output", str(text), str(signed)],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if checked.returncode or not text.is_file():
            raise SetupError(
                f"{address} has no good signature of Debian's archive: nothing that it names is "
                f"used"
            )
        return text.read_text(encoding="utf-8")


def _stanzas(text: str) -> list[tuple[str, Stanza]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", block, re.MULTILINE))
        try:
            stanza = Stanza(
                fields["Package"],
                fields["Version"],
                fields["Filename"],
                fields["SHA256"],
                int(fields["Size"]),
                _needs(f"{fields.get('Depends', '')},{fields.get('Pre-Depends', '')}"),
            )
        except (KeyError, ValueError):
            continue
        found.append((stanza.name, stanza))
    return found


def _needs(depends: str) -> tuple[str, ...]:
    """The names in a field ``Depends``.

    >>> _needs("libc6 (>= 2.34), a:any | b,")
    ('libc6', 'a')
    """
    names = [re.split(r"[ (:|]", part.strip(), maxsplit=1)[0] for part in depends.split(",")]
    return tuple(name for name in names if name)
