"""What pyproject.toml promises, what make installs, and what the changelog says agree."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PRIVATE = ("torch", "coremltools", "executorch", "torchao")


def lock(name: str) -> dict[str, Version]:
    """Versions by package name, of a file of exact versions."""
    pins = {}
    for line in (ROOT / "requirements" / f"lock-{name}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            package, _, version = line.partition("==")
            pins[canonicalize_name(package)] = Version(version)
    return pins


RUN, EXECUTORCH, DEV = lock("run"), lock("executorch"), lock("dev")


def requirements(extra: str) -> list[Requirement]:
    """What an extra brings, extras that it names included."""
    found = []
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == "edgeforge":
            found += [each for name in sorted(requirement.extras) for each in requirements(name)]
        else:
            found.append(requirement)
    return found


BASE = list(map(Requirement, PROJECT["dependencies"]))


@pytest.mark.parametrize(
    ("wanted", "pins"),
    [
        pytest.param([*BASE, *requirements("onnx")], RUN, id="run"),
        pytest.param([*BASE, *requirements("dev")], DEV, id="dev"),
    ],
)
def test_locked_versions_lie_in_the_promised_ranges(wanted, pins):
    for requirement in wanted:
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def test_what_testing_installs_holds_what_running_installs():
    assert RUN.items() <= DEV.items()
    assert EXECUTORCH.items() <= DEV.items()
    assert {"executorch": Version("1.4.1")} == EXECUTORCH


def test_running_installs_no_tools():
    assert not RUN.keys() & {"pytest", "ruff", "mypy", "coremltools", "transformers", "torchao"}


@pytest.mark.parametrize("name", ["run", "executorch", "dev"])
def test_lock_files_name_no_server_and_no_build(name):
    for line in (ROOT / "requirements" / f"lock-{name}.txt").read_text().splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
        assert "://" not in line


@pytest.mark.parametrize("requirement", [*BASE, *requirements("all")], ids=str)
def test_every_range_has_a_floor_and_private_interfaces_a_ceiling(requirement):
    kinds = {each.operator for each in requirement.specifier}
    assert kinds & {">=", "=="}
    if requirement.name in PRIVATE:
        assert kinds & {"<", "=="}


def test_the_exact_version_of_executorch_is_the_one_that_the_code_asks_for():
    from exporters.executorch.installed import SUPPORTED

    (asked,) = [each for each in requirements("executorch") if each.name == "executorch"]
    assert str(asked.specifier) == f"=={SUPPORTED}"


def test_all_holds_every_runtime():
    wanted = {str(each) for name in ("onnx", "coreml", "executorch") for each in requirements(name)}
    assert wanted <= set(map(str, requirements("all")))


def test_the_installed_version_is_the_one_of_pyproject():
    assert importlib.metadata.version("edgeforge") == PROJECT["version"]


def test_the_changelog_has_dated_versions_and_the_newest_is_this_one():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    dated = [
        re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", each) for each in headings[1:]
    ]
    assert all(dated)
    versions = [Version(each[1]) for each in dated]
    assert versions == sorted(versions, reverse=True)
    assert versions[0] == Version(PROJECT["version"])
    assert [each[2] for each in dated] == sorted((each[2] for each in dated), reverse=True)
