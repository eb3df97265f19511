"""`edgeforge plan` as a user has it."""

import json

import pytest

import edgeforge as package
from edgeforge.synth.synthesise import PRESETS


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PRESETS["llama-3.2-1b"].config_json("bfloat16")))
    return path


def test_all_recipes_stand_in_one_table_with_the_best_marked(edgeforge, config):
    done = edgeforge("plan", config, "--device", "iphone-15-pro")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == f"{config}: llama, 1,235,814,400 parameters, context 4096 tokens"
    assert lines[2] == "iOS 26.4 gives an app 3.00 GB"
    (marked,) = [line.split() for line in lines if line.startswith(" > ")]
    assert marked[1] == "int8-g32" and "yes" in marked
    assert "best: int8-g32" in lines and any(line.startswith("best: of the") for line in lines)
    assert any("Phi-4-mini" in line and "73% of 23.7" in line for line in lines)
    assert any(line.startswith("  [limit-26-4] ") and "https://" in line for line in lines)
    assert done.err.startswith("warning: the limit: measured on an iPad")


def test_json_is_what_the_function_returns(edgeforge, config):
    asked = ("--recipe", "int4", "--recipe", "int8", "--target", "onnx,coreml", "--context", 512)
    done = edgeforge("plan", config, "--device", "iphone-15-pro", *asked, "--os", "26.3", "--json")
    found = package.plan(
        config,
        "iphone-15-pro",
        recipes=["int4", "int8"],
        targets=["onnx", "coreml"],
        context=512,
        os="26.3",
    )
    assert json.loads(done.out) == json.loads(json.dumps(found.to_json()))


def test_memory_and_caches_are_the_users(edgeforge, config):
    asked = ("--memory", "1GB", "--kv-cache", "int8", "--recipe", "int4")
    done = edgeforge("plan", config, "--device", "galaxy-s24", *asked)
    assert "an app may take 1.00 GB, as --memory says" in done.out and done.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--device", "iphone-15-por"], 2, "did you mean 'iphone-15-pro'?"),
        (["--device", "iphone-15", "--context", "200000"], 2, "takes 2 to 131072 tokens"),
        (["--device", "iphone-15", "--os", "x"], 2, "--os 'x' is not a version"),
        (["--device", "iphone-15", "--memory", "much"], 2, "'much' is not a size"),
        (["--device", "iphone-15", "--recipe", "int44"], 4, "did you mean 'int4'?"),
        (["--device", "iphone-15", "--target", "onxx"], 5, "did you mean 'onnx'?"),
        ([], 2, "Missing option '--device'"),
    ],
)
def test_bad_input_is_one_line(edgeforge, config, arguments, code, words):
    done = edgeforge("plan", config, *arguments)
    assert done.code == code and words in done.err and done.out == ""
    assert done.err.count("\n") == 1 and done.err.startswith("edgeforge: ")


def test_a_model_that_is_not_there_is_the_checkpoints_fault(edgeforge, tmp_path):
    done = edgeforge("plan", tmp_path / "nowhere", "--device", "iphone-15")
    assert done.code == 3 and done.err.count("\n") == 1


def test_phones_are_listed(edgeforge):
    done = edgeforge("list", "phones")
    assert "iphone-15-pro  iPhone 15 Pro: A17 Pro, 8 GB, 51.2 GB/s" in done.out
    assert "Pixel 8: Tensor G3, 8 GB\n" in done.out
