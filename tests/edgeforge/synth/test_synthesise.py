"""Synthesised folders, against MODELS' parameter counts, safetensors and transformers."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from edgeforge.errors import DiskFullError, UsageError
from edgeforge.families.registry import read_spec
from edgeforge.families.spec import ModelSpec, Piece
from edgeforge.model.stored_names import named_as_stored
from edgeforge.synth import synthesise as synth
from edgeforge.synth.synthesise import PRESETS, synthesise
from tests.oracles import rwkv_numpy

TINY = [name for name in PRESETS if name.startswith("tiny-")]
UNKNOWN_TO_TRANSFORMERS = ("tiny-openelm", "tiny-minicpm", "tiny-rwkv5", "tiny-rwkv6")
KNOWN_TO_TRANSFORMERS = [name for name in TINY if name not in UNKNOWN_TO_TRANSFORMERS]
# A part of a whole that has images too; a rope_parameters in the released file.
ONE_STYLE = ("tiny-gemma3", "tiny-ministral3", "tiny-mistral3", "tiny-qwen3.5")
ONE_STYLE += ("tiny-qwen3.5-text",)


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def pieces(spec: ModelSpec) -> Iterator[Piece]:
    for weight in spec.weights.values():
        yield from weight.pieces


def rows_of(tensors: dict[str, torch.Tensor], piece: Piece) -> torch.Tensor:
    tensor = tensors[piece.tensor]
    rows = tensor.flatten(0, 1) if piece.matrices else tensor
    return rows[piece.first : piece.first + piece.shape[0]]


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("openelm-270m", 271_527_168),
        ("openelm-450m", 457_179_136),
        ("openelm-1.1b", 1_079_891_456),
        ("openelm-3b", 3_036_647_424),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
        ("phi-3-mini-4k", 3_821_079_552),
        ("phi-3-mini-128k", 3_821_079_552),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen3-0.6b", 596_049_920),
        ("gemma-3-270m", 268_098_176),
        ("gemma-3-1b", 999_885_952),
        ("smollm3-3b", 3_075_098_624),
        ("granite-3.3-2b", 2_533_539_840),
        ("olmo2-1b", 1_484_916_736),
        ("lfm2-350m", 354_483_968),
        ("lfm2-1.2b", 1_170_340_608),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen1.5-moe-a2.7b", 14_315_784_192),
        ("olmoe-1b-7b", 6_919_161_856),
        ("granite-3.1-1b-a400m", 1_334_628_352),
        ("phi-3.5-moe", 41_873_153_344),
        ("jetmoe-8b", 8_522_237_952),
        ("qwen3.5-0.8b", 752_393_024),
        ("granite-4.0-h-350m", 340_332_224),
        ("granite-4.0-h-1b", 1_461_538_368),
        ("granite-4.0-h-micro", 3_191_396_096),
        ("granite-4.0-h-tiny", 6_939_037_248),
        ("rwkv5-1.5b", 1_577_754_624),
        ("rwkv6-1.6b", 1_599_873_024),
    ],
)
def test_parameter_counts_are_the_released_models(preset, parameters):
    assert PRESETS[preset].parameters == parameters


def test_openelm_layers_scale_as_released():
    config = PRESETS["openelm-270m"].config
    assert config["num_query_heads"] == [12] * 5 + [16] * 7 + [20] * 4
    shapes = dict(PRESETS["openelm-270m"].tensors())
    widths = [shapes[f"transformer.layers.{i}.ffn.proj_2.weight"][1] for i in range(16)]
    assert widths[:5] == [768, 1024, 1280, 1536, 1792]
    assert widths[-3:] == [4608, 4864, 5120]
    heads = PRESETS["openelm-3b"].config["num_query_heads"]
    assert heads == [12] * 4 + [16] * 14 + [20] * 12 + [24] * 6


@pytest.mark.parametrize(
    "preset", [p for p in PRESETS if not p.startswith(("tiny", "openelm", "rwkv"))]
)
def test_names_and_shapes_are_those_of_transformers(preset, tmp_path):
    config = PRESETS[preset].config_json("bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    spec = read_spec(config)
    if spec.tied:
        del expected["lm_head.weight"]
    shapes = dict(PRESETS[preset].tensors())
    if spec.mixture:  # in memory, transformers stacks the experts of a layer
        assert shapes == {p.tensor: p.tensor_shape for p in pieces(spec)}
        shapes = {p.tensor: p.tensor_shape for p in pieces(named_as_stored(spec, expected))}
    assert shapes == expected


@pytest.mark.parametrize("preset", [p for p in KNOWN_TO_TRANSFORMERS if p not in ONE_STYLE])
@pytest.mark.parametrize("style", ["hub", "rope_parameters"])
def test_transformers_loads_every_key(preset, style, tmp_path):
    folder = synthesise(preset, tmp_path / preset, config_style=style)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    theirs, written = model.state_dict(), read(folder)
    spec = read_spec(json.loads((folder / "config.json").read_text()))
    held = named_as_stored(spec, theirs)  # where a mixture's experts are stacked
    for name, weight in spec.weights.items():
        ours = torch.cat([rows_of(written, piece) for piece in weight.pieces])
        assert torch.equal(ours, torch.cat([rows_of(theirs, p) for p in held.weights[name].pieces]))
    assert {piece.tensor for piece in pieces(spec)} == set(written)
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model(torch.arange(100)[None]).logits).all()


@pytest.mark.parametrize("preset", [p for p in KNOWN_TO_TRANSFORMERS if p not in ONE_STYLE])
def test_both_config_styles_say_the_same_rope(preset, tmp_path):
    ropes = []
    for style in ("hub", "rope_parameters"):
        folder = synthesise(preset, tmp_path / style, config_style=style)
        raw = json.loads((folder / "config.json").read_text())
        assert ("rope_parameters" in raw) == (style == "rope_parameters")
        assert ("rope_theta" in raw) == (style == "hub")
        rope = dict(AutoConfig.from_pretrained(folder).rope_parameters)
        rope.pop("type", None)
        for section in rope.values():
            if isinstance(section, dict):
                section.pop("type", None)
        ropes.append(rope)
    assert ropes[0] == ropes[1]


def test_longrope_has_a_factor_for_every_frequency():
    for preset in ("phi-3-mini-128k", "tiny-phi-3-128k"):
        config = PRESETS[preset].config
        pairs = config["hidden_size"] // config["num_attention_heads"] // 2
        assert len(config["rope_scaling"]["long_factor"]) == pairs
        assert len(config["rope_scaling"]["short_factor"]) == pairs
    assert config["original_max_position_embeddings"] < config["max_position_embeddings"]


@pytest.mark.parametrize("preset", TINY)
def test_tiny_columns_are_whole_groups_of_32(preset):
    for name, shape in PRESETS[preset].tensors():
        assert len(shape) != 2 or shape[1] % 32 == 0, name


@pytest.mark.parametrize("family", ["rwkv5", "rwkv6"])
def test_names_and_shapes_of_rwkv_are_those_of_the_releases(family):
    preset = next(p for p in PRESETS if p.startswith(f"{family}-"))
    config = {**PRESETS[f"tiny-{family}"].config, "head_size": 32}
    theirs = {name: value.shape for name, value in rwkv_numpy.random_tensors(config).items()}
    assert dict(PRESETS[f"tiny-{family}"].tensors()) == theirs
    released = dict(PRESETS[preset].tensors())
    assert released["rwkv.blocks.23.feed_forward.key.weight"] == (7168, 2048)
    assert released["rwkv.blocks.23.attention.time_faaaa"] == (32, 64)


def test_the_text_part_of_a_model_with_images_is_what_transformers_reads(tmp_path):
    folder = synthesise("tiny-gemma3", tmp_path / "m")
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config.text_config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    del theirs["lm_head.weight"]
    ours = {name: tuple(tensor.shape) for name, tensor in read(folder).items()}
    assert ours == {f"language_model.{name}": shape for name, shape in theirs.items()}


def test_biases_lie_around_zero_and_norms_around_what_makes_them_one(tmp_path):
    centres = {
        ("tiny-qwen2", "model.layers.0.self_attn.q_proj.bias"): 0,
        ("tiny-phi", "model.final_layernorm.weight"): 1,
        ("tiny-phi", "model.final_layernorm.bias"): 0,
        ("tiny-gemma2", "model.norm.weight"): 0,
        ("tiny-lfm2", "model.embedding_norm.weight"): 1,
    }
    for (preset, name), centre in centres.items():
        tensors = read(synthesise(preset, tmp_path / preset, dtype="float32", force=True))
        assert tensors[name].mean() == pytest.approx(centre, abs=0.05), name
        assert tensors[name].std() == pytest.approx(0.1, abs=0.03), name


def test_same_seed_same_bytes_whatever_shards_and_threads(tmp_path, monkeypatch):
    first = read(synthesise("tiny-llama", tmp_path / "a", seed=7))
    monkeypatch.setattr(synth, "THREADS", 1)
    monkeypatch.setattr(synth, "CHUNK_WEIGHTS", 1000)
    second = read(synthesise("tiny-llama", tmp_path / "b", seed=7, shards=3))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = read(synthesise("tiny-llama", tmp_path / "c", seed=8))
    assert not any(torch.equal(first[name], other[name]) for name in first)
    up, gate = (first[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("up", "gate"))
    assert not torch.equal(up, gate)


def test_values_spread_like_a_released_models(tmp_path):
    tensors = read(synthesise("tiny-mistral", tmp_path / "m", dtype="float32"))
    embedding = tensors["model.embed_tokens.weight"].numpy().astype(np.float64)
    deviations = embedding.std(axis=0) * np.sqrt(128)
    assert np.sum(deviations > 3) == 1
    assert np.sum(np.abs(deviations - 1) < 0.15) == 127
    usual = embedding[:, deviations < 3].ravel() * np.sqrt(128)
    assert abs(usual.mean()) < 0.01
    assert np.mean(np.abs(usual) < 1) == pytest.approx(0.6827, abs=0.01)
    assert np.mean(usual**4) == pytest.approx(3, abs=0.1)
    neighbours = np.corrcoef(usual[:-1], usual[1:])[0, 1]
    assert abs(neighbours) < 0.02
    norm = tensors["model.norm.weight"]
    assert norm.mean() == pytest.approx(1, abs=0.05)
    assert norm.std() == pytest.approx(0.1, abs=0.03)


def test_stored_types_round_the_same_values(tmp_path):
    exact = read(synthesise("tiny-openelm", tmp_path / "f32", dtype="float32"))
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        folder = synthesise("tiny-openelm", tmp_path / name, dtype=name)
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == name
        rounded = read(folder)
        assert rounded.keys() == exact.keys()
        for key, value in rounded.items():
            assert value.dtype == dtype
            assert torch.equal(value, exact[key].to(dtype))


def test_shards_and_index_as_hugging_face_writes_them(tmp_path):
    folder = synthesise("tiny-phi-3", tmp_path / "p", shards=4)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shapes = dict(PRESETS["tiny-phi-3"].tensors())
    assert index["metadata"]["total_size"] == 2 * PRESETS["tiny-phi-3"].parameters
    assert index["weight_map"].keys() == shapes.keys()
    for name in files:
        with safe_open(folder / name, "pt") as file:
            assert set(file.keys()) == {k for k, v in index["weight_map"].items() if v == name}
            assert file.metadata() == {"format": "pt"}
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    alone = synthesise("tiny-phi-3", tmp_path / "one")
    assert not (alone / "model.safetensors.index.json").exists()


def test_every_tensor_can_have_its_own_shard(tmp_path):
    count = len(PRESETS["tiny-llama"].tensors())
    folder = synthesise("tiny-llama", tmp_path / "many", shards=count)
    assert len(list(folder.glob("*.safetensors"))) == count


def test_shards_stay_within_their_bound(monkeypatch, tmp_path):
    monkeypatch.setattr(synth, "SHARD_BYTES", 200_000)
    folder = synthesise("tiny-llama", tmp_path / "cut")
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in folder.glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) <= 200_000


@pytest.mark.parametrize("preset", TINY)
def test_tiny_tokenizer_gives_bytes_and_decodes_every_id(preset, tmp_path):
    folder = synthesise(preset, tmp_path / "t")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    text = "Zürich, 3 <b>\n\x00"
    vocab = config.get("text_config", config)["vocab_size"]
    assert tokenizer(text)["input_ids"] == [config["bos_token_id"], *text.encode()]
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert len(tokenizer) == vocab
    assert tokenizer.decode([511, 104, 257], skip_special_tokens=True) == "h"


def test_progress_counts_every_byte(tmp_path):
    calls = []
    synthesise("tiny-llama", tmp_path / "p", shards=2, progress=lambda *now: calls.append(now))
    total = 2 * PRESETS["tiny-llama"].parameters
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"preset": "lama-3.2-1b"}, "did you mean llama-3.2-1b? known are openelm-270m, "),
        ({"preset": "tiny-llama", "dtype": "int8"}, "'int8' is unknown: use one of bfloat16"),
        ({"preset": "tiny-llama", "shards": 0}, "give a number from 1 to 20"),
        ({"preset": "tiny-llama", "shards": 21}, "give a number from 1 to 20"),
        ({"preset": "tiny-llama", "config_style": "old"}, "use one of hub, rope_parameters"),
        ({"preset": "tiny-openelm", "config_style": "rope_parameters"}, "use config style hub"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(arguments, sentence, tmp_path):
    with pytest.raises(UsageError) as caught:
        synthesise(out=tmp_path / "bad", **arguments)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_finished_folder_is_kept_unless_forced(tmp_path):
    out = tmp_path / "ein Ordner ü"
    synthesise("tiny-llama", out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="--force"):
        synthesise("tiny-llama", out, seed=1)
    assert (out / "model.safetensors").read_bytes() == before
    synthesise("tiny-llama", out, seed=1, force=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("failure", "seen"),
    [
        (OSError(28, "No space left on device"), DiskFullError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_write_that_fails_leaves_nothing(failure, seen, tmp_path):
    def progress(done: int, total: int) -> None:
        raise failure

    with pytest.raises(seen):
        synthesise("tiny-llama", tmp_path / "x", progress=progress)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_stays_small_and_torch_is_not_imported(tmp_path):
    script = (
        "import sys; from pathlib import Path; from edgeforge.synth.synthesise import synthesise;"
        f"synthesise('openelm-270m', Path({str(tmp_path / 'big')!r}));"
        "assert 'torch' not in sys.modules;"
        "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[1]) * 1024 < 100e6
    assert (tmp_path / "big" / "model.safetensors").stat().st_size > 2 * 271_527_168
