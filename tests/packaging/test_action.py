"""The GitHub Action and the pre-commit hook, run as these two run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeforge import api
from edgeforge.gate.gate import GateOptions, check
from edgeforge.synth.synthesise import synthesise
from quant.yaml_input import parse_yaml

ROOT = Path(__file__).parents[2]
ACTION = parse_yaml((ROOT / "action.yml").read_bytes())
STEPS = ACTION["runs"]["steps"]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A repository with an artifact whose report is fresh, and a policy."""
    root = tmp_path_factory.mktemp("action")
    (root / "edgeforge-policy.yaml").write_text("version: 1\nartifacts: [out]\ntokens: 64\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        checkpoint = synthesise("tiny-llama", root / "model")
        api.export(checkpoint, root / "out", recipe="int8", context=64)
        check([], GateOptions(policy=root / "edgeforge-policy.yaml"))
    return root


@pytest.fixture
def repository(build, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(build / "cache"))
    shutil.copytree(build / "out", tmp_path / "out")
    shutil.copy(build / "edgeforge-policy.yaml", tmp_path)
    return tmp_path


def value_of(text: str, inputs: dict[str, str], action_path: str) -> str:
    """An expression of the action as GitHub evaluates it; those that it has are these."""
    given = {f"inputs.{name}": value for name, value in inputs.items()}
    given["github.action_path"] = action_path

    def found(match: re.Match[str]) -> str:
        name, _, wanted = match[1].partition(" == ")
        return given[name] if not wanted else str(given[name] == wanted.strip("'")).lower()

    return re.sub(r"\$\{\{ (.*?) \}\}", found, text)


def run_action(folder: Path, action_path: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """Runs the steps in order, each as GitHub's runner does, until one fails."""
    known = {name: each["default"] for name, each in ACTION["inputs"].items()}
    assert inputs.keys() <= known.keys()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_ACTIONS": "true",
        "GITHUB_WORKSPACE": str(folder),
        "GITHUB_OUTPUT": str(folder / "output"),
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
    }
    done = None
    for number, step in enumerate(STEPS):
        values = known | inputs
        if value_of(step.get("if", "true"), values, str(action_path)) != "true":
            continue
        own = {
            name: value_of(text, values, str(action_path))
            for name, text in step.get("env", {}).items()
        }
        script = folder / f"step-{number}.sh"
        script.write_text(step["run"])
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=folder,
            env=environment | own,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            break
    assert done is not None
    return done


def test_every_step_is_a_script_without_expressions():
    for step in STEPS:
        assert step["shell"] == "bash"
        # What a workflow's author gives would run as a command.
        assert "${{" not in step["run"]


def test_a_sound_artifact_passes(repository):
    done = run_action(repository, ROOT, install="false")
    assert done.returncode == 0, done.stderr
    assert "PASSED  out (onnx, int8)" in done.stdout
    assert (repository / "output").read_text() == "passed=true\n"
    assert "## edgeforge check passed" in (repository / "summary.md").read_text()
    assert (repository / "edgeforge-check.xml").is_file()
    assert (repository / "edgeforge-check.sarif").is_file()


def test_an_artifact_that_was_changed_fails(repository):
    with (repository / "out" / "model.onnx").open("r+b") as stream:
        stream.write(b"\0")
    done = run_action(repository, ROOT, install="false", sarif="", artifacts="out\n\n")
    assert done.returncode == 1
    assert "::error file=edgeforge-policy.yaml,line=1,title=out%3A files::" in done.stdout
    assert (repository / "output").read_text() == "passed=false\n"
    assert not (repository / "edgeforge-check.sarif").exists()


def test_a_check_that_cannot_run_fails_otherwise(repository):
    done = run_action(repository, ROOT, install="false", baseline="none.json")
    assert done.returncode == 2
    assert not (repository / "output").exists()
    hostile = run_action(repository, ROOT, install="false", policy="$(touch owned); touch owned")
    assert hostile.returncode == 2
    assert not (repository / "owned").exists()


def test_the_first_step_installs_this_very_source(repository, tmp_path, monkeypatch):
    tracked = subprocess.run(
        ["git", "ls-files", "edgeforge", "quant", "exporters", "device_harness", "pyproject.toml",
         "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\n")  # fmt: skip
    source, place = tmp_path / "source", tmp_path / "installed"
    for name in filter(None, tracked):
        if (ROOT / name).suffix not in (".c", ".h"):  # compiling takes long, and is optional
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    # Nothing but this package, and nothing from a network.
    for name in ("NO_DEPS", "NO_INDEX", "QUIET"):
        monkeypatch.setenv(f"PIP_{name}", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's way to say: without
    monkeypatch.setenv("PIP_TARGET", str(place))
    done = run_action(repository, source)
    assert done.returncode == 0, done.stderr
    assert (place / "edgeforge" / "gate" / "schemas" / "check-1.schema.json").is_file()


def test_the_hook_runs_where_something_changed(repository, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PRE_COMMIT_HOME", str(repository / ".cache"))
    hooks = repository / "hooks"
    hooks.mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    for folder in (hooks, repository):
        for command in (["init", "-q"], ["add", "."], [
            "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "first"
        ]):  # fmt: skip
            subprocess.run(["git", *command], cwd=folder, check=True)

    def hook() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pre_commit", "try-repo", hooks, "edgeforge-check", "--all"],
            cwd=repository, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = hook()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed" in done.stdout
    with (repository / "out" / "model.onnx").open("r+b") as stream:
        stream.write(b"\0")
    done = hook()
    assert done.returncode == 1
    assert "VIOLATION  files" in done.stdout
