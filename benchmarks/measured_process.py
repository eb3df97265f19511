"""Runs a command in its own process and measures its time and its process tree's peak memory."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Finished:
    """The time and memory that a process took, and its output.

    ``wall`` and ``cpu`` are in seconds; ``peak`` is the peak in resident bytes of the process and
    its children.
    """

    wall: float
    cpu: float
    peak: int
    output: str

    def json(self) -> dict[str, Any]:
        """Returns the last line of the output, where the measuring scripts print their JSON."""
        return json.loads(self.output.strip().splitlines()[-1])


@contextmanager
def work_folder(given: Path | None, prefix: str) -> Iterator[Path]:
    """The folder that a user gave, made where need be; or else a scratch that goes at the end."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def pin(threads: int) -> None:
    """Limits this process and those it starts to ``threads`` cores and threads per library."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
        os.environ[f"{name}_NUM_THREADS"] = str(threads)


def run(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Finished:
    """Runs ``command`` to its end.

    The peak is the larger of two numbers: the kernel's own high-water mark of the process, and the
    largest sum of the resident sizes of its tree, sampled every 50 ms.

    Raises:
        SystemExit: the command fails; the message ends with the last lines that it printed.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    peaks = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            peaks[0] = max(peaks[0], _tree_resident(process.pid))

    errors: list[str] = []
    watcher = threading.Thread(target=watch)
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    watcher.start()
    reader.start()
    output = process.stdout.read()
    # wait4, unlike Popen.wait, also gives this child's own high-water mark.
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    watcher.join()
    reader.join()
    if process.returncode:
        shown = " ".join(str(part) for part in command)
        tail = "\n".join((output + errors[0]).splitlines()[-30:])
        raise SystemExit(f"{shown}\nfailed with exit code {process.returncode}:\n{tail}")
    cpu = usage.ru_utime + usage.ru_stime
    return Finished(wall, cpu, max(peaks[0], usage.ru_maxrss * 1024), output)


def edgeforge() -> Path:
    """Returns the path of the ``edgeforge`` command in this Python's environment.

    Raises:
        SystemExit: there is none.
    """
    command = Path(sys.executable).with_name("edgeforge")
    if not command.exists():
        raise SystemExit(f"{command} is missing: install EdgeForge into this environment")
    return command


def say(text: str) -> None:
    """Prints progress to stderr, so that stdout holds only results."""
    print(text, file=sys.stderr, flush=True)


def high_water_mark() -> int:
    """Returns the peak resident size of this process so far, in bytes (Linux only)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line: peak memory cannot be measured here")


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files in ``folder`` and below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _tree_resident(root: int) -> int:
    """Returns the resident bytes of a process and its descendants now; 0 after they ended."""
    total, waiting = 0, [root]
    page = os.sysconf("SC_PAGE_SIZE")
    while waiting:
        pid = waiting.pop()
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return total
