"""onnxruntime-genai, whose Android, iOS and C# packages run the artifacts, gives our tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest

import edgeforge.model.model
from device_harness.onnx_session import OnnxSession
from edgeforge.export_options import ExportOptions
from edgeforge.generation.generate import generate
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from edgeforge.tokenizer import Tokenizer
from exporters.manifest import Manifest
from exporters.onnx.genai_tokenizer import write_tokenizer
from exporters.registry import find_target
from tests.oracles.genai import genai_greedy, genai_steps, session_greedy

TINY = ["tiny-llama", "tiny-llama2", "tiny-openelm", "tiny-mistral", "tiny-phi-3"]
PROMPTS = [
    "The function returns a list of",
    "Install the package with apt and then",
    'class Error(Exception):\n    """Raised when',
    "A",
    "  3.14 and 2,718 -- naïve café\n\n\t* one\n",
]


@pytest.fixture(scope="module")
def demo(cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "artifact"
    model = open_model(edgeforge.model.model.DEMO)
    export(model, [find_target("onnx")], out, ExportOptions("int4", context=256))
    return out


@pytest.fixture(scope="module", params=TINY)
def tiny(request, cache, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    model = open_model(str(synthesise(request.param, root / "checkpoint")))
    export(model, [find_target("onnx")], root / "artifact", ExportOptions("int4", context=128))
    return root / "artifact"


def test_tiny_models_give_the_same_greedy_tokens(tiny):
    draw = np.random.default_rng(5)
    made = 0
    for length in (1, 7, 40):
        prompt = [256, *draw.integers(0, 256, length - 1).tolist()]
        wanted = session_greedy(tiny, prompt, 80)
        assert genai_greedy(tiny, prompt, count=80) == wanted
        made = max(made, len(wanted))
    assert made >= 64
    assert genai_greedy(tiny, prompt[:15], prompt[15:], count=80) == wanted


def test_rows_of_unequal_length_in_a_batch_equal_each_row_alone(demo):
    tokenizer = Tokenizer(demo / "tokenizer.json", "demo")
    rows = [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert len({len(row) for row in rows}) >= 4
    logits, made = genai_steps(demo, rows, 5)
    for index, row in enumerate(rows):
        alone, (tokens,) = genai_steps(demo, [row], 5)
        assert made[index] == tokens
        for together, apart in zip(logits, alone, strict=True):
            # The kernels round activations to 8 bits, by other blocks of rows in a batch.
            assert np.abs(together[index] - apart[0]).max() < 1e-2 * np.ptp(apart)


def test_a_batch_of_every_family_equals_each_row_alone(tiny):
    draw = np.random.default_rng(3)
    rows = [[256, *draw.integers(0, 256, length).tolist()] for length in (0, 23, 9)]
    logits, _ = genai_steps(tiny, rows, 0)
    for index, row in enumerate(rows):
        wanted = OnnxSession(tiny, 128).extend(np.array(row, np.int64))
        assert np.abs(logits[0][index] - wanted).max() < 1e-2 * np.ptp(wanted)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_demo_model_gives_the_same_text(demo, prompt):
    ours = generate(demo, prompt, max_tokens=72)
    model = og.Model(str(demo))
    tokenizer = og.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")
    ids = [int(token) for token in tokenizer.encode(prompt)]
    assert len(ids) == ours.prompt_tokens
    assert genai_greedy(demo, ids, count=72) == list(ours.tokens)
    assert tokenizer.decode(np.array(ours.tokens, np.int32)) == ours.text


def test_enough_of_the_demo_model_was_compared(demo):
    lengths = [len(generate(demo, prompt, max_tokens=72).tokens) for prompt in PROMPTS]
    assert sum(length >= 64 for length in lengths) >= 3


def test_ids_of_the_held_out_text_are_the_tokenizer_librarys(demo):
    text = edgeforge.model.model.HELDOUT.read_text(encoding="utf-8")
    pieces = text.split("\n\n")[:300] + PROMPTS
    ours = Tokenizer(demo / "tokenizer.json", "demo")
    tokenizer = og.Tokenizer(og.Model(str(demo)))
    for piece in pieces:
        assert [int(t) for t in tokenizer.encode(piece)] == ours.encode(piece, special=False)


def test_ids_of_a_byte_tokenizer(tiny):
    ours = Tokenizer(tiny / "tokenizer.json", "tiny")
    tokenizer = og.Tokenizer(og.Model(str(tiny)))
    for text in PROMPTS:
        assert [int(t) for t in tokenizer.encode(text)] == ours.encode(text, special=False)
    tokenizer.update_options(add_special_tokens="true")
    for text in PROMPTS:
        assert [int(t) for t in tokenizer.encode(text)] == ours.encode(text)


def test_the_configuration_says_what_the_model_is(demo):
    manifest = Manifest.read(demo)
    config = json.loads((demo / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert config["model"]["vocab_size"] == manifest.model.vocab_size
    assert config["model"]["context_length"] == config["search"]["max_length"] == 256
    assert config["model"]["bos_token_id"] == manifest.model.bos
    assert config["model"]["eos_token_id"] == list(manifest.model.eos)
    assert decoder["filename"] == manifest.entry == "model.onnx"
    assert decoder["num_hidden_layers"] == len(manifest.model.summary["layers"])
    assert decoder["session_options"]["intra_op_num_threads"] == min(4, os.cpu_count())


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in Linux's /proc")
def test_its_threads_are_those_of_the_configuration(demo, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(demo, copy)
    path = copy / "genai_config.json"
    config = json.loads(path.read_text())
    program = (
        "import os, sys\n"
        "import onnxruntime_genai as og\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "model = og.Model(sys.argv[1])\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    counts = {}
    for threads in (1, 2, 4):
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        path.write_text(json.dumps(config))
        done = subprocess.run(
            [sys.executable, "-c", program, str(copy)], capture_output=True, text=True, check=True
        )
        counts[threads] = int(done.stdout)
    # The library has threads of its own besides; what differs is what was asked for.
    assert (counts[2] - counts[1], counts[4] - counts[1]) == (1, 3)


def sampling_of(generation: dict[str, object], build, llama_config, tmp_path) -> dict[str, object]:
    checkpoint = tmp_path / "checkpoint"
    made = build(llama_config(num_hidden_layers=1), "fp32")
    shutil.copytree(made.model.checkpoint.path, checkpoint)
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    out = tmp_path / "out"
    options = ExportOptions("fp32", context=48)
    export(open_model(str(checkpoint)), [find_target("onnx")], out, options)
    og.Model(str(out))  # an unknown or misplaced key would be refused
    return json.loads((out / "genai_config.json").read_text())


def test_sampling_and_end_tokens_come_from_the_generation_config(build, llama_config, tmp_path):
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [257, 259]}
    config = sampling_of({**generation, "pad_token_id": 258}, build, llama_config, tmp_path)
    assert config["search"]["do_sample"] is True
    assert (config["search"]["temperature"], config["search"]["top_p"]) == (0.6, 0.9)
    assert config["model"]["eos_token_id"] == [257, 259]
    assert config["model"]["pad_token_id"] == 258


def test_without_a_generation_config_it_is_greedy(build, llama_config, tmp_path):
    config = sampling_of({}, build, llama_config, tmp_path)
    assert config["search"]["do_sample"] is False and "temperature" not in config["search"]
    assert config["model"]["pad_token_id"] == 257


def llama2_like(folder: Path) -> None:
    """A tokenizer.json as Llama 2 and OpenELM have: byte fallback, no regex."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ["▁", *letters, "▁t", "he", "▁the", "in", "ing", "▁a"]:
        vocab[token] = len(vocab)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("in", "g"), ("▁", "a")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_ids_of_a_sentencepiece_tokenizer(tiny, tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    llama2_like(source)
    shutil.copytree(tiny, copy)
    names = ("tokenizer.json", "tokenizer_config.json")
    write_tokenizer({name: source / name for name in names}, copy)
    ours = Tokenizer(copy / "tokenizer.json", "copy")
    tokenizer = og.Tokenizer(og.Model(str(copy)))
    texts = ["the thing", "a hat in the bath", "the é and 日本", "in  the   ring", "the\nhat\n"]
    for text in texts:
        assert [int(t) for t in tokenizer.encode(text)] == ours.encode(text, special=False)
    tokenizer.update_options(add_special_tokens="true")
    for text in texts:
        assert [int(t) for t in tokenizer.encode(text)] == ours.encode(text)


def test_a_tokenizer_without_its_configuration_gets_one(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    (copy / "tokenizer_config.json").unlink()
    write_tokenizer({"tokenizer.json": tiny / "tokenizer.json"}, copy)
    tokenizer = og.Tokenizer(og.Model(str(copy)))
    assert [int(t) for t in tokenizer.encode("abc")] == [97, 98, 99]


def test_no_tokenizer_leaves_no_tokenizer_files(tmp_path):
    write_tokenizer({}, tmp_path)
    assert list(tmp_path.iterdir()) == []
