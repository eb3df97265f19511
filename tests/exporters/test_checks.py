"""Palettes are for targets that read them: others refuse by name, before any work."""

import pytest

from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from exporters.checks import refuse_palettes
from exporters.errors import ExportError
from exporters.registry import find_target
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment, QuantPlan


def plan(*formats: str) -> QuantPlan:
    rows = {f"w{i}": Assignment(parse_format(name), "any") for i, name in enumerate(formats)}
    return QuantPlan("mine", rows)


def test_integers_and_floats_pass():
    refuse_palettes(plan("int4-g32", "int8-pc", "fp16", "fp32"), "XNNPACK")


@pytest.mark.parametrize(("format", "use"), [("lut4-gc16", "int4-g32"), ("lut6-pt", "int8-pc")])
def test_a_palette_is_refused_with_what_to_use(format, use):
    words = f"w1 is to be {format}; XNNPACK has no kernel for palettes, .*: use {use}$"
    with pytest.raises(ExportError, match=words):
        refuse_palettes(plan("int8-pc", format), "XNNPACK")


@pytest.mark.parametrize(
    ("target", "runtime"), [("onnx", "ONNX Runtime"), ("executorch", "XNNPACK")]
)
def test_targets_refuse_before_any_work(target, runtime, tmp_path):
    stages = []
    with pytest.raises(ExportError, match=f"embed_tokens.*lut4-gc16; {runtime} has no kernel"):
        export(
            open_model("demo"),
            [find_target(target)],
            tmp_path / "out",
            ExportOptions(recipe="lut4"),
            lambda *stage: stages.append(stage),
        )
    assert not stages and list(tmp_path.iterdir()) == []
