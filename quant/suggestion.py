"""What to propose when a name is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like one; None when none is.

    Args:
        name: what was given.
        known: what there is.
        cutoff: how alike they must be: 0 for anything, 1 for the same.

    >>> nearest("int-4", ["int4", "int8"])
    'int4'
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as a remark in brackets; nothing when none is near.

    >>> did_you_mean("onxx", ["onnx", "coreml"])
    " (did you mean 'onnx'?)"
    >>> did_you_mean("tape", ["onnx", "coreml"])
    ''
    """
    found = nearest(name, known)
    return "" if found is None else f" (did you mean {found!r}?)"
