"""Writes values as JSON that every parser reads: JSON has no NaN and no infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping


def json_text(value: object, indent: int | None = 1) -> str:
    """Returns a value as JSON, with null for each number that is NaN or infinite.

    >>> json_text({"largest": float("nan"), "rows": (1, 2.5)}, indent=None)
    '{"largest": null, "rows": [1, 2.5]}'
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
