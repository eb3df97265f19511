"""Artifacts on this host, by which the texts of devices are judged."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from device_harness.device_session import DeviceSession, open_on
from device_harness.devices.host import HostDevice
from device_harness.errors import DeviceError
from device_harness.measuring.record import Cell, TextCheck
from device_harness.measuring.text_check import check_text
from device_harness.registry import taken_options
from device_harness.session import Tokens
from exporters.manifest import Manifest


class HostTexts:
    """Judges generated texts; each artifact is opened here once, when it is first needed.

    It may be used by several threads, of which one runs at a time.

    Args:
        threads: of the runtimes; None for their defaults.
        options: of the runtimes, by name; what a runtime here has not is left out.
        turn: is held while this host computes, so that nothing that is timed runs beside.
    """

    def __init__(
        self, threads: int | None, options: Mapping[str, str | None], turn: threading.Lock
    ) -> None:
        self._threads, self._options, self._turn = threads, options, turn
        self._opened: dict[Path, DeviceSession] = {}

    def judged(self, cell: Cell, folder: Path, manifest: Manifest, prompt: Tokens) -> Cell:
        """A cell with its text judged; one whose text failed already, or never was, stays."""
        texts = [run.tokens for run in cell.runs if run.tokens]
        if cell.text.verdict == "failed" or not texts:
            return cell
        with self._turn:
            try:
                text = check_text(self._session(folder, manifest), prompt, texts)
            except DeviceError as error:
                text = TextCheck("not checked", reason=f"this host cannot run it: {error}")
                self._close(folder)
        return replace(cell, text=text)

    def close(self) -> None:
        """Ends the processes."""
        for folder in list(self._opened):
            self._close(folder)

    def _session(self, folder: Path, manifest: Manifest) -> DeviceSession:
        if folder not in self._opened:
            given = taken_options(manifest.target, self._options)
            self._opened[folder] = open_on(HostDevice(), folder, manifest, self._threads, given)
        return self._opened[folder]

    def _close(self, folder: Path) -> None:
        session = self._opened.pop(folder, None)
        if session is not None:
            session.close()
