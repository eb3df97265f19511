"""Who proposes tokens for speculative decoding: the text itself, or a smaller model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from device_harness.devices.device import Device
from device_harness.session import Session
from edgeforge.errors import UsageError
from exporters.manifest import Manifest

LOOKUP: Final = "lookup"
NGRAM: Final = 3
_LONGEST_NGRAM: Final = 16


class Drafter(Protocol):
    """Proposes what comes next."""

    def propose(self, text: Sequence[int], most: int) -> list[int]:
        """Proposes at most so many tokens to come after a text.

        Args:
            text: all token ids so far.
            most: how many tokens are asked for, at least 1.
        """


class PromptLookup:
    """Proposes what came after the same last tokens earlier in the text (Saxena 2023).

    Args:
        ngram: the longest run of last tokens that is looked up; shorter ones follow.
    """

    def __init__(self, ngram: int = NGRAM) -> None:
        self._ngram = ngram
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def propose(self, text: Sequence[int], most: int) -> list[int]:
        """Proposes what came after the longest run of last tokens, where it came last.

        Where that is so near that the text ends, what is proposed goes round, so that a text that
        repeats itself goes on doing so.

        >>> PromptLookup().propose([1, 2, 3, 9, 1, 2], 3)
        [3, 9, 1]
        >>> PromptLookup().propose([7, 8, 7, 8], 5)
        [7, 8, 7, 8, 7]
        >>> PromptLookup().propose([1, 2, 3], 4)
        []
        """
        self._learn(text)
        for length in range(min(self._ngram, len(text) - 1), 0, -1):
            at = self._after.get(tuple(text[-length:]))
            if at is not None:
                found = list(text[at : at + most])
                while len(found) < most:
                    found += found
                return found[:most]
        return []

    def _learn(self, text: Sequence[int]) -> None:
        """Notes what follows the runs of tokens that end before the last token."""
        known = len(self._text)
        if list(text[:known]) != self._text:
            self._text, self._after, known = [], {}, 0
        for end in range(max(1, known), len(text)):
            for length in range(1, min(self._ngram, end) + 1):
                self._after[tuple(text[end - length : end])] = end
        self._text = list(text)


class DraftModel:
    """Proposes what a smaller model would write.

    Args:
        session: runs the smaller model.
        vocab_size: of the larger one: a token beyond it ends a draft.
    """

    def __init__(self, session: Session, vocab_size: int) -> None:
        self._session, self._vocab_size = session, vocab_size
        self._text: list[int] = []
        session.reset()

    def propose(self, text: Sequence[int], most: int) -> list[int]:
        """Proposes the smaller model's greedy continuation."""
        most = min(most, self._session.context - len(text) + 1)
        found: list[int] = []
        same = 0
        for ours, theirs in zip(self._text, text[:-1], strict=False):
            if ours != theirs:
                break
            same += 1
        given = list(text[same:])
        while len(found) < most:
            if not found:
                self._session.rewind(same)
            logits = self._session.extend(np.array(given, np.int64))
            self._text = [*text, *found]
            token = int(logits.argmax())
            if token >= self._vocab_size:
                break
            found.append(token)
            given = [token]
        return found


@dataclass(frozen=True)
class Speculation:
    """How tokens are proposed.

    Attributes:
        source: ``lookup``, or the folder of a smaller model's artifact.
        draft: how many tokens are proposed at most; None for as many as the artifact takes.
        ngram: ``lookup``: the longest run of last tokens that is looked up; None for `NGRAM`.
    """

    source: str
    draft: int | None = None
    ngram: int | None = None

    def tokens(self, folder: Path, manifest: Manifest) -> int:
        """Returns how many tokens are proposed at most for an artifact.

        Raises:
            UsageError: the artifact cannot run drafts, or an option cannot be.
        """
        if not manifest.can_rewind:
            raise UsageError(
                f"--speculate is not possible with {folder}: layers of this "
                f"{manifest.model.summary.get('model_type')} model carry more than a row for each "
                f"position, so that a refused draft cannot be taken back"
            )
        most = manifest.draft_positions - 1
        if not most:
            raise UsageError(
                f"{folder} has no graph for drafts: export the model with --draft-positions 8, or "
                f"leave out --speculate"
            )
        if self.draft is not None and not 1 <= self.draft <= most:
            raise UsageError(
                f"--draft {self.draft} is not possible: {folder} gives the logits of "
                f"{manifest.draft_positions} positions a call, and so takes drafts of 1 to {most} "
                f"tokens"
            )
        if self.ngram is not None and self.source != LOOKUP:
            raise UsageError("--ngram belongs to --speculate lookup: leave it out")
        if self.ngram is not None and not 1 <= self.ngram <= _LONGEST_NGRAM:
            raise UsageError(f"--ngram {self.ngram} must be between 1 and {_LONGEST_NGRAM}")
        return most if self.draft is None else self.draft


def speculation_of(source: str | None, draft: int | None, ngram: int | None) -> Speculation | None:
    """Returns how tokens are proposed from the options of a command; None for plain decoding.

    Raises:
        UsageError: an option of speculation is given without it.
    """
    if source is not None:
        return Speculation(source, draft, ngram)
    for name, value in (("draft", draft), ("ngram", ngram)):
        if value is not None:
            raise UsageError(f"--{name} belongs to --speculate: give that too, or leave it out")
    return None


@contextmanager
def open_drafter(
    asked: Speculation, manifest: Manifest, device: Device, threads: int | None
) -> Iterator[Drafter]:
    """Opens who proposes tokens for an artifact; a smaller model runs on the same device.

    Args:
        asked: how tokens are proposed.
        manifest: the artifact's.
        device: where it runs.
        threads: threads for the runtime; None for the runtime's default.

    Raises:
        UsageError: the smaller model has another tokenizer, or cannot take tokens back.
        ExportError: ``asked.source`` is neither ``lookup`` nor an artifact.
        DeviceError: the smaller model cannot be opened.
    """
    from device_harness.device_session import open_on

    if asked.source == LOOKUP:
        yield PromptLookup(asked.ngram or NGRAM)
        return
    folder = Path(asked.source)
    if not folder.is_dir():
        raise UsageError(
            f"--speculate {asked.source} is neither lookup nor the folder of an artifact"
        )
    smaller = Manifest.read(folder)
    if smaller.tokenizer_sha256 != manifest.tokenizer_sha256:
        raise UsageError(
            f"{folder} has another tokenizer than the artifact: a draft model must have the same"
        )
    if not smaller.can_rewind:
        raise UsageError(
            f"{folder} cannot propose tokens: its layers carry more than a row for each position, "
            f"so that a refused draft cannot be taken back"
        )
    with open_on(device, folder, smaller, threads) as session:
        yield DraftModel(session, manifest.model.vocab_size)
