"""Activations come back as they were put, whether memory or the disk keeps them."""

import pytest
import torch
from torch import fx

from edgeforge.reference.spilled_values import Activations


@pytest.fixture
def nodes() -> list[fx.Node]:
    graph = fx.Graph()
    return [graph.placeholder(name) for name in ("a", "b", "c", "d")]


@pytest.mark.parametrize("bound", [0, 300, 1 << 20])
def test_values_come_back(tmp_path, nodes, bound):
    first, second, tokens, number = nodes
    blocks = [
        {
            first: torch.arange(20.0).reshape(1, 4, 5) + index,
            second: torch.arange(60.0).reshape(1, 4, 15)[..., 5:10],
            tokens: torch.tensor([[1, 2]]),
            number: 7 + index,
        }
        for index in range(3)
    ]
    kept = Activations([{}] * 3, tmp_path, bound)
    for index, values in enumerate(blocks):
        kept.put(index, values)
    on_disk = len(list(tmp_path.iterdir()))
    assert on_disk == {0: 6, 300: 3, 1 << 20: 0}[bound]
    assert [float(t[0, 0, 0]) for t in kept.tensors(first)] == [0.0, 1.0, 2.0]
    assert kept.numbers(2) == {"d": 9}
    for index, values in enumerate(blocks):
        found = kept.take(index)
        assert found.keys() == values.keys() and found[number] == values[number]
        for node in (first, second, tokens):
            assert torch.equal(found[node], values[node])
        kept.put(index, {})
    assert not list(tmp_path.iterdir())


def test_a_view_does_not_keep_alive_what_it_is_a_view_of(tmp_path, nodes):
    kept = Activations([{}], tmp_path, 1 << 20)
    kept.put(0, {nodes[0]: torch.zeros(1, 8, 1000)[..., :2]})
    assert kept.tensor(0, nodes[0]).untyped_storage().nbytes() == 64
