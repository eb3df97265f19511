"""Which files of a folder EdgeForge wrote: nothing else is ever removed.

An artifact's manifest lists its files, and so does the record of a synthesised checkpoint. In what
a killed process left, and in artifacts whose manifest lists no files, files are known by name.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from edgeforge.checkpoint.layout import CONFIG, GENERATION_CONFIG, TOKENIZER_FILES
from edgeforge.output_folder.generated_cards import CARD, CARD_DATA, is_generated
from exporters.manifest import MANIFEST, MODULE_MANIFEST
from exporters.modules.manifest import SAMPLES

SYNTH_RECORD: Final = "edgeforge-synth.json"
# `verify` adds the report, `bench` its figures, and cards lie beside an artifact's files; the
# Finder of macOS adds a file to every folder that it shows.
_FOUND: Final = frozenset(
    {"report.json", ".report.json.partial", "bench.json", ".bench.json.partial"}
)
_ADDED: Final = _FOUND | {CARD, f".{CARD}.partial", CARD_DATA, f".{CARD_DATA}.partial"}
_FINDERS: Final = ".DS_Store"
_LARGEST_RECORD: Final = 256 << 20

_NAMES: Final = re.compile(
    "|".join(
        (
            *map(re.escape, (MANIFEST, SYNTH_RECORD, CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)),
            *map(re.escape, (MODULE_MANIFEST, SAMPLES, "weight_places.json")),
            *map(re.escape, _ADDED),
            r"(model|verify)\.onnx(\.data)?",
            r"\.(model|verify|draft)\.onnx\.partial",
            r"[\w.-]+\.onnx_adapter",
            r"genai_config\.json",
            r"executorch_tokenizer\.json",
            r"model\.(pte|ptd)",
            r"weight_names\.json",
            r"model\.mlpackage/Manifest\.json",
            r"model\.mlpackage/Data/com\.apple\.CoreML/(model\.mlmodel|weights/weight\.bin)",
            r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
        )
    )
)

Known = Callable[[str], bool]
"""Tells whether EdgeForge wrote a file, by its path relative to the folder, with slashes."""


def strange_file(folder: Path) -> str | None:
    """Returns a file of a folder that EdgeForge did not write, or None where it wrote all.

    The folder may be an artifact, a folder of artifacts that each bear their target's name, or a
    synthesised checkpoint. A link, and all else that is no ordinary file, is strange.

    Args:
        folder: the folder.

    Returns:
        The file's path relative to the folder; None also where there is no file at all.

    Raises:
        OSError: a folder cannot be read.
    """
    known = _known_of(folder)
    if known is not None:
        return _first_strange(folder, known)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name == _FINDERS and entry.is_file(follow_symlinks=False):
            continue
        if not entry.is_dir(follow_symlinks=False):
            return entry.name
        known = _known_of(Path(entry.path), target=entry.name)
        found = _first_strange(Path(entry.path), known or (lambda name: False))
        if found is not None:
            return f"{entry.name}/{found}"
    return None


def strange_left_over(folder: Path) -> str | None:
    """Returns a file of an unfinished folder that EdgeForge would not have written there, or None.

    Raises:
        OSError: a folder cannot be read.
    """

    def known(name: str) -> bool:
        # Of several targets, each has a folder in the output.
        inner = name.partition("/")[2]
        return _is_named(name) or _is_named(inner)

    return _first_strange(folder, known)


def remove_known(folder: Path, strange: Callable[[Path], str | None]) -> bool:
    """Removes a folder in which nothing is strange, and nothing that comes into it meanwhile.

    Args:
        folder: the folder.
        strange: `strange_file` or `strange_left_over`.

    Returns:
        Whether the folder is gone.
    """
    with suppress(OSError):
        if strange(folder) is not None:
            return False
        paths = list(_walk(folder))
        for path, is_folder in reversed(paths):
            with suppress(OSError):
                path.rmdir() if is_folder else path.unlink()
        folder.rmdir()
    return not folder.exists()


def _known_of(folder: Path, target: str | None = None) -> Known | None:
    """Returns what knows the files of an artifact or synthesised checkpoint; None for others."""
    for record in (MANIFEST, MODULE_MANIFEST, SYNTH_RECORD):
        content = _read(folder / record)
        if content is None or (target is not None and content.get("target") != target):
            continue
        files = content.get("files")
        if isinstance(files, dict):
            if record == SYNTH_RECORD:
                return _as_synthesised(folder, files)
            return _as_listed(folder, frozenset({record, *_ADDED, *files}))
        if record == MANIFEST and "schema_version" in content:
            return _is_named
    return None


def _as_listed(folder: Path, listed: frozenset[str]) -> Known:
    """Knows an artifact's files by name, and its cards by what they hold too."""

    def known(name: str) -> bool:
        return name in listed and (name not in (CARD, CARD_DATA) or is_generated(folder / name))

    return known


def _as_synthesised(folder: Path, files: dict[str, object]) -> Known:
    """Knows a synthesised checkpoint's files while they are as they were written.

    A trained model may be saved over such a checkpoint, under the same names. The record is written
    last, so a file that is younger than the record is another one.
    """
    written = (folder / SYNTH_RECORD).lstat().st_mtime_ns

    def known(name: str) -> bool:
        if name == SYNTH_RECORD:
            return True
        status = (folder / name).lstat()
        same = files.get(name) == {"size": status.st_size}
        return same and status.st_mtime_ns <= written

    return known


def _read(path: Path) -> dict[str, object] | None:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_RECORD:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _is_named(name: str) -> bool:
    return _NAMES.fullmatch(name) is not None


def _first_strange(folder: Path, known: Known) -> str | None:
    for path, is_folder in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if is_folder:
            continue
        if not stat.S_ISREG(path.lstat().st_mode) or not (path.name == _FINDERS or known(name)):
            return name
    return None


def _walk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yields everything in a folder, each folder before its content; no link is followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        is_folder = entry.is_dir(follow_symlinks=False)
        yield Path(entry.path), is_folder
        if is_folder:
            yield from _walk(Path(entry.path))
