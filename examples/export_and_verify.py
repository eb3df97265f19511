"""Exports a model in Python, runs what was written, and prints how right it is.

    python examples/export_and_verify.py out/demo
    python examples/export_and_verify.py out/mine --model CHECKPOINT --targets onnx,coreml

It uses three functions of the public interface: `edgeforge.export` writes a folder for each
target, `edgeforge.verify` runs an artifact beside the checkpoint, and `edgeforge.load` opens it to
run it token by token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import numpy as np
    from tokenizers import Tokenizer

    import edgeforge
except ModuleNotFoundError as missing:
    sys.exit(f'{missing.name} is not installed: pip install "edgeforge[executorch]"')

PROMPT = "The function returns"


def report(folder: Path, tokens: int) -> str:
    """Verifies an artifact on so many tokens of the demo model's held-out text."""
    found = edgeforge.verify(folder, tokens=tokens, timed=False)
    return "\n".join(
        [
            f"{folder}: {found.artifact_bytes / 1e6:.1f} MB, run by {found.runtime}",
            f"  perplexity: {found.perplexity_ratio:.4f} times the checkpoint's",
            f"  most likely token: the checkpoint's at {found.total.top1_agreement:.1%} of tokens",
            f"  KL divergence by quantization: {found.quantization.kl_mean:.1e} nats a token",
            f"  KL divergence by lowering: {found.lowering.kl_mean:.1e} nats a token",
        ]
    )


def next_tokens(folder: Path, prompt: str, count: int) -> list[tuple[str, float]]:
    """The likeliest tokens after a prompt, as text, and the probability of each."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = edgeforge.load(folder)
    logits = session.extend(np.array(tokenizer.encode(prompt).ids, np.int64))
    weights = np.exp(logits - logits.max())
    probabilities = weights / weights.sum()
    likeliest = np.argsort(-probabilities)[:count]
    return [(tokenizer.decode([token]), float(probabilities[token])) for token in likeliest]


def run(options: argparse.Namespace) -> None:
    """Exports, then verifies and tries each artifact."""
    folders = edgeforge.export(
        options.model,
        options.out,
        targets=tuple(options.targets.split(",")),
        recipe=options.recipe,
        force=options.force,
    )
    for folder in folders:
        print(report(folder, options.tokens))
        words = [f"{text!r} {share:.1%}" for text, share in next_tokens(folder, PROMPT, 3)]
        print(f"  {PROMPT!r} goes on with {', '.join(words)}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument(
        "--model", default="demo", help="a checkpoint's folder, a hub id, or demo (the default)"
    )
    parser.add_argument("--targets", default="onnx,executorch", help="names, with commas between")
    parser.add_argument("--recipe", default="int4", help="a name or a YAML file")
    parser.add_argument("--tokens", type=int, default=2048, help="how many to verify on")
    parser.add_argument("--force", action="store_true", help="replace the folder if it is there")
    options = parser.parse_args()
    try:
        run(options)
    except (ValueError, RuntimeError, OSError) as error:
        # EdgeForge's errors on what it was asked for are of these classes; each is one sentence.
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
