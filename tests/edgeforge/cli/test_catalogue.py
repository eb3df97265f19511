"""What is listed: every row of every registry, with a line about it."""

import pytest

from edgeforge.cli.catalogue import catalogue
from edgeforge.errors import UsageError
from edgeforge.families.registry import FAMILIES
from edgeforge.forecast.profiles import load_profiles
from edgeforge.model.rotations import ROTATIONS
from edgeforge.planning.choose import PLANNED
from edgeforge.synth.synthesise import PRESETS
from exporters.registry import TARGETS
from quant.plans.recipes import RECIPES

REGISTRIES = {
    "families": FAMILIES,
    "recipes": {**RECIPES, **PLANNED},
    "rotations": ROTATIONS,
    "targets": TARGETS,
    "presets": PRESETS,
    "phones": load_profiles().phones,
}


@pytest.mark.parametrize("what", REGISTRIES)
def test_every_row_of_a_registry_is_listed_with_a_line(what):
    rows = catalogue(what)
    assert list(rows) == list(REGISTRIES[what])
    for about in rows.values():
        assert about and "\n" not in about and about == about.strip() and not about.endswith(".")


def test_families_and_presets_tell_what_they_are():
    assert "Llama" in catalogue("families")["llama"]
    assert catalogue("presets")["openelm-270m"] == "271,527,168 parameters, openelm"


def test_another_list_is_refused_with_the_nearest():
    with pytest.raises(UsageError) as caught:
        catalogue("recipies")
    assert str(caught.value) == (
        "there is no list of 'recipies' (did you mean 'recipes'?); "
        "known: families, recipes, rotations, targets, presets, phones, coreml-operations"
    )
    with pytest.raises(UsageError, match=r"no list of 'zzz'; known"):
        catalogue("zzz")
