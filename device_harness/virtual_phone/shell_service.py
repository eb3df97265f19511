"""The services ``shell``, ``shell,v2`` and ``exec`` (AOSP: ``adb/SERVICES.TXT``)."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from device_harness.virtual_phone.commands import Commands, Running, begin
from device_harness.virtual_phone.faults import Faults
from device_harness.virtual_phone.link import Stream

_STDIN, _STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = range(5)
_HEAD: Final = struct.Struct("<BI")
_PIECE: Final = 64 << 10
_LARGEST_INPUT: Final = 1 << 20
_NOISE: Final = b"\x1b[2J\x1b]0;owned\x07\xff\xfe\x00PyTorchObserver {\x1b[31m" + bytes(range(256))

Write = Callable[[bytes], Awaitable[None]]


class Shell:
    """Runs commands for clients.

    Args:
        commands: what runs them.
        faults: the faults to show.
    """

    def __init__(self, commands: Commands, faults: Faults) -> None:
        self._commands, self._faults = commands, faults
        self._begun: list[Running] = []

    async def version_1(self, stream: Stream, line: str) -> None:
        """The services ``shell`` and ``exec``: one stream out, without an exit code."""
        if await self._misbehaves(stream, stream.write):
            return
        running = await self._begin(line, merged=True)
        feeder = asyncio.ensure_future(_feed_all(stream, running))
        try:
            await self._pump(running, running.output, stream.write)
        finally:
            feeder.cancel()
            running.leave()

    async def version_2(self, stream: Stream, line: str) -> None:
        """The service ``shell,v2``: input, output and errors apart, and the exit code."""

        async def write(kind: int, data: bytes) -> None:
            await stream.write(_HEAD.pack(kind, len(data)) + data)

        if await self._misbehaves(stream, lambda data: write(_STDOUT, data)):
            return
        running = await self._begin(line, merged=False)
        feeder = asyncio.ensure_future(_feed_packets(stream, running))
        try:
            assert running.errors is not None
            await asyncio.gather(
                self._pump(running, running.output, lambda data: write(_STDOUT, data)),
                self._pump(running, running.errors, lambda data: write(_STDERR, data)),
            )
            code = await running.wait()
            if self._faults.get("forgets-exit") is None:
                await write(_EXIT, bytes([code & 0xFF if code >= 0 else 128 - code]))
        finally:
            feeder.cancel()
            running.leave()

    def close(self) -> None:
        """Kills what still runs."""
        for running in self._begun:
            running.kill()

    async def _begin(self, line: str, merged: bool) -> Running:
        self._begun = [running for running in self._begun if not running.has_ended]
        running = await begin(self._commands, line, merged)
        self._begun.append(running)
        return running

    async def _pump(self, running: Running, source: asyncio.StreamReader, write: Write) -> None:
        answered = 0
        while data := await source.read(_PIECE):
            answered += len(data)
            limit = self._faults.get("killed")
            if limit is not None and answered > limit:
                running.kill()
                return
            await write(data)

    async def _misbehaves(self, stream: Stream, write: Write) -> bool:
        """Shows the faults in place of a command, for as long as the client listens."""
        if self._faults.get("hung-shell") is not None:
            while await stream.some():
                pass
            return True
        amount = self._faults.get("garbage")
        if amount is None:
            return False
        for _ in range(max(1, amount // _PIECE)):
            await write(_NOISE * (_PIECE // len(_NOISE)))
        return True


async def _feed_all(stream: Stream, running: Running) -> None:
    with suppress(ConnectionError):
        while data := await stream.some():
            running.input.write(data)
            await running.input.drain()
    running.input.close()


async def _feed_packets(stream: Stream, running: Running) -> None:
    with suppress(ConnectionError):
        while True:
            kind, length = _HEAD.unpack(await stream.exactly(_HEAD.size))
            if length > _LARGEST_INPUT:
                break
            data = await stream.exactly(length)
            if kind == _STDIN and not running.input.is_closing():
                with suppress(ConnectionError):  # the command has closed its input: no matter
                    running.input.write(data)
                    await running.input.drain()
            elif kind == _CLOSE_STDIN:
                running.input.close()
    running.input.close()
