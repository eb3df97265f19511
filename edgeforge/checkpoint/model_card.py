"""Reads a checkpoint's origin: its name, its author and its licence."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Final

from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.checkpoint.links import leads_out
from exporters.target import Provenance
from quant.input_files import open_input
from quant.yaml_input import YamlError, parse_yaml

_CARD: Final = "README.md"
_LARGEST_HEADER: Final = 1 << 16
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def provenance(checkpoint: Checkpoint) -> Provenance:
    """Returns the origin from the hub id and the model card, or from a GGUF file's metadata.

    Unknown fields are empty.
    """
    hub_id = checkpoint.source if checkpoint.revision else ""
    named = checkpoint.config.get("_name_or_path")
    if not hub_id and isinstance(named, str) and _HUB_ID.fullmatch(named):
        hub_id = named
    if checkpoint.gguf is not None:
        about = checkpoint.about
        return Provenance(
            title=about.get("name") or about.get("basename") or checkpoint.path.stem,
            hub_id="",
            author=about.get("author") or about.get("organization", ""),
            licence=about.get("license.name") or about.get("license", ""),
        )
    card = checkpoint.path / _CARD
    fields = {} if leads_out(card, checkpoint.path) else card_fields(card)
    licence = fields.get("license_name") or fields.get("license", "")
    return Provenance(
        title=hub_id.rpartition("/")[2] or checkpoint.path.resolve().name,
        hub_id=hub_id,
        author=fields.get("author") or hub_id.partition("/")[0],
        licence=licence,
    )


def licence_id(checkpoint: Checkpoint) -> str:
    """The licence's identifier on the hub, as the model card states it; empty where it does not."""
    if checkpoint.gguf is not None:
        return checkpoint.about.get("license", "")
    card = checkpoint.path / _CARD
    return "" if leads_out(card, checkpoint.path) else card_fields(card).get("license", "")


def card_fields(path: Path) -> dict[str, str]:
    """Returns the text fields of a model card's YAML header; empty if it cannot be read."""
    try:
        with open_input(path) as stream:
            # An incremental decoder takes a character that the limit cuts in two.
            text = codecs.getincrementaldecoder("utf-8")().decode(stream.read(_LARGEST_HEADER))
    except (OSError, UnicodeDecodeError):
        return {}
    header = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    try:
        fields = parse_yaml(header[1].encode()) if header else None
    except YamlError:
        return {}
    if not isinstance(fields, dict):
        return {}
    return {str(name): value for name, value in fields.items() if isinstance(value, str)}
