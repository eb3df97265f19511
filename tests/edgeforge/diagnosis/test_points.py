"""The points of a program: every layer's mixer and the stream after it, whatever stands between."""

from __future__ import annotations

import pytest

from edgeforge.diagnosis.points import Point, program_points
from quant.program import dialect
from tests.oracles.vocabulary import MIXTURES, RECURRENT, SPECS
from tests.oracles.vocabulary_models import program_of

HERE = SPECS | MIXTURES | RECURRENT
PARTS = {"attention": "attention", "short_conv": "convolution"}


@pytest.mark.parametrize("name", HERE)
def test_every_layer_has_two_points(name):
    found = program_points(program_of(HERE[name]))
    wanted = []
    for index, layer in enumerate(HERE[name].layers):
        mixer = PARTS.get(layer.mixer, "recurrence")
        wanted += [Point(index, mixer), Point(index, "layer")]
    assert sorted(found.values()) == sorted(wanted)
    for node, point in found.items():
        kinds = {
            "attention": (dialect.COMBINE if _mixes_heads(name, point) else dialect.ATTENTION,),
            "convolution": (dialect.MUL,),
            # Mamba normalises before its last product, and the others gate.
            "recurrence": (dialect.MUL, dialect.RMS_NORM, dialect.GAIN),
            "layer": (dialect.ADD,),
        }
        assert node.target in kinds[point.part]
    # The last point is the residual stream that the last norm reads.
    assert {user.target for user in list(found)[-1].users} <= {
        dialect.RMS_NORM,
        dialect.LAYER_NORM,
    }


def _mixes_heads(name: str, point: Point) -> bool:
    return HERE[name].layers[point.layer].attention_experts > 0


def test_the_point_of_a_mixture_of_heads_is_before_its_bias():
    found = program_points(program_of(MIXTURES["heads-and-mixture"]))
    for node, point in found.items():
        if point.part == "attention":
            assert {user.target for user in node.users} == {dialect.BIAS}


def test_a_convolution_is_named():
    assert str(Point(3, "convolution")) == "layer 3, convolution"
