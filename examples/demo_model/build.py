"""Rebuild the demo model from nothing: text, tokenizer, training, card; or a second model, a Llama.

Usage::

    python examples/demo_model/build.py --out build --minutes 60
    python examples/demo_model/build.py --out build/llama --minutes 180 --llama
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Rebuild the demo model from nothing.")
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--llama", action="store_true", help="train the second model, a Llama, and not the demo's"
    )
    arguments = parser.parse_args()
    data, model = arguments.out, arguments.out / "model"
    vocabulary, size = (4096, "llama") if arguments.llama else (3072, "small")
    steps = [
        ("corpus.py", "--out", data),
        ("tokenizer.py", "--text", data / "train.jsonl", "--out", model,
         "--vocab-size", vocabulary),
        ("train.py", "--data", data, "--out", model, "--minutes", arguments.minutes,
         "--threads", arguments.threads, "--size", size, "--resume"),
        ("card.py", "--data", data, "--model", model, "--out", arguments.out / "demo",
         "--threads", arguments.threads),
    ]  # fmt: skip
    if arguments.llama:  # the card is the demo model's; `training.json` says how this one was made
        steps.pop()
    for script, *options in steps:
        command = [sys.executable, str(HERE / script), *map(str, options)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
