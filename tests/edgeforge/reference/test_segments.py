"""Second moments of a program's values: NumPy's, in which no token counts beyond a bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeforge.model.model import open_model
from edgeforge.model.trace import trace
from edgeforge.reference.segments import LARGEST_ENERGY, Stretches
from edgeforge.reference.walk import Walk
from edgeforge.synth.synthesise import synthesise
from quant.errors import QuantizationError
from quant.program import dialect


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Returns a function that gives the run over the rows of a table, and the embedding's call."""
    folder = tmp_path_factory.mktemp("synth") / "m"
    program = trace(open_model(str(synthesise("tiny-phi-3", folder))).spec, 24)

    def run(table: torch.Tensor, into) -> tuple[Stretches, torch.fx.Node]:
        walk = Walk(program, lambda given: table, lambda name, tokens: table[tokens])
        blocks = [walk.begin(torch.arange(24 * i, 24 * (i + 1))) for i in range(4)]
        stretches = Stretches(walk, blocks, into, 1 << 30)
        place = [node.target for node in walk.order].index(dialect.EMBEDDING)
        stretches.run(walk.order[: place + 1])
        return stretches, walk.order[place]

    return run


def test_a_token_of_massive_activations_counts_as_the_bound_allows(walked, tmp_path):
    table = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    table[0] *= 1000.0
    table[30] *= 5.0  # 25 times the energy, above the bound too
    table[50] *= 3.0  # below it
    stretches, node = walked(table, tmp_path / "spilled")
    rows = table.double().numpy()
    energy = np.square(rows).mean(1)
    most = LARGEST_ENERGY * np.sort(energy)[47]  # of two middle ones, torch takes the lower
    tamed = rows * np.sqrt(np.minimum(1.0, most / energy))[:, None]
    found = stretches.second_moment(node, "w")
    np.testing.assert_allclose(found.numpy(), tamed.T @ tamed / 96, rtol=1e-4, atol=1e-5)
    whole = stretches.statistics(node, "w")
    np.testing.assert_allclose(whole.moment.numpy(), rows.T @ rows / 96, rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(whole.largest.numpy(), table.abs().amax(0).numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_and_zeros_are_not(walked, tmp_path, value):
    table = torch.zeros(96, 32)
    table[3, 5] = 2.0
    stretches, node = walked(table, tmp_path / "zeros")
    assert float(stretches.second_moment(node, "w")[5, 5]) == pytest.approx(4.0 / 96)
    table[7, 1] = value
    stretches, node = walked(table, tmp_path / "spilled")
    with pytest.raises(QuantizationError, match="inputs of w are NaN or infinite"):
        stretches.second_moment(node, "w")
