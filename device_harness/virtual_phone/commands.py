"""How a virtual phone runs commands, and where its files lie."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

_LINKS_FOLLOWED: Final = 40


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


@asynccontextmanager
async def running(
    commands: Commands, line: str, stderr: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command with pipes; it and its children end with the block.

    Args:
        commands: what runs it.
        line: the line for the phone's shell.
        stderr: ``PIPE``, or ``STDOUT`` for one stream with the output.
    """
    process = await asyncio.create_subprocess_exec(
        *commands.command(line),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
        cwd=commands.root,
        env=dict(commands.environment),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # The first process may have ended and left others of its group behind.
        kill(process)
        await process.wait()


def kill(process: asyncio.subprocess.Process) -> None:
    """Kills a command and its children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
