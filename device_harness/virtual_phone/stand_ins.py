"""What a virtual phone has in place of Android's own programs and files: it says that it is one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from device_harness.virtual_phone.faults import Faults

VIRTUAL: Final = "ro.edgeforge.virtual"
"""The property by which a virtual phone says what it is."""
MODEL: Final = "EdgeForge virtual phone"
_CLOCK: Final = 2_000_000  # kilohertz, as the files below /sys have it
_DEFAULT_CORES: Final = 4
_THROTTLED: Final = 0.5
_HOT, _WARM = 47.5, 31.0
_SEVERE: Final = 3

# Each finds what it says in a file below `system/virtual`, so that faults can change it meanwhile.
_PROGRAMS: Final = {
    "getprop": """
if [ $# -gt 0 ]; then
  while IFS='=' read -r name value; do
    if [ "$name" = "$1" ]; then printf '%s\\n' "$value"; exit 0; fi
  done < "$here/properties"
  echo "${2-}"
else
  while IFS='=' read -r name value; do
    printf '[%s]: [%s]\\n' "$name" "$value"
  done < "$here/properties"
fi
""",
    "dumpsys": """
case ${1-} in
  battery|thermalservice|power) cat "$here/dumpsys-$1" ;;
  *) echo "Can't find service: ${1-}" ;;
esac
""",
    "stat": """
if [ "${1-}" = -f ] && [ -s "$here/free" ]; then echo "free $(cat "$here/free") 1"; exit 0; fi
PATH=${PATH#*:}
exec stat "$@"
""",
    "date": """
PATH=${PATH#*:}
ahead=$(cat "$here/ahead")
[ "$ahead" = 0 ] && exec date "$@"
exec date -d "@$(($(date +%s) + ahead))" "$@"
""",
}


def furnish(root: Path, faults: Faults, shell: str, chip: str) -> None:
    """Writes the stand-ins of Android's programs and files into a phone's root folder.

    Args:
        root: the folder that is the phone's root folder.
        faults: the faults that they are to show; call again when they changed.
        shell: the path of the shell that runs the stand-ins.
        chip: what runs the phone's commands, for ``getprop ro.soc.model``.
    """
    for folder in ("data/local/tmp", "system/bin", "system/virtual"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, body in _PROGRAMS.items():
        program = root / "system/bin" / name
        here = 'here="${VIRTUAL_PHONE_ROOT-}/system/virtual"'
        _write(program, f"#!{shell}\n{here}{body}")
        program.chmod(0o755)
    status = faults.get("throttling")
    free, ahead = faults.get("little-space"), faults.get("clock-skew")
    said = {
        "properties": "".join(f"{k}={v}\n" for k, v in _properties(faults, chip).items()),
        "dumpsys-battery": _BATTERY,
        "dumpsys-thermalservice": _thermal(status),
        "dumpsys-power": "POWER MANAGER (dumpsys power)\n\n  mWakefulness=Awake\n",
        "free": "" if free is None else f"{free}\n",
        "ahead": f"{ahead or 0}\n",
    }
    for name, text in said.items():
        _write(root / "system/virtual" / name, text)
    _write_cores(root / "sys/devices/system/cpu", status)
    zone = root / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True, exist_ok=True)
    _write(zone / "type", "cpu-virtual\n")
    _write(zone / "temp", f"{round(1000 * (_WARM if not status else _HOT))}\n")


def banner(faults: Faults, chip: str) -> dict[str, str]:
    """What the phone tells of itself when a client connects."""
    properties = _properties(faults, chip)
    names = ("ro.product.name", "ro.product.model", "ro.product.device")
    return {name: properties[name].replace(" ", "_") for name in names}


def _properties(faults: Faults, chip: str) -> Mapping[str, str]:
    abi = "arm64-v8a"
    if faults.get("32-bit") is not None:
        abi = "armeabi-v7a"
    elif faults.get("x86") is not None:
        abi = "x86_64"
    return {
        VIRTUAL: "1",
        "ro.product.manufacturer": "EdgeForge",
        "ro.product.brand": "EdgeForge",
        "ro.product.model": MODEL,
        "ro.product.name": "virtual",
        "ro.product.device": "virtual",
        "ro.soc.manufacturer": "none",
        "ro.soc.model": chip,
        "ro.build.version.release": "14",
        "ro.build.version.sdk": "34",
        "ro.product.cpu.abi": abi,
        "ro.product.cpu.abilist": abi,
    }


_BATTERY: Final = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  status: 2
  health: 2
  present: true
  level: 80
  scale: 100
  voltage: 4100
  temperature: 275
  technology: virtual
"""


def _thermal(status: int | None) -> str:
    degrees = _WARM if not status else _HOT
    reading = f"Temperature{{mValue={degrees}, mType=3, mName=skin-virtual, mStatus={status or 0}}}"
    return (
        f"IsStatusOverride: false\nThermal Status: {status or 0}\nCached temperatures:\n"
        f"\t{reading}\nHAL Ready: true\nCurrent temperatures from HAL:\n\t{reading}\n"
    )


def _write_cores(folder: Path, status: int | None) -> None:
    share = _THROTTLED if (status or 0) >= _SEVERE else 1.0
    there = sorted(place.name for place in folder.glob("cpu[0-9]*"))
    for core in there or [f"cpu{at}" for at in range(_DEFAULT_CORES)]:
        place = folder / core / "cpufreq"
        place.mkdir(parents=True, exist_ok=True)
        _write(place / "cpuinfo_max_freq", f"{_CLOCK}\n")
        _write(place / "scaling_max_freq", f"{round(_CLOCK * share)}\n")
        _write(place / "scaling_cur_freq", f"{round(_CLOCK * share)}\n")
        _write(place / "scaling_governor", "virtual\n")


def _write(file: Path, text: str) -> None:
    """Writes beside and renames, for a command may be reading; a hard link elsewhere is kept."""
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(text, encoding="utf-8")
    if file.exists():
        beside.chmod(file.stat().st_mode)
    beside.replace(file)
