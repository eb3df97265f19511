"""Serves one artifact in a process of its own, on this host or on a device.

``python -m device_harness.worker FOLDER --threads N --options JSON`` opens the artifact in
FOLDER. It reads frames (`device_harness.frames`) on stdin and answers each with a frame on stdout;
what the runtime prints goes to stderr. The first answer comes unasked: it says what was opened, or
why nothing could be. While a call takes long, a frame with ``alive`` comes every few seconds, so
that whoever waits can tell a slow device from one that hangs. It ends when stdin ends.

It needs Python, NumPy and the artifact's runtime, and nothing else: these files run on a phone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from device_harness.errors import DeviceError
from device_harness.frames import Array, FrameError, read_frame, write_frame
from device_harness.registry import open_session
from device_harness.session import Session
from device_harness.timed_run import SelfTimed, run_timed
from exporters.errors import ExportError
from exporters.manifest import Manifest

ALIVE_SECONDS: Final = 5.0
"""How often a worker that is at work says so."""
_LONGEST_TEXT: Final = 1 << 30

Answer = tuple[Mapping[str, object], Sequence[Array]]
Called = Callable[[Mapping[str, Any], Sequence[Array]], Answer]


class Answers:
    """Writes frames, from the thread that serves and from the one that says that it is alive.

    Args:
        stream: takes the frames.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def write(self, words: Mapping[str, object], arrays: Sequence[Array] = ()) -> None:
        """Writes one frame."""
        with self._lock:
            write_frame(self._stream, words, arrays)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Says every few seconds that the block is at work."""
        done = threading.Event()

        def say() -> None:
            while not done.wait(ALIVE_SECONDS):
                try:
                    self.write({"alive": True})
                except OSError:  # nobody listens any more; the next answer ends the worker
                    return

        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def main() -> None:
    """Serves the artifact named on the command line until stdin ends."""
    parser = argparse.ArgumentParser(prog="device_harness.worker")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--options", type=json.loads, default={})
    asked = parser.parse_args()

    def opened() -> Session:
        manifest = Manifest.read(asked.folder)
        return open_session(asked.folder, manifest, asked.threads, asked.options)

    serve_opened(opened)


def take_stdout() -> Answers:
    """Keeps stdout for frames, and leaves Ctrl-C to whoever started this process."""
    # Ctrl-C reaches this process too where it runs on the host; who started it decides its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The runtime may print on stdout, so its output goes to stderr, and only frames go to stdout.
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return Answers(stream)


def serve_opened(opened: Callable[[], Session]) -> None:
    """Serves what is opened until stdin ends.

    Args:
        opened: opens an artifact.
    """
    answers = take_stdout()
    try:
        with answers.alive():
            try:
                session = opened()
                peak = session.peak_bytes  # ExecuTorch's starts the runtime, which takes long
            except (DeviceError, ExportError) as error:
                answers.write({"error": str(error)})
                return
        with session:
            words = {"runtime": session.runtime, "limits": list(session.limits)}
            answers.write({**words, "context": session.context, "peak": peak})
            serve(session, sys.stdin.buffer, answers)
    except BrokenPipeError:
        sys.exit(1)


def serve(session: Session, requests: BinaryIO, answers: Answers) -> None:
    """Answers requests to a session until there are no more."""

    def called(words: Mapping[str, Any], arrays: Sequence[Array]) -> Answer:
        return CALLS[words["call"]](session, words, arrays)

    answer_all(called, lambda: session.peak_bytes, requests, answers)


def answer_all(
    called: Called, peak: Callable[[], int], requests: BinaryIO, answers: Answers
) -> None:
    """Answers requests until there are no more.

    Args:
        called: does what a request's words and arrays ask for.
        peak: gives the peak resident memory so far, in bytes.
        requests: gives the frames.
        answers: takes the answers.
    """
    while True:
        try:
            frame = read_frame(requests, _LONGEST_TEXT)
        except FrameError as error:
            answers.write({"error": f"the request cannot be read: {error}"})
            return
        if frame is None:
            return
        words, arrays = frame
        with answers.alive():
            try:
                said, found = called(words, arrays)
            except (DeviceError, ExportError) as error:
                said, found = {"error": str(error)}, ()
            except MemoryError:
                said, found = {"error": "there is not enough memory for it"}, ()
            bytes_so_far = peak()
        answers.write({**said, "peak": bytes_so_far}, found)


def _load(session: Session, words: Mapping[str, Any], arrays: Sequence[Array]) -> Answer:
    before, started = session.peak_bytes, time.perf_counter()
    vocab = session.vocab_size
    seconds = time.perf_counter() - started
    if isinstance(session, SelfTimed):
        seconds = session.load_seconds
    return {
        "vocab_size": vocab,
        "processor": session.processor,
        "chunks": list(session.chunks),
        "has_all_positions": session.has_all_positions,
        "runs_drafts": session.runs_drafts,
        "seconds": seconds,
        "loaded_bytes": max(0, session.peak_bytes - before),
    }, ()


def _reset(session: Session, words: Mapping[str, Any], arrays: Sequence[Array]) -> Answer:
    session.reset()
    return {}, ()


def _extend(session: Session, words: Mapping[str, Any], arrays: Sequence[Array]) -> Answer:
    return {}, (session.extend(arrays[0]),)


def _use_drafts(session: Session, words: Mapping[str, Any], arrays: Sequence[Array]) -> Answer:
    session.use_drafts(words["wanted"])
    return {}, ()


def _extend_draft(session: Session, words: Mapping[str, Any], arrays: Sequence[Array]) -> Answer:
    return {}, (session.extend_draft(arrays[0]),)


def _rewind(session: Session, words: Mapping[str, Any], arrays: Sequence[Array]) -> Answer:
    session.rewind(words["length"])
    return {}, ()


def _logits(session: Session, words: Mapping[str, Any], arrays: Sequence[Array]) -> Answer:
    return {}, (session.logits(arrays[0]),)


def _timed(session: Session, words: Mapping[str, Any], arrays: Sequence[Array]) -> Answer:
    prompt, output = arrays[0], words["output"]
    if isinstance(session, SelfTimed):
        return {"timed": asdict(session.run_timed(prompt, output))}, ()
    return {"timed": asdict(run_timed(session, prompt, output))}, ()


def _first_not_finite(
    session: Session, words: Mapping[str, Any], arrays: Sequence[Array]
) -> Answer:
    try:
        return {"where": session.first_not_finite(arrays[0])}, ()
    except ModuleNotFoundError:  # what reads graphs is not on every device
        return {"where": None}, ()


def _values(session: Session, words: Mapping[str, Any], arrays: Sequence[Array]) -> Answer:
    try:
        shown = session.values(arrays, words["names"], words.get("calls"))
    except ModuleNotFoundError as error:
        raise DeviceError(f"{error.name} is not on the device, and shows values there") from None
    counts = [{name: len(calls) for name, calls in text.items()} for text in shown]
    found = [np.asarray(a, np.float32) for text in shown for calls in text.values() for a in calls]
    return {"values": counts}, found


CALLS: Final[dict[str, Callable[[Session, Mapping[str, Any], Sequence[Array]], Answer]]] = {
    "load": _load,
    "reset": _reset,
    "extend": _extend,
    "use_drafts": _use_drafts,
    "extend_draft": _extend_draft,
    "rewind": _rewind,
    "logits": _logits,
    "timed": _timed,
    "first_not_finite": _first_not_finite,
    "values": _values,
}


if __name__ == "__main__":
    main()
