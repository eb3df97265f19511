"""Reads what a phone says of itself; nothing that it says is trusted to be of any form or size."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from device_harness.devices.android.device_text import clean, one_line
from device_harness.devices.android.phone import Phone
from device_harness.devices.device import Condition, Core, Facts
from device_harness.errors import DeviceError

_T = TypeVar("_T")
_VIRTUAL: Final = "ro.edgeforge.virtual"
_EMULATOR: Final = ("ro.boot.qemu", "ro.kernel.qemu")
_MOST_ZONES: Final = 64
_MOST_CORES: Final = 64
_LONGEST_NAME: Final = 60
_HIGHEST_HZ: Final = 20_000_000_000
_MOST_MEMORY: Final = 1 << 50
_SKEW: Final = 5.0
# $1 is a word that no command prints by itself; it stands in front of each part.
_FACTS: Final = """
for name in ro.product.manufacturer ro.product.model ro.soc.manufacturer ro.soc.model \
  ro.board.platform ro.build.version.release ro.build.version.sdk ro.product.cpu.abi \
  ro.boot.qemu ro.kernel.qemu ro.edgeforge.virtual; do
  echo "$1 $name"; getprop "$name"
done
echo "$1 kernel"; uname -r
echo "$1 machine"; uname -m
echo "$1 clock"; date +%s
echo "$1 meminfo"; cat /proc/meminfo
echo "$1 cores"
for core in /sys/devices/system/cpu/cpu[0-9]*; do
  read -r clock < "$core/cpufreq/cpuinfo_max_freq" || clock=
  echo "${core##*/} $clock"
done 2>/dev/null
echo "$1 end"
"""
_CONDITION: Final = """
echo "$1 battery"; dumpsys battery
echo "$1 thermal"; dumpsys thermalservice
echo "$1 screen"; dumpsys power | grep -E 'mWakefulness=|Display Power: state='
echo "$1 meminfo"; cat /proc/meminfo
echo "$1 cores"
for core in /sys/devices/system/cpu/cpu[0-9]*; do
  for name in scaling_governor scaling_cur_freq scaling_max_freq; do
    read -r value < "$core/cpufreq/$name" && echo "${core##*/} $name $value"
  done
done 2>/dev/null
echo "$1 zones"
for zone in /sys/class/thermal/thermal_zone[0-9]*; do
  read -r type < "$zone/type" && read -r temp < "$zone/temp" && echo "${zone##*/} $temp $type"
done 2>/dev/null
echo "$1 end"
"""


def read_facts(phone: Phone) -> Facts:
    """What is known of a phone.

    Raises:
        DeviceError: it cannot be reached, or says nothing of itself.
    """
    asked = time.time()
    said = _ask(phone, _FACTS, "telling what it is")
    model = _words(said, "ro.product.model")
    if not model:
        raise DeviceError(
            f"{phone.name} does not say what model it is, as an Android does: see "
            f"`adb -s {phone.serial} shell getprop`"
        )
    maker, soc = _words(said, "ro.product.manufacturer"), _words(said, "ro.soc.model")
    version = _words(said, "ro.build.version.release")
    more = {
        "abi": _words(said, "ro.product.cpu.abi"),
        "sdk": _words(said, "ro.build.version.sdk"),
        "kernel": _words(said, "kernel"),
        "soc manufacturer": _words(said, "ro.soc.manufacturer"),
    }
    clock = _number(_words(said, "clock"), 0, 1 << 40)
    if clock is not None and abs(clock - asked) > _SKEW:
        more["clock"] = f"{clock - asked:+.0f} s from this host's, which alone is used"
    is_virtual = _words(said, _VIRTUAL) == "1"
    is_emulator = any(_words(said, name) == "1" for name in _EMULATOR)
    if is_virtual:
        more["virtual"] = "this is EdgeForge's virtual phone, not a real one"
    elif is_emulator:
        more["virtual"] = "this is an emulator, not a real phone"
    return Facts(
        name=phone.name,
        kind="android",
        model=model if model.lower().startswith(maker.lower()) else f"{maker} {model}",
        system=f"Android {version or 'of unknown version'}",
        processor=soc or _words(said, "ro.board.platform") or _words(said, "machine"),
        cores=_cores(said.get("cores", "")),
        memory_bytes=_meminfo(said.get("meminfo", ""), "MemTotal"),
        emulated=is_virtual or is_emulator,
        more={name: value for name, value in more.items() if value},
    )


def read_condition(phone: Phone) -> Condition:
    """How a phone is now; what it does not say, or says in no known form, is left out.

    Raises:
        DeviceError: it cannot be reached.
    """
    at = time.time()
    said = _ask(phone, _CONDITION, "telling how it is")
    battery, thermal = said.get("battery", ""), said.get("thermal", "")
    cores = said.get("cores", "")
    powered = re.findall(r"^\s*\w+ powered: (true|false)$", battery, re.MULTILINE)
    level = _number(_field(battery, r"^\s*level: (\d{1,4})$"), 0, 1000)
    scale = _number(_field(battery, r"^\s*scale: (\d{1,4})$"), 1, 1000) or 100
    return Condition(
        at=at,
        battery_percent=None if level is None else min(100, round(100 * level / scale)),
        charging=("true" in powered) if powered else None,
        temperatures=_temperatures(battery, thermal, said.get("zones", "")),
        thermal_status=_number(_field(thermal, r"^\s*Thermal Status: (\d)$"), 0, 6),
        governors=_each(cores, "scaling_governor", lambda text: text[:_LONGEST_NAME] or None),
        clocks=_each(cores, "scaling_cur_freq", _hertz),
        clock_limits=_each(cores, "scaling_max_freq", _hertz),
        available_bytes=_meminfo(said.get("meminfo", ""), "MemAvailable"),
        screen_on=_screen(said.get("screen", "")),
    )


def _ask(phone: Phone, script: str, what: str) -> Mapping[str, str]:
    """The parts that a script printed, by name.

    Raises:
        DeviceError: the phone printed something else, or did not come to the script's end.
    """
    mark = f"edgeforge-{secrets.token_hex(8)}"
    text = clean(phone.run(script, mark, what=what).output)
    parts: dict[str, str] = {}
    name = ""
    for line in text.split("\n"):
        if line.startswith(f"{mark} "):
            name = line.removeprefix(f"{mark} ").strip()
            parts[name] = ""
        elif name:
            parts[name] += line + "\n"
    if "end" not in parts:
        raise DeviceError(
            f"{phone.name} answers with noise in {what}: restart it, or use another phone"
        )
    return parts


def _words(said: Mapping[str, str], name: str) -> str:
    """The line that a part consists of."""
    return one_line(said.get(name, ""), _LONGEST_NAME)


def _field(text: str, pattern: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else ""


def _number(text: str, least: int, most: int) -> int | None:
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        return None
    return int(text) if least <= int(text) <= most else None


def _hertz(text: str) -> int | None:
    """A clock, which Linux gives in kilohertz."""
    found = _number(text, 1, _HIGHEST_HZ // 1000)
    return None if found is None else 1000 * found


def _meminfo(text: str, name: str) -> int | None:
    found = _number(_field(text, rf"^{name}:\s+(\d+) kB$"), 0, _MOST_MEMORY // 1024)
    return None if found is None else 1024 * found


def _cores(text: str) -> tuple[Core, ...]:
    found = [line.split() for line in text.splitlines()]
    names = {words[0]: words[1:] for words in found if words and words[0][:3] == "cpu"}
    numbered = [name for name in names if name[3:].isdigit() and len(name) < 7]
    numbered.sort(key=lambda name: int(name[3:]))
    return tuple(
        Core(name, _hertz(names[name][0]) if names[name] else None)
        for name in numbered[:_MOST_CORES]
    )


def _each(text: str, name: str, read: Callable[[str], _T | None]) -> dict[str, _T]:
    """A value of each core."""
    found: dict[str, _T] = {}
    for core, value in re.findall(rf"^(cpu\d{{1,3}}) {name} (\S+)$", text, re.MULTILINE):
        number = read(value)
        if number is not None and len(found) < _MOST_CORES:
            found[core] = number
    return found


def _temperatures(battery: str, thermal: str, zones: str) -> dict[str, float]:
    """Degrees Celsius: of the battery, of Android's own sensors, and of the kernel's zones."""
    found: dict[str, float] = {}
    tenths = _number(_field(battery, r"^\s*temperature: (-?\d{1,4})$"), -500, 1500)
    if tenths is not None:
        found["battery"] = tenths / 10
    sensors = re.findall(r"mValue=(-?\d{1,3}(?:\.\d{1,6})?), mType=\d+, mName=([^,}]+)", thermal)
    for value, name in sensors[:_MOST_ZONES]:
        found[one_line(name, _LONGEST_NAME)] = float(value)
    for zone, value, name in re.findall(r"^(thermal_zone\d+) (-?\d{1,7}) (.+)$", zones, re.M):
        # Some kernels give whole degrees here, most a thousandth of one.
        degrees = int(value) / 1000 if abs(int(value)) >= 1000 else float(value)
        if -50 <= degrees <= 200 and len(found) < 2 * _MOST_ZONES:
            found[f"{zone} {one_line(name, _LONGEST_NAME)}"] = degrees
    return found


def _screen(text: str) -> bool | None:
    wakefulness = _field(text, r"mWakefulness=(\w+)")
    state = _field(text, r"Display Power: state=(\w+)")
    if state:
        return state == "ON"
    return wakefulness == "Awake" if wakefulness else None
