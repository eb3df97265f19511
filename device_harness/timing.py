"""Times an artifact in a separate process, so that the process's memory is the artifact's.

`time_artifact` starts `main` in that process, which prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from device_harness.child_process import python_command, python_environment
from device_harness.errors import DeviceError, LogitsNotFiniteError
from exporters.errors import ExportError

if TYPE_CHECKING:
    from device_harness.session import Session


@dataclass(frozen=True)
class Timings:
    """The time and memory that an artifact takes on one machine.

    Attributes:
        runtime: the runtime's name, version and number of threads.
        load_seconds: the time from opening the files until the model can run.
        first_token_seconds: the time from the prompt to its last logits, on a warm model.
        prefill_tokens: the length of the prompt.
        prefill_tokens_per_second: the prompt's tokens divided by the time to the first token.
        decode_tokens: how many tokens are decoded one by one after the prompt.
        decode_tokens_per_second: 1 divided by the median time of a token.
        loaded_bytes: the peak resident memory after loading, minus the peak before.
        peak_bytes: the peak resident memory of the whole process that runs the artifact, at the
            end.
        not_finite: of the calls, how many gave NaN or infinite logits.
        where: a phrase for where the first of these come from; empty where that cannot be seen.
        slow_tokens_per_second: 1 divided by the time that nine of ten tokens take at most.
        fast_tokens_per_second: 1 divided by the time that one of ten tokens takes at most.
    """

    runtime: str
    load_seconds: float
    first_token_seconds: float
    prefill_tokens: int
    prefill_tokens_per_second: float
    decode_tokens: int
    decode_tokens_per_second: float
    loaded_bytes: int
    peak_bytes: int
    not_finite: int = 0
    where: str = ""
    slow_tokens_per_second: float | None = None
    fast_tokens_per_second: float | None = None

    def require_finite(self) -> None:
        """Refuses times of logits that are NaN or infinite.

        Raises:
            LogitsNotFiniteError: says of how many calls, and where they come from.
        """
        if self.not_finite:
            runtime = self.runtime.split(" (")[0]
            where = self.where or "the runtime does not show where they come from"
            raise LogitsNotFiniteError(
                f"{runtime} gives NaN or infinite logits in {self.not_finite} calls; {where}: "
                f"times of them mean nothing"
            )


def time_artifact(
    folder: Path,
    *,
    threads: int | None,
    prefill: int = 128,
    decode: int = 32,
    options: Mapping[str, str | None] | None = None,
) -> Timings:
    """Times an artifact in a fresh process.

    Args:
        folder: the artifact.
        threads: the runtime's number of threads; None for its default.
        prefill: the number of the prompt's tokens; a short context reduces it.
        decode: the number of tokens that are decoded one by one; a short context reduces it.
        options: the runtime's options, as `open_session` takes them.

    Raises:
        DeviceError: the process failed; the message holds the last line of its error output.
    """
    command = python_command("device_harness.timing", "--prefill", str(prefill))
    command += ["--decode", str(decode)]
    if threads is not None:
        command += ["--threads", str(threads)]
    command += ["--options", json.dumps(dict(options or {})), "--", str(folder)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=python_environment(),
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise DeviceError(f"timing {folder} failed: {words[-1] if words else done.returncode}")
    return Timings(**json.loads(done.stdout.splitlines()[-1]))


def measure(
    folder: Path,
    threads: int | None,
    prefill: int,
    decode: int,
    options: Mapping[str, str | None] | None = None,
) -> Timings:
    """Times an artifact in this process; arguments as `time_artifact`."""
    from device_harness.registry import open_session
    from exporters.manifest import Manifest

    manifest = Manifest.read(folder)
    with open_session(folder, manifest, threads, options) as session:
        return _time(session, manifest.context, prefill, decode)


def _time(session: Session, context: int, prefill: int, decode: int) -> Timings:
    import numpy as np

    from device_harness.finite import bad_positions

    before = session.peak_bytes
    started = time.perf_counter()
    vocab = session.vocab_size
    loaded = time.perf_counter() - started
    loaded_bytes = max(0, session.peak_bytes - before)
    prefill = max(1, min(prefill, context // 2))
    decode = max(1, min(decode, context - prefill - 1))
    tokens = np.random.default_rng(0).integers(0, vocab, prefill + decode, dtype=np.int64)
    bad: list[int] = []  # lengths of the texts whose logits are not finite

    def timed(begin: int, end: int) -> float:
        started = time.perf_counter()
        logits = session.extend(tokens[begin:end])
        seconds = time.perf_counter() - started
        bad.extend(end for _ in bad_positions(logits[None]))
        return seconds

    firsts = []
    for _ in range(3):  # the first call also warms caches and thread pools
        session.reset()
        firsts.append(timed(0, prefill))
    steps = [timed(prefill + index, prefill + index + 1) for index in range(decode)]
    first = min(firsts[1:])
    fast, slow = np.quantile(steps, (0.1, 0.9))
    return Timings(
        runtime=session.runtime,
        load_seconds=loaded,
        first_token_seconds=first,
        prefill_tokens=prefill,
        prefill_tokens_per_second=prefill / first,
        decode_tokens=decode,
        decode_tokens_per_second=1 / median(steps),
        loaded_bytes=loaded_bytes,
        peak_bytes=session.peak_bytes,
        not_finite=len(bad),
        where=(session.first_not_finite(tokens[: bad[0]]) or "") if bad else "",
        slow_tokens_per_second=1 / float(slow),
        fast_tokens_per_second=1 / float(fast),
    )


def main() -> None:
    """Times the artifact named on the command line and prints JSON."""
    parser = argparse.ArgumentParser(prog="device_harness.timing")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--options", type=json.loads, default={})
    asked = parser.parse_args()
    try:
        timings = measure(asked.folder, asked.threads, asked.prefill, asked.decode, asked.options)
    except (DeviceError, ExportError) as error:
        sys.exit(str(error))
    print(json.dumps(asdict(timings)))


if __name__ == "__main__":
    main()
