"""A Mac as a device, here and with a fake of its tools; see FAKE.md."""

import json

import pytest

from device_harness.devices.apple.mac import MacDevice, find_mac
from device_harness.errors import DeviceError


def test_here_it_says_what_to_do():
    (found,) = find_mac()
    assert not found.ready and found.what == "this machine is no Mac (Linux)"
    with pytest.raises(DeviceError, match=r"docs/devices/apple\.md on a Mac"):
        MacDevice()
    with pytest.raises(DeviceError, match="there is one Mac, and no mac:m1"):
        MacDevice("m1")


def test_what_a_macs_own_tools_say(fake_mac, tmp_path):
    sysctl, pmset = tmp_path / "tools" / "sysctl", tmp_path / "tools" / "pmset"
    sysctl.write_text(
        "#!/bin/sh\n"
        'case "$2" in\n'
        "hw.model) echo Mac16,1;; machdep.cpu.brand_string) echo 'Fake M4';;\n"
        "hw.memsize) echo 17179869184;; hw.perflevel0.name) echo Performance;;\n"
        "hw.perflevel0.physicalcpu) echo 4;; *) exit 1;;\n"
        "esac\n"
    )
    pmset.write_text(
        "#!/bin/sh\necho \"Now drawing from 'AC Power'\"\necho ' -Fake 87%; charged'\n"
    )
    for tool in (sysctl, pmset):
        tool.chmod(0o755)
    with MacDevice() as device:
        facts, condition = device.facts(), device.condition()
    assert (facts.model, facts.processor, facts.memory_bytes) == ("Mac16,1", "Fake M4", 17179869184)
    assert [core.name for core in facts.cores] == [f"performance{at}" for at in range(4)]
    assert (condition.battery_percent, condition.charging) == (87, True)
    assert json.loads(json.dumps(facts.as_json())) == facts.as_json()
    assert device.limits and find_mac()[0].ready


def test_tools_that_are_missing_or_fail_leave_facts_out(fake_mac, tmp_path, monkeypatch):
    for name in ("sysctl", "pmset"):
        (tmp_path / "tools" / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "tools" / name).chmod(0o755)
    with MacDevice() as device:
        facts, condition = device.facts(), device.condition()
    assert facts.processor == "not known" and facts.cores == () and facts.memory_bytes is None
    assert condition.battery_percent is None and condition.charging is None
