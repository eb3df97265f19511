"""`VirtualPhone`: the daemon, in a thread of its own, and the faults that it is told to show."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

from device_harness.virtual_phone.commands import Commands
from device_harness.virtual_phone.faults import Faults
from device_harness.virtual_phone.link import Link, Service
from device_harness.virtual_phone.shell_service import Shell
from device_harness.virtual_phone.stand_ins import banner, furnish
from device_harness.virtual_phone.sync_service import Sync

FEATURES: Final = (
    "shell_v2,cmd,stat_v2,ls_v2,fixed_push_mkdir,fixed_push_symlink_timestamp,"
    "sendrecv_v2,sendrecv_v2_dry_run_send"
)
_LONGEST_START: Final = 10.0
_LARGEST_BUFFER: Final = 4 << 20

_SIGNAL_SECONDS: Final = 0.2


class VirtualPhone:
    """A phone that is none; use it in a ``with`` statement.

    Args:
        commands: how it runs commands; they are ended with the phone.
        port: the port on loopback; 0 for any that is free.
        shell: the path of the shell, as the phone's commands see it.
        chip: what runs the commands, as the phone calls it.
        asks_for_keys: whether it wants a client's key; it then trusts whoever shows one.
        features: the features of adb's protocol that it has.

    Attributes:
        faults: the faults that it shows; set them by `set_fault`.
        port: its port, once it runs.
        sync: the service that receives files; it counts their bytes.
    """

    def __init__(
        self,
        commands: Commands,
        port: int = 0,
        shell: str = "/bin/sh",
        chip: str = "this host's processor",
        asks_for_keys: bool = False,
        features: str = FEATURES,
    ) -> None:
        self.faults, self.port = Faults(), port
        self._commands, self._shell, self._chip = commands, shell, chip
        self._keys: list[bytes] | None = [] if asks_for_keys else None
        self._features = features
        self.sync = Sync(commands, self.faults)
        self._shell_service = Shell(commands, self.faults)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._connections: set[asyncio.Task[Any]] = set()

    @property
    def serial(self) -> str:
        """The name by which adb knows it."""
        return f"127.0.0.1:{self.port}"

    def set_fault(self, name: str, amount: int = 0) -> None:
        """Switches a fault on.

        Raises:
            ValueError: there is no such fault.
        """
        if name == "disk-full":  # counted from now on
            amount += self.sync.received
        self.faults.set(name, amount)
        self._furnish()

    def clear_faults(self) -> None:
        """Switches all faults off."""
        self.faults.clear()
        self._furnish()

    def drop_connections(self) -> None:
        """Cuts every line at once, as unplugging does."""
        self._call(lambda: [task.cancel() for task in self._connections])

    def start(self) -> None:
        """Starts the daemon.

        Raises:
            OSError: the port is taken.
        """
        self._furnish()
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="virtual phone", daemon=True
        )
        self._thread.start()
        ready.wait(_LONGEST_START)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ends the daemon and every command that it runs; again, it does nothing."""
        if self._thread is None:
            return
        self._call(lambda: self._stop.set() if self._stop else None)
        self._thread.join()
        self._thread = None
        self._shell_service.close()
        self._commands.close()

    def wait(self) -> None:
        """Waits until the daemon ends."""
        # A signal may reach another thread than this one, and Python calls its handler here alone:
        # a wait without an end would never be left.
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_SIGNAL_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _furnish(self) -> None:
        furnish(self._commands.root, self.faults, self._shell, self._chip)

    def _call(self, action: Callable[[], object]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(action)

    def _run(self, ready: threading.Event) -> None:
        try:
            asyncio.run(self._serve(ready))
        except BaseException as error:
            self._failure = error
        finally:
            ready.set()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(
            self._client, "127.0.0.1", self.port, limit=_LARGEST_BUFFER
        )
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stop.wait()
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        if (self.faults.get("unplugged") or 0) < 0:
            writer.close()
            return
        link = Link(
            reader,
            writer,
            self._services(),
            banner(self.faults, self._chip),
            self._features,
            self._keys if self.faults.get("unauthorized") is None else [],
            self.faults,
        )
        with suppress(asyncio.CancelledError):
            await link.serve()

    def _services(self) -> Mapping[str, Service]:
        shell = self._shell_service
        return {
            "shell": shell.version_1,
            "shell,v2": shell.version_2,
            "exec": shell.version_1,
            "sync": self.sync.serve,
        }
