"""Puts an archive on a phone: in chunks, checked there, unpacked beside and renamed when whole.

A chunk that arrived is never sent again, so that a cut goes on where it ended, and an archive that
is there already sends nothing. What counts is what the phone's own ``sha256sum`` says.
"""

from __future__ import annotations

import re
from typing import Final

from device_harness.devices.android.archive import Archive, Chunk
from device_harness.devices.android.device_text import one_line
from device_harness.devices.android.phone import Phone, PhoneGoneError
from device_harness.devices.progress import Progress, no_progress
from device_harness.errors import DeviceError

HOME: Final = "/data/local/tmp/edgeforge"
"""The folder of the phone in which everything of EdgeForge's lies."""
_BACK_SECONDS: Final = 30.0
_MOST_CUTS: Final = 3
_SPARE: Final = 16 << 20
_HASHING_SECONDS: Final = 1800.0
_LISTED: Final = 16 << 20

# $1 is the home, $2 the archive's name.
_LOOK: Final = """
mkdir -p "$1/installed" "$1/run" || exit 1
if [ -f "$1/installed/$2/.whole" ]; then
  cat "$1/installed/$2/.whole"
  (cd "$1/installed/$2" && find . -type f ! -name .whole -exec stat -c '%s' {} +)
fi
stat -f -c 'free %a %S' "$1"
"""
# A chunk whose digest is not its name did not arrive whole.
_ARRIVED: Final = """
mkdir -p "$1/arriving/$2" && cd "$1/arriving/$2" || exit 1
find . -type f -exec sh -c 'sha256sum "$@"' sh {} +
"""
_UNPACK: Final = """
made="$1/installed/$2.unfinished"
rm -rf "$made" && mkdir -p "$made" || exit 1
cd "$1/arriving/$2" || exit 1
while read -r name; do cat "$name" || exit 1; done < order | tar -x -f - -C "$made" || exit 1
cd "$made" && find . -type f -exec sh -c 'sha256sum "$@"' sh {} +
"""
_FINISH: Final = """
made="$1/installed/$2.unfinished"
echo "$3" > "$made/.whole" && rm -rf "$1/installed/$2" && mv "$made" "$1/installed/$2" || exit 1
rm -rf "$1/arriving/$2"
"""
_CLEAR: Final = 'rm -rf "$1/installed/$2.unfinished"'


def install(phone: Phone, archive: Archive, what: str, progress: Progress = no_progress) -> str:
    """Puts an archive's files on a phone, if they are not there.

    Args:
        phone: the phone.
        archive: what to put there.
        what: names it in messages.
        progress: is told the bytes that have arrived.

    Returns:
        the folder of the phone that holds the files.

    Raises:
        DeviceError: the phone lacks the space, was lost and did not come back, or keeps something
            else than what was sent. What arrived is kept for the next try.
    """
    cuts = 0
    while True:
        try:
            return _install(phone, archive, what, progress)
        except PhoneGoneError as error:
            cuts += 1
            if cuts > _MOST_CUTS or not phone.wait_until_back(_BACK_SECONDS):
                raise PhoneGoneError(f"{what} did not arrive whole: {error}") from error


def _install(phone: Phone, archive: Archive, what: str, progress: Progress) -> str:
    folder = f"{HOME}/installed/{archive.name}"
    seal = f"{archive.name} {len(archive.digests)} {archive.unpacked_bytes}"
    said = phone.run(_LOOK, HOME, archive.name, seconds=60.0, most_bytes=_LISTED, what="looking")
    lines = said.output.decode("ascii", "replace").split("\n")
    if said.code:
        raise DeviceError(f"{phone.name} does not let {HOME} be written: {one_line(said.errors)}")
    if lines[0] == seal:
        sizes = [int(line) for line in lines[1:] if line.isdigit()]
        if len(sizes) == len(archive.digests) and sum(sizes) == archive.unpacked_bytes:
            return folder
    arrived = _arrived(phone, archive)
    missing = [c for c in _once(archive.chunks) if c.sha256 not in arrived]
    _require_space(phone, archive, sum(c.size for c in missing), what, lines)
    done = archive.size - sum(c.size for c in missing)
    for chunk in missing:
        progress(f"send {what}", done, archive.size)
        phone.send(archive.read(chunk), f"{HOME}/arriving/{archive.name}/{chunk.sha256}")
        done += chunk.size
    progress(f"send {what}", archive.size, archive.size)
    _unpack(phone, archive, what)
    finished = phone.run(_FINISH, HOME, archive.name, seal, seconds=300.0, what="finishing")
    if finished.code:
        raise _failed(phone, what, finished.errors)
    return folder


def _once(chunks: list[Chunk]) -> list[Chunk]:
    """Each content once: chunks of the same bytes are one file."""
    return list({chunk.sha256: chunk for chunk in chunks}.values())


def _arrived(phone: Phone, archive: Archive) -> set[str]:
    """The digests of the chunks that are there whole."""
    found = phone.run(
        _ARRIVED,
        HOME,
        archive.name,
        seconds=_HASHING_SECONDS,
        most_bytes=_LISTED,
        what="checking what arrived",
    )
    return {name for name, digest in _digests(found.output).items() if name == digest}


def _digests(output: bytes) -> dict[str, str]:
    """Reads what ``sha256sum`` printed: digests by path."""
    lines = re.findall(rb"^([0-9a-f]{64})  \./(.+)$", output, re.MULTILINE)
    return {name.decode("utf-8", "surrogateescape"): digest.decode() for digest, name in lines}


def _require_space(
    phone: Phone, archive: Archive, unsent: int, what: str, lines: list[str]
) -> None:
    free = next((line.split()[1:] for line in lines if line.startswith("free ")), [])
    if len(free) != 2 or not all(number.isdigit() for number in free):
        raise DeviceError(f"{phone.name} does not say how much space is free below {HOME}")
    has, needs = int(free[0]) * int(free[1]), unsent + archive.unpacked_bytes + _SPARE
    if has < needs:
        raise DeviceError(
            f"{phone.name} has {has / 1e6:,.0f} MB free, and {what} needs {needs / 1e6:,.0f} MB "
            f"there: free some, for instance by `adb shell rm -r {HOME}`, which holds what earlier "
            f"runs put there"
        )


def _unpack(phone: Phone, archive: Archive, what: str) -> None:
    order = "".join(f"{chunk.sha256}\n" for chunk in archive.chunks).encode()
    phone.send([order], f"{HOME}/arriving/{archive.name}/order")
    found = phone.run(
        _UNPACK,
        HOME,
        archive.name,
        seconds=_HASHING_SECONDS,
        most_bytes=_LISTED,
        what="unpacking",
    )
    if found.code or _digests(found.output) != archive.digests:
        phone.run(_CLEAR, HOME, archive.name, seconds=300.0, what="clearing away")
        # The digests of the files tell the same sooner; those of the chunks tell whose fault it is.
        arrived = _arrived(phone, archive)
        lost = [chunk for chunk in _once(archive.chunks) if chunk.sha256 not in arrived]
        if lost:
            raise DeviceError(
                f"{phone.name} said that {what} arrived, but {len(lost)} of {len(archive.chunks)} "
                f"parts there are damaged or missing: run it again, and try another cable or phone "
                f"if that does not help"
            )
        raise _failed(phone, what, found.errors)


def _failed(phone: Phone, what: str, errors: bytes) -> DeviceError:
    words = one_line(errors)
    if "space" in words.lower():
        return DeviceError(
            f"the disk of {phone.name} became full while {what} was unpacked: free some space on "
            f"it, and run it again; what has arrived is kept"
        )
    return DeviceError(
        f"{what} cannot be unpacked on {phone.name} ({words or 'files are missing or damaged'}): "
        f"run it again"
    )
