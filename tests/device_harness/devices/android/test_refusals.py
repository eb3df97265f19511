"""Phones and files that cannot be used are refused with one sentence, before anything is sent."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from device_harness.device_session import open_on
from device_harness.devices.android.runner import run_runner
from device_harness.devices.registry import open_device
from device_harness.errors import DeviceError
from exporters.manifest import Manifest


@pytest.mark.parametrize(
    ("fault", "words"),
    [("32-bit", "a 32-bit arm processor (armeabi-v7a)"), ("x86", "an x86 processor (x86_64)")],
)
def test_a_phone_of_another_processor(virtual_phone, fault, words):
    virtual_phone.set_fault(fault)
    with pytest.raises(DeviceError) as caught:
        open_device(f"android:{virtual_phone.serial}")
    assert str(caught.value) == (
        f"android:{virtual_phone.serial} has {words}, and what runs artifacts there is for "
        f"arm64-v8a: use a phone with a 64-bit arm processor and system"
    )


def test_an_artifact_for_another_target(virtual_phone, artifact):
    manifest = Manifest.read(artifact)
    other = Manifest(**{**vars(manifest), "target": "coreml"})
    with (
        open_device(f"android:{virtual_phone.serial}") as device,
        pytest.raises(DeviceError, match="coreml artifacts do not run on android:"),
    ):
        open_on(device, artifact, other)
    assert device.phone.sent == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Path(sys.executable).resolve().read_bytes()[:64], "is a program for another processor"),
        (b"#!/bin/sh\necho this is a script, and it is long enough", "is no program of Linux"),
        (b"", "is no program of Linux"),
    ],
    ids=["of this host", "a script", "empty"],
)
def test_a_runner_that_no_phone_starts(virtual_phone, tmp_path, content, words):
    runner = tmp_path / "runner"
    runner.write_bytes(content)
    with open_device(f"android:{virtual_phone.serial}") as device:
        with pytest.raises(DeviceError) as caught:
            run_runner(device, runner, [])
        assert words in str(caught.value) and device.phone.sent == 0
        with pytest.raises(DeviceError, match="cannot be read: No such file"):
            run_runner(device, tmp_path / "none", [])


def test_a_file_of_an_artifact_that_is_missing(virtual_phone, artifact, tmp_path):
    manifest = Manifest.read(artifact)
    os.makedirs(tmp_path / "copy")
    with open_device(f"android:{virtual_phone.serial}") as device:
        with pytest.raises(DeviceError, match="cannot be read: No such file"):
            device.put_artifact(tmp_path / "copy", manifest)
        assert device.phone.sent == 0


def test_how_much_of_what_is_sent_has_arrived_is_told(virtual_phone, artifact):
    told = []
    name = f"android:{virtual_phone.serial}"
    with open_device(name, progress=lambda *each: told.append(each)) as device:
        device.put_artifact(artifact, Manifest.read(artifact))
        assert {stage for stage, _, _ in told} == {f"send the artifact {artifact.name}"}
        assert told[0][1] == 0 and told[-1][1] == told[-1][2] > 0
        count = len(told)
        device.put_artifact(artifact, Manifest.read(artifact))
        assert len(told) == count
