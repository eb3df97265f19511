"""Artifacts of every family: float, int4 and int8, in onnxruntime and in onnxruntime-genai."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from device_harness.onnx_session import OnnxSession
from edgeforge.verification.bounds import DEFAULTS
from tests.oracles.genai import genai_greedy, genai_steps, session_greedy
from tests.oracles.tiny_families import BOS, CONFIGS, EOS
from tests.oracles.traced import difference

FLOAT = 2e-4  # of the range of the logits
CONTEXT = 48
ROUNDED = DEFAULTS["onnx"][1]


@pytest.fixture(params=CONFIGS)
def config(request) -> dict[str, object]:
    return CONFIGS[request.param]


def test_float_artifacts_give_every_position_and_prefill_then_decode(config, build, tokens):
    made = build(config)
    wanted = made.float_logits(tokens[:CONTEXT])
    session = OnnxSession(made.folder, CONTEXT, 1)
    assert difference(session.logits(tokens[:CONTEXT]), wanted) < FLOAT
    at = 0
    for size in (21, 1, 1, 12, 1, 1):  # past every window and original context
        at += size
        assert difference(session.extend(tokens[at - size : at]), wanted[at - 1]) < FLOAT
    session.reset()
    assert difference(session.extend(tokens[:3]), wanted[2]) < FLOAT


def without_rounding(source: Path, folder: Path) -> Path:
    """A copy of an artifact whose matrix products round no activations."""
    shutil.copytree(source, folder)
    for name in ("model.onnx", "verify.onnx"):
        model = onnx.load(folder / name, load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1
        onnx.save(model, folder / name)
    return folder


def divergence(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of the next token's distributions, nats."""
    ours, theirs = (torch.from_numpy(x).double().log_softmax(-1) for x in (found, wanted))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_integer_artifacts_compute_with_the_stored_numbers(config, build, tokens, tmp_path, recipe):
    made = build(config, recipe)
    wanted = made.quantized_logits(tokens[:CONTEXT])
    exact = OnnxSession(without_rounding(made.folder, tmp_path / "exact"), CONTEXT, 1)
    assert difference(exact.logits(tokens[:CONTEXT]), wanted) < FLOAT
    assert difference(exact.extend(tokens[:30]), wanted[29]) < FLOAT
    assert difference(exact.extend(tokens[30:31]), wanted[30]) < FLOAT
    found = OnnxSession(made.folder, CONTEXT, 1).logits(tokens[:CONTEXT])
    assert divergence(found, wanted) < ROUNDED["lowering.kl_mean"].limit


def test_onnxruntime_genai_gives_our_greedy_tokens(config, build):
    folder = build(config, "int8").folder
    draw, made = np.random.default_rng(5), 0
    for length in (1, 2, 20):
        prompt = [BOS, *draw.integers(0, 256, length - 1).tolist()]
        count = CONTEXT - length
        wanted = session_greedy(folder, prompt, count)
        assert genai_greedy(folder, prompt, count=count) == wanted
        made = max(made, len(wanted))
    # A prompt in two chunks, the second of which begins behind every window.
    assert genai_greedy(folder, prompt[:15], prompt[15:], count=count) == wanted
    assert made > 20


def test_a_padded_batch_in_onnxruntime_genai_gives_what_its_rows_give(config, build):
    """The float artifact, so that every row's logits are those of its own text."""
    made = build(config)
    draw = np.random.default_rng(3)
    rows = [[BOS, *draw.integers(0, 256, length).tolist()] for length in (0, 23, 9, 1)]
    logits, tokens = genai_steps(made.folder, rows, 4)
    for index, row in enumerate(rows):
        text = [*row, *tokens[index]]
        assert EOS not in text
        wanted = made.float_logits(np.array(text))
        for step, found in enumerate(logits):
            assert difference(found[index], wanted[len(row) - 1 + step]) < FLOAT
