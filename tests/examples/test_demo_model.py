"""The small trained model that ships: its folder is whole and its weights are truly trained."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "edgeforge" / "demo"
MEBI = 2**20
FILES = {
    "README.md",
    "calibration.txt",
    "config.json",
    "conversations.json",
    "generation_config.json",
    "heldout.txt",
    "heldout_licences.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def script(name: str) -> ModuleType:
    """Load a script of examples/demo_model under a name of its own."""
    path = ROOT / "examples" / "demo_model" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"demo_model_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    return script("model")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def heldout(tokenizer: Tokenizer) -> torch.Tensor:
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)


def card_number(label: str) -> float:
    """A number of the model card's table, by the beginning of its row."""
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {re.escape(label)}[^|]*\| \**([\d.,]+)", card, re.MULTILINE)
    assert found, f"the card has no row {label!r}"
    return float(found[1].replace(",", ""))


def config() -> dict:
    return json.loads((DEMO / "config.json").read_text(encoding="utf-8"))


def header() -> dict:
    """The safetensors header, read by hand from the format's description."""
    with (DEMO / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return {k: v for k, v in json.loads(file.read(length)).items() if k != "__metadata__"}


def test_folder_is_complete_and_small():
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert set(sizes) == FILES
    assert sum(sizes.values()) <= 9.5 * MEBI
    assert max(size for name, size in sizes.items() if name != "model.safetensors") <= 5 * MEBI


def test_config_follows_openelm_scaling():
    fields = config()
    assert fields["model_type"] == "openelm"
    assert fields["architectures"] == ["OpenELMForCausalLM"]
    assert fields["normalize_qk_projections"] and fields["share_input_output_layers"]
    assert fields["ffn_with_glu"] and fields["normalization_layer_name"] == "rms_norm"
    layers = fields["num_transformer_layers"]
    heads, kv = fields["num_query_heads"], fields["num_kv_heads"]
    assert len(heads) == len(kv) == len(fields["ffn_multipliers"]) == layers
    assert [h / fields["num_gqa_groups"] for h in heads] == kv
    assert len(set(heads)) > 1 and len(set(fields["ffn_multipliers"])) == layers
    low, high = fields["qkv_multipliers"]
    unit = fields["head_dim"] * fields["num_gqa_groups"]
    for i, count in enumerate(heads):
        exact = fields["model_dim"] * (low + (high - low) * i / (layers - 1))
        assert (count * fields["head_dim"]) % unit == 0
        assert exact * 0.9 - 2 <= count * fields["head_dim"] <= exact + unit


def test_tensors_are_the_configs_and_nothing_else():
    fields, tensors = config(), header()
    width, head = fields["model_dim"], fields["head_dim"]
    expected = {
        "transformer.token_embeddings.weight": [fields["vocab_size"], width],
        "transformer.norm.weight": [width],
    }
    widths = []
    for i, (q, kv) in enumerate(
        zip(fields["num_query_heads"], fields["num_kv_heads"], strict=True)
    ):
        name = f"transformer.layers.{i}."
        ffn = tensors[name + "ffn.proj_2.weight"]["shape"][1]
        widths.append(ffn)
        expected |= {
            name + "attn.qkv_proj.weight": [(q + 2 * kv) * head, width],
            name + "attn.out_proj.weight": [width, q * head],
            name + "attn.q_norm.weight": [head],
            name + "attn.k_norm.weight": [head],
            name + "attn_norm.weight": [width],
            name + "ffn_norm.weight": [width],
            name + "ffn.proj_1.weight": [2 * ffn, width],
            name + "ffn.proj_2.weight": [width, ffn],
        }
    assert {name: entry["shape"] for name, entry in tensors.items()} == expected
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    count = sum(math.prod(entry["shape"]) for entry in tensors.values())
    assert 2e6 <= count <= 4e6
    columns = [entry["shape"][1] for entry in tensors.values() if len(entry["shape"]) == 2]
    assert all(c % 128 == 0 for c in columns), "groups of 32, 64 and 128 divide every matrix"
    for multiplier, ffn in zip(fields["ffn_multipliers"], widths, strict=True):
        assert ffn % fields["ffn_dim_divisor"] == 0
        assert abs(ffn - multiplier * width) <= fields["ffn_dim_divisor"]


def test_special_tokens(tokenizer: Tokenizer):
    fields = config()
    assert tokenizer.get_vocab_size() == fields["vocab_size"]
    assert [tokenizer.id_to_token(i) for i in (0, 1, 2)] == ["<pad>", "<s>", "</s>"]
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)
    assert tokenizer.encode("A line").ids[0] == 1
    assert 1 not in tokenizer.encode("A line", add_special_tokens=False).ids


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
def test_tokenizer_gives_back_any_text(text: str, tokenizer: Tokenizer):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in ("<pad>", "<s>", "</s>")):
        assert tokenizer.decode(ids) == text


def test_transformers_reads_the_same_tokens(tokenizer: Tokenizer):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    theirs = transformers.AutoTokenizer.from_pretrained(DEMO)
    text = "naïve  café\n\n- 日本語, don't: x[0x1F] = 12345\t🙂"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text


def test_onnxruntime_genai_reads_the_same_tokens(tokenizer: Tokenizer, tmp_path: Path):
    """Its tokenizer needs a model beside it, so a graph of one Identity keeps it company."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is the oracle here")
    onnx = pytest.importorskip("onnx")
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["input_ids"], ["logits"])],
        "company",
        [tensor("input_ids", onnx.TensorProto.INT64, ["batch", "length"])],
        [tensor("logits", onnx.TensorProto.INT64, ["batch", "length"])],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "model.onnx"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    decoder = {
        "filename": "model.onnx",
        "head_size": 32,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
    }
    fields = {"type": "llama", "context_length": 1024, "vocab_size": 3072, "decoder": decoder}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = json.dumps({"model": fields, "search": {"max_length": 1024}})
    (tmp_path / "genai_config.json").write_text(text, encoding="utf-8")
    theirs = genai.Tokenizer(genai.Model(str(tmp_path)))
    paragraphs = (DEMO / "heldout.txt").read_text(encoding="utf-8").split("\n\n")[:400]
    for paragraph in [*paragraphs, "naïve  café\n\n- 日本語, don't: x[0x1F]\t🙂 "]:
        ids = tokenizer.encode(paragraph, add_special_tokens=False).ids
        assert theirs.encode(paragraph).tolist() == ids
        assert theirs.decode(ids) == paragraph
    theirs.update_options(add_special_tokens="true")
    assert theirs.encode("A line").tolist() == tokenizer.encode("A line").ids


def test_heldout_text_is_long_enough(heldout: torch.Tensor):
    assert len(heldout) >= 110_000
    assert card_number("held-out text") == len(heldout)


def test_model_is_trained(oracle: ModuleType, heldout: torch.Tensor):
    """Two pieces of the text, together 4,092 tokens, against the card and a unigram model.

    The unigram model counts the held-out text itself, which is better than any it could have had.
    """
    model = oracle.load(DEMO)
    piece = torch.cat([heldout[10_000:12_046], heldout[90_000:92_046]])
    context = model.shape.max_context_length
    total, count = oracle.negative_log_likelihood(model, piece, context)
    perplexity = math.exp(total / count)
    counts = torch.bincount(heldout, minlength=model.shape.vocab_size)
    assert perplexity < card_number("perplexity per token") * 1.5
    assert perplexity * 5 < oracle.unigram_perplexity(counts, piece)
    assert card_number("ratio") >= 5


def test_greedy_text_reads_like_the_card(oracle: ModuleType, tokenizer: Tokenizer):
    model = oracle.load(DEMO)
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    prompt, shown = re.search(r"> \*\*(.+?)\*\*(.{20})", card).groups()
    text = tokenizer.decode(oracle.greedy(model, tokenizer.encode(prompt).ids, 20))
    assert text.startswith(shown)


def test_shape_rules_match_the_published_sizes(oracle: ModuleType):
    """OpenELM-270M's published heads and widths follow from its multipliers."""
    shape = oracle.Shape(
        model_dim=1280, head_dim=64, num_layers=16, vocab_size=32000, ffn_dim_divisor=256
    )
    assert shape.query_heads == [12] * 5 + [16] * 7 + [20] * 4
    assert shape.ffn_dims == [
        *(768, 1024, 1280, 1536, 1792, 2048, 2560, 2816),
        *(3072, 3328, 3584, 3840, 4352, 4608, 4864, 5120),
    ]


def test_no_heldout_paragraph_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A corpus of made-up pages: whole pages are held out, and shared paragraphs leave training."""
    corpus = script("corpus")
    pages = tmp_path / "cache" / "toy" / "pages"
    pages.mkdir(parents=True)
    for i in range(20):
        own = " ".join(f"Sentence number {j} of page {i} says something new." for j in range(40))
        shared = "<p>Every page has this.</p><pre>code()</pre>"
        page = f"<title>x</title><p>{own}</p>{shared}<p>{own} End.</p>"
        (pages / f"{i}.html").write_text(page, encoding="utf-8")
    record = tmp_path / "cache" / "toy" / "usr/share/doc/toy/copyright"
    record.parent.mkdir(parents=True)
    record.write_text(
        "Format: 1.0\n\nFiles: *\nCopyright: A\nLicense: MIT\n\nLicense: MIT\n Do.\n .\n More.\n"
    )
    source = corpus.Source("toy", "Toy", "MIT", "pages/*.html", "none", 0.2)
    monkeypatch.setattr(corpus, "CALIBRATION_SHARE", 0.1)
    monkeypatch.setattr(corpus, "SOURCES", (source,))
    monkeypatch.setattr(corpus, "package_version", lambda package, into: "1")
    corpus.build(tmp_path / "out", tmp_path / "cache")
    heldout = (tmp_path / "out" / "heldout.txt").read_text(encoding="utf-8")
    rows = [json.loads(r) for r in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    held = set((tmp_path / "out" / "heldout_documents.txt").read_text().split())
    assert 4 <= len(held) <= 5 and len(rows) == 20 - len(held)
    assert held.isdisjoint(row["name"] for row in rows)
    training = "\n".join(row["text"] for row in rows)
    calibration = (tmp_path / "out" / "calibration.txt").read_text(encoding="utf-8")
    pages = (tmp_path / "out" / "calibration_documents.txt").read_text().split()
    assert 1 <= len(pages) <= 3 and {row["name"] for row in rows}.issuperset(pages)
    assert all(page.strip() in training for page in calibration.split("\n\n\n"))
    assert "Every page has this." in heldout and "Every page has this." not in training
    assert "code()" not in heldout + training
    for paragraph in heldout.split("\n\n"):
        assert paragraph.strip() not in training
    assert "Do.\n\nMore." in (tmp_path / "out" / "heldout_licences.txt").read_text()


def test_the_second_model_is_transformers_llama(monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    monkeypatch.syspath_prepend(ROOT / "examples" / "demo_model")
    llama, model = script("llama"), script("model")
    shape = llama.LlamaShape(64, 96, 2, 4, 2, 160, 32)
    made = llama.Llama(shape)
    generator = torch.Generator().manual_seed(1)
    made.initialize(generator)
    with torch.no_grad():
        for parameter in made.parameters():  # no weight may be zero, or it would prove nothing
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.bfloat16())
        tokens = torch.randint(0, shape.vocab_size, (2, 20), generator=generator)
        model.save(made, tmp_path)
        there = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(made(tokens), there(tokens).logits, atol=2e-5, rtol=1e-4)
