"""Commands of the virtual phone that run on an emulated arm64 core, apart from this host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from device_harness.devices.arm64.cores import CORES
from device_harness.devices.arm64.root import Root
from device_harness.errors import SetupError
from device_harness.virtual_phone.commands import children_of

SHELL: Final = "/system/bin/sh"
_START_SECONDS: Final = 20.0
_HOME: Final = "/data/local/tmp"
# Emulates every program of the namespaces and all that they start: binfmt_misc is theirs alone
# there, and nothing is registered on this host. Its first process keeps the namespaces alive; when
# it ends the kernel ends all the others. $1 is the phone's root, $2 qemu, $3 the system.
_KEEPER: Final = r"""
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
elf='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
any='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
printf '%s' ":arm64:M::$elf:$any:$2:F" > /proc/sys/fs/binfmt_misc/register
for part in usr etc; do mount --bind "$3/$part" "$1/$part"; done
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
mount --bind "$1/system/virtual/cpuinfo" "$1/proc/cpuinfo"
echo ready
# Its input ends when who started it ends, however that came; a command that waits also takes in
# the processes whose parents have ended.
cat > /dev/null
exit 0
"""


class EmulatedCommands:
    """The phone's shell, Android's toybox, and whatever is pushed, under qemu.

    Args:
        root: the emulator's root folder, from `device_harness.devices.arm64.setup.set_up`.
        folder: takes what the phone has of its own; it is the phone's root folder.
        core: a name of `device_harness.devices.arm64.cores.CORES`.

    Raises:
        SetupError: the kernel does not allow it.

    Attributes:
        chip: what runs the commands, as the phone calls it.
    """

    def __init__(self, root: Root, folder: Path, core: str) -> None:
        self.root, self._core, self._emulator = folder, CORES[core], root
        self.chip = f"{core} (emulated by qemu)"
        self.environment: Mapping[str, str] = {
            "PATH": "/system/bin:/usr/bin:/bin",
            "HOME": _HOME,
            "TMPDIR": _HOME,
            "QEMU_CPU": self._core.name,
            "VIRTUAL_PHONE_ROOT": "",
        }
        self._furnish(root)
        self._keeper: subprocess.Popen[bytes] | None = None
        self._first = 0
        if why := self._open_namespaces():
            raise SetupError(
                f"the virtual phone needs user namespaces with a binfmt_misc of their own (Linux "
                f"6.7 or later), which this machine does not allow ({why}): use another one"
            )

    def command(self, line: str) -> list[str]:
        """What this host starts for a line of the phone's shell."""
        own = [SHELL, "-c", line] if line else [SHELL]
        spaces = ["--user", "--mount", "--pid", f"--target={self._first}"]
        # As adb's daemon does, each command begins a session, whose number is its own.
        inside = [_program("setsid"), _program("chroot"), str(self.root), *own]
        return [_program("nsenter"), *spaces, "--", *inside]

    def close(self) -> None:
        """Ends the namespaces, and with them all that runs there; again, it does nothing."""
        if self._keeper is not None:
            with suppress(ProcessLookupError):
                os.kill(self._first, 9)
            self._keeper.kill()
            self._keeper.communicate()
            self._keeper = None

    def _furnish(self, root: Root) -> None:
        for name in ("usr", "etc", "dev", "proc", "tmp", "system/bin", "system/virtual", _HOME[1:]):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for name in ("bin", "lib", "lib64", "sbin"):
            if not (self.root / name).is_symlink():
                (self.root / name).symlink_to(f"usr/{name}")
        shell = self.root / "system/bin/sh"
        if not shell.is_symlink():
            shell.symlink_to("/usr/bin/mksh")
        core = root.core(self._core.name)
        shutil.copytree(core / "sys", self.root / "sys", dirs_exist_ok=True)
        shutil.copyfile(core / "proc/cpuinfo", self.root / "system/virtual/cpuinfo")
        _lend_sha256sum(self.root)

    def _open_namespaces(self) -> str:
        """Opens the namespaces; returns why that is not possible, where it is not."""
        spaces = ["--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child"]
        given = [str(self.root), str(self._emulator.qemu), str(self._emulator.system)]
        try:
            keeper = subprocess.Popen(
                [_program("unshare"), *spaces, "/bin/sh", "-ec", _KEEPER, "keeper", *given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
                start_new_session=True,
            )
        except OSError as error:
            return f"unshare: {error.strerror}"
        assert keeper.stdout is not None
        said = keeper.stdout.readline(1000).decode(errors="replace").strip()
        first = _only_child(keeper.pid) if said == "ready" else 0
        if not first:
            keeper.kill()
            keeper.wait()
            return said or "unshare says nothing"
        self._keeper, self._first = keeper, first
        return ""


def _lend_sha256sum(root: Path) -> None:
    """Gives the phone this host's ``sha256sum``, which need not be emulated.

    What is sent there is hashed there: emulated that takes a minute for a runtime, and a phone has
    instructions for it. Where this host's cannot be lent the phone uses toybox's.
    """
    folder = root / "system/virtual/native"
    try:
        program = _program("sha256sum")
        listed = subprocess.run(
            [_program("ldd"), program],
            capture_output=True,
            text=True,
            check=True,
            env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        ).stdout
        libraries = re.findall(r"(?:=> |^\s*)(/\S+) \(0x", listed, re.MULTILINE)
        loader = next(Path(name).name for name in libraries if "/ld-linux" in name)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (program, *libraries):
            shutil.copy(name, folder)
    except (SetupError, OSError, subprocess.SubprocessError, StopIteration):
        return
    place = "/system/virtual/native"
    script = root / "system/bin/sha256sum"
    script.write_text(
        f'#!{SHELL}\nexec {place}/{loader} --library-path {place} {place}/sha256sum "$@"\n'
    )
    script.chmod(0o755)


def _program(name: str) -> str:
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        raise SetupError(f"{name} is missing on this machine: install util-linux and coreutils")
    return found


def _only_child(pid: int) -> int:
    """The process that another one started; 0 where there is none."""
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if found := children_of(pid):
            return found[0]
        time.sleep(0.02)
    return 0
