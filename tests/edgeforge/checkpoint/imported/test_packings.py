"""Each packing against a reader that nobody here wrote, and what each refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.checkpoint.imported.awq import AwqPacking
from edgeforge.checkpoint.imported.gptq import GptqPacking
from edgeforge.checkpoint.imported.registry import METHODS, read_method
from edgeforge.errors import CheckpointError
from quant.formats.packing import unpack_int4

PACKED = {"gptq", "awq", "compressed-tensors"}


@pytest.fixture(params=["gptq-asymmetric", "gptq-8-bits", "awq"])
def packed(request, packed_checkpoints):
    case = packed_checkpoints.CASES[request.param]
    layer = case.draw(48, 96, np.random.default_rng(5))
    tensors = {name: torch.from_numpy(value) for name, value in case.tensors(layer).items()}
    return case, tensors


def as_genai_reads(case, tensors):
    """Codes ``[out, in]`` and zero points ``[out, groups]``, by onnxruntime-genai's loaders."""
    from onnxruntime_genai.models.loaders.awq import AWQModel
    from onnxruntime_genai.models.loaders.gptq import GPTQModel

    module = SimpleNamespace(
        **{name: value.clone() for name, value in tensors.items() if name != "g_idx"},
        g_idx=None,
        bits=case.bits,
        group_size=case.group_size,
        in_features=96,
        out_features=48,
    )
    loader = AWQModel if case.method == "awq" else GPTQModel
    reader = loader.__new__(loader)
    reader.prepare_quantized_tensor(module)
    reader.unpack_qzeros(module)
    reader.unpack_qweight(module)
    return module.qweight.T, module.qzeros.T


def test_codes_and_zero_points_are_those_another_reader_finds(packed):
    case, tensors = packed
    packing = AwqPacking(32) if case.method == "awq" else GptqPacking(case.bits, 32, False, True)
    codes = packing.codes(tensors["qweight"])
    codes = unpack_int4(codes, 96) if case.bits == 4 else codes
    wanted, zeros = as_genai_reads(case, tensors)
    assert torch.equal(codes.int(), wanted.int())
    assert torch.equal(packing.zero_point(tensors["qzeros"]).int(), zeros.int())


def test_every_method_is_read_from_the_config_that_its_writers_leave(packed_checkpoints):
    seen = set()
    for case in packed_checkpoints.CASES.values():
        packing = read_method({"quantization_config": case.config()}).packing
        assert (packing.bits, packing.group_size or 0) == (case.bits, case.group_size)
        seen.add(packing.method)
    assert seen == PACKED


def test_a_checkpoint_of_floats_has_no_packing():
    assert read_method({"model_type": "llama"}) is None
    assert read_method({"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("gptq", {"bits": 3}, ["bits is 3", "4 and 8", "original"]),
        ("gptq", {"group_size": 0}, ["group_size is 0"]),
        ("gptq", {"group_size": True}, ["group_size is True"]),
        ("gptq", {"checkpoint_format": "marlin"}, ["checkpoint_format", "'marlin'", "'gptq_v2'"]),
        ("gptq", {"is_marlin_format": True}, ["is_marlin_format"]),
        ("gptq", {"dynamic": {"-:lm_head": {}}}, ["'dynamic'"]),
        ("gptq", {"pack_dtype": "int8"}, ["pack_dtype", "'int32'"]),
        ("gptq", {"rotation": "hadamard"}, ["'rotation'", "--ignore-config rotation"]),
        ("awq", {"version": "gemv"}, ["version", "'gemv'", "'gemm'"]),
        ("awq", {"bits": 8}, ["bits is 8", "4 only"]),
        ("awq", {"zero_point": False}, ["zero_point is false"]),
        ("compressed-tensors", {"format": "int-quantized"}, ["'int-quantized'"]),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, ["kv_cache_scheme"]),
        ("compressed-tensors", {"config_groups": {}}, ["0 config_groups"]),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(
    packed_checkpoints, method, changes, words
):
    case = next(c for c in packed_checkpoints.CASES.values() if c.method == method)
    with pytest.raises(CheckpointError) as refused:
        read_method({"quantization_config": {**case.config(), **changes}})
    assert all(word in str(refused.value) for word in words), refused.value


def test_activations_in_integers_are_refused(packed_checkpoints):
    config = packed_checkpoints.compressed_config(8, None, True)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(CheckpointError, match="input_activations"):
        read_method({"quantization_config": config})


def test_a_field_that_the_user_vouches_for_is_let_through(packed_checkpoints):
    config = {**packed_checkpoints.gptq_config(4, 32, True), "rotation": "hadamard"}
    assert read_method({"quantization_config": config}, ["rotation"]) is not None


@pytest.mark.parametrize("method", ["exl2", None, "gtpq"])
def test_another_method_is_refused_and_the_known_ones_named(method):
    with pytest.raises(CheckpointError, match="already quantized") as refused:
        read_method({"quantization_config": {"quant_method": method, "bits": 4}})
    assert all(known in str(refused.value) for known in METHODS)
    assert ("did you mean 'gptq'" in str(refused.value)) == (method == "gtpq")


def test_readers_record_every_field(packed_checkpoints):
    """What a reader lets pass in silence it has looked at: nothing is left for `finish`."""
    for case in packed_checkpoints.CASES.values():
        METHODS[case.method](ConfigReader(case.config()))


def test_zero_points_that_readers_take_apart_are_refused():
    stored = torch.tensor([[0x7777777F]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"15.*16 and some for 0.*gptq_v2"):
        GptqPacking(4, 32, False, True).zero_point(stored)
    kept = GptqPacking(4, 32, False, False).zero_point(stored)
    assert kept.flatten().tolist() == [15, 7, 7, 7, 7, 7, 7, 7]
