"""Conversations: which tokens are run again, what ends an answer, what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest

import device_harness.device_session
from device_harness.session import HostSession
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.generation.conversation import ChatOptions, open_conversation
from edgeforge.synth.synthesise import write_byte_tokenizer
from exporters.manifest import Manifest
from exporters.manifest_records import ModelRecord, SourceRecord

BOS, EOS, TURN_END, VOCAB, CONTEXT = 256, 257, 259, 512, 96
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|unused_259|>"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
TRIMMED = TEMPLATE.replace("m.content", "m.content | trim")


class Speaker(HostSession):
    """A session that gives its next answer to each prompt, one token after the other."""

    def __init__(self, *answers: str | list[int], then: int = EOS, rewinds: bool = True) -> None:
        self.can_rewind = rewinds
        each = [list(a.encode()) if isinstance(a, str) else a for a in answers]
        self.answers, self.then = iter([*a, then] for a in each), then
        self.given: list[int] = []  # what the caches hold
        self.calls: list[int] = []  # how many tokens each prompt's call had
        self.left: list[int] = []
        self.context, self.vocab_size, self.runtime = CONTEXT, VOCAB, "speaker"

    def reset(self) -> None:
        self.given, self.left = [], []

    def rewind(self, length: int) -> None:
        assert self.can_rewind and length < len(self.given)
        del self.given[length:], self.left[:]

    def extend(self, tokens):
        self.given += tokens.tolist()
        if len(tokens) > 1 or not self.left:
            self.left = list(next(self.answers))
            self.calls.append(len(tokens))
        logits = np.zeros(VOCAB, np.float32)
        logits[self.left.pop(0)] = 5.0
        return logits


@pytest.fixture
def described(tmp_path):
    """What a conversation reads of an artifact: manifest, byte tokenizer and chat template."""

    def write(template: str | None = TEMPLATE) -> Path:
        Manifest(
            target="onnx",
            entry="model.onnx",
            recipe="fp32",
            context=CONTEXT,
            source=SourceRecord("", "", None, "", {}),
            model=ModelRecord.from_json({"bos": BOS, "eos": [EOS], "vocab_size": VOCAB}),
            bits_per_weight=32.0,
            weights={},
            inputs={},
            outputs={},
            states={},
            notes=(),
            tools={},
        ).write(tmp_path)
        write_byte_tokenizer(tmp_path)
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return write


@pytest.fixture
def talk(monkeypatch, described):
    """Opens a conversation with a speaker in place of the runtime."""

    def opened(speaker: Speaker, written: str | None = TEMPLATE, change=None, **options):
        monkeypatch.setattr(device_harness.device_session, "open_on", lambda *_: speaker)
        folder = described(written)
        if change is not None:
            change(folder / "tokenizer.json")
        return open_conversation(folder, ChatOptions(**options))

    return opened


def written(text: str) -> list[int]:
    """The tokens of a text in which ``^`` begins a text and ``$`` ends a turn."""
    return [{"^": BOS, "$": TURN_END}.get(c, ord(c)) for c in text]


def test_only_new_tokens_are_run_while_the_text_before_stays(talk):
    speaker = Speaker("yes", "no")
    pieces: list[str] = []
    with talk(speaker, system="S") as conversation:
        first = conversation.say("hi", pieces.append)
        assert (first.text, "".join(pieces), first.stopped) == ("yes", "yes", "stop")
        # The begin token is the template's alone, though the tokenizer puts one in front of texts.
        assert speaker.given == written("^s:S$u:hi$a:yes")
        second = conversation.say("ok")
    assert speaker.given == written("^s:S$u:hi$a:yes$u:ok$a:no")
    assert speaker.calls == [len("^s:S$u:hi$a:"), len("$u:ok$a:")]
    assert (second.kept_tokens, second.prompt_tokens) == (15, 23)
    assert second.notes == () and "8 tokens read after 15 that were kept" in second.summary()


@pytest.mark.parametrize("rewinds", [True, False])
def test_what_a_template_writes_otherwise_is_run_again_and_a_note_says_so(talk, rewinds):
    speaker = Speaker(" yes", "no", rewinds=rewinds)
    with talk(speaker, TRIMMED) as conversation:
        conversation.say("hi")
        second = conversation.say("ok")
    assert speaker.given == written("^u:hi$a:yes$u:ok$a:no")
    kept = len("^u:hi$a:") if rewinds else 0
    assert second.kept_tokens == kept and speaker.calls[1] == 19 - kept
    (note,) = second.notes
    words = "all but the first 8 of its 19" if rewinds else "all of its 19"
    assert f"otherwise than before, so {words} tokens were run again" in note


def with_a_token_for_ab(path: Path) -> None:
    rows = json.loads(path.read_text())
    rows["model"] |= {"vocab": {**rows["model"]["vocab"], "ab": 256}, "merges": [["a", "b"]]}
    rows["added_tokens"] = [{**row, "id": row["id"] + 1} for row in rows["added_tokens"]]
    path.write_text(json.dumps(rows))


def test_an_answer_stays_the_tokens_that_the_model_chose(talk):
    speaker = Speaker("ab", "no")  # two tokens, for which the tokenizer has one
    with talk(speaker, change=with_a_token_for_ab) as conversation:
        conversation.say("ab")
        second = conversation.say("ok")
    assert second.kept_tokens == 9 and second.notes == ()
    begin, end, ab = BOS + 1, TURN_END + 1, 256
    wanted = [begin, *b"u:", ab, end, *b"a:ab", end, *b"u:ok", end, *b"a:no"]
    assert speaker.given == wanted


def test_the_templates_end_of_a_turn_ends_an_answer_and_so_does_every_eos(talk):
    for end in (TURN_END, EOS):
        with talk(Speaker("yes", then=end)) as conversation:
            result = conversation.say("hi")
            assert (result.text, result.stopped) == ("yes", "stop")


def test_an_answer_ends_at_the_limit_the_context_or_when_asked(talk):
    with talk(Speaker("y" * 200), max_tokens=7) as conversation:
        result = conversation.say("hi")
        assert (result.text, result.stopped) == ("y" * 7, "limit")
    with talk(Speaker("y" * 200, "")) as conversation:
        result = conversation.say("hi")
        assert result.stopped == "context" and len(result.tokens) == CONTEXT - 7
        assert f"{CONTEXT} of {CONTEXT} tokens used" in result.summary()
        with pytest.raises(UsageError, match=rf"leaves no room in the .* context of {CONTEXT}"):
            conversation.say("ok")
        conversation.reset()  # the refused message is no part of the conversation
        assert conversation.say("hi").text == ""
    said: list[str] = []
    with talk(Speaker("yes", "no")) as conversation:
        result = conversation.say("hi", said.append, lambda: len(said) >= 1)
        assert result.stopped == "interrupted" and result.text in ("y", "ye")
        assert conversation.say("ok").text == "no"


def test_undo_and_reset_forget_what_was_said_without_a_note(talk):
    speaker = Speaker("one", "two", "three", "four")
    with talk(speaker) as conversation:
        conversation.say("a")
        conversation.say("b")
        assert conversation.undo() == "b"
        assert conversation.say("c").notes == ()
        assert speaker.given == written("^u:a$a:one$u:c$a:three")
        conversation.reset()
        assert conversation.say("d").notes == ()
        assert speaker.given == written("^u:d$a:four")
        assert conversation.undo() == "d" and conversation.undo() is None


def test_a_character_is_never_printed_by_halves(talk):
    pieces: list[str] = []
    with talk(Speaker("né €")) as conversation:
        conversation.say("hi", pieces.append)
    assert pieces == list("né €")


def test_values_reach_the_template(talk):
    template = "{% if enable_thinking %}T{% else %}F{% endif %}a:"
    speaker = Speaker("x", "y")
    with talk(speaker, template, values={"enable_thinking": True}) as conversation:
        conversation.say("hi")
    assert speaker.given == written("Ta:x")


def test_a_model_without_a_template_is_refused_with_what_to_do(talk, tmp_path):
    with (
        pytest.raises(UsageError, match=r"has no chat template.*edgeforge run.*--chat-template"),
        talk(Speaker(), None),
    ):
        pass
    own = tmp_path / "own.jinja"
    own.write_text(TEMPLATE)
    speaker = Speaker("x")
    with talk(speaker, None, template=own) as conversation:
        conversation.say("hi")
    assert speaker.given == written("^u:hi$a:x")
    with pytest.raises(UsageError, match="is not a file"), talk(Speaker(), template=own / "no"):
        pass


def test_a_template_that_refuses_a_conversation_is_quoted(talk):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    with talk(Speaker("x"), refusing, system="S") as conversation:
        with pytest.raises(UsageError, match=r"no system prompt: leave it out \(.*: no system\)"):
            conversation.say("hi")
        conversation.system = None
        assert conversation.say("hi").text == "x"
    with (
        talk(Speaker(), "{{ raise_exception('never') }}", system="S") as conversation,
        pytest.raises(CheckpointError, match=r"cannot be used: never$"),
    ):
        conversation.say("hi")
