"""Turns what reading a damaged file raises into one sentence."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from exporters.errors import ExportError

# Readers check what they can name. What they cannot foresee ends in one of these, none of which
# says anything about EdgeForge: RuntimeError is also a recursion without end, or an iterator's end.
DAMAGE: Final = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
)


@contextmanager
def one_sentence(file: Path, what: str) -> Iterator[None]:
    """Turns the errors of reading a file that a stranger may have written into an `ExportError`.

    Args:
        file: the file, for the message.
        what: what it should be, with its article.
    """
    try:
        yield
    except ExportError:
        raise
    except OSError as error:
        raise ExportError(f"{file} cannot be read: {error.strerror or error}") from error
    except DAMAGE as error:
        reason = str(error).strip().splitlines()
        words = reason[0][:300] if reason else type(error).__name__
        raise ExportError(f"{file} cannot be read as {what}: {words}") from error
