"""Measures how fast this machine reads memory, the bound of decoding: each token reads all weights.

Prints one line of JSON. The script sums one large buffer in several ways and reports the best round
of the best way: the rate that a compiled kernel without arithmetic could reach here and now.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bytes", type=int, default=1 << 30, help="size of the buffer")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    buffer = np.ones(options.bytes // 4, np.float32)
    parts = np.array_split(buffer, options.threads)
    # Which way is fastest depends on the CPU. All are vectorised, and none calls BLAS, which would
    # start threads of its own.
    ways = {
        "or": lambda part: np.bitwise_or.reduce(part.view(np.uint64)),
        "add": lambda part: np.add.reduce(part.view(np.int64)),
        "sum": np.sum,
        "max": np.max,
    }
    rates = {name: 0.0 for name in ways}
    with ThreadPoolExecutor(options.threads) as pool:
        for _ in range(options.rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                list(pool.map(way, parts))
                rates[name] = max(rates[name], buffer.nbytes / (time.perf_counter() - began))
    best = max(rates, key=rates.__getitem__)
    print(json.dumps({"bytes_per_s": rates[best], "by": best}))


if __name__ == "__main__":
    main()
