"""A process on a phone: its streams over adb, its memory, and its end."""

from __future__ import annotations

import io
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from device_harness.devices.android.device_text import clean
from device_harness.devices.android.phone import (
    CLOSE_STDIN,
    EXIT,
    SHELL_HEAD,
    STDERR,
    STDIN,
    STDOUT,
    Phone,
    shut,
)
from device_harness.devices.android.server import read_exactly
from device_harness.devices.android.transfer import HOME
from device_harness.errors import DeviceError

if TYPE_CHECKING:
    from adbutils import AdbConnection

_START_SECONDS: Final = 60.0
SILENCE_SECONDS: Final = 120.0
"""How long a process may say nothing; a worker says every few seconds that it is alive."""
_LARGEST_PIECE: Final = 32 << 10
_LARGEST_PACKET: Final = 16 << 20
_LAST_WORDS: Final = 8192
_MOST_SAMPLES: Final = 200_000
# Android sets what its own loader reads, and ours would read too. $1 is the folder to run in.
_START: Final = """
mkdir -p "$1" && cd "$1" || exit 125
shift
unset LD_PRELOAD LD_LIBRARY_PATH
echo "$$" > pid
echo "$$" >&2
exec "$@" 2> stderr
"""
# A number may have been given to another process meanwhile. $1 is the process, $2 its folder.
_END: Final = """
if grep -q edgeforge/ "/proc/$1/cmdline"; then
  kill -9 "-$1"
  kill -9 "$1"
fi 2>/dev/null
rm -rf "$2"
"""
_LAST: Final = 'tail -c "$2" "$1/stderr"'
# It starts one program every half second, and ends with the process or when nobody listens. What
# the process itself started, as ExecuTorch's runtime, is counted with it.
_SAMPLE: Final = """
while [ -r "/proc/$1/status" ]; do
  now=0 most=0 state= children=
  read -r children 2>/dev/null < "/proc/$1/task/$1/children"
  for each in "$1" $children; do
    while read -r name value rest; do
      case $name in
        VmRSS:) now=$((now + value)) ;;
        VmHWM:) most=$((most + value)) ;;
        State:) [ "$each" = "$1" ] && state=$value ;;
      esac
    done < "/proc/$each/status"
  done 2>/dev/null
  [ "$state" = Z ] && exit 0
  echo "$now $most" || exit 0
  sleep 0.5
done
"""
# What earlier runs left that ended without their host. $1 is the folder of runs.
_SWEEP: Final = """
for folder in "$1"/*; do
  if read -r number 2>/dev/null < "$folder/pid"; then
    grep -q edgeforge/ "/proc/$number/cmdline" 2>/dev/null || rm -rf "$folder"
  fi
done
"""


@dataclass
class MemorySamples:
    """The memory of a process, sampled every half second.

    Attributes:
        peak_bytes: the most that it and what it started ever had, as the kernel says (VmHWM).
        samples: seconds since the start, and the resident bytes then.
    """

    peak_bytes: int = 0
    samples: list[tuple[float, int]] = field(default_factory=list)


class PhoneProcess:
    """A program that runs on a phone.

    Args:
        phone: the phone.
        command: the program and its arguments, quoted for the shell here.
        environment: of the program, by name.
        silence_seconds: how long it may say nothing.

    Raises:
        DeviceError: it cannot be started.

    Attributes:
        folder: the folder of the phone that it runs in, its own.
        memory: what is known of its memory so far.
    """

    def __init__(
        self,
        phone: Phone,
        command: Sequence[str],
        environment: Mapping[str, str],
        silence_seconds: float = SILENCE_SECONDS,
        folder: str = "",
    ) -> None:
        self._phone, self._silence = phone, silence_seconds
        self.folder = folder or new_folder()
        self.memory = MemorySamples()
        self._code: int | None = None
        self._closed, self._lost = False, False
        given = ["env", *(f"{name}={value}" for name, value in environment.items())]
        self._line: AdbConnection = phone.open(_START, self.folder, *given, *command)
        self._rest = b""
        try:
            self._pid = self._read_pid()
        except BaseException:
            shut(self._line)
            raise
        self._line.conn.settimeout(silence_seconds)
        self._answers = io.BufferedReader(_Answers(self), 1 << 20)
        self._requests = io.BufferedWriter(
            cast(io.RawIOBase, _Requests(self._line)), _LARGEST_PIECE
        )
        self._sampler: AdbConnection | None = None
        self._start_sampler()

    @property
    def requests(self) -> BinaryIO:
        """Its stdin."""
        return cast(BinaryIO, self._requests)

    @property
    def answers(self) -> BinaryIO:
        """Its stdout.

        Reading raises TimeoutError where the phone is silent too long, and ConnectionError where it
        is gone.
        """
        return cast(BinaryIO, self._answers)

    def wait(self, seconds: float) -> int | None:
        """Waits for its end: the exit code, 128 and more for a signal; None if it still runs."""
        until = time.monotonic() + seconds
        while self._code is None and not self._lost:
            left = until - time.monotonic()
            if left <= 0:
                return None
            try:
                self._line.conn.settimeout(left)
                self._packet()
            except OSError:
                break
        return self._code

    def last_words(self) -> str:
        """The end of what it printed on stderr."""
        if self._closed:
            return ""
        try:
            found = self._phone.run(
                _LAST, self.folder, str(_LAST_WORDS), seconds=10.0, most_bytes=2 * _LAST_WORDS
            )
        except DeviceError:
            return ""
        return clean(found.output)

    def close(self) -> None:
        """Ends it and all that it started there, and removes its folder; again, nothing."""
        if self._closed:
            return
        self._closed = True
        shut(self._line)
        if self._sampler is not None:
            shut(self._sampler)
        for turn in range(2):
            try:
                self._phone.run(_END, str(self._pid), self.folder, seconds=20.0, what="ending")
                return
            except DeviceError:
                # Its stdin has ended with the line; a worker then ends by itself.
                if turn or not self._phone.wait_until_back(5.0):
                    return

    def read_output(self) -> bytes:
        """The next part of its stdout; empty at its end.

        Raises:
            TimeoutError: it was silent for too long.
            ConnectionError: the phone is gone, or sends what no shell does.
        """
        while not self._rest:
            if self._code is not None:
                return b""
            self._line.conn.settimeout(self._silence)
            kind, data = self._packet()
            if kind == STDOUT:
                self._rest = data
        found, self._rest = self._rest, b""
        return found

    def _read_pid(self) -> int:
        self._line.conn.settimeout(_START_SECONDS)
        said = b""
        try:
            while not said.endswith(b"\n") and len(said) < _LAST_WORDS:
                kind, data = self._packet()
                said += data if kind == STDERR else b""
                if kind == STDOUT or self._code is not None:
                    break
        except TimeoutError as error:
            raise DeviceError(
                f"{self._phone.name} does not answer in starting a program: unlock it, restart it "
                f"if that does not help, and run it again"
            ) from error
        except OSError as error:
            raise DeviceError(
                f"{self._phone.name} was lost in starting a program: {error}"
            ) from error
        text = said.strip()
        if not text.isdigit() or not 1 < int(text) < 1 << 31:
            words = clean(said).strip()[:200] or f"exit code {self._code}"
            raise DeviceError(f"{self._phone.name} does not start programs: {words}")
        return int(text)

    def _packet(self) -> tuple[int, bytes]:
        kind, length = SHELL_HEAD.unpack(self._exactly(SHELL_HEAD.size))
        if length > _LARGEST_PACKET:
            raise self._gone("it sends what no shell does")
        data = self._exactly(length)
        if kind == EXIT and data:
            self._code = data[0]
        return kind, data

    def _exactly(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            piece = self._line.conn.recv(min(count - len(found), 1 << 20))
            if not piece:
                raise self._gone("unplugged, or its adb ended")
            found += piece
        return bytes(found)

    def _gone(self, why: str) -> ConnectionError:
        self._lost = True
        return ConnectionResetError(f"{why}: plug it in again, and run it again")

    def _start_sampler(self) -> None:
        with suppress(DeviceError):  # the figures are then missing, and nothing else
            self._sampler = self._phone.open(_SAMPLE, str(self._pid))
            threading.Thread(target=self._sample, name="memory of a phone", daemon=True).start()

    def _sample(self) -> None:
        line, started = self._sampler, time.monotonic()
        assert line is not None
        rest = b""
        with suppress(OSError, ValueError, DeviceError):
            line.conn.settimeout(self._silence)
            while len(self.memory.samples) < _MOST_SAMPLES:
                kind, length = SHELL_HEAD.unpack(read_exactly(line.conn, SHELL_HEAD.size))
                if kind == EXIT or length > _LARGEST_PIECE:
                    return
                rest = (rest + read_exactly(line.conn, length)) if kind == STDOUT else rest
                *lines, rest = rest.split(b"\n")
                for numbers in (words.split() for words in lines):
                    if len(numbers) == 2 and all(word.isdigit() for word in numbers):
                        now, most = (1024 * int(word[:12]) for word in numbers)
                        self.memory.peak_bytes = max(self.memory.peak_bytes, most)
                        self.memory.samples.append((time.monotonic() - started, now))
                rest = rest[-_LAST_WORDS:]


def sweep(phone: Phone) -> None:
    """Removes the folders of runs whose programs have ended.

    Raises:
        DeviceError: the phone is gone.
    """
    phone.run(_SWEEP, f"{HOME}/run", seconds=60.0, what="clearing away")


def new_folder() -> str:
    """A folder of the phone for one run; no two runs have the same."""
    return f"{HOME}/run/{secrets.token_hex(8)}"


class _Answers(io.RawIOBase):
    def __init__(self, process: PhoneProcess) -> None:
        self._process, self._rest = process, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = self._process.read_output()
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


class _Requests(io.RawIOBase):
    def __init__(self, line: AdbConnection) -> None:
        self._line = line

    def writable(self) -> bool:
        return True

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        for at in range(0, len(data), _LARGEST_PIECE):
            piece = bytes(data[at : at + _LARGEST_PIECE])
            self._line.conn.sendall(SHELL_HEAD.pack(STDIN, len(piece)) + piece)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            with suppress(Exception):  # the line may be gone
                self._line.conn.sendall(SHELL_HEAD.pack(CLOSE_STDIN, 0))
        super().close()
