"""What tests of devices share: one small artifact, and a phone that is none."""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from device_harness.devices.android.phone import Phone
from device_harness.virtual_phone.commands import HostCommands
from device_harness.virtual_phone.phone import VirtualPhone
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from exporters.registry import find_target

Answer = subprocess.CompletedProcess[bytes]


@pytest.fixture(scope="session")
def workers() -> Callable[[], set[int]]:
    """Tells which processes of ExecuTorch this one has started and not yet ended, by number."""

    def workers() -> set[int]:
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                ours = f"PPid:\t{os.getpid()}\n" in (process / "status").read_text()
                if ours and b"executorch_worker" in (process / "cmdline").read_bytes():
                    found.add(int(process.name))
        return found

    return workers


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny Llama at int4 with a context of 64 tokens."""
    root = tmp_path_factory.mktemp("device harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        model = open_model(str(synthesise("tiny-llama", root / "checkpoint")))
        export(model, [find_target("onnx")], root / "artifact", ExportOptions("int4", context=64))
        yield root / "artifact"


def _free_port() -> int:
    """A port that nobody listens on, and that the system gives no connection as its own end.

    A client that connects to a port from which the system also takes the client's own reaches
    itself now and then, where no server listens yet, and reads what it wrote.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Answer]]:
    """The adb that adbutils carries, with a server, a port and a home of this test's own.

    The server is started by whoever needs it first, and ended with the test.
    """
    import adbutils

    port = str(_free_port())
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", port)
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    # Phones that are plugged in here are not for tests, and looking for them takes three seconds.
    for name in ("ADB_USB", "ADB_LIBUSB", "ADB_MDNS"):
        monkeypatch.setenv(name, "0")
    program = adbutils.adb_path()

    def run(*arguments: str, given: bytes = b"", seconds: float = 60) -> Answer:
        command = [program, "-P", port, *arguments]
        return subprocess.run(command, input=given, capture_output=True, timeout=seconds)

    yield run
    with socket.socket() as line:
        running = line.connect_ex(("127.0.0.1", int(port))) == 0
    if running:
        run("kill-server")


@pytest.fixture
def virtual_phone(adb: Callable[..., Answer], tmp_path: Path) -> Iterator[VirtualPhone]:
    """A virtual phone that runs this host's commands: nothing is emulated, and nothing set up."""
    with VirtualPhone(HostCommands(tmp_path / "phone")) as phone:
        yield phone


@pytest.fixture
def reached(virtual_phone: VirtualPhone) -> Phone:
    """The virtual phone as our client reaches it."""
    return Phone(virtual_phone.serial)
