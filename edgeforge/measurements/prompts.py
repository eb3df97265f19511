"""The prompts of timed runs: the same text for every artifact, so that speeds compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from device_harness.session import Tokens
from edgeforge.model.model import HELDOUT
from edgeforge.tokenizer import TOKENIZER, Tokenizer, read_text
from exporters.manifest import Manifest

_CHARACTERS_PER_TOKEN = 16


class Prompts:
    """Prompts of an artifact: the beginning of the demo model's held-out text.

    An artifact without a tokenizer gets seeded random tokens.

    Args:
        folder: the artifact.
        manifest: its manifest.

    Raises:
        CheckpointError: the tokenizer cannot be read.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._vocab_size = manifest.model.vocab_size
        file = folder / TOKENIZER
        self._text = read_text(HELDOUT) if file.is_file() else ""
        self._tokenizer = Tokenizer(file, str(folder)) if file.is_file() else None
        self._known: dict[int, Tokens] = {}

    def of(self, count: int) -> Tokens:
        """A prompt of so many tokens, ``int64[count]``, all in the model's vocabulary."""
        if count not in self._known:
            self._known[count] = self._made(count)
        return self._known[count]

    def _made(self, count: int) -> Tokens:
        drawn = np.random.default_rng(0).integers(0, self._vocab_size, count, dtype=np.int64)
        if self._tokenizer is None:
            return drawn
        tokens = self._tokenizer.encode(self._text[: _CHARACTERS_PER_TOKEN * (count + 16)])
        if not tokens:
            return drawn
        # A text that is too short begins again. A tokenizer may know more than the model does.
        text = np.resize(np.array(tokens, np.int64), count)
        return np.where(text < self._vocab_size, text, drawn)
