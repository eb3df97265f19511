"""The protocol of a session, which every runtime here implements, and what the sessions share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from device_harness.closing import Closing
from device_harness.errors import DeviceError
from device_harness.memory import resident_peak

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
Shown = dict[str, list[npt.NDArray[Any]]]
"""Values inside an artifact by name: a float32 array for each call that took a part of the text."""
Calls = Sequence[Sequence[int]]
"""For each text, how many tokens each call of `Session.extend` takes."""


class Session(Closing, Protocol):
    """One artifact, opened in a runtime; close it, or use it in a ``with`` statement.

    Attributes:
        can_rewind: whether `rewind` can take tokens back: not where a layer carries more than a row
            for each position.
    """

    can_rewind: bool

    @property
    def runs_drafts(self) -> bool:
        """Whether the runtime can run an artifact's graph for drafts, where there is one."""

    @property
    def context(self) -> int:
        """How many positions the caches hold."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    @property
    def runtime(self) -> str:
        """The runtime's name, version and threads, for reports."""

    @property
    def processor(self) -> str:
        """The processor that runs the artifact, once it is loaded; empty if not known."""

    @property
    def limits(self) -> tuple[str, ...]:
        """What running the artifact here cannot tell about a device, one sentence each."""

    @property
    def peak_bytes(self) -> int:
        """The peak resident memory so far of the process that runs the artifact, in bytes."""

    @property
    def chunks(self) -> tuple[int, ...]:
        """The lengths that one call of the runtime takes of a longer text, smallest first.

        Empty where a text of any length is one call.
        """

    @property
    def has_all_positions(self) -> bool:
        """Whether `logits` runs a graph of its own, which apps do not run."""

    def reset(self) -> None:
        """Forgets all positions."""

    def extend(self, tokens: Tokens) -> Logits:
        """Appends ``int64[t]`` tokens and returns the last one's logits, ``float32[vocab]``.

        Raises:
            DeviceError: there is no token, a token is outside the vocabulary, or the tokens do not
                fit into the context.
        """

    def use_drafts(self, wanted: bool) -> None:
        """Makes `extend` run the graph of `extend_draft`, or again the one without drafts.

        So only one of them need be loaded. The text is forgotten.

        Raises:
            DeviceError: the artifact has no graph for drafts, or the runtime runs none.
        """

    def extend_draft(self, tokens: Tokens) -> Logits:
        """Appends a token and a draft of those behind it, and returns the logits of each.

        `use_drafts` was called before.

        Args:
            tokens: ``int64[t]``, at most as many as the artifact's draft positions.

        Returns:
            ``float32[t, vocab]``.

        Raises:
            DeviceError: as for `extend`, or there are more tokens than draft positions.
        """

    def rewind(self, length: int) -> None:
        """Forgets the tokens behind the first ``length``.

        Raises:
            DeviceError: the text is shorter, or ``can_rewind`` is false.
        """

    def logits(self, tokens: Tokens) -> Logits:
        """Logits of every position of a fresh text: ``int64[t] -> float32[t, vocab]``.

        The text of `extend` stays as it is.
        """

    def first_not_finite(self, tokens: Tokens) -> str | None:
        """Names the operation that gives the first NaN or infinite value of a fresh text.

        The text of `extend` stays as it is.

        Args:
            tokens: a text whose logits are not finite, ``int64[t]``.

        Returns:
            A phrase for a message (`device_harness.finite.described`); None where the runtime shows
            no values between its operations, or all of them are finite.
        """

    def values(
        self, texts: Sequence[Tokens], names: Sequence[str], calls: Calls | None = None
    ) -> list[Shown]:
        """Returns values inside the artifact while it runs fresh texts, in the layout it has.

        What the artifact does not compute, or the runtime cannot show, is left out. The text of
        `extend` stays as it is.

        Args:
            texts: ``int64[t]`` each.
            names: values as `exporters.lifted` names them.
            calls: show what `extend` runs, called so; None for what `logits` runs.

        Raises:
            DeviceError: the runtime shows no values between its operations.
        """

    def close(self) -> None:
        """Releases memory and processes; closing again does nothing."""


class HostSession(Closing):
    """The part that all sessions on this host share: after `close` they refuse to run.

    Attributes:
        processor: the processor that runs the artifact, once it is loaded; empty if not known.
        limits: what running the artifact here cannot tell about a device, one sentence each.
        chunks: the lengths that one call of the runtime takes of a longer text; here any length.
        has_all_positions: whether `logits` runs a graph of its own; here it runs that of `extend`.
        can_rewind: whether `rewind` can take tokens back; who opens the artifact says so.
        runs_drafts: whether the runtime can run an artifact's graph for drafts, if there is one.
    """

    processor: str = ""
    limits: tuple[str, ...] = ()
    chunks: tuple[int, ...] = ()
    has_all_positions: bool = False
    can_rewind: bool = True
    runs_drafts: bool = True
    _closed = False
    _length = 0

    @property
    def peak_bytes(self) -> int:
        """The peak resident memory so far of this process, which runs the artifact, in bytes."""
        return resident_peak()

    def first_not_finite(self, tokens: Tokens) -> str | None:
        """Returns None: the runtime shows no values between its operations."""
        return None

    def values(
        self, texts: Sequence[Tokens], names: Sequence[str], calls: Calls | None = None
    ) -> list[Shown]:
        """Refuses: the runtime shows no values between its operations."""
        raise DeviceError("this runtime shows no values between its operations")

    def reset(self) -> None:
        """Forgets all positions."""
        self._require_open()
        self._length = 0

    def use_drafts(self, wanted: bool) -> None:
        """Refuses drafts: the runtime runs no graph for them."""
        self.reset()
        if wanted:
            raise DeviceError("this runtime runs no drafts: leave speculation out")

    def extend_draft(self, tokens: Tokens) -> Logits:
        """Refuses: the runtime runs no graph for drafts."""
        raise DeviceError("this runtime runs no drafts: leave speculation out")

    def rewind(self, length: int) -> None:
        """Forgets the tokens behind the first ``length``.

        The caches keep their rows, which later tokens overwrite before any token reads them.
        """
        self._require_open()
        if length != self._length and not self.can_rewind:
            raise DeviceError(NO_REWIND)
        if not 0 <= length <= self._length:
            raise DeviceError(f"a text of {self._length} tokens cannot go back to {length}")
        self._length = length

    def close(self) -> None:
        """Releases memory and processes; closing again does nothing."""
        self._closed = True

    def _require_open(self) -> None:
        """Refuses any further use after `close`.

        Raises:
            DeviceError: the session is closed.
        """
        if self._closed:
            raise DeviceError("this session is closed: open the artifact again to run it")


NO_DRAFTS = (
    "this artifact has no graph for drafts: export it with --draft-positions 8, or leave "
    "speculation out"
)
"""What is said of an artifact that was exported without draft positions."""


NO_REWIND = (
    "this model's layers carry more from token to token than a row for each position, so that "
    "tokens cannot be taken back"
)
"""What is said where a text cannot be made shorter."""


def draft_rows(logits: Logits, tokens: Tokens) -> Logits:
    """The logits of a draft's tokens, of which a graph may have given fewer.

    Raises:
        DeviceError: there are fewer rows than tokens.
    """
    if len(logits) < len(tokens):
        raise DeviceError(
            f"the artifact gives the logits of {len(logits)} positions a call, and the draft has "
            f"{len(tokens)}"
        )
    return logits


def parts_of(tokens: Tokens, sizes: Sequence[int]) -> Iterator[tuple[int, Tokens]]:
    """Yields what each of a text's calls takes, behind how many tokens are done before it."""
    done = 0
    for size in sizes:
        yield done, tokens[done : done + size]
        done += size


def check_tokens(tokens: Tokens, total: int, vocab_size: int, context: int) -> None:
    """Refuses tokens outside the vocabulary or the context.

    Runtimes do not check them: their kernels would read past the end of a table.

    Args:
        tokens: the tokens that are about to run, ``int64[t]``.
        total: the number of positions that are taken once they have run.
        vocab_size: the size of the vocabulary; tokens are smaller.
        context: the number of positions that the caches hold.

    Raises:
        DeviceError: there is no token, a token is outside the vocabulary, or the tokens do not fit
            into the context.
    """
    if not len(tokens):
        raise DeviceError("there is no token to run")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(outside):
        raise DeviceError(
            f"there is no token {outside[0]}: the artifact's vocabulary is 0 to {vocab_size - 1}"
        )
    if total > context:
        raise DeviceError(
            f"{total} tokens do not fit the artifact's context of {context}: shorten the text, or "
            f"export with a larger --context"
        )
