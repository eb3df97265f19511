"""The tokens by which a model ends its turn, as its chat template writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from edgeforge.chat.template import ChatTemplate
from edgeforge.checkpoint.json_text import MAX_INDEX_BYTES, parse_object, read_small_file
from edgeforge.errors import CheckpointError

_SAID: Final = "edgeforge"  # what the assistant says in the conversation that is tried


def turn_ends(files: Mapping[str, Path], template: ChatTemplate | None) -> tuple[int, ...]:
    """Returns the added token that a template writes behind what the assistant says; () for none.

    Many models that were tuned to talk name only the end of a text in their configuration.

    Args:
        files: the tokenizer's files by the names that they have in a checkpoint.
        template: the model's template; None for none.

    Raises:
        CheckpointError: ``tokenizer_config.json`` is damaged.
    """
    if template is None:
        return ()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _SAID}]
    try:
        (text,) = template.render([messages])
    except CheckpointError:  # it wants other conversations; whoever talks is told
        return ()
    rest = text.rpartition(_SAID)[2].lstrip()
    tokens = _added_tokens(files)
    found = max((each for each in tokens if each and rest.startswith(each)), key=len, default=None)
    return () if found is None else (tokens[found],)


def _added_tokens(files: Mapping[str, Path]) -> dict[str, int]:
    """The tokens that are added to a tokenizer's vocabulary, by their texts."""
    rows: dict[str, object] = {}
    if "tokenizer_config.json" in files:  # a small file, which often has them too
        found = _read(files["tokenizer_config.json"]).get("added_tokens_decoder")
        rows = found if isinstance(found, dict) else {}
    tokens = {
        row["content"]: int(number)
        for number, row in rows.items()
        if isinstance(row, dict) and isinstance(row.get("content"), str) and number.isdecimal()
    }
    if tokens or "tokenizer.json" not in files:
        return tokens
    try:
        listed = _read(files["tokenizer.json"]).get("added_tokens")
    except CheckpointError:  # whoever opens the tokenizer says what is wrong with it
        return {}
    return {
        row["content"]: row["id"]
        for row in (listed if isinstance(listed, list) else ())
        if isinstance(row, dict)
        and isinstance(row.get("content"), str)
        and type(row.get("id")) is int
    }


def _read(path: Path) -> dict[str, object]:
    return parse_object(read_small_file(path, MAX_INDEX_BYTES), str(path), strict=False)
