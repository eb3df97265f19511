"""SentencePiece models become tokenizer.json with the same tokens, or are refused with how."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from edgeforge.checkpoint import sentencepiece_model
from edgeforge.checkpoint.sentencepiece_conversion import Refused, converted
from edgeforge.checkpoint.sentencepiece_model import converted_tokenizer
from edgeforge.errors import CheckpointError
from edgeforge.model.model import CALIBRATION_TEXT, HELDOUT, open_model
from edgeforge.synth.synthesise import synthesise
from edgeforge.tokenizer import Tokenizer
from exporters.manifest import Manifest

LINES = HELDOUT.read_text(encoding="utf-8").splitlines()[:400]
TEXTS = [
    *(line for line in LINES if line.strip()),
    "Größe, naïve café, мир, 漢字 \U0001f642\u200d",
    "two  spaces,   three;\ttabs\nlines\n\n  indented",
    "ﬁne cafe\u0301",
]
LIKE_LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True}
KEPT = {**LIKE_LLAMA, "remove_extra_whitespaces": False}
KINDS = {
    "llama": {"model_type": "bpe", **KEPT},
    "gemma": {"model_type": "bpe", **KEPT, "add_dummy_prefix": False},
    "bpe of defaults": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram", **KEPT},
    "unigram of defaults": {"model_type": "unigram"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Models trained by SentencePiece, each in a folder of its own."""
    root = tmp_path_factory.mktemp("models")
    lines = CALIBRATION_TEXT.read_text(encoding="utf-8").splitlines()[:300]
    made = {}
    for kind, options in KINDS.items():
        stream = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=stream,
            vocab_size=500,
            minloglevel=2,
            **options,
        )
        made[kind] = root / kind
        made[kind].mkdir()
        (made[kind] / "tokenizer.model").write_bytes(stream.getvalue())
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path_factory.getbasetemp() / "spm-cache"))


def files_of(folder: Path, **config: object) -> dict[str, Path]:
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_sentencepieces(models, kind):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(models[kind] / "tokenizer.model"))
    made = converted(str(models[kind] / "tokenizer.model"), {}, {})
    file = models[kind] / "made.json"
    made.save(str(file))
    ours = Tokenizer(file, kind)
    for text in (*TEXTS, "  begins with spaces"):
        wanted = theirs.encode(text)
        assert ours.encode(text, special=False) == wanted
        assert ours.encode(text) == [theirs.bos_id(), *wanted]
        if theirs.unk_id() not in wanted:
            assert ours.decode(wanted) == theirs.decode(wanted)


def test_a_model_that_is_not_legacy_puts_a_space_only_at_the_beginning(models, tmp_path):
    folder = shutil.copytree(models["llama"], tmp_path / "copy")
    files = files_of(
        folder, legacy=False, add_bos_token=False, add_eos_token=True, added_tokens_decoder={}
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = Tokenizer(converted_tokenizer(files), "here")
    for text in TEXTS:
        assert ours.encode(text) == [*theirs.encode(text), theirs.eos_id()]
    assert ours.encode("<s>list", special=False)[1] != theirs.encode("list")[0]


def test_added_tokens_and_their_flags_are_kept(models, tmp_path):
    model = models["llama"] / "tokenizer.model"
    row = {"content": "<|end|>", "special": True, "rstrip": True, "normalized": False}
    made = converted(str(model), {}, {"500": row})
    assert made.encode("<|end|>  \n", add_special_tokens=False).ids == [500]
    # One whose id is not the next cannot be added.
    with pytest.raises(Refused, match=r"the added token '<x>' has the id 900, where 500 is next"):
        converted(str(model), {}, {"900": {"content": "<x>"}})
    older = shutil.copytree(models["llama"], tmp_path / "older")
    (older / "added_tokens.json").write_text(json.dumps({"<|end|>": 500}))
    assert Tokenizer(converted_tokenizer(files_of(older)), "here").encode("<|end|>")[-1] == 500


def test_what_was_made_is_kept_and_made_anew_when_damaged(models, monkeypatch):
    files = files_of(models["llama"])
    made = converted_tokenizer(files)
    content = made.read_bytes()
    made.write_bytes(content[:-9])
    assert converted_tokenizer(files) == made and made.read_bytes() == content
    monkeypatch.setattr(sentencepiece_model, "_convert", None)
    assert converted_tokenizer(files) == made


def test_what_is_no_sentencepiece_model_is_refused_with_how(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # as tiktoken's
    words = r"cannot become tokenizer\.json: it is no SentencePiece model; .* with --tokenizer"
    with pytest.raises(CheckpointError, match=words):
        converted_tokenizer(files_of(tmp_path))


def test_a_checkpoint_with_a_model_alone_is_exported_or_refused(
    models, tmp_path, monkeypatch, edgeforge
):
    checkpoint = synthesise("tiny-llama", tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    shutil.copy(models["llama"] / "tokenizer.model", checkpoint)
    given = ("--recipe", "int8", "--context", "32", "-q")
    shown = edgeforge("export", checkpoint, "--out", tmp_path / "out", *given)
    assert shown.code == 0, shown.err
    out = tmp_path / "out"
    assert any("made of the checkpoint's tokenizer.model" in n for n in Manifest.read(out).notes)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    shown = edgeforge("run", out, "-p", "list of", "-n", "1", "--json")
    assert json.loads(shown.out)["prompt_tokens"] == 1 + len(theirs.encode("list of"))
    verified = edgeforge("verify", out, "--tokens", "64", "--no-timed", "-q")
    assert "tokenizer" not in verified.out + verified.err, verified.out
    monkeypatch.setattr(sentencepiece_model, "find_spec", lambda name: None)
    shown = edgeforge("export", checkpoint, "--out", tmp_path / "other", *given)
    assert shown.code == 3
    assert 'pip install "edgeforge[transformers]"' in shown.err and "--tokenizer" in shown.err
    assert open_model(str(checkpoint)).spec.vocab_size  # what needs no text goes on
