"""ExecuTorch's own kernels for arm64, through the shim."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess

import numpy as np
import pytest

from device_harness.device_session import open_on
from device_harness.devices.arm64.executorch.constructors import leave_out_constructors
from device_harness.devices.arm64.executorch.place import executorch_folder, find_executorch
from device_harness.devices.arm64.instructions import count_instructions
from device_harness.devices.arm64.pins import read_pins
from device_harness.devices.registry import open_device
from device_harness.errors import DeviceError, SetupError
from device_harness.registry import open_session
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from exporters.manifest import Manifest
from exporters.options import TargetOptions
from exporters.registry import find_target

_HEAD = b"\x7fELF\x02\x01"
TOKENS = np.arange(3, 27)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A tiny Llama for ExecuTorch, with a context of 64 tokens."""
    root = tmp_path_factory.mktemp("program")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        model = open_model(str(synthesise("tiny-llama", root / "checkpoint")))
        options = ExportOptions("int4", context=64)
        export(model, [find_target("executorch")], root / "program", options)
    return root / "program"


def test_the_emulated_core_agrees_with_the_host(arm64_executorch, program):
    manifest = Manifest.read(program)
    with open_session(program, manifest, 1) as session:
        here, last = session.logits(TOKENS), session.extend(TOKENS)
    with (
        open_device("arm64:cortex-a76") as device,
        open_on(device, program, manifest, 1) as session,
    ):
        assert np.abs(session.logits(TOKENS) - here).max() < 0.05 * np.ptp(here)
        assert np.abs(session.extend(TOKENS) - last).max() < 0.05 * np.ptp(here)
        assert session.extend(TOKENS[:1]).shape == last.shape
        session.reset()
        assert np.abs(session.extend(TOKENS) - last).max() < 0.05 * np.ptp(here)
        assert session.runtime.startswith("executorch ") and session.has_all_positions


def test_weights_in_a_file_of_their_own_give_the_same_logits(arm64_executorch, tmp_path, program):
    model = open_model(str(program.parent / "checkpoint"))
    options = ExportOptions("int4", context=64, target=TargetOptions(weights="external"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(program.parent / "cache"))
        export(model, [find_target("executorch")], tmp_path / "apart", options)
    assert (tmp_path / "apart/model.ptd").is_file()
    found = []
    for folder in (program, tmp_path / "apart"):
        with (
            open_device("arm64:cortex-a76") as device,
            open_on(device, folder, Manifest.read(folder), 1) as session,
        ):
            found.append(session.extend(TOKENS))
    assert np.array_equal(*found)


def test_a_damaged_program_is_one_sentence(arm64_executorch, program, tmp_path):
    for name in os.listdir(program):
        if name != "model.pte":
            (tmp_path / name).write_bytes((program / name).read_bytes())
    content = (program / "model.pte").read_bytes()
    (tmp_path / "model.pte").write_bytes(content[:200] + bytes(200) + content[400:2000])
    with (
        open_device("arm64:cortex-a76") as device,
        pytest.raises(DeviceError) as caught,
        open_on(device, tmp_path, Manifest.read(program), 1) as session,
    ):
        session.logits(TOKENS)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_instructions_of_a_program_are_counted_in_its_own_process(arm64_executorch, program):
    found = count_instructions(program, prompt=8, output=3, core="cortex-a710")
    assert found.prefill["all"] > found.decode["all"] > 10_000
    assert found.prefill["i8mm"] > 0 == found.decode["i8mm"]
    assert len(found.tokens) == 3


def test_what_is_not_set_up_or_not_whole_is_told(place, program):
    with pytest.raises(SetupError, match="run `edgeforge devices setup arm64 --executorch` once"):
        find_executorch(read_pins())
    executorch_folder(read_pins()).mkdir(parents=True)
    with pytest.raises(SetupError, match=r"are not whole .*whole\.json is missing"):
        find_executorch(read_pins())


def test_a_library_without_constructors_still_works(tmp_path):
    source, library = tmp_path / "x.c", tmp_path / "libx.so"
    source.write_text(
        "static int n = 1;\n__attribute__((constructor)) static void begin(void) { n = 2; }\n"
        "int number(void) { return n; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    shutil.copy(library, tmp_path / "liby.so")
    leave_out_constructors(tmp_path / "liby.so")
    assert ctypes.CDLL(str(library)).number() == 2
    assert ctypes.CDLL(str(tmp_path / "liby.so")).number() == 1


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + bytes(200), b"#!"]
)
def test_what_is_no_library_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(SetupError, match="is no shared library"):
        leave_out_constructors(tmp_path / "x")
