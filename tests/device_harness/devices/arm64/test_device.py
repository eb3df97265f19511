"""Artifacts on emulated arm64 cores."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from device_harness.device_session import open_on
from device_harness.devices.arm64.cores import CORES
from device_harness.devices.arm64.device import Arm64Device, environment_in, find_arm64
from device_harness.devices.registry import open_device
from device_harness.errors import DeviceError
from device_harness.registry import open_session
from exporters.manifest import Manifest

TOKENS = np.arange(3, 27)


def on(core, folder, kleidiai=None):
    """Logits of `TOKENS`, those of `extend`, and the session's words, from an emulated core."""
    manifest = Manifest.read(folder)
    with (
        open_device(f"arm64:{core}") as device,
        open_on(device, folder, manifest, 1, {"kleidiai": kleidiai}) as session,
    ):
        return session.logits(TOKENS), session.extend(TOKENS), session.runtime, session.limits


@pytest.fixture(scope="module")
def here(artifact):
    with open_session(artifact, Manifest.read(artifact), 1) as session:
        return session.logits(TOKENS)


@pytest.fixture(scope="module")
def found(arm64_root, artifact):
    """What the cortex-a76 gives with KleidiAI and without."""
    return {choice: on("cortex-a76", artifact, choice) for choice in ("on", "off")}


def test_an_emulated_core_gives_nearly_the_logits_of_the_host(found, here):
    for logits, last, _, _ in found.values():
        assert logits.shape == here.shape
        # Arm's kernels round activations, so the logits are near and not equal.
        assert 0 < np.abs(logits - here).max() < 0.1 * np.ptp(here)
        assert np.abs(last - here[-1]).max() < 0.1 * np.ptp(here)


def test_kleidiai_changes_the_logits_and_is_told(found):
    assert not np.array_equal(found["on"][0], found["off"][0])
    assert found["off"][2].endswith("without KleidiAI)")
    assert "KleidiAI" not in found["on"][2]


def test_the_core_chooses_the_kernels(arm64_root, artifact, found):
    with_i8mm = on("cortex-a710", artifact)
    assert not np.array_equal(with_i8mm[0], found["on"][0])


def test_limits_say_that_times_mean_nothing_and_that_max_is_no_core():
    assert "times" in Arm64Device("cortex-a55").limits[0]
    assert any("no real core" in limit for limit in Arm64Device("max").limits)
    assert not any("no real core" in limit for limit in Arm64Device("cortex-a55").limits)


def test_facts_and_the_default_core(arm64_root):
    with open_device("arm64") as device:
        assert device.name == "arm64:cortex-a76" and device.facts().emulated
        assert device.facts().as_json()["more"]["kernels"] == "dot product"


@pytest.mark.parametrize("name", CORES)
def test_a_core_s_own_cpuinfo_is_what_the_emulator_states(arm64_root, name):
    """Programs find their kernels by it, and die of an illegal instruction where the two differ."""
    command = [*arm64_root.command(name), str(arm64_root.system / "usr/bin/toybox")]
    shown = subprocess.run([*command, "cat", "/proc/cpuinfo"], capture_output=True, text=True)
    ours = (arm64_root.core(name) / "proc/cpuinfo").read_text()
    stated, written = fields(shown.stdout), fields(ours)
    features = set(written.pop("Features").split())
    extra = features - set(stated.pop("Features").split())
    assert not extra
    assert {key: stated[key] for key in written} == written
    if CORES[name].is_real:
        assert features == set(fields(shown.stdout)["Features"].split())


def fields(text):
    lines = [line.partition(":") for line in text.strip().split("\n\n")[0].splitlines()]
    return {
        key.strip(): value.strip()
        for key, _, value in lines
        if key.strip() not in ("model name", "processor")
    }


def test_an_unknown_core_is_one_sentence():
    with pytest.raises(
        DeviceError, match=r"no emulated core 'cortex-a77' \(did you mean 'cortex-a76'"
    ):
        open_device("arm64:cortex-a77")


def test_a_choice_of_kernels_that_there_is_not_is_one_sentence(arm64_root, artifact):
    with pytest.raises(DeviceError, match="KleidiAI is on or off, not 'maybe'"):
        on("cortex-a76", artifact, "maybe")


def test_without_a_root_the_cure_is_told(tmp_path, monkeypatch, artifact):
    monkeypatch.setenv("EDGEFORGE_ARM64", str(tmp_path))
    (row,) = find_arm64()
    assert not row.ready and row.cure == "Run `edgeforge devices setup arm64` once."
    with pytest.raises(DeviceError, match="is not set up: run `edgeforge devices setup arm64`"):
        on("cortex-a76", artifact)


def test_with_a_root_each_core_is_reachable(arm64_root):
    assert [row.name for row in find_arm64()] == [f"arm64:{name}" for name in CORES]
    assert all(row.ready for row in find_arm64())


def test_nothing_of_the_host_leads_python_elsewhere(arm64_root, monkeypatch):
    for name in ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "QEMU_CPU"):
        monkeypatch.setenv(name, "/nowhere")
    given = environment_in(arm64_root, [], "onnx")
    assert "/nowhere" not in given.values()
