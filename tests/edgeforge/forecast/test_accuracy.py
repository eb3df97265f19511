"""The figures of accuracy that ship are those of the page of benchmarks."""

import re
from pathlib import Path

from edgeforge.forecast.accuracy import _measured, measured_kl, measured_model
from quant.plans.recipes import RECIPES

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks" / "quality.md"
# The plans of these recipes follow the target; a row is of the targets that are exported together.
ROWS = {"onnx": "ONNX", "coreml": "Core ML and ONNX", "executorch": "all targets"}


def rows_of_the_page():
    text = PAGE.read_text("utf-8")
    table = text.partition("<!-- begin recipes -->")[2].partition("<!-- end recipes -->")[0]
    heading, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    at = heading.index("SmolLM2-135M: bits") + 1
    return {row[0]: row[at].split(" ")[0] for row in rows[1:]}


def test_every_figure_is_the_pages():
    page, used = rows_of_the_page(), set()
    for recipe, by_target in _measured()["kl_mean"].items():
        assert recipe in RECIPES
        for target, figure in by_target.items():
            label = f"`{recipe}`" + (f", {ROWS[target]}" if target else "")
            assert float(page[label]) == figure, label
            used.add(label)
    left = {label for label, figure in page.items() if figure != "-"} - used
    assert all("mixed" in label for label in left), f"the page has more figures: {left}"


def test_a_figure_of_one_target_is_no_other_targets():
    assert measured_model() == "SmolLM2-135M-Instruct"
    assert measured_kl("int4", "onnx") != measured_kl("int4", "executorch")
    assert measured_kl("int4-gptq", "coreml") is None
    assert re.fullmatch(r"0\.00\d+", str(measured_kl("int8-g32", "coreml")))
