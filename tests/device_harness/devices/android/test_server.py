"""What is said of phones that adb knows, and of an adb that is not there."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from device_harness.devices.android.phone import Phone
from device_harness.devices.android.server import find_android, listed_phones, server_port
from device_harness.devices.registry import open_device
from device_harness.errors import DeviceError
from device_harness.virtual_phone.commands import HostCommands
from device_harness.virtual_phone.phone import VirtualPhone


def refusal(name):
    with pytest.raises(DeviceError) as caught:
        open_device(name)
    words = str(caught.value)
    assert words.isprintable()
    return words


def test_what_is_found_without_a_server_starts_none(adb):
    (found,) = find_android()
    assert not found.ready and "no adb server runs on port" in found.what
    with socket.socket() as line:
        assert line.connect_ex(("127.0.0.1", server_port())) != 0


def test_a_phone_is_found_once_adb_knows_it(adb, virtual_phone):
    assert listed_phones(server_port()) is None
    adb("start-server")
    (none,) = find_android()
    assert not none.ready and none.what == "adb knows no phone" and "USB debugging" in none.cure
    adb("connect", virtual_phone.serial)
    (found,) = find_android()
    assert found.ready and found.name == f"android:{virtual_phone.serial}"
    assert found.what == "EdgeForge virtual phone"


def test_of_two_phones_one_must_be_named(adb, virtual_phone, tmp_path, monkeypatch):
    with VirtualPhone(HostCommands(tmp_path / "second")) as second:
        adb("connect", virtual_phone.serial)
        adb("connect", second.serial)
        assert {each.name for each in find_android()} == {
            f"android:{virtual_phone.serial}",
            f"android:{second.serial}",
        }
        words = refusal("android")
        assert words.startswith("adb knows 2 phones: say which one, of ")
        assert f"android:{second.serial}" in words
        assert Phone(second.serial).run("echo ok").output == b"ok\n"
        monkeypatch.setenv("ANDROID_SERIAL", second.serial)  # as adb itself takes it
        assert Phone().serial == second.serial
        assert Phone(virtual_phone.serial).serial == virtual_phone.serial


@pytest.mark.parametrize(
    ("what", "cure"), [("unauthorized", "Allow USB debugging"), ("offline", "plug it in again")]
)
def test_a_phone_that_cannot_be_used_says_why_and_what_to_do(adb, virtual_phone, what, cure):
    virtual_phone.set_fault(what)
    adb("start-server")
    command = [*adb("version").args[:-1], "connect", virtual_phone.serial]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as connecting:
        for _ in range(100):
            found = find_android()
            if what in found[0].what:
                break
            time.sleep(0.1)
        connecting.kill()
    assert not found[0].ready and found[0].what == f"adb says: {what}" and cure in found[0].cure
    assert refusal(f"android:{virtual_phone.serial}") == (
        f"android:{virtual_phone.serial} is {what}, says adb: "
        f"{found[0].cure[0].lower()}{found[0].cure[1:-1]}"
    )


def test_a_phone_that_adb_does_not_know(adb):
    words = refusal("android:R58M12")
    assert words.startswith(
        "adb knows no phone R58M12; adb knows no phone: switch USB debugging on"
    )
    assert refusal("android").startswith("adb knows no phone: switch USB debugging on")


@pytest.mark.parametrize(
    "serial", ["$(touch x)", "a;touch x", "a b", "`x`", "-s", "é", "a\x1b[31mb", "a" * 129, "a|b"]
)
def test_a_serial_with_characters_of_a_shell_is_refused(adb, serial, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = refusal(f"android:{serial}")
    assert "is no serial number of a phone" in words or "there is no device" in words
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


def test_without_adbutils(adb, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (found,) = find_android()
    assert not found.ready and "pip install 'edgeforge[android]'" in found.cure
    assert refusal("android") == (
        "android needs the package adbutils: pip install 'edgeforge[android]'"
    )


def test_an_adb_that_cannot_be_started(adb, monkeypatch):
    monkeypatch.setenv("ADBUTILS_ADB_PATH", "/nonexistent/adb")
    assert refusal("android") == "/nonexistent/adb cannot be started: No such file or directory"


def test_an_adb_that_fails(adb, monkeypatch, tmp_path):
    program = tmp_path / "adb"
    program.write_text("#!/bin/sh\necho 'it \033[31mfails' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("ADBUTILS_ADB_PATH", str(program))
    assert refusal("android") == f"{program} start-server failed: it fails"


@pytest.mark.parametrize("given", ["x", "0", "65536", "-1", "٣"])
def test_a_port_that_is_none(adb, monkeypatch, given):
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", given)
    assert "is no port: unset it" in refusal("android")
    assert not find_android()[0].ready


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad\r\n", b"OKAYffff" + bytes(10), b"OKAYzzzz", b"", None]
)
def test_what_answers_and_is_no_adb(adb, monkeypatch, answer):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.getsockname()[1]))

        def serve():
            line, _ = server.accept()
            with line:
                line.recv(100)
                if answer is None:  # says nothing at all
                    line.recv(1)
                else:
                    line.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        started = time.monotonic()
        (found,) = find_android()
        thread.join()
        assert time.monotonic() - started < 20
    assert not found.ready and "does not answer as an adb server" in found.what


def found_in(listing, monkeypatch):
    """What is found where adb's server gives this list of phones."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.getsockname()[1]))

        def serve():
            line, _ = server.accept()
            with line:
                line.recv(100)
                line.sendall(b"OKAY%04x" % len(listing) + listing)

        thread = threading.Thread(target=serve)
        thread.start()
        found = find_android()
        thread.join()
    return found


def test_a_hostile_list_of_phones_names_none(adb, monkeypatch):
    listing = b"\x1b]0;x\x07bad;serial device\n\n\x00\xff\nok device model:A\x1b[31m_B\n" * 20
    found = found_in(listing, monkeypatch)
    assert {(each.name, each.what) for each in found} == {("android:ok", "A B")}


def test_every_other_state_has_a_cure(adb, monkeypatch):
    listing = (
        b"R1\tno permissions (user in plugdev group; are your udev rules wrong?) usb:1-1\n"
        b"R2\trecovery usb:1-2\nR3\tauthorizing\nR4\tconnecting\nR5\thost\n"
    )
    found = found_in(listing, monkeypatch)
    assert [each.name for each in found] == [f"android:R{at}" for at in range(1, 6)]
    assert found[0].what == "adb says: no permissions" and "udev" in found[0].cure
    assert not any(each.ready for each in found) and all(each.cure for each in found)


def test_nothing_of_the_users_home_is_used(adb, virtual_phone):
    Phone(virtual_phone.serial)
    assert (Path(os.environ["HOME"]) / ".android/adbkey").exists()
