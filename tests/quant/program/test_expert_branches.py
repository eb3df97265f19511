"""A traced mixture's branches: what each holds, and that nothing outside reads into one."""

from __future__ import annotations

import pytest
from torch import fx

from edgeforge.families.registry import read_spec
from edgeforge.families.spec import ModelSpec
from edgeforge.model.trace import trace
from quant.program import dialect
from quant.program.expert_branches import mixtures
from quant.program.program import node_argument, shape_of
from tests.oracles.tiny_families import MIXTURES as FAMILIES
from tests.oracles.vocabulary import CONTEXT, HIDDEN, MIXTURES, SPECS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def programs():
    return {name: (spec, trace(spec, CONTEXT)) for name, spec in MIXTURES.items()}


def groups_of(spec: ModelSpec) -> list[tuple[str, int, tuple[str, ...], int]]:
    """The groups of branches in the program's order: place, experts, matrices, result's width."""
    found = []
    for index, layer in enumerate(spec.layers):
        at, kv = f"model.layers.{index}.", layer.num_kv_heads * spec.head_dim
        heads = layer.attention_experts
        found += [(f"{at}self_attn.", heads, ("q_proj",), kv)] * bool(heads)
        found += [(f"{at}self_attn.", heads, ("o_proj",), HIDDEN)] * bool(heads)
        parts = "gate_up_proj", "down_proj"
        found += [(f"{at}mlp.", layer.experts, parts, HIDDEN)] * bool(layer.experts)
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_every_mixture_has_a_branch_for_each_expert(name, programs):
    spec, program = programs[name]
    dialect.check_float(program)
    found, wanted = list(mixtures(program).values()), groups_of(spec)
    assert len(found) == len(wanted)
    for mixture, (at, experts, parts, width) in zip(found, wanted, strict=True):
        assert [branch.expert for branch in mixture.branches] == list(range(experts))
        assert mixture.weights.target in dialect.ROUTES
        assert shape_of(mixture.weights) == (1, -1, experts)
        for branch in mixture.branches:
            weights = [program.inputs[n.name].name for n in weights_of(branch.nodes)]
            assert weights == [f"{at}experts.{branch.expert}.{part}.weight" for part in parts]
            assert branch.result is branch.nodes[-1]
            assert shape_of(branch.result) == (1, -1, width)
            assert node_argument(branch.chosen, 0) is mixture.source
            assert node_argument(branch.chosen, 1) is mixture.weights


def test_a_mixture_of_heads_is_two_groups_of_branches_with_one_choice(programs):
    spec, program = programs["heads-and-mixture"]
    layer = spec.layers[0]
    queries, outputs, feed_forward = list(mixtures(program).values())[:3]
    assert (queries.reads_slots, queries.fills_slots) == (False, True)
    assert (outputs.reads_slots, outputs.fills_slots) == (True, False)
    assert (feed_forward.reads_slots, feed_forward.fills_slots) == (False, False)
    slots = layer.chosen_attention_experts, layer.num_kv_heads
    assert (queries.slots, outputs.slots, feed_forward.slots) == (slots, slots, (0, 0))
    assert queries.weights is outputs.weights is not feed_forward.weights
    width = layer.num_kv_heads * spec.head_dim
    assert shape_of(queries.combine) == (1, -1, slots[0] * width)
    assert outputs.source.target is dialect.ATTENTION
    assert shape_of(outputs.source) == (1, -1, slots[0] * width)
    assert [shape_of(each.chosen) for each in outputs.branches] == [(1, -1, width)] * 5
    (biased,) = outputs.combine.users
    assert biased.target is dialect.BIAS


def weights_of(nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
    return [source for n in nodes for source in n.all_input_nodes if source.op == "placeholder"]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_branch_is_closed(name, programs):
    """Only what gathers reads a branch, which reads weights and its own tokens alone."""
    for mixture in mixtures(programs[name][1]).values():
        for branch in mixture.branches:
            inside = {branch.chosen, *branch.nodes}
            assert set(branch.result.users) == {mixture.combine}
            for node in branch.nodes:
                assert all(s in inside or s.op == "placeholder" for s in node.all_input_nodes)
                if node is not branch.result:
                    assert set(node.users) <= inside
            assert set(branch.chosen.users) <= inside


def test_no_program_holds_the_operator_that_stands_for_experts_while_tracing(programs):
    for _, program in programs.values():
        stacked = ("experts.default", "expert_queries.default", "expert_outputs.default")
        assert not [n for n in program.graph.nodes if str(n.target).endswith(stacked)]


def test_a_dense_program_has_no_mixtures():
    assert mixtures(trace(SPECS["plain"], CONTEXT)) == {}


def test_families_of_mixtures_differ_in_their_routers():
    found = {}
    for family, config in FAMILIES.items():
        (first, *_) = mixtures(trace(read_spec(config), CONTEXT)).values()
        found[family] = (first.weights.target, first.weights.args[1:])
    route, mixer = dialect.ROUTE, dialect.ROUTE_SPARSE_MIXER
    assert found == {
        "mixtral": (route, (2, True)),
        "qwen3_moe": (route, (3, True)),
        "olmoe": (route, (4, False)),
        "granitemoe": (route, (3, True)),
        "phimoe": (mixer, (0.05,)),
        "qwen2_moe": (route, (3, False)),
        "jetmoe": (route, (3, True)),
    }
