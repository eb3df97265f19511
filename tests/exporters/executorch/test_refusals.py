"""What XNNPACK cannot hold, or would silently get wrong, is refused before any work."""

from __future__ import annotations

import pytest

import edgeforge.trace_and_quantize as trace_and_quantize
from edgeforge.export_options import ExportOptions
from edgeforge.pipeline import export
from exporters.errors import ExportError
from exporters.options import TargetOptions
from exporters.registry import find_target
from tests.oracles.tiny_families import MIXTURES

WIDE = {"hidden_size": 192, "intermediate_size": 192, "num_attention_heads": 2, "head_dim": 96}


@pytest.mark.parametrize(
    ("format", "words"),
    [
        (
            "int4-g32-asym",
            "model.embed_tokens.weight is to be int4-g32-asym; XNNPACK ignores zero points, which "
            "would give wrong numbers: use int4-g32 or keep it int8-pc",
        ),
        (
            "int8-pc-asym",
            "model.embed_tokens.weight is to be int8-pc-asym; XNNPACK ignores zero points, which "
            "would give wrong numbers: keep it int8-pc",
        ),
        (
            "int8-g64",
            "model.embed_tokens.weight is to be int8-g64; XNNPACK holds 8-bit integers only with "
            "one scale a row: keep it int8-pc",
        ),
        (
            "int4-g48",
            "model.embed_tokens.weight has groups of 48; XNNPACK needs groups of a multiple of "
            "32: use int4-g32 or keep it int8-pc",
        ),
        (
            "int2-g32",
            "model.embed_tokens.weight is to be int2-g32; XNNPACK has integers of 4 and 8 bits: "
            "use int4-g32 or keep it int8-pc",
        ),
        (
            "int3-pc",
            "model.embed_tokens.weight is to be int3-pc; XNNPACK has integers of 4 and 8 bits: "
            "use int4-pc or keep it int8-pc",
        ),
        (
            "int6-g32-asym",
            "model.embed_tokens.weight is to be int6-g32-asym; XNNPACK has integers of 4 and 8 "
            "bits: keep it int8-pc",
        ),
    ],
)
def test_formats(cache, tmp_path, monkeypatch, checkpoint_of, llama_config, format, words):
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done before the refusal")

    model = checkpoint_of(llama_config(**WIDE))
    monkeypatch.setattr(type(model.checkpoint), "digest", work)
    monkeypatch.setattr(trace_and_quantize, "quantize", work)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"- {{match: '*', format: {format}}}\n")
    out = tmp_path / "out"
    targets = [find_target("executorch"), find_target("onnx")]
    with pytest.raises(ExportError) as caught:
        export(model, targets, out, ExportOptions(recipe=str(recipe)))
    assert str(caught.value) == f"{words}, and the same for lm_head.weight and 10 more"
    assert not out.exists()


@pytest.mark.parametrize("asked", [{"lowering": "stock"}, {"backend": "vulkan"}], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "jetmoe"])
def test_mixtures_by_executorchs_own_exporter(cache, tmp_path, checkpoint_of, family, asked):
    options = ExportOptions("int4-g32", context=48, target=TargetOptions(**asked))
    words = f"this {family} model has mixtures of experts, which EdgeForge does not write"
    with pytest.raises(ExportError, match=words):
        export(
            checkpoint_of(MIXTURES[family]),
            [find_target("executorch")],
            tmp_path / "out",
            options,
        )
