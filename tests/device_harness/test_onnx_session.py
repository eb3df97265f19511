"""The ONNX session: state from call to call, and refusals in words."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from device_harness import onnx_session
from device_harness.errors import DeviceError
from device_harness.onnx_session import OnnxSession
from device_harness.registry import RUNTIMES, open_session
from exporters.manifest import Manifest

TOKENS = np.random.default_rng(3).integers(0, 512, 64, dtype=np.int64)


@pytest.fixture(scope="module")
def session(artifact):
    with OnnxSession(artifact, 64, 1) as opened:
        yield opened


def test_what_it_says_of_itself(session):
    assert session.context == 64
    assert session.vocab_size == 512
    assert session.runtime.startswith("onnxruntime 1.") and "1 threads" in session.runtime


def test_reset_begins_anew_and_gives_the_same_bits(session):
    session.reset()
    first = session.extend(TOKENS[:10])
    later = session.extend(TOKENS[10:30])
    session.reset()
    assert (session.extend(TOKENS[:10]) == first).all()
    assert (session.extend(TOKENS[10:30]) == later).all()
    # What was given out is the caller's own: later calls do not write into it.
    kept = first.copy()
    session.extend(TOKENS[30:40])
    assert (first == kept).all()


def test_extending_depends_on_what_came_before(session):
    session.reset()
    session.extend(TOKENS[:10])
    after_ten = session.extend(TOKENS[20:21])
    session.reset()
    alone = session.extend(TOKENS[20:21])
    assert np.abs(after_ten - alone).max() > 0.01 * np.ptp(alone)


def test_logits_leave_the_running_text_alone(session):
    session.reset()
    session.extend(TOKENS[:10])
    wanted = session.extend(TOKENS[10:11])
    session.reset()
    session.extend(TOKENS[:10])
    every = session.logits(TOKENS[30:60])
    assert every.shape == (30, 512) and every.dtype == np.float32
    assert (session.extend(TOKENS[10:11]) == wanted).all()


def test_graphs_that_do_not_fit_together_are_loaded_one_at_a_time(artifact, session, monkeypatch):
    session.reset()
    session.extend(TOKENS[:10])
    wanted = session.extend(TOKENS[10:30]), session.extend(TOKENS[30:31])
    whole, (shown,) = session.logits(TOKENS[:40]), session.values([TOKENS[:40]], ["logits"])
    with OnnxSession(artifact, 64, 1) as small:
        monkeypatch.setattr(onnx_session, "meminfo", lambda name: 1000)
        small.extend(TOKENS[:10])
        assert (small.extend(TOKENS[10:30]) == wanted[0]).all()
        assert (small.logits(TOKENS[:40]) == whole).all()
        assert loaded(small) == ["_verifier"]
        (found,) = small.values([TOKENS[:40]], ["logits"])
        assert all((a == b).all() for a, b in zip(found["logits"], shown["logits"], strict=True))
        assert loaded(small) == []
        # The text goes on where it was.
        assert (small.extend(TOKENS[30:31]) == wanted[1]).all()
        assert loaded(small) == ["_generator"]
        monkeypatch.setattr(onnx_session, "meminfo", lambda name: 1 << 40)
        small.logits(TOKENS[:40])
        assert loaded(small) == ["_generator", "_verifier"]


def loaded(session):
    return [name for name in ("_generator", "_verifier") if getattr(session, name) is not None]


def test_the_context_is_used_to_its_last_position_and_not_beyond(session):
    session.reset()
    session.extend(TOKENS[:63])
    session.extend(TOKENS[63:])
    past = "65 tokens do not fit the artifact's context of 64: shorten the text, or export with"
    with pytest.raises(DeviceError, match=past):
        session.extend(TOKENS[:1])
    with pytest.raises(DeviceError, match=past):
        session.logits(np.r_[TOKENS, 1])
    assert session.logits(TOKENS).shape == (64, 512)


@pytest.mark.parametrize("bad", [-1, -512, 512, 2**40])
@pytest.mark.parametrize("call", ["extend", "logits"])
def test_a_token_that_does_not_exist(session, call, bad):
    session.reset()
    with pytest.raises(DeviceError) as caught:
        getattr(session, call)(np.array([3, bad, 4]))
    assert str(caught.value) == (f"there is no token {bad}: the artifact's vocabulary is 0 to 511")


@pytest.mark.parametrize("call", ["extend", "logits"])
def test_no_token_at_all(session, call):
    with pytest.raises(DeviceError, match="there is no token to run"):
        getattr(session, call)(np.zeros(0, np.int64))


def test_a_refused_call_changes_nothing(session):
    session.reset()
    session.extend(TOKENS[:10])
    wanted = session.extend(TOKENS[10:11])
    session.reset()
    session.extend(TOKENS[:10])
    for bad in (np.array([999]), np.zeros(0, np.int64), TOKENS):
        with pytest.raises(DeviceError):
            session.extend(bad)
    assert (session.extend(TOKENS[10:11]) == wanted).all()


def test_tokens_of_any_stride(session):
    session.reset()
    wanted = session.extend(TOKENS[:20:2].copy())
    session.reset()
    assert (session.extend(TOKENS[:20:2]) == wanted).all()


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in Linux's /proc")
def test_threads_are_as_asked(artifact):
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from device_harness.onnx_session import OnnxSession\n"
        "import onnxruntime\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "session = OnnxSession(Path(sys.argv[1]), 64, int(sys.argv[2]))\n"
        "session.load()\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    for threads in (1, 3):
        done = subprocess.run(
            [sys.executable, "-c", program, str(artifact), str(threads)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout) == threads - 1  # the caller's own thread works too


def test_files_that_are_no_artifact(artifact, tmp_path, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    (copy / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(DeviceError, match=r"onnxruntime cannot load .*model\.onnx: "):
        OnnxSession(copy, 64, 1).extend(TOKENS[:3])
    (copy / "model.onnx").unlink()
    with pytest.raises(DeviceError, match=r"onnxruntime cannot load .*model\.onnx: ") as caught:
        OnnxSession(copy, 64, 1).extend(TOKENS[:3])
    assert "\n" not in str(caught.value)
    # The other graph is whole and still runs; its weights are then cut short.
    OnnxSession(copy, 64, 1).logits(TOKENS[:3])
    with (copy / "model.onnx.data").open("r+b") as stream:
        stream.truncate(4096)
    with pytest.raises(DeviceError, match=r"onnxruntime cannot load .*verify\.onnx: "):
        OnnxSession(copy, 64, 1).logits(TOKENS[:3])
    # One clear sentence is for the caller to print; the runtime prints none of its own.
    assert capfd.readouterr().err == ""


def test_opening_by_the_manifest(artifact):
    manifest = Manifest.read(artifact)
    assert open_session(artifact, manifest, 1).context == 64
    other = Manifest(**{**vars(manifest), "target": "tape"})
    with pytest.raises(DeviceError) as caught:
        open_session(artifact, other)
    assert str(caught.value) == (
        f"no runtime here runs tape artifacts; known: {', '.join(RUNTIMES)}"
    )


def test_two_sessions_do_not_disturb_each_other(artifact):
    sessions = [OnnxSession(artifact, 64, 1) for _ in range(2)]
    texts = [TOKENS[:20], TOKENS[20:40]]
    alone = []
    for session, text in zip(sessions, texts, strict=True):
        alone.append([session.extend(text[i : i + 4]) for i in range(0, 20, 4)])
        session.reset()
    together: list[list[np.ndarray]] = [[], []]

    def run(index: int) -> None:
        for i in range(0, 20, 4):
            together[index].append(sessions[index].extend(texts[index][i : i + 4]))

    workers = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index in range(2):
        assert all((a == b).all() for a, b in zip(alone[index], together[index], strict=True))


def test_onnxruntime_missing(artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError) as caught:
        OnnxSession(artifact, 64, 1)
    assert str(caught.value) == (
        'onnxruntime is not installed, and this artifact runs in it: pip install "edgeforge[onnx]"'
    )


def test_onnxruntime_damaged(artifact, monkeypatch, tmp_path):
    (tmp_path / "onnxruntime.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(DeviceError) as caught:
        OnnxSession(artifact, 64, 1)
    assert str(caught.value) == (
        "onnxruntime is damaged: No module named 'a_library_that_is_not_there'"
    )
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libgomp.so.1 is missing')\n")
    with pytest.raises(DeviceError) as caught:
        OnnxSession(artifact, 64, 1)
    assert str(caught.value) == "onnxruntime cannot be loaded: libgomp.so.1 is missing"


def test_an_unused_context_costs_no_memory():
    program = """
from pathlib import Path
from device_harness.onnx_session import untouched_zeros
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith("VmRSS")).split()[1]) * 1024
before = resident()
caches = [untouched_zeros((1, 64, 4096, 128), 'float32') for _ in range(4)]
for cache in caches:
    cache[:, :, :8] = 1  # the first tokens of every head
print(resident() - before, all(float(c.sum()) == 64 * 8 * 128 for c in caches))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    grown, right = done.stdout.split()
    # Written: 1 MB of 537 MB.
    assert int(grown) < 20_000_000
    assert right == "True"


def test_kleidiai_is_off_where_asked_and_told(artifact):
    with OnnxSession(artifact, 64, 1, kleidiai="off") as session:
        assert session.runtime.endswith("without KleidiAI)")
        assert np.isfinite(session.extend(np.arange(1, 9))).all()
    with OnnxSession(artifact, 64, 1, kleidiai="on") as session:
        assert "KleidiAI" not in session.runtime
    with pytest.raises(DeviceError, match="KleidiAI is on or off, not 'maybe'"):
        OnnxSession(artifact, 64, 1, kleidiai="maybe")
