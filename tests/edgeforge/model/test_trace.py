"""A traced program: what it calls, what it is fed, and what tracing costs."""

import subprocess
import sys

import pytest

from edgeforge.families.registry import FAMILIES, read_spec
from edgeforge.families.spec import convolved_columns
from edgeforge.model.rwkv import GROUP_NORM_EPS
from edgeforge.model.trace import trace
from edgeforge.synth.synthesise import PRESETS
from quant.program.dialect import FLOAT_DIALECT, check_float
from quant.program.head import head_of
from quant.program.program import node_argument, shape_of
from tests.oracles.vocabulary import RECURRENT

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = [name for name in PRESETS if name.startswith("tiny-")]


@pytest.fixture(scope="module")
def programs():
    """Each tiny preset's spec and its program for a context of 40 tokens."""
    specs = {name: read_spec(PRESETS[name].config) for name in TINY}
    return {name: (spec, trace(spec, 40)) for name, spec in specs.items()}


def calls(program, word):
    return [n for n in program.graph.nodes if n.op == "call_function" and word in str(n.target)]


def calls_of(node, word):
    return node.op == "call_function" and word in str(node.target)


def test_every_family_is_traced(programs):
    assert {spec.model_type for spec, _ in programs.values()} == set(FAMILIES)


@pytest.mark.parametrize("preset", TINY)
def test_a_program_speaks_the_float_dialect_alone(preset, programs):
    _, program = programs[preset]
    check_float(program)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert targets < FLOAT_DIALECT
    assert len(targets) >= 11


def test_all_of_the_dialect_is_spoken_by_some_family(programs):
    spoken = {
        node.target
        for program in (
            *(program for _, program in programs.values()),
            *(trace(RECURRENT[name], 40) for name in RECURRENT),
        )
        for node in program.graph.nodes
        if node.op == "call_function"
    }
    assert spoken == FLOAT_DIALECT


@pytest.mark.parametrize("preset", TINY)
def test_inputs_are_the_specs_weights_tables_and_caches(preset, programs):
    spec, program = programs[preset]
    weights = {given.name: shape_of(node) for node, given in program.placeholders("weight")}
    assert weights == {name: weight.shape for name, weight in spec.weights.items()}
    assert ("lm_head.weight" in weights) == (not spec.tied)
    caches = {given.name: shape_of(node) for node, given in program.placeholders("cache")}
    assert caches == {
        f"model.layers.{index}.self_attn.{part}_cache": (1, layer.num_kv_heads, 40, spec.head_dim)
        for index, layer in enumerate(spec.layers)
        for part in ("k", "v")
        if layer.mixer == "attention"
    }
    recent = {given.name: shape_of(node) for node, given in program.placeholders("recent")}
    convolved = {"short_conv": "conv", "mamba": "mamba", "delta_net": "linear_attn"}
    shifted = (1, spec.hidden_size, 1)
    wanted = {}
    for index, layer in enumerate(spec.layers):
        at = f"model.layers.{index}"
        if layer.mixer in convolved:
            shape = (1, convolved_columns(spec, layer), spec.conv_width - 1)
            wanted[f"{at}.{convolved[layer.mixer]}.recent"] = shape
        if layer.mixer == "time_mix":
            wanted |= {f"{at}.time_mix.recent": shifted, f"{at}.mlp.recent": shifted}
    assert recent == wanted
    memories = [shape_of(node) for node, _ in program.placeholders("memory")]
    made = [layer.recurrence for layer in spec.layers if layer.recurrence is not None]
    assert memories == [(1, each.heads, each.key_width, each.value_width) for each in made]
    tables = {given.name: shape_of(node) for node, given in program.placeholders("table")}
    assert tables == {name: tuple(table.shape) for name, table in program.tables.items()}
    assert set(tables.values()) == {(40, rope.width // 2) for rope in spec.ropes}
    assert len(tables) == 2 * len(spec.ropes)
    assert [shape_of(node) for node, _ in program.placeholders("tokens")] == [(1, -1)]
    assert [shape_of(node) for node, _ in program.placeholders("position")] == [(1,)]
    assert shape_of(program.output()) == (1, -1, spec.vocab_size)


@pytest.mark.parametrize("preset", TINY)
def test_operators_carry_the_dimensions_of_their_layer(preset, programs):
    spec, program = programs[preset]
    attentions = calls(program, "attention")
    layers = [layer for layer in spec.layers if layer.mixer == "attention"]
    assert len(attentions) == len(layers)
    for node, layer in zip(attentions, layers, strict=True):
        assert shape_of(node_argument(node, 0)) == (1, -1, layer.num_heads, spec.head_dim)
        assert shape_of(node_argument(node, 1)) == (1, -1, layer.num_kv_heads, spec.head_dim)
        assert node.args[6] == (layer.window if 0 < layer.window < 40 else 0)
        assert node.args[7:] == (pytest.approx(spec.scale), spec.attention_softcap)
        for side in (0, 1):
            rotated = calls_of(node_argument(node, side), "rope")
            assert rotated == (layer.rope is not None)
    norms = calls(program, "rms_norm" if spec.norm == "rms" else "layer_norm")
    by_layer = {"pre": 2, "post": 2, "sandwich": 4, "parallel": 1}[spec.block]
    of_heads = 2 * len(layers) if spec.qk_norm else 0
    of_results = sum(layer.recurrence is not None for layer in spec.layers)
    of_embedding = "model.embedding_norm.weight" in spec.weights
    assert len(norms) == 1 + len(spec.layers) * by_layer + of_heads + of_results + of_embedding
    mixes = any(layer.mixer == "time_mix" for layer in spec.layers)
    assert {node.args[-1] for node in norms} == {spec.norm_eps} | (
        {GROUP_NORM_EPS} if mixes else set()
    )


def test_a_window_as_wide_as_the_context_is_none(programs):
    spec, _ = programs["tiny-mistral"]
    assert spec.window == 32
    for context, window in ((31, 0), (32, 0), (33, 32)):
        assert {n.args[6] for n in calls(trace(spec, context), "attention")} == {window}


def test_only_the_head_reads_a_tied_embedding_whole(programs):
    for spec, program in programs.values():
        head = head_of(program)
        weight = program.inputs[node_argument(head, 1).name].name
        assert weight == ("model.embed_tokens.weight" if spec.tied else "lm_head.weight")


@pytest.mark.parametrize("context", [1, 2, 3, 5])
def test_the_shortest_contexts_trace(context, programs):
    spec, _ = programs["tiny-llama2"]
    program = trace(spec, context)
    check_float(program)
    assert program.context == context
    assert all(len(table) == context for table in program.tables.values())


def test_the_same_spec_gives_the_same_program(programs):
    spec, program = programs["tiny-openelm"]
    again = trace(spec, 40)
    assert [str(n) for n in again.graph.nodes] == [str(n) for n in program.graph.nodes]
    assert again.inputs == program.inputs


@pytest.mark.artifact
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_tracing_eight_billion_weights_allocates_none():
    script = """
import torch
torch.set_num_threads(1)
from edgeforge.families.registry import read_spec
from edgeforge.families.spec import convolved_columns
from edgeforge.model.rwkv import GROUP_NORM_EPS
from edgeforge.synth.synthesise import PRESETS
from edgeforge.model.trace import trace

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

trace(read_spec(PRESETS["tiny-llama"].config), 64)
before = peak()
spec = read_spec(PRESETS["llama-3-8b"].config)
program = trace(spec, 8192)
print(spec.num_parameters, len(program.inputs), peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    parameters, inputs, kib = map(int, run.stdout.split())
    assert parameters == 8_030_261_248
    # Tokens, position, two tables; by layer seven weights and two caches; three more weights.
    assert inputs == 4 + 32 * 9 + 3
    assert kib * 1024 < 200e6
