"""The forecast against what export writes, on every target."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from edgeforge import api
from edgeforge.forecast.forecast import forecast
from edgeforge.forecast.sized_model import size_model
from edgeforge.synth.synthesise import PRESETS, synthesise
from exporters.manifest import Manifest
from exporters.registry import TARGETS

CONTEXT = 64
# What files hold beside the weights: wider scales and float32 columns in ExecuTorch, rotary tables,
# padding; and graphs, whose size does not depend on the weights'.
LARGEST_ERROR, GRAPHS = 0.05, 128 << 10
WEIGHT_FILES = {
    "onnx": ("model.onnx", "model.onnx.data"),
    "coreml": ("model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",),
    "executorch": ("model.pte",),
}
NUMBERS = {"float": 4, "float32": 4, "fp16": 2, "int8": 1}
TINY = PRESETS["tiny-llama"]
WIDE = replace(
    TINY,
    config={
        **TINY.config,
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "tie_word_embeddings": False,
    },
)
# Layers with caches and layers with convolutions' states, and layers of two windows and rotations.
FAMILIES = [("tiny-lfm2", "int8"), ("tiny-gemma3-text", "int8")]
CASES = [
    *(("demo", "int4"), ("demo", "int8"), ("wide", "int8"), ("wide", "int4-g32")),
    *FAMILIES,
]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Artifacts of every case and target, each exported for that target alone."""
    root = tmp_path_factory.mktemp("forecast")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        patch.setitem(PRESETS, "wide", WIDE)
        wide = synthesise("wide", root / "wide")
        for name, recipe in CASES:
            known = {"demo": name, "wide": str(wide)}
            source = known.get(name) or str(synthesise(name, root / name))
            for target in TARGETS:
                out = root / f"{name}-{recipe}-{target}"
                api.export(
                    source, out, targets=[target], recipe=recipe, context=CONTEXT, strip=True
                )
                made[name, recipe, target] = (source, out)
        for target in ("onnx", "executorch"):
            out = root / f"int8-caches-{target}"
            api.export(
                str(wide), out, targets=[target], recipe="int8", context=CONTEXT, kv_cache="int8"
            )
            made["int8 caches", target] = (str(wide), out)
    return made


def row_of(source: str, recipe: str, target: str, **options):
    found = forecast(
        size_model(source),
        "iphone-15-pro",
        context=CONTEXT,
        targets=[target],
        recipes=[recipe],
        **options,
    )
    return found.targets[0].rows[0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_the_weights_take_what_was_forecast(artifacts, name, recipe, target):
    source, out = artifacts[name, recipe, target]
    written = sum((out / name).stat().st_size for name in WEIGHT_FILES[target])
    row = row_of(source, recipe, target)
    assert row.stored < written < row.stored * (1 + LARGEST_ERROR) + GRAPHS
    manifest = Manifest.read(out)
    assert row.bits == pytest.approx(manifest.bits_per_weight, rel=1e-12)
    assert sum(row.formats.values()) == len(manifest.weights)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["demo", "wide", *(name for name, _ in FAMILIES)])
def test_the_caches_take_what_was_forecast(artifacts, name, target):
    source, out = artifacts[name, "int8", target]
    assert cache_bytes(out) == row_of(source, "int8", target).caches


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_int8_caches_take_what_was_forecast(artifacts, target):
    from exporters.options import TargetOptions

    source, out = artifacts["int8 caches", target]
    row = row_of(source, "int8", target, options=TargetOptions(kv_cache="int8"))
    assert cache_bytes(out) == row.caches < row_of(source, "int8", target).caches


def cache_bytes(out: Path) -> int:
    """The bytes of an artifact's states at its whole context, as its manifest declares them."""
    total = 0
    for state in Manifest.read(out).states.values():
        kind, dims = re.fullmatch(r"(\w+)\[(.*)\]", state).groups()
        sizes = [
            {"batch_size": 1, "past_length": CONTEXT}.get(dim) or int(dim)
            for dim in dims.split(", ")
        ]
        total += NUMBERS[kind] * math.prod(sizes)
    return total
