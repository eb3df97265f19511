"""A package of float32 weights gives FLOAT's logits: the wiring is right, whatever the dims."""

from __future__ import annotations

import numpy as np
import pytest

from exporters.coreml import names


def largest_error(found, wanted):
    return np.abs(found - wanted).max() / (wanted.max() - wanted.min())


def test_every_position_of_a_full_context(case, package, run_package, tokens):
    float_package = package(case)
    text = tokens[:48]
    wanted = float_package.float_logits(text)
    session = run_package(float_package.folder)
    assert largest_error(session.logits(text), wanted) < 5e-6
    # A prefill of 16, then one token at a time, then another prefill.
    found = [session.extend(text[:end][start:]) for start, end in ((0, 16), (16, 19), (19, 35))]
    assert largest_error(np.stack(found), wanted[[15, 18, 34]]) < 5e-6


def test_coremltools_reopens_it_and_infers_the_same_types(distinct_case, package, reopen):
    spec, program = reopen(package(distinct_case).folder)
    assert spec.specificationVersion == 9
    assert set(program.functions) == {names.DECODE, names.PREFILL, names.VERIFY}
    lengths = {names.DECODE: (1, 1), names.PREFILL: (16, 1), names.VERIFY: (16, 16)}
    for name, (given, returned) in lengths.items():
        function = program.functions[name]
        assert function.inputs[names.TOKENS].shape == (1, given)
        assert function.inputs[names.POSITION].shape == (1,)
        (output,) = function.outputs
        assert output.name == names.LOGITS
        assert output.shape == (1, returned, 320)
        assert output.dtype.__name__ == "fp16"


ONE_HOT, CHOICE = {"cache_write": "onehot"}, {"chunk": "4,16"}
OLD = {"opset": "ios17"}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("openelm", options) for options in (ONE_HOT, CHOICE, OLD, {**OLD, "chunk": "1"})),
        *(("mistral", options) for options in (ONE_HOT, {**OLD, **CHOICE})),
        *(("phi3", options) for options in ({**ONE_HOT, **CHOICE}, OLD)),
    ],
    ids=str,
)
def test_every_way_to_write_a_function(
    family, options, package, run_package, reopen, tokens, openelm_config, llama_config, phi3_config
):
    config = {
        "openelm": openelm_config([3, 4, 6], [1, 2, 3]),
        "mistral": llama_config(model_type="mistral", sliding_window=7),
        "phi3": phi3_config(head_dim=40, partial_rotary_factor=0.4),
    }[family]
    artifact = package(config, **options)
    text = tokens[:24]
    wanted = artifact.float_logits(text)
    session = run_package(artifact.folder)
    assert largest_error(session.logits(text), wanted) < 5e-6
    found = [session.extend(text[:end][start:]) for start, end in ((0, 5), (5, 21), (21, 24))]
    assert largest_error(np.stack(found), wanted[[4, 20, 23]]) < 5e-6
    reopen(artifact.folder)


@pytest.mark.parametrize("write", ["slice", "onehot"])
def test_the_neural_engines_shape(write, package, run_package, reopen, tokens, openelm_config):
    artifact = package(
        openelm_config([2, 4], [1, 2], head_dim=24), "fp16", profile="ane", cache_write=write
    )
    text = tokens[:48]
    wanted = artifact.quantized_logits(text)
    session = run_package(artifact.folder)
    # Rotary tables and the scales of scores and norms are float16.
    assert largest_error(session.logits(text), wanted) < 2e-3
    spec, program = reopen(artifact.folder)
    for described in spec.description.functions:
        for state in described.state:
            assert state.type.stateType.arrayType.shape[2:] == [64, 32]
    for function in program.functions.values():
        for operation in function.operations:
            if operation.op_type not in ("const", "cast"):
                assert all("fp32" not in str(value.dtype) for value in operation.outputs)
