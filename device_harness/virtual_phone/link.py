"""One adb server's connection to the virtual phone, and the streams that run over it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final

from device_harness.virtual_phone.faults import Faults
from device_harness.virtual_phone.wire import (
    MAX_DATA,
    VERSION,
    Packet,
    ProtocolError,
    has_signed,
    read_packet,
)

_TOKEN, _SIGNATURE, _PUBLIC_KEY = 1, 2, 3
_MOST_STREAMS: Final = 256
# A client sends the next packet after the acknowledgement of the last one.
_MOST_WAITING: Final = 16

Service = Callable[["Stream", str], Awaitable[None]]


class Stream:
    """One service that a client opened: bytes in and bytes out, one packet under way each way."""

    def __init__(self, link: Link, local: int, remote: int) -> None:
        self.local = local
        self._link, self._remote = link, remote
        self._received: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._acknowledged = asyncio.Event()
        self._rest = b""
        self.closed = False

    async def write(self, data: bytes) -> None:
        """Sends bytes; it waits until the client has taken them.

        Raises:
            ConnectionError: the client has closed the stream.
        """
        for start in range(0, len(data), self._link.max_data):
            piece = data[start : start + self._link.max_data]
            if self.closed:
                raise ConnectionResetError("the client has closed this stream")
            self._acknowledged.clear()
            await self._link.send(Packet("WRTE", self.local, self._remote, piece))
            await self._acknowledged.wait()

    async def some(self) -> bytes:
        """The next bytes that the client wrote; empty once it has closed the stream."""
        if self._rest:
            piece, self._rest = self._rest, b""
            return piece
        received = await self._received.get()
        if received is None:
            self._received.put_nowait(None)
            return b""
        if not self.closed:
            await self._link.send(Packet("OKAY", self.local, self._remote))
        return received

    async def exactly(self, count: int) -> bytes:
        """That many bytes of what the client wrote.

        Raises:
            ConnectionError: the stream ended before.
        """
        parts, missing = [], count
        while missing > 0:
            piece = await self.some()
            if not piece:
                raise ConnectionResetError("the stream ended early")
            parts.append(piece[:missing])
            self._rest = piece[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)

    def took(self, data: bytes) -> None:
        """Keeps what came for this stream."""
        if self._received.qsize() > _MOST_WAITING:
            raise ProtocolError("the client does not wait for acknowledgements")
        self._received.put_nowait(data)

    def acknowledge(self) -> None:
        """Notes that the client took the last packet."""
        self._acknowledged.set()

    def hang_up(self) -> None:
        """Notes that the client closed the stream, or is gone."""
        self.closed = True
        self._received.put_nowait(None)
        self._acknowledged.set()


class Link:
    """One connection.

    Args:
        reader: what the adb server writes.
        writer: what it reads.
        services: what runs a service, by its name.
        banner: what the phone tells of itself at once, by property.
        features: the features of adb's protocol that it has.
        keys: the public keys that the phone trusts; None where it asks for none.
        faults: the faults to show.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        services: Mapping[str, Service],
        banner: Mapping[str, str],
        features: str,
        keys: list[bytes] | None,
        faults: Faults,
    ) -> None:
        self._reader, self._writer = reader, writer
        self._services, self._banner, self._features = services, banner, features
        self._keys, self._faults = keys, faults
        self.max_data = 4096
        self._checksums = True
        self._streams: dict[int, Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next, self._received = 1, 0
        self._token = os.urandom(20)
        self._trusted = keys is None

    async def send(self, packet: Packet) -> None:
        """Sends a packet."""
        self._writer.write(packet.encode(self._checksums))
        await self._writer.drain()

    async def serve(self) -> None:
        """Answers until the line ends; then nothing that was started over it is left."""
        try:
            while True:
                packet = await read_packet(self._reader)
                if self._is_cut(len(packet.data)):
                    return
                if self._faults.get("offline") is None:
                    await self._answer(packet)
        except (asyncio.IncompleteReadError, ConnectionError, ProtocolError):
            pass
        finally:
            for stream in self._streams.values():
                stream.hang_up()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._writer.close()

    def _is_cut(self, count: int) -> bool:
        self._received += count
        once, for_ever = self._faults.get("cut"), self._faults.get("unplugged")
        if for_ever is not None and self._received > for_ever:
            self._faults.set("unplugged", -1)
            return True
        return once is not None and self._received > once and self._faults.take("cut") is not None

    async def _answer(self, packet: Packet) -> None:
        if packet.command == "CNXN":
            self._checksums = packet.first < VERSION
            self.max_data = max(1, min(packet.second, MAX_DATA))
            await self._greet()
        elif packet.command == "AUTH":
            await self._authenticate(packet)
        elif not self._trusted:
            raise ProtocolError("the client asks before it is trusted")
        elif packet.command == "OPEN":
            await self._open(packet.first, packet.data.rstrip(b"\0").decode(errors="replace"))
        elif stream := self._streams.get(packet.second):
            if packet.command == "OKAY":
                stream.acknowledge()
            elif packet.command == "WRTE":
                stream.took(packet.data)
            elif packet.command == "CLSE":
                stream.hang_up()
                self._streams.pop(packet.second)
        elif packet.command == "WRTE":
            await self.send(Packet("CLSE", 0, packet.first))

    async def _authenticate(self, packet: Packet) -> None:
        assert self._keys is not None or self._trusted
        if self._faults.get("unauthorized") is None and self._keys is not None:
            if packet.first == _SIGNATURE:
                self._trusted = any(has_signed(key, self._token, packet.data) for key in self._keys)
            elif packet.first == _PUBLIC_KEY:
                self._keys.append(packet.data)
                self._trusted = True
        if self._trusted or packet.first == _SIGNATURE:
            await self._greet()
        # After a key that it does not trust a phone shows its dialog, and waits.

    async def _greet(self) -> None:
        if self._faults.get("unauthorized") is not None:
            self._trusted = False
        if not self._trusted:
            await self.send(Packet("AUTH", _TOKEN, 0, self._token))
            return
        told = "".join(f"{name}={value};" for name, value in self._banner.items())
        banner = f"device::{told}features={self._features}"
        await self.send(Packet("CNXN", VERSION, MAX_DATA, banner.encode()))

    async def _open(self, remote: int, asked: str) -> None:
        kind, _, rest = asked.partition(":")
        name, *options = kind.split(",")  # such as shell,v2,TERM=xterm-256color,raw
        service = self._services.get(f"{name},v2" if "v2" in options else name)
        if service is None or len(self._streams) >= _MOST_STREAMS:
            await self.send(Packet("CLSE", 0, remote))
            return
        stream = Stream(self, self._next, remote)
        self._next += 1
        self._streams[stream.local] = stream
        await self.send(Packet("OKAY", stream.local, remote))
        task = asyncio.ensure_future(self._run(service, stream, rest, remote))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, service: Service, stream: Stream, rest: str, remote: int) -> None:
        with suppress(ConnectionError):
            await service(stream, rest)
        if self._streams.pop(stream.local, None):
            with suppress(ConnectionError):
                await self.send(Packet("CLSE", stream.local, remote))
