"""The cards that lie beside an artifact's files: written by EdgeForge, known by their content.

They come after the manifest, as the report does, and the manifest does not list them. A card that
somebody else wrote under the same name is theirs: it is neither replaced nor removed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from quant.input_files import read_input

CARD: Final = "CARD.md"
CARD_DATA: Final = "card.json"
MARKS: Final = {
    CARD: "<!-- Written by EdgeForge. Edits are replaced: write your own text in another file. -->",
    CARD_DATA: '"kind": "edgeforge-card"',
}
"""By the file's name, what a card that EdgeForge wrote holds."""
_LARGEST: Final = 1 << 22


def is_generated(path: Path) -> bool:
    """Whether EdgeForge wrote the card that lies there."""
    try:
        return MARKS[path.name].encode() in read_input(path, _LARGEST)
    except (OSError, ValueError):
        return False
