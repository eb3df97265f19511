"""Runs an artifact between the marks that `instructions.c` counts by, in the emulator.

Its arguments are FOLDER, a file of the prompt's tokens (``.npy``), how many tokens to generate, the
runtime's threads, and its options as JSON. It prints the runtime's name and the generated tokens as
one line of JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Final

import numpy as np

from device_harness.errors import DeviceError
from device_harness.registry import open_session
from exporters.errors import ExportError
from exporters.manifest import Manifest

MARK: Final = 0x5ED6E
"""A system call that Linux does not have; the plugin takes it for a mark."""
BEGIN, PREFILLED, DECODED = 1, 2, 3


def main() -> None:
    """Runs the artifact."""
    folder, prompt, output, threads = Path(sys.argv[1]), np.load(sys.argv[2]), *sys.argv[3:5]
    try:
        manifest = Manifest.read(folder)
        with open_session(folder, manifest, int(threads), json.loads(sys.argv[5])) as session:
            session.extend(prompt)  # what is done once, at the first call, is not counted
            session.reset()
            mark(BEGIN)
            logits = session.extend(prompt)
            mark(PREFILLED)
            tokens = [int(logits.argmax())]
            while len(tokens) < int(output):
                logits = session.extend(np.array(tokens[-1:]))
                tokens.append(int(logits.argmax()))
            mark(DECODED)
            said: dict[str, object] = {"runtime": session.runtime, "tokens": tokens}
    except (DeviceError, ExportError) as error:
        said = {"error": str(error)}
    print(json.dumps(said), flush=True)


def mark(number: int) -> None:
    """Makes a mark; without the plugin, nothing happens."""
    ctypes.CDLL(None).syscall(ctypes.c_long(MARK), ctypes.c_long(number))


if __name__ == "__main__":
    main()
