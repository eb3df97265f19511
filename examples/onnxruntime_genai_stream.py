"""Continues a text with an ONNX artifact in onnxruntime-genai, and prints it as it comes.

    python examples/onnxruntime_genai_stream.py out/demo/onnx --prompt "The function returns"

onnxruntime-genai reads ``genai_config.json`` in the artifact and then keeps the caches, the
tokenizer and the sampling itself; its packages for Android, iOS and C# have the same functions.
EdgeForge is not imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnxruntime_genai as og
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: pip install onnxruntime-genai")


def read_config(folder: Path) -> dict[str, Any]:
    """The section ``model`` of ``genai_config.json``."""
    path = folder / "genai_config.json"
    if not path.is_file():
        sys.exit(
            f"{folder} is no ONNX artifact: it has no genai_config.json, which `edgeforge export "
            f"--target onnx` writes"
        )
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model"]
    return config


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt, with those that the tokenizer puts around a text."""
    # By default this library leaves out what the tokenizer itself puts around a text.
    tokenizer.update_options(add_special_tokens="true")
    return [int(token) for token in tokenizer.encode(prompt)]


def generate(model: Any, prompt: list[int], max_length: int, stop: frozenset[int]) -> Iterator[int]:
    """The likeliest token, again and again, until an end token or the longest length."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=max_length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        if token in stop:
            return
        yield token


def run(folder: Path, prompt: str, limit: int, ids: bool) -> None:
    """Prints how the prompt goes on."""
    config = read_config(folder)
    context = config["context_length"]
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    tokens = encode(tokenizer, prompt)
    if not 0 < len(tokens) < context:
        sys.exit(f"the prompt has {len(tokens)} tokens; the context has room for 1 to {context}")
    made = generate(
        model,
        tokens,
        min(len(tokens) + limit, context),
        frozenset(config.get("eos_token_id", ())),
    )
    # A stream holds a token back while its bytes end within a character.
    stream = tokenizer.create_stream()
    for token in made:
        print(f"{token} " if ids else stream.decode(token), end="", flush=True)
    print()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an artifact of target onnx")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-tokens", type=int, default=48, help="how many to add at most")
    parser.add_argument("--ids", action="store_true", help="print token ids instead of text")
    options = parser.parse_args()
    run(options.folder, options.prompt, options.max_tokens, options.ids)


if __name__ == "__main__":
    main()
