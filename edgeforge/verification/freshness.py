"""What a report was made of, so that it is known when its figures still hold.

Nothing here imports torch: whether reports are fresh is told in a second.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from device_harness.registry import RUNTIMES
from edgeforge.model.model import HELDOUT
from edgeforge.verification.bounds import bounds_of
from edgeforge.verification.sample import TokenCount
from exporters.manifest import MANIFEST, Manifest
from exporters.manifest_records import mapping, text
from quant.input_files import open_input
from quant.processors import processor_name

# What computes the references, on every target.
_ALWAYS = ("edgeforge", "torch", "numpy")


@dataclass(frozen=True)
class Freshness:
    """What a report's figures depend on. Digests are SHA-256, in lower-case hexadecimal.

    Attributes:
        manifest: of the artifact's manifest, which has the digest of every other file.
        checkpoint: of the checkpoint (`edgeforge.checkpoint.digest.CheckpointDigest`).
        text: of the evaluated text; empty for random tokens.
        tokens: how many tokens of it were asked for; ``default`` where nobody said.
        bounds: of the bounds that the figures were held against.
        options: of the runtime, by name.
        tools: versions of EdgeForge, of the runtime and of what computes the references.
        processor: the processor's name. Kernels for another one may round otherwise.
    """

    manifest: str
    checkpoint: str
    text: str
    tokens: str
    bounds: str
    options: Mapping[str, str]
    tools: Mapping[str, str]
    processor: str

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Reads the form that ``dataclasses.asdict`` gives.

        Raises:
            TypeError: a field holds what it cannot.
            KeyError: a field is absent.
        """
        row = mapping(data, "freshness")
        options, tools = (mapping(row[name], name) for name in ("options", "tools"))
        return cls(
            manifest=text(row, "manifest"),
            checkpoint=text(row, "checkpoint"),
            text=text(row, "text"),
            tokens=text(row, "tokens"),
            bounds=text(row, "bounds"),
            options={name: text(options, name) for name in options},
            tools={name: text(tools, name) for name in tools},
            processor=text(row, "processor"),
        )

    def changes(self, now: Freshness, measured: int) -> list[str]:
        """What is not as it was when the report was written, a phrase each; nothing if it is.

        Args:
            now: what would be written now.
            measured: how many tokens the report is of.
        """
        found = []
        for name, what in (
            ("manifest", f"{MANIFEST} changed"),
            ("checkpoint", "it is of another checkpoint"),
            ("text", "the evaluated text changed"),
            ("bounds", "it was held against other bounds"),
            ("options", "the runtime has other options"),
            ("processor", "it was measured on another processor"),
        ):
            if getattr(self, name) != getattr(now, name):
                found.append(what)
        if now.tokens not in (self.tokens, str(measured)):
            found.append(f"it is of {self.tokens} tokens, not {now.tokens}")
        for name in sorted({*self.tools, *now.tools}):
            before, after = (each.tools.get(name, "none") for each in (self, now))
            if before != after:
                found.append(f"{name} is {after} and was {before}")
        return found


def freshness_of(
    folder: Path,
    manifest: Manifest,
    *,
    text: Path | None,
    tokens: TokenCount | None,
    bounds: Mapping[str, float],
    options: Mapping[str, str | None],
) -> Freshness:
    """What the figures of an artifact depend on now.

    Args:
        folder: the artifact.
        manifest: its manifest, which says which checkpoint it is of.
        text: a UTF-8 file; None for the demo model's held-out text.
        tokens: how many tokens of it; None for the default.
        bounds: of figures, by their names, instead of the target's own.
        options: of the runtime.

    Raises:
        OSError: the manifest cannot be read.
    """
    read = text or (HELDOUT if (folder / "tokenizer.json").is_file() else None)
    held = sorted(map(repr, bounds_of(manifest.target, bounds).values()))
    return Freshness(
        manifest=sha256_of(folder / MANIFEST),
        checkpoint=manifest.source.sha256,
        text="" if read is None else _text_digest(read),
        tokens="default" if tokens is None else str(tokens),
        bounds=hashlib.sha256("\n".join(held).encode()).hexdigest(),
        options={name: value for name, value in options.items() if value is not None},
        tools=_tools(manifest.target),
        processor=processor_name(),
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file's content.

    Raises:
        OSError: it cannot be read.
    """
    with open_input(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _text_digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError:  # whoever reads the text says why it cannot
        return "unreadable"


def _tools(target: str) -> dict[str, str]:
    runtime = RUNTIMES.get(target)
    found = {}
    if system := platform.mac_ver()[0]:  # Core ML is a part of it
        found["macOS"] = system
    for name in (*_ALWAYS, *(() if runtime is None else runtime.packages)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # EdgeForge's interpreter needs no runtime
            continue
    return found
