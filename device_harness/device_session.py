"""An artifact on a device, driven as one on this host."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from device_harness.devices.device import Device
from device_harness.devices.registry import KINDS, kind_of
from device_harness.errors import DeviceError
from device_harness.frames import Array
from device_harness.session import Calls, HostSession, Logits, Shown, Tokens, check_tokens
from device_harness.timed_run import TimedRun
from device_harness.worker_line import WorkerLine, shown_text
from exporters.manifest import Manifest

_LARGEST_VOCABULARY: Final = 1 << 24
_MOST_VALUES: Final = 1 << 34
"""Bytes of the values of some texts, at most."""


class DeviceSession(HostSession):
    """An artifact that a worker runs on a device.

    Args:
        device: where; it stays open when the session closes.
        folder: the artifact on this host.
        manifest: its manifest.
        threads: the runtime's number of threads; None for its default there.
        options: of the runtime, by name.

    Raises:
        DeviceError: the device refuses the artifact. What the runtime says of it is known at the
            first call.
    """

    def __init__(
        self,
        device: Device,
        folder: Path,
        manifest: Manifest,
        threads: int | None = None,
        options: Mapping[str, str | None] | None = None,
    ) -> None:
        given = {name: value for name, value in (options or {}).items() if value is not None}
        arguments = ["--options", json.dumps(given)]
        if threads is not None:
            arguments += ["--threads", str(threads)]
        self.device, self.context = device, manifest.context
        self.can_rewind = manifest.can_rewind
        self._opening = f"opening {folder}"
        self._said_hello: dict[str, Any] = {}
        self._vocab, self._facts = 0, dict[str, Any]()
        self._channel = device.start(folder, manifest, arguments)
        self._line = WorkerLine(device.name, self._channel)

    def _hello(self) -> Mapping[str, Any]:
        """What the worker says once it has opened the artifact, which takes a second or more."""
        if not self._said_hello:
            self._require_open()
            words, _ = self._line.answer(0, self._opening)
            if not isinstance(words.get("limits"), list) or "runtime" not in words:
                raise DeviceError(f"{self.device.name} answers what no worker does")
            self._said_hello = words
        return self._said_hello

    @property
    def runtime(self) -> str:
        """The runtime's name, version and threads, for reports."""
        return shown_text(self._hello()["runtime"])

    @property
    def limits(self) -> tuple[str, ...]:  # type: ignore[override]
        """What this runtime cannot tell of another; the device's own limits are apart."""
        return tuple(map(shown_text, self._hello()["limits"]))

    def load(self) -> Mapping[str, Any]:
        """Loads the artifact, once; the other calls do it when needed.

        Returns:
            ``seconds`` that it took, and ``loaded_bytes`` by which the peak memory rose.
        """
        self._require_open()
        if not self._facts:
            words, _ = self._ask("load", "loading the artifact")
            vocab, chunks = words.get("vocab_size"), words.get("chunks")
            if (
                type(vocab) is not int
                or not 0 < vocab <= _LARGEST_VOCABULARY
                or not isinstance(chunks, list)
                or not all(type(each) is int for each in chunks)
                or not isinstance(words.get("seconds"), int | float)
                or type(words.get("loaded_bytes")) is not int
            ):
                raise DeviceError(f"{self.device.name} answers what no worker does")
            self._facts, self._vocab = words, vocab
        return self._facts

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        self.load()
        return self._vocab

    @property
    def processor(self) -> str:  # type: ignore[override]
        """The processor there that runs the artifact; empty if not known."""
        return shown_text(self.load().get("processor", ""))

    @property
    def peak_bytes(self) -> int:
        """The peak resident memory so far of the process that runs the artifact there, in bytes."""
        if not self._closed:
            self._hello()
        return self._line.peak_bytes

    @property
    def chunks(self) -> tuple[int, ...]:  # type: ignore[override]
        """The lengths that one call of the runtime takes of a longer text."""
        return tuple(self.load()["chunks"])

    @property
    def has_all_positions(self) -> bool:  # type: ignore[override]
        """Whether `logits` runs a graph of its own, which apps do not run."""
        return bool(self.load()["has_all_positions"])

    def reset(self) -> None:
        """Forgets all positions."""
        super().reset()
        self._ask("reset", "forgetting the text")

    @property
    def runs_drafts(self) -> bool:  # type: ignore[override]
        """Whether the runtime there can run an artifact's graph for drafts, if there is one."""
        return bool(self.load().get("runs_drafts", True))

    def use_drafts(self, wanted: bool) -> None:
        """Makes `extend` run the graph of `extend_draft`, or again the one without drafts."""
        super().reset()
        self._ask("use_drafts", "preparing for drafts", wanted=wanted)

    def rewind(self, length: int) -> None:
        """Forgets the tokens behind the first ``length``."""
        super().rewind(length)
        self._ask("rewind", f"going back to position {length}", length=length)

    def extend_draft(self, tokens: Tokens) -> Logits:
        """Appends a token and its draft and returns the logits of each, ``float32[t, vocab]``."""
        vocab = self.vocab_size
        check_tokens(tokens, self._length + len(tokens), vocab, self.context)
        what = f"running a draft of {len(tokens)} tokens at position {self._length}"
        found = self._one("extend_draft", what, [tokens], (len(tokens), vocab))
        self._length += len(tokens)
        return found

    def extend(self, tokens: Tokens) -> Logits:
        """Appends tokens and returns the last one's logits, ``float32[vocab]``."""
        vocab = self.vocab_size
        check_tokens(tokens, self._length + len(tokens), vocab, self.context)
        what = f"running {len(tokens)} tokens at position {self._length}"
        found = self._one("extend", what, [tokens], (vocab,))
        self._length += len(tokens)
        return found

    def logits(self, tokens: Tokens) -> Logits:
        """Logits of every position of a fresh text: ``int64[t] -> float32[t, vocab]``."""
        vocab = self.vocab_size
        check_tokens(tokens, len(tokens), vocab, self.context)
        return self._one("logits", f"running {len(tokens)} tokens", [tokens], (len(tokens), vocab))

    def timed(self, prompt: Tokens, output: int) -> TimedRun:
        """Runs a prompt and generates greedily, timed on the device itself.

        The text of `extend` is forgotten.

        Args:
            prompt: ``int64[t]``.
            output: how many tokens to generate, at least 1.
        """
        check_tokens(prompt, len(prompt) + output - 1, self.vocab_size, self.context)
        self._length = 0
        what = f"a timed run of {len(prompt)} + {output} tokens"
        words, _ = self._ask("timed", what, [prompt], output=output)
        try:
            run = TimedRun.from_json(words["timed"])
        except (KeyError, TypeError, ValueError) as error:
            raise DeviceError(f"{self.device.name} answers what no worker does: {error}") from error
        if run.prompt_tokens != len(prompt) or len(run.tokens) != output:
            raise DeviceError(f"{self.device.name} timed another text than it was given")
        self._length = len(prompt) + output - 1
        return run

    def first_not_finite(self, tokens: Tokens) -> str | None:
        """Names the operation that gives the first NaN or infinite value of a fresh text."""
        words, _ = self._ask("first_not_finite", "looking for NaN", [tokens])
        where = words.get("where")
        return None if where is None else shown_text(where)

    def values(
        self, texts: Sequence[Tokens], names: Sequence[str], calls: Calls | None = None
    ) -> list[Shown]:
        """Returns values inside the artifact while it runs fresh texts."""
        what = f"showing values of {len(texts)} texts"
        sizes = None if calls is None else [list(map(int, each)) for each in calls]
        asked = {"names": list(names), "calls": sizes}
        words, arrays = self._ask("values", what, texts, _MOST_VALUES, **asked)
        counts, rest = words.get("values"), iter(arrays)
        try:
            found = [
                {str(name): [next(rest) for _ in range(calls)] for name, calls in text.items()}
                for text in counts or []
            ]
        except (AttributeError, TypeError, RuntimeError) as error:
            raise DeviceError(f"{self.device.name} answers what no worker does") from error
        if len(found) != len(texts):
            raise DeviceError(f"{self.device.name} shows values of other texts")
        return found

    def close(self) -> None:
        """Ends the worker."""
        super().close()
        self._line.close()

    def _require_open(self) -> None:
        """Refuses any further use after `close`, and after the device was lost."""
        self._closed = self._closed or self._line.is_closed
        super()._require_open()

    def _one(self, call: str, what: str, arrays: Sequence[Array], shape: tuple[int, ...]) -> Logits:
        """A call that answers with float32 numbers of one shape."""
        most = 4 * int(np.prod(shape))
        _, found = self._ask(call, what, arrays, most)
        if len(found) != 1 or found[0].shape != shape or found[0].dtype != np.float32:
            shapes = ", ".join(str(each.shape) for each in found) or "nothing"
            raise DeviceError(f"{self.device.name} gives {shapes} for logits of {shape}")
        result: Logits = found[0]
        return result

    def _ask(
        self,
        call: str,
        what: str,
        arrays: Sequence[Array] = (),
        most_bytes: int = 0,
        **words: object,
    ) -> tuple[dict[str, Any], list[Array]]:
        self._require_open()
        self._hello()
        given = [np.ascontiguousarray(each, np.int64) for each in arrays]
        return self._line.ask({"call": call, **words}, given, most_bytes, what)


def open_on(
    device: Device,
    folder: Path,
    manifest: Manifest,
    threads: int | None = None,
    options: Mapping[str, str | None] | None = None,
) -> DeviceSession:
    """Opens an artifact on a device; close the session, or use it in a ``with``.

    Args:
        device: where.
        folder: the artifact on this host.
        manifest: its manifest.
        threads: the runtime's number of threads; None for its default there.
        options: of the runtime, by name.

    Raises:
        DeviceError: artifacts of this target do not run there, or the device refuses this one.
    """
    targets = KINDS[kind_of(device.name)].targets
    if manifest.target not in targets:
        raise DeviceError(
            f"{manifest.target} artifacts do not run on {device.name}, which runs those for "
            f"{', '.join(targets)}"
        )
    return DeviceSession(device, folder, manifest, threads, options)
