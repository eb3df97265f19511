"""Rebuild the demo model from nothing: text, tokenizer, training, card.

Usage::

    python examples/demo_model/build.py --out build --minutes 60
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
    arguments = parser.parse_args()
    data, model = arguments.out, arguments.out / "model"
    steps = (
        ("corpus.py", "--out", data),
        ("tokenizer.py", "--text", data / "train.jsonl", "--out", model),
        ("train.py", "--data", data, "--out", model, "--minutes", arguments.minutes,
         "--threads", arguments.threads, "--resume"),
        ("card.py", "--data", data, "--model", model, "--out", arguments.out / "demo",
         "--threads", arguments.threads),
    )  # fmt: skip
    for script, *options in steps:
        command = [sys.executable, str(HERE / script), *map(str, options)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
