"""The virtual phone speaks adb's protocol, as the unmodified client of adbutils understands it."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from device_harness.virtual_phone.commands import HostCommands, place_of
from device_harness.virtual_phone.phone import FEATURES, VirtualPhone

HOME = "/data/local/tmp"
ODD = "a b$(touch x);'\"é"


def connected(adb, phone):
    """The arguments that name a phone, once adb knows it."""
    for _ in range(40):
        adb("connect", phone.serial)
        if adb("-s", phone.serial, "get-state").stdout == b"device\n":
            return "-s", phone.serial
        time.sleep(0.1)
    raise AssertionError(adb("devices", "-l").stdout)


# Phones of Android 6 and before have neither of the second versions.
@pytest.fixture(params=[FEATURES, "cmd"], ids=["second versions", "first versions"])
def either(request, adb, tmp_path):
    with VirtualPhone(HostCommands(tmp_path / "phone"), features=request.param) as phone:
        yield phone, connected(adb, phone)


def test_files_and_folders_come_back_as_they_went(adb, either, tmp_path):
    _, phone = either
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/b/large").write_bytes(os.urandom(3_000_001))
    (tree / "a/empty").touch()
    (tree / "sp ace é").write_bytes(b"1")
    assert adb(*phone, "push", str(tree), HOME).returncode == 0
    assert adb(*phone, "pull", f"{HOME}/tree", str(tmp_path / "back")).returncode == 0
    for path in tree.rglob("*"):
        back = tmp_path / "back" / path.relative_to(tree)
        assert back.is_dir() if path.is_dir() else back.read_bytes() == path.read_bytes()
    assert sorted(adb(*phone, "ls", HOME).stdout.split()[-1:]) == [b"tree"]


def test_a_file_that_is_not_there_is_refused(adb, either, tmp_path):
    _, phone = either
    failed = adb(*phone, "pull", f"{HOME}/none", str(tmp_path))
    assert failed.returncode == 1 and f"{HOME}/none".encode() in failed.stderr
    assert not list(tmp_path.glob("none*"))


def test_binary_output_is_not_changed(adb, either):
    _, phone = either
    bytes_ = adb(*phone, "exec-out", r"printf 'a\r\nb\000\377'").stdout
    assert bytes_ == b"a\r\nb\0\xff"


def test_the_shell_takes_input_and_gives_errors_and_exit_codes_apart(adb, virtual_phone):
    phone = connected(adb, virtual_phone)
    done = adb(*phone, "shell", "cat; echo no >&2; exit 7", given=b"one\ntwo")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"one\ntwo", b"no\n")
    assert adb(*phone, "shell", "kill -9 $$").returncode == 128 + signal.SIGKILL


def test_a_first_version_of_the_shell_merges_its_errors(adb, tmp_path):
    with VirtualPhone(HostCommands(tmp_path / "phone"), features="cmd") as phone:
        done = adb(*connected(adb, phone), "shell", "echo a; echo b >&2")
    assert sorted(done.stdout.split()) == [b"a", b"b"]


def test_large_streams_pass_in_both_directions(adb, virtual_phone):
    phone = connected(adb, virtual_phone)
    given = os.urandom(4_000_000)
    assert adb(*phone, "exec-in", "cat > large", given=given).returncode == 0
    assert adb(*phone, "exec-out", "cat large").stdout == given


def test_a_service_that_it_lacks_is_closed(adb, virtual_phone):
    phone = connected(adb, virtual_phone)
    assert adb(*phone, "reboot").returncode != 0
    assert adb(*phone, "shell", "echo still there").stdout == b"still there\n"


def test_a_key_is_asked_for_and_then_trusted(adb, tmp_path):
    with VirtualPhone(HostCommands(tmp_path / "phone"), asks_for_keys=True) as phone:
        chosen = connected(adb, phone)
        assert adb(*chosen, "shell", "echo hello").stdout == b"hello\n"
        adb("disconnect", phone.serial)
        assert b"connected to" in adb("connect", phone.serial).stdout  # now by the signature


@pytest.mark.parametrize("what", ["unauthorized", "offline"])
def test_adb_itself_says_in_what_state_the_phone_is(adb, virtual_phone, what):
    virtual_phone.set_fault(what)
    adb("start-server")
    with subprocess.Popen(
        [*adb("version").args[:-1], "connect", virtual_phone.serial], stdout=subprocess.DEVNULL
    ) as connecting:
        for _ in range(60):
            said = adb("devices").stdout.decode()
            if f"{virtual_phone.serial}\t{what}" in said:
                break
            time.sleep(0.1)
        connecting.kill()
    assert f"{virtual_phone.serial}\t{what}" in said


def test_a_command_whose_client_left_runs_on_as_on_a_phone_until_its_input_ends(
    adb, virtual_phone, tmp_path
):
    phone = connected(adb, virtual_phone)
    line = f"sleep 300 & echo $! > {HOME}/pid; cat; touch {HOME}/ended"
    with subprocess.Popen(
        [*adb("version").args[:-1], *phone, "shell", line], stdin=subprocess.PIPE
    ) as client:
        home = tmp_path / f"phone{HOME}"
        until(lambda: (home / "pid").exists() and (home / "pid").read_text().strip())
        client.kill()
    until(lambda: (home / "ended").exists())
    pid = int((home / "pid").read_text())
    assert Path(f"/proc/{pid}").exists()
    virtual_phone.stop()
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_phone_that_ends_leaves_no_command_behind(adb, tmp_path):
    with VirtualPhone(HostCommands(tmp_path / "phone")) as phone:
        chosen = connected(adb, phone)
        line = f"sleep 300 & echo $! > {HOME}/pid; wait"
        client = subprocess.Popen([*adb("version").args[:-1], *chosen, "shell", line])
        file = tmp_path / f"phone{HOME}/pid"
        until(lambda: file.exists() and file.read_text().strip())
        pid = int(file.read_text())
    client.wait(20)
    until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n" + bytes(100),
        struct.pack("<6I", 0x4E584E43, 1, 1, 0xFFFFFFFF, 0, 0x4E584E43 ^ 0xFFFFFFFF),
        struct.pack("<6I", 0x4E45504F, 1, 0, 0, 0, 0x4E45504F ^ 0xFFFFFFFF),
        os.urandom(5000),
    ],
    ids=["another protocol", "a length of 4 GiB", "opens before it is trusted", "noise"],
)
def test_what_is_no_adb_is_hung_up_on(virtual_phone, sent, tmp_path):
    with VirtualPhone(HostCommands(tmp_path / "asks"), asks_for_keys=True) as phone:
        with socket.create_connection(("127.0.0.1", phone.port), 5) as line:
            line.sendall(sent)
            line.settimeout(5)
            with suppress(ConnectionResetError):
                assert line.recv(1) == b""
        with socket.create_connection(("127.0.0.1", phone.port), 5):
            pass  # it goes on listening


def test_links_lead_nowhere_outside_the_phone(adb, virtual_phone, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    home = tmp_path / f"phone{HOME}"
    (home / "up").symlink_to("../" * 20 + str(secret).lstrip("/"))
    (home / "absolute").symlink_to(secret)
    (home / "circle").symlink_to("circle")
    phone = connected(adb, virtual_phone)
    for name in ("up", "absolute", "circle", "../../../../../secret"):
        assert adb(*phone, "pull", f"{HOME}/{name}", str(tmp_path / "out")).returncode == 1
    assert not (tmp_path / "out").exists()
    assert place_of(tmp_path, "/../../x") == tmp_path / "x"


def test_a_push_that_is_cut_leaves_no_half_file(adb, virtual_phone, tmp_path):
    phone = connected(adb, virtual_phone)
    (tmp_path / "large").write_bytes(bytes(2_000_000))
    virtual_phone.set_fault("cut", 500_000)
    assert adb(*phone, "push", str(tmp_path / "large"), f"{HOME}/x").returncode != 0
    until(lambda: not list((tmp_path / f"phone{HOME}").iterdir()))
    phone = connected(adb, virtual_phone)
    assert adb(*phone, "push", str(tmp_path / "large"), f"{HOME}/x").returncode == 0


def test_a_folder_whose_name_means_something_to_a_shell_is_refused(tmp_path):
    with pytest.raises(ValueError, match="means something to a shell"):
        HostCommands(tmp_path / ODD)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fault", "flood"], "there is no fault 'flood'"),
        (["--fault", "cut=much"], "needs a whole number"),
        (["--core", "cortex-a1"], "invalid choice"),
    ],
)
def test_the_command_line_refuses_what_it_does_not_know(arguments, words):
    command = [sys.executable, "-m", "device_harness.virtual_phone", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def until(true, seconds=10):
    """Waits for what takes a moment."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
