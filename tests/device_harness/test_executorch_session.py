"""The ExecuTorch session: state from call to call, refusals in words, and a runtime that dies."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal

import numpy as np
import pytest

from device_harness.errors import DeviceError
from device_harness.executorch_session import ExecutorchSession
from device_harness.registry import open_session
from device_harness.timing import time_artifact
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from exporters.executorch import installed
from exporters.manifest import Manifest
from exporters.registry import find_target

TOKENS = np.random.default_rng(3).integers(0, 512, 160, dtype=np.int64)


@pytest.fixture(scope="module")
def pte(tmp_path_factory):
    """A tiny Llama at int4 with a context of 160 tokens, more than one run takes."""
    root = tmp_path_factory.mktemp("executorch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        model = open_model(str(synthesise("tiny-llama", root / "checkpoint")))
        target = find_target("executorch")
        export(model, [target], root / "artifact", ExportOptions("int4", context=160))
        yield root / "artifact"


@pytest.fixture(scope="module")
def session(pte):
    with open_session(pte, Manifest.read(pte), 1) as opened:
        assert isinstance(opened, ExecutorchSession)
        yield opened


def test_what_it_says_of_itself(session):
    assert session.context == 160
    assert session.vocab_size == 512
    assert session.runtime == "executorch 1.4.1 (XNNPACK on CPU, 1 threads)"


def test_reset_begins_anew_and_gives_the_same_bits(session):
    session.reset()
    first = session.extend(TOKENS[:10])
    later = session.extend(TOKENS[10:30])
    session.reset()
    assert (session.extend(TOKENS[:10]) == first).all()
    assert (session.extend(TOKENS[10:30]) == later).all()
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
    every = session.logits(TOKENS[:150])
    assert every.shape == (150, 512) and every.dtype == np.float32
    assert (session.extend(TOKENS[10:11]) == wanted).all()
    assert np.abs(every[10] - wanted).max() < 1e-4 * np.ptp(wanted)


def test_the_context_is_used_to_its_last_position_and_not_beyond(session):
    session.reset()
    session.extend(TOKENS[:159])
    last = session.extend(TOKENS[159:])
    past = "161 tokens do not fit the artifact's context of 160: shorten the text, or export with"
    with pytest.raises(DeviceError, match=past):
        session.extend(TOKENS[:1])
    with pytest.raises(DeviceError, match=past):
        session.logits(np.r_[TOKENS, 1])
    every = session.logits(TOKENS)
    assert np.abs(every[159] - last).max() < 1e-4 * np.ptp(last)


@pytest.mark.parametrize("bad", [-1, -512, 512, 2**40])
@pytest.mark.parametrize("call", ["extend", "logits"])
def test_a_token_that_does_not_exist(session, call, bad):
    session.reset()
    with pytest.raises(DeviceError) as caught:
        getattr(session, call)(np.array([3, bad, 4]))
    assert str(caught.value) == f"there is no token {bad}: the artifact's vocabulary is 0 to 511"


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


def test_threads_are_as_asked(pte, workers):
    for threads in (1, 3):
        others = workers()
        with ExecutorchSession(pte, 160, threads) as session:
            assert f"{threads} threads" in session.runtime
            session.load()
            (worker,) = workers() - others
            with_pool = len(os.listdir(f"/proc/{worker}/task"))
        if threads == 1:
            alone = with_pool
    assert with_pool == alone + 2


def test_a_runtime_that_dies_is_named_with_what_it_did(pte, workers):
    others = workers()
    with ExecutorchSession(pte, 160, 1) as session:
        session.extend(TOKENS[:4])
        (worker,) = workers() - others
        os.kill(worker, signal.SIGABRT)
        with pytest.raises(DeviceError) as caught:
            session.extend(TOKENS[4:7])
        words = "ExecuTorch ended its process (SIGABRT) in forward with 3 tokens at position 4"
        assert str(caught.value).startswith(words) and "\n" not in str(caught.value)
        # The next call starts it again; the text it held is gone, so it must begin anew.
        session.reset()
        assert session.extend(TOKENS[:4]).shape == (512,)


def test_an_abort_of_the_runtime_itself(pte):
    # The session is told of a larger context than the caches hold: it refuses nothing, and the
    # kernel ends.
    with ExecutorchSession(pte, 400, 1) as session:
        session.extend(TOKENS[:100])
        with pytest.raises(DeviceError, match=r"ExecuTorch (ended its process|failed)") as caught:
            session.extend(TOKENS[:100])
    assert "forward with 100 tokens at position 100" in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "zeros", "tables"])
def test_damaged_files_end_in_a_sentence(pte, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(pte, copy)
    data = bytearray((copy / "model.pte").read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "zeros":
        data = bytearray(len(data))
    else:
        data[300:1500] = bytes(range(200)) * 6
    (copy / "model.pte").write_bytes(data)
    with ExecutorchSession(copy, 160, 1) as session, pytest.raises(DeviceError) as caught:
        session.extend(TOKENS[:4])
    assert "ExecuTorch" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    words = r"ExecuTorch failed in loading .*model\.pte"
    with (
        ExecutorchSession(tmp_path, 160, 1) as session,
        pytest.raises(DeviceError, match=words),
    ):
        session.load()


def test_executorch_missing_or_of_another_version(pte, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "version", missing)
    with pytest.raises(DeviceError) as caught:
        ExecutorchSession(pte, 160, 1)
    assert str(caught.value) == (
        "ExecuTorch is not installed, and this artifact runs in it: pip install "
        '"edgeforge[executorch]"'
    )
    monkeypatch.setattr(installed, "version", lambda name: "1.5.0")
    with pytest.raises(DeviceError, match=r"ExecuTorch 1\.5\.0 is installed; EdgeForge's artifa"):
        ExecutorchSession(pte, 160, 1)


def test_timings_are_of_the_process_that_runs_it(pte):
    timings = time_artifact(pte, threads=1, prefill=16, decode=4)
    assert timings.runtime.startswith("executorch 1.4.1")
    assert timings.peak_bytes > 50_000_000  # torch and the runtime, in the worker
    assert timings.load_seconds > 0 and timings.decode_tokens_per_second > 0
