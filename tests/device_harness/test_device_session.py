"""Artifacts on the host as a device: the worker's process, and what becomes of it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import edgeforge
from device_harness.device_session import DeviceSession, open_on
from device_harness.devices.device import Place
from device_harness.devices.host import HostDevice, ProcessChannel
from device_harness.errors import DeviceError
from device_harness.registry import RUNTIMES, open_session
from edgeforge.diagnosis.points import artifact_points
from edgeforge.synth.synthesise import synthesise
from exporters.manifest import Manifest

TEXT = np.arange(1, 13, dtype=np.int64)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("on a device")
    checkpoint = synthesise("tiny-llama", root / "checkpoint")
    options = {"recipe": "int4", "context": 32}
    folders = edgeforge.export(checkpoint, root / "out", targets=tuple(RUNTIMES), **options)
    return dict(zip(RUNTIMES, folders, strict=True))


def opened(folder: Path) -> DeviceSession:
    return open_on(HostDevice(), folder, Manifest.read(folder), 1)


@pytest.mark.parametrize("target", RUNTIMES)
def test_a_worker_gives_what_the_session_gives(target, artifacts):
    folder = artifacts[target]
    with opened(folder) as there, open_session(folder, Manifest.read(folder), 1) as here:
        assert (there.runtime, there.context) == (here.runtime, here.context)
        assert (there.vocab_size, there.chunks) == (here.vocab_size, here.chunks)
        assert there.has_all_positions == here.has_all_positions
        assert there.limits == here.limits
        assert (there.extend(TEXT[:5]) == here.extend(TEXT[:5])).all()
        assert (there.logits(TEXT) == here.logits(TEXT)).all()
        assert (there.extend(TEXT[5:]) == here.extend(TEXT[5:])).all()
        there.reset()
        here.reset()
        assert (there.extend(TEXT) == here.extend(TEXT)).all()
        assert there.first_not_finite(TEXT) is None
        assert there.peak_bytes > 2**20


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_values_come_from_there_too(target, artifacts):
    folder = artifacts[target]
    points = artifact_points(folder, Manifest.read(folder)).names
    assert len(points) >= 4
    names = [*points.values(), "no such value"]
    with opened(folder) as there, open_session(folder, Manifest.read(folder), 1) as here:
        wanted, found = here.values([TEXT, TEXT[:3]], names), there.values([TEXT, TEXT[:3]], names)
    assert len(wanted[0]) >= 3 and [list(each) for each in found] == [list(each) for each in wanted]
    for text, other in zip(found, wanted, strict=True):
        for name, calls in text.items():
            assert all((a == b).all() for a, b in zip(calls, other[name], strict=True))


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_values_that_are_not_there_are_left_out(target, artifacts):
    with opened(artifacts[target]) as there:
        assert there.values([TEXT, TEXT[:3]], ["no such value"]) == [{}, {}]


def test_a_timed_run_generates_what_greedy_decoding_does(artifacts):
    with opened(artifacts["onnx"]) as session:
        run = session.timed(TEXT, 4)
        logits, greedy = session.logits, []
        for _ in range(4):
            text = np.array([*TEXT, *greedy], np.int64)
            greedy.append(int(logits(text)[-1].argmax()))
        assert run.tokens == tuple(greedy) and len(run.step_seconds) == 3
        assert run.prompt_tokens == len(TEXT) and run.not_finite == 0
        with pytest.raises(DeviceError, match="do not fit the artifact's context of 32"):
            session.timed(TEXT, 22)
        assert len(session.timed(TEXT, 21).tokens) == 21


def test_the_runtimes_refusal_comes_as_it_is(artifacts, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifacts["onnx"], copy)
    (copy / "model.onnx").write_bytes(b"no graph")
    with opened(copy) as session, pytest.raises(DeviceError, match="onnxruntime cannot load"):
        session.extend(TEXT)


def test_tokens_that_do_not_fit_never_reach_the_worker(artifacts):
    with opened(artifacts["onnx"]) as session:
        with pytest.raises(DeviceError, match="there is no token 512"):
            session.extend(np.array([512], np.int64))
        with pytest.raises(DeviceError, match="there is no token to run"):
            session.logits(TEXT[:0])


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "host: the worker was killed, as a system does where memory runs out"),
        (signal.SIGSEGV, "host: the worker ended with SIGSEGV"),
    ],
)
def test_a_worker_that_dies_is_a_result(number, message, artifacts):
    with opened(artifacts["onnx"]) as session:
        session.extend(TEXT[:2])
        os.kill(session._channel._process.pid, number)
        with pytest.raises(DeviceError, match=message):
            session.extend(TEXT[:2])


def test_nothing_is_left_after_close(artifacts):
    session = opened(artifacts["executorch"])
    session.extend(TEXT[:2])  # this runtime has a process of its own below the worker's
    group = session._channel._process.pid
    session.close()
    session.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("a process of the worker's group still runs")
    with pytest.raises(DeviceError, match="this session is closed"):
        session.extend(TEXT[:2])


class Liar(Place):
    """A device whose worker is a script of the test's."""

    name, limits = "host", ()

    def __init__(self, script: str) -> None:
        self.script = script

    def start(self, folder, manifest, arguments) -> ProcessChannel:
        return ProcessChannel([sys.executable, "-c", self.script], dict(os.environ))


FIRST = (
    "import sys, json, time; say = lambda t, b=b'': (sys.stdout.buffer.write(t.encode() + b),"
    "sys.stdout.flush());"
    "say(json.dumps({'runtime': 'r\\x1b[31m', 'limits': [], 'arrays': []}) + '\\n');"
    "sys.stdin.readline();"
)
LOADED = FIRST + (
    "say(json.dumps({'vocab_size': 512, 'chunks': [], 'has_all_positions': False, 'seconds': 0.1,"
    "'loaded_bytes': 1, 'arrays': []}) + '\\n'); sys.stdin.readline();"
)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('hello')", "is no frame"),
        ("import sys; sys.exit('no python\\x1b[2J here')", r"exit code 1\).*: no python"),
        ("pass", r"the worker ended \(exit code 0\)"),
        ("""print('{"arrays": []}')""", "answers what no worker does"),
        (FIRST + "say('x' * 3000000)", "is no frame"),
        (FIRST + """say('{"vocab_size": -1, "arrays": []}\\n')""", "answers what no worker does"),
        (LOADED + """say('{"arrays": []}\\n')""", "gives nothing for logits"),
        (
            LOADED
            + "say(json.dumps({'arrays': [{'dtype': 'float32', 'shape': [1 << 40]}]})+'\\n')",
            "at most 2048 can come",
        ),
        (
            LOADED + "say(json.dumps({'arrays': [{'dtype': 'float32', 'shape': [3]}]}) + '\\n',"
            "bytes(12))",
            r"gives \(3,\) for logits of \(512,\)",
        ),
        (
            LOADED + "say(json.dumps({'arrays': [{'dtype': 'float32', 'shape': [512]}]}) + '\\n',"
            "bytes(12))",
            r"the worker ended \(exit code 0\) in running 3 tokens",
        ),
        (
            LOADED + "say(json.dumps({'arrays': [{'dtype': 'float32', 'shape': [512]}]}) + '\\n',"
            "bytes(12)); import os; os.kill(os.getpid(), 9)",
            "the worker was killed, as a system does where memory runs out, in running 3 tokens",
        ),
        (LOADED + "say(json.dumps({'error': 'a\\nb\\x1b[31mc', 'arrays': []}) + '\\n')", "a b"),
    ],
)
def test_what_a_hostile_device_answers_is_one_sentence(script, message, artifacts):
    folder = artifacts["onnx"]
    manifest = Manifest.read(folder)
    with (
        pytest.raises(DeviceError, match=message) as caught,
        open_on(Liar(script), folder, manifest, 1) as session,
    ):
        assert session.runtime.isprintable()
        session.extend(TEXT[:3])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
