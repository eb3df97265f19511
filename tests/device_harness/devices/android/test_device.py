"""The whole Android path on a virtual phone whose processor is emulated."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import edgeforge
from device_harness.device_session import open_on
from device_harness.devices.android.runner import run_runner
from device_harness.devices.registry import open_device
from device_harness.errors import DeviceError
from device_harness.virtual_phone.emulated_commands import SHELL, EmulatedCommands
from device_harness.virtual_phone.phone import VirtualPhone
from exporters.manifest import Manifest

CORE = "cortex-a76"
TOKENS = np.random.default_rng(7).integers(0, 3000, 64)
RUNS = "/data/local/tmp/edgeforge/run"


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The demo model for ONNX and ExecuTorch."""
    root = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        edgeforge.export("demo", root / "out", targets=("onnx", "executorch"), recipe="int4")
    return root / "out"


@pytest.fixture(scope="module")
def kept_phone(arm64_root, tmp_path_factory) -> Iterator[VirtualPhone]:
    """One emulated phone for the tests of this file, so that the runtime is sent once."""
    folder = tmp_path_factory.mktemp("phone")
    commands = EmulatedCommands(arm64_root, folder, CORE)
    phone = VirtualPhone(commands, shell=SHELL, chip=commands.chip)
    try:
        with phone:
            yield phone
    finally:
        commands.close()


@pytest.fixture
def device(adb, kept_phone):
    kept_phone.clear_faults()
    with open_device(f"android:{kept_phone.serial}") as device:
        yield device


def running_there(device):
    """The commands that run on the phone, without those of this question."""
    lines = device.phone.run("ps -A -o ARGS").output.decode().splitlines()
    return [line for line in lines if "edgeforge/" in line and "keeper" not in line]


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_the_logits_are_bit_for_bit_those_of_the_emulator_without_adb(
    device, build, target, request
):
    if target == "executorch":
        request.getfixturevalue("arm64_executorch")
    folder = build / target
    manifest = Manifest.read(folder)
    with open_on(device, folder, manifest) as session:
        logits = session.logits(TOKENS)
        run = session.timed(TOKENS[:16], 4)
        assert session.peak_bytes > 20 << 20 and device.limits
    sent = device.phone.sent
    with open_on(device, folder, manifest) as session:
        again = session.timed(TOKENS[:16], 4)
    assert device.phone.sent == sent and again.tokens == run.tokens
    assert not running_there(device)
    assert device.phone.run('ls "$1"', RUNS).output == b""
    with open_device(f"arm64:{CORE}") as emulator, open_on(emulator, folder, manifest) as session:
        assert np.array_equal(session.logits(TOKENS), logits)
        assert session.timed(TOKENS[:16], 4).tokens == run.tokens


def test_a_worker_killed_for_memory_is_told_and_leaves_nothing(device, build, kept_phone):
    folder = build / "onnx"
    with open_on(device, folder, Manifest.read(folder)) as session:
        session.load()
        kept_phone.set_fault("killed", 100_000)
        with pytest.raises(DeviceError, match="killed, as a system does where memory runs out"):
            session.logits(TOKENS)
        kept_phone.clear_faults()
    assert not running_there(device)


def test_a_phone_unplugged_in_a_run_is_told_and_leaves_nothing(device, build, kept_phone):
    folder = build / "onnx"
    with open_on(device, folder, Manifest.read(folder)) as session:
        session.load()
        kept_phone.drop_connections()
        with pytest.raises(DeviceError, match=f"{device.name} was lost in running 64 tokens"):
            session.logits(TOKENS)
    assert device.phone.wait_until_back(20)
    assert not running_there(device)
    with open_on(device, folder, Manifest.read(folder)) as session:
        assert session.timed(TOKENS[:4], 2).tokens


def test_kleidiai_can_be_switched_off(adb, build, kept_phone):
    folder = build / "onnx"
    name = f"android:{kept_phone.serial}"
    with (
        open_device(name) as device,
        open_on(device, folder, Manifest.read(folder), options={"kleidiai": "off"}) as session,
        open_device(f"arm64:{CORE}") as emulator,
        open_on(emulator, folder, Manifest.read(folder), options={"kleidiai": "off"}) as other,
    ):
        assert np.array_equal(session.logits(TOKENS), other.logits(TOKENS))


@pytest.fixture(scope="module")
def shell(arm64_root):
    """A program for arm64 that does as it is told: the phone's own shell."""
    return arm64_root.system / "usr/bin/mksh"


def test_a_runner_of_the_users_own(device, shell, build, tmp_path):
    odd = ["a b", "$(x)", "'\""]
    done = run_runner(device, shell, ["-c", 'printf "%s|" "$@"; ls', "sh", *odd])
    assert (done.code, done.output) == (0, "a b|$(x)|'\"|pid\nstderr\n") and done.figures == ()
    sent = device.phone.sent
    line = (
        "stat -L -c %s model.onnx; echo done > result; echo no >&2; "
        'echo "| model | test | t/s |\n| m | tg8 | 12.5 ± 0.1 |"; exit 3'
    )
    artifact = build / "onnx", Manifest.read(build / "onnx")
    done = run_runner(device, shell, ["-c", line], artifact, results=tmp_path / "out")
    assert done.code == 3 and done.errors == "no\n"
    assert done.output.startswith(f"{(build / 'onnx/model.onnx').stat().st_size}\n")
    assert [each.decode_tokens_per_second for each in done.figures] == [12.5]
    assert [path.name for path in done.results] == ["result"]
    assert (tmp_path / "out/result").read_text() == "done\n"
    assert (
        device.phone.sent - sent < sum(f.stat().st_size for f in (build / "onnx").iterdir()) + 1e6
    )
    assert not running_there(device)


def test_a_runner_that_runs_too_long_is_ended(device, shell):
    with pytest.raises(DeviceError, match=r"mksh on .* runs for more than 2 s"):
        run_runner(device, shell, ["-c", "while :; do echo y; sleep 0.2; done"], seconds=2)
    assert not running_there(device)


@pytest.mark.parametrize(("line", "code"), [("kill -9 $$", 137), ("exit 200", 200)])
def test_how_a_runner_ended_is_told(device, shell, line, code):
    assert run_runner(device, shell, ["-c", line]).code == code


def command(*arguments):
    line = [sys.executable, "-m", "edgeforge", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def test_the_command_line_runs_a_program_and_reads_its_figures(device, shell, tmp_path):
    name, given = device.name, tmp_path / "given"
    given.write_text("PyTorchObserver none\n| model | test | t/s |\n| m | pp16 | 100.5 |\n")
    asked = "devices", "runner", shell, "--device", name, "--file", given
    done = command(*asked, "--results", tmp_path / "out", "--", "-c", "cat given; echo x > written")
    assert done.returncode == 0, done.stderr
    assert "llama-bench, 16 + 0 tokens: prefill 100.50 tokens/s\n" in done.stdout
    assert (tmp_path / "out/written").read_text() == "x\n"
    done = command(*asked, "--results", tmp_path / "out", "--", "-c", "true")
    assert (done.returncode, done.stdout) == (2, "") and "exists: name a new folder" in done.stderr
    done = command(*asked, "--json", "--", "-c", "echo 'it is \033[31mlost' >&2; exit 5")
    assert done.returncode == 6
    assert done.stderr == f"edgeforge: mksh on {name} ended with exit code 5: it is lost\n"
    record = json.loads(done.stdout)
    assert record["device"]["model"] == "EdgeForge virtual phone" and record["limits"]
    assert record["code"] == 5 and record["before"]["battery_percent"] == 80


def test_the_whole_path_from_the_command_line(device, build, kept_phone):
    name = device.name
    listed = json.loads(command("devices", "--json").stdout)
    assert {"name": name, "ready": True, "what": "EdgeForge virtual phone", "cure": ""} in listed
    done = command("verify", build / "onnx", "--device", name, "--tokens", 64)
    assert done.returncode == 0, done.stderr
    assert f"{name} is EdgeForge virtual phone, Android 14" in done.stdout
    kept_phone.set_fault("throttling", 2)
    measured = "bench", build / "onnx", "--device", name, "--prompt", 8, "--output", 3, "--json"
    done = command(*measured, "--runs", 1, "--warm-up", 0, "--longest-wait", 0)
    bench = json.loads(done.stdout)
    assert '"thermal_status": 2' in done.stdout and '"emulated": true' in done.stdout
    assert "EdgeForge virtual phone" in done.stdout and bench["schema_version"]
    kept_phone.clear_faults()
    done = command(*measured, "--runs", 1, "--warm-up", 0)
    assert done.returncode == 0, done.stderr
    assert not running_there(device)


def test_a_program_runs_on_phones_alone(shell):
    done = command("devices", "runner", shell, "--device", "host")
    assert done.returncode == 2
    assert done.stderr == ("edgeforge: a program of your own runs on phones, and host is none\n")
