"""`Phone`: commands and files over adb, bounded in time and size."""

from __future__ import annotations

import shlex
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from device_harness.devices.android.device_text import one_line
from device_harness.devices.android.server import choose_phone, server_port
from device_harness.errors import DeviceError

if TYPE_CHECKING:
    from adbutils import AdbConnection

STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
SHELL_HEAD: Final = struct.Struct("<BI")
_SYNC_HEAD: Final = struct.Struct("<4sI")
_OPEN_SECONDS: Final = 10.0
_LARGEST_OUTPUT: Final = 1 << 20
_LARGEST_ERRORS: Final = 64 << 10
_LARGEST_PIECE: Final = 64 << 10
_LONGEST_REFUSAL: Final = 4096
_REGULAR_FILE: Final = 0o100000


class PhoneGoneError(DeviceError):
    """The phone was unplugged, or adb lost it."""


class PhoneHangsError(DeviceError):
    """The phone is connected and does not answer in time."""


@dataclass(frozen=True)
class Result:
    """What a command on the phone came to.

    Attributes:
        code: its exit code.
        output: what it printed.
        errors: what it printed on stderr, cut.
    """

    code: int
    output: bytes
    errors: bytes


class Phone:
    """A phone that adb can reach.

    Args:
        serial: its name for adb; empty for the only phone.

    Raises:
        DeviceError: there is no such phone, or it cannot be used now.
    """

    def __init__(self, serial: str = "") -> None:
        self.serial = choose_phone(serial).serial
        from adbutils import AdbClient  # what chooses a phone says so where this is missing

        self.name = f"android:{self.serial}"
        self._adb = AdbClient("127.0.0.1", server_port()).device(self.serial)
        self.sent = 0
        """Bytes of files that were sent to it."""

    def require_shell(self) -> None:
        """Refuses a phone whose shell gives no exit codes.

        Raises:
            DeviceError: its Android is older than 7.
        """
        with closing(self._transport("features", whole=True)) as line:
            features = self._string(line)
        if "shell_v2" not in features.split(","):
            raise DeviceError(
                f"{self.name} runs an Android older than 7, whose shell gives no exit codes: use "
                f"another phone"
            )

    def run(
        self,
        script: str,
        *arguments: str,
        seconds: float = 30.0,
        most_bytes: int = _LARGEST_OUTPUT,
        what: str = "a command",
    ) -> Result:
        """Runs a script of the phone's shell to its end.

        Args:
            script: a constant; what varies is among the arguments, as ``"$1"``.
            *arguments: quoted for the shell here.
            seconds: that it may take.
            most_bytes: that it may print.
            what: names it in messages.

        Raises:
            PhoneGoneError: the phone is gone.
            PhoneHangsError: it took longer.
            DeviceError: it printed more, or what is no output of a shell.
        """
        until = time.monotonic() + seconds
        output, errors = bytearray(), bytearray()
        with closing(self.open(script, *arguments)) as line:
            while True:
                kind, length = SHELL_HEAD.unpack(self._exactly(line, SHELL_HEAD.size, until, what))
                kept = {STDOUT: output, STDERR: errors}.get(kind)
                if length > most_bytes + _LARGEST_PIECE or len(output) + length > most_bytes:
                    raise DeviceError(
                        f"{self.name} prints more than {most_bytes} bytes in {what}: restart the "
                        f"phone, or use another one"
                    )
                data = self._exactly(line, length, until, what)
                if kind == EXIT and length:
                    return Result(data[0], bytes(output), bytes(errors))
                if kept is not None:
                    kept += data
                    del errors[:-_LARGEST_ERRORS]

    def open(self, script: str, *arguments: str) -> AdbConnection:
        """Starts a script of the phone's shell; the line speaks adb's shell protocol.

        Raises:
            PhoneGoneError: the phone is gone.
            PhoneHangsError: it does not answer.
        """
        # The script is not wrapped in a shell of its own: $$ is then the leader of the session
        # that adb's daemon makes, so that all of it can be killed by one number.
        given = f"set -- {shlex.join(arguments)}\n{script}"
        return self._transport(f"shell,v2,raw:{given}")

    def send(self, pieces: Iterable[bytes], path: str, mode: int = 0o644) -> None:
        """Writes a file on the phone.

        Args:
            pieces: what the file consists of.
            path: on the phone.
            mode: its permissions.

        Raises:
            PhoneGoneError: the phone is gone.
            PhoneHangsError: it takes nothing any more.
            DeviceError: it refuses the file, because its disk is full for instance.
        """
        asked = f"{path},{_REGULAR_FILE | mode}".encode()
        with closing(self._transport("sync:")) as line:
            line.conn.settimeout(_OPEN_SECONDS * 3)
            try:
                line.conn.sendall(_SYNC_HEAD.pack(b"SEND", len(asked)) + asked)
                for piece in pieces:
                    for at in range(0, len(piece), _LARGEST_PIECE):
                        part = piece[at : at + _LARGEST_PIECE]
                        line.conn.sendall(_SYNC_HEAD.pack(b"DATA", len(part)) + part)
                        self.sent += len(part)
                line.conn.sendall(_SYNC_HEAD.pack(b"DONE", int(time.time())))
            except TimeoutError as error:
                raise self._hangs("taking a file") from error
            except OSError as error:
                self._refused(line, path, error)
            self._refused(line, path, None)

    def receive(self, path: str, most_bytes: int) -> bytes:
        """Reads a file of the phone.

        Raises:
            PhoneGoneError: the phone is gone.
            PhoneHangsError: it does not answer.
            DeviceError: there is no such file, or it is larger.
        """
        asked, found = path.encode(), bytearray()
        with closing(self._transport("sync:")) as line:
            line.conn.sendall(_SYNC_HEAD.pack(b"RECV", len(asked)) + asked)
            while True:
                until = time.monotonic() + _OPEN_SECONDS * 3
                name, size = _SYNC_HEAD.unpack(self._exactly(line, 8, until, "giving a file"))
                if name == b"DONE":
                    return bytes(found)
                if name == b"FAIL":
                    said = self._exactly(line, min(size, _LONGEST_REFUSAL), until, "giving a file")
                    raise DeviceError(f"{self.name} does not give {path}: {one_line(said)}")
                if name != b"DATA" or size > _LARGEST_PIECE or len(found) + size > most_bytes:
                    raise DeviceError(f"{self.name} gives more for {path} than {most_bytes} bytes")
                found += self._exactly(line, size, until, "giving a file")

    def wait_until_back(self, seconds: float) -> bool:
        """Waits for adb to find a phone again that was lost; whether it did."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.3)
            try:
                choose_phone(self.serial)
                return True
            except DeviceError:
                continue
        return False

    def _transport(self, service: str, whole: bool = False) -> AdbConnection:
        """A line to a service of the phone, or of the server about the phone."""
        from adbutils.errors import AdbError

        line = None
        try:
            if whole:
                return self._adb.open_transport(service, timeout=_OPEN_SECONDS)
            line = self._adb.open_transport(timeout=_OPEN_SECONDS)
            asked = service.encode("utf-8", "surrogateescape")
            line.conn.sendall(b"%04x" % len(asked) + asked)
            line.check_okay()
            return line
        except (AdbError, OSError, ValueError) as error:
            if line is not None:
                line.close()
            if isinstance(error, TimeoutError) or "timeout" in str(error):
                raise self._hangs("opening a shell") from error
            raise self._gone(str(error)) from error

    def _string(self, line: AdbConnection) -> str:
        from adbutils.errors import AdbError

        try:
            return str(line.read_string_block())
        except (AdbError, OSError, ValueError) as error:
            raise self._gone(str(error)) from error

    def _exactly(self, line: AdbConnection, count: int, until: float, what: str) -> bytes:
        found = bytearray()
        while len(found) < count:
            left = until - time.monotonic()
            if left <= 0:
                raise self._hangs(what)
            try:
                line.conn.settimeout(left)
                piece = line.conn.recv(min(count - len(found), 1 << 20))
            except TimeoutError as error:
                raise self._hangs(what) from error
            except OSError as error:
                raise self._gone(str(error)) from error
            if not piece:
                raise self._gone(f"the line ended during {what}")
            found += piece
        return bytes(found)

    def _refused(self, line: AdbConnection, path: str, error: OSError | None) -> None:
        """Reads the answer to a file that was sent; returns where it is yes."""
        until = time.monotonic() + _OPEN_SECONDS * 6
        name, size = _SYNC_HEAD.unpack(self._exactly(line, 8, until, "writing a file"))
        if name == b"OKAY" and error is None:
            return
        said = self._exactly(line, min(size, _LONGEST_REFUSAL), until, "writing a file")
        words = one_line(said) if name == b"FAIL" else "it answers what adb does not"
        if "space" in words.lower():
            raise DeviceError(
                f"the disk of {self.name} is full: free some space on it, and run it again"
            ) from error
        raise DeviceError(f"{self.name} does not take {path}: {words}") from error

    def _gone(self, said: str) -> PhoneGoneError:
        words = one_line(said)
        state = next((state for state in ("unauthorized", "offline") if state in words), "")
        if state:
            return PhoneGoneError(f"{self.name} is {state}: plug it in again, and run it again")
        return PhoneGoneError(
            f"{self.name} was lost ({words or 'the line ended'}): plug it in again, and run it "
            f"again; what has arrived there is not sent twice"
        )

    def _hangs(self, what: str) -> PhoneHangsError:
        return PhoneHangsError(
            f"{self.name} does not answer in {what}: unlock it, restart it if that does not help, "
            f"and run it again"
        )


def shut(line: AdbConnection) -> None:
    """Cuts a line, even one that another thread is reading."""
    with suppress(Exception):  # it may be gone
        line.conn.shutdown(socket.SHUT_RDWR)
    line.close()
