"""`WorkerLine`: asks a worker on a device and reads its answers; every way it can end is said."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from device_harness.devices.device import Channel
from device_harness.errors import DeviceError, WorkerEndedError
from device_harness.frames import Array, FrameCutError, FrameError, read_frame, write_frame
from device_harness.plain_text import plain

_ENDING_SECONDS: Final = 5.0


class WorkerLine:
    """The line to a worker.

    Args:
        name: the device's, for messages.
        channel: the worker's process.

    Attributes:
        peak_bytes: the peak resident memory of the worker, as it last said.
        is_closed: whether the worker was ended, by `close` or because it was lost.
    """

    def __init__(self, name: str, channel: Channel) -> None:
        self.peak_bytes, self.is_closed = 0, False
        self._name, self._channel = name, channel

    def ask(
        self, words: Mapping[str, object], arrays: Sequence[Array], most_bytes: int, what: str
    ) -> tuple[dict[str, Any], list[Array]]:
        """Sends a request and returns the answer.

        Args:
            words: the request's.
            arrays: that go with it.
            most_bytes: how many bytes the answer's arrays have together, at most.
            what: what is asked, for messages: ``running 3 tokens``.

        Raises:
            DeviceError: the worker says why it cannot, has ended (`WorkerEndedError`), is silent or
                cannot be reached.
        """
        # Where the worker has ended, or cannot be reached, reading its answer reports how.
        with suppress(OSError):
            write_frame(self._channel.requests, words, arrays)
        return self.answer(most_bytes, what)

    def answer(self, most_bytes: int, what: str) -> tuple[dict[str, Any], list[Array]]:
        """The next answer; frames that only say that the worker is alive are passed over.

        Raises:
            DeviceError: as `ask`.
        """
        while True:
            try:
                frame = read_frame(self._channel.answers, most_bytes)
            except FrameCutError:
                frame = None
            except FrameError as error:
                raise DeviceError(f"{self._name}: {what} failed: {error}") from error
            except TimeoutError as error:
                self.close()
                raise DeviceError(
                    f"{self._name} has been silent too long in {what}: see whether it hangs, "
                    f"and run it again"
                ) from error
            except OSError as error:
                self.close()
                raise DeviceError(f"{self._name} was lost in {what}: {error}") from error
            if frame is None:
                raise WorkerEndedError(f"{self._name}: {self._ended()} in {what}{self._said()}")
            words, arrays = frame
            if "alive" in words:
                continue
            if "error" in words:
                raise DeviceError(shown_text(words["error"]))
            if type(words.get("peak")) is int:
                self.peak_bytes = max(self.peak_bytes, words["peak"])
            return words, arrays

    def close(self) -> None:
        """Ends the worker; closing again does nothing."""
        self.is_closed = True
        self._channel.close()

    def _ended(self) -> str:
        """How the worker ended."""
        code = self._channel.wait(_ENDING_SECONDS)
        if code is None:
            return "the worker's answers stopped"
        # A shell reports a signal as 128 more than its number.
        number = -code if code < 0 else code - 128
        if number == signal.SIGKILL:
            return "the worker was killed, as a system does where memory runs out,"
        if number in set(signal.Signals):
            return f"the worker ended with {signal.Signals(number).name}"
        return f"the worker ended (exit code {code})"

    def _said(self) -> str:
        lines = [line.strip() for line in self._channel.last_words().splitlines() if line.strip()]
        return f": {shown_text(lines[-1])[:300]}" if lines else ""


def shown_text(given: object) -> str:
    """What a worker said, safe for a terminal and of a bounded length."""
    return plain(str(given), 1000)
