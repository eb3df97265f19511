"""The choices that are read from artifacts of each target are those that their tokens made."""

import numpy as np
import pytest
import torch

from device_harness.errors import DeviceError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.reference.choices import Following
from edgeforge.stage_progress import no_progress
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.chosen_experts import (
    ArtifactRouters,
    RouterReader,
    artifact_routers,
    read_choices,
)
from edgeforge.verification.each_session import Place, open_sessions
from edgeforge.verification.references import references
from exporters.manifest import Manifest
from exporters.registry import find_target

TOKENS = np.arange(40, dtype=np.int64)
CALLS = [17, 16, 1, 1, 5]


@pytest.fixture(scope="module", params=["tiny-mixtral", "tiny-phimoe"])
def exported(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    model = open_model(str(synthesise(request.param, root / "model")))
    for target in ("onnx", "coreml", "executorch"):
        options = ExportOptions("fp16", context=64, threads=1)
        export(model, [find_target(target)], root / target, options)
    made = references(Manifest.read(root / "onnx"), model, no_progress)
    own = Following()
    next(made.quantized.logits([torch.from_numpy(TOKENS)], [own]))
    return root, made.quantized, own.own


@pytest.mark.parametrize("target", ["onnx", "coreml", "executorch"])
def test_an_artifact_that_rounds_little_chooses_as_quantized_does(exported, target):
    root, quantized, own = exported
    manifest = Manifest.read(root / target)
    found = artifact_routers(root / target, manifest)
    assert not found.why_none
    assert len(found.whole) == len(found.shipped) == 2  # layers
    with open_sessions([Place(root / target, manifest)], 1, {}) as (session,):
        (whole,) = read_choices(session, found, quantized.routers, [TOKENS])
        (called,) = read_choices(session, found, quantized.routers, [TOKENS], [CALLS])
    # float16 moves SparseMixer's candidates at a token or two.
    wrong = 2 if target == "coreml" else 0
    for choices in (whole, called):
        for choice, sets in zip(choices, own, strict=True):
            assert int((~choice.same(sets)).sum()) <= wrong
    assert all(bool(choice.known.all()) for choice in whole)
    assert bool(called[0].known.all())
    # What ships computes the last layer for the last token of a call alone.
    ends = np.cumsum(CALLS) - 1
    assert bool(called[1].known[ends].all())


def test_values_that_a_runtime_does_not_show_are_said(exported):
    _, quantized, _ = exported

    class Silent:
        has_all_positions = True

        def values(self, texts, names, calls=None):
            raise DeviceError("it shows nothing")

    silent = RouterReader(Silent(), ArtifactRouters((), ()), quantized.routers)
    assert silent.choices([TOKENS]) is None
    assert "0 routers" in silent.why_none
    unread = RouterReader(Silent(), ArtifactRouters(why_none="not read"), quantized.routers)
    assert unread.choices([TOKENS]) is None
    assert unread.why_none == "not read"
