"""Commands and files over adb: quoted, bounded, and each failure one sentence."""

from __future__ import annotations

import time

import pytest

from device_harness.devices.android.device_text import clean, one_line
from device_harness.devices.android.phone import Phone, PhoneGoneError, PhoneHangsError
from device_harness.errors import DeviceError
from device_harness.virtual_phone.commands import HostCommands
from device_harness.virtual_phone.phone import VirtualPhone

HOME = "/data/local/tmp"
ODD = ["$(touch x)", "a b", "'", '"', ";touch x", "`touch x`", "\n", "*", "~", "-n", "é", "\\"]


def test_what_varies_is_never_read_by_the_shell(reached, tmp_path):
    done = reached.run('for each; do printf "%s\\0" "$each"; done', *ODD)
    assert done.output.decode().split("\0")[:-1] == ODD
    assert not list(tmp_path.rglob("x"))


def test_exit_codes_and_errors_come_apart(reached):
    done = reached.run("echo out; echo no >&2; exit 9")
    assert (done.code, done.output, done.errors) == (9, b"out\n", b"no\n")


def test_a_file_goes_and_comes_back(reached, tmp_path):
    content = bytes(range(256)) * 4000
    reached.send([content[:70_000], content[70_000:]], f"{HOME}/{ODD[0]}", 0o755)
    assert reached.receive(f"{HOME}/{ODD[0]}", len(content)) == content
    assert reached.sent == len(content)
    assert (tmp_path / f"phone{HOME}/{ODD[0]}").stat().st_mode & 0o777 == 0o755
    with pytest.raises(DeviceError, match="gives more for"):
        reached.receive(f"{HOME}/{ODD[0]}", len(content) - 1)
    with pytest.raises(DeviceError, match="does not give /data/local/tmp/none: No such file"):
        reached.receive(f"{HOME}/none", 10)


def test_a_full_disk_is_said_at_once_and_leaves_nothing(reached, virtual_phone, tmp_path):
    virtual_phone.set_fault("disk-full", 100_000)
    with pytest.raises(DeviceError) as caught:
        reached.send([bytes(1_000_000)], f"{HOME}/x")
    assert str(caught.value) == (
        f"the disk of {reached.name} is full: free some space on it, and run it again"
    )
    assert not list((tmp_path / f"phone{HOME}").iterdir())
    virtual_phone.clear_faults()
    reached.send([bytes(1_000_000)], f"{HOME}/x")


def test_a_shell_that_hangs_is_left_in_time(reached, virtual_phone):
    virtual_phone.set_fault("hung-shell")
    started = time.monotonic()
    with pytest.raises(PhoneHangsError) as caught:
        reached.run("echo", seconds=0.5, what="saying hello")
    assert time.monotonic() - started < 20
    assert str(caught.value).startswith(f"{reached.name} does not answer in saying hello: ")
    virtual_phone.clear_faults()
    assert reached.run("echo ok").output == b"ok\n"


def test_output_without_end_is_left(reached, virtual_phone):
    virtual_phone.set_fault("garbage", 100 << 20)
    with pytest.raises(DeviceError, match="prints more than 1048576 bytes in a command"):
        reached.run("echo")


def test_a_command_that_says_no_exit_code_is_a_lost_phone(reached, virtual_phone):
    virtual_phone.set_fault("forgets-exit")
    with pytest.raises(PhoneGoneError, match="the line ended during a command"):
        reached.run("echo")


def test_an_unplugged_phone_is_lost_and_found_again(reached, virtual_phone):
    virtual_phone.set_fault("unplugged", 0)
    with pytest.raises(PhoneGoneError) as caught:
        reached.run("echo")
    assert str(caught.value).isprintable() and "plug it in again" in str(caught.value)
    assert not reached.wait_until_back(0.5)
    virtual_phone.clear_faults()
    assert reached.wait_until_back(20)
    assert reached.run("echo ok").output == b"ok\n"


def test_an_android_without_exit_codes_is_refused(adb, tmp_path):
    with VirtualPhone(HostCommands(tmp_path / "old"), features="cmd") as phone:
        reached = Phone(phone.serial)
        with pytest.raises(DeviceError, match="runs an Android older than 7"):
            reached.require_shell()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"\x1b[2J\x1b[31mred\x1b[0m", "red"),
        (b"\x1b]0;title\x07text", "text"),
        (b"\x1b]8;;http://x\x1b\\link", "link"),
        (b"a\x00b\x07c\x7f", "abc"),
        ("\u202eright to left\u200b", "right to left"),
        (b"\x9b31mc1", "\ufffd31mc1"),
        (b"\x1b[" + b"1;" * 100_000, "1;" * 100_000),
    ],
)
def test_text_of_a_device_does_nothing_to_a_terminal(given, words):
    started = time.monotonic()
    assert clean(given) == words
    assert time.monotonic() - started < 20


def test_a_line_is_cut():
    assert one_line("x" * 1000) == "x" * 197 + "..." and one_line(b"\n\n") == ""
