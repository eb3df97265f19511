"""Chat templates: which is taken, what it may use, and what a bad one can do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeforge.chat.template import ChatTemplate, find_template
from edgeforge.errors import CheckpointError

HELLO = [[{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Yes"}]]
MARKED = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


def config(folder: Path, **keys: object) -> dict[str, Path]:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(keys), encoding="utf-8")
    return {path.name: path}


def test_messages_are_written_with_the_special_tokens_and_without_escapes(tmp_path):
    files = config(tmp_path, chat_template=MARKED, eos_token={"content": "</s>"}, pad_token=None)
    found = find_template(files)
    assert found is not None and found.tokens == {"eos_token": "</s>"}
    assert found.render(HELLO) == ["<|user|>Hi <b></s><|assistant|>Yes</s>"]


def test_a_file_of_its_own_goes_first_and_of_several_the_default(tmp_path):
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    files = config(tmp_path, chat_template=named)
    assert find_template(files).render(HELLO) == ["D"]
    own = tmp_path / "chat_template.jinja"
    own.write_text("own", encoding="utf-8")
    assert find_template({**files, own.name: own}).render(HELLO) == ["own"]
    assert find_template(config(tmp_path, chat_template=named[:1])) is None
    assert find_template(config(tmp_path)) is None
    assert find_template({}) is None


def test_templates_can_use_what_transformers_gives_them(tmp_path):
    text = (
        "{{ strftime_now('%d %b %Y') }} {{ {'a': '<é>'} | tojson }} {{ tools is none }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %} {{ m.content[:2] }}{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    template = ChatTemplate(tmp_path, text)
    (made,) = template.render(HELLO, answer_next=True, today="2026-01-31")
    assert made == '31 Jan 2026 {"a": "<é>"} True Hi>'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ 'a' * 9999999999 }}", "memory"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, text, why):
    with pytest.raises(CheckpointError, match=f"chat template in .* cannot be used: .*{why}"):
        ChatTemplate(tmp_path / "x.json", text).render(HELLO)


def test_a_template_without_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("edgeforge.chat.template._SECONDS", 1)
    loop = "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3
    with pytest.raises(CheckpointError, match="does not end within 1 seconds"):
        ChatTemplate(tmp_path / "x.json", loop.replace("x", "")).render(HELLO)


def test_a_damaged_file_is_named(tmp_path):
    own = tmp_path / "chat_template.jinja"
    own.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
        find_template({own.name: own})
