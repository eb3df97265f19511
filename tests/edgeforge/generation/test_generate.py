"""Text in, text out: what reaches the session, what comes back, why it ends."""

import json

import numpy as np
import pytest

import device_harness.device_session
from device_harness.errors import DeviceError
from device_harness.session import HostSession
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.generation.generate import generate
from edgeforge.synth.synthesise import write_byte_tokenizer
from exporters.errors import ExportError
from exporters.manifest import Manifest
from exporters.manifest_records import ModelRecord, SourceRecord

BOS, EOS, VOCAB, CONTEXT = 256, 257, 512, 64


class Script(HostSession):
    """A session that says its text whatever it is given, one byte after the other."""

    def __init__(self, text: str, then: int = EOS) -> None:
        self.tokens, self.then = list(text.encode()), then
        self.given: list[int] = []
        self.context, self.vocab_size, self.runtime = CONTEXT, VOCAB, "script"

    def reset(self) -> None:
        self.given, self.place = [], 0

    def extend(self, tokens):
        self.given += tokens.tolist()
        token = self.tokens[self.place] if self.place < len(self.tokens) else self.then
        self.place += 1
        logits = np.zeros(VOCAB, np.float32)
        logits[token] = 5.0
        return logits


@pytest.fixture
def described(tmp_path):
    """What `generate` reads of an artifact: a manifest and a byte tokenizer."""

    def write(**model):
        Manifest(
            target="onnx",
            entry="model.onnx",
            recipe="fp32",
            context=CONTEXT,
            source=SourceRecord("", "", None, "", {}),
            model=ModelRecord.from_json({"bos": BOS, "eos": [EOS], "vocab_size": VOCAB, **model}),
            bits_per_weight=32.0,
            weights={},
            inputs={},
            outputs={},
            states={},
            notes=(),
            tools={},
        ).write(tmp_path)
        write_byte_tokenizer(tmp_path)
        return tmp_path

    return write


@pytest.fixture
def say(monkeypatch):
    """Puts a session that says a text in place of the runtime."""

    def put(text: str, **options) -> Script:
        session = Script(text, **options)
        monkeypatch.setattr(device_harness.device_session, "open_on", lambda *_: session)
        return session

    return put


def without_post_processor(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_a_prompt_is_continued_until_the_model_ends_the_text(described, say):
    session = say("ève €5")
    pieces: list[str] = []
    result = generate(described(), "né", emit=pieces.append)
    assert session.given[:4] == [BOS, *"né".encode()]
    assert result.text == "".join(pieces) == "ève €5"
    assert pieces == list("ève €5")
    assert result.tokens == tuple("ève €5".encode())
    assert (result.prompt_tokens, result.stopped) == (4, "stop")
    assert "the model ended the text" in result.summary()
    assert result.first_token_seconds > 0
    with pytest.raises(DeviceError, match="this session is closed"):
        session._require_open()


def test_a_character_cut_off_by_the_limit_comes_last(described, say):
    say("a€")
    pieces: list[str] = []
    result = generate(described(), "x", max_tokens=3, emit=pieces.append)
    assert pieces == ["a", "\ufffd"] and result.stopped == "limit"
    assert "as many as asked for" in result.summary()


def test_a_full_context_is_the_reason_it_ends(described, say):
    say("y" * 500)
    result = generate(described(), "x" * 20, max_tokens=400)
    assert result.stopped == "context" and result.text == "y" * (CONTEXT - 20)
    assert "the context is full" in result.summary()


def test_a_prompt_of_the_whole_context_is_refused(described, say):
    session = say("y")
    words = rf"the prompt has {CONTEXT} tokens.*context of {CONTEXT}"
    with pytest.raises(UsageError, match=words):
        generate(described(), "x" * (CONTEXT - 1))
    assert not session.given
    assert generate(described(), "x" * (CONTEXT - 2)).text == "y"


def test_an_empty_prompt_needs_a_token_that_begins_a_text(described, say):
    session = say("y")
    generate(described(), "")
    assert session.given[0] == BOS
    folder = described(bos=None)
    without_post_processor(folder)
    with pytest.raises(UsageError, match="the prompt is empty and the model has no token"):
        generate(folder, "")


@pytest.mark.parametrize("bos", [None, BOS, 300])
def test_what_the_tokenizer_gives_is_fed_whatever_bos_the_config_names(described, say, bos):
    session = say("y")
    folder = described(bos=bos)
    assert generate(folder, "a").notes == ()
    assert session.given[:2] == [BOS, 97]
    without_post_processor(folder)
    generate(folder, "a")
    assert session.given[0] == 97


def test_a_prompt_that_begins_with_bos_gets_no_second_one_and_a_note(described, say):
    session = say("y")
    folder = described()
    result = generate(folder, "<|begin|>a")
    assert session.given[:2] == [BOS, 97] and result.prompt_tokens == 2
    (note,) = result.notes
    assert "was not put there once more" in note and result.to_json()["notes"] == (note,)
    # A tokenizer that adds nothing leaves the prompt's own.
    without_post_processor(folder)
    assert generate(folder, "<|begin|>a").notes == ()
    assert session.given[:2] == [BOS, 97]
    # Two of them in the prompt are what somebody wrote on purpose, or by chance: one is kept more.
    generate(described(), "<|begin|><|begin|>a")
    assert session.given[:3] == [BOS, BOS, 97]


def test_every_token_that_ends_a_text_does(described, say):
    say("ab", then=300)
    assert generate(described(eos=[EOS, 300]), "x").stopped == "stop"
    assert generate(described(eos=[]), "x", max_tokens=5).stopped == "limit"


def test_another_models_tokenizer_is_refused(described, say):
    session = say("y")
    with pytest.raises(UsageError, match=r"gives token 256, but the model has 200.*--tokenizer"):
        generate(described(vocab_size=200), "x")
    assert not session.given


def test_a_prompt_that_is_no_text_is_refused(described, say):
    say("y")
    with pytest.raises(UsageError, match="the prompt is not UTF-8"):
        generate(described(), "caf\udce9")


def test_bad_options_are_refused_before_anything_is_opened(tmp_path):
    with pytest.raises(UsageError, match="--temperature -1"):
        generate(tmp_path / "nowhere", "x", temperature=-1)
    with pytest.raises(UsageError, match="--top-p 2"):
        generate(tmp_path / "nowhere", "x", top_p=2)


def test_a_folder_that_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"is no EdgeForge artifact"):
        generate(tmp_path, "x")


def test_no_tokenizer_is_refused(described, say):
    say("y")
    folder = described()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json.*--tokenizer PATH"):
        generate(folder, "x")


def test_what_json_shows_is_what_was_given(described, say):
    say("abc")
    result = generate(described(), "x")
    data = json.loads(json.dumps(result.to_json()))
    assert data["text"] == "abc" and data["tokens"] == [97, 98, 99]
    assert data["stopped"] == "stop" and data["prompt_tokens"] == 2
