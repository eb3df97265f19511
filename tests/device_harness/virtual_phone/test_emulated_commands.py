"""The phone's commands run on an emulated arm64 core, apart from this host, and end with it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from device_harness.devices.android.phone import Phone
from device_harness.devices.android.readings import read_facts
from device_harness.errors import SetupError
from device_harness.virtual_phone import emulated_commands
from device_harness.virtual_phone.emulated_commands import SHELL, EmulatedCommands
from device_harness.virtual_phone.phone import VirtualPhone

CORE = "cortex-a710"


@pytest.fixture
def emulated(arm64_root, adb, tmp_path):
    commands = EmulatedCommands(arm64_root, tmp_path / "phone", CORE)
    phone = VirtualPhone(commands, shell=SHELL, chip=commands.chip)
    try:
        with phone:
            yield Phone(phone.serial)
    finally:
        commands.close()


def processes_of(root):
    """The processes of this host that know a phone's root folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(root) in place.read_bytes() and place.parent.name != str(os.getpid()):
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_programs_and_what_they_start_are_arm64_and_see_the_phone_alone(emulated, tmp_path):
    (tmp_path / "only_here").touch()
    line = 'uname -m; sh -c "uname -m"; ls /; ls "$1"; cat /proc/cpuinfo; ps -A -o PID,ARGS'
    said = emulated.run(line, str(tmp_path)).output.decode()
    assert said.startswith("aarch64\naarch64\n") and "0xd47" in said and "i8mm" in said
    assert "only_here" not in said and "python" not in said
    assert "data" in said.split() and "home" not in said.split()
    facts = read_facts(emulated)
    assert facts.processor == f"{CORE} (emulated by qemu)" and facts.emulated
    assert facts.more["virtual"] == "this is EdgeForge's virtual phone, not a real one"


def test_a_digest_there_is_right(emulated):
    emulated.send([b"abc"], "/data/local/tmp/x")
    for program in ("sha256sum", "/usr/bin/sha256sum"):  # this host's, and the phone's own
        said = emulated.run('"$1" /data/local/tmp/x', program).output.decode()
        assert said.startswith("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


def test_nothing_is_left_when_the_phone_ends(arm64_root, adb, tmp_path):
    folder = tmp_path / "phone"
    commands = EmulatedCommands(arm64_root, folder, CORE)
    with VirtualPhone(commands, shell=SHELL, chip=commands.chip) as phone:
        Phone(phone.serial).open("sleep 300 & sleep 301")
        until(lambda: len(processes_of(folder)) > 1)
    until(lambda: not processes_of(folder))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_its_process_is_ended(arm64_root, adb, number, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "device_harness.virtual_phone", "--port", "0", "--keys"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        words = process.stdout.readline()
        serial = words.rsplit(" ", 1)[-1].strip()
        phone = Phone(serial)
        assert phone.run("uname -m").output == b"aarch64\n"
        (keeper,) = [pid for pid in emulated_commands.children_of(process.pid) if is_keeper(pid)]
        phone.open("sleep 300")
        process.send_signal(number)
        assert process.wait(20) in (143, -number)
    finally:
        process.kill()
        process.communicate()
    until(lambda: not Path(f"/proc/{keeper}").exists())
    # A process that is killed can remove no folder; one that is asked to end does.
    assert bool(list(tmp_path.glob("edgeforge-phone-*"))) == (number == signal.SIGKILL)


def test_a_signal_that_another_thread_gets_ends_it_too(arm64_root, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "device_harness.virtual_phone", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline()
        threads = sorted(int(each.name) for each in Path(f"/proc/{process.pid}/task").iterdir())
        to_thread = ctypes.CDLL(None).syscall
        assert to_thread(234, process.pid, threads[-1], int(signal.SIGTERM)) == 0  # tgkill, x86-64
        assert process.wait(20) == 143
    finally:
        process.kill()
        process.communicate()


def is_keeper(pid):
    try:
        return b"unshare" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_kernel_that_does_not_allow_it_is_one_sentence(arm64_root, tmp_path, monkeypatch):
    monkeypatch.setattr(
        emulated_commands, "_KEEPER", "echo 'mount: binfmt_misc: permission denied'; exit 1"
    )
    with pytest.raises(SetupError) as caught:
        EmulatedCommands(arm64_root, tmp_path, CORE)
    assert str(caught.value) == (
        "the virtual phone needs user namespaces with a binfmt_misc of their own (Linux 6.7 or "
        "later), which this machine does not allow (mount: binfmt_misc: permission denied): use "
        "another one"
    )


def test_a_machine_without_util_linux_is_one_sentence(arm64_root, tmp_path, monkeypatch):
    monkeypatch.setattr(emulated_commands.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SetupError, match="unshare is missing on this machine: install util-linux"):
        EmulatedCommands(arm64_root, tmp_path, CORE)
