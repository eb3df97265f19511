"""Starts a virtual phone: ``python -m device_harness.virtual_phone``."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from device_harness.devices.arm64.cores import CORES
from device_harness.devices.arm64.root import find_root
from device_harness.errors import DeviceError
from device_harness.virtual_phone.emulated_commands import SHELL, EmulatedCommands
from device_harness.virtual_phone.faults import FAULTS, parse_fault
from device_harness.virtual_phone.phone import VirtualPhone


def main() -> None:
    """Starts a phone and waits until it is told to end."""
    parser = argparse.ArgumentParser(
        prog="python -m device_harness.virtual_phone",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="A phone that is none: it speaks adb on loopback, and qemu runs its commands. "
        "It needs `edgeforge devices setup arm64` once.",
        epilog="faults:\n" + "".join(f"  {name:14} {what}\n" for name, what in FAULTS.items()),
    )
    parser.add_argument("--port", type=int, default=5555, help="on 127.0.0.1; 0 for any free one")
    parser.add_argument("--core", choices=CORES, default="cortex-a76", help="what is emulated")
    parser.add_argument("--keys", action="store_true", help="ask for a key, and trust any")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="NAME[=AMOUNT]", help="show this fault"
    )
    asked = parser.parse_args()
    try:
        faults = [parse_fault(text) for text in asked.fault]
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tempfile.TemporaryDirectory(prefix="edgeforge-phone-") as folder:
            _serve(Path(folder), asked, faults)
    except (DeviceError, OSError) as error:
        print(f"virtual phone: {error}", file=sys.stderr)
        sys.exit(6)
    except KeyboardInterrupt:
        sys.exit(130)


def _serve(folder: Path, asked: argparse.Namespace, faults: list[tuple[str, int]]) -> None:
    commands = EmulatedCommands(find_root(), folder, asked.core)
    phone = VirtualPhone(commands, asked.port, SHELL, commands.chip, asks_for_keys=asked.keys)
    try:
        with phone:
            for name, amount in faults:
                phone.set_fault(name, amount)
            print(f"a virtual phone listens; run: adb connect {phone.serial}", flush=True)
            phone.wait()
    finally:
        commands.close()


if __name__ == "__main__":
    main()
