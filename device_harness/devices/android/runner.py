"""Runs a program of the user's own on a phone: ExecuTorch's llama runner, llama-bench, others."""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from device_harness.devices.android.device import AndroidDevice
from device_harness.devices.android.device_text import clean, one_line
from device_harness.devices.android.process import MemorySamples, new_folder
from device_harness.devices.android.runner_output import (
    LARGEST_OUTPUT,
    RunnerFigures,
    read_figures,
)
from device_harness.devices.android.transfer import HOME
from device_harness.errors import DeviceError
from exporters.manifest import Manifest

_ELF: Final = b"\x7fELF"
_64_BIT: Final = 2
_AARCH64: Final = 183
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}")
_MOST_RESULTS: Final = 100
_LARGEST_RESULT: Final = 256 << 20
_ENDING_SECONDS: Final = 10.0
# The artifact's files are linked into the folder of the run, so that what the runner writes lies
# apart from them. $1 is the folder, $2 the artifact.
_LINK: Final = 'mkdir -p "$1" && cd "$1" && for file in "$2"/*; do ln -s "$file" . || exit 1; done'
_RESULTS: Final = """
cd "$1" && find . -type f ! -name pid ! -name stderr -exec stat -c '%s %n' {} +
"""


@dataclass(frozen=True)
class RunnerResult:
    """What a run of a user's program came to.

    Attributes:
        code: its exit code; 128 and more is a signal.
        output: what it printed, without control characters.
        errors: the end of what it printed on stderr.
        seconds: from its start to its end, by this host's clock.
        figures: what `read_figures` found in its output.
        memory: its memory, sampled every half second.
        results: the files that it wrote, here.
    """

    code: int
    output: str
    errors: str
    seconds: float
    figures: tuple[RunnerFigures, ...]
    memory: MemorySamples
    results: tuple[Path, ...] = ()


def run_runner(
    device: AndroidDevice,
    runner: Path,
    arguments: Sequence[str],
    artifact: tuple[Path, Manifest] | None = None,
    seconds: float = 600.0,
    results: Path | None = None,
    files: Sequence[Path] = (),
) -> RunnerResult:
    """Runs a program in a folder of its own, in which the artifact's files lie.

    Args:
        device: the phone.
        runner: the program on this host, for arm64; it is sent once.
        arguments: of the program; names of the artifact's files need no folder.
        artifact: the artifact's folder on this host and its manifest; None where none is needed.
        seconds: how long it may run.
        results: takes the files that it wrote; None to leave them.
        files: further files that it finds beside those of the artifact, such as a model.

    Raises:
        DeviceError: it is no program for arm64, the phone was lost, or it runs too long.
    """
    _require_arm64(runner)
    # Some programs do what their name says, and a shell whose name begins with r does less.
    name = runner.name if _NAME.fullmatch(runner.name) else "runner"
    there = device.put_files({name: runner}, f"the runner {runner.name}")
    folder = new_folder()
    places = [] if artifact is None else [device.put_artifact(*artifact)]
    places += [device.put_files({each.name: each}, f"the file {each.name}") for each in files]
    for place in places:
        linked = device.phone.run(_LINK, folder, place, what="preparing the run")
        if linked.code:
            raise DeviceError(
                f"{device.name} does not let {folder} be written, or two files have one name "
                f"({one_line(linked.errors)})"
            )
    started = time.monotonic()
    environment = {"HOME": HOME, "TMPDIR": HOME, "LD_LIBRARY_PATH": there}
    process = device.run([f"{there}/{name}", *arguments], environment, folder)
    try:
        process.requests.close()
        output = bytearray()
        try:
            while piece := process.answers.read1(1 << 16):  # type: ignore[attr-defined]
                output += piece
                _check(device, runner, len(output), time.monotonic() - started, seconds)
        except TimeoutError as error:
            raise DeviceError(
                f"{runner.name} on {device.name} has said nothing for too long: see whether it "
                f"hangs there"
            ) from error
        except OSError as error:
            raise DeviceError(f"{device.name} was lost while {runner.name} ran: {error}") from error
        code = process.wait(_ENDING_SECONDS)
        if code is None:
            raise DeviceError(f"{device.name} does not say how {runner.name} ended: run it again")
        took = time.monotonic() - started
        pulled = _pull(device, folder, results) if results is not None else ()
        words = process.last_words()
    finally:
        process.close()
    return RunnerResult(
        code,
        clean(bytes(output)),
        words,
        took,
        tuple(read_figures(bytes(output))),
        process.memory,
        pulled,
    )


def _check(device: AndroidDevice, runner: Path, size: int, took: float, seconds: float) -> None:
    if size > LARGEST_OUTPUT:
        raise DeviceError(
            f"{runner.name} on {device.name} prints more than {LARGEST_OUTPUT >> 20} MiB: let it "
            f"print less"
        )
    if took > seconds:
        raise DeviceError(
            f"{runner.name} on {device.name} runs for more than {seconds:.0f} s: ask it for less"
        )


def _require_arm64(runner: Path) -> None:
    """Refuses what no 64-bit arm phone can start."""
    try:
        with runner.open("rb") as file:
            head = file.read(20)
    except OSError as error:
        raise DeviceError(f"{runner} cannot be read: {error.strerror}") from error
    if len(head) < 20 or head[:4] != _ELF:
        raise DeviceError(f"{runner} is no program of Linux or Android: give one built for arm64")
    machine = int.from_bytes(head[18:20], "little")
    if head[4] != _64_BIT or machine != _AARCH64:
        raise DeviceError(
            f"{runner} is a program for another processor (ELF machine {machine}): build it for "
            f"arm64-v8a"
        )


def _pull(device: AndroidDevice, folder: str, results: Path) -> tuple[Path, ...]:
    """Brings the files that a run wrote; each is written beside and renamed when whole."""
    listed = device.phone.run(_RESULTS, folder, what="listing the results").output
    found = re.findall(rb"^(\d{1,12}) \./([^\n]+)$", listed, re.MULTILINE)
    if len(found) > _MOST_RESULTS:
        raise DeviceError(f"{device.name} wrote {len(found)} files, more than {_MOST_RESULTS}")
    pulled = []
    for size, given in found:
        name = given.decode("utf-8", "replace")
        inside = posixpath.normpath(name)
        if inside.startswith(("/", "..")) or not inside.isprintable():
            raise DeviceError(f"{device.name} names a result {clean(name)[:80]!r}: it is not taken")
        if int(size) > _LARGEST_RESULT:
            raise DeviceError(f"the result {inside} on {device.name} has {int(size)} bytes")
        content = device.phone.receive(f"{folder}/{name}", _LARGEST_RESULT)
        if len(content) != int(size):
            raise DeviceError(f"{device.name} gives {len(content)} of {int(size)} bytes of {name}")
        target = results / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.unfinished")
        beside.write_bytes(content)
        beside.replace(target)
        pulled.append(target)
    return tuple(pulled)
