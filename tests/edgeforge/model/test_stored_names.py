"""Names that checkpoints give the same tensors, each held against transformers' own reading."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeforge.errors import CheckpointError
from edgeforge.families.registry import read_spec
from edgeforge.model.stored_names import named_as_stored
from tests.oracles.tiny_families import MIXTURES, PIXTRAL, VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def bare(held):
    return {name.removeprefix("model."): tensor for name, tensor in held.items()}


def head_only(held):
    held = dict(held)
    return held | {HEAD: held.pop(EMBEDDING)}


def bare_and_head_only(held):
    return bare(head_only(held))


def wide_head(held):
    return {n: t.bfloat16() for n, t in held.items()} | {HEAD: held[EMBEDDING].bfloat16().float()}


def same_head(held):
    return held | {HEAD: held[EMBEDDING].clone()}


@pytest.mark.parametrize(
    ("tied", "change"),
    [
        (True, bare),
        (True, head_only),
        (True, bare_and_head_only),
        (True, wide_head),
        (True, same_head),
        (False, bare),
    ],
)
def test_what_transformers_reads_gives_its_logits(tied, change, tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, LLAMA | {"tie_word_embeddings": tied})
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    tokens = traced.tokens(20, LLAMA["vocab_size"])
    expected = hugging_face.logits(folder, tokens)
    opened = traced.model(folder)
    assert opened.spec is opened.weights.spec and opened.spec.tied == tied
    ours = traced.session(opened, 32).logits(tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_head_of_other_numbers_is_refused(tmp_path, hugging_face, traced, dtype):
    folder = hugging_face.save(tmp_path, LLAMA | {"tie_word_embeddings": True})
    file = folder / "model.safetensors"
    held = load_file(file)
    held[HEAD] = held[EMBEDDING].to(getattr(torch, dtype), copy=True)
    held[HEAD][-1, -1] += 1
    save_file(held, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight that differs"):
        traced.model(folder)
    held[HEAD] = held[EMBEDDING][:-1].clone()
    save_file(held, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight that differs"):
        traced.model(folder)


def test_a_file_with_both_kinds_of_names_is_refused(tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, LLAMA)
    file = folder / "model.safetensors"
    held = load_file(file)
    held["norm.weight"] = held.pop("model.norm.weight")
    save_file(held, file)
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight"):
        traced.model(folder)


def test_an_untied_model_without_its_head_is_refused(tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, LLAMA | {"tie_word_embeddings": False})
    file = folder / "model.safetensors"
    held = bare(load_file(file))
    del held[HEAD]
    save_file(held, file)
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        traced.model(folder)


def test_names_of_quantized_layers_and_of_another_family_lose_their_prefix_too():
    spec = read_spec(LLAMA)
    stored = {"layers.0.self_attn.q_proj.qweight": 0}
    pieces = named_as_stored(spec, stored).weights["model.layers.0.self_attn.qk_proj.weight"].pieces
    assert [p.tensor for p in pieces] == [f"layers.0.self_attn.{n}_proj.weight" for n in "qk"]
    openelm = {"model_type": "openelm", "model_dim": 48, "head_dim": 8, "num_transformer_layers": 1}
    spec = read_spec(openelm)
    bare_names = named_as_stored(spec, ["layers.0.attn_norm.weight"]).weights
    assert bare_names[EMBEDDING].pieces[0].tensor == "token_embeddings.weight"
    assert named_as_stored(spec, ["other.weight"]) is spec
    assert named_as_stored(spec, ["transformer.norm.weight", "layers.0.attn_norm.weight"]) is spec


def test_what_else_the_files_may_hold_is_said(tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, LLAMA)
    file = folder / "model.safetensors"
    whole = load_file(file)
    up = "model.layers.0.mlp.up_proj"

    def without(name):
        return {n: t for n, t in whole.items() if n != name}

    packed = torch.zeros(48, 4, dtype=torch.uint32)
    for held, words in (
        (whole | {f"{up}.lora_A.weight": torch.ones(2)}, "adapter that is not merged"),
        (
            without(f"{up}.weight") | {f"{up}.base_layer.weight": torch.ones(2)},
            "from a model with an adapter",
        ),
        (whole | {f"{up}.weight.absmax": torch.ones(2), f"{up}.weight.quant_map": torch.ones(2)},
         "quantized by bitsandbytes"),
        (whole | {f"{up}.SCB": torch.ones(2)}, "quantized to 8 bits by bitsandbytes"),
        (whole | {f"{up}.weight": packed, f"{up}.scales": torch.ones(2)}, "quantized by MLX"),
        (
            whole
            | {f"{up}.weight": whole[f"{up}.weight"].to(torch.float8_e4m3fn)}
            | {f"{up}.weight_scale_inv": torch.ones(2)},
            "quantized to FP8",
        ),
        (
            without(f"{up}.weight") | {f"{up}.qweight": torch.zeros(2, dtype=torch.int32)},
            "by GPTQ or AWQ, but config.json has no quantization_config",
        ),
        ({"tok_embeddings.weight": torch.ones(2)}, "publisher's own format (Meta's or Mistral's)"),
        ({f"_orig_mod.{n}": t for n, t in whole.items()}, "has '_orig_mod.' before every"),
        ({f"base_model.model.{n}": t for n, t in whole.items()}, "'base_model.model.' before"),
    ):  # fmt: skip
        save_file(held, file)
        with pytest.raises(CheckpointError) as caught:
            traced.model(folder)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("kind", ["mistral", "ministral3"])
def test_the_text_part_of_mistral3_is_of_either_family(kind, tmp_path, hugging_face, traced):
    text = {**LLAMA, "model_type": kind, "head_dim": 8, "sliding_window": None}
    config = {"model_type": "mistral3", "text_config": text, "vision_config": PIXTRAL}
    folder = hugging_face.save(tmp_path, config | {"tie_word_embeddings": False})
    tokens = traced.tokens(12, 61)
    expected = hugging_face.logits(folder, tokens)
    assert any("vision_tower" in name for name in load_file(folder / "model.safetensors"))
    ours = traced.session(traced.model(folder), 16).logits(tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE
    fields = json.loads((folder / "config.json").read_text())
    fields["text_config"]["model_type"] = "mistral4"
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="'mistral4' is no text part of mistral3"):
        traced.model(folder)


@pytest.mark.parametrize("place", ["outside", "inside", "none"])
def test_the_text_part_of_a_model_with_images_is_found_under_each_prefix(
    place, tmp_path, hugging_face, traced
):
    text = {**LLAMA, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    folder = hugging_face.save(tmp_path, config)
    tokens = traced.tokens(12, 61)
    expected = hugging_face.logits(folder, tokens)
    held = load_file(folder / "model.safetensors")
    assert any("vision_tower" in name for name in held)

    def renamed(name: str) -> str:
        bare = name.replace("model.language_model.", "language_model.model.")
        if place == "outside":
            return bare.removeprefix("model.") if "vision" in bare else bare
        if place == "none":
            return bare.removeprefix("language_model.")
        inside = bare.replace("language_model.model.", "model.language_model.")
        return inside if inside.startswith("model.") else f"model.{inside}"

    changed = {renamed(name): tensor for name, tensor in held.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    ours = traced.session(traced.model(folder), 16).logits(tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE


def stack_experts(folder):
    """Rewrites a checkpoint's file with the tensors that transformers holds in memory."""
    from transformers import AutoModelForCausalLM

    held = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    if json.loads((folder / "config.json").read_text())["tie_word_embeddings"]:
        del held[HEAD]
    stacked = [name for name in held if name.endswith(".experts.gate_up_proj")]
    assert stacked and all(held[name].dim() == 3 for name in stacked)
    return held


# JetMoE's experts are stacked in the hub's files too.
@pytest.mark.parametrize("family", [family for family in MIXTURES if family != "jetmoe"])
def test_stacked_experts_give_the_weights_of_the_hubs_files(family, tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, MIXTURES[family])
    plain = traced.model(folder)
    wanted = {name: plain.weights.float_weight(name) for name in plain.spec.weights}
    expected = hugging_face.logits(folder, traced.tokens(20, VOCAB))
    held = stack_experts(folder)
    for names in (held, bare(held)):
        save_file(names, folder / "model.safetensors")
        opened = traced.model(folder)
        assert opened.spec != plain.spec
        for name, weight in wanted.items():
            assert torch.equal(opened.weights.float_weight(name), weight), name
        assert opened.weights.mapping_digest() != plain.weights.mapping_digest()
        assert opened.spec.num_parameters == plain.spec.num_parameters
    ours = traced.session(opened, 24).logits(traced.tokens(20, VOCAB))
    assert traced.difference(ours, expected) < traced.TOLERANCE


@pytest.mark.parametrize("names", [dict, bare])
def test_jetmoes_files_have_the_names_of_what_transformers_holds(
    names, tmp_path, hugging_face, traced
):
    from transformers import AutoModelForCausalLM

    folder = hugging_face.save(tmp_path, MIXTURES["jetmoe"])
    file, tokens = folder / "model.safetensors", traced.tokens(20, VOCAB)
    expected = hugging_face.logits(folder, tokens)
    held = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert held.pop(HEAD) is not None
    assert {name: tensor.shape for name, tensor in held.items()} == {
        name: tensor.shape for name, tensor in load_file(file).items()
    }
    assert held["model.layers.0.self_attention.experts.input_linear.weight"].shape == (5, 48, 64)
    save_file(names(held), file)
    ours = traced.session(traced.model(folder), 24).logits(tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h.pop("model.layers.1.mlp.gate.weight"), "lacks model.layers.1.block_sparse"),
        (lambda h: h.pop("model.layers.1.mlp.experts.down_proj"), "lacks model.layers.1.mlp.expe"),
        (
            lambda h: h.update({"model.layers.0.mlp.experts.down_proj": torch.ones(7, 64, 96)}),
            "has shape [7, 64, 96]; config.json calls for [8, 64, 96]",
        ),
        (
            lambda h: h.update({"model.layers.0.mlp.experts.gate_up_proj": torch.ones(8, 64, 192)}),
            "has shape [8, 64, 192]; config.json calls for [8, 192, 64]",
        ),
    ],
)
def test_stacked_experts_that_do_not_fit_are_named(change, words, tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, MIXTURES["mixtral"])
    held = stack_experts(folder)
    change(held)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        traced.model(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)
