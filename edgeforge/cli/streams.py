"""The three standard streams, whatever whoever started this process made of them."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence

from edgeforge.cli.printable import printable
from edgeforge.errors import UsageError

_UTF8 = "PYTHONUTF8"


def open_streams() -> None:
    """Opens streams that are closed, and lets errors be lost whose reader has left.

    A closed stream becomes /dev/null: else the next file that is opened would take its number, and
    a library's message would be written into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  (lives as long as the process)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(2, "wb", closefd=False)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


class _Forgiving(io.FileIO):
    """A stream that nobody may be reading: what cannot be written is lost."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError:
            return memoryview(data).nbytes  # type: ignore[arg-type]


def speak_utf8() -> None:
    """Starts this process once more in Python's UTF-8 mode, where the locale knows only ASCII.

    Prompts and paths would else be no text that the runtimes' libraries take. Python does so by
    itself in the locale C, unless it is told not to.
    """
    if sys.getfilesystemencoding() != "ascii" or os.environ.get(_UTF8) == "1":
        return
    os.environ[_UTF8] = "1"
    # The terminal still shows ASCII alone.
    os.environ.setdefault("PYTHONIOENCODING", "ascii:backslashreplace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def require_utf8(arguments: Sequence[str]) -> None:
    """Refuses prompts, names and paths that the runtimes' libraries and manifests cannot hold.

    Raises:
        UsageError: an argument is not UTF-8 text.
    """
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(
                f"the argument {argument[:200]!a} is not UTF-8 text: give the prompt in UTF-8, or "
                f"rename the file or folder"
            ) from None


def print_traceback() -> None:
    """Prints the traceback of the error at hand; what it quotes of files commands no terminal."""
    print(printable(traceback.format_exc().rstrip("\n"), keep="\n"), file=sys.stderr)
