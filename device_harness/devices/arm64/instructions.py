"""How many arm64 instructions an artifact executes, by class: a cost, and no latency.

What a core does in the time of one instruction differs by class, by core and by where its operands
lie. A count is the same each time, and the ratio of two artifacts' counts on one core tells which
needs more work there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from device_harness.child_process import python_command
from device_harness.devices.arm64.counted import BEGIN, DECODED, PREFILLED
from device_harness.devices.arm64.device import core_of, environment_in, python_of
from device_harness.devices.arm64.place import arm64_folder
from device_harness.devices.arm64.programs import last_line, run_program
from device_harness.devices.arm64.root import find_root, require_host
from device_harness.errors import DeviceError, SetupError
from exporters.manifest import Manifest

_SOURCE: Final = Path(__file__).with_name("instructions.c")
_FLAGS: Final = ("-O2", "-shared", "-fPIC", "-fvisibility=hidden")
_LONGEST: Final = 1800.0  # seconds

CLASSES: Final = {
    "all": "all",
    "vector": "vector and floating point",
    "memory": "loads and stores",
    "dot": "dot product (SDOT, UDOT)",
    "i8mm": "int8 matrices (SMMLA, UMMLA, USDOT)",
    "bf16": "bfloat16",
    "fp16": "half precision",
    "sve": "SVE",
    "sme": "SME",
}
"""Classes of instructions; one instruction may be of several."""


@dataclass(frozen=True)
class Instructions:
    """The instructions that an artifact executed.

    Attributes:
        device: the core, such as ``arm64:cortex-a76``.
        runtime: the runtime's name.
        prompt: tokens of the prompt, run in one call.
        output: tokens generated, the first by the prompt's call.
        prefill: instructions of the prompt, by class.
        decode: instructions of one generated token, by class, on average.
        tokens: the generated tokens.
    """

    device: str
    runtime: str
    prompt: int
    output: int
    prefill: Mapping[str, int]
    decode: Mapping[str, float]
    tokens: tuple[int, ...]


def count_instructions(
    folder: Path,
    prompt: int = 16,
    output: int = 24,
    core: str = "",
    options: Mapping[str, str | None] | None = None,
) -> Instructions:
    """Counts an artifact's instructions on an emulated core, in prefill and in decode.

    The runtime has one thread, so that the count is the same each time but for what Python and the
    allocator do, which is below a thousandth.

    Args:
        folder: the artifact.
        prompt: tokens of a prompt, at least 1, which are drawn at random.
        output: tokens to generate, at least 2.
        core: the core's name; empty for the default.
        options: of the runtime, by name; None as a value means the default.

    Raises:
        DeviceError: the emulator is not set up or fails, or the artifact does not run there.
    """
    require_host()
    root, chosen, manifest = find_root(), core_of(core), Manifest.read(folder)
    name = f"arm64:{chosen.name}"
    if prompt < 1 or output < 2 or prompt + output > manifest.context:
        raise DeviceError(
            f"instructions are counted over a prompt of at least 1 token and at least 2 generated "
            f"ones, and {folder} holds {manifest.context} together: {prompt} + {output} do not fit"
        )
    given = {key: value for key, value in (options or {}).items() if value is not None}
    plugin = build_plugin()
    with tempfile.TemporaryDirectory(prefix="edgeforge-") as temporary:
        counts = Path(temporary) / "counts"
        command = python_command(
            "device_harness.devices.arm64.counted",
            *(str(folder.absolute()), str(prompt), str(output), "1", json.dumps(given)),
        )
        python = [*root.counting_command(chosen.name, f"{plugin},out={counts}"), *python_of(root)]
        environment = environment_in(root, python, manifest.target)
        said = _run([*python, *command[1:]], environment, name)
        marks = read_counts(counts.read_text(encoding="ascii") if counts.exists() else "")
    if "error" in said:
        raise DeviceError(f"{name}: {said['error']}")
    missing = {BEGIN, PREFILLED, DECODED} - marks.keys()
    if missing:
        raise DeviceError(f"{name}: the emulator's counts are not whole: run it again")
    steps = len(said["tokens"]) - 1
    return Instructions(
        name,
        str(said["runtime"]),
        prompt,
        len(said["tokens"]),
        marks[PREFILLED],
        {kind: count / steps for kind, count in marks[DECODED].items()},
        tuple(said["tokens"]),
    )


def read_counts(text: str) -> dict[int, dict[str, int]]:
    r"""Reads what the plugin wrote: by mark, the instructions before it by class.

    >>> read_counts("1 all=5 dot=2\n")
    {1: {'all': 5, 'dot': 2}}
    """
    found = {}
    for line in text.splitlines():
        mark, *words = line.split()
        found[int(mark)] = {
            name: int(count) for name, _, count in (word.partition("=") for word in words)
        }
    return found


def build_plugin() -> Path:
    """Builds the plugin by this machine's C compiler, once, and returns its file.

    Raises:
        SetupError: there is no compiler, or it fails.
    """
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    file = arm64_folder() / f"instructions-{digest}.so"
    if file.is_file():
        return file
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise SetupError(
            "instructions are counted by a plugin of the emulator, which a C compiler builds, and "
            "there is none here: install gcc or clang"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        done = run_program([compiler, *_FLAGS, "-o", str(partial), str(_SOURCE)])
        if done.returncode:
            last = last_line(done.stderr)
            raise SetupError(f"{compiler} cannot build the plugin that counts: {last}")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def _run(command: Sequence[str], environment: Mapping[str, str], name: str) -> dict[str, Any]:
    """What the program in the emulator prints."""
    try:
        done = run_program(command, environment, _LONGEST)
    except subprocess.TimeoutExpired:
        raise DeviceError(
            f"{name}: counting took more than {_LONGEST:.0f} s: use fewer tokens"
        ) from None
    except OSError as error:
        raise DeviceError(f"{name}: the emulator cannot be started: {error.strerror}") from error
    try:
        said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = last_line(done.stderr)
        raise DeviceError(f"{name}: the emulator ended with {done.returncode}: {last}") from None
    return said
