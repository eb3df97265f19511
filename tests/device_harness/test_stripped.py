"""Artifacts without what only verification needs are verified by the part that generates."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest

from device_harness.errors import DeviceError
from device_harness.registry import open_session
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions
from exporters.manifest import Manifest
from exporters.options import TargetOptions
from exporters.registry import find_target

TOKENS = np.random.default_rng(3).integers(0, 512, 64, dtype=np.int64)


@pytest.fixture(scope="module", params=["onnx", "executorch"])
def pair(request, tmp_path_factory):
    """The same export, whole and stripped."""
    root = tmp_path_factory.mktemp(request.param)
    target = [find_target(request.param)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        model = open_model(str(synthesise("tiny-llama", root / "checkpoint")))
        for name, strip in (("whole", False), ("stripped", True)):
            options = ExportOptions("int4", context=64, target=TargetOptions(strip=strip))
            export(model, target, root / name, options)
        yield root / "whole", root / "stripped"


@pytest.fixture
def opened():
    """Opens artifacts until the test ends."""
    with ExitStack() as sessions:

        def opened(folder):
            return sessions.enter_context(open_session(folder, Manifest.read(folder), 1))

        yield opened


def test_it_is_smaller_and_says_what_is_gone(pair):
    whole, stripped = (sum(f.size for f in Manifest.read(p).files.values()) for p in pair)
    assert stripped < whole
    kept = Manifest.read(pair[1])
    assert kept.options == {"strip": True}
    assert "logits_all" not in kept.outputs and not (pair[1] / "verify.onnx").exists()


def test_it_stores_the_same_weights(pair):
    target = find_target(Manifest.read(pair[0]).target)
    assert target.stored_digests(pair[0]) == target.stored_digests(pair[1])


def test_every_position_is_what_an_app_would_get(pair, opened):
    session = opened(pair[1])
    app = [session.extend(TOKENS[at : at + 1]) for at in range(30)]
    found = session.logits(TOKENS[:30])
    assert found.dtype == np.float32 and found.shape == (30, 512)
    assert found.tobytes() == np.stack(app).tobytes()
    # The whole one runs all positions at once: the same numbers but for the order of sums.
    every = opened(pair[0]).logits(TOKENS[:30])
    assert np.abs(every - found).max() < 0.02 * np.ptp(every)


def test_the_running_text_is_left_alone(pair, opened):
    session = opened(pair[1])
    session.extend(TOKENS[:10])
    wanted = session.extend(TOKENS[10:11])
    session.reset()
    session.extend(TOKENS[:10])
    first = session.logits(TOKENS[20:64])
    assert (session.extend(TOKENS[10:11]) == wanted).all()
    # A later text sees nothing of an earlier, longer one.
    session.logits(TOKENS)
    assert (session.logits(TOKENS[20:64]) == first).all()


def test_what_is_refused_is_refused_here_too(pair, opened):
    session = opened(pair[1])
    with pytest.raises(DeviceError, match="65 tokens do not fit the artifact's context of 64"):
        session.logits(np.r_[TOKENS, 1])
    with pytest.raises(DeviceError, match="there is no token 512"):
        session.logits(np.array([512]))


def test_it_is_verified(pair):
    found = [verify(folder, VerifyOptions(tokens=100, timed=False)) for folder in pair]
    assert found[0].tokens == found[1].tokens >= 100
    assert found[1].lowering.top1_agreement > 0.9
    assert abs(found[1].lowering.kl_mean - found[0].lowering.kl_mean) < 1e-3
