"""What ONNX Runtime's kernels cannot hold is refused in words, before any work."""

from __future__ import annotations

import pytest

import edgeforge.trace_and_quantize as trace_and_quantize
from edgeforge.export_options import ExportOptions
from edgeforge.pipeline import export
from exporters.errors import ExportError
from exporters.registry import find_target

# What follows the advice for the first weight where a recipe gives all matrices one format.
ALSO = ", and the same for lm_head.weight and 10 more"


@pytest.fixture
def refused(cache, tmp_path, monkeypatch, checkpoint_of):
    """Exports and returns the refusal; hashing or quantizing anything fails the test."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done before the refusal")

    def refused(config, format):
        model = checkpoint_of(config)
        monkeypatch.setattr(type(model.checkpoint), "digest", work)
        monkeypatch.setattr(trace_and_quantize, "quantize", work)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"- {{match: '*', format: {format}}}\n")
        out = tmp_path / "out"
        with pytest.raises(ExportError) as caught:
            export(model, [find_target("onnx")], out, ExportOptions(recipe=str(recipe)))
        assert not out.exists()
        return str(caught.value)

    return refused


def test_heads_of_a_width_the_attention_kernel_lacks(refused, llama_config):
    assert refused(llama_config(head_dim=12), "fp32") == (
        "ONNX Runtime's GroupQueryAttention needs a head width that is a multiple of 8; this "
        "model's heads have 12 columns"
    )


@pytest.mark.parametrize(("size", "near"), [(8, 16), (24, 16), (48, 32), (96, 64), (512, 256)])
def test_groups_that_are_no_block_of_the_kernels(refused, llama_config, size, near):
    config = llama_config(
        hidden_size=3 * 512, num_attention_heads=2, head_dim=768, intermediate_size=3 * 512
    )
    assert refused(config, f"int4-g{size}") == (
        f"model.embed_tokens.weight has groups of {size}; ONNX Runtime's kernels have blocks of "
        f"16, 32, 64, 128, 256: use int4-g{near} or keep it int8-pc{ALSO}"
    )


@pytest.mark.parametrize(("bits", "near"), [(3, 4), (5, 8), (6, 8), (7, 8)])
def test_widths_that_the_kernels_lack(refused, llama_config, bits, near):
    assert refused(llama_config(), f"int{bits}-g32-asym") == (
        f"model.embed_tokens.weight is to be int{bits}-g32-asym; ONNX Runtime's kernels have "
        f"integers of 2, 4 and 8 bits: use int{near}-g32-asym or keep it int8-pc{ALSO}"
    )


@pytest.mark.parametrize(("size", "near"), [(16, 32), (256, 128)])
def test_two_bits_in_blocks_that_the_fast_kernels_lack(refused, llama_config, size, near):
    config = llama_config(
        hidden_size=512, num_attention_heads=2, head_dim=256, intermediate_size=512
    )
    assert refused(config, f"int2-g{size}") == (
        f"model.embed_tokens.weight has groups of {size}; ONNX Runtime's fast kernels have blocks "
        f"of 32, 64, 128: use int2-g{near} or keep it int8-pc{ALSO}"
    )
    assert refused(llama_config(intermediate_size=80), "int2-pc") == (
        "model.layers.0.mlp.down_proj.weight has 80 input columns; ONNX Runtime's fast kernels "
        "need a multiple of 32 for int2-pc: use int4-pc or keep it int8-pc, and the same for "
        "model.layers.1.mlp.down_proj.weight"
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_one_scale_a_row_over_columns_that_no_block_divides(refused, llama_config, bits):
    config = llama_config(intermediate_size=100)
    assert refused(config, f"int{bits}-pc") == (
        f"model.layers.0.mlp.down_proj.weight has 100 input columns; ONNX Runtime's kernels need "
        f"a multiple of 16 for int{bits}-pc: keep it fp16, and the same for "
        f"model.layers.1.mlp.down_proj.weight"
    )
