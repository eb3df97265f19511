"""Artifacts of every family: float, int4 and int8, in onnxruntime and in onnxruntime-genai."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from device_harness.errors import DeviceError
from device_harness.onnx_session import OnnxSession
from edgeforge.verification.bounds import DEFAULTS
from exporters.options import TargetOptions
from tests.oracles.genai import genai_greedy, genai_steps, session_greedy
from tests.oracles.tiny_families import BOS, CONFIGS, EOS, MIXTURES, RECURRENT
from tests.oracles.traced import difference

FLOAT = 2e-4  # of the range of the logits
CONTEXT = 48
ROUNDED = DEFAULTS["onnx"][1]


FAMILIES = CONFIGS | MIXTURES | RECURRENT


@pytest.fixture(params=FAMILIES)
def config(request) -> dict[str, object]:
    return FAMILIES[request.param]


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


@pytest.fixture(scope="module")
def convolving(build):
    """An artifact whose layers convolve and attend by turns, without and with rounded products."""
    return build(CONFIGS["lfm2"])


def states_of(session: onnxruntime.InferenceSession, held: float) -> dict[str, np.ndarray]:
    """Empty caches, and recent tokens that all hold one number."""
    return {
        given.name: np.full([1, *(n if isinstance(n, int) else 0 for n in given.shape[1:])], held)
        for given in session.get_inputs()
        if given.name.startswith("past")
    }


@pytest.mark.parametrize("graph", ["model.onnx", "verify.onnx"])
def test_a_text_that_begins_ignores_what_the_states_hold(convolving, tokens, graph):
    session = onnxruntime.InferenceSession(convolving.folder / graph)
    names = [given.name for given in session.get_inputs() if given.name.startswith("past.")]
    assert names == ["past.0.conv", "past.2.conv"]
    text = {"input_ids": tokens[None, :9], "attention_mask": np.ones((1, 9), np.int64)}
    wanted = convolving.float_logits(tokens[:9])[-1]
    for held in (0.0, 3.0, np.inf, np.nan):
        states = {k: v.astype(np.float32) for k, v in states_of(session, held).items()}
        logits, *made = session.run(None, {**text, **states})
        assert difference(logits[0, -1], wanted) < FLOAT
    # One token more, which the states of the call before belong to.
    text = {"input_ids": tokens[None, 9:10], "attention_mask": np.ones((1, 10), np.int64)}
    logits = session.run(None, {**text, **dict(zip(states, made, strict=True))})[0]
    assert difference(logits[0, -1], convolving.float_logits(tokens[:10])[-1]) < FLOAT


def test_a_session_of_convolutions_keeps_one_text(convolving, tokens):
    every = convolving.float_logits(tokens[:CONTEXT])
    session = OnnxSession(convolving.folder, CONTEXT, 1)
    session.extend(tokens[20:40])
    session.reset()
    assert difference(session.extend(tokens[:1]), every[0]) < FLOAT
    assert difference(session.extend(tokens[1:2]), every[1]) < FLOAT
    # Neither another text in between nor a call that is refused changes what the states hold.
    session.logits(tokens[30:41])
    with pytest.raises(DeviceError, match="no token -1"):
        session.extend(np.array([4, -1]))
    assert difference(session.extend(tokens[2:4]), every[3]) < FLOAT
    assert difference(session.extend(tokens[4:5]), every[4]) < FLOAT


def test_a_stripped_artifact_of_convolutions(build, tokens):
    made = build(CONFIGS["lfm2"], asked=TargetOptions(strip=True))
    every = made.float_logits(tokens[:CONTEXT])
    session = OnnxSession(made.folder, CONTEXT, 1)
    session.extend(tokens[:6])
    assert difference(session.logits(tokens[:CONTEXT]), every) < FLOAT
    assert difference(session.extend(tokens[6:7]), every[6]) < FLOAT


def test_a_state_is_read_before_what_replaces_it_is_computed(convolving):
    """So input and output may share memory, as sessions, the example and genai have it."""
    for name in ("model.onnx", "verify.onnx"):
        graph = onnx.load(convolving.folder / name, load_external_data=False).graph
        makers = {output: node for node in graph.node for output in node.output}
        for state in [each.name for each in graph.input if each.name.startswith("past.")]:
            (reader,) = [node for node in graph.node if state in node.input]
            before, waiting = [], [f"present.{state.removeprefix('past.')}"]
            while waiting:
                made = makers.get(waiting.pop())
                if made is not None:
                    before.append(made)
                    waiting.extend(made.input)
            assert reader in before


# What of each family's int8 artifact stands outside the fused kernels, in the manifest's words.
_ROTATED = "rotations of queries and keys in 2 layers"
_NORMED = "norms of queries and keys in {} layers"
_ADDED = "residual additions that no norm follows ({})"
OUTSIDE = {
    "gemma": f"{_ROTATED}, factors (1)",
    "gemma2": f"{_ROTATED}, factors (1), the softcap of the logits",
    "gemma3_text": f"{_NORMED.format(3)}, factors (1)",
    "granite": "factors (6)",
    "granitemoe": "factors (6)",
    "granitemoehybrid": "short convolutions in 2 layers, biases (4), residual additions that no "
    "norm follows (2), additions of a shared expert (3), factors (8)",
    "jetmoe": f"{_ROTATED}, biases (4)",
    "lfm2": f"{_NORMED.format(2)}, short convolutions in 2 layers",
    "ministral3": _ROTATED,
    "olmo": "bounds of queries, keys and values (4)",
    "olmoe": "bounds of queries, keys and values (6)",
    "olmo2": f"{_NORMED.format(2)}, {_ADDED.format(3)}",
    "olmo3": f"{_NORMED.format(4)}, {_ADDED.format(7)}",
    "phi": f"{_ROTATED}, {_ADDED.format(2)}",
    "qwen2_moe": "additions of a shared expert (2)",
    "qwen3": f"{_ROTATED}, {_NORMED.format(2)}",
    "qwen3_5_text": f"{_ROTATED}, {_NORMED.format(2)}, short convolutions in 2 layers, biases (2), "
    "factors (2)",
    "qwen3_moe": f"{_ROTATED.replace('2', '3')}, {_NORMED.format(3)}",
    "stablelm": _ROTATED,
}


def test_the_manifest_says_what_no_fused_kernel_computes(config, build):
    notes = [note for note in build(config, "int8").manifest.notes if "fused" in note]
    words = OUTSIDE.get(config["model_type"])
    assert notes == ([f"outside of the fused kernels: {words}"] if words else [])


def test_the_manifest_says_how_many_experts_a_token_has(build):
    notes = build(MIXTURES["mixtral"], "int8").manifest.notes
    assert [note for note in notes if "experts" in note] == [
        "in 2 layers a call computes only the experts that its tokens chose, each for its own "
        "tokens; a token has 2 of 8"
    ]
    notes = build(MIXTURES["jetmoe"], "int8").manifest.notes
    assert [note for note in notes if "experts" in note] == [
        "in 2 layers a call computes only the experts that its tokens chose, each for its own "
        "tokens; a token has 3 of 5",
        "in 2 layers the query heads and the outputs of attention are experts', and a call "
        "computes only those that its tokens chose, each for its own tokens; a token has 3 of 5",
    ]
    notes = build(CONFIGS["qwen2"], "int8").manifest.notes
    assert not [note for note in notes if "experts" in note]


def test_the_structure_names_the_states_of_convolutions(convolving):
    sections = convolving.manifest.structure
    assert sections["Recent tokens"] == [
        {"graph": graph, "type": "float", "tokens": 2, "states": 2}
        for graph in ("model.onnx", "verify.onnx")
    ]
    assert sum(row["caches"] for row in sections["Caches"]) == 8
    states = convolving.manifest.states
    assert states["past.0.conv"] == "float[batch_size, 64, 2]"
    assert states["past_key_values.1.key"].startswith("float[batch_size, 2, past_length,")
    assert list(states) == [
        *("past.0.conv", "past_key_values.1.key", "past_key_values.1.value"),
        *("past.2.conv", "past_key_values.3.key", "past_key_values.3.value"),
    ]
