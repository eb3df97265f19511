"""The mirror of Debian's packages that this machine uses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from device_harness.errors import SetupError

VARIABLE = "EDGEFORGE_DEBIAN_MIRROR"
_APT = Path("/etc/apt")
_SUITES = frozenset({"bookworm", "trixie", "forky", "sid", "stable", "testing", "oldstable"})


def find_mirror(apt: Path = _APT) -> str:
    """Returns the address of a mirror of Debian, without a slash at its end.

    ``$EDGEFORGE_DEBIAN_MIRROR`` if set, else the first of the machine's own apt sources that serves
    a release of Debian.

    Args:
        apt: apt's folder of settings.

    Raises:
        SetupError: there is none.
    """
    if chosen := os.environ.get(VARIABLE):
        if not chosen.startswith(("http://", "https://")):
            raise SetupError(
                f"{VARIABLE} is {chosen!r}: give an address that begins with http:// or https://"
            )
        return chosen.rstrip("/")
    for address, suites in _sources(apt):
        if _SUITES & set(suites) and address.startswith(("http://", "https://")):
            return address.rstrip("/")
    raise SetupError(
        f"no mirror of Debian's packages is among this machine's apt sources ({apt}): set "
        f"{VARIABLE} to the address of one"
    )


def _sources(apt: Path) -> Iterator[tuple[str, list[str]]]:
    """Each address of apt's sources with the suites that are taken from it."""
    folder = apt / "sources.list.d"
    for file in (apt / "sources.list", *sorted(folder.glob("*.list"))):
        for line in _text(file).splitlines():
            words = re.sub(r"\[[^]]*\]", " ", line.split("#")[0]).split()
            if len(words) >= 3 and words[0] == "deb":
                yield words[1], [words[2]]
    for file in sorted(folder.glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", _text(file)):
            fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*)$", stanza, re.MULTILINE))
            if "deb" in fields.get("Types", "").split() and fields.get("Enabled", "yes") != "no":
                for address in fields.get("URIs", "").split():
                    yield address, fields.get("Suites", "").split()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
