"""The recipe that a model gets by default, and the grids that its targets hold."""

import pytest

from edgeforge.families.facts import facts_of
from edgeforge.families.registry import read_spec
from edgeforge.model.model import open_model
from edgeforge.planning import choose
from edgeforge.planning.choose import PlanRequest, choose_plan, default_recipe
from edgeforge.synth.presets import PRESETS
from exporters.registry import find_target
from quant.formats.formats import IntFormat
from quant.plans.plan import QuantPlan
from quant.plans.recipes import find_recipe

ALL = ("coreml", "executorch", "onnx")


@pytest.fixture(scope="module")
def demo():
    return open_model("demo")


def plan_of(model, recipe: str | None, targets) -> QuantPlan:
    request = PlanRequest(
        recipe,
        targets=[find_target(name) for name in targets],
        facts=facts_of(model.spec, 256),
    )
    return choose_plan(model, request).plan


def four_bits(plan: QuantPlan) -> set[tuple[str, bool]]:
    """Algorithm and symmetry of every 4-bit weight."""
    return {
        (given.algorithm, given.format.symmetric)
        for given in plan.weights.values()
        if isinstance(given.format, IntFormat) and given.format.bits == 4
    }


@pytest.mark.parametrize(
    ("recipe", "targets", "wanted"),
    [
        ("int4", ALL, ("rtn", True)),
        ("int4", ("executorch",), ("rtn", True)),
        ("int4", ("onnx", "executorch"), ("rtn", True)),
        ("int4", ("onnx",), ("rtn-signed", True)),
        ("int4", ("coreml",), ("rtn", False)),
        ("int4", ("coreml", "onnx"), ("rtn", False)),
        ("int4-gptq", ALL, ("gptq-descent", True)),
        ("int4-gptq", ("onnx",), ("gptq-descent-signed", True)),
        ("int4-gptq", ("coreml", "onnx"), ("gptq-descent", False)),
        ("int4-awq", ("onnx",), ("awq", False)),
        ("int4-g32", ("onnx",), ("rtn", True)),  # what is asked for by its format stays as it is
    ],
)
def test_four_bits_get_the_finest_grid_that_all_targets_hold(demo, recipe, targets, wanted):
    assert four_bits(plan_of(demo, recipe, targets)) == {wanted}


def test_a_small_model_is_calibrated_by_default(demo, monkeypatch):
    assert default_recipe(demo, calibrate=True) == "int4-gptq"
    assert default_recipe(demo, calibrate=False) == "int4"
    assert plan_of(demo, None, ALL).recipe == "int4-gptq"
    monkeypatch.setattr(choose, "QUICK_PARAMETERS", demo.spec.num_parameters)
    assert default_recipe(demo, calibrate=True) == "int4"


def test_a_model_without_a_tokenizer_is_not_calibrated(demo, monkeypatch):
    monkeypatch.setattr(demo.checkpoint, "tokenizer_files", {})
    assert default_recipe(demo, calibrate=True) == "int4"


def test_int4_gives_shared_values_more_bits_than_attentions_experts():
    spec = read_spec(PRESETS["jetmoe-8b"].config)
    shapes = {name: weight.shape for name, weight in spec.weights.items()}
    roles = {name: weight.role for name, weight in spec.weights.items()}
    plan = find_recipe("int4").plan(shapes, roles)
    formats = {name: given.format.name for name, given in plan.weights.items()}
    for index in range(len(spec.layers)):
        at = f"model.layers.{index}.self_attn."
        experts = {formats[f"{at}experts.{e}.{p}_proj.weight"] for e in range(8) for p in "qo"}
        assert experts == {"int4-g32"}
        assert (formats[f"{at}v_proj.weight"], formats[f"{at}k_proj.weight"]) == (
            "int8-pc",
            "int4-g32",
        )
        # A small error of the router sends a token to another expert.
        assert {formats[f"{at}router.weight"], formats[f"{at}output.bias"]} == {"fp32"}
