"""What a phone says of itself is read, and nothing that it says is believed to be of any form.

The texts are written after those of real phones; no real phone wrote them.
"""

from __future__ import annotations

import random
import time

import pytest

from device_harness.devices.android import readings
from device_harness.devices.android.phone import Phone
from device_harness.devices.android.readings import read_condition, read_facts
from device_harness.devices.device import Condition
from device_harness.errors import DeviceError

BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: false
  Wireless powered: false
  Max charging current: 500000
  status: 3
  level: 43
  scale: 50
  voltage: 3890
  temperature: 301
  technology: Li-ion
"""
THERMAL = """IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 2
Thermal Status: 2
Cached temperatures:
\tTemperature{mValue=41.5, mType=3, mName=VIRTUAL-SKIN, mStatus=2}
\tTemperature{mValue=-5.0, mType=2, mName=battery, mStatus=0}
HAL Ready: true
"""


def test_a_virtual_phone_says_that_it_is_one(reached):
    facts = read_facts(reached)
    assert facts.name == reached.name and facts.kind == "android" and facts.emulated
    assert facts.model == "EdgeForge virtual phone" and facts.system == "Android 14"
    assert facts.more["virtual"] == "this is EdgeForge's virtual phone, not a real one"
    assert facts.memory_bytes and facts.memory_bytes > 1 << 28
    assert [core.name for core in facts.cores] == ["cpu0", "cpu1", "cpu2", "cpu3"]
    assert {core.max_hz for core in facts.cores} == {2_000_000_000}
    assert facts.as_json()["more"]["abi"] == "arm64-v8a" and "clock" not in facts.more


def test_its_condition(reached):
    condition = read_condition(reached)
    assert abs(condition.at - time.time()) < 10
    assert condition.battery_percent == 80 and condition.charging and condition.screen_on
    assert condition.thermal_status == 0 and condition.temperatures["battery"] == 27.5
    assert condition.temperatures["thermal_zone0 cpu-virtual"] == 31.0
    assert condition.governors["cpu3"] == "virtual" and condition.clocks["cpu0"] == 2_000_000_000
    assert condition.available_bytes and condition.available_bytes > 1 << 20


def test_throttling_is_reported(reached, virtual_phone):
    virtual_phone.set_fault("throttling", 4)
    condition = read_condition(reached)
    assert condition.thermal_status == 4 and condition.temperatures["skin-virtual"] == 47.5
    assert set(condition.clock_limits.values()) == {1_000_000_000}


def test_a_clock_that_is_wrong_is_recorded_and_not_used(reached, virtual_phone):
    virtual_phone.set_fault("clock-skew", 86_400)
    more = read_facts(reached).more
    assert more["clock"].startswith("+86") and more["clock"].endswith("which alone is used")
    assert abs(read_condition(reached).at - time.time()) < 10


def answered(monkeypatch, reached, **parts):
    """Lets the phone answer with these parts."""
    monkeypatch.setattr(readings, "_ask", lambda *_: parts)
    return read_condition(reached)


def test_what_real_phones_print_is_read(monkeypatch, reached):
    condition = answered(
        monkeypatch,
        reached,
        battery=BATTERY,
        thermal=THERMAL,
        screen="  mWakefulness=Asleep\nDisplay Power: state=OFF\n",
        cores="cpu7 scaling_governor walt\ncpu7 scaling_cur_freq 2841600\n",
        zones="thermal_zone3 43700 cpu-1-0\nthermal_zone9 38 pm8150b tz\n",
        meminfo="MemTotal:       11620464 kB\nMemAvailable:    5120000 kB\n",
    )
    assert (condition.battery_percent, condition.charging) == (86, False)
    assert condition.temperatures == {
        "battery": 30.1,
        "VIRTUAL-SKIN": 41.5,
        "thermal_zone3 cpu-1-0": 43.7,
        "thermal_zone9 pm8150b tz": 38.0,
    } | {"battery": -5.0}
    assert condition.thermal_status == 2 and condition.screen_on is False
    assert condition.governors == {"cpu7": "walt"} and condition.clocks == {"cpu7": 2_841_600_000}
    assert condition.available_bytes == 5_120_000 * 1024


def test_what_is_not_said_is_none(monkeypatch, reached):
    condition = answered(monkeypatch, reached)
    assert condition == Condition(at=condition.at)


@pytest.mark.parametrize(
    "parts",
    [
        {"battery": "  level: 99999999999999999999\n  scale: 0\n  temperature: 99999\n"},
        {"thermal": "Thermal Status: 9\nmValue=1e999, mType=3, mName=x\n"},
        {"thermal": "mValue=nan, mType=1, mName=x, mStatus=0"},
        {"cores": "cpu0 scaling_cur_freq -5\ncpu1 scaling_max_freq 9999999999999999999\n"},
        {"zones": "thermal_zone1 99999999 hot\nthermal_zone2 x y\n"},
        {"meminfo": "MemAvailable: 99999999999999999999 kB\n"},
    ],
)
def test_numbers_that_cannot_be_are_left_out(monkeypatch, reached, parts):
    condition = answered(monkeypatch, reached, **parts)
    assert condition == Condition(at=condition.at)


def test_a_flood_of_zones_and_cores_is_bounded(monkeypatch, reached):
    condition = answered(
        monkeypatch,
        reached,
        thermal="".join(f"mValue=1.0, mType=3, mName=n{at}, mStatus=0\n" for at in range(5000)),
        zones="".join(f"thermal_zone{at} 30000 z\n" for at in range(5000)),
        cores="".join(f"cpu{at} scaling_governor g\n" for at in range(999)),
    )
    assert len(condition.temperatures) <= 200 and len(condition.governors) <= 64


def test_noise_is_one_sentence_in_time(reached, virtual_phone):
    virtual_phone.set_fault("garbage", 1)
    with pytest.raises(DeviceError) as caught:
        read_condition(reached)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("seed", range(5))
def test_no_text_makes_the_readers_fail_or_slow(monkeypatch, reached, seed):
    chosen = random.Random(seed)
    words = ["mValue=", "1.5, mType=3", ", mName=", "level: ", "9" * 30, "\n", " ", "cpu", "}", "{"]
    text = "".join(chosen.choice(words) for _ in range(100_000))
    started = time.monotonic()
    answered(monkeypatch, reached, battery=text, thermal=text, screen=text, cores=text, zones=text)
    assert time.monotonic() - started < 20


def test_a_phone_that_has_no_model_is_refused(reached, tmp_path):
    getprop = tmp_path / "phone/system/bin/getprop"
    getprop.write_text("#!/bin/sh\necho\n")
    with pytest.raises(DeviceError, match="does not say what model it is"):
        read_facts(reached)


def test_names_of_a_phone_cannot_draw_on_a_terminal(reached, tmp_path):
    getprop = tmp_path / "phone/system/bin/getprop"
    getprop.write_text("#!/bin/sh\nprintf 'Pix\\033[31mel\\033]0;x\\007\\r%0300d\\n' 0\n")
    facts = read_facts(reached)
    assert facts.model.isprintable() and len(facts.model) < 150


def test_the_mark_between_parts_cannot_be_guessed(reached: Phone, tmp_path):
    getprop = tmp_path / "phone/system/bin/getprop"
    getprop.write_text("#!/bin/sh\necho 'edgeforge-0000000000000000 end'; echo model\n")
    assert read_facts(reached).model == "model"
