"""What every runtime here promises: its options, and sessions that end."""

from __future__ import annotations

import gc
import inspect
import os
from pathlib import Path

import numpy as np
import pytest

import edgeforge
from device_harness.errors import DeviceError
from device_harness.registry import RUNTIMES, open_session
from device_harness.session import Session
from edgeforge.synth.synthesise import synthesise
from exporters.manifest import Manifest
from exporters.registry import TARGETS

TOKENS = np.arange(1, 7, dtype=np.int64)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> dict[str, Path]:
    """A tiny Llama for every runtime, by target."""
    root = tmp_path_factory.mktemp("every runtime")
    checkpoint = synthesise("tiny-llama", root / "checkpoint")
    options = {"recipe": "int4", "context": 32}
    folders = edgeforge.export(checkpoint, root / "out", targets=tuple(RUNTIMES), **options)
    return dict(zip(RUNTIMES, folders, strict=True))


@pytest.fixture(params=RUNTIMES)
def folder(request, artifacts) -> Path:
    return artifacts[request.param]


def opened(folder: Path, **options: str) -> Session:
    return open_session(folder, Manifest.read(folder), 1, options)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_target_has_a_runtime():
    assert RUNTIMES.keys() == TARGETS.keys()


@pytest.mark.parametrize("target", RUNTIMES)
def test_options_are_those_that_it_takes(target):
    taken = inspect.signature(RUNTIMES[target].open).parameters.values()
    keywords = {each.name for each in taken if each.kind is each.KEYWORD_ONLY}
    assert keywords == set(RUNTIMES[target].options)


@pytest.mark.parametrize("target", RUNTIMES)
def test_an_option_of_another_runtime_is_refused(target, artifacts):
    others = {name for each in RUNTIMES.values() for name in each.options}
    for name in others - set(RUNTIMES[target].options):
        with pytest.raises(DeviceError) as caught:
            opened(artifacts[target], **{name: "fp32"})
        flag = "--" + name.replace("_", "-")
        assert str(caught.value) == f"{target} artifacts have no option {flag}: leave it out"


def test_what_a_session_says_of_itself(folder):
    with opened(folder) as session:
        assert (session.context, session.vocab_size) == (32, 512)
        assert session.runtime and "\n" not in session.runtime
        assert isinstance(session.limits, tuple) and all(session.limits)
        assert session.peak_bytes > 2**20


def test_a_closed_session_runs_no_more(folder):
    with opened(folder) as session:
        assert session.extend(TOKENS).shape == (512,)
    session.close()  # again, which does nothing
    said = {"context": session.context, "runtime": session.runtime, "limits": session.limits}
    assert all(value is not None for value in said.values())
    for use in (
        lambda: session.extend(TOKENS),
        lambda: session.logits(TOKENS),
        lambda: session.reset(),
        lambda: session.vocab_size,
    ):
        with pytest.raises(DeviceError) as caught:
            use()
        assert str(caught.value) == ("this session is closed: open the artifact again to run it")


def test_an_error_inside_with_closes_too(folder):
    with pytest.raises(DeviceError, match="there is no token to run"), opened(folder) as session:
        session.extend(TOKENS[:0])
    with pytest.raises(DeviceError, match="this session is closed"):
        session.extend(TOKENS)


def test_a_session_that_was_never_used_is_closed(folder):
    opened(folder).close()


def test_loaded_by_the_public_function_it_needs_no_with(folder):
    session = edgeforge.load(folder, threads=1)
    alone = session.extend(TOKENS)
    session.close()
    with edgeforge.load(folder, threads=1) as again:
        assert (again.extend(TOKENS) == alone).all()


def test_executorchs_process_is_gone_once_it_is_closed(artifacts, workers):
    others = workers()
    with opened(artifacts["executorch"]) as session:
        session.extend(TOKENS)
        (process,) = workers() - others
    assert not is_running(process)


def test_executorchs_process_goes_with_a_session_that_is_dropped(artifacts, workers):
    others = workers()
    session = opened(artifacts["executorch"])
    session.extend(TOKENS)
    (process,) = workers() - others
    del session
    gc.collect()
    assert not is_running(process)
