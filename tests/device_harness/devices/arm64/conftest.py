"""A mirror on this machine that behaves, or misbehaves, as a test asks; packages made by hand."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@dataclass
class Mirror:
    """Files by path, and how they are sent.

    Attributes:
        address: of the server.
        files: by path, without a slash before it.
        cuts: by path, after how many bytes each of the next connections ends.
        knows_ranges: whether it sends parts of files.
        asked: the paths that were asked for, each with the place from where.
    """

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    knows_ranges: bool = True
    asked: list[tuple[str, int]] = field(default_factory=list)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    """A server on loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            content = known.files.get(path)
            wanted = self.headers.get("Range", "")
            begin, end = 0, len(content or b"")
            if wanted and known.knows_ranges:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                begin, end = int(first), min(end, int(last) + 1) if last else end
            known.asked.append((path, begin))
            if content is None:
                self.send_error(404)
                return
            if begin >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if wanted and known.knows_ranges else 200)
            if wanted and known.knows_ranges:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
            self.send_header("Content-Length", str(end - begin))
            self.end_headers()
            cuts = known.cuts.get(path)
            if cuts:
                self.wfile.write(content[begin:end][: cuts.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            with suppress(OSError):  # who asked has heard enough
                self.wfile.write(content[begin:end])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    known = Mirror(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield known
    server.shutdown()
    server.server_close()


@pytest.fixture
def sha256() -> Callable[[bytes], str]:
    """The digest of a content."""
    return lambda content: hashlib.sha256(content).hexdigest()


@pytest.fixture
def deb() -> Callable[..., bytes]:
    """Makes a package of Debian."""
    return _deb


def _deb(*members: tarfile.TarInfo | tuple[str, bytes], packed: str = "xz") -> bytes:
    """A package of Debian with files, or with members as they are given."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    content = lzma.compress(data.getvalue()) if packed == "xz" else data.getvalue()
    parts = [
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"12345"),
        (f"data.tar.{packed}", content),
    ]
    made = b"!<arch>\n"
    for name, part in parts:
        made += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode()
        made += part + b"\n" * (len(part) % 2)
    return made


@pytest.fixture
def link() -> Callable[..., tarfile.TarInfo]:
    """Makes a link for a package."""
    return _link


def _link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for the emulator."""
    monkeypatch.setenv("EDGEFORGE_ARM64", str(tmp_path / "arm64"))
    return tmp_path / "arm64"
