"""Runs an artifact between the marks that `instructions.c` counts by, in the emulator.

Its arguments are FOLDER, the prompt's length, how many tokens to generate, the runtime's threads,
and its options as JSON. The prompt's tokens are drawn at random, the same each time. It prints the
runtime's name and the generated tokens as one line of JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from device_harness.errors import DeviceError
from device_harness.executorch_session import GENERATE, MODEL, weights_of
from device_harness.executorch_shim import shim_folder
from device_harness.executorch_worker import open_program
from device_harness.registry import open_session
from device_harness.session import Session, Tokens
from exporters.errors import ExportError
from exporters.manifest import Manifest

MARK: Final = 0x5ED6E
"""A system call that Linux does not have; the plugin takes it for a mark."""
Run = Callable[[Tokens, int], int]
BEGIN, PREFILLED, DECODED = 1, 2, 3


def main() -> None:
    """Runs the artifact."""
    folder, (length, output, threads) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    try:
        manifest = Manifest.read(folder)
        if shim_folder() is not None:
            run, vocab, runtime = *_in_this_process(folder, threads), "executorch"
        else:
            session = open_session(folder, manifest, threads, json.loads(sys.argv[5]))
            run, vocab, runtime = _of(session), session.vocab_size, session.runtime
        prompt = np.random.default_rng(0).integers(0, vocab, length, dtype=np.int64)
        run(prompt, 0)  # what is done once, at the first call, is not counted
        mark(BEGIN)
        tokens = [run(prompt, 0)]
        mark(PREFILLED)
        while len(tokens) < output:
            tokens.append(run(np.array(tokens[-1:]), len(prompt) + len(tokens) - 1))
        mark(DECODED)
        said: dict[str, object] = {"runtime": runtime, "tokens": tokens}
    except (DeviceError, ExportError, RuntimeError) as error:
        said = {"error": str(error)}
    print(json.dumps(said), flush=True)


def _of(session: Session) -> Run:
    """What runs tokens in a session: tokens and the first one's position -> the next token."""

    def run(tokens: Tokens, position: int) -> int:
        if position == 0:
            session.reset()
        return int(session.extend(tokens).argmax())

    return run


def _in_this_process(folder: Path, threads: int) -> tuple[Run, int]:
    """The same of an ExecuTorch program, whose session would start another process.

    Returns:
        what runs tokens, and the size of the vocabulary.
    """
    file = folder / MODEL
    program = open_program(str(file), weights_of(file), threads)
    constants = program.constants()
    longest, vocab = constants["get_max_seq_len"][0], constants["get_vocab_size"][0]
    method = program.load(GENERATE)

    def run(tokens: Tokens, position: int) -> int:
        for at in range(0, len(tokens), longest):
            logits = method(tokens[at : at + longest], position + at)[0]
        return int(logits.reshape(-1, logits.shape[-1])[-1].argmax())

    return run, vocab


def mark(number: int) -> None:
    """Makes a mark; without the plugin, nothing happens."""
    ctypes.CDLL(None).syscall(ctypes.c_long(MARK), ctypes.c_long(number))


if __name__ == "__main__":
    main()
