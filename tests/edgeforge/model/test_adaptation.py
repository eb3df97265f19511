"""Adapters merged into a checkpoint's tensors, against peft; and adapters that do not fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeforge.checkpoint.adapter import open_adapters
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.families.spec import Piece
from edgeforge.model.low_rank import added, low_rank
from edgeforge.model.model import open_model

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q = "model.layers.{}.self_attn.q_proj"
SHAPES = {Q.format(layer): (32, 32) for layer in range(2)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, hugging_face):
    """A tiny checkpoint of a family, by the family's name and whether its head is tied."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def base(family="llama", tied=False) -> Path:
        if (family, tied) not in made:
            config = {"model_type": family, **SHAPE, "tie_word_embeddings": tied}
            made[family, tied] = hugging_face.save(root / f"{family}-{tied}", config)
        return made[family, tied]

    return base


def rows_of(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    rows = tensor.flatten(0, 1) if piece.matrices else tensor
    return rows[piece.first : piece.first + piece.shape[0]]


def assert_merged(base: Path, given: list[str], state: dict[str, torch.Tensor]) -> None:
    """Every weight is peft's merged one, and reading it by rows gives the same rows."""
    weights = open_model(str(base), adapters=given).weights
    changed = 0
    plain = open_model(str(base)).weights
    for name, spec in weights.spec.weights.items():
        parts = [rows_of(state[p.tensor], p) for p in spec.pieces]
        wanted = torch.cat(parts).reshape(spec.shape)
        found = weights.float_weight(name)
        bound = 1e-5 * float(wanted.max() - wanted.min())
        assert float((found - wanted).abs().max()) <= bound, name
        if len(spec.shape) == 2:
            middle = weights.read_rows(name, 3, 9).float()
            assert float((middle - wanted[3:9]).abs().max()) <= bound, name
        if name in plain.spec.weights and not torch.equal(found, plain.float_weight(name)):
            changed += 1
    assert changed


CASES = {
    "patterns": (
        "llama",
        dict(
            target_modules=ALL,
            rank_pattern={"q_proj": 8, "layers.1.mlp.up_proj": 2},
            alpha_pattern={r"model.layers.\d.self_attn.v_proj": 3},
        ),
    ),
    "rank-stabilized": ("llama", dict(target_modules="all-linear", use_rslora=True)),
    "dora": ("llama", dict(target_modules=ALL, use_dora=True)),
    "embedding": ("llama", dict(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "saved": (
        "llama",
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"]),
    ),
    "biases": ("qwen2", dict(target_modules=["q_proj", "v_proj"], bias="lora_only")),
    "all biases": ("qwen2", dict(target_modules=["q_proj"], bias="all", fan_in_fan_out=True)),
    "fused": ("phi3", dict(target_modules=["qkv_proj", "gate_up_proj", "down_proj"])),
    # Of a mixture of heads: keys and values, a router, and all experts as they were saved.
    "keys, values and routers": ("jetmoe", dict(target_modules=["kv_proj", "layer"])),
    "saved experts": ("jetmoe", dict(target_modules=["kv_proj"], modules_to_save=["experts"])),
    "one layer": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[1])),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_pefts_own(case, bases, tmp_path, peft_adapters):
    family, config = CASES[case]
    base = bases(family)
    adapter = peft_adapters.saved_by_peft(
        base, tmp_path / "tuned", **{"r": 4, "lora_alpha": 7, **config}
    )
    merged = peft_adapters.loaded_by_peft(base, adapter).merge_and_unload()
    assert_merged(base, [str(adapter)], merged.state_dict())


def test_two_adapters_with_weights_are_pefts_linear_combination(bases, tmp_path, peft_adapters):
    base = bases()
    first, second = (
        peft_adapters.saved_by_peft(
            base, tmp_path / name, seed, r=rank, lora_alpha=8, target_modules=["q_proj", "up_proj"]
        )
        for seed, (name, rank) in enumerate({"first": 4, "second": 2}.items())
    )
    adapted = peft_adapters.loaded_by_peft(base, first, second)
    adapted.add_weighted_adapter(["0", "1"], [0.5, -2.0], "sum", combination_type="cat")
    adapted.set_adapter("sum")
    state = adapted.merge_and_unload().state_dict()
    assert_merged(base, [f"{first}@0.5", f"{second}@-2"], state)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=["head", "embedding", "low rank"],
)
def test_a_tied_head_becomes_its_own_as_it_was_in_training(
    config, bases, tmp_path, peft_adapters, traced
):
    base = bases("llama", tied=True)
    adapter = peft_adapters.saved_by_peft(base, tmp_path / "tuned", r=4, **config)
    tokens = torch.arange(17)
    with torch.no_grad():
        wanted = peft_adapters.loaded_by_peft(base, adapter)(tokens[None]).logits[0].numpy()
    model = open_model(str(base), adapters=[str(adapter)])
    assert not model.spec.tied and open_model(str(base)).spec.tied
    assert any("a matrix of its own" in note for note in model.checkpoint.notes)
    found = traced.session(model, 32).logits(tokens.numpy())
    assert traced.difference(found, wanted) < traced.TOLERANCE


def test_a_cut_model_leaves_out_what_its_adapter_has_for_other_layers(
    bases, tmp_path, peft_adapters
):
    base = bases()
    adapter = peft_adapters.write(tmp_path / "a", peft_adapters.factors(SHAPES))
    cut = open_model(str(base), exit_layer=1, adapters=[str(adapter)])
    whole = open_model(str(base), adapters=[str(adapter)])
    name = "model.layers.0.self_attn.qk_proj.weight"
    assert torch.equal(cut.weights.float_weight(name), whole.weights.float_weight(name))


def test_the_name_of_the_store_depends_on_adapters_and_weights(bases, tmp_path, peft_adapters):
    base = str(bases())
    one = peft_adapters.write(tmp_path / "one", peft_adapters.factors(SHAPES))
    two = peft_adapters.write(tmp_path / "two", peft_adapters.factors(SHAPES, seed=1))
    given = ([], [f"{one}"], [f"{one}@2"], [f"{two}"], [f"{one}", f"{two}"])
    found = {open_model(base, adapters=each).weights.mapping_digest() for each in given}
    assert len(found) == len(given)


def test_an_adapter_that_names_another_model_is_told_of(bases, tmp_path, peft_adapters):
    base, tensors = str(bases()), peft_adapters.factors(SHAPES)
    other = peft_adapters.write(tmp_path / "a", tensors, base_model_name_or_path="org/other-7B")
    own = peft_adapters.write(tmp_path / "b", tensors, base_model_name_or_path="org/llama-False")
    (warning,) = open_model(base, adapters=[str(other)]).checkpoint.warnings
    assert "was trained for org/other-7B" in warning
    assert open_model(base, adapters=[str(own)]).checkpoint.warnings == ()


def without(tensors: dict, end: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


def spoiled(tensors: dict, value: float) -> dict:
    name = next(iter(tensors))
    tensors[name][1, 2] = value
    return tensors


BAD = {
    "rank 0": (lambda t: t, {"r": 0}, "sets r to 0; a rank is a whole number of at least 1"),
    "another rank": (lambda t: t, {"r": 8}, "have shapes [4, 32] and [32, 4], and"),
    "no A": (lambda t: without(t, "1.self_attn.q_proj.lora_A.weight"), {}, "lacks lora_A of"),
    "no B": (lambda t: without(t, "lora_B.weight"), {}, "lacks lora_B of"),
    "no magnitudes": (lambda t: t, {"use_dora": True}, "lacks lora_magnitude_vector of"),
    "magnitudes": (
        lambda t: {**t, Q.format(0) + ".lora_magnitude_vector": torch.ones(32)},
        {},
        "does not say DoRA",
    ),
    "NaN": (lambda t: spoiled(t, float("nan")), {}, "holds a value that is not finite"),
    "infinite": (lambda t: spoiled(t, float("inf")), {}, "holds a value that is not finite"),
    "loha": (lambda t: t, {"peft_type": "LOHA"}, "sets peft_type to 'LOHA'; EdgeForge reads LORA"),
    "ia3": (lambda t: t, {"peft_type": "IA3"}, "sets peft_type to 'IA3'"),
    "no kind": (lambda t: t, {"peft_type": None}, "sets peft_type to None"),
    "a field": (lambda t: t, {"use_qalora": True}, "sets use_qalora to True, which EdgeForge"),
    "experts": (lambda t: t, {"target_parameters": ["experts.up"]}, "sets target_parameters to"),
    "unknown": (lambda t: t, {"warp": 3}, "sets warp to 3, which EdgeForge does not compute"),
    "pissa": (lambda t: t, {"init_lora_weights": "pissa"}, "changed the base model"),
    "no pattern": (lambda t: t, {"rank_pattern": {"(": 4}}, "which is no regular expression"),
    "a pattern of 0": (lambda t: t, {"rank_pattern": {"q_proj": 0}}, "a rank is a whole number"),
    "alpha": (lambda t: t, {"lora_alpha": "8"}, "sets lora_alpha to '8', which is not a number"),
    "unknown part": (
        lambda t: {**t, Q.format(0) + ".lora_diag": torch.ones(4)},
        {},
        "which is no part of LoRA that EdgeForge computes",
    ),
    "half of the modules": (
        lambda t: t,
        {"target_modules": ["q_proj", "v_proj"]},
        "holds nothing for 'v_proj', which target_modules",
    ),
    "half of the layers": (
        lambda t: dict(list(t.items())[:2]),
        {"target_modules": ["q_proj"]},
        "lacks layers.1.self_attn.q_proj, which its target_modules name",
    ),
    "nothing": (lambda t: {}, {}, "holds no tensors"),
    "another model's shape": (
        lambda t: {**t, Q.format(0) + ".lora_A.weight": torch.ones(4, 48)},
        {},
        "by a matrix of shape [32, 48]; the model's has [32, 32]: it belongs to another model",
    ),
    "a module too many": (
        lambda t: {
            "model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 32),
            "model.layers.7.self_attn.q_proj.lora_B.weight": torch.ones(32, 4),
        },
        {"base_model_name_or_path": "org/deeper"},
        "which this llama model does not have: it belongs to another model; it says that its "
        "model is org/deeper",
    ),
    "a larger vocabulary": (
        lambda t: {**t, "lm_head.weight": torch.ones(97, 32)},
        {},
        "replaces lm_head.weight by one of shape [97, 32]; the model's has [96, 32]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_in_one_sentence(case, bases, tmp_path, peft_adapters):
    change, config, told = BAD[case]
    tensors = change(peft_adapters.factors(SHAPES))
    folder = peft_adapters.write(tmp_path / "a", tensors, **config)
    with pytest.raises(CheckpointError, match=re.escape(told)) as caught:
        open_model(str(bases()), adapters=[str(folder)])
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


JET = "model.layers.0.self_attention.experts.{}"


@pytest.mark.parametrize("part", ["input_linear", "output_linear"])
def test_a_stack_of_attentions_experts_takes_no_adapter(part, bases, tmp_path, peft_adapters):
    tensors = peft_adapters.factors({JET.format(part): (256, 32)})
    folder = peft_adapters.write(tmp_path / "a", tensors)
    told = (
        f"changes {JET.format(part)} by one matrix of shape [256, 32]; the model's tensor holds "
        f"the matrices of 8 experts, which EdgeForge changes only one by one"
    )
    with pytest.raises(CheckpointError, match=re.escape(told)):
        open_model(str(bases("jetmoe")), adapters=[str(folder)])


def test_what_lies_beside_a_mixture_of_heads(bases, tmp_path, peft_adapters):
    model = open_model(str(bases("jetmoe")))
    keys = {f"model.layers.{layer}.self_attention.kv_proj": (512, 32) for layer in range(2)}
    given = peft_adapters.write(tmp_path / "keys", peft_adapters.factors(keys))
    pairs = low_rank(model, open_adapters([str(given)])[0])
    at = "model.layers.{}.self_attn.{}_proj.weight"
    assert pairs.keys() == {at.format(layer, part) for layer in range(2) for part in "kv"}
    merged = open_model(str(bases("jetmoe")), adapters=[str(given)]).weights
    for name in pairs:
        wanted, found = (
            merged.float_weight(name),
            added(pairs, name, model.weights.float_weight(name)),
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    router = peft_adapters.factors({JET.format("router.layer"): (8, 32)})
    given = peft_adapters.write(tmp_path / "router", router)
    with pytest.raises(CheckpointError, match=r"router.layer.weight, of a mixture's router, which"):
        low_rank(model, open_adapters([str(given)])[0])


def test_files_that_are_not_there_or_not_read(tmp_path, peft_adapters):
    folder = peft_adapters.write(tmp_path / "a", peft_adapters.factors(SHAPES))
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    save_file({name.removeprefix("base_model."): t for name, t in tensors.items()}, weights)
    with pytest.raises(CheckpointError, match=r"begin with base_model\.model"):
        open_adapters([str(folder)])
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"is pickled.*convert it, safetensors.torch"):
        open_adapters([str(folder)])
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors cannot be read"):
        open_adapters([str(folder)])
    config.unlink()
    with pytest.raises(CheckpointError, match="is not an adapter of peft: it has no adapter_conf"):
        open_adapters([str(folder)])
    with pytest.raises(CheckpointError, match="nowhere' is not a folder"):
        open_adapters([str(tmp_path / "nowhere")])


def test_weights_and_repeated_adapters(bases, tmp_path, peft_adapters):
    tensors = peft_adapters.factors(SHAPES)
    folder = peft_adapters.write(tmp_path / "a@2", tensors)
    (adapter,) = open_adapters([str(folder)])
    assert adapter.weight == 1 and adapter.described() == "the adapter a@2"
    (half,) = open_adapters([f"{folder}@0.5"])
    assert half.weight == 0.5 and half.described() == "the adapter a@2 times 0.5"
    for text in ("@0", "@", "@nan", "@much"):
        with pytest.raises(UsageError, match="is not a number other than 0"):
            open_adapters([f"{folder}{text}"])
    with pytest.raises(UsageError, match="is given twice"):
        open_adapters([str(folder), f"{folder}@3"])
    lengths = {f"{module}.lora_magnitude_vector": torch.ones(32) for module in SHAPES}
    dora = peft_adapters.write(tmp_path / "d", {**tensors, **lengths}, use_dora=True)
    saved = peft_adapters.write(tmp_path / "s", {**tensors, "lm_head.weight": torch.ones(96, 32)})
    for given in ([f"{dora}@2"], [str(folder), str(dora)]):
        with pytest.raises(CheckpointError, match=r"lengths \(DoRA\), which hold for"):
            open_model(str(bases()), adapters=given)
    with pytest.raises(CheckpointError, match=r"replaces lm_head.weight, so it can have no weight"):
        open_model(str(bases()), adapters=[f"{saved}@2"])


def test_integers_that_an_adapter_changes_are_floats_before(
    bases, tmp_path, peft_adapters, gguf_files
):
    # Queries and keys lie interleaved in the file, and are stacked into one weight.
    values = gguf_files.write(bases(), tmp_path / "m.gguf", "Q4_0")
    tensors = peft_adapters.factors(SHAPES)
    adapter = peft_adapters.write(tmp_path / "a", tensors)
    plain, changed = (
        open_model(str(tmp_path / "m.gguf"), adapters=given).weights
        for given in ([], [str(adapter)])
    )
    name = "model.layers.1.self_attn.qk_proj.weight"
    assert plain.imported.keys() - changed.imported.keys() == {
        f"model.layers.{layer}.self_attn.qk_proj.weight" for layer in range(2)
    }
    assert changed.stored_formats()[name].name == "fp16"
    up, down = (tensors[f"{Q.format(1)}.lora_{part}.weight"] for part in "BA")
    parts = [torch.from_numpy(values[f"model.layers.1.self_attn.{n}_proj.weight"]) for n in "qk"]
    wanted = torch.cat([parts[0] + 2 * up @ down, parts[1]])
    torch.testing.assert_close(changed.float_weight(name), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(changed.read_rows(name, 5, 40), wanted[5:40], atol=1e-6, rtol=0)


def test_integers_that_stay_integers_take_no_adapter(tmp_path, peft_adapters, packed_checkpoints):
    case = packed_checkpoints.CASES["gptq-symmetric"]
    packed_checkpoints.write(tmp_path / "m", packed_checkpoints.family("llama"), case)
    module = Q.format(0)
    adapter = peft_adapters.write(tmp_path / "a", peft_adapters.factors({module: (64, 64)}))
    told = rf"holds {module}.weight as integers \(gptq\), and the adapter .* would change it"
    with pytest.raises(CheckpointError, match=told):
        open_model(str(tmp_path / "m"), adapters=[str(adapter)])
