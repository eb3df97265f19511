"""Small artifacts whose reports are fresh, a policy, and the gate."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgeforge import api
from edgeforge.gate.gate import GateOptions, check
from edgeforge.synth.synthesise import synthesise

POLICY = """
version: 1
text: held.txt
tokens: 1024
bounds:
  total.kl_mean: {at_most: 0.5}
"""


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """A checkpoint with a tokenizer, and artifacts of it by recipe, verified on 1,024 tokens."""
    root = tmp_path_factory.mktemp("gate")
    checkpoint = synthesise("tiny-llama", root / "model")
    words = Path(api.__file__).parents[1].joinpath("demo", "heldout.txt").read_text("utf-8")
    (root / "held.txt").write_text(words[:40_000], "utf-8")
    (root / "edgeforge-policy.yaml").write_text(POLICY, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        folders = [
            api.export(checkpoint, root / recipe, recipe=recipe, context=64)[0]
            for recipe in ("int8", "int4-g32")
        ]
        check(folders, GateOptions(policy=root / "edgeforge-policy.yaml"))
    return root


@pytest.fixture
def room(build, tmp_path, monkeypatch):
    """A folder with copies of all that, in which a test may change what it likes."""
    monkeypatch.setenv("EDGEFORGE_CACHE", str(build / "cache"))
    for name in ("int8", "int4-g32", "held.txt", "edgeforge-policy.yaml"):
        source = build / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def gate(room):
    """Runs the gate on folders of the room: by default the int8 artifact, its policy at hand."""

    def run(*folders: str, **options):
        return check([Path(each) for each in folders or ("int8",)], GateOptions(**options))

    return run
