"""Writes an artifact's cards beside its files."""

from __future__ import annotations

from pathlib import Path

from edgeforge.cards.card import Card, Verified
from edgeforge.cards.markdown import markdown
from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.checkpoint.model_card import licence_id, provenance
from edgeforge.output_folder.generated_cards import CARD, CARD_DATA, is_generated
from edgeforge.output_folder.whole_file import whole_file
from exporters.manifest import Manifest
from quant.json_output import json_text


def write_cards(
    folder: Path, manifest: Manifest, checkpoint: Checkpoint, verified: Verified | None
) -> None:
    """Writes ``CARD.md`` and ``card.json``, each whole or not at all.

    A file of that name that EdgeForge did not write stays as it is.

    Args:
        folder: the artifact.
        manifest: its manifest.
        checkpoint: that it was made of.
        verified: what a verification found; None where there was none yet.
    """
    card = Card(manifest, provenance(checkpoint), licence_id(checkpoint), verified)
    for name, text in (
        (CARD, markdown(card)),
        (CARD_DATA, json_text(card.to_json()) + "\n"),
    ):
        path = folder / name
        if path.is_symlink() or (path.exists() and not is_generated(path)):
            continue
        with whole_file(path) as stream:
            stream.write(text.encode("utf-8", "replace"))
