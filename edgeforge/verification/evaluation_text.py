"""The texts that an artifact is judged on: plain, or one JSON document a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from edgeforge.errors import UsageError
from edgeforge.tokenizer import read_text
from quant.json_input import JsonError, parse_json
from quant.quoted import quoted

LINES: Final = (".jsonl", ".ndjson")
_FIELD: Final = "text"


def read_evaluation_text(path: Path) -> str:
    """Returns a text to evaluate on.

    Args:
        path: UTF-8 text; or, where its name ends in ``.jsonl`` or ``.ndjson``, a JSON text a line,
            or an object with one under ``text``, as data sets have it. Documents follow each other
            with an empty line between.

    Raises:
        UsageError: the file cannot be read, holds no text, or a line is no such document.
    """
    written = read_text(path)
    if path.suffix.lower() not in LINES:
        return written
    text = "\n\n".join(_documents(path, written))
    if not text.strip():
        raise UsageError(f"{path} holds no text")
    return text


def _documents(path: Path, written: str) -> Iterator[str]:
    # Lines end at line feeds alone: JSON texts may hold the other marks that end a line.
    for number, line in enumerate(written.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.encode())
        except JsonError as error:
            raise UsageError(
                f"line {number} of {path} is not JSON ({error}): give each document a line of its "
                f"own, or name a plain text .txt"
            ) from None
        found = row.get(_FIELD) if isinstance(row, dict) else row
        if not isinstance(found, str):
            raise UsageError(
                f"line {number} of {path} is {quoted(row)}, neither a text nor an object with one "
                f"under {_FIELD!r}"
            )
        yield found
