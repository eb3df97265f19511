"""What devicectl answers, by a fake of it; see FAKE.md."""

import json
from pathlib import Path

import pytest

from device_harness.devices.apple import devicectl
from device_harness.devices.apple.devicectl import choose_phone, find_ios, list_phones, read_phones
from device_harness.devices.apple.report import main
from device_harness.errors import DeviceError

LISTED = json.loads((Path(__file__).parent / "fake_devicectl_list.json").read_text())
UDID, LOCKED = "00008130-FA4E000000000001", "00008110-FA4E000000000002"


def changed(**hardware):
    rows = json.loads(json.dumps(LISTED))
    rows["result"]["devices"][0]["hardwareProperties"].update(hardware)
    return json.dumps(rows).encode()


def test_without_a_mac_it_says_what_to_do():
    (found,) = find_ios()
    assert not found.ready and found.name == "ios"
    assert "from a Mac with Xcode" in found.what and "docs/devices/apple.md" in found.cure
    with pytest.raises(DeviceError, match="connect it to a Mac and run the commands of"):
        choose_phone("")


def test_phones_are_listed_and_watches_are_not(fake_mac):
    first, second = list_phones()
    assert (first.udid, first.model, first.ios, first.problem) == (
        UDID,
        "iPhone 15 Pro",
        "18.1",
        None,
    )
    assert second.model == "iPhone14,2"
    assert second.problem is not None and "tunnel is unavailable" in second.problem[0]
    words = json.loads((fake_mac / "commands").read_text().splitlines()[0])
    assert words[:3] == ["devicectl", "list", "devices"]


def test_what_is_reachable_is_told_with_a_cure(fake_mac):
    ready, locked = find_ios()
    assert (ready.name, ready.ready, ready.what) == (f"ios:{UDID}", True, "iPhone 15 Pro, iOS 18.1")
    assert not locked.ready and "unlock it" in locked.cure


def test_the_only_one_that_is_ready_is_chosen(fake_mac):
    assert choose_phone("").udid == choose_phone(UDID).udid == UDID
    with pytest.raises(DeviceError, match=f"ios:{LOCKED}: its tunnel is unavailable: connect it"):
        choose_phone(LOCKED)
    with pytest.raises(DeviceError, match=r"there is no iPhone '; rm -rf ' here; there are"):
        choose_phone("; rm -rf ")


def test_of_two_that_are_ready_one_must_be_named(fake_mac, monkeypatch):
    phones = list_phones()
    monkeypatch.setattr(devicectl, "list_phones", lambda *_: [phones[0], phones[0]])
    with pytest.raises(DeviceError, match="there are 2 iPhones: name one of ios:"):
        choose_phone("")
    monkeypatch.setattr(devicectl, "list_phones", lambda *_: [])
    with pytest.raises(DeviceError, match="no iPhone is paired"):
        choose_phone("")
    assert "no iPhone is paired" in find_ios()[0].what


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ({"osVersionNumber": "16.7"}, "iOS 16.7"),
        ({"osVersionNumber": ""}, "iOS of no known version"),
        ({"developerModeStatus": "disabled"}, "developer mode is off"),
    ],
)
def test_what_a_phone_lacks_is_told(device, words):
    rows = json.loads(json.dumps(LISTED))
    rows["result"]["devices"][0]["deviceProperties"].update(device)
    phone = read_phones(json.dumps(rows).encode())[0]
    assert phone.problem is not None and phone.problem[0] == words and phone.problem[1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"{}",
        b'{"result": {"devices": {}}}',
        b'{"result": {"devices": [1]}}',
        changed(udid="$(touch /tmp/x)"),
        changed(udid="a b"),
        changed(udid=""),
        changed(udid=7),
        b"[" * 100_000,
    ],
)
def test_a_hostile_answer_is_one_sentence(content):
    with pytest.raises(DeviceError) as caught:
        read_phones(content)
    assert str(caught.value).isprintable()


def test_texts_of_a_device_command_no_terminal():
    rows = json.loads(json.dumps(LISTED))
    rows["result"]["devices"][0]["deviceProperties"]["name"] = "\x1b[2J\n" + "x" * 10_000
    phone = read_phones(json.dumps(rows).encode())[0]
    assert phone.title.isprintable() and len(phone.title) <= 300


def test_a_tool_that_fails_hangs_or_is_missing_is_told(fake_mac, tmp_path, monkeypatch):
    tool = tmp_path / "tools" / "xcrun"
    tool.write_text("#!/bin/sh\necho first >&2\nprintf 'no \\033[2Jaccess\\n\\n' >&2\nexit 72\n")
    with pytest.raises(DeviceError, match=r"devicectl failed \(exit code 72\): no  \[2Jaccess"):
        list_phones()
    tool.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(DeviceError, match="devicectl wrote no answer"):
        list_phones()
    tool.write_text("#!/bin/sh\nexec sleep 5\n")
    monkeypatch.setattr(devicectl, "_LOOK_SECONDS", 0.2)
    (found,) = find_ios()
    assert "did not answer within 0.2 s" in found.what and found.cure
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_ios()[0].what == "xcrun is not installed"
    with pytest.raises(DeviceError, match="xcrun is not installed"):
        list_phones()


def test_a_report_without_a_mac_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^edgeforge: an iPhone is reached from a Mac with Xcode"):
        main([str(tmp_path)])
    assert capsys.readouterr().out == ""
