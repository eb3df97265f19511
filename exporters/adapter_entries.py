"""The names of functions and methods that run with an adapter, where files have one for each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from exporters.errors import ExportError


def with_adapter(entry: str, adapter: str) -> str:
    """The name of what computes the same as a function or method, with an adapter.

    >>> with_adapter("decode", "my-style.v2")
    'decode_my_style_v2'
    """
    return f"{entry}_{re.sub(r'[^A-Za-z0-9_]', '_', adapter)}"


def require_free(entries: Iterable[str], adapter: str, taken: Collection[str], file: str) -> None:
    """Refuses an adapter whose entries have the names of another's.

    Raises:
        ExportError: names one.
    """
    for entry in entries:
        name = with_adapter(entry, adapter)
        if name in taken:
            raise ExportError(
                f"{file} has {name} already, and the adapter {adapter} would get one of that name: "
                f"rename the adapter's folder"
            )
