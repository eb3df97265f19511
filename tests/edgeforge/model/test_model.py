"""Opening a model: a checkpoint, its spec and its weights at once; and what importing costs."""

import json
import subprocess
import sys

import pytest

from edgeforge.errors import CheckpointError
from edgeforge.model.model import DEMO_FOLDER, open_model
from edgeforge.synth.synthesise import PRESETS, synthesise

pytestmark = pytest.mark.usefixtures("one_thread")

HEAVY = ("torch", "onnx", "onnxruntime", "transformers", "safetensors")


@pytest.fixture
def folder(tmp_path):
    return synthesise("tiny-llama", tmp_path / "ein Modell ü")


def edit(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("tiny-")])
def test_every_tiny_preset_opens(preset, tmp_path):
    model = open_model(str(synthesise(preset, tmp_path / preset)))
    assert model.spec.model_type == PRESETS[preset].model_type
    assert model.spec.num_parameters == PRESETS[preset].parameters
    assert list(model.weights.shapes()) == list(model.spec.weights)
    assert model.spec.eos == (257,) or set(model.spec.eos) == {257, 258}


def test_generation_config_adds_its_ends_of_text(folder):
    edit(folder, "generation_config.json", eos_token_id=[5, 257])
    assert open_model(str(folder)).spec.eos == (5, 257)


def test_fields_vouched_for_reach_the_reader(folder):
    edit(folder, clip_qkv=8.0)
    with pytest.raises(CheckpointError, match="--ignore-config clip_qkv"):
        open_model(str(folder))
    assert open_model(str(folder), ignore_config=["clip_qkv"]).spec.model_type == "llama"


def test_a_configuration_of_another_model_is_refused(folder):
    edit(folder, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\..* and 8 more.*3 layers"):
        open_model(str(folder))
    edit(folder, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.1\..* and 8 more"):
        open_model(str(folder))
    edit(folder, num_hidden_layers=2, intermediate_size=255)
    with pytest.raises(CheckpointError, match=r"\[256, 128\]; config.json calls for \[255, 128\]"):
        open_model(str(folder))


def test_demo_names_the_model_that_ships_unless_a_folder_has_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if (DEMO_FOLDER / "model.safetensors").exists():
        assert open_model("demo").checkpoint.path == DEMO_FOLDER
    synthesise("tiny-openelm", tmp_path / "demo")
    assert open_model("demo").spec.num_parameters == PRESETS["tiny-openelm"].parameters


@pytest.mark.parametrize(
    "statement",
    [
        "import edgeforge",
        "import edgeforge.families.spec, edgeforge.errors, edgeforge.families.registry",
        "import edgeforge.model.model, edgeforge.model.checkpoint_weights\n"
        "import edgeforge.checkpoint.checkpoint",
        "import sys; sys.argv = ['edgeforge', '--help']\n"
        "from edgeforge.cli.entry import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code",
    ],
)
def test_importing_and_help_load_nothing_heavy(statement):
    script = f"{statement}\nimport sys; print(); print(*sorted({{*sys.modules}} & {{*{HEAVY!r}}}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == ""
    if "help" in statement:
        assert "export" in run.stdout


def test_a_checkpoint_is_opened_and_checked_without_torch(folder):
    script = (
        "import sys; from edgeforge.model.model import open_model;"
        f"model = open_model({str(folder)!r}); assert model.spec.num_parameters;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
