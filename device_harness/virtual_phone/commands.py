"""How a virtual phone runs commands, and where its files lie."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, Protocol

_LINKS_FOLLOWED: Final = 40
_POLL_SECONDS: Final = 0.01


class Commands(Protocol):
    """A way to run the phone's commands.

    Attributes:
        root: the folder of this host that is the phone's root folder.
        environment: the environment of every command.
    """

    root: Path
    environment: Mapping[str, str]

    def command(self, line: str) -> list[str]:
        """What this host starts for a line of the phone's shell; an empty line is the shell."""

    def close(self) -> None:
        """Ends all commands."""


class HostCommands:
    """Commands of this host, which see the phone's folders where these lie here.

    It emulates no processor and locks nothing in: it is for tests of the protocol. The names of a
    phone's folders are replaced by the places where they lie, in the line of the shell.

    Args:
        root: the folder that is the phone's root folder.

    Raises:
        ValueError: the folder's name means something to a shell.
    """

    _PLACES = re.compile(r"(?<![\w./-])/(?=data/local/tmp|sys/)")

    def __init__(self, root: Path) -> None:
        if not re.fullmatch(r"[\w./-]+", str(root)):
            raise ValueError(f"{root} means something to a shell: choose another folder")
        self.root = root
        path = f"{root}/system/bin:{os.environ.get('PATH', os.defpath)}"
        self.environment: Mapping[str, str] = {
            "PATH": path,
            "HOME": f"{root}/data/local/tmp",
            "LC_ALL": "C",
            "VIRTUAL_PHONE_ROOT": str(root),
        }

    def command(self, line: str) -> list[str]:
        """The host's own shell."""
        placed = self._PLACES.sub(lambda _: f"{self.root}/", line)
        return ["/bin/sh", "-c", placed] if line else ["/bin/sh"]

    def close(self) -> None:
        """Has nothing to end: each command ends with the stream that asked for it."""


def place_of(root: Path, path: str, follow: bool = True) -> Path:
    """Where a file of the phone lies on this host.

    Links lead nowhere outside the phone's root folder.

    Args:
        root: the folder that is the phone's root folder.
        path: the path on the phone.
        follow: whether a link at the path's end is followed.

    Raises:
        OSError: the links lead in a circle.
    """
    done: list[str] = []
    ahead = path.split("/")[::-1]
    links = 0
    while ahead:
        part = ahead.pop()
        if part in ("", "."):
            continue
        if part == "..":
            done[-1:] = []
            continue
        here = root.joinpath(*done, part)
        if here.is_symlink() and (ahead or follow):
            links += 1
            if links > _LINKS_FOLLOWED:
                raise OSError(40, "Too many symbolic links encountered", path)
            target = os.readlink(here)
            if target.startswith("/"):
                done = []
            ahead += target.split("/")[::-1]
        else:
            done.append(part)
    return root.joinpath(*done)


class Running:
    """A command that runs, with pipes; `begin` starts one.

    As on a phone, a command whose client has left finds its pipes closed and runs on: who wants it
    to end must kill it.

    Attributes:
        output: what it prints.
        errors: what it prints on stderr; None where that goes with the output.
        input: its stdin.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        output: asyncio.StreamReader,
        errors: asyncio.StreamReader | None,
        input_: asyncio.StreamWriter,
        pipes: list[asyncio.BaseTransport],
    ) -> None:
        self.output, self.errors, self.input = output, errors, input_
        self._process, self._pipes = process, pipes

    async def wait(self) -> int:
        """Waits for its end; returns its exit code, negative for a signal."""
        while (code := self._process.poll()) is None:
            await asyncio.sleep(_POLL_SECONDS)
        return code

    @property
    def has_ended(self) -> bool:
        """Whether it and all of its group are gone."""
        self._process.poll()
        try:
            os.killpg(self._process.pid, 0)
        except OSError:
            return True
        return False

    def leave(self) -> None:
        """Closes its pipes."""
        for pipe in self._pipes:
            pipe.close()

    def kill(self) -> None:
        """Kills it and its children, also where what was started began a session elsewhere."""
        for leader in (*children_of(self._process.pid), self._process.pid):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(leader, signal.SIGKILL)
        self._process.poll()


def children_of(pid: int) -> list[int]:
    """The processes that another one started."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            if int(place.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(place.parent.name))
    return found


async def begin(commands: Commands, line: str, merged: bool) -> Running:
    """Starts a command.

    Args:
        commands: what runs it.
        line: the line for the phone's shell.
        merged: whether its stderr goes with its output.

    Raises:
        OSError: it cannot be started.
    """
    process = subprocess.Popen(
        commands.command(line),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merged else subprocess.PIPE,
        cwd=commands.root,
        env=dict(commands.environment),
        start_new_session=True,
        bufsize=0,
    )
    loop = asyncio.get_running_loop()
    pipes: list[asyncio.BaseTransport] = []

    async def reader(pipe: IO[bytes]) -> asyncio.StreamReader:
        stream = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), pipe
        )
        pipes.append(transport)
        return stream

    assert process.stdin is not None and process.stdout is not None
    output = await reader(process.stdout)
    errors = None if process.stderr is None else await reader(process.stderr)
    writing, protocol = await loop.connect_write_pipe(
        asyncio.streams.FlowControlMixin, process.stdin
    )
    pipes.append(writing)
    input_ = asyncio.StreamWriter(writing, protocol, None, loop)
    return Running(process, output, errors, input_, pipes)
