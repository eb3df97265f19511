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
        ("{{ raise_exception('only one turn') }}", "(?<=used: )only one turn$"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ 'a' * 9999999999 }}", "memory"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "it sets _x in a namespace"),
        (
            "{% for a in range(9999) %}{{ 'abcdefghij' * 1000 }}{% endfor %}",
            "it writes more than 16 million characters",
        ),
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


def test_what_a_generation_block_sets_is_not_seen_outside_as_in_transformers(tmp_path):
    from transformers.utils.chat_template_utils import render_jinja_template

    text = (
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
        "{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}{{ dict(b=3).b }}"
    )
    (theirs,), _ = render_jinja_template(HELLO, chat_template=text)
    assert ChatTemplate(tmp_path, text).render(HELLO) == [theirs] == ["2123"]


def test_special_tokens_come_from_the_older_file_where_none_are_listed(tmp_path):
    template = "{{ bos_token }}{{ eos_token }}{{ sep_token }}"
    older = tmp_path / "special_tokens_map.json"
    older.write_text(json.dumps({"bos_token": {"content": "<s>"}, "sep_token": "|"}))
    files = {**config(tmp_path, chat_template=template, eos_token="</s>"), older.name: older}
    assert find_template(files).render(HELLO) == ["<s></s>|"]
    files |= config(tmp_path, chat_template=template, eos_token="</s>", added_tokens_decoder={})
    assert find_template(files).render(HELLO) == ["</s>"]


def test_a_processors_file_comes_last_and_templates_may_be_named_in_an_object(tmp_path):
    last = tmp_path / "chat_template.json"
    last.write_text(json.dumps({"chat_template": "last"}))
    assert find_template({last.name: last}).render(HELLO) == ["last"]
    files = {**config(tmp_path, chat_template={"default": "first"}), last.name: last}
    assert find_template(files).render(HELLO) == ["first"]


def test_a_damaged_file_is_named(tmp_path):
    own = tmp_path / "chat_template.jinja"
    own.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
        find_template({own.name: own})
