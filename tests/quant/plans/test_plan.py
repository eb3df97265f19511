"""Plans: their JSON, their fingerprint, their size, and what they refuse."""

import json
from dataclasses import replace

import pytest

from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.plans.plan import PLAN_VERSION, Assignment, QuantPlan, matrix_shape

SHAPES = {
    "embed.weight": (8, 64),
    "norm.weight": (64,),
    "proj.weight": (4, 6),
    "down.weight": (8, 96),
}


def assign(**formats: str) -> dict[str, Assignment]:
    names = {name.split(".")[0]: name for name in SHAPES}
    return {
        names[key]: Assignment(parse_format(format), "rtn" if "int" in format else "cast")
        for key, format in formats.items()
    }


def plan(recipe: str = "mine", **formats: str) -> QuantPlan:
    chosen = {"embed": "int4-g32", "norm": "fp32", "proj": "fp16", "down": "int4-g32-asym"}
    return QuantPlan(recipe, assign(**{**chosen, **formats}))


def test_a_plan_reads_back_from_json():
    before = plan()
    after = QuantPlan.from_json(json.loads(json.dumps(before.to_json())))
    assert after == before
    assert list(after.weights) == list(before.weights)


@pytest.mark.parametrize("version", [0, PLAN_VERSION + 1, str(PLAN_VERSION), None])
def test_a_plan_of_another_version_is_refused(version):
    data = {**plan().to_json(), "version": version}
    with pytest.raises(QuantizationError, match=rf"version {version!r}; .* reads {PLAN_VERSION}"):
        QuantPlan.from_json(data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": None}, "a mapping of weights; .* weights of type NoneType"),
        ({"recipe": 3}, "needs a recipe's name .* found recipe 3 "),
        ({"weights": {"a": "int4"}}, "assigns 'int4' to a; "),
        ({"weights": {"a": {"format": "fp16"}}}, "assigns .* to a; it must name a format and"),
        ({"weights": {"a": {"format": "fp16", "algorithm": 7}}}, "assigns .* to a; it must name"),
        ({"weights": {"a": {"format": "int3", "algorithm": "rtn"}}}, "'int3' is not"),
    ],
)
def test_json_that_is_no_plan_is_refused(changes, words):
    with pytest.raises(QuantizationError, match=words):
        QuantPlan.from_json({**plan().to_json(), **changes})


def test_the_fingerprint_leaves_out_the_recipes_name_only():
    prints = [
        plan().fingerprint(),
        plan(embed="int4-g64").fingerprint(),
        plan(embed="int4-g32-asym").fingerprint(),
        plan(proj="fp32").fingerprint(),
        QuantPlan("mine", {**plan().weights, **assign(embed="int4-g32")}).fingerprint(),
        QuantPlan(
            "mine", {**plan().weights, "embed.weight": Assignment(parse_format("int4-g32"), "x")}
        ).fingerprint(),
        QuantPlan("mine", assign(embed="int4-g32")).fingerprint(),
    ]
    assert plan("another name").fingerprint() == prints[0]
    assert prints[4] == prints[0]
    assert len(set(prints)) == len(prints) - 1


def test_a_rotation_is_part_of_the_plan():
    rotated = replace(plan(), rotation="hadamard")
    assert QuantPlan.from_json(json.loads(json.dumps(rotated.to_json()))) == rotated
    assert "rotation" not in plan().to_json()
    other = replace(plan(), rotation="hadamard-values")
    assert len({p.fingerprint() for p in (plan(), rotated, other)}) == 3
    with pytest.raises(QuantizationError, match="rotation is 3; it must be a name"):
        QuantPlan.from_json({**plan().to_json(), "rotation": 3})


def test_weights_that_are_added_count_as_stored_alone():
    stored = plan().bits_per_weight(SHAPES) * (8 * 64 + 64 + 4 * 6 + 8 * 96)
    assert plan().bits_per_weight(SHAPES, 1000) == pytest.approx(stored / 1000)


def test_bits_a_weight_are_those_counted_by_hand():
    stored = (
        (8 * 64 // 2 + 8 * 2 * 2)  # int4 pairs, two bfloat16 scales a row
        + 64 * 4  # float32
        + 4 * 6 * 2  # float16
        + (8 * 96 // 2 + 8 * 3 * 2 + 8 * 2)  # three scales, three zero points in two bytes
    )
    parameters = 8 * 64 + 64 + 4 * 6 + 8 * 96
    assert plan().bits_per_weight(SHAPES) == 8 * stored / parameters


def test_a_group_that_does_not_divide_is_refused_as_the_style_guide_says():
    name = "model.layers.0.mlp.down_proj.weight"
    asked = QuantPlan("int4", {name: Assignment(parse_format("int4-g32"), "rtn")})
    with pytest.raises(QuantizationError) as caught:
        asked.check({name: (64, 100)})
    assert str(caught.value) == (
        f"{name} has 100 input columns; int4-g32 needs a multiple of group_size 32: "
        "use group_size 20 or keep it int8-pc"
    )


def rounded(activation: str, format: str = "int8-pc", algorithm: str = "rtn") -> QuantPlan:
    given = Assignment(parse_format(format), algorithm, activation)
    return QuantPlan("mine", {"proj.weight": given})


def test_what_happens_to_activations_is_in_the_plan():
    plain, token, tensor = (rounded(name) for name in ("none", "int8-token", "int8-tensor"))
    for made in (plain, token, tensor):
        assert QuantPlan.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert len({made.fingerprint() for made in (plain, token, tensor)}) == 3
    # A plan of weights alone is written as before there were others.
    assert plain.to_json()["weights"] == {
        "proj.weight": {"format": "int8-pc", "algorithm": "rtn"},
    }
    assert "input_scale" not in token.weights["proj.weight"].layout(4, 6)
    scale = tensor.weights["proj.weight"].layout(4, 6)["input_scale"]
    assert (scale.dtype, scale.shape) == ("bfloat16", (1, 1))


def test_an_activation_that_there_is_not_is_refused():
    data = rounded("int8-token").to_json()
    data["weights"]["proj.weight"]["activation"] = "int8-tokens"
    with pytest.raises(QuantizationError, match=r"no activation 'int8-tokens' .*'int8-token'\?"):
        QuantPlan.from_json(data)


@pytest.mark.parametrize("format", ["fp16", "lut4-gc4"])
def test_activations_are_rounded_for_integers_only(format):
    with pytest.raises(QuantizationError, match=r"proj\.weight is to be .*: use int8-pc"):
        rounded("int8-token", format).check({"proj.weight": (4, 6)})


def test_one_scale_for_activations_is_not_for_gptq():
    rounded("int8-token", algorithm="gptq").check({"proj.weight": (4, 6)})
    rounded("int8-tensor", algorithm="smoothquant").check({"proj.weight": (4, 6)})
    with pytest.raises(QuantizationError, match=r"filled by gptq.*or activation int8-token"):
        rounded("int8-tensor", algorithm="gptq").check({"proj.weight": (4, 6)})


def test_a_sound_plan_passes():
    plan().check(SHAPES)


def test_a_vector_in_integers_is_refused():
    with pytest.raises(QuantizationError, match=r"norm\.weight is a vector.*not int8-pc"):
        plan(norm="int8-pc").check(SHAPES)


def test_another_models_plan_is_refused():
    with pytest.raises(QuantizationError, match=r"only the plan has proj\.weight"):
        plan().check({name: shape for name, shape in SHAPES.items() if name != "proj.weight"})
    with pytest.raises(QuantizationError, match=r"only the model has z\.weight"):
        plan().check({**SHAPES, "z.weight": (2, 2)})


def test_weights_are_grouped_by_format():
    grouped = plan(proj="int4-g32").formats()
    assert {format.name: names for format, names in grouped.items()} == {
        "int4-g32": ["embed.weight", "proj.weight"],
        "fp32": ["norm.weight"],
        "int4-g32-asym": ["down.weight"],
    }


def test_a_vector_is_one_row():
    assert matrix_shape((7,)) == (1, 7)
    assert matrix_shape((3, 7)) == (3, 7)
