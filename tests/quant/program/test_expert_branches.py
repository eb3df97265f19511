"""A traced mixture's branches: what each holds, and that nothing outside reads into one."""

from __future__ import annotations

import pytest
from torch import fx

from edgeforge.families.registry import read_spec
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


@pytest.mark.parametrize("name", MIXTURES)
def test_every_sparse_layer_has_a_branch_for_each_expert(name, programs):
    spec, program = programs[name]
    dialect.check_float(program)
    sparse = [(index, layer) for index, layer in enumerate(spec.layers) if layer.experts]
    found = list(mixtures(program).values())
    assert len(found) == len(sparse)
    for mixture, (index, layer) in zip(found, sparse, strict=True):
        assert [branch.expert for branch in mixture.branches] == list(range(layer.experts))
        assert mixture.weights.target in dialect.ROUTES
        assert shape_of(mixture.weights) == (1, -1, layer.experts)
        for branch in mixture.branches:
            weights = [program.inputs[n.name].name for n in weights_of(branch.nodes)]
            at = f"model.layers.{index}.mlp.experts.{branch.expert}."
            assert weights == [f"{at}gate_up_proj.weight", f"{at}down_proj.weight"]
            assert branch.result is branch.nodes[-1]
            assert shape_of(branch.result) == (1, -1, HIDDEN)
            assert node_argument(branch.chosen, 0) is mixture.source
            assert node_argument(branch.chosen, 1) is mixture.weights


def weights_of(nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
    return [source for n in nodes for source in n.all_input_nodes if source.op == "placeholder"]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_branch_is_closed(name, programs):
    """Only ``combine`` reads a branch, and a branch reads weights and its own tokens alone."""
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
        assert not [n for n in program.graph.nodes if "experts.default" in str(n.target)]


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
    }
