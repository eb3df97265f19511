"""A rotated model computes what the checkpoint's own does, and is read as any other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgeforge.errors import UsageError
from edgeforge.model.model import Model, open_model
from edgeforge.model.rotated_weights import Rotated, recorded_rotation, rotate
from edgeforge.model.rotations import ROTATIONS
from edgeforge.model.trace import trace
from edgeforge.reference.walk import ReferenceRunner
from edgeforge.synth.synthesise import synthesise
from quant.errors import QuantizationError
from quant.program.dialect import check_float
from quant.program.program import Program

CONTEXT = 32
MODELS = ["demo", "tiny-openelm", "tiny-llama", "tiny-llama2", "tiny-mistral", "tiny-phi-3"]
OPENELM = {
    "model_type": "openelm",
    "vocab_size": 53,
    "model_dim": 40,
    "head_dim": 12,
    "num_transformer_layers": 2,
    "num_gqa_groups": 2,
    "qkv_multipliers": [0.6, 1.2],
    "ffn_multipliers": [0.5, 1.5],
    "ffn_dim_divisor": 8,
    "normalize_qk_projections": True,
    "max_context_length": 64,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> Model:
    if request.param == "demo":
        return open_model("demo")
    return open_model(str(synthesise(request.param, tmp_path_factory.mktemp("synth") / "m")))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Model:
    return open_model(str(synthesise("tiny-llama", tmp_path_factory.mktemp("synth") / "m")))


def logits(model: Model, program: Program) -> torch.Tensor:
    weights = model.weights
    block = np.random.default_rng(0).integers(0, model.spec.vocab_size, CONTEXT)
    runner = ReferenceRunner(program, lambda g: weights.float_weight(g.name), weights.float_rows)
    return next(iter(runner.logits([torch.from_numpy(block)])))


def test_logits_are_those_of_the_checkpoint(model):
    norms = [n for n, role in model.weights.roles().items() if role == "norm"]
    spread = min(float(model.weights.float_weight(name).std()) for name in norms)
    assert spread > 0.02  # scales of ones would hide where they went
    wanted = logits(model, trace(model.spec, CONTEXT))
    for name, kind in ROTATIONS.items():
        made = rotate(model, name, CONTEXT)
        check_float(made.program)
        changed = {
            n
            for n in model.weights.shapes()
            if not torch.allclose(
                made.model.weights.float_weight(n), model.weights.float_weight(n), atol=1e-3
            )
        }
        in_heads = {n for n in norms if "q_norm" in n or "k_norm" in n}
        if kind.residual:
            assert changed == model.weights.shapes().keys() - in_heads
        else:
            assert {n.split(".")[-2] for n in changed} == {"v_proj", "o_proj"}
        found = logits(made.model, made.program)
        assert (found - wanted).abs().max() < 1e-5 * (wanted.max() - wanted.min())


def exact_weight(weights, name):
    """A whole weight before it is rounded to float32: float64, of the spec's shape."""
    shape = weights.shapes()[name]
    rows = 1 if len(shape) == 1 else shape[0]
    return weights.exact_rows(name, 0, rows).reshape(shape)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ROTATIONS)
def test_in_float64_nothing_is_lost(name, tied, tmp_path, openelm_numpy):
    config = OPENELM | {"share_input_output_layers": tied}
    tensors = openelm_numpy.save(
        tmp_path / "m", config, openelm_numpy.random_tensors(config), "float32"
    )
    tokens = np.random.default_rng(0).integers(0, 53, 30)
    wanted = openelm_numpy.logits(config, tensors, tokens)

    made = rotate(open_model(str(tmp_path / "m")), name, CONTEXT)
    spec = made.model.spec
    exact = {n: exact_weight(made.model.weights, n).numpy() for n in spec.weights}
    rotated: dict[str, np.ndarray] = {}
    for n, weight in spec.weights.items():  # q, k and v lie in one tensor, in this order
        for piece in weight.pieces:
            before = [rotated[piece.tensor]] if piece.first else []
            rotated[piece.tensor] = np.concatenate([*before, exact[n]])
    if spec.norm_matrix:  # the oracle has no place for it but the head
        assert tied and name == "hadamard"
        embedding = exact["model.embed_tokens.weight"]
        rotated["lm_head.weight"] = embedding @ exact["model.norm_matrix.weight"]
    elif tied and name == "hadamard-untied":
        rotated["transformer.token_embeddings.weight"] = exact["model.embed_tokens.weight"]
        rotated["lm_head.weight"] = exact["lm_head.weight"]
    own = config | {"share_input_output_layers": "lm_head.weight" not in rotated}
    found = openelm_numpy.logits(own, rotated, tokens)
    assert np.abs(found - wanted).max() < 1e-10 * np.ptp(wanted)


def test_rows_are_those_of_the_whole_wherever_they_are_cut(tiny):
    weights = rotate(tiny, "hadamard", CONTEXT).model.weights
    for name, shape in weights.shapes().items():
        whole = weights.float_weight(name)
        exact = exact_weight(weights, name)
        assert torch.equal(exact.float(), whole)
        if len(shape) == 2:
            for step in (1, 7, 40):
                cut = [
                    weights.read_rows(name, at, min(shape[0], at + step))
                    for at in range(0, shape[0], step)
                ]
                torch.testing.assert_close(torch.cat(cut), whole, rtol=0, atol=1e-6)
        assert sum(rows for _, rows in weights.pieces(name)) == (shape[0] if len(shape) > 1 else 1)
    tokens = torch.tensor([[3, 1, 3, 200]])
    table = weights.float_weight("model.embed_tokens.weight")
    torch.testing.assert_close(
        weights.float_rows("model.embed_tokens.weight", tokens), table[tokens], rtol=0, atol=1e-6
    )
    kept = weights.float_weight("model.layers.0.mlp.down_proj.weight").zero_()
    assert weights.float_weight("model.layers.0.mlp.down_proj.weight").norm() > kept.norm()


def test_a_rotation_is_the_same_again_and_another_seed_is_another(tiny):
    name = "model.layers.0.mlp.down_proj.weight"

    def of(made: Rotated):
        return made.model.weights.float_weight(name), made.model.weights.mapping_digest()

    (first, digest), (again, same) = (of(rotate(tiny, "hadamard", n)) for n in (16, CONTEXT))
    assert torch.equal(first, again) and digest == same
    made = rotate(tiny, "hadamard", CONTEXT, seed=5)
    other, another = of(made)
    assert not torch.allclose(first, other, atol=0.01)
    values = rotate(tiny, "hadamard-values", CONTEXT).model.weights.mapping_digest()
    assert len({digest, another, values, tiny.weights.mapping_digest()}) == 4
    assert torch.equal(of(recorded_rotation(tiny, made.record, CONTEXT))[0], other)
    with pytest.raises(UsageError, match="rotation has version 0; this EdgeForge makes version 1"):
        recorded_rotation(tiny, replace(made.record, version=0), CONTEXT)


def test_parameters_are_the_checkpoints_own():
    demo = open_model("demo")
    for name, added in (
        ("hadamard", "model.norm_matrix.weight"),
        ("hadamard-untied", "lm_head.weight"),
        ("hadamard-values", None),
    ):
        made = rotate(demo, name, CONTEXT)
        assert made.added == added
        assert made.model.spec.num_parameters == demo.spec.num_parameters
        assert made.model.spec.tied == (name != "hadamard-untied")


def test_an_unknown_rotation(tiny):
    with pytest.raises(UsageError) as caught:
        rotate(tiny, "hadamart", CONTEXT)
    assert str(caught.value) == (
        "there is no rotation 'hadamart' (did you mean 'hadamard'?); known: "
        "hadamard, hadamard-untied, hadamard-values"
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["mlp.down_proj", "mlp.gate_proj"])
def test_a_weight_that_is_not_finite_is_named_by_its_row(bad, part, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = synthesise("tiny-llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.1.{part}.weight"][3, 5] = bad
    save_file(tensors, folder / "model.safetensors")
    weights = rotate(open_model(str(folder)), "hadamard", CONTEXT).model.weights
    wanted = f"model.layers.1.{part}.weight"
    name = next(n for n, w in weights.spec.weights.items() if w.pieces[0].tensor == wanted)
    kind = "NaN" if bad != bad else "an infinite value"
    with pytest.raises(QuantizationError, match=rf"{name} has {kind} in row 3"):
        weights.float_weight(name)


def test_integers_of_a_checkpoint_cannot_be_rotated(tmp_path, packed_checkpoints):
    case = packed_checkpoints.CASES["gptq-symmetric"]
    packed_checkpoints.write(tmp_path / "m", packed_checkpoints.family("llama"), case)
    with pytest.raises(UsageError, match=r"holds model\.layers\.0\S+ as integers \(gptq\)"):
        rotate(open_model(str(tmp_path / "m")), "hadamard", CONTEXT)
