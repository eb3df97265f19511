"""What a model's sizes are read from."""

import json
import runpy
import shutil
from pathlib import Path

import pytest

from edgeforge.errors import CheckpointError, UsageError
from edgeforge.forecast.forecast import forecast
from edgeforge.forecast.sized_model import size_model
from edgeforge.synth.synthesise import PRESETS, synthesise


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(PRESETS["llama-3.2-1b"].config_json("bfloat16")))
    return path


def refused(source, words, kind=CheckpointError, **options):
    with pytest.raises(kind, match=words) as caught:
        size_model(str(source), **options)
    assert "\n" not in str(caught.value)


def test_a_configuration_is_enough(config):
    of_file, of_folder = size_model(str(config)), size_model(str(config.parent))
    assert of_file.spec == of_folder.spec and of_file.as_is is None
    assert of_file.spec.num_parameters == PRESETS["llama-3.2-1b"].parameters


def test_a_checkpoint_and_its_configuration_have_the_same_sizes(tmp_path):
    folder = synthesise("tiny-llama2", tmp_path / "checkpoint")
    whole = size_model(str(folder))
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    alone = size_model(str(tmp_path / "config.json"))
    assert whole.shapes() == alone.shapes() and whole.roles() == alone.roles()
    assert whole.as_is is not None and whole.imported == {}


def test_demo_is_the_model_that_ships():
    assert size_model("demo").spec.model_type == "openelm"


def test_of_a_hubs_repository_only_the_configuration_is_read(config, tmp_path, monkeypatch):
    from huggingface_hub import constants

    store = runpy.run_path(str(Path(__file__).parents[1] / "checkpoint" / "test_hub.py"))["put"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    store(tmp_path / "hub", "org/model", {"config.json": config.read_bytes()})
    assert size_model("org/model").spec == size_model(str(config)).spec
    refused("org/other", "HF_HUB_OFFLINE is set")


def test_what_cannot_be_sized_is_told(config, tmp_path):
    refused(tmp_path, "has no config.json, which says the model's sizes")
    refused(tmp_path / "nowhere", "neither a folder or a config.json here nor a hub id")
    refused("", "neither a folder or a config.json here")
    refused("a\0b", "is not a usable path|neither a folder")
    refused("x" * 5000, "is not a usable path|neither a folder")
    refused(config, "has no revision: leave out --revision main", UsageError, revision="main")
    text = tmp_path / "notes.txt"
    text.write_text("{}")
    refused(text, "is a file: name a config.json")
    broken = tmp_path / "config.json"
    broken.write_text("{")
    refused(broken, "is not valid JSON")
    broken.write_text('{"model_type": "rwkv"}')
    refused(broken, "has the model_type 'rwkv'")


def test_a_quantized_checkpoint_must_be_whole(config):
    fields = json.loads(config.read_text())
    packing = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    config.write_text(json.dumps({**fields, "quantization_config": packing}))
    refused(config, "is quantized already, and its configuration does not say which weights are")


def test_a_quantized_checkpoint_stays_as_it_is(packed_checkpoints, tmp_path):
    folder = tmp_path / "packed"
    config = packed_checkpoints.family("llama")
    packed_checkpoints.write(folder, config, packed_checkpoints.CASES["awq"])
    model = size_model(str(folder))
    assert model.imported
    found = forecast(model, "galaxy-s24", context=64, recipes=["int8", "as-is"])
    rows = {row.recipe: row for row in found.targets[0].rows}
    formats = {given.format.name for given in model.imported.values()}
    assert formats <= rows["int8"].formats.keys() & rows["as-is"].formats.keys()
    assert found.targets[0].best == "as-is"
