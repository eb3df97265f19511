"""Recipes: the order of rules, roles, patterns, YAML files and their errors."""

import subprocess
import sys
from dataclasses import replace

import pytest

from edgeforge.model.model import open_model
from quant.errors import QuantizationError
from quant.formats.formats import IntFormat, PaletteFormat
from quant.plans.algorithms import algorithms_for
from quant.plans.int4 import INT4
from quant.plans.recipes import RECIPES, find_recipe
from quant.plans.rules import Recipe, Rule

SHAPES = {
    "model.embed_tokens.weight": (64, 128),
    "model.layers.0.input_layernorm.weight": (128,),
    "model.layers.0.self_attn.qk_proj.weight": (128, 128),
    "model.layers.0.self_attn.v_proj.weight": (64, 128),
    "model.layers.0.mlp.down_proj.weight": (128, 256),
    "model.layers.1.mlp.down_proj.weight": (128, 256),
    "lm_head.weight": (64, 128),
}
ROLES = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.0.input_layernorm.weight": "norm",
    "lm_head.weight": "head",
}
ROLES = {name: ROLES.get(name, "linear") for name in SHAPES}


def formats(*rules: Rule) -> list[str]:
    plan = Recipe("mine", "", rules).plan(SHAPES, ROLES)
    assert list(plan.weights) == list(SHAPES)
    return [plan.weights[name].format.name for name in SHAPES]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_plans_a_model_whole(name):
    recipe = RECIPES[name]
    assert find_recipe(name) is recipe and recipe.name == name and recipe.about
    plan = recipe.plan(SHAPES, ROLES)
    plan.check(SHAPES)
    assert plan.recipe == name
    for weight, assignment in plan.weights.items():
        is_integer = isinstance(assignment.format, IntFormat)
        is_palette = isinstance(assignment.format, PaletteFormat)
        assert assignment.algorithm in algorithms_for(assignment.format)
        assert is_integer == (name.startswith(("int", "w8")) and len(SHAPES[weight]) == 2)
        assert is_palette == (name.startswith("lut") and len(SHAPES[weight]) == 2)
    assert plan.weights["model.layers.0.input_layernorm.weight"].format.name == "fp32"


def test_the_default_keeps_to_its_bits_on_the_demo_model():
    weights = open_model("demo").weights
    plan = RECIPES["int4"].plan(weights.shapes(), weights.roles())
    # No more than llama.cpp's Q4_0, which has 4.93 bits on this model.
    assert 4.5 < plan.bits_per_weight(weights.shapes()) <= 4.93
    formats = {name: assignment.format.name for name, assignment in plan.weights.items()}
    assert formats["model.layers.0.mlp.gate_up_proj.weight"] == "int8-pc"
    assert formats["model.layers.1.mlp.gate_up_proj.weight"] == "int4-g64"
    assert formats["model.layers.1.mlp.down_proj.weight"] == "int4-g32"
    assert formats["model.layers.1.self_attn.qk_proj.weight"] == "int4-g32"
    assert formats["model.layers.1.self_attn.v_proj.weight"] == "int8-pc"
    last = len(open_model("demo").spec.layers) - 1
    assert formats[f"model.layers.{last}.mlp.down_proj.weight"] == "int8-pc"


def shapes_of(layers: int, *, hidden: int, vocabulary: int, tied: bool) -> dict[str, tuple]:
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for n in range(layers):
        at = f"model.layers.{n}."
        shapes |= {
            at + "self_attn.qk_proj.weight": (hidden * 4 // 3, hidden),
            at + "self_attn.v_proj.weight": (hidden // 3, hidden),
            at + "self_attn.o_proj.weight": (hidden, hidden),
            at + "mlp.gate_up_proj.weight": (6 * hidden, hidden),
            at + "mlp.down_proj.weight": (hidden, 3 * hidden),
        }
    return shapes if tied else shapes | {"lm_head.weight": (vocabulary, hidden)}


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(
    ("layers", "hidden", "vocabulary", "tied", "most"),
    [
        # What llama.cpp's Q4_0 spends, 4.5 bits and 2 more for the head; 4.75 for large models.
        (30, 576, 49152, True, 4.93),
        (4, 768, 4096, False, 4.71),
        (32, 3072, 32064, False, 4.56),
        (16, 3072, 128256, True, 4.75),
    ],
)
def test_the_default_spends_no_more_than_its_bits(
    layers, hidden, vocabulary, tied, most, zero_points
):
    shapes = shapes_of(layers, hidden=hidden, vocabulary=vocabulary, tied=tied)
    roles = dict.fromkeys(shapes, "linear")
    roles |= {"model.embed_tokens.weight": "embedding"}
    roles |= {} if tied else {"lm_head.weight": "head"}
    plan = replace(INT4, zero_points=zero_points).plan(shapes, roles)
    plan.check(shapes)
    assert plan.bits_per_weight(shapes) <= most + 0.1 * zero_points
    eight = {name for name, given in plan.weights.items() if given.format.name == "int8-pc"}
    values = {name for name in shapes if ".v_proj." in name}
    assert values <= eight
    # More in the outer layers than the values alone, where the bits suffice.
    downs = {name for name in eight if ".down_proj." in name}
    share = max(1, layers // 8)
    outer = {*range(share), *range(layers - share, layers)}
    assert {int(name.split(".")[2]) for name in downs} <= outer
    assert (len(downs) == len(outer)) == (most > 4.74)


def test_a_rule_may_name_formats_in_order_of_preference():
    shapes = {"a.weight": (4, 128), "b.weight": (4, 96), "c.weight": (4, 60)}
    rule = Rule("*", "int4-g64 | int4-g32")
    plan = Recipe("mine", "", (rule,)).plan(shapes, dict.fromkeys(shapes, "linear"))
    chosen = [assignment.format.name for assignment in plan.weights.values()]
    # The last is refused by the plan's own check, with the weight's name.
    assert chosen == ["int4-g64", "int4-g32", "int4-g32"]
    with pytest.raises(QuantizationError, match=r"c\.weight has 60 input columns"):
        plan.check(shapes)


def test_the_first_rule_that_matches_decides():
    assert formats(
        Rule("model.layers.1.*", "int8-pc"),
        Rule("*down_proj*", "int4-g64"),
        Rule("head", "fp16"),
        Rule("*", "int4-g32"),
    ) == ["int4-g32", "fp32", "int4-g32", "int4-g32", "int4-g64", "int8-pc", "fp16"]


def test_a_rule_may_name_a_role():
    assert formats(
        Rule("embedding", "int8-pc"), Rule("linear", "int4-g128"), Rule("head", "bf16")
    ) == ["int8-pc", "fp32", *["int4-g128"] * 4, "bf16"]


def test_patterns_know_sets_and_case():
    assert formats(Rule("model.layers.[1-9].*", "int8-pc"), Rule("*", "int4-g32"))[5] == "int8-pc"
    with pytest.raises(QuantizationError, match="matches no weight that earlier rules leave"):
        formats(Rule("MODEL.*", "int8-pc"), Rule("*", "int4-g32"))


def test_rules_without_a_star_at_their_end_are_refused():
    with pytest.raises(QuantizationError, match=r"no rule for model\.embed.*rule for '\*'"):
        formats(Rule("linear", "int4-g32"))


@pytest.mark.parametrize(
    ("match", "hint"),
    [
        (
            "model.layer.0.mlp.down_proj.weight",
            "did you mean 'model.layers.0.mlp.down_proj.weight'",
        ),
        ("*.donw_proj.*", "did you mean 'model.layers.0.mlp.down_proj.weight'"),
        ("*.mlp.experts.*", ""),
        ("model.layers.77.*", ""),
    ],
)
def test_a_rule_that_matches_nothing_is_refused(match, hint):
    with pytest.raises(
        QuantizationError, match="matches no weight that earlier rules leave"
    ) as caught:
        formats(Rule(match, "int8-pc"), Rule("*", "int4-g32"))
    assert hint in str(caught.value) and ("did you mean" in str(caught.value)) == bool(hint)


@pytest.mark.parametrize("match", ["model.layers.0.mlp.down_proj.weight", "*.down_proj.*"])
def test_a_rule_after_the_star_is_to_be_put_before_it(match):
    with pytest.raises(QuantizationError, match=r"leave: put it before the rule that .*down_proj"):
        formats(Rule("*", "int4-g32"), Rule(match, "int8-pc"))


def test_a_rule_for_a_head_may_match_nothing():
    tied = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    Recipe("mine", "", (Rule("head", "fp16"), Rule("*", "int4-g32"))).plan(tied, ROLES)


def test_an_unknown_algorithm_is_refused_before_any_work():
    with pytest.raises(QuantizationError, match=r"no algorithm 'rnt' \(did you mean 'rtn'\?\)"):
        formats(Rule("*", "int4-g32", "rnt"))


@pytest.mark.parametrize(
    ("format", "algorithm", "words"),
    [
        (
            "lut4-gc16",
            "rtn",
            "rtn cannot fill lut4-gc16, .*: use kmeans or kmeans-weighted or gptq",
        ),
        (
            "int4-g32",
            "kmeans",
            "kmeans cannot fill int4-g32, .*: use rtn or rtn-signed or rtn-minmax",
        ),
        ("int4-g32 | lut4-pt", "rtn", "algorithm rtn cannot fill lut4-pt"),
    ],
)
def test_an_algorithm_that_cannot_fill_the_format_is_refused(format, algorithm, words):
    with pytest.raises(QuantizationError, match=words):
        formats(Rule("*", format, algorithm))


def test_a_file_may_mix_palettes_and_integers(tmp_path):
    file = tmp_path / "mixed.yaml"
    file.write_text(
        "- {match: embedding, format: lut8-pt}\n- {match: head, format: int8-pc}\n"
        "- {match: '*', format: lut3-gc8, algorithm: kmeans}\n"
    )
    plan = find_recipe(str(file)).plan(SHAPES, ROLES)
    assert [(a.format.name, a.algorithm) for a in plan.weights.values()] == [
        ("lut8-pt", "kmeans"),
        ("fp32", "cast"),
        *[("lut3-gc8", "kmeans")] * 4,
        ("int8-pc", "rtn"),
    ]


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(QuantizationError) as caught:
        find_recipe("int4-g33")
    assert "did you mean 'int4-g3" in str(caught.value)
    assert all(name in str(caught.value) for name in RECIPES)


@pytest.mark.parametrize("head", ["", "rules:\n"], ids=["list", "mapping"])
def test_a_file_of_rules_is_read(tmp_path, head):
    file = tmp_path / "mischung größe.yaml"
    file.write_text(
        f"{head}- {{match: head, format: fp16}}\n- match: '*'\n  format: int4-g64\n"
        "  algorithm: rtn\n",
        encoding="utf-8",
    )
    recipe = find_recipe(str(file))
    assert recipe.rules == (Rule("head", "fp16"), Rule("*", "int4-g64", "rtn"))
    assert recipe.plan(SHAPES, ROLES).recipe == "mischung größe"


def test_a_file_may_name_a_rotation(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("rotation: hadamard\nrules:\n- {match: '*', format: fp16}\n")
    assert find_recipe(str(file)).rotation == "hadamard"
    file.write_text("rules:\n- {match: '*', format: fp16}\n")
    assert find_recipe(str(file)).rotation is None


def test_a_matrix_in_a_norms_place_is_never_integers():
    shapes = {**SHAPES, "model.norm_matrix.weight": (64, 64)}
    roles = {**ROLES, "model.norm_matrix.weight": "norm"}
    for recipe, kept in (("int4-g32", "fp16"), ("lut4", "fp16"), ("fp32", "fp32")):
        given = find_recipe(recipe).plan(shapes, roles).weights["model.norm_matrix.weight"]
        assert (given.format.name, given.algorithm) == (kept, "cast")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- {match: *, format: int4-g32}", r"not YAML at line 1, column 12 .*in quotes"),
        (b"- [", "not YAML at line 1"),
        (b"\xff\xfe\xff", "not UTF-8"),
        (b"", "must be a list of rules"),
        (b"[]", "must be a list of rules"),
        (b"rules: 3", "must be a list of rules"),
        (b"ruels: []", "must be a list of rules"),
        (b"{rules: [{match: '*', format: fp16}], default: int4}", "must be a list of rules"),
        (
            b"{rules: [{match: '*', format: fp16}], rotation: [3]}",
            "rotation must be a name, found .*3",
        ),
        (b"rotation: hadamard", "must be a list of rules"),
        (b"- int4", "rule 1 must have match and format"),
        (b"- {match: '*'}", "rule 1 must have match and format"),
        (b"- {match: '*', format: fp16, bits: 4}", "rule 1 must have match and format"),
        (b"- {match: head, format: fp16}\n- {match: '*', format: int3}", "rule 2: 'int3' is not"),
        (b"[" * 5000, "not YAML"),
    ],
)
def test_a_file_that_holds_no_rules_is_refused(tmp_path, content, words):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(QuantizationError, match=words) as caught:
        find_recipe(str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(QuantizationError, match=r"nowhere\.yml cannot be read: No such file"):
        find_recipe(str(tmp_path / "nowhere.yml"))
    with pytest.raises(QuantizationError, match=r"folder\.yaml cannot be read: Is a directory"):
        (tmp_path / "folder.yaml").mkdir()
        find_recipe(str(tmp_path / "folder.yaml"))


def test_listing_recipes_loads_no_torch():
    code = "import sys, quant.plans.recipes; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"


def test_every_format_that_a_recipe_names_is_known():
    for recipe in RECIPES.values():
        for rule in recipe.rules:
            assert " | ".join(f.name for f in rule.formats()) == rule.format


def test_an_embedding_is_calibrated_only_where_it_is_the_head_too():
    recipe = Recipe("mine", "", (Rule("*", "int4-g32", "gptq"),))
    plan = recipe.plan(SHAPES, ROLES)
    assert plan.weights["model.embed_tokens.weight"].algorithm == "rtn"
    assert plan.weights["lm_head.weight"].algorithm == "gptq"
    tied = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    roles = {name: ROLES[name] for name in tied}
    plan = recipe.plan(tied, roles)
    assert plan.weights["model.embed_tokens.weight"].algorithm == "gptq"


def test_rules_say_what_happens_to_activations(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "- {match: '*.qk_proj.*', format: int8-pc, activation: int8-token}\n"
        "- {match: '*', format: int8-pc, algorithm: smoothquant, activation: int8-tensor}\n"
    )
    plan = find_recipe(str(path)).plan(SHAPES, ROLES)
    for name, given in plan.weights.items():
        looked_up = ROLES[name] == "embedding" or len(SHAPES[name]) == 1
        wanted = "int8-token" if ".qk_proj." in name else "int8-tensor"
        assert given.activation == ("none" if looked_up else wanted)
    path.write_text("- {match: '*', format: int8-pc, activation: int8}\n")
    with pytest.raises(QuantizationError, match="rule 1: there is no activation 'int8'"):
        find_recipe(str(path))


@pytest.mark.parametrize(
    ("name", "activation", "algorithm"),
    [
        ("w8a8", "int8-token", "smoothquant"),
        ("w8a8-static", "int8-tensor", "smoothquant-search"),
    ],
)
def test_rounded_recipes_leave_what_enters_the_head(name, activation, algorithm):
    plan = RECIPES[name].plan(SHAPES, ROLES)
    layers = {n for n, role in ROLES.items() if role == "linear" and len(SHAPES[n]) == 2}
    assert {n for n, a in plan.weights.items() if a.activation == activation} == layers
    assert {plan.weights[n].algorithm for n in layers} == {algorithm}


NESTED = "- match: '*'\n  format:\n" + "\n".join(
    ["  - &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (NESTED.encode(), "'a0' is an alias"),
        (b"- {match: '*', match: head, format: fp16}", "the key 'match' occurs twice"),
        (b"- {match: '*', format: 2026-13-45}", "'2026-13-45' is not a weight format"),
        (b"- {match: '*', format: " + b"9" * 5000 + b"}", "format must be a text of at most 500"),
        (b"- {match: '*', format: 0x" + b"f" * 5000 + b"}", "format must be a text of at most 500"),
        (b"- {match: [a, b], format: fp16}", "match must be a text"),
        (b"- {match: '*', format: {a: b}}", "format must be a text"),
        (b"- [" + b"[x], " * 10_000 + b"]", "rule 1 must have match and format"),
        (b"- !!python/object/apply:os.system [true]", "the tag"),
        (b"#" * (1 << 20) + b"\n", "it has 1048577 bytes, and at most 1048576 are read"),
    ],
)
def test_a_hostile_file_of_rules_is_refused_in_one_short_sentence(tmp_path, content, words):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(QuantizationError) as caught:
        find_recipe(str(file))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
