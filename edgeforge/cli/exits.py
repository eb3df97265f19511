"""Turns errors into an exit code and one line, and signals into the end of a command."""

from __future__ import annotations

import errno
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from edgeforge.cli.printable import printable

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors that the user's machine causes. Other OSErrors are bugs of EdgeForge and get a traceback.
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENOMEM)


def explain(error: Exception) -> tuple[int, str] | None:
    """Returns the exit code and the message of an error meant for users, None for a bug.

    Codes: 1 a check failed, 2 usage, 3 checkpoint, 4 quantization, 5 export or a full disk,
    6 device.
    """
    from device_harness.errors import DeviceError, LogitsNotFiniteError
    from edgeforge.errors import EdgeForgeError
    from exporters.errors import ExportError
    from quant.errors import QuantizationError, StoreFullError

    words = str(error) or type(error).__name__
    if isinstance(error, EdgeForgeError):
        return error.exit_code, words
    for kind, code in (
        (LogitsNotFiniteError, 1),
        (StoreFullError, 5),
        (QuantizationError, 4),
        (ExportError, 5),
        (DeviceError, 6),
    ):
        if isinstance(error, kind):
            return code, words
    if isinstance(error, OSError) and error.errno in (*_OUT_OF_SPACE, *_NOT_ALLOWED):
        where = f"{error.filename}: " if error.filename else ""
        return 5 if error.errno in _OUT_OF_SPACE else 2, f"{where}{error.strerror}"
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return 2, f"{error.object[:200]!a} is not UTF-8 text: name files and folders in UTF-8"
    if hasattr(error, "format_message"):  # options, arguments and commands that typer refuses
        context = getattr(error, "ctx", None)
        path = "edgeforge" if context is None else context.command_path
        return 2, f"{_refusal_of_typer(error)} (see '{path} --help')"
    return None


def _refusal_of_typer(error: Any) -> str:
    """Returns typer's message, with a hint only where an option or a command is misspelt."""
    from quant.suggestion import nearest

    context, message = getattr(error, "ctx", None), str(error.message).rstrip(".")
    unknown = re.fullmatch("No such command '(.*)'", message)
    option = getattr(error, "option_name", None)
    if context is not None and option is not None and hasattr(error, "possibilities"):
        known = [name for each in context.command.get_params(context) for name in each.opts]
        found = nearest(option, known)
    elif context is not None and unknown is not None:
        found = nearest(unknown[1], context.command.commands)
    else:
        return str(error.format_message()).rstrip(".")
    return message if found is None else f"{message}. Did you mean {found!r}?"


def one_line(text: str) -> str:
    r"""Returns a message as one line, with control characters escaped.

    Messages quote content of files, which must not send commands to the terminal.

    >>> one_line("a name with\x1b[2J\n  breaks")
    'a name with\\x1b[2J breaks'
    """
    line = " ".join(part.strip() for part in text.splitlines())
    return printable(line)


@contextmanager
def ended_by_signals(received: list[int]) -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end a command in the same way and at the same points as Ctrl-C.

    Args:
        received: list to which the number of a received signal is appended.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(number, frame)
        else:  # Ctrl-C is ignored, as in a shell script's background job; still end the command.
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP: so do we
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
