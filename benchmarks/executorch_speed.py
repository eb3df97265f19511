"""Loads one .pte and times it: the measuring half of executorch_export.py.

Prints one line of JSON. The same code runs the programs of all exporters: `forward` of ``tokens
int64[1, t], position int64[1]`` returns the last token's logits.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from measured_process import high_water_mark

from device_harness.executorch_worker import load_runtime

PROMPT = 128


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--positions", type=int, nargs="+", default=[8])
    parser.add_argument("--decode", type=int, default=24, help="tokens timed at each position")
    parser.add_argument("--rounds", type=int, default=5, help="prompts timed")
    parser.add_argument("--vocab", type=int, default=128_000, help="tokens are drawn below this")
    parser.add_argument("--logits", type=Path, help="write the first prompt's logits here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runtime = load_runtime()
    runtime._unsafe_reset_threadpool(options.threads)
    began = time.perf_counter()
    method = runtime._load_program(str(options.file)).load_method("forward")
    load = time.perf_counter() - began

    def call(tokens: np.ndarray, position: int) -> np.ndarray:
        given = [torch.from_numpy(tokens).reshape(1, -1), torch.tensor([position])]
        return method(given, clone_outputs=False)[0].numpy().reshape(-1)

    longest = max(options.positions) + options.decode
    tokens = np.random.default_rng(0).integers(0, options.vocab, longest + PROMPT, dtype=np.int64)
    logits = call(tokens[:PROMPT], 0).copy()  # also warms caches and thread pools
    if options.logits:
        np.save(options.logits, logits)
    prefills = [timed(call, tokens[:PROMPT], 0) for _ in range(options.rounds)]
    found = {
        "load_s": load,
        "prefill_tps": PROMPT / statistics.median(prefills),
    }
    for position in options.positions:
        for start in range(0, position, PROMPT):
            call(tokens[start : min(start + PROMPT, position)], start)
        steps = [
            timed(call, tokens[i : i + 1], i) for i in range(position, position + options.decode)
        ]
        found[f"decode_tps_{position}"] = 1 / statistics.median(steps)
    print(json.dumps({**found, "peak": high_water_mark()}))


def timed(call, tokens: np.ndarray, position: int) -> float:
    """Returns the seconds of one call."""
    began = time.perf_counter()
    call(tokens, position)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
