"""Markdown: a summary whose tables nobody's name can break."""

import re

from edgeforge.gate.outputs.markdown import markdown


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]


def test_the_tables_hold_figures_bounds_and_the_baseline(failed):
    text = markdown(failed)
    assert text.startswith("## edgeforge check failed: 3 violations\n")
    assert "### Failed: out/onnx" in text
    found = [[cell.strip() for cell in row] for row in rows(text)]
    assert [
        "**failed**",
        "`total.kl_mean`",
        "0.0362",
        "0.018",
        "+0.0182 \\[+0.0171, +0.0195\\]",
        "+0.00018",
    ] in found
    assert [
        "**failed**",
        "`total.kl_mean`",
        "0.0362 \\[0.031, 0.041\\]",
        "at most 0.02",
        "block 3, token 17, model.layers.2.mlp.down\\_proj.weight",
    ] in found
    assert {len(row) for row in found} == {5, 6}
    assert "Note: a note" in text


def test_what_passes_says_so(sound):
    assert markdown(sound).startswith("## edgeforge check passed\n")
