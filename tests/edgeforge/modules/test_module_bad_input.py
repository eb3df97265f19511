"""Modules, inputs and scripts that cannot be exported: one sentence each, with the user's line."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from edgeforge.errors import UsageError
from edgeforge.modules.factory import run_factory
from edgeforge.modules.plan import plan_of
from edgeforge.modules.trace import trace
from exporters.errors import ExportError
from exporters.modules.registry import find_module_target
from exporters.modules.target import ModuleRequest

ROW = torch.ones(1, 4)


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # this line is shown
            return x
        return -x


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return x + self.count


@dataclass
class Pair:
    left: torch.Tensor
    right: str


class Returning(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def linear(dtype=torch.float32):
    return nn.Linear(4, 2).to(dtype)


@pytest.mark.parametrize(
    ("module", "inputs", "words"),
    [
        (object(), ROW, "a object is no torch.nn.Module"),
        (Branching(), ROW, r"depends on data at .*\(`if x.sum\(\) > 0:"),
        (Counting(), ROW, "changes its buffer count"),
        (linear(), (), r"do not fit Linear.forward.*missing a required argument: 'input'"),
        (linear(), {"other": ROW}, "do not fit"),
        (linear(), 3, "not int"),
        (linear(), (3,), "hold no tensor"),
        (linear(), ([ROW],), "the example input input is a list"),
        (linear(), ROW.double(), "input is float64; inputs are float32, int64, int32, bool"),
        (linear(), torch.ones(1, 5), "fails on its example inputs"),
        (linear(torch.float16), ROW, r"weight is float16; .* call .float\(\)"),
        (linear().to("meta"), ROW, "weight has no values"),
        (Returning("text"), ROW, "the output of forward is a str"),
        (Returning(Pair(ROW, "text")), ROW, "the output right is a str"),
        (Returning(None), ROW, "returns no tensor"),
    ],
)
def test_modules_and_inputs(module, inputs, words):
    with pytest.raises(UsageError, match=words):
        trace(module, inputs)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"y": {0: torch.export.Dim("b")}}, "names 'y', which is no input"),
        ({"input": {0: 3}}, "gives 3 for axis 0"),
        ({"input": {5: torch.export.Dim("b")}}, "has 2 axes"),
        ({"input": {1: torch.export.Dim("b")}}, "a dynamic dimension cannot be dynamic"),
    ],
)
def test_dynamic_shapes(shapes, words):
    with pytest.raises(UsageError, match=words):
        trace(linear(), torch.ones(3, 4), shapes)


def test_recipes_and_targets():
    traced = trace(nn.Linear(32, 16), torch.ones(1, 32))
    for recipe, words in (
        ("int4-awq", r"\(awq\) is for language models: modules take rounding to nearest and GPTQ"),
        ("int4-g32-signed", "is for language models"),
        ("lut4", "modules do not take"),
        ("int4-g32-asym", "modules do not take"),
    ):
        with pytest.raises(UsageError, match=words):
            plan_of(traced, recipe)
    with pytest.raises(UsageError, match="no weight to quantize"):
        plan_of(trace(nn.ReLU(), ROW), "int8")
    assert plan_of(trace(nn.ReLU(), ROW), "fp32").weights == {}
    with pytest.raises(ExportError, match=r"there is no target .onx.*did you mean .onnx"):
        find_module_target("onx")


@pytest.mark.parametrize("target", ["coreml", "executorch"])
def test_inputs_that_a_target_does_not_have(target, tmp_path):
    traced = trace(linear(), torch.ones(3, 4), {"input": {0: torch.export.Dim("rows")}})
    with pytest.raises(ExportError, match="needs a largest size of the dynamic dimension rows"):
        find_module_target(target).write(ModuleRequest(traced, None), tmp_path)
    if target == "coreml":
        traced = trace(nn.Flatten(), torch.ones(3, 4, dtype=torch.bool))
        with pytest.raises(ExportError, match="the input input is boolean"):
            find_module_target(target).write(ModuleRequest(traced, None), tmp_path)


@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
def test_executorch_has_no_convolution_over_three_axes(kind, tmp_path):
    traced = trace(nn.Sequential(kind(2, 3, 3)), torch.ones(1, 2, 4, 4, 4))
    request = ModuleRequest(traced, None)
    with pytest.raises(ExportError, match=r"no kernel for a convolution over three axes at .*py"):
        find_module_target("executorch").write(request, tmp_path)
    assert list(tmp_path.iterdir()) == []
    find_module_target("onnx").write(request, tmp_path)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def other(): pass", "has no function 'made'; it has other"),
        ("def made(: pass", "factory.py:1 is not Python"),
        ("import not_there", r"factory.py:1 \(`import not_there`\): ModuleNotFoundError"),
        ("def made():\n    return 1 / 0", r"factory.py:2 \(`return 1 / 0`\): ZeroDivisionError"),
        ("def made(): return 3", "returns a int; it returns"),
        ("import sys\ndef made(): sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_factories(tmp_path, code, words):
    script = tmp_path / "factory.py"
    script.write_text(code)
    with pytest.raises(UsageError, match=words):
        run_factory(f"{script}:made")
    with pytest.raises(UsageError, match="names no factory"):
        run_factory(str(script))


def test_a_factory_imports_what_lies_beside_it(tmp_path):
    (tmp_path / "beside.py").write_text("NUMBER = 5")
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    script = tmp_path / "factory.py"
    script.write_text("import json, beside\ndef made(): return beside.NUMBER, (json.dumps(1),)")
    assert run_factory(f"{script}:made").module == 5
