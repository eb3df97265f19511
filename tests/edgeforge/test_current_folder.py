"""Files of the current folder that have the names of modules are never run."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

from edgeforge import api
from edgeforge.cli.app import app
from edgeforge.synth.synthesise import synthesise
from exporters.registry import TARGETS

ROOT = Path(__file__).parents[2]
PACKAGES = ("edgeforge", "device_harness", "exporters", "quant")
# Modules of Python, of packages that EdgeForge needs and of EdgeForge itself.
PLANTED = (
    *("json", "typing", "dataclasses", "signal", "struct", "pathlib", "subprocess", "importlib"),
    *("numpy", "torch", "onnx", "onnxruntime", "executorch", "tokenizers", "typer", "argparse"),
    *("exporters", "device_harness", "quant", "tempfile", "resource", "warnings", "types"),
)
# What each command is given, by the command's name: a new command needs a row.
COMMANDS = {
    "export-module": [("{factory}:made", "--out", "{new}", "-q")],
    "export": [("{checkpoint}", "--out", "{new}", "-q", "--target", "{targets}")],
    "export-adapter": [("{copy}", "{adapter}", "-q")],
    "plan": [("{checkpoint}", "--device", "iphone-15-pro")],
    "verify": [("{artifacts}/{target}", "-q", "--tokens", "16")],
    "check": [("{artifacts}/onnx", "-q", "--no-timed")],
    "compare": [("{artifacts}/onnx", "{artifacts}/coreml")],
    "report": [("{artifacts}", "--out", "{new}")],
    "bench": [("{artifacts}/{target}", "-q", "--runs", "1", "--out", "{new}")],
    "diagnose": [("{artifacts}/{target}", "-q", "--tokens", "16", "--no-weights")],
    "inspect": [("{artifacts}/{target}",)],
    "run": [("{artifacts}/{target}", "-p", "a", "-n", "2")],
    "chat": [("{artifacts}/{target}", "--chat-template", "{template}", "-n", "2")],
    "coreml-run": [("{artifacts}/coreml/model.mlpackage",)],
    "list": [("recipes",)],
    "devices": [("--json",)],
    "doctor": [("--json",)],
    "synth": [("tiny-llama", "--out", "{new}", "-q")],
}


FACTORY = """
import torch

def made():
    return torch.nn.Linear(32, 4), torch.ones(1, 32)
"""


def rows() -> list[tuple[str, ...]]:
    """Every command, once for each target where it takes an artifact of one."""
    found = []
    for name, lines in COMMANDS.items():
        for line in lines:
            for target in TARGETS if "{target}" in "".join(line) else ("",):
                found.append((name, *(word.replace("{target}", target) for word in line)))
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory, peft_adapters):
    root = tmp_path_factory.mktemp("current folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        checkpoint = synthesise("tiny-llama", root / "checkpoint")
        api.export(checkpoint, root / "artifacts", targets=list(TARGETS), context=16)
        for target in ("onnx", "coreml"):
            api.verify(root / "artifacts" / target, tokens=64, timed=False)
        template = root / "template.jinja"
        template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
        factory = root / "factory.py"
        factory.write_text(FACTORY)
        copy = shutil.copytree(root / "artifacts" / "onnx", root / "copy")
        shapes = {"model.layers.0.self_attn.o_proj": (128, 128)}
        yield {
            "checkpoint": checkpoint,
            "artifacts": root / "artifacts",
            "template": template,
            "factory": factory,
            "copy": copy,
            "adapter": peft_adapters.write(root / "adapter", peft_adapters.factors(shapes)),
        }


@pytest.fixture
def witness(tmp_path, monkeypatch):
    """Stands in a folder whose modules write into a file when they are run; returns the file."""
    folder, file = tmp_path / "here", tmp_path / "witness"
    folder.mkdir()
    monkeypatch.chdir(folder)
    plant(folder, file)
    return file


def plant(folder: Path, file: Path) -> None:
    for name in PLANTED:
        source = f"open({str(file)!r}, 'a').write('{name} ')\nraise SystemExit('{name} was run')\n"
        (folder / f"{name}.py").write_text(source)


def test_each_command_has_a_row():
    assert COMMANDS.keys() == typer.main.get_command(app).commands.keys()


@pytest.mark.parametrize("row", rows(), ids=" ".join)
def test_no_command_runs_a_file_of_the_current_folder(
    edgeforge, places, witness, tmp_path, monkeypatch, row
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n")))
    known = {**places, "targets": ",".join(TARGETS), "new": tmp_path / "new"}
    shown = edgeforge(*(word.format(**known) for word in row))
    assert not witness.exists(), witness.read_text()
    assert shown.code == 0, shown.err


@pytest.mark.parametrize("target", TARGETS)
def test_an_artifact_that_one_stands_in_brings_no_modules(places, tmp_path, monkeypatch, target):
    artifact = shutil.copytree(places["artifacts"] / target, tmp_path / "artifact")
    plant(artifact, tmp_path / "witness")
    monkeypatch.chdir(artifact)
    assert api.bench(".", prefill=4, decode=2, threads=1).decode_tokens == 2
    with api.load(".", threads=1) as session:
        assert session.extend(np.array([1, 2], np.int64)).shape == (512,)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("module", ["edgeforge", "edgeforge.cli.entry"])
def test_the_current_folder_leaves_the_path_of_python_m(witness, module):
    # What Python itself imports to find a module of ours, it imports before any line of ours.
    for name in ("importlib", "warnings", "types"):
        Path(f"{name}.py").unlink()
    done = subprocess.run(
        [sys.executable, "-m", module, "list", "targets"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not witness.exists()


def test_children_take_no_relative_entry_of_pythonpath(places, witness, monkeypatch):
    Path("sub").mkdir()
    monkeypatch.setenv("PYTHONPATH", f".:sub/..:{ROOT}:")
    artifact = places["artifacts"] / "executorch"
    assert api.bench(artifact, prefill=4, decode=2, threads=1).decode_tokens == 2
    assert not witness.exists()


def test_the_installed_command_leaves_relative_entries_of_pythonpath(witness, tmp_path):
    # Python starts with such an entry before any line of ours: only what we import is tested.
    for name in PLANTED:
        if name not in ("numpy", "onnx", "typer", "json", "quant", "exporters", "signal"):
            Path(f"{name}.py").unlink()
    command = tmp_path / "edgeforge"
    command.write_text("import sys\nfrom edgeforge.cli.entry import entry\nsys.exit(entry())\n")
    done = subprocess.run(
        [sys.executable, command, "list", "recipes", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f":{ROOT}"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not witness.exists()


def test_a_package_of_the_current_folder_is_refused_without_being_run(witness):
    done = subprocess.run(
        [sys.executable, "-c", "import edgeforge"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "edgeforge needs its own package 'device_harness'" in done.stderr
    assert not witness.exists()


def test_every_child_is_started_in_one_way():
    found = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"sys\.executable|multiprocessing|ProcessPool", path.read_text())
    }
    # The other one starts the user's own command once more, as it was given.
    assert found == {"device_harness/child_process.py", "edgeforge/cli/streams.py"}
