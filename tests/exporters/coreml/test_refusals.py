"""What a package cannot hold, and options that do not go together, are refused before any work."""

from __future__ import annotations

import pytest

import edgeforge.trace_and_quantize as trace_and_quantize
from edgeforge.export_options import ExportOptions
from edgeforge.pipeline import export
from exporters.errors import ExportError
from exporters.options import TargetOptions
from exporters.registry import find_target

# What follows the advice for the first weight where a recipe gives all matrices one format.
ALSO = ", and the same for lm_head.weight and 10 more"


@pytest.fixture
def refused(cache, tmp_path, monkeypatch, checkpoint_of, llama_config):
    """Exports and returns the refusal; hashing or quantizing anything fails the test."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done before the refusal")

    def refused(format="fp16", algorithm="", **asked):
        model = checkpoint_of(llama_config())
        monkeypatch.setattr(type(model.checkpoint), "digest", work)
        monkeypatch.setattr(trace_and_quantize, "quantize", work)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"- {{match: '*', format: {format}{algorithm}}}\n")
        out = tmp_path / "out"
        options = ExportOptions(recipe=str(recipe), target=TargetOptions(**asked))
        with pytest.raises(ExportError) as caught:
            export(model, [find_target("coreml")], out, options)
        assert not out.exists()
        return str(caught.value)

    return refused


@pytest.mark.parametrize("chunk", ["0", "-4", "many", "16,", "16,0", "1.5"])
def test_chunks_that_are_no_numbers_of_tokens(chunk, refused):
    assert refused(chunk=chunk) == (
        f"--chunk {chunk} is not possible: give the number of tokens of one prefill call, such as "
        f"64, or several to choose from, such as 16,64,256"
    )


def test_slices_before_ios_18(refused):
    assert refused(opset="ios17", cache_write="slice") == (
        "--cache-write slice needs an operator that iOS 18 introduced: leave it out, or use "
        "--opset ios18"
    )


@pytest.mark.parametrize(("bits", "palette"), [(2, 2), (3, 3), (5, 6), (6, 6), (7, 8)])
def test_integers_of_other_widths(bits, palette, refused):
    assert refused(f"int{bits}-g32") == (
        f"model.embed_tokens.weight is to be int{bits}-g32; Core ML holds integers of 4 and 8 "
        f"bits, and other numbers of bits as palettes: use lut{palette}-gc16 or keep it int8-pc"
        f"{ALSO}"
    )


@pytest.mark.parametrize(
    ("bits", "ways"),
    [
        (4, "use lut4-gc16, keep it int8-pc, or use --profile gpu"),
        (8, "use lut8-gc16, keep it int8-pc, or use --profile gpu"),
    ],
)
def test_blocks_on_the_neural_engine(bits, ways, refused):
    assert refused(f"int{bits}-g32", profile="ane") == (
        f"model.embed_tokens.weight is to be int{bits}-g32; the Neural Engine takes one scale a "
        f"row or a palette, not groups: {ways}{ALSO}"
    )


@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_wide_floats_on_the_neural_engine(format, refused):
    assert refused(format, profile="ane") == (
        f"model.embed_tokens.weight is to be {format}; the Neural Engine computes in float16: "
        f"keep it fp16, keep it int8-pc, or use --profile gpu{ALSO}"
    )


@pytest.mark.parametrize(
    ("format", "near"),
    [
        ("int4-g32", "lut4-pt"),
        ("int4-pc", "lut4-pt"),
        ("int8-g32", "lut8-pt"),
        ("int8-pc-asym", "int8-pc"),
    ],
)
def test_integers_that_ios_17_does_not_have(format, near, refused):
    ways = f"use {near}, keep it int8-pc, or use --opset ios18"
    if near == "int8-pc":
        ways = "keep it int8-pc or use --opset ios18"
    assert refused(format, opset="ios17") == (
        f"model.embed_tokens.weight is to be {format}; the only integers that iOS 17 holds have "
        f"8 bits and one scale a row: {ways}{ALSO}"
    )


def test_grouped_palettes_before_ios_18(refused):
    assert refused("lut4-gc16", opset="ios17") == (
        "model.embed_tokens.weight is to be lut4-gc16; iOS 17 has one table for a whole matrix: "
        f"use lut4-pt, keep it int8-pc, or use --opset ios18{ALSO}"
    )


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("profile", "gpu or ane"), ("cache_write", "slice or onehot"), ("opset", "ios18 or ios17")],
)
def test_values_of_options_that_are_not_known(name, allowed, refused):
    flag = "--" + name.replace("_", "-")
    assert refused(**{name: "best"}) == f"{flag} best is not known to coreml: take {allowed}"


def test_a_context_that_does_not_fit_the_stated_memory(refused):
    sentence = refused("int8-pc", max_memory=1_000_000)
    # Keys and values of 2 layers, 2 heads of 16 columns, 2 bytes each.
    assert "for a context of 4096 tokens (weights 0.1 MB, caches 1.0 MB, buffers " in sentence
    assert ", and --max-memory is 1.0 MB: export with --context " in sentence
    assert "caches 2.1 MB" in refused("int8-pc", max_memory=1_000_000, opset="ios17")


def test_scales_below_zero(refused):
    assert refused("int4-g32", ", algorithm: rtn-signed") == (
        "model.embed_tokens.weight is to be filled by rtn-signed, whose scales may be below zero; "
        "Core ML's own tools write no such scales, so that no device is known to read them: use "
        f"algorithm rtn or keep it int8-pc with algorithm rtn{ALSO}"
    )
