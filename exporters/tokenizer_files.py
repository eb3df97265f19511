"""The tokenizer's files of a checkpoint, as every target finds them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

TOKENIZER: Final = "tokenizer.json"
CONFIG: Final = "tokenizer_config.json"
JINJA: Final = "chat_template.jinja"
_LISTS: Final = ("normalizers", "pretokenizers", "decoders", "processors")


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copies the files under the names that they have in a checkpoint."""
    for name, path in files.items():
        shutil.copyfile(path, folder / name)


def read(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    """Returns the content of one of the files; empty where it is not there or no object."""
    if name not in files:
        return {}
    content = json.loads(files[name].read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def write(content: Mapping[str, Any], path: Path) -> None:
    """Writes JSON as tokenizers' files are written."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def chat_template(files: Mapping[str, Path]) -> str | None:
    """Returns the model's chat template in Jinja, or None: as transformers finds it."""
    if JINJA in files:
        return files[JINJA].read_text(encoding="utf-8")
    for name in (CONFIG, "chat_template.json"):
        found = read(files, name).get("chat_template")
        if isinstance(found, list):
            rows = [row for row in found if isinstance(row, dict)]
            found = {row.get("name"): row.get("template") for row in rows}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def steps(part: object) -> Iterator[dict[str, Any]]:
    """Yields the single steps of a normalizer, pre-tokenizer, decoder or post-processor, in order.

    >>> one, two = {"type": "NFC"}, {"type": "Prepend", "prepend": "_"}
    >>> [s["type"] for s in steps({"type": "Sequence", "normalizers": [one, two]})]
    ['NFC', 'Prepend']
    """
    if not isinstance(part, dict):
        return
    if part.get("type") != "Sequence":
        yield part
        return
    for name in _LISTS:
        for each in part.get(name) or ():
            yield from steps(each)


def kinds(part: object) -> list[str]:
    """Returns the types of the steps of a part."""
    return [str(step.get("type")) for step in steps(part)]


def model_kind(tokenizer: Mapping[str, Any]) -> str:
    """Returns the algorithm, such as ``BPE``; older files do not name it."""
    model = tokenizer.get("model") or {}
    named = model.get("type")
    if isinstance(named, str):
        return named
    if "merges" in model:
        return "BPE"
    return "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece"


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Tells whether a tokenizer's vocabulary is of bytes, as GPT-2's."""
    return any("ByteLevel" in kinds(tokenizer.get(part)) for part in ("pre_tokenizer", "decoder"))


def added_with(tokenizer: Mapping[str, Any], *flags: str) -> list[str]:
    """Returns the texts of the added tokens that have one of some flags, such as ``lstrip``."""
    rows = tokenizer.get("added_tokens") or ()
    return [str(row.get("content")) for row in rows if any(row.get(flag) for flag in flags)]


def told_of_added_tokens(runtime: str, tokenizer: Mapping[str, Any], *flags: str) -> list[str]:
    """Tells of added tokens that a runtime finds by their letters alone; none where there are none.

    Args:
        runtime: its name, with which the sentence begins.
        tokenizer: the content of ``tokenizer.json``.
        flags: what the runtime does not do.
    """
    # A space put in front of every text becomes part of a token that is looked for after that.
    prepends = "Prepend" in kinds(tokenizer.get("normalizer"))
    names = added_with(tokenizer, *flags, *(("normalized",) if prepends else ()))
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [
        f"{runtime} finds {', '.join(names[:3])}{more} by the letters alone, without what the "
        f"tokenizer says of the spaces and letters around: a text that holds one gets other tokens "
        f"there"
    ]
