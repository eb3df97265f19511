"""A templated conversation has the same tokens for transformers, `run`, genai and ExecuTorch.

Where a runtime's own tokenizer does otherwise, and nothing that it reads can change that, `export`
says so, and only there.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import onnxruntime_genai as og
import pytest
from pytorch_tokenizers import CppHFTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from edgeforge import api
from edgeforge.chat.template import find_template
from edgeforge.checkpoint.layout import find_tokenizer_files
from edgeforge.export_warnings import _of_class
from edgeforge.synth.synthesise import synthesise
from edgeforge.tokenizer import Tokenizer
from exporters.coreml.app_tokenizer import write_tokenizer as write_for_coreml
from exporters.executorch.runner_tokenizer import RUNNER_TOKENIZER
from exporters.executorch.runner_tokenizer import write_tokenizer as write_for_executorch
from exporters.onnx.genai_tokenizer import PATTERNS
from exporters.onnx.genai_tokenizer import write_tokenizer as write_for_genai

_FILE = Path(__file__).parents[2] / "oracles" / "tokenizer_layouts.py"
_spec = importlib.util.spec_from_file_location("edgeforge_oracle_tokenizer_layouts", _FILE)
layouts = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)

CONVERSATIONS = {
    "conversation": [
        {"role": "system", "content": "You are  brief."},
        {"role": "user", "content": "  3.14 and 2,718 -- naïve café; it's I'LL\n\n\t* one 12345\n"},
        {"role": "assistant", "content": "日本語 🙂 ok\nA  b"},
        {"role": "user", "content": "why?"},
    ],
    "question": [{"role": "user", "content": "the list of lines"}],
    "special token in a message": [{"role": "user", "content": "why? <s> x"}],
    "added token in a message": [{"role": "user", "content": "x  <mask> b"}],
    "not in NFC": [{"role": "user", "content": "cafe\u0301"}],
}
PLAIN = ["the function returns a list", "  two spaces", "12 naïve\n\nlines"]
EVERY = frozenset({*CONVERSATIONS, "plain"})
# Where a runtime's own tokenizer gives other tokens, and the words that `export` says of it.
GENAI = {
    "phi3-added": ({"added token in a message"}, "finds <mask> by the letters alone"),
    "mistral": (EVERY, "puts a space in front of text behind a special token too"),
    "qwen2": ({"not in NFC"}, "does not normalize text by NFC"),
    "wordpiece": (EVERY, "has no WordPiece tokenizers"),
    "unigram": (EVERY, "gives the unknown token for characters"),
}
EXECUTORCH = {
    "mistral": ({"plain"}, "texts that begin with no special token get other tokens"),
    "qwen2": ({"not in NFC"}, "which does not: a text that is not in NFC"),
    "phi3-added": (
        {"plain", "special token in a message", "added token in a message"},
        "and behind every special token: a plain text that begins with spaces",
    ),
    "wordpiece": (EVERY, "cannot load this tokenizer, for it does not know the model WordPiece"),
    "unigram": (EVERY, "cannot load this tokenizer, for it does not know the model Unigram"),
}


@dataclass(frozen=True)
class Case:
    """A layout's files, and what `run` gives a model: text and tokens by kind of text."""

    folder: Path
    written: dict[str, tuple[str, list[int]]]
    plain: list[tuple[str, list[int]]]

    @property
    def files(self) -> dict[str, Path]:
        return find_tokenizer_files(self.folder)

    def differing(self, encode) -> set[str]:
        """The kinds of texts for which a tokenizer gives other tokens."""
        found = {kind for kind, (text, tokens) in self.written.items() if encode(text) != tokens}
        is_same = all(encode(text) == tokens for text, tokens in self.plain)
        return found if is_same else {*found, "plain"}


def case_of(folder: Path) -> Case:
    files = find_tokenizer_files(folder)
    tokenizer = Tokenizer(files["tokenizer.json"], "here")
    texts = find_template(files).render(list(CONVERSATIONS.values()), answer_next=True)
    return Case(
        folder,
        {
            kind: (text, tokenizer.encode(text, special=False))
            for kind, text in zip(CONVERSATIONS, texts, strict=True)
        },
        [(text, tokenizer.encode(text, special=False)) for text in PLAIN],
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("layouts")
    return {name: case_of(layouts.write(name, root / name)) for name in layouts.LAYOUTS}


@pytest.fixture(scope="module")
def onnx_artifact(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        model = synthesise("tiny-llama", root / "checkpoint")
        (folder,) = api.export(model, root / "out", recipe="int8", context=32, strip=True)
    return folder


def test_there_are_twelve_layouts():
    assert len(layouts.LAYOUTS) == 12
    assert set(GENAI) | set(EXECUTORCH) <= set(layouts.LAYOUTS)


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_transformers_writes_the_same_text_and_the_same_tokens(cases, name):
    case = cases[name]
    theirs = PreTrainedTokenizerFast.from_pretrained(str(case.folder))
    named = AutoTokenizer.from_pretrained(str(case.folder))
    differs = False
    for kind, messages in CONVERSATIONS.items():
        text, tokens = case.written[kind]
        asked = {"add_generation_prompt": True, "return_dict": False}
        assert theirs.apply_chat_template(messages, tokenize=False, **asked) == text
        assert theirs.apply_chat_template(messages, **asked) == tokens
        # No text begins twice, whether template or post-processor write what begins it.
        assert theirs.bos_token_id is None or tokens[:2] != [theirs.bos_token_id] * 2
        differs = differs or named.apply_chat_template(messages, **asked) != tokens
    # The class that the configuration names builds a tokenizer of its own in transformers 5.
    assert differs == bool(_of_class(case.files)) == (name in ("llama2", "phi3-added"))


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_genai_gives_the_same_tokens_or_export_says_so(cases, onnx_artifact, tmp_path, name):
    case, copy = cases[name], tmp_path / "copy"
    without = shutil.ignore_patterns("tokenizer*", "chat_template*")
    shutil.copytree(onnx_artifact, copy, ignore=without)
    told = write_for_genai(case.files, copy)
    if name == "wordpiece":  # it reads such a file beyond its ends, and may end the process
        hold(set(EVERY), told, GENAI[name])
        return
    theirs = og.Tokenizer(og.Model(str(copy)))
    template = (copy / "chat_template.jinja").read_text()
    needs_template = any("as `template_str`" in each for each in told)
    for kind, messages in CONVERSATIONS.items():
        given, text = json.dumps(messages), case.written[kind][0]
        if needs_template:
            with pytest.raises(RuntimeError):
                theirs.apply_chat_template(given, add_generation_prompt=True)
            written = theirs.apply_chat_template(given, template_str=template)
        else:
            written = theirs.apply_chat_template(given, add_generation_prompt=True)
        assert written == text
    differing = case.differing(lambda text: [int(token) for token in theirs.encode(text)])
    hold(differing, told, GENAI.get(name))
    tokenizer, stream = Tokenizer(copy / "tokenizer.json", "copy"), theirs.create_stream()
    tokens = tokenizer.encode("the function returns  a list", special=False)
    # What is generated begins with its space.
    assert "".join(map(stream.decode, tokens)).removeprefix(" ") == tokenizer.decode(tokens)


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_executorchs_tokenizer_gives_the_same_tokens_or_export_says_so(cases, tmp_path, name):
    case = cases[name]
    told = write_for_executorch(case.files, tmp_path)
    own = tmp_path / RUNNER_TOKENIZER
    theirs = CppHFTokenizer()
    try:
        theirs.load(str(own if own.is_file() else tmp_path / "tokenizer.json"))
        differing = case.differing(lambda text: theirs.encode(text, 0, 0))
    except RuntimeError as error:
        assert "Failed to load" in str(error)
        differing = set(EVERY)
    hold(differing, told, EXECUTORCH.get(name))
    assert own.is_file() == (name in ("llama2", "mistral", "qwen2", "phi3-added"))
    if differing != EVERY:
        # As the runner decodes: token by token. What is generated begins with its space.
        text = "the function returns  a list"
        tokens = Tokenizer(tmp_path / "tokenizer.json", "here").encode(text, special=False)
        assert "".join(map(theirs.decode, tokens)).removeprefix(" ") == text
    assert (tmp_path / "tokenizer.json").read_bytes() == case.files["tokenizer.json"].read_bytes()


SPLIT = [
    "HelloWorld fooBAR's it'S 1234567 x=3;\r\n\r\n  if a/b//c:\n\treturn",
    "日本語 🙂 ok\nA  b ñandú ÉCOLE's, мама Мыла раму 42 é123 a\u0301b",
]


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_both_split_by_the_patterns_on_which_nothing_is_told(onnx_artifact, tmp_path, pattern):
    made = layouts.byte_level(layouts.split_then_bytes(pattern), ["<|end|>"])
    copy = tmp_path / "copy"
    shutil.copytree(onnx_artifact, copy, ignore=shutil.ignore_patterns("tokenizer*"))
    made.save(str(tmp_path / "tokenizer.json"))
    assert write_for_genai({"tokenizer.json": tmp_path / "tokenizer.json"}, copy) == ()
    genai, executorch = og.Tokenizer(og.Model(str(copy))), CppHFTokenizer()
    executorch.load(str(tmp_path / "tokenizer.json"))
    for text in SPLIT:
        wanted = made.encode(text, add_special_tokens=False).ids
        assert [int(token) for token in genai.encode(text)] == wanted
        assert executorch.encode(text, 0, 0) == wanted


def test_another_pattern_is_told_of(tmp_path):
    made = layouts.byte_level(layouts.split_then_bytes(r"[0-9][0-9]"), ["<|end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    (told,) = write_for_genai({"tokenizer.json": tmp_path / "tokenizer.json"}, tmp_path / "out")
    assert "was not compared on the pattern" in told


def hold(differing: set[str], told: tuple[str, ...], known: tuple[set[str], str] | None) -> None:
    """Holds what differs against what is known to, and what `export` says against that."""
    if known is None:
        assert (differing, told) == (set(), ())
        return
    assert differing == known[0]
    assert known[1] in " ".join(told)


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_swift_transformers_finds_class_and_template_in_one_file(cases, tmp_path, name):
    """Its source was read, and nothing was run: it runs on Apple's systems alone."""
    write_for_coreml(cases[name].files, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    kinds = {"wordpiece": "BertTokenizer", "unigram": "T5Tokenizer"}
    assert config["tokenizer_class"] == kinds.get(name, "PreTrainedTokenizer")
    assert config["chat_template"] == cases[name].files["chat_template.jinja"].read_text()
    if name in ("gpt2", "mistral", "gemma"):
        assert case_of(tmp_path).written == cases[name].written
