"""Suggests a known name in place of an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice
from typing import Final

_MOST: Final = 10_000
_LONGEST: Final = 200


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known name that is most similar to ``name``; None when none is similar.

    Args:
        name: the name that the user gave.
        known: the names that exist.
        cutoff: the least similarity, from 0 (any name) to 1 (the same name).

    >>> nearest("int-4", ["int4", "int8"])
    'int4'
    """
    # A file may hold a million names, or one of a million letters: nobody looks for those.
    few = [other for other in islice(known, _MOST) if len(other) <= _LONGEST]
    matches = difflib.get_close_matches(name[:_LONGEST], few, n=1, cutoff=cutoff)
    return next(iter(matches), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the most similar known name as a remark in brackets; empty when none is similar.

    >>> did_you_mean("onxx", ["onnx", "coreml"])
    " (did you mean 'onnx'?)"
    >>> did_you_mean("tape", ["onnx", "coreml"])
    ''
    """
    found = nearest(name, known)
    return "" if found is None else f" (did you mean {found!r}?)"
