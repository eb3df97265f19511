"""Damaged and hostile tokenizer files: one sentence and exit 3, before any work."""

import json
import shutil
import time

import pytest

from edgeforge import api
from edgeforge.errors import CheckpointError
from edgeforge.tokenizer import Tokenizer
from exporters.registry import TARGETS


def _double(letter: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": letter}, "content": letter * 2}


def _many(key: str, step: dict[str, object], count: int) -> dict[str, object]:
    return {"type": "Sequence", key: [step] * count}


def _nested(depth: int) -> bytes:
    return b'{"model": {}, "decoder": ' + b"[" * depth + b"]" * depth + b"}"


# By name: the whole file, or changes to a sound one, and words of the message.
DAMAGES: dict[str, tuple[object, str]] = {
    "web page": (b"\n<!DOCTYPE html><html>Sign in</html>", "it is a web page"),
    "empty": (b"", "it is empty"),
    "spaces": (b" \n", "it is empty"),
    "list": (b"[]", "it is a JSON list"),
    "number": (b"17", "it is a JSON int"),
    "object": (b"{}", "it has no model"),
    "bytes": (b"\xff\xfe{}", "it is not valid JSON"),
    "nested": (_nested(100_000), "nested too deep"),
    "nested a little": (_nested(200), "the tokenizers library does not open it"),
    "padding": ({"padding": {"strategy": {"Fixed": 2**40}}}, "it pads every text to 1099511627776"),
    "padding in steps": (
        {"padding": {"strategy": "BatchLongest", "pad_to_multiple_of": 2**40}},
        "it pads every text",
    ),
    "bomb": (
        {"normalizer": _many("normalizers", _double("a"), 40)},
        "its normalizer can make a text more than 4096 times longer",
    ),
    "bomb of one letter": (
        {"normalizer": _many("normalizers", _double("\u0416"), 40)},
        "its normalizer can make",
    ),
    "bomb in front": (
        {"normalizer": _many("normalizers", {"type": "Prepend", "prepend": "x" * 999}, 8)},
        "its normalizer can make",
    ),
    "bomb behind": (
        {"decoder": _many("decoders", _double(" "), 40)},
        "its decoder can make",
    ),
    "no regex": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}},
        "the tokenizers library does not open it",
    ),
    "panic in the normalizer": (
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
        "does not open it (index out of bounds",
    ),
    "panic in the pre-tokenizer": (
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        "does not open it (chunk size must be non-zero)",
    ),
    "memory": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA/////w=="}},
        "opening it takes more than",
    ),
    "unknown model": ({"model": {"type": "XYZ", "vocab": {}}}, "the tokenizers library"),
    "other types": ({"added_tokens": {"a": 1}}, "the tokenizers library does not open it"),
}


def spoil(folder, damage):
    file = folder / "tokenizer.json"
    if isinstance(damage, bytes):
        file.write_bytes(damage)
        return
    tokenizer = json.loads(file.read_text())
    for key, value in damage.items():
        if key == "padding":
            rest = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
            value = {"pad_to_multiple_of": None, **rest, **value}
        tokenizer[key] = value
    file.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("name", DAMAGES)
def test_export_refuses_it_before_any_work(export, checkpoint, monkeypatch, name):
    damage, words = DAMAGES[name]
    spoil(checkpoint, damage)
    monkeypatch.setattr("edgeforge.pipeline.choose_plan", None)  # no work may begin
    started = time.perf_counter()
    options = ("--target", ",".join(TARGETS))
    told = export(checkpoint, 3, "tokenizer.json is not a usable", words, options=options)
    assert "download it again" in told
    assert time.perf_counter() - started < 20


def test_a_byte_order_mark_is_named(export, checkpoint):
    file = checkpoint / "tokenizer.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    export(checkpoint, 3, "it begins with a byte order mark")


def test_a_file_that_was_cut_is_refused(export, checkpoint):
    file = checkpoint / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-100])
    export(checkpoint, 3, "it is not valid JSON")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["empty", "list", "bomb", "padding"])
def test_run_refuses_it(refuses, sound, tmp_path, monkeypatch, warm, target, name):
    out = tmp_path / "artifact"
    api.export(sound, out, targets=[target])
    damage, words = DAMAGES[name]
    spoil(out, damage)
    refuses(3, "not a usable tokenizer", words, command=("run", out, "-p", "a"))


def test_a_text_in_the_calibration_is_refused_with_it(export, checkpoint, tmp_path):
    spoil(checkpoint, DAMAGES["bomb"][0])
    text = tmp_path / "text.txt"
    text.write_text("aaaa " * 1000)
    export(
        checkpoint, 3, "its normalizer", options=("--recipe", "int4-gptq", "--calibration", text)
    )


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"<html>", b"[" * 9999])
def test_files_beside_it_are_refused_too(export, checkpoint, name, content):
    (checkpoint / name).write_bytes(content)
    export(checkpoint, 3, name)


def test_a_tokenizer_named_by_an_option_is_tried_as_well(export, checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    spoil(other, DAMAGES["bomb"][0])
    export(checkpoint, 3, "its normalizer", options=("--tokenizer", other))


def test_padding_and_cutting_of_a_sound_file_do_not_touch_a_prompt(checkpoint):
    spoil(checkpoint, {"padding": {"strategy": {"Fixed": 64}}})
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (checkpoint / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": cut}))
    assert len(Tokenizer(checkpoint / "tokenizer.json", "here").encode("0123456789")) == 11


def test_a_panic_of_the_library_is_a_sentence(checkpoint, monkeypatch):
    """Which file panics differs from version to version, so the library's stand-in does."""

    class PanicException(BaseException):
        pass

    class Panicking:
        def encode(self, text, add_special_tokens):
            raise PanicException("index out of bounds")

    tokenizer = Tokenizer(checkpoint / "tokenizer.json", "here")
    monkeypatch.setattr(tokenizer, "_tokenizer", Panicking())
    with pytest.raises(CheckpointError, match="not a usable tokenizer: index out of bounds"):
        tokenizer.encode("a")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.abort()", r"it ended the process that opened it \(SIGABRT\)"),
        ("bytearray(1 << 36)", "opening it takes more than"),
        ("while True: pass", "opening it takes more than 2 seconds"),
        ("raise KeyError('x')", "the tokenizers library does not open it"),
        ("import os; os._exit(7)", r"it ended the process that opened it \(exit code 7\)"),
    ],
)
def test_whatever_happens_to_the_trial_is_a_sentence(checkpoint, monkeypatch, program, words):
    """The library's stand-in does what a hostile file might."""
    packages = checkpoint / "packages" / "tokenizers"
    packages.mkdir(parents=True)
    (packages / "__init__.py").write_text(
        f"class Tokenizer:\n    def from_file(name):\n        exec({program!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(packages.parent))
    monkeypatch.setattr("edgeforge.tokenizer._TRIAL_SECONDS", 2)
    with pytest.raises(CheckpointError, match=words):
        Tokenizer(checkpoint / "tokenizer.json", "here")


def test_a_tokenizer_is_tried_once(checkpoint, monkeypatch):
    Tokenizer(checkpoint / "tokenizer.json", "here")
    monkeypatch.setattr("edgeforge.tokenizer.subprocess", None)
    Tokenizer(checkpoint / "tokenizer.json", "here")


def test_a_tokenizer_that_does_not_know_every_character_is_no_damage(checkpoint):
    spoil(
        checkpoint,
        {
            "model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]},
            "pre_tokenizer": None,
        },
    )
    tokenizer = Tokenizer(checkpoint / "tokenizer.json", "here", text="a")
    assert tokenizer.encode("aa", special=False) == [0, 0]
    with pytest.raises(CheckpointError, match="not a usable tokenizer: Encountered an unknown"):
        tokenizer.encode("b")
