"""All recipes of a model on a phone: sizes, verdicts and the best."""

import json
import math

import pytest

from edgeforge.cli.forecast_report import head_lines
from edgeforge.errors import UsageError
from edgeforge.families.registry import read_spec
from edgeforge.forecast.forecast import SCHEMA_VERSION, forecast
from edgeforge.forecast.limits import HEADROOM
from edgeforge.forecast.profiles import load_profiles
from edgeforge.forecast.sized_model import SizedModel
from edgeforge.planning.choose import PLANNED
from edgeforge.synth.synthesise import PRESETS
from exporters.errors import ExportError
from exporters.options import TargetOptions
from exporters.registry import TARGETS
from quant.errors import QuantizationError
from quant.plans.recipes import RECIPES
from quant.plans.rules import Recipe, Rule

RELEASED = (
    *("openelm-270m", "llama-3.2-1b", "llama-3-8b", "mistral-7b", "phi-3-mini-128k"),
    *("qwen3-0.6b", "gemma-3-270m", "lfm2-350m", "olmo2-1b"),
)


def model(preset: str) -> SizedModel:
    return SizedModel(preset, read_spec(PRESETS[preset].config_json("bfloat16")))


def rows_of(found, target=0):
    return {row.recipe: row for row in found.targets[target].rows}


@pytest.mark.parametrize("preset", RELEASED)
def test_every_recipe_is_sized_on_some_target(preset):
    """A recipe that is added and cannot be sized fails here."""
    found = forecast(model(preset), "iphone-15-pro", targets=list(TARGETS), context=2048)
    for each in found.targets:
        assert {row.recipe for row in each.rows} | each.refused.keys() == RECIPES.keys()
        assert not {row.recipe for row in each.rows} & each.refused.keys()
    sized = {row.recipe for each in found.targets for row in each.rows}
    assert sized == RECIPES.keys(), f"no target sizes {RECIPES.keys() - sized}"
    assert set(found.not_sized) == PLANNED.keys()
    for row in (row for each in found.targets for row in each.rows):
        assert row.total == row.weights + row.caches + row.buffers
        assert 0 < row.work.weights <= row.stored <= row.weights
        assert row.decode_full < row.decode and row.prefill > row.decode
        assert math.isclose(row.bits * found.parameters / 8, row.work.weights, rel_tol=0.4)


def test_a_recipe_that_no_model_can_have_is_told_as_refused(monkeypatch):
    odd = Recipe("odd", "groups that divide nothing", (Rule("*", "int4-g34"),))
    monkeypatch.setitem(RECIPES, "odd", odd)
    found = forecast(model("llama-3.2-1b"), "iphone-15-pro")
    assert "group_size 34" in found.targets[0].refused["odd"]
    with pytest.raises(AssertionError, match=r"no target sizes \{'odd'\}"):
        test_every_recipe_is_sized_on_some_target("llama-3.2-1b")


def test_caches_and_buffers_are_the_contexts_and_no_recipes():
    short = forecast(model("llama-3.2-1b"), "iphone-15-pro", context=1024).targets[0].rows
    long = forecast(model("llama-3.2-1b"), "iphone-15-pro", context=4096).targets[0].rows
    assert {row.caches for row in short} == {2 * 16 * 8 * 64 * 2 * 1024}
    assert {row.caches for row in long} == {2 * 16 * 8 * 64 * 2 * 4096}
    assert {row.weights for row in short} == {row.weights for row in long}
    assert len({row.buffers for row in long}) == 1 < long[0].buffers - short[0].buffers


def test_int8_caches_take_a_quarter_of_onnxs():
    wide = forecast(model("llama-3.2-1b"), "galaxy-s24", recipes=["int8"])
    options = TargetOptions(kv_cache="int8")
    narrow = forecast(model("llama-3.2-1b"), "galaxy-s24", recipes=["int8"], options=options)
    assert rows_of(wide)["int8"].caches == 4 * rows_of(narrow)["int8"].caches
    assert rows_of(wide)["int8"].decode_full < rows_of(narrow)["int8"].decode_full


def test_the_best_leaves_a_fifth_and_has_the_least_kl():
    found = forecast(model("llama-3.2-1b"), "iphone-15-pro", os_version="26.4")
    made, rows = found.targets[0], rows_of(found)
    assert made.best == "int8-g32" and made.needs == ""
    limit = found.memory.plain
    assert rows["int8-g32"].total <= limit * (1 - HEADROOM) < rows["fp16"].total <= limit
    assert [rows[name].verdict for name in ("fp32", "fp16", "int8-g32")] == ["no", "tight", "yes"]


def test_where_only_the_entitlement_gives_enough_it_is_named():
    found = forecast(model("phi-3-mini-4k"), "iphone-15-pro", os_version="26.3")
    made, rows = found.targets[0], rows_of(found)
    assert {row.verdict for row in made.rows if row.bits > 4} == {"no", "tight", "entitled"}
    assert made.best == "int4" and made.needs == "the app needs the entitlement"
    assert rows["int4"].kl == min(
        row.kl for row in made.rows if row.verdict == "entitled" and row.kl is not None
    )


def test_a_recipe_that_lost_the_model_is_not_the_best_for_having_been_measured():
    sizes = rows_of(forecast(model("llama-3.2-1b"), "iphone-15-pro"))
    assert sizes["int4-pc"].kl > 1 and sizes["lut4"].kl is None
    memory = int(sizes["int4-pc"].total / (1 - HEADROOM)) + 1
    found = forecast(model("llama-3.2-1b"), "iphone-15-pro", memory=memory)
    assert {row.recipe for row in found.targets[0].rows if row.verdict == "yes"} >= {
        "int4-pc",
        "lut4",
    }
    assert rows_of(found)[found.targets[0].best].kl is None


def test_where_none_fits_the_longest_context_is_told():
    found = forecast(model("llama-3-8b"), "iphone-14", context=8192, recipes=["int4-pc"])
    assert found.targets[0].best is None
    assert found.targets[0].needs == (
        "none fits, at any context: choose a smaller model or a phone of more memory"
    )
    tight = forecast(
        model("llama-3.2-1b"), "iphone-13", context=131072, recipes=["int4"], memory=10**9
    )
    needs = tight.targets[0].needs
    assert needs.startswith("none fits at 131072 tokens; int4 does with --context ")
    longest = int(needs.split("--context ")[1].split()[0])
    for context, best in ((longest, "int4"), (longest + 8, None)):
        again = forecast(
            model("llama-3.2-1b"), "iphone-13", context=context, recipes=["int4"], memory=10**9
        )
        assert again.targets[0].best == best


def test_a_model_of_which_nothing_grows_with_the_context():
    """RWKV: what a prefill holds of its recurrence depends on the tokens of a call."""
    targets, rwkv = list(TARGETS), model("rwkv6-1.6b")
    found = forecast(rwkv, "iphone-15-pro", recipes=["int8"], targets=targets, memory=10**8)
    assert {each.needs for each in found.targets} == {
        "none fits, at any context: choose a smaller model or a phone of more memory"
    }
    chunks = [TargetOptions(chunk="64"), TargetOptions(chunk="16")]
    large, small = (
        rows_of(forecast(rwkv, "iphone-15-pro", recipes=["int8"], options=each))["int8"].buffers
        for each in chunks
    )
    pairs = 2 * 32 * 64 * 4  # two numbers of each head and row of its memory, in float32
    assert large - small > pairs * (64**2 - 16**2)


def test_a_mixed_plan_of_each_target_is_its_own():
    found = forecast(model("openelm-270m"), "iphone-15-pro", targets=list(TARGETS))
    sizes = {
        each.target: rows_of(found, at)["int4"].formats for at, each in enumerate(found.targets)
    }
    assert any("asym" in name for name in sizes["coreml"])
    assert not any("asym" in name for name in sizes["executorch"])


def test_a_file_of_rules_is_a_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("[{match: embedding, format: int8-pc}, {match: '*', format: int4-g64}]")
    found = forecast(model("llama-3.2-1b"), "iphone-15-pro", recipes=[str(path), "int4-g64"])
    own, plain = rows_of(found)[str(path)], rows_of(found)["int4-g64"]
    assert own.formats["int8-pc"] == 1 and own.stored > plain.stored and own.kl is None


def test_published_measurements_stand_with_their_share():
    found = forecast(model("llama-3.2-1b"), "oneplus-12", recipes=["int4-g32"])
    assert {each.phone for each in found.published} == {"oneplus-12"}
    shares = [found.share(each) for each in found.published]
    assert found.elsewhere[0] <= min(shares) and max(shares) <= found.elsewhere[1] < 1
    assert not forecast(model("llama-3.2-1b"), "iphone-13", recipes=["int8"]).published


def test_without_a_bandwidth_no_speed_is_told():
    found = forecast(model("llama-3.2-1b"), "pixel-8", recipes=["int8"])
    row = rows_of(found)["int8"]
    assert (row.decode, row.decode_full, row.prefill) == (None, None, None)
    assert any("no speed is bounded" in each for each in found.warnings)


def test_a_model_that_a_processors_caches_hold_is_told():
    assert any(
        "own caches" in each for each in forecast(model("tiny-llama"), "galaxy-s24").warnings
    )
    assert not any(
        "own caches" in each for each in forecast(model("llama-3.2-1b"), "galaxy-s24").warnings
    )


def test_states_need_ios_18():
    def told(**options):
        found = forecast(
            model("llama-3.2-1b"),
            "iphone-15",
            os_version="16",
            recipes=["int8"],
            options=TargetOptions(**options),
        )
        return any("need iOS 18" in each for each in found.warnings)

    assert told() and not told(opset="ios17")


def test_everything_is_in_the_json_with_its_sources():
    found = forecast(model("mistral-7b"), "iphone-15-pro", targets=["coreml", "onnx"])
    data = json.loads(json.dumps(found.to_json()))
    assert data["schema_version"] == SCHEMA_VERSION and data["window"] == 4096
    assert [each["target"] for each in data["targets"]] == ["coreml", "onnx"]
    cited = {
        *data["limit"]["sources"],
        *(key for each in data["published"] for key in each["sources"]),
        *(
            key
            for figure in data["device"].values()
            if isinstance(figure, dict)
            for key in figure["sources"]
        ),
    }
    assert cited == data["sources"].keys()
    row = data["targets"][0]["recipes"][0]
    assert row["memory_bytes"] == sum(row[f"{n}_bytes"] for n in ("weights", "caches", "buffers"))


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"device": "iphone-15-por"}, UsageError, r"did you mean 'iphone-15-pro'\?"),
        ({"context": 999_999}, UsageError, "this model takes 2 to 131072 tokens"),
        ({"context": 1}, UsageError, "this model takes 2 to 131072 tokens"),
        ({"os_version": "latest"}, UsageError, "is not a version"),
        ({"targets": ["onxx"]}, ExportError, r"did you mean 'onnx'\?"),
        ({"recipes": ["int44"]}, QuantizationError, r"did you mean 'int4'\?"),
        ({"recipes": ["mixed"]}, UsageError, "its size is the budget"),
        ({"recipes": ["as-is"]}, UsageError, "name the folder of the whole checkpoint"),
        ({"options": TargetOptions(kv_cache="int8")}, ExportError, "has no option --kv-cache"),
        ({"options": TargetOptions(chunk="many")}, ExportError, "--chunk many is not possible"),
        ({"options": TargetOptions(profile="npu")}, ExportError, "npu"),
        ({"recipes": ["w8a8"]}, ExportError, "Core ML's quantize takes constant scales only"),
    ],
)
def test_bad_input_is_one_sentence(changes, kind, words):
    asked = {"device": "iphone-15-pro", **changes}
    with pytest.raises(kind, match=words) as caught:
        forecast(model("llama-3.2-1b"), asked.pop("device"), **asked)
    assert "\n" not in str(caught.value)


def test_a_dozen_phones_can_be_planned_for():
    for name in load_profiles().phones:
        assert forecast(model("llama-3.2-1b"), name, recipes=["int4"]).targets[0].rows


def test_caches_and_windows_are_those_of_each_layer():
    found = forecast(model("gemma-3-270m"), "iphone-15-pro", context=2048, recipes=["int8"])
    assert found.window == 0 and found.windows == {0: 3, 512: 15}
    assert found.to_json()["windows"] == {"0": 3, "512": 15}
    (line, *_) = head_lines(found)
    assert line.endswith("context 2048 tokens, windows of 512 in 15 of 18 layers")
    row = rows_of(found)["int8"]
    # One key/value head of 256 columns, keys and values, in float16.
    assert row.caches == 18 * 2 * 256 * 2 * 2048
    seen = row.work.read_at(2047) - row.work.weights
    assert seen == 2 * 256 * 2 * (3 * 2047 + 15 * 512)

    hybrid = forecast(model("lfm2-350m"), "iphone-15-pro", context=2048, recipes=["int8"])
    attending = sum(layer.num_kv_heads > 0 for layer in model("lfm2-350m").spec.layers)
    caches = attending * 8 * 64 * 2 * 2 * 2048
    assert hybrid.windows == {0: attending} and attending == 6
    assert rows_of(hybrid)["int8"].caches == caches + 10 * 1024 * 2 * 2
