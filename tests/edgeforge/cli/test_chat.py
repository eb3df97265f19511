"""`chat` and `run --chat` as users meet them: pipes, terminals, commands, errors."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from edgeforge import api
from edgeforge.errors import UsageError
from edgeforge.synth.synthesise import TINY_EOS, synthesise
from edgeforge.verification.meaning.registry import READERS
from exporters.manifest import Manifest
from exporters.registry import TARGETS

TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|unused_259|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
TURN_END, CONTEXT = 259, 128


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    folder = synthesise("tiny-llama", root / "checkpoint")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        api.export(folder, root / "out", targets=list(TARGETS), recipe="int8", context=CONTEXT)
    return root / "out"


@pytest.fixture
def chat(edgeforge, monkeypatch):
    """Runs `chat` with bytes on stdin."""

    def run(artifact, given: bytes, *options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        return edgeforge("chat", artifact, *options)

    return run


def greedy(folder, prompt: list[int], most: int) -> list[int]:
    """What the artifact says to a prompt, by its session alone."""
    manifest = Manifest.read(folder)
    with api.load(folder, threads=1) as session:
        logits, made = session.extend(np.array(prompt, np.int64)), []
        while (token := int(logits.argmax())) not in manifest.model.eos and len(made) < most:
            made.append(token)
            logits = session.extend(np.array([token], np.int64))
    return made


@pytest.mark.parametrize("target", TARGETS)
def test_a_pipe_gives_a_message_a_line_on_every_target(artifacts, chat, target):
    folder = artifacts / target
    shown = chat(folder, b"\xef\xbb\xbfcats\r\n\n\xe2\x82\xac 5", "-n", "4", "--json")
    assert shown.code == 0, shown.err
    first, second = map(json.loads, shown.out.splitlines())
    prompt = [256, *b"user\ncats", TURN_END, *b"\n", 256, *b"assistant\n"]
    assert first["tokens"] == greedy(folder, prompt, 4)
    assert (first["prompt_tokens"], first["kept_tokens"]) == (len(prompt), 0)
    # The caches hold all but the last token, which was chosen and not yet run.
    kept = len(prompt) + len(first["tokens"]) - (first["stopped"] == "limit")
    assert 0 < second["kept_tokens"] <= kept
    if not set(first["tokens"]) - set(range(256)):
        assert second["kept_tokens"] == kept


def test_the_python_api_holds_the_same_conversation(artifacts, edgeforge):
    said = [
        json.loads(
            edgeforge(
                *("run", artifacts / "onnx", "--chat", "-p", "cats", "-n", "5", "--json"), *system
            ).out
        )["tokens"]
        for system in ((), ("--system", "S"))
    ]
    with api.conversation(artifacts / "onnx", max_tokens=5) as talk:
        assert list(talk.say("cats").tokens) == said[0]
    with api.conversation(artifacts / "onnx", system="S", max_tokens=5) as talk:
        assert list(talk.say("cats").tokens) == said[1]


@pytest.mark.parametrize("target", TARGETS)
def test_the_templates_end_of_a_turn_is_in_the_artifact(artifacts, target):
    folder = artifacts / target
    assert Manifest.read(folder).model.eos == (TINY_EOS, TURN_END)
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    # As the target's own files state it, for the runtimes that apps use.
    reading = READERS[target](folder, Manifest.read(folder))
    assert tuple(reading.ids["eos"]) == (TINY_EOS, TURN_END)


def test_answers_go_to_stdout_and_figures_to_stderr(artifacts, chat, edgeforge):
    shown = chat(artifacts / "onnx", b"cats\n/retry\n/reset\n/system S\ncats\n", "-n", "5")
    assert shown.code == 0
    summaries = [line for line in shown.err.splitlines() if line.startswith("[")]
    assert len(summaries) == 3 and "tokens/s" in summaries[0]
    one = edgeforge("run", artifacts / "onnx", "--chat", "-p", "cats", "-n", "5", "--json")
    said = json.loads(one.out)["text"]
    assert shown.out.startswith(f"{said}\n{said}\n")
    two = edgeforge(
        *("run", artifacts / "onnx", "--chat", "-p", "cats", "-n", "5", "--json"),
        *("--system", "S"),
    )
    assert shown.out == f"{said}\n{said}\n{json.loads(two.out)['text']}\n"
    assert json.loads(two.out)["prompt_tokens"] == json.loads(one.out)["prompt_tokens"] + 11


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (b"", 2, "there is no message"),
        (b"ok\n\xff\n", 2, "line 2 is not UTF-8 text"),
        (b"x" * 200, 2, f"leaves no room in the artifact's context of {CONTEXT}"),
        (b"x" * (17 << 20), 2, "line 1 has more than 16 MiB"),
    ],
)
def test_what_cannot_be_said_is_one_sentence(artifacts, chat, given, code, words):
    shown = chat(artifacts / "onnx", given, "-n", "1")
    assert shown.code == code
    assert words in shown.err.splitlines()[-1] and "Traceback" not in shown.err


def test_options_of_conversations_need_chat(edgeforge, artifacts):
    shown = edgeforge("run", artifacts / "onnx", "-p", "x", "--system", "y")
    assert shown.code == 2 and "--system is for conversations: add --chat" in shown.err
    shown = edgeforge("run", artifacts / "onnx", "--chat", "-p", "x", "--template-value", "y")
    assert shown.code == 2 and "--template-value y is not NAME=VALUE" in shown.err


class Terminal:
    """`chat` at a terminal of its own: keys go in, and what it shows comes out."""

    def __init__(self, *arguments: object) -> None:
        self.keys, inner = pty.openpty()
        command = [sys.executable, "-m", "edgeforge", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
        )
        os.close(inner)
        self.shown = ""

    def until(self, words: str) -> None:
        deadline = time.monotonic() + 60
        while words not in self.shown:
            assert time.monotonic() < deadline, self.shown
            self.shown += os.read(self.keys, 4096).decode(errors="replace")

    def type(self, text: str) -> None:
        self.shown = ""
        os.write(self.keys, text.encode())


def test_a_terminal_has_commands_and_ctrl_c_ends_only_the_answer(artifacts):
    terminal = Terminal(artifacts / "onnx", "-n", "100", "--temperature", "1")
    terminal.until(">>> ")
    terminal.type("/nothing\n")
    terminal.until("there is no /nothing; /help lists")
    terminal.type("/help\n")
    terminal.until("/system TEXT")
    terminal.type("x" * 200 + "\n")
    terminal.until("leaves no room")
    terminal.type("cats\n")
    terminal.until("tokens used]")
    # Before the next prompt a terminal gives Ctrl-D to nobody: readline takes keys one by one.
    terminal.shown = terminal.shown.rpartition("tokens used]")[2]
    terminal.until(">>> ")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
    os.close(terminal.keys)


def test_ctrl_c_ends_an_answer_between_tokens_and_a_second_one_the_command():
    from edgeforge.cli.chat import _ending_answers

    before = signal.getsignal(signal.SIGINT)
    with _ending_answers() as is_stopped:
        assert not is_stopped()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert is_stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) == before


def test_values_of_the_template_are_json_or_texts():
    from edgeforge.cli.chat_options import template_values

    assert template_values(["a=true", "b=high", "c=[1]"]) == {"a": True, "b": "high", "c": [1]}
    with pytest.raises(UsageError, match="is not NAME=VALUE"):
        template_values(["=x"])
