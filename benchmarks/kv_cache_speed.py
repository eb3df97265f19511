"""Decode with caches of int8 against caches of float32, at several positions, in turn.

Both artifacts are of one model and differ in `--kv-cache` alone. At each position every round runs
one step of each, one after the other, so that whatever else the machine does falls on both; printed
are medians and the ratio of the two, and the same for a prefill of 128 tokens. Positions before the
one that is timed are filled by prefills of 128 tokens.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from measured_process import pin

DTYPES = ("fp32", "int8")
CHUNK = 128


def main() -> None:
    """Read the arguments, export where need be, time, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="`demo`, or a shape of `edgeforge synth`")
    parser.add_argument("--layers", type=int, default=0, help="of a shape; 0: all")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--target", choices=["onnx", "executorch"], default="onnx")
    parser.add_argument("--positions", default="8,512,1000")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workdir", type=Path, help="keeps the artifacts, and takes those there")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pin(options.threads)
    with tempfile.TemporaryDirectory(prefix="kv-cache-") as scratch:
        times = measure(options, options.workdir or Path(scratch))
    name = f"{options.model}, {options.layers} layers" if options.layers else options.model
    print(f"{name}, {options.recipe}, {options.target}, {options.threads} threads, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}")
    print(f"{'':<16}{'float32, ms':>14}{'int8, ms':>12}{'int8 / float32':>18}")
    for label, found in times.items():
        plain, small = (statistics.median(found[dtype]) * 1000 for dtype in DTYPES)
        ratio = statistics.median(b / a for a, b in zip(*(found[d] for d in DTYPES), strict=True))
        print(f"{label:<16}{plain:>14.3f}{small:>12.3f}{ratio:>18.3f}")
    if options.json:
        options.json.write_text(json.dumps(times, indent=1) + "\n")


def measure(options: argparse.Namespace, root: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds of every run, by what was timed and the dtype of the caches."""
    positions = [int(part) for part in options.positions.split(",")]
    with ExitStack() as opened:
        sessions = {d: opened.enter_context(artifact(options, root, d)) for d in DTYPES}
        times = {f"position {at}": steps(sessions, at, 1, options.rounds) for at in positions}
        times[f"prefill of {CHUNK}"] = steps(sessions, 0, CHUNK, max(5, options.rounds // 6))
    return times


def artifact(options: argparse.Namespace, root: Path, dtype: str):
    """One artifact, opened; exported first unless it is there."""
    import edgeforge
    from device_harness.registry import open_session
    from edgeforge.synth.presets import PRESETS
    from edgeforge.synth.synthesise import synthesise, write_byte_tokenizer
    from exporters.manifest import Manifest

    out = root / f"{options.target}-{dtype}"
    if not out.exists():
        source = options.model
        if source != "demo":
            source = str(root / "checkpoint")
            if not Path(source).exists():
                shape = PRESETS[options.model]
                if options.layers:
                    config = {**shape.config, "num_hidden_layers": options.layers}
                    # The head keeps the share of a step that it has in the whole model.
                    share = options.layers / shape.config["num_hidden_layers"]
                    config["vocab_size"] = max(512, round(shape.config["vocab_size"] * share))
                    config |= {"bos_token_id": 1, "eos_token_id": 2}
                    PRESETS["slice"] = dataclasses.replace(
                        shape, config=config, generation_config={}
                    )
                synthesise("slice" if options.layers else options.model, Path(source))
                vocabulary = PRESETS["slice" if options.layers else options.model].config
                write_byte_tokenizer(Path(source), int(str(vocabulary["vocab_size"])))
        edgeforge.export(
            source,
            out,
            targets=[options.target],
            recipe=options.recipe,
            context=options.context,
            calibration_tokens=2048,
            kv_cache=dtype,
        )
    return open_session(out, Manifest.read(out), options.threads)


def steps(sessions: dict, position: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run of ``tokens`` after ``position`` others, in turn."""
    draw = np.random.default_rng(0)
    text = draw.integers(0, 256, position + tokens, dtype=np.int64)
    for session in sessions.values():
        fill(session, text[:position])
        session.extend(text[position:])
    found: dict[str, list[float]] = {dtype: [] for dtype in sessions}
    for number in range(rounds):
        order = list(sessions) if number % 2 else list(sessions)[::-1]
        for dtype in order:
            session = sessions[dtype]
            # The same step again: what it writes lies where the last round wrote it.
            rewind(session, position)
            began = time.perf_counter()
            session.extend(text[position:])
            found[dtype].append(time.perf_counter() - began)
    return found


def fill(session, text: np.ndarray) -> None:
    """Begins anew with a text, in chunks."""
    session.reset()
    for at in range(0, len(text), CHUNK):
        session.extend(text[at : at + CHUNK])


def rewind(session, position: int) -> None:
    """Forgets all positions from one on."""
    session._length = position


if __name__ == "__main__":
    main()
