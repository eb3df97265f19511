"""JSON texts with a digest of their own content, by which a damaged text is known when it is read.

>>> text = seal({"answer": 42})
>>> unseal(text)
{'answer': 42}
>>> unseal(text.replace("42", "43"))
Traceback (most recent call last):
    ...
ValueError: its content differs from its digest
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from quant.json_input import parse_json

SEAL = "sha256"


def seal(content: Mapping[str, Any], indent: int | None = None) -> str:
    """Returns the JSON text of some content with its digest under the key ``sha256``."""
    return json.dumps({**content, SEAL: _digest(content)}, indent=indent)


def unseal(text: str | bytes) -> dict[str, Any]:
    """Returns the content of a text that `seal` made.

    Args:
        text: the JSON text.

    Raises:
        ValueError: the text is no JSON object, has no digest, or another one.
    """
    given = text.encode() if isinstance(text, str) else text
    content = parse_json(given, strict=False)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    digest = content.pop(SEAL, None)
    if digest != _digest(content):
        raise ValueError("its content differs from its digest")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
