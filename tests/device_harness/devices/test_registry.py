"""What every kind of device promises."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import edgeforge
from device_harness.device_session import open_on
from device_harness.devices.device import Reachable
from device_harness.devices.registry import DEFAULT, KINDS, find_devices, kind_of, open_device
from device_harness.errors import DeviceError
from exporters.manifest import Manifest
from exporters.registry import TARGETS


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_runs_targets_that_exist_and_takes_the_options_that_it_names(kind):
    row = KINDS[kind]
    assert row.targets and set(row.targets) <= set(TARGETS)
    taken = inspect.signature(row.open).parameters.values()
    assert {each.name for each in taken if each.kind is each.KEYWORD_ONLY} == set(row.options)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_has_a_name_of_its_kind_and_else_a_cure(kind):
    found = KINDS[kind].find()
    assert found
    for each in found:
        assert isinstance(each, Reachable) and kind_of(each.name) == kind and each.what
        assert bool(each.cure) != each.ready
        assert (each.what + each.cure).isprintable()


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_of_no_kind_is_refused(kind):
    with pytest.raises(DeviceError) as caught:
        open_device(kind, {"no_such_option": "1"})
    assert str(caught.value) == f"{kind} has no option --no-such-option: leave it out"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["$(touch x)", "; rm -rf /", "../..", "a b", "\x1b[31m", "-s"])
def test_a_place_that_is_none_is_one_sentence(kind, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DeviceError) as caught, open_device(f"{kind}:{place}") as device:
        device.facts()
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_default_is_there():
    assert any(each.ready and each.name == DEFAULT for each in find_devices())


@pytest.mark.parametrize("name", ["hots", "toaster:1", "", ":", "host:2"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(DeviceError) as caught:
        open_device(name)
    assert "host" in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        from edgeforge.synth.synthesise import synthesise

        checkpoint = synthesise("tiny-llama", root / "checkpoint")
        return edgeforge.export(checkpoint, root / "out", targets=("onnx",), context=32)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_of_a_target_that_does_not_run_there_is_refused(kind, artifact):
    from dataclasses import replace

    manifest = replace(Manifest.read(artifact), target="tpu")

    class Named:
        name = kind

    with pytest.raises(DeviceError, match=f"tpu artifacts do not run on {kind}, which runs those"):
        open_on(Named(), artifact, manifest)
