"""The table of algorithms says of each what its code can do."""

from __future__ import annotations

import pytest

from quant.formats.formats import FloatFormat, IntFormat, PaletteFormat, parse_format
from quant.plans.algorithms import (
    ALGORITHMS,
    POSITIVE,
    SCALES_INPUTS,
    algorithms_for,
    is_calibrated,
    known_algorithms,
)
from quant.quantizers.registry import (
    CALIBRATED,
    CALIBRATED_PALETTIZERS,
    PALETTIZERS,
    QUANTIZERS,
    RESCALING,
)

REGISTRIES = (QUANTIZERS, PALETTIZERS, CALIBRATED, CALIBRATED_PALETTIZERS)


def test_it_lists_what_the_registries_hold_and_nothing_else():
    assert set(known_algorithms()) == {name for registry in REGISTRIES for name in registry}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_flags_are_those_of_the_code(name):
    given = ALGORITHMS[name]
    assert given.integers == (name in QUANTIZERS or name in CALIBRATED)
    assert given.palettes == (name in PALETTIZERS or name in CALIBRATED_PALETTIZERS)
    assert given.calibrated == (name in CALIBRATED or name in CALIBRATED_PALETTIZERS)
    assert given.rescales == (name in RESCALING)
    assert is_calibrated(name) == given.calibrated


def test_what_fills_a_format_is_named_in_order():
    assert algorithms_for(parse_format("int4-g32")) == (*QUANTIZERS, *CALIBRATED)
    assert set(algorithms_for(parse_format("lut4-gc16"))) == {
        *PALETTIZERS,
        *CALIBRATED_PALETTIZERS,
    }
    assert algorithms_for(parse_format("lut4-gc16"))[0] == next(iter(PALETTIZERS))
    assert algorithms_for(parse_format("fp16")) == ("cast",)
    kinds = {type(parse_format(name)) for name in ("int4-g32", "lut4-gc16", "fp16")}
    assert kinds == {IntFormat, PaletteFormat, FloatFormat}


def test_every_algorithm_of_negative_scales_names_one_without():
    for name, positive in POSITIVE.items():
        assert ALGORITHMS[positive].positive is None
        assert ALGORITHMS[positive].calibrated == ALGORITHMS[name].calibrated
    assert set(SCALES_INPUTS) == {*QUANTIZERS, *RESCALING}
