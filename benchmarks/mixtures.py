"""Compares a mixture of experts with its dense form, which computes every expert for every token.

Both artifacts hold the same weights and differ in one number of the checkpoint's configuration: how
many experts a token has. Every round runs the same tokens in each artifact, one after the other, so
that other load on the machine affects both. The script prints medians of one token and of 128
tokens with their ratio, and what loading takes. With one thread it counts the time of the process
on a processor, which other load does not lengthen.

A model of two layers is timed: a mixture with its attention, and a small dense layer, because
targets compute the last layer for the last token alone.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from kv_cache_speed import rewind
from measured_process import pin, work_folder
from pages import add_page_option, write_block
from tables import print_rows

PRESET = "qwen3-30b-a3b"
SHAPES = {
    "2 of 8": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 7168},
    "8 of 128": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}
VOCABULARY, CONTEXT, CHUNK = 512, 256, 128
ABOUT = (
    "Medians of runs that took turns, of a mixture's layer with its attention, a small dense layer "
    "and a small head; with one thread, of the time on a processor."
)


def main() -> None:
    """Reads the arguments, exports where needed, times, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="by default all")
    parser.add_argument("--recipe", default="int4-g32")
    parser.add_argument("--target", default="onnx", help="onnx, coreml or executorch")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workdir", type=Path, help="keeps the artifacts, and takes those there")
    parser.add_argument("--json", type=Path)
    add_page_option(parser)
    options = parser.parse_args()
    pin(options.threads)
    found = {}
    with work_folder(options.workdir, "mixtures-") as root:
        for shape in options.shape or SHAPES:
            found[shape] = measure(options, root / shape.replace(" ", "-"), shape)
    print(
        f"{options.recipe}, {options.target}, {options.threads} threads, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    rows = [["experts", "", "dense, ms", "mixture, ms", "dense / mixture"]]
    for shape, times in found.items():
        for label, both in times.items():
            dense, mixture = (statistics.median(both[form]) * 1000 for form in ("dense", "mixture"))
            rows.append([shape, label, f"{dense:.2f}", f"{mixture:.2f}", f"{dense / mixture:.2f}"])
    print_rows(rows)
    if options.page:
        write_block(options.page, rows, ABOUT)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(options: argparse.Namespace, root: Path, shape: str) -> dict[str, dict[str, list]]:
    """Returns the seconds of every run, by what was timed and by the form."""
    from device_harness.registry import open_session
    from exporters.manifest import Manifest

    times: dict[str, dict[str, list]] = {"load": {}}
    with ExitStack() as opened:
        sessions = {}
        for form in ("dense", "mixture"):
            out = artifact(options, root, shape, form)
            session = opened.enter_context(open_session(out, Manifest.read(out), options.threads))
            began = clock(options.threads)
            session.load()
            times["load"][form] = [clock(options.threads) - began]
            sessions[form] = session
        for tokens in (1, CHUNK):
            rounds = options.rounds if tokens == 1 else max(5, options.rounds // 6)
            label = "1 token" if tokens == 1 else f"{tokens} tokens"
            times[label] = steps(sessions, tokens, rounds, options.threads)
    return times


def artifact(options: argparse.Namespace, root: Path, shape: str, form: str) -> Path:
    """Exports one form, unless it exists; both read one checkpoint's weights."""
    from edgeforge.synth.presets import PRESETS
    from edgeforge.synth.synthesise import synthesise, write_byte_tokenizer

    out, source = root / f"{options.target}-{options.recipe}-{form}", root / "checkpoint"
    if out.exists():
        return out
    if not source.exists():
        config = {
            **PRESETS[PRESET].config,
            **SHAPES[shape],
            "num_hidden_layers": 2,
            "mlp_only_layers": [1],
            "intermediate_size": 1024,
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        PRESETS["slice"] = dataclasses.replace(PRESETS[PRESET], config=config, generation_config={})
        synthesise("slice", source)
        write_byte_tokenizer(source, VOCABULARY)
    whole = (source / "config.json").read_text(encoding="utf-8")
    config = json.loads(whole)
    if form == "dense":
        config["num_experts_per_tok"] = config["num_experts"]
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # A process of its own, so that an export's memory does not stay in the one that is timed.
    command = [sys.executable, "-m", "edgeforge", "export", source, "--out", out]
    command += ["--target", options.target, "--recipe", options.recipe, "--strip"]
    command += ["--context", str(CONTEXT), "--activations", "int8"]
    try:
        subprocess.run([str(part) for part in command], check=True)
    finally:
        (source / "config.json").write_text(whole, encoding="utf-8")
    return out


def clock(threads: int) -> float:
    """Seconds of this process on a processor; with several threads, seconds that passed."""
    return time.process_time() if threads == 1 else time.perf_counter()


def steps(sessions: dict, tokens: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Returns the seconds of each run of ``tokens`` tokens at the beginning of a text.

    The sessions take turns, and every other round in reverse order. Every round has other tokens,
    which choose other experts, so that these are not in a core's cache.
    """
    draw = np.random.default_rng(0)
    found: dict[str, list[float]] = {form: [] for form in sessions}
    for number in range(rounds + 1):
        text = draw.integers(0, VOCABULARY, tokens, dtype=np.int64)
        for form in list(sessions) if number % 2 else list(sessions)[::-1]:
            rewind(sessions[form], 0)
            began = clock(threads)
            sessions[form].extend(text)
            if number:  # the first is a warm-up
                found[form].append(clock(threads) - began)
    return found


if __name__ == "__main__":
    main()
