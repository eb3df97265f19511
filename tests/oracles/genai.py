"""What onnxruntime-genai makes of an artifact, and what our own session makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from device_harness.onnx_session import OnnxSession
from exporters.manifest import Manifest


def genai_greedy(folder: Path, *chunks: list[int], count: int) -> list[int]:
    """What onnxruntime-genai appends to a prompt given in chunks, without an end token."""
    model = og.Model(str(folder))
    options = og.GeneratorParams(model)
    length = sum(map(len, chunks))
    options.set_search_options(max_length=length + count, do_sample=False)
    generator = og.Generator(model, options)
    for chunk in chunks:
        generator.append_tokens(np.array([chunk], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[length:]]


def session_greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    manifest = Manifest.read(folder)
    session = OnnxSession(folder, manifest.context)
    logits = session.extend(np.array(prompt, np.int64))
    tokens: list[int] = []
    while len(tokens) < count and (token := int(logits.argmax())) not in manifest.model.eos:
        tokens.append(token)
        logits = session.extend(np.array([token], np.int64))
    return tokens


def genai_steps(folder: Path, rows: list[list[int]], steps: int) -> tuple[list, list[list[int]]]:
    """Logits ``float32[rows, vocab]`` of a batch, call by call, and the tokens of each row."""
    model = og.Model(str(folder))
    options = og.GeneratorParams(model)
    longest = max(map(len, rows))
    options.set_search_options(
        max_length=longest + steps + 1, do_sample=False, batch_size=len(rows)
    )
    generator = og.Generator(model, options)
    pad = json.loads((folder / "genai_config.json").read_text())["model"]["pad_token_id"]
    # What its tokenizer's `encode_batch` gives: rows padded on the right.
    ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
    generator.append_tokens(np.array(ids, np.int32))
    logits = [np.array(generator.get_logits())[:, 0]]
    for _ in range(steps):
        generator.generate_next_token()
        logits.append(np.array(generator.get_logits())[:, 0])
    made = [generator.get_sequence(index)[longest:] for index in range(len(rows))]
    return logits, [[int(token) for token in row] for row in made]
