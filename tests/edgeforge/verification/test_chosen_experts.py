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


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    found = {}
    for preset, targets in (
        ("tiny-phimoe", ("onnx", "coreml", "executorch")),
        ("tiny-mixtral", ("onnx",)),
        ("tiny-jetmoe", ("onnx", "coreml", "executorch")),
    ):
        root = tmp_path_factory.mktemp(preset)
        model = open_model(str(synthesise(preset, root / "model")))
        options = ExportOptions("fp16", context=64, threads=1)
        for target in targets:
            export(model, [find_target(target)], root / target, options)
        made = references(Manifest.read(root / "onnx"), model, no_progress)
        found[preset] = root, made.quantized
    return found


@pytest.mark.parametrize(
    ("preset", "target"),
    [
        ("tiny-phimoe", "onnx"),
        ("tiny-phimoe", "coreml"),
        ("tiny-phimoe", "executorch"),
        ("tiny-mixtral", "onnx"),
        ("tiny-jetmoe", "onnx"),
        ("tiny-jetmoe", "coreml"),
        ("tiny-jetmoe", "executorch"),
    ],
)
def test_an_artifact_that_rounds_little_chooses_as_quantized_does(exported, preset, target):
    root, quantized = exported[preset]
    manifest = Manifest.read(root / target)
    found = artifact_routers(root / target, manifest)
    assert not found.why_none
    # Two layers; of JetMoE, attention has a router in each too.
    assert len(found.whole) == len(found.shipped) == (4 if preset == "tiny-jetmoe" else 2)
    with open_sessions([Place(root / target, manifest)], 1, {}) as (session,):
        (whole,) = read_choices(session, found, quantized.routers, [TOKENS])
        (called,) = read_choices(session, found, quantized.routers, [TOKENS], [CALLS])
    for choices in (whole, called):
        following = Following(choices)
        next(quantized.logits([torch.from_numpy(TOKENS)], [following]))
        changed = int((~torch.stack(following.same)).sum())
        # float16 moves near ties. Tokens after one are held against what attended to it.
        assert changed <= (2 if target == "coreml" else 0)
        assert float(torch.stack(following.gaps).max()) < 0.01
    assert all(bool(choice.known.all()) for choice in whole)
    assert all(bool(choice.known.all()) for choice in called[:-1])
    # What ships computes the last feed-forward part for the last token of a call alone.
    assert bool(called[-1].known[np.cumsum(CALLS) - 1].all())


def test_values_that_a_runtime_does_not_show_are_said(exported):
    _, quantized = exported["tiny-mixtral"]

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
