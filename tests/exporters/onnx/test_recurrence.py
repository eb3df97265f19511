"""Recurrent layers in batches whose rows differ in length, and what their states may hold."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from device_harness.errors import DeviceError
from device_harness.onnx_session import OnnxSession
from edgeforge.families.spec import LayerSpec, RecurrenceSpec
from edgeforge.reference.walk import store_reader
from exporters.onnx.target import OnnxTarget
from exporters.options import TargetOptions
from quant.program.states import states_of as states_of_program
from tests.exporters.onnx.vocabulary_cases import (
    CASES,
    CONTEXT,
    CONVOLUTION,
    FFN,
    VOCAB,
    layer,
)
from tests.oracles.lowered_spec import LoweredSpec
from tests.oracles.traced import ReferenceSession, difference

FLOAT = 2e-6  # of the range of the logits
NAMES = ("rwkv5", "rwkv6", "mamba", "delta-net")


def with_memory(heads: int, key_heads: int, rows: int, columns: int) -> LayerSpec:
    """A layer of Mamba 2 with a memory of this shape."""
    made = RecurrenceSpec(heads, key_heads, rows, columns)
    return LayerSpec(0, 0, FFN, rope=None, mixer="mamba", recurrence=made)


def opened(folder, graph: str = "model.onnx") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(folder / graph, options)


def states_of(session: onnxruntime.InferenceSession, rows: int, held: float) -> dict:
    """Empty caches, and states of layers without one that all hold one number."""
    return {
        given.name: np.full(
            [rows, *(n if isinstance(n, int) else 0 for n in given.shape[1:])], held, np.float32
        )
        for given in session.get_inputs()
        if given.name.startswith("past")
    }


def call(session: onnxruntime.InferenceSession, ids, mask, states: dict) -> tuple:
    """The logits and the states after a call."""
    outputs = [f"present.{name.partition('.')[2]}" for name in states]
    given = {"input_ids": np.array(ids), "attention_mask": np.array(mask), **states}
    logits, *after = session.run(["logits", *outputs], given)
    return logits, dict(zip(states, after, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_each_row_of_a_padded_batch_is_a_text_of_its_own(lower, case_text, name):
    made = lower(name)
    session = opened(made.folder)
    rows = [case_text[:12], case_text[12:13], case_text[13:20]]
    ids = np.stack([np.r_[row, np.full(12 - len(row), 7)] for row in rows])
    mask = np.stack([np.arange(12) < len(row) for row in rows]).astype(np.int64)
    empty = states_of(session, 1, 0.0)
    logits, states = call(session, ids, mask, states_of(session, 3, np.nan))
    for row, found in zip(rows, logits, strict=True):
        assert difference(found[0], made.reference.logits(row)[-1]) < FLOAT
    for step in ([3, 5, 2], [11, 6, 4]):  # each row goes on where its own text ended
        rows = [np.r_[row, token] for row, token in zip(rows, step, strict=True)]
        longest = max(map(len, rows))
        mask = np.stack([np.arange(longest) < len(row) for row in rows]).astype(np.int64)
        logits, states = call(session, np.array(step)[:, None], mask, states)
        for row, found in zip(rows, logits, strict=True):
            # Alone in one call, by the same kernels: the norm of a nearly empty result may enlarge
            # what kernels and the reference round differently.
            alone, _ = call(session, [row], np.ones((1, len(row)), np.int64), empty)
            assert difference(found[0], alone[0, -1]) < FLOAT
            assert difference(found[0], made.reference.logits(row)[-1]) < 5 * FLOAT


@pytest.mark.parametrize("name", NAMES)
def test_a_text_that_begins_ignores_what_the_states_hold(lower, case_text, name):
    made = lower(name)
    wanted = made.reference.logits(case_text[:10])
    for graph, held in (("model.onnx", np.inf), ("verify.onnx", np.nan), ("verify.onnx", 3.0)):
        session = opened(made.folder, graph)
        states = states_of(session, 1, held)
        logits, states = call(session, case_text[None, :9], np.ones((1, 9), np.int64), states)
        assert difference(logits[0, -1], wanted[8]) < FLOAT
        mask = np.ones((1, 10), np.int64)
        logits, states = call(session, case_text[None, 9:10], mask, states)
        assert difference(logits[0, -1], wanted[9]) < FLOAT
        assert all(np.isfinite(state).all() for state in states.values())


@pytest.mark.parametrize("graph", ["model.onnx", "verify.onnx"])
@pytest.mark.parametrize("name", ["rwkv5", "mamba"])
def test_a_row_padded_on_the_left_is_refused(lower, case_text, name, graph):
    session = opened(lower(name).folder, graph)
    mask = np.ones((2, 5), np.int64)
    mask[1, 0] = 0
    ids = np.stack([case_text[:5], case_text[5:10]])
    with pytest.raises(Exception, match=r"out of range|out of bounds|invalid ind"):
        call(session, ids, mask, states_of(session, 2, 0.0))


def test_states_have_the_names_and_shapes_that_the_manual_says(lower):
    assert {name: lower(name).lowered.states for name in ("rwkv6", "mamba")} == {
        "rwkv6": {
            f"past_key_values.{layer}.{state}": f"float[batch_size, {shape}]"
            for layer in (0, 1)
            for state, shape in (("conv_state", "64, 2"), ("recurrent_state", "4, 16, 16"))
        },
        "mamba": {
            **{
                f"past_key_values.{layer}.{state}": f"float[batch_size, {shape}]"
                for layer in (0, 2)
                for state, shape in (("conv_state", "96, 3"), ("recurrent_state", "4, 8, 16"))
            },
            "past_key_values.1.key": "float[batch_size, 2, past_length, 16]",
            "past_key_values.1.value": "float[batch_size, 2, past_length, 16]",
        },
    }


def test_a_memory_is_read_by_the_node_that_replaces_it_alone(lower):
    """So input and output may share memory: the kernel copies the one before it changes the other,
    and a row that begins gets zeros in memory of its own."""
    for name in NAMES:
        for graph in ("model.onnx", "verify.onnx"):
            nodes = onnx.load(lower(name).folder / graph, load_external_data=False).graph.node
            assert not [each for node in nodes for each in node.input if ".recurrent_state" in each]
            for node in (node for node in nodes if node.op_type == "If"):
                (layer,) = re.findall(r"present\.(\d+)\.recurrent_state", node.output[1])
                then, other = (attribute.g.node for attribute in sorted_branches(node))
                past = f"past_key_values.{layer}.recurrent_state"
                assert [n.op_type for n in then if past in n.input] == ["Where"]
                assert [(n.op_type, n.input[3]) for n in other] == [("LinearAttention", past)]


def sorted_branches(node: onnx.NodeProto) -> list[onnx.AttributeProto]:
    """The branch for rows that begin, and the one for the others."""
    return sorted(node.attribute, key=lambda attribute: attribute.name, reverse=True)


@pytest.mark.parametrize("name", ["rwkv6", "delta-net"])
def test_a_text_in_many_calls_leaves_the_memory_of_one_call(lower, case_text, name):
    session = opened(lower(name).folder)
    mask = np.ones((1, CONTEXT), np.int64)
    _, whole = call(session, case_text[None], mask, states_of(session, 1, 0.0))
    states, at = states_of(session, 1, 0.0), 0
    for size in (7, 1, 1, 30, 1, 8):
        at += size
        _, states = call(session, case_text[None, at - size : at], mask[:, :at], states)
    for name, state in whole.items():
        assert difference(states[name], state) < FLOAT


@pytest.mark.parametrize("name", ["rwkv6", "mamba"])
def test_onnxruntime_genai_keeps_the_states(lower, tmp_path, name):
    """A batch of unequal prompts, and a prompt in two chunks."""
    from tests.oracles.genai import genai_greedy, genai_steps

    made, folder = lower(name), tmp_path / "made"
    shutil.copytree(made.folder, folder)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["type"] == "llama"
    config["model"] |= {"eos_token_id": [VOCAB - 1], "pad_token_id": VOCAB - 1}
    (folder / "genai_config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(3)
    rows = [draw.integers(0, VOCAB - 1, count).tolist() for count in (1, 23, 9)]
    logits, tokens = genai_steps(folder, rows, 3)
    for index, row in enumerate(rows):
        wanted = made.reference.logits(np.array([*row, *tokens[index]]))
        for step, found in enumerate(logits):
            assert difference(found[index], wanted[len(row) - 1 + step]) < FLOAT
    text = [*rows[1], *genai_greedy(folder, rows[1][:9], rows[1][9:], count=12)]
    greedy = made.reference.logits(np.array(text)).argmax(1)
    assert text[23:] == greedy[22:-1].tolist()


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (with_memory(4, 2, 8, 16), None),
        (
            with_memory(8, 2, 8, 8),
            "must have memories of one shape there, and layer 0 has 4 x 8 x 16 and layer 2 has "
            "8 x 8 x 8",
        ),
        (
            with_memory(4, 1, 16, 16),
            "must have memories of one shape there, and layer 0 has 4 x 8 x 16 and layer 2 has "
            "4 x 16 x 16",
        ),
        (
            with_memory(4, 4, 8, 16),
            "must have states of recent tokens of one shape there, and layer 0 has 96 x 3 and "
            "layer 2 has 128 x 3",
        ),
        (CONVOLUTION, "layer 2 is a short convolution beside layers with a recurrence"),
    ],
)
def test_states_that_onnxruntime_genai_cannot_load_are_told(case_text, tmp_path, last, reason):
    """ONNX Runtime alone runs the graph, whatever the states' shapes."""
    from tests.oracles.genai import genai_greedy

    spec = replace(CASES["mamba"], layers=(with_memory(4, 2, 8, 16), layer(), last)).spec()
    source, folder = LoweredSpec(spec, tmp_path / "store", "fp32", CONTEXT), tmp_path / "made"
    lowered = source.write(OnnxTarget(), folder)
    reference = ReferenceSession(source.program, store_reader(source.store))
    wanted = reference.logits(case_text)
    assert difference(OnnxSession(folder, CONTEXT, 1).logits(case_text), wanted) < FLOAT
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"] |= {"eos_token_id": [VOCAB - 1], "pad_token_id": VOCAB - 1}
    (folder / "genai_config.json").write_text(json.dumps(config))
    told = [each for each in lowered.warnings if "cannot load this artifact" in each]
    if reason is None:
        assert told == []
        assert len(genai_greedy(folder, [3, 5, 7], count=2)) == 2
        return
    (sentence,) = told
    assert reason in sentence
    with pytest.raises(Exception, match=r"invalid dimensions for input|Missing Input"):
        genai_greedy(folder, [3, 5, 7], count=2)


def test_a_session_keeps_the_states_of_one_text(lower, case_text):
    made = lower("mamba")
    wanted = made.reference.logits(case_text)
    session = OnnxSession(made.folder, CONTEXT, 1)
    session.extend(case_text[20:40])
    session.reset()
    session.extend(case_text[:6])
    # Neither another text in between nor a call that is refused changes what the states hold.
    session.logits(case_text[30:41])
    with pytest.raises(DeviceError, match="no token -1"):
        session.extend(np.array([4, -1]))
    assert difference(session.extend(case_text[6:7]), wanted[6]) < FLOAT


def test_a_stripped_artifact_gives_all_logits_beside_the_text_in_hand(lower, case_text, tmp_path):
    made = lower("rwkv6")
    made.source.write(OnnxTarget(), tmp_path / "made", options=TargetOptions(strip=True))
    assert not (tmp_path / "made" / "verify.onnx").exists()
    wanted = made.reference.logits(case_text)
    session = OnnxSession(tmp_path / "made", CONTEXT, 1)
    session.extend(case_text[:6])
    assert difference(session.logits(case_text), wanted) < FLOAT
    assert difference(session.extend(case_text[6:7]), wanted[6]) < FLOAT


def test_int8_caches_beside_memories(lower, case_text, tmp_path):
    """Memories stay float32; the codes of keys and values are fine enough to change little."""
    made, folder = lower("mamba"), tmp_path / "made"
    ranges = {
        state.name: np.full((2, 16), 4.0, np.float32)
        for state in states_of_program(made.source.program)
        if state.kind == "cache"
    }
    options = TargetOptions(kv_cache="int8")
    lowered = made.source.write(OnnxTarget(), folder, options=options, cache_ranges=ranges)
    assert {name: kind.split("[")[0] for name, kind in lowered.states.items()} == {
        **{f"past_key_values.1.{part}": "int8" for part in ("key", "value")},
        **{
            f"past_key_values.{layer}.{state}": "float"
            for layer in (0, 2)
            for state in ("conv_state", "recurrent_state")
        },
    }
    wanted = made.reference.logits(case_text)
    session = OnnxSession(folder, CONTEXT, 1)
    session.extend(case_text[:20])
    found = difference(session.extend(case_text[20:21]), wanted[20])
    assert 0 < found < 0.02
    assert difference(session.logits(case_text), wanted) < 0.02


def test_the_manifest_says_what_a_graph_has_and_keeps(lower):
    notes = " ".join(lower("rwkv6").lowered.notes)
    assert "in 2 layers a memory is kept in float32, which LinearAttention reads and" in notes
    assert "outside of the fused kernels: shifts of tokens (4), biases" in notes
    tables = {table.title: table for table in OnnxTarget().structure(lower("mamba").folder)}
    graphs = ("model.onnx", "verify.onnx")
    assert tables["Recent tokens"].rows == tuple((graph, "float", 3, 2) for graph in graphs)
    assert tables["Memories"].rows == tuple((graph, "float", 4, 8, 16, 2) for graph in graphs)
    counted = {row[:2]: row[2] for row in tables["Operators"].rows}
    assert counted["model.onnx", "com.microsoft::LinearAttention"] == 4  # in both branches
    assert counted["model.onnx", "ai.onnx::If"] == 2
