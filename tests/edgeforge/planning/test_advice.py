"""What a refusal proposes is followed, over widths, recipes and targets: it is accepted."""

import itertools
import re
from dataclasses import replace

import pytest

from edgeforge.planning.advice import PlanCheck, check_targets
from exporters.errors import ExportError
from exporters.options import TargetOptions
from exporters.registry import TARGETS, find_target
from exporters.target import ModelFacts
from quant.errors import QuantizationError
from quant.formats.activations import parse_activation
from quant.formats.formats import FloatFormat, parse_format
from quant.plans.algorithms import algorithms_for
from quant.plans.plan import Assignment, QuantPlan
from quant.plans.recipes import RECIPES

FACTS = ModelFacts("llama", 128, 32, (4, 4), (2, 2), 1, (2,), None, 64)
DOWN = "model.layers.0.mlp.down_proj.weight"
# Widths of feed-forward parts: divisible by 4 alone, by nothing, by 24, by 32.
WIDTHS = (172, 171, 168, 96)
ALL = tuple(TARGETS)
SOME = ("int4", "int4-g64-asym", "int2-g32-signed-gptq", "lut3", "int8-g32", "w8a8-static", "fp32")
CASES = [
    *((names, {}, tuple(RECIPES)) for n in (1, 2, 3) for names in itertools.combinations(ALL, n)),
    (("coreml",), {"profile": "ane"}, SOME),
    (ALL, {"profile": "ane"}, SOME),
    (("coreml",), {"opset": "ios17"}, SOME),
    (("executorch",), {"backend": "coreml"}, SOME),
    (("coreml", "executorch"), {"backend": "vulkan"}, SOME),
]


def shapes_of(width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (512, 128)}
    for layer in range(2):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (128,),
            f"{at}self_attn.qk_proj.weight": (192, 128),
            f"{at}self_attn.v_proj.weight": (64, 128),
            f"{at}self_attn.o_proj.weight": (128, 128),
            f"{at}mlp.gate_up_proj.weight": (2 * width, 128),
            f"{at}mlp.down_proj.weight": (128, width),
        }
    return shapes | {"model.norm.weight": (128,), "lm_head.weight": (512, 128)}


def plan_of(recipe: str, shapes) -> QuantPlan:
    roles = dict.fromkeys(shapes, "linear")
    roles |= {name: "norm" for name, shape in shapes.items() if len(shape) == 1}
    roles |= {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    return RECIPES[recipe].plan(shapes, roles)


def accepts(plan: QuantPlan, shapes, targets, options: TargetOptions) -> None:
    """The checks of a plan and of its targets, as an export makes them."""
    plan.check(shapes)
    for target in targets:
        target.check(plan, shapes, FACTS, options.only(target.options))


def is_accepted(*given) -> bool:
    try:
        accepts(*given)
    except (QuantizationError, ExportError):
        return False
    return True


def advice_for(plan, shapes, targets, options) -> list[str]:
    with pytest.raises((QuantizationError, ExportError)) as caught:
        PlanCheck(shapes, targets, FACTS, options).run(plan)
    message = str(caught.value)
    assert "\n" not in message
    words = message.rpartition(": ")[2]
    ways = re.split(r", or | or |, (?=use|keep)", words)
    assert ways and all(re.match("use |keep it ", way) for way in ways), message
    return ways


def followed(way: str, given: Assignment) -> Assignment:
    """The assignment that a user's rule gives who does as the words say."""
    words = way.removeprefix("use ").removeprefix("keep it ").split(" with ")
    format, algorithm, activation = given.format, None, given.activation
    for word in words:
        word = re.sub(r" \(as recipe .*\)", "", word)
        if word.startswith("activation "):
            activation = parse_activation(word.removeprefix("activation "))
        elif word.startswith("algorithm "):
            algorithm = word.removeprefix("algorithm ")
        else:
            format = parse_format(word)
    able = algorithms_for(format)
    named = given.algorithm if given.algorithm != algorithms_for(given.format)[0] else able[0]
    if isinstance(format, FloatFormat):
        named = able[0]
    chosen = algorithm or named
    assert chosen in able, way
    return Assignment(format, chosen, activation)


@pytest.mark.parametrize(
    ("names", "asked", "recipes"), CASES, ids=[f"{'+'.join(c[0])} {c[1] or ''}" for c in CASES]
)
def test_every_way_that_a_refusal_proposes_is_accepted(names, asked, recipes):
    targets, options = [find_target(name) for name in names], TargetOptions(**asked)
    known = {}
    tried = 0
    for width, recipe in itertools.product(WIDTHS, recipes):
        shapes = shapes_of(width)
        plan = plan_of(recipe, shapes)
        if is_accepted(plan, shapes, targets, options):
            PlanCheck(shapes, targets, FACTS, options).run(plan)
            continue
        mended = dict(plan.weights)
        plain = {
            n: Assignment(FloatFormat("float16"), "cast") for n, s in shapes.items() if len(s) > 1
        }
        for name, given in plan.weights.items():
            alone = QuantPlan("alone", {**plan.weights, **plain, name: given})
            key = given, shapes[name]
            if key not in known:
                known[key] = None
                if not is_accepted(alone, shapes, targets, options):
                    known[key] = advice_for(alone, shapes, targets, options)
                    for way in known[key]:
                        tried += 1
                        if way.startswith("use --"):
                            option, value = way.removeprefix("use --").split()
                            changed = replace(options, **{option.replace("-", "_"): value})
                            accepts(alone, shapes, targets, changed)
                        else:
                            new = {**alone.weights, name: followed(way, given)}
                            accepts(QuantPlan("followed", new), shapes, targets, options)
            if known[key]:
                mended[name] = followed(known[key][0], given)
        # All of the advice at once: the next attempt is accepted as a whole.
        accepts(QuantPlan("mended", mended), shapes, targets, options)
    assert tried


@pytest.mark.parametrize(
    ("names", "recipe", "words"),
    [
        ("onnx", "int8", "int8-pc: keep it fp16, and the same for model.layers.1.mlp.down_proj"),
        ("coreml", "int4-g32", "group_size 32: use lut4-gc16 or keep it int8-pc"),
        ("executorch", "int4-g32", "group_size 32: use int4-pc or keep it int8-pc"),
        (
            "onnx executorch",
            "lut4",
            "use int4-g32 or keep it int8-pc, and the same for lm_head.weight and 8 more; "
            "for model.layers.0.mlp.down_proj.weight and 1 more, keep it fp16",
        ),
    ],
)
def test_a_width_of_172(names, recipe, words):
    shapes = shapes_of(172)
    targets = [find_target(name) for name in names.split()]
    with pytest.raises((QuantizationError, ExportError)) as caught:
        PlanCheck(shapes, targets, FACTS, TargetOptions()).run(plan_of(recipe, shapes))
    assert words in str(caught.value)


def test_imported_weights_keep_their_integers():
    shapes = shapes_of(128)
    imported = Assignment(parse_format("int4-g32-f16"), "imported")
    plan = plan_of("int8", shapes)
    plan = QuantPlan("as-is", {**plan.weights, DOWN: imported})
    run = PlanCheck(shapes, [find_target("executorch")], FACTS, TargetOptions()).run
    with pytest.raises(ExportError, match="round them with --imported-scales bfloat16"):
        run(plan)
    rounded = Assignment(parse_format("int4-g32"), "imported")
    run(QuantPlan("as-is", {**plan.weights, DOWN: rounded}))
    # Rounding would not help here: no rule changes what the checkpoint holds as integers.
    groups = Assignment(parse_format("int8-g32-f16"), "imported")
    with pytest.raises(ExportError, match="give the original checkpoint"):
        run(QuantPlan("as-is", {**plan.weights, DOWN: groups}))


def test_what_no_weight_is_at_fault_for_is_refused_as_it_is():
    shapes = shapes_of(128)
    check = PlanCheck(shapes, [find_target("coreml")], FACTS, TargetOptions(chunk="0"))
    with pytest.raises(ExportError, match="--chunk 0 is not possible"):
        check.run(plan_of("int8", shapes))
    odd = replace(FACTS, head_dim=12)
    with pytest.raises(ExportError, match="head width"):
        PlanCheck(shapes, [find_target("onnx")], odd, TargetOptions()).run(plan_of("int8", shapes))
    with pytest.raises(QuantizationError, match="use lut4-gc16 or keep it int8-pc"):
        PlanCheck(shapes_of(172), (), None, TargetOptions()).run(
            plan_of("int4-g32", shapes_of(172))
        )


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (ALL, {}),
        (("onnx", "executorch"), {"kv_cache": "int8"}),
        (("coreml",), {"profile": "ane"}),
        (("coreml",), {"opset": "ios17", "chunk": "16,256"}),
        (ALL, {"profile": "ane"}),
    ],
)
def test_a_context_that_is_proposed_fits_every_target(names, asked):
    shapes = shapes_of(128)
    plan = plan_of("fp16", shapes)
    targets, long = [find_target(name) for name in names], replace(FACTS, context=4096)
    proposed = set()
    for memory in range(500_000, 30_000_000, 173_000):
        options = TargetOptions(max_memory=memory, **asked)
        try:
            check_targets(plan, shapes, targets, long, options)
        except ExportError as error:
            found = re.search(r"--context (\d+) or less", str(error))
            if found is None:
                continue
            proposed.add(int(found[1]))
            check_targets(plan, shapes, targets, replace(FACTS, context=int(found[1])), options)
    assert len(proposed) > 5
