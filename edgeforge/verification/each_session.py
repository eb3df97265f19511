"""Several artifacts at work at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch

from device_harness.device_session import open_on
from device_harness.devices.device import Device
from device_harness.devices.host import HostDevice
from device_harness.session import Session
from exporters.manifest import Manifest
from quant.processors import default_threads

Given = TypeVar("Given")


@dataclass(frozen=True)
class Place:
    """An artifact, and where it is to run.

    Attributes:
        folder: the artifact.
        manifest: its manifest.
        device: where it runs; None for this host.
        options: of the runtime on the device, as `open_session` takes them.
    """

    folder: Path
    manifest: Manifest
    device: Device | None = None
    options: Mapping[str, str | None] = field(default_factory=dict)


@contextmanager
def open_sessions(
    places: Sequence[Place],
    threads: int | None,
    options: Mapping[str, str | None],
) -> Iterator[list[Session]]:
    """Opens artifacts for `EachSession`, and closes all of them at the end of the block.

    Args:
        places: the artifacts and where they run.
        threads: for each runtime; None shares the processors of this host out. The threads of one
            runtime wait for each other at every operator, and long where there are more than
            processors.
        options: of the runtimes on this host, as `open_session` takes them.
    """
    here = sum(place.device is None for place in places)
    shared = max(1, default_threads() // here) if here > 1 else None
    with ExitStack() as opened:
        yield [opened.enter_context(_opened(place, threads, shared, options)) for place in places]


def _opened(
    place: Place, threads: int | None, shared: int | None, options: Mapping[str, str | None]
) -> Session:
    if place.device is not None:
        return open_on(place.device, place.folder, place.manifest, threads, place.options)
    # A runtime that crashes or runs out of memory must not take the figures of the others along.
    return open_on(HostDevice(), place.folder, place.manifest, threads or shared, options)


@contextmanager
def starting(sessions: Sequence[Session]) -> Iterator[None]:
    """Starts runtimes that run in processes of their own, while the block does other work.

    Such a process imports for seconds, on a processor that the block leaves idle.
    """
    with ThreadPoolExecutor(len(sessions), thread_name_prefix="start") as pool:
        # Asking for its memory starts a process, and does nothing else where there is none.
        started = [pool.submit(getattr, session, "peak_bytes") for session in sessions]
        yield
        for each in started:
            each.result()


class EachSession:
    """Works on every session, on each in a thread of its own.

    A runtime leaves processors idle between its operators, the more the smaller the model is; the
    other runtimes use them.

    Args:
        sessions: the artifacts.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions
        self._pool = ThreadPoolExecutor(len(sessions), thread_name_prefix="session")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, work: Callable[[Session, Given], None], given: Sequence[Given]) -> None:
        """Does the work for every session.

        Args:
            work: called with a session and what is given for it, in no order.
            given: one thing for each session.
        """
        if len(self._sessions) == 1:
            work(self._sessions[0], given[0])
            return
        before = torch.get_num_threads()
        share = max(1, before // len(self._sessions))

        def limited(session: Session, mine: Given) -> None:
            torch.set_num_threads(share)  # in this thread: OpenMP and MKL keep it for each
            work(session, mine)

        try:
            list(self._pool.map(limited, self._sessions, given))
        finally:
            torch.set_num_threads(before)
