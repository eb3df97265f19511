"""The host as a device."""

from __future__ import annotations

import json

from device_harness.devices.host import HostDevice


def test_facts_and_condition_are_json():
    device = HostDevice()
    facts, condition = device.facts(), device.condition()
    assert facts.cores and facts.processor and not facts.emulated
    for each in (facts, condition):
        assert json.loads(json.dumps(each.as_json())) == each.as_json()
    assert condition.at > 1.7e9
