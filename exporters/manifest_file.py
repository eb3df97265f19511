"""Reads the JSON file that states what an artifact is, a language model's or a module's."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

from exporters.errors import ExportError
from quant.input_files import read_input
from quant.json_input import JsonError, parse_json
from quant.quoted import quoted

LARGEST_MANIFEST: Final = 64 << 20


def read_manifest(
    path: Path,
    what: str,
    version: int,
    known: Collection[str],
    read: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Reads a manifest's fields.

    Args:
        path: the file.
        what: what is exported again where the file's schema is another one, for messages.
        version: the version of the schema that is read.
        known: the names of all fields.
        read: reads every field of the parsed file.

    Raises:
        FileNotFoundError: there is no such file.
        NotADirectoryError: what should be its folder is a file.
        ExportError: the file cannot be read, has another schema version or is no manifest.
    """
    try:
        data = parse_json(read_input(path, LARGEST_MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except JsonError as error:
        raise ExportError(f"{path} cannot be read: it {error}") from None
    found = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(data, dict) or found is True or found != version:
        raise ExportError(
            f"{path} has schema version {quoted(found)}; this EdgeForge reads {version}: export "
            f"the {what} again"
        )
    strangers = [name for name in data if name not in known]
    if strangers:
        raise ExportError(
            f"{path} is not a manifest: it has the unknown field {quoted(strangers[0])}"
        )
    try:
        return read(data)
    except KeyError as error:
        raise ExportError(f"{path} is not a manifest: it has no field {error}") from error
    except TypeError as error:
        raise ExportError(f"{path} is not a manifest: {error}") from error
