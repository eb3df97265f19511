"""Continues a text with an ONNX artifact in plain onnxruntime; EdgeForge is not imported.

    python examples/onnxruntime_plain.py out/demo/onnx --prompt "The function returns"

An app does the same in any language that onnxruntime has: the prompt goes through the graph in one
call, which fills the caches of keys and values, and each further call takes one token. The caches
are allocated once for the whole context, and every call updates them in place. Layers that convolve
(LFM2) have the last few tokens in place of caches; where a text begins, the graph takes zeros for
them, whatever is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import numpy.typing as npt
    import onnxruntime
    from tokenizers import Tokenizer
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: pip install onnxruntime tokenizers numpy")

STATES = ("past_key_values.", "past.")
# Caches are float32, or int8 where the artifact was exported with --kv-cache int8. The graph
# holds the scales of int8 caches, so that an app only has to allocate another type.
CACHE_TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the artifact says of itself: its context and the model's special tokens."""
    path = folder / "edgeforge.json"
    if not path.is_file():
        sys.exit(f"{folder} is no EdgeForge artifact: it has no edgeforge.json")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest["target"] != "onnx":
        sys.exit(f"{folder} is an artifact for {manifest['target']}; this script runs onnx")
    if not (folder / "tokenizer.json").is_file():
        sys.exit(f"{folder} has no tokenizer.json, so a prompt cannot become tokens")
    return manifest


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokens of a prompt, with those that the tokenizer puts around a text."""
    tokens: list[int] = tokenizer.encode(prompt).ids
    return tokens


class Decoder:
    """The graph and its states: caches, the last tokens of layers that convolve, and memories.

    Args:
        file: ``model.onnx``; onnxruntime finds ``model.onnx.data`` beside it.
        context: positions that the caches hold.
    """

    def __init__(self, file: Path, context: int) -> None:
        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        self.length = 0
        self.states: dict[str, onnxruntime.OrtValue] = {}
        for given in self.session.get_inputs():
            if given.name.startswith(STATES):
                # A cache's number of tokens is a name in the graph; other states have one shape.
                shape = [1, *(n if isinstance(n, int) else context for n in given.shape[1:])]
                zeros = np.zeros(shape, CACHE_TYPES[given.type])
                self.states[given.name] = onnxruntime.OrtValue.ortvalue_from_numpy(zeros)

    def extend(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Appends tokens to the text and returns the last one's logits, ``float32[vocab]``."""
        self.length += len(tokens)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        # As long as the whole text: its sum tells the graph how many positions are taken.
        binding.bind_cpu_input("attention_mask", np.ones((1, self.length), np.int64))
        binding.bind_output("logits")
        for past, state in self.states.items():
            binding.bind_ortvalue_input(past, state)
            binding.bind_ortvalue_output(f"present.{past.partition('.')[2]}", state)
        self.session.run_with_iobinding(binding)
        logits: npt.NDArray[np.float32] = binding.get_outputs()[0].numpy()[0, -1]
        return logits


def generate(
    decoder: Decoder, prompt: list[int], limit: int, context: int, stop: frozenset[int]
) -> Iterator[int]:
    """The likeliest token, again and again, until an end token, the limit or a full context."""
    logits = decoder.extend(prompt)
    for count in range(1, limit + 1):
        token = int(logits.argmax())
        if token in stop:
            return
        yield token
        if count == limit or decoder.length == context:
            return
        logits = decoder.extend([token])


def run(folder: Path, prompt: str, limit: int, ids: bool) -> None:
    """Prints how the prompt goes on."""
    manifest = read_manifest(folder)
    model, context = manifest["model"], manifest["context"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = encode(tokenizer, prompt)
    if not 0 < len(tokens) < context:
        sys.exit(f"the prompt has {len(tokens)} tokens; the context has room for 1 to {context}")
    decoder = Decoder(folder / manifest["entry"], context)
    started = time.perf_counter()
    made = list(generate(decoder, tokens, limit, context, frozenset(model["eos"])))
    seconds = time.perf_counter() - started
    print(" ".join(map(str, made)) if ids else tokenizer.decode(made))
    print(f"[{len(tokens)} prompt tokens, {len(made)} new ones, {seconds:.2f} s]", file=sys.stderr)


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
