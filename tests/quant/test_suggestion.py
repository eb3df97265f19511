"""Only a slip of typing is suggested, never a name that is merely similar."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.plans.recipes import RECIPES
from quant.suggestion import did_you_mean, nearest, slips


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("int-4", "int4"),
        ("INT4", "int4"),
        ("itn4", "int4"),
        ("in4", "int4"),
        ("intt4", "int4"),
        ("int4-g23", "int4-g32"),
        ("int4-g128-gtpq", "int4-g128-gptq"),
        ("w8a8-statci", "w8a8-static"),
        ("int4_g32", "int4-g32"),
    ],
)
def test_a_slip_of_typing_is_mended(name, found):
    assert nearest(name, RECIPES) == found
    assert did_you_mean(name, RECIPES) == f" (did you mean {found!r}?)"


@pytest.mark.parametrize(
    "name", ["", "i", "q4_k_m", "nf4", "bnb", "awq", "gptq", "int4-g32-best", "mixed", "float8"]
)
def test_what_is_merely_similar_is_not_suggested(name):
    assert nearest(name, RECIPES) is None and did_you_mean(name, RECIPES) == ""


def test_the_fewest_slips_win_and_a_star_stands_for_anything():
    assert nearest("lut44-gptq", ["lut4-gptq", "lut44gptq"]) == "lut44gptq"
    assert nearest("*.donw_proj.*", ["a.up_proj.weight", "a.down_proj.weight"]) == (
        "a.down_proj.weight"
    )
    assert nearest("*.experts.*", ["a.up_proj.weight", "a.down_proj.weight"]) is None


def test_a_text_of_any_length_is_answered_at_once():
    assert nearest("*a" * 500_000, RECIPES) is None and nearest("a" * 10**6, RECIPES) is None


def distance(a: str, b: str) -> int:
    """Optimal string alignment by its recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    best = min(
        distance(a[1:], b) + 1,
        distance(a, b[1:]) + 1,
        distance(a[1:], b[1:]) + (a[0] != b[0]),
    )
    if len(a) > 1 and len(b) > 1 and a[0] == b[1] and a[1] == b[0]:
        best = min(best, distance(a[2:], b[2:]) + 1)
    return best


@given(st.text("abc", max_size=5), st.text("abc", max_size=5), st.integers(0, 3))
def test_slips_are_the_distance_of_optimal_string_alignment(name, known, allowed):
    expected = distance(name, known)
    assert slips(name, known, allowed) == (expected if expected <= allowed else None)
